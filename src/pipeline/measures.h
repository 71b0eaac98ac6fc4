#pragma once

// What the output stage tells of the model's answers.

#include <optional>
#include <utility>
#include <vector>

#include "circlet/base/tensor.h"
#include "circlet/pipeline/quantize.h"

namespace circlet {

struct HeadResult {
  StageError error;
  Shape shape;                                   // of the last measured sample's logits
  std::vector<std::pair<float, float>> scatter;  // float, quantized
  std::optional<Perplexity> perplexity;
  std::optional<Agreement> agreement;
  std::optional<Captions> captions;
};

}  // namespace circlet
