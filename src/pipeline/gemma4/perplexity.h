#pragma once

#include <span>

#include "circlet/pipeline/quantize.h"
#include "pipeline/gemma4/tails.h"

namespace circlet::gemma4 {

// Tokens of a window of the text.
inline constexpr int64_t kWindow = 255;

// Sums of -log p(next token) over the positions of a window that have a next one.
struct WindowLoss {
  int64_t tokens = 0;
  double reference = 0, quantized = 0;
};
WindowLoss LossOf(const Tails& tails);

// Perplexity of the windows, at least one.
Perplexity PerplexityOf(std::span<const WindowLoss> windows);

}  // namespace circlet::gemma4
