#pragma once

// The vision side of a model as stages and units. Pictures are items of their own; sequences fetch their features.

#include <memory>

#include "circlet/model/gemma4/vision.h"
#include "pipeline/gemma4/text_stages.h"

namespace circlet::gemma4 {

class VisionRun {
 public:
  // context.config.vision is set.
  explicit VisionRun(RunContext& context);
  ~VisionRun();

  // Tables, patch embedder, encoder layers, pooler, projection. After each, what no later stage reads is dropped by
  // DropAfter with the stage's index.
  std::vector<Stage> Stages();
  void DropAfter(size_t stage);
  // Behind the embeddings and the units, which were the last to read features and boundaries.
  void DropAll();

  // Units of the verification picture's layout: split by layer; pixels to projected tokens in one; encoder, model and
  // embedder as parts.
  void WriteSplitUnits(UnitWriter& writer);
  void WritePrefillUnit(UnitWriter& writer);
  void WritePartUnits(UnitWriter& writer);
  // text and picture features -> fused sequence; ids and pixels -> last hidden state (dialect default).
  void WriteFusionUnit(UnitWriter& writer);
  void WriteFullUnit(UnitWriter& writer);

 private:
  struct State;
  std::unique_ptr<State> state_;
};

}  // namespace circlet::gemma4
