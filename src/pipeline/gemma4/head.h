#pragma once

// The last stage: logits of every position, in slices of the vocabulary and of the sequence. A slice of the head's
// weight lives at a time; logits never stand in memory whole.

#include <utility>
#include <vector>

#include "pipeline/stage.h"
#include "pipeline/gemma4/text_stages.h"

namespace circlet::gemma4 {

struct HeadResult {
  StageError error;
  Shape shape;                                   // of the last measured sample's logits
  std::vector<std::pair<float, float>> scatter;  // float, quantized
  double float_nll = 0, quantized_nll = 0;       // sums over all windows
  int64_t window_tokens = 0;
  int64_t captions = 0, float_exact = 0, quantized_exact = 0;
};

// Key of the final norm's output in the store.
inline constexpr char kNormedKey[] = "last_hidden_state";

// How the head is cut: rows of the vocabulary and positions at a time. An average over samples (EMA) takes each sample
// in one piece, whatever that needs.
struct HeadSlices {
  int64_t rows = 0, positions = 0;
  bool side_by_side = false;
};
HeadSlices SlicesOf(const RunContext& context);

// Observes the calibration samples' logits, freezes their grids, and measures. `stage.items` are `context`'s.
HeadResult RunHead(const RunContext& context, const StageContext& stage);
// Items times readings times slices of the vocabulary that it will count.
int64_t HeadWork(const RunContext& context);

// Fake-quantized logits [1,S,V] of the final norm's output.
Tensor RoundedLogits(const RunContext& context, const Tensor& normed);

}  // namespace circlet::gemma4
