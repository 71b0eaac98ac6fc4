#pragma once

// The blocks that text and vision share. A block is a function of (builder, sizes, values); names of weights and points
// follow quantization.md 6 and the builder's dialect (docs/dialects.md).

#include "circlet/model/gemma4/block_builder.h"

namespace circlet {

// y = x W^T. x [.., in]; weight "weight" [out,in]; points act_in (requantizing), act_out.
ValueId Linear(const BlockBuilder& b, ValueId x, int64_t out);
// The same with a weight of another kind of linear.
ValueId LinearOf(WeightKind kind, const BlockBuilder& b, ValueId x, int64_t out);

// RMSNorm over the last axis; without `gain` gamma is 1 (v_norm). Points act_in (requantizing), weight, act_out.
ValueId Norm(const BlockBuilder& b, ValueId x, float eps, bool gain);

// The projections of the vision tower, whose weight is "linear.weight" (model.md 5, item 5; quantization.md 6.2):
//   y = clamp(clamp(x, input_min, input_max) W^T, output_min, output_max)
// with the bounds as scalar parameters; an infinite bound binds nothing. Points linear.act_in, between the first clamp
// and the product, and linear.act_out, behind the second clamp, or ahead of it (clamp_after_point; quantization.md B7).
// Where a checkpoint gives linear.act_out its grid, values are rounded first and clipped then, into a point
// act_clipped.
ValueId ClippedLinear(const BlockBuilder& b, ValueId x, int64_t out);
// The same in models without bounds.
ValueId UnclippedLinear(const BlockBuilder& b, ValueId x, int64_t out);

using LinearBlock = ValueId (*)(const BlockBuilder& b, ValueId x, int64_t out);

// down(gelu(gate(x)) * up(x)) (model.md 3.4; quantization.md 6.3).
ValueId Mlp(const BlockBuilder& b, ValueId x, int64_t inner, LinearBlock linear = Linear);

// [1,S,heads*h] -> [1,S,heads,h].
ValueId SplitHeads(const BlockBuilder& b, ValueId x, int64_t heads);
// [1,S,H,h] -> [1,H,S,h].
ValueId HeadsFirst(const BlockBuilder& b, ValueId x);

// Rotary embedding with points prefix_x1 .. prefix_rot. x [1,S,H,h]; cos, sin [1,S,h].
ValueId Rotate(const BlockBuilder& b, ValueId x, ValueId cos, ValueId sin, const std::string& prefix, const Rope& rope);

// Attention of heads on keys with its points (quantization.md 6.5, 6.9). query [1,H,S,h]; key, value [1,KV,T,h]; mask
// additive.
ValueId Attend(const BlockBuilder& b, ValueId query, ValueId key, ValueId value, ValueId mask, Attention::Form form);

// value * factor, the factor on the grid of point "scale_point"; with ple_float_holes a bare constant.
ValueId Scale(const BlockBuilder& b, ValueId value, float factor, std::string_view scale_point);

}  // namespace circlet
