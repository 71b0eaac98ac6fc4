#pragma once

// Fused kernels, each with the primitive graph that it stands for.

#include <array>

#include "circlet/ops/op.h"

namespace circlet {

// Rotary position embedding of x [1,S,H,h] with tables cos, sin [1,S,h]:
//   y = x * cos + rotate_half(x) * sin
// Each of the `parts` equal parts of the last axis is rotated within itself (text 1, vision 2). With negated_sin the
// first half of the table is negated by the caller and rotate_half is [x2, x1]; otherwise it is [-x2, x1].
struct Rope {
  static constexpr std::string_view kName = "rope";
  // Points of the node; x1, x2, neg and cat may be absent (empty names).
  enum At : uint8_t { kX1, kX2, kNeg, kCat, kCos, kSin, kRot, kPoints };
  static constexpr std::array<int, 1> kOutputPoints{kRot};
  int32_t parts = 1;
  bool negated_sin = true;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  std::vector<ValueId> Expand(GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) const;
  bool operator==(const Rope&) const = default;
};

// Scaled-by-1 dot-product attention: o_h = softmax(q_h k_g^T + mask) v_g with g = h / (H / KV).
// Inputs: q [1,H,S,h], k and v [1,KV,T,h], mask [1,1,S,T] or [1,S,T] additive; output [1,S,H*h]. Two more, k and v of
// the past [1,KV,P,h], stand ahead of the others; the mask is [..,P+T] then. Runs by blocks of query rows, so no
// [H,S,T] tensor ever stands in memory. Eval also takes each of k and v as codes of its Grid(); few query rows widen a
// few keys at a time.
struct Attention {
  static constexpr std::string_view kName = "attention";
  // Points of the node; any may be absent (empty names, or missing at the end). kScale is a factor 1 of the logits,
  // between kLogitsRaw and kLogits.
  enum At : uint8_t { kLogitsRaw, kLogits, kMaskAdd, kSoftmax, kAttnOut, kAttnWeights, kAttnOutH, kScale, kPoints };
  static constexpr std::array<int, 2> kOutputPoints{kAttnOutH, kAttnOut};
  static constexpr std::array<int, 4> kCodeInputs{1, 2, 4, 5};
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
  std::vector<MatrixProduct> Products(Types in) const;
  std::vector<ValueId> Expand(GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) const;
  bool operator==(const Attention&) const = default;
};

// y = a * (x W^T), element by element: a gated feed-forward's, a being the activated gate. Inputs: a [..,N], x [..,K],
// W [N,K], which may be what FullyConnected's may be. The product is made in slices of its columns, so that it never
// stands in memory whole; visitors get the parts of its rows.
struct GatedLinear {
  static constexpr std::string_view kName = "gated_linear";
  enum At : uint8_t { kProduct, kPoints };
  static constexpr bool kInPlace = true;
  static constexpr int kWeightInput = 2;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  std::vector<MatrixProduct> Products(Types in) const;
  std::vector<ValueId> Expand(GraphSink& sink, std::span<const ValueId> in, std::span<const Point> points) const;
  bool operator==(const GatedLinear&) const = default;
};

}  // namespace circlet
