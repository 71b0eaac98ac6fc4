#include "circlet/model/gemma4/blocks.h"

#include <vector>

namespace circlet {
namespace {

// How far the grid of masked logits reaches below the kept ones: a masked key saturates there, and exp(-40) times any
// context length vanishes beside the row's largest term (Softmax drops what lies 28 below it).
constexpr float kMaskHeadroom = 40.0f;

ValueId Clamp(const BlockBuilder& b, ValueId x, const std::string& side) {
  const ValueId upper = b.FloatWeight(side + "_max", {}, WeightKind::kUpperBound);
  const ValueId capped = b.Add(Minimum{}, {x, upper});
  return b.Add(Maximum{}, {capped, b.FloatWeight(side + "_min", {}, WeightKind::kLowerBound)});
}

}  // namespace

ValueId Linear(const BlockBuilder& b, ValueId x, int64_t out) { return LinearOf(WeightKind::kLinear, b, x, out); }

ValueId LinearOf(WeightKind kind, const BlockBuilder& b, ValueId x, int64_t out) {
  x = b.GivenInput() ? b.Point("act_in", x, PointUse::kNormal, kind) : b.RequantizingPoint("act_in", x, kind);
  const ValueId weight = b.Weight("weight", {out, b.ShapeOf(x)[-1]}, kind);
  return b.Point("act_out", b.Add(FullyConnected{}, {x, weight}), PointUse::kNormal, kind);
}

ValueId Norm(const BlockBuilder& b, ValueId x, float eps, bool gain) {
  x = b.RequantizingPoint("act_in", x);
  const int64_t width = b.ShapeOf(x)[-1];
  const std::vector<float> ones(gain ? 0 : width, 1.0f);
  const ValueId gamma = gain ? b.Weight("weight", {width}, WeightKind::kNorm)
                             : b.ConstantWeight("weight", Tensor::Of<float>({width}, ones), WeightKind::kNorm);
  return b.Point("act_out", b.Add(RmsNorm{eps}, {x, gamma}));
}

ValueId ClippedLinear(const BlockBuilder& b, ValueId x, int64_t out) {
  const BlockBuilder linear = b.At("linear");
  const auto point = [&](const char* name, ValueId value) {
    return linear.Point(name, value, PointUse::kNormal, WeightKind::kLinear);
  };
  x = point("act_in", Clamp(b, x, "input"));
  const ValueId weight = linear.Weight("weight", {out, b.ShapeOf(x)[-1]}, WeightKind::kLinear);
  const ValueId y = b.Add(FullyConnected{}, {x, weight});
  if (linear.GivenOutput()) return b.Point("act_clipped", Clamp(b, point("act_out", y), "output"));
  if (b.GetDialect().clamp_after_point) return Clamp(b, point("act_out", y), "output");
  return point("act_out", Clamp(b, y, "output"));
}

ValueId UnclippedLinear(const BlockBuilder& b, ValueId x, int64_t out) { return Linear(b.At("linear"), x, out); }

ValueId Mlp(const BlockBuilder& b, ValueId x, int64_t inner, LinearBlock linear) {
  const int64_t width = b.ShapeOf(x)[-1];
  const ValueId gate = linear(b.At("gate_proj"), x, inner);
  const ValueId act = b.Point("gate_act", b.Add(Gelu{}, {gate}));
  const ValueId up = linear(b.At("up_proj"), x, inner);
  const ValueId product = b.Point("mul", b.Add(Mul{}, {act, up}));
  return linear(b.At("down_proj"), product, width);
}

ValueId SplitHeads(const BlockBuilder& b, ValueId x, int64_t heads) {
  const Shape& shape = b.ShapeOf(x);
  return b.Reshape(x, {1, shape[1], heads, shape[2] / heads});
}

ValueId HeadsFirst(const BlockBuilder& b, ValueId x) {
  const Shape& shape = b.ShapeOf(x);
  // With one position or one head nothing moves.
  if (shape[1] == 1 || shape[2] == 1) return b.Reshape(x, {1, shape[2], shape[1], shape[3]});
  return b.Transpose(x, {0, 2, 1, 3});
}

ValueId Attend(const BlockBuilder& b, ValueId query, ValueId key, ValueId value, ValueId mask, Attention::Form form) {
  const auto requantizing = [&](const char* name) {
    return Builder::NamedPoint{b.GetDialect().requantizing_points ? name : ""};
  };
  std::vector<Builder::NamedPoint> points(Attention::kPoints);
  points[Attention::kLogitsRaw] = requantizing("logits_raw");
  points[Attention::kLogits] = {"logits"};
  points[Attention::kMaskAdd] = {"mask_add", PointUse::kNormal, b.GetDialect().observe_masked_keys ? 0 : kMaskHeadroom};
  points[Attention::kSoftmax] = {"softmax"};
  points[Attention::kAttnOut] = {"attn_out"};
  points[Attention::kAttnWeights] = requantizing("attn_weights");
  points[Attention::kAttnOutH] = requantizing("attn_out_h");
  if (form == Attention::Form::kBatched) points[Attention::kScale] = requantizing("scale");
  return b.AddFused(Attention{.skip_masked = !b.GetDialect().observe_masked_keys,
                              .explicit_transpose = b.GetDialect().explicit_k_transpose,
                              .form = form},
                    {query, key, value, mask}, std::move(points));
}

ValueId Rotate(const BlockBuilder& b, ValueId x, ValueId cos, ValueId sin, const std::string& prefix,
               const Rope& rope) {
  // The pieces share x's tensor in the file, whatever range the reference saw in each; only a negated half makes a
  // tensor of its own.
  const auto piece = [&](const char* name, PointUse use = PointUse::kSimulationOnly) {
    return Builder::NamedPoint{b.GetDialect().rope_piece_points ? prefix + name : "", use};
  };
  std::vector<Builder::NamedPoint> points(Rope::kPoints);
  points[Rope::kX1] = piece("_x1");
  points[Rope::kX2] = piece("_x2");
  if (!rope.negated_sin) points[Rope::kNeg] = piece("_neg");
  points[Rope::kCat] = piece("_cat", rope.negated_sin ? PointUse::kSimulationOnly : PointUse::kNormal);
  points[Rope::kCos] = {prefix + "_cos"};
  points[Rope::kSin] = {prefix + "_sin"};
  points[Rope::kRot] = {prefix + "_rot"};
  return b.AddFused(rope, {x, cos, sin}, std::move(points));
}

ValueId Scale(const BlockBuilder& b, ValueId value, float factor, std::string_view scale_point) {
  const PointUse use = b.GetDialect().ple_float_holes ? PointUse::kExportOnly : PointUse::kNormal;
  const ValueId constant = b.Point(scale_point, b.Constant(Tensor::Scalar(factor)), use);
  return b.Add(Mul{}, {value, constant});
}

}  // namespace circlet
