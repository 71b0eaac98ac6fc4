#pragma once

// Fused kernels, each with the primitive graph that it stands for.

#include <array>

#include "circlet/ops/op.h"

namespace circlet {

// Rotary position embedding of x [1,S,H,h] with tables cos, sin [1,S,h] (gemma4.md 3.6, 5.4):
//   y = x * cos + rotate_half(x) * sin
// Each of the `parts` equal parts of the last axis is rotated within itself (text 1, vision 2). With negated_sin the
// first half of the table is negated by the caller and rotate_half is [x2, x1]; otherwise it is [-x2, x1].
// Points of the node, in order: x1, x2, neg, cat (empty names: absent), cos, sin, rot.
struct Rope {
  static constexpr std::string_view kName = "rope";
  static constexpr bool kFused = true;
  static constexpr std::array kOutputPoints{6};
  int32_t parts = 1;
  bool negated_sin = true;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  std::vector<ValueId> Expand(GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) const;
  bool operator==(const Rope&) const = default;
};

// Scaled-by-1 dot-product attention: o_h = softmax(q_h k_g^T + mask) v_g with g = h / (H / KV) (gemma4.md 3.5).
// Inputs: q [1,H,S,h], k and v [1,KV,T,h], mask [1,1,S,T] or [1,S,T] additive; output [1,S,H*h].
// Runs by blocks of query rows, so no [H,S,T] tensor ever stands in memory.
// Points of the node, in order: logits_raw, logits, mask_add, softmax, attn_out, attn_weights, attn_out_h, scale
// (empty names or missing at the end: absent). scale is a factor 1 of the logits, between logits_raw and logits.
struct Attention {
  static constexpr std::string_view kName = "attention";
  static constexpr bool kFused = true;
  static constexpr std::array kOutputPoints{6, 4};
  // Keys whose mask value is at most half of `mask_fill` are kept out of products, statistics and rounding; their
  // probability is exactly 0. A row that keeps no key (a padded query) weighs all of them, as its expansion does, but
  // does not show them to visitors that only look. Otherwise every key is computed and observed (the reference).
  bool skip_masked = true;
  float mask_fill = -120.0f;
  // The expansion transposes k itself (the reference's form) or lets BATCH_MATMUL do it.
  bool explicit_transpose = false;
  // The expansion: one product a head in rank 3, or one a key head, whose query heads share it, with the mask in rank
  // 4, a factor `scale` on the logits and k transposed by an operator of its own (the reference's vision tower; it
  // takes a mask [1,1,S,T]).
  enum class Form : uint8_t { kByHead, kBatched };
  Form form = Form::kByHead;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  std::vector<ValueId> Expand(GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) const;
  bool operator==(const Attention&) const = default;
};

}  // namespace circlet
