#pragma once

#include "pipeline/gemma4/tails.h"

namespace circlet::gemma4 {

// Of a window: the sum of -log p(next token) over all positions that have a next one.
double NegativeLogLikelihood(const Tails& tails);

}  // namespace circlet::gemma4
