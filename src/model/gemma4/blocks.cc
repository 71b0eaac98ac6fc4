#include "circlet/model/blocks.h"

#include <vector>

namespace circlet {

ValueId ReferencePoint(const Builder& b, std::string_view name, ValueId value, const Dialect& dialect, PointUse use) {
  return dialect.duplicate_points ? b.Point(name, value, use) : value;
}

ValueId Linear(const Builder& b, ValueId x, int64_t out, const Dialect& dialect) {
  x = ReferencePoint(b, "act_in", x, dialect);
  const ValueId weight = b.Weight("weight", {out, b.ShapeOf(x)[-1]}, /*axis=*/0);
  return b.Point("act_out", b.Add(FullyConnected{}, {x, weight}));
}

ValueId Norm(const Builder& b, ValueId x, float eps, bool gain, const Dialect& dialect) {
  x = ReferencePoint(b, "act_in", x, dialect);
  const int64_t width = b.ShapeOf(x)[-1];
  const std::vector<float> ones(gain ? 0 : width, 1.0f);
  const ValueId gamma =
      gain ? b.Weight("weight", {width})
           : b.Point("weight", b.Constant(Tensor::Of<float>({width}, ones)), PointUse::kNormal, PointRole::kWeight);
  return b.Point("act_out", b.Add(RmsNorm{eps}, {x, gamma}));
}

ValueId Mlp(const Builder& b, ValueId x, int64_t inner, const Dialect& dialect) {
  const int64_t width = b.ShapeOf(x)[-1];
  const ValueId gate = Linear(b.At("gate_proj"), x, inner, dialect);
  const ValueId act = b.Point("gate_act", b.Add(Gelu{}, {gate}));
  const ValueId up = Linear(b.At("up_proj"), x, inner, dialect);
  const ValueId product = b.Point("mul", b.Add(Mul{}, {act, up}));
  return Linear(b.At("down_proj"), product, width, dialect);
}

ValueId Rotate(const Builder& b, ValueId x, ValueId cos, ValueId sin, const std::string& prefix, const Rope& rope,
               const Dialect& dialect) {
  // The pieces share x's tensor in the file, whatever range the reference saw in each (findings B3).
  const auto piece = [&](const char* name, bool exists = true) {
    return Builder::NamedPoint{dialect.rope_piece_points && exists ? prefix + name : "", PointUse::kSimulationOnly};
  };
  return b.AddFused(rope, {x, cos, sin},
                    {piece("_x1"),
                     piece("_x2"),
                     piece("_neg", !rope.negated_sin),
                     piece("_cat"),
                     {prefix + "_cos"},
                     {prefix + "_sin"},
                     {prefix + "_rot"}});
}

ValueId Scale(const Builder& b, ValueId value, float factor, std::string_view scale_point, const Dialect& dialect) {
  const PointUse use = dialect.ple_float_holes ? PointUse::kExportOnly : PointUse::kNormal;
  const ValueId constant = b.Point(scale_point, b.Constant(Tensor::Scalar(factor)), use);
  return b.Add(Mul{}, {value, constant});
}

}  // namespace circlet
