#pragma once

#include <span>

#include "circlet/pipeline/quantize.h"
#include "pipeline/gemma4/tails.h"

namespace circlet::gemma4 {

// KL(float || quantized) of the next token at one position, in nats. With logits r_i and q_i and softmax p of r:
//   sum p_i (log p_i - log softmax(q)_i) = sum p_i (r_i - q_i) - logsumexp(r) + logsumexp(q),
// three sums that grow while logits pass by; each is rescaled when its largest logit grows.
double Divergence(const TailPair& pair);

// Sums over the positions of an item, from `first` on, that have a next token.
struct ItemAgreement {
  int64_t tokens = 0, same_top = 0;
  double divergence = 0;
};
ItemAgreement AgreementOf(const Tails& tails, int64_t first);

// Of the items, at least one; each is a cluster.
Agreement AgreementOf(std::span<const ItemAgreement> items);

}  // namespace circlet::gemma4
