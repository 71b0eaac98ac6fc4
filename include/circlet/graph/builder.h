#pragma once

#include <string>
#include <string_view>

#include "circlet/graph/graph.h"

namespace circlet {

// Adds nodes to a graph within a name scope. Blocks are functions of (Builder, dimensions, values); weight and point
// names follow from the scope, so that checkpoint name, override path, dump and error text are one string.
class Builder {
 public:
  explicit Builder(Graph& graph, std::string scope = "") : graph_(&graph), scope_(std::move(scope)) {}

  // The builder of a nested scope: At("mlp") in "layers.0" is "layers.0.mlp".
  Builder At(std::string_view name) const { return Builder(*graph_, Path(name)); }
  std::string Path(std::string_view name) const;
  Graph& graph() const { return *graph_; }
  const Shape& ShapeOf(ValueId value) const { return graph_->TypeOf(value).shape; }

  ValueId Input(std::string name, Shape shape, DType dtype = DType::kF32) const;
  void Output(std::string name, ValueId value) const;

  // The parameter "SCOPE.name" with a grid of the same name (weight role).
  ValueId Weight(std::string_view name, Shape shape, WeightKind kind) const;
  // The same with values that are no parameter of the checkpoint: a norm's gain of 1.
  ValueId ConstantWeight(std::string_view name, Tensor values, WeightKind kind) const;
  // A parameter without a grid of its own.
  ValueId FloatWeight(std::string_view name, Shape shape, WeightKind kind) const;
  ValueId Constant(Tensor tensor) const { return graph_->AddConstant(std::move(tensor)); }

  // The quantization point "SCOPE.name" behind `value`; kind: of the weight whose block it belongs to.
  ValueId Point(std::string_view name, ValueId value, PointUse use = PointUse::kNormal,
                WeightKind kind = WeightKind::kNone) const;
  // A graph input's point under its producer's full name: rounded and exported, not observed again.
  ValueId Boundary(const std::string& full_name, ValueId value) const;

  // One operator with one output.
  ValueId Add(Op op, std::vector<ValueId> in) const;
  // A fused operator with its points, named within the scope; "" = the operator goes without that point.
  struct NamedPoint {
    std::string name;
    PointUse use = PointUse::kNormal;
    float headroom_below = 0;
  };
  ValueId AddFused(Op op, std::vector<ValueId> in, std::vector<NamedPoint> points) const;

  ValueId Reshape(ValueId value, Shape shape) const;
  ValueId Transpose(ValueId value, std::vector<int32_t> perm) const;
  ValueId Concat(std::vector<ValueId> values, int axis) const;

 private:
  Graph* graph_;
  std::string scope_;
};

}  // namespace circlet
