#pragma once

// What the head tells of a position while its logits pass by, a slice of the vocabulary at a time. A measure that needs
// every token's logits (perplexity, agreement, greedy answers) is a figure of a Tail, or of the two of a position.

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet::gemma4 {

// Columns of the vocabulary that are summed at a time. Slices are whole blocks, and sums of a position grow from block
// to block, so that no figure depends on where the head is cut, and so on the memory limit.
inline constexpr int64_t kVocabularyBlock = 512;

// One chain's logits at a position.
struct Tail {
  float top = -std::numeric_limits<float>::infinity();  // largest logit so far
  int64_t choice = 0;                                   // its token, the first of equals
  double sum = 0;                                       // of exp(logit - top)
  float target = 0;                                     // logit of the next token

  double LogSumExp() const;
};

// Both chains' logits at a position.
struct TailPair {
  Tail reference, quantized;
  double gap = 0;  // sum of exp(r - reference.top) * (r - q) over the logits r of the float chain and q of the other
};
using Tails = std::vector<TailPair>;  // of all positions of an item

// Takes in logits [1,n,rows] of the float chain and the fake-quantized one: positions from `begin` on, tokens from
// `first` on. `ids` are the item's tokens, whose next one is each position's target.
void Follow(const Tensor& reference, const Tensor& quantized, int64_t begin, int64_t first,
            std::span<const int64_t> ids, Tails& tails);

}  // namespace circlet::gemma4
