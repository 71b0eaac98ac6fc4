#pragma once

#include "circlet/base/tensor.h"

namespace circlet {

// Of q [1,heads,queries,head_size] and k [1,kv_heads,.,head_size], of which `past` more stand ahead.
struct AttentionSizes {
  int64_t heads, kv_heads, queries, keys, head_size;

  AttentionSizes(const Shape& q, const Shape& k, int64_t past)
      : heads(q[1]), kv_heads(k[1]), queries(q[2]), keys(past + k[2]), head_size(q[3]) {}
  int64_t KvHead(int64_t head) const { return head / (heads / kv_heads); }
};

}  // namespace circlet
