#pragma once

// What the output stage tells of the model's answers.

#include <utility>
#include <vector>

#include "circlet/base/tensor.h"
#include "circlet/pipeline/quantize.h"

namespace circlet {

struct HeadResult {
  StageError error;
  Shape shape;                                   // of the last measured sample's logits
  std::vector<std::pair<float, float>> scatter;  // float, quantized
  double float_nll = 0, quantized_nll = 0;       // sums over all windows
  int64_t window_tokens = 0;
  int64_t captions = 0, float_exact = 0, quantized_exact = 0;
};

}  // namespace circlet
