#pragma once

// The blocks that text and vision share. A block is a function of (builder, sizes, values); names of weights and points
// follow quantization.md 6 and the dialect (docs/dialects.md).

#include "circlet/graph/builder.h"
#include "circlet/quant/dialect.h"

namespace circlet {

// y = x W^T. x [.., in]; weight "weight" [out,in]; points act_in (reference only), act_out.
ValueId Linear(const Builder& b, ValueId x, int64_t out, const Dialect& dialect);

// RMSNorm over the last axis; without `gain` gamma is 1 (v_norm). Points act_in (reference only), weight, act_out.
ValueId Norm(const Builder& b, ValueId x, float eps, bool gain, const Dialect& dialect);

// The projections of the vision tower, whose weight is "linear.weight" (model.md 5, item 5; quantization.md 6.2):
//   y = clamp(clamp(x, input_min, input_max) W^T, output_min, output_max)
// with the bounds as scalar parameters; an infinite bound binds nothing. Points linear.act_in, between the first clamp
// and the product, and linear.act_out, in the reference ahead of the second clamp, in ours behind it (quantization.md
// B7).
ValueId ClippedLinear(const Builder& b, ValueId x, int64_t out, const Dialect& dialect);
// The same in models without bounds.
ValueId UnclippedLinear(const Builder& b, ValueId x, int64_t out, const Dialect& dialect);

using LinearBlock = ValueId (*)(const Builder& b, ValueId x, int64_t out, const Dialect& dialect);

// down(gelu(gate(x)) * up(x)) (model.md 3.4; quantization.md 6.3).
ValueId Mlp(const Builder& b, ValueId x, int64_t inner, const Dialect& dialect, LinearBlock linear = Linear);

// [1,S,heads*h] -> [1,S,heads,h].
ValueId SplitHeads(const Builder& b, ValueId x, int64_t heads);
// [1,S,H,h] -> [1,H,S,h].
ValueId HeadsFirst(const Builder& b, ValueId x);

// Rotary embedding with points prefix_x1 .. prefix_rot. x [1,S,H,h]; cos, sin [1,S,h].
ValueId Rotate(const Builder& b, ValueId x, ValueId cos, ValueId sin, const std::string& prefix, const Rope& rope,
               const Dialect& dialect);

// Attention of heads on keys with its points (quantization.md 6.5, 6.9). query [1,H,S,h]; key, value [1,KV,T,h]; mask
// additive.
ValueId Attend(const Builder& b, ValueId query, ValueId key, ValueId value, ValueId mask, Attention::Form form,
               const Dialect& dialect);

// value * factor. The reference multiplies by a bare constant; ours lies on a grid, point "scale_point".
ValueId Scale(const Builder& b, ValueId value, float factor, std::string_view scale_point, const Dialect& dialect);

// A point that the reference has besides another one on the same tensor; ours has one grid a tensor.
ValueId ReferencePoint(const Builder& b, std::string_view name, ValueId value, const Dialect& dialect,
                       PointUse use = PointUse::kNormal);

}  // namespace circlet
