#pragma once

#include <span>

#include "pipeline/gemma4/context.h"
#include "pipeline/gemma4/tails.h"

namespace circlet::gemma4 {

// Whether a chain's greedy choice at every position of a caption's answer is the answer's next token, and at its end
// one of `stops`.
bool Answers(const Sequence& caption, std::span<const int> stops, const Tails& tails, Tail TailPair::*chain);

}  // namespace circlet::gemma4
