#include "pipeline/gemma4/perplexity.h"

#include <cmath>

namespace circlet::gemma4 {

double NegativeLogLikelihood(const Tails& tails) {
  double sum = 0;
  for (size_t i = 0; i + 1 < tails.size(); ++i) sum += std::log(tails[i].sum) + tails[i].top - tails[i].target;
  return sum;
}

}  // namespace circlet::gemma4
