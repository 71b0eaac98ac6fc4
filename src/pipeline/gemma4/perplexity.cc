#include "pipeline/gemma4/perplexity.h"

#include <cmath>

namespace circlet::gemma4 {
namespace {

double Loss(const Tail& tail) { return tail.LogSumExp() - tail.target; }

// exp is smooth: its standard error is its slope times that of the mean.
Mean Exponential(const Mean& mean) {
  const double value = std::exp(mean.value);
  return {value, value * mean.standard_error};
}

}  // namespace

WindowLoss LossOf(const Tails& tails) {
  WindowLoss loss;
  for (size_t i = 0; i + 1 < tails.size(); ++i) {
    ++loss.tokens;
    loss.reference += Loss(tails[i].reference);
    loss.quantized += Loss(tails[i].quantized);
  }
  return loss;
}

Perplexity PerplexityOf(std::span<const WindowLoss> windows) {
  std::vector<Cluster> reference, quantized, difference;
  Perplexity perplexity{.windows = static_cast<int64_t>(windows.size())};
  for (const WindowLoss& window : windows) {
    perplexity.tokens += window.tokens;
    reference.push_back({window.tokens, window.reference});
    quantized.push_back({window.tokens, window.quantized});
    difference.push_back({window.tokens, window.quantized - window.reference});
  }
  const Mean of_reference = Exponential(MeanOf(reference)), of_quantized = Exponential(MeanOf(quantized));
  perplexity.float_value = of_reference.value;
  perplexity.float_error = of_reference.standard_error;
  perplexity.quantized_value = of_quantized.value;
  perplexity.quantized_error = of_quantized.standard_error;
  perplexity.log_loss_difference = MeanOf(difference);
  return perplexity;
}

}  // namespace circlet::gemma4
