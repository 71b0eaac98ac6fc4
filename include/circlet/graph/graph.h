#pragma once

#include <functional>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/ops/ops.h"

namespace circlet {

enum class ValueKind : uint8_t {
  kInput,     // given at each run
  kWeight,    // a parameter by name, shared by every graph that mentions it
  kConstant,  // stored in the graph
  kNode,      // computed
};

struct Value {
  TensorType type;
  ValueKind kind = ValueKind::kNode;
  std::string name;      // inputs, weights; empty otherwise
  Tensor constant;       // kConstant
  int node = -1;         // kNode: index of the producer
  Point weight_point;    // kWeight: the grid of the parameter; empty name: it has none and stays float
  int weight_axis = -1;  // kWeight: channel axis of per-channel grids, -1: per-tensor only
};

struct Node {
  Op op;
  std::vector<ValueId> in;
  std::vector<ValueId> out;
  std::vector<Point> points;  // QuantPoint: one; fused operators: theirs, in their order; others: none
};

// A static graph: nodes in execution order, every shape known. Built by Builder, read by Executor and by circle export.
class Graph final : public GraphSink {
 public:
  ValueId AddInput(std::string name, TensorType type);
  // A parameter; asking again for the same name gives the same value (shapes must agree).
  ValueId AddWeight(std::string name, Shape shape, Point point, int axis);
  ValueId AddConstant(Tensor tensor) override;
  // Throws Error with the operator's shape rule.
  std::vector<ValueId> Add(Op op, std::vector<ValueId> in) override;
  std::vector<ValueId> Add(Op op, std::vector<ValueId> in, std::vector<Point> points);
  ValueId AddPoint(const Point& point, ValueId value) override;
  void AddOutput(std::string name, ValueId value);
  void KeepOutputs(const std::vector<std::string>& names);

  const TensorType& TypeOf(ValueId value) const override { return values_[value].type; }
  const Value& At(ValueId value) const { return values_[value]; }
  const std::vector<Value>& Values() const { return values_; }
  const std::vector<Node>& Nodes() const { return nodes_; }
  const std::vector<ValueId>& Inputs() const { return inputs_; }
  struct Output {
    std::string name;
    ValueId value;
  };
  const std::vector<Output>& Outputs() const { return outputs_; }

 private:
  std::vector<Value> values_;
  std::vector<Node> nodes_;
  std::vector<ValueId> inputs_;
  std::vector<Output> outputs_;
  std::map<std::string, ValueId> weight_ids_;
};

// Stable text, one node a line: `%10 = point(%9) float32[1,4,16] "layers.0.mlp.gate_act"`.
std::string Dump(const Graph& graph);

// Every point of the graph, weights included, in order of first mention.
std::vector<Point> PointsOf(const Graph& graph);

// The same graph with only some of its outputs.
Graph WithOutputs(Graph graph, const std::vector<std::string>& names);

// What of a graph computes `wanted` from `given`: its inputs are "given.0", "given.1", ... and those of the graph that it
// still reads, its outputs "wanted.0", "wanted.1", ... A given value that a point has put on its grid passes that point
// again as a boundary, so that readings know the grid.
Graph PartOf(const Graph& graph, std::span<const ValueId> given, std::span<const ValueId> wanted);

// The same graph with each fused operator replaced by its expansion.
Graph Expanded(const Graph& graph);

// The way back, for attentions by heads and gated linears: where their expansion stands in a graph and nothing else
// reads of it, the operator stands in its place, an attention with the points of its first head. `alike`: whether two
// points do the same to values. All keys are computed, as in the expansion.
using AlikePoints = std::function<bool(const Point&, const Point&)>;
Graph Folded(const Graph& graph, const AlikePoints& alike);

}  // namespace circlet
