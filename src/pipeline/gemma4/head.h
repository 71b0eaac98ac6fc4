#pragma once

// The last stage: logits of every position, in slices of the vocabulary and of the sequence. A slice of the head's
// weight lives at a time; logits never stand in memory whole.

#include <vector>

#include "pipeline/gemma4/context.h"
#include "pipeline/stage.h"

namespace circlet::gemma4 {

class Head final : public OutputStage {
 public:
  // At most `slice_bytes` of the weight in float32 at a time, and of logits.
  Head(const Context& context, int64_t slice_bytes);

  std::vector<std::string> Reads() const override;
  std::map<std::string, TensorType> Makes() const override;
  StageEstimate Estimate() const override;
  int64_t Work() const override;
  // Observes the calibration samples' logits, freezes their grids, measures, and computes the verification sample's.
  HeadResult Run(const StageContext& stage) override;

 private:
  class Measurement;

  Graph Build(int64_t length, int64_t rows) const;
  // Calls body(first, rows) with each slice of the vocabulary: its first row, and its rows as stored.
  template <typename Body>
  void ForVocabulary(const Body& body) const;

  const Context& context_;
  const int64_t vocab_, width_;
  // How the head is cut: rows of the vocabulary and positions at a time. An average over samples (EMA) takes each
  // sample in one piece, whatever that needs.
  int64_t rows_ = 0, positions_ = 0;
  bool side_by_side_ = false;
};

}  // namespace circlet::gemma4
