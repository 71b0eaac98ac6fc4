#include "circlet/graph/builder.h"

namespace circlet {

std::string Builder::Path(std::string_view name) const {
  if (scope_.empty()) return std::string(name);
  return name.empty() ? scope_ : fmt::format("{}.{}", scope_, name);
}

ValueId Builder::Input(std::string name, Shape shape, DType dtype) const {
  return graph_->AddInput(std::move(name), {dtype, std::move(shape)});
}

void Builder::Output(std::string name, ValueId value) const { graph_->AddOutput(std::move(name), value); }

ValueId Builder::Weight(std::string_view name, Shape shape, WeightKind kind) const {
  const std::string full = Path(name);
  return graph_->AddWeight(full, std::move(shape), {.name = full, .role = PointRole::kWeight, .kind = kind},
                           ChannelAxis(kind));
}

ValueId Builder::ConstantWeight(std::string_view name, Tensor values, WeightKind kind) const {
  return graph_->AddPoint({.name = Path(name), .role = PointRole::kWeight, .kind = kind}, Constant(std::move(values)));
}

ValueId Builder::FloatWeight(std::string_view name, Shape shape, WeightKind kind) const {
  return graph_->AddWeight(Path(name), std::move(shape), {.kind = kind}, -1);
}

ValueId Builder::Point(std::string_view name, ValueId value, PointUse use, WeightKind kind) const {
  return graph_->AddPoint({.name = Path(name), .use = use, .kind = kind}, value);
}

ValueId Builder::Boundary(const std::string& full_name, ValueId value) const {
  return graph_->AddPoint({.name = full_name, .use = PointUse::kBoundary}, value);
}

ValueId Builder::Add(Op op, std::vector<ValueId> in) const { return graph_->Add(std::move(op), std::move(in)).front(); }

ValueId Builder::AddFused(Op op, std::vector<ValueId> in, std::vector<NamedPoint> points) const {
  std::vector<circlet::Point> full;
  for (const NamedPoint& point : points)
    full.push_back({.name = point.name.empty() ? "" : Path(point.name), .use = point.use, .headroom_below = point.headroom_below});
  return graph_->Add(std::move(op), std::move(in), std::move(full)).front();
}

ValueId Builder::Reshape(ValueId value, Shape shape) const { return Add(circlet::Reshape{std::move(shape)}, {value}); }

ValueId Builder::Transpose(ValueId value, std::vector<int32_t> perm) const {
  return Add(circlet::Transpose{std::move(perm)}, {value});
}

ValueId Builder::Concat(std::vector<ValueId> values, int axis) const { return Add(circlet::Concat{axis}, std::move(values)); }

}  // namespace circlet
