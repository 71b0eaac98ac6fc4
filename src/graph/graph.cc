#include "circlet/graph/graph.h"

#include <algorithm>
#include <set>

namespace circlet {

ValueId Graph::AddInput(std::string name, TensorType type) {
  for (const ValueId id : inputs_) CIRCLET_CHECK(values_[id].name != name, "two inputs are called {}", name);
  values_.push_back({.type = std::move(type), .kind = ValueKind::kInput, .name = std::move(name)});
  inputs_.push_back(static_cast<ValueId>(values_.size()) - 1);
  return inputs_.back();
}

ValueId Graph::AddWeight(std::string name, Shape shape, Point point, int axis) {
  const auto [it, inserted] = weight_ids_.try_emplace(name, static_cast<ValueId>(values_.size()));
  if (!inserted) {
    CIRCLET_CHECK(values_[it->second].type.shape == shape, "{} is {} and {}", name,
                  values_[it->second].type.ToString(), shape.ToString());
    return it->second;
  }
  values_.push_back({.type = {DType::kF32, std::move(shape)},
                     .kind = ValueKind::kWeight,
                     .name = std::move(name),
                     .weight_point = std::move(point),
                     .weight_axis = axis});
  return it->second;
}

ValueId Graph::AddConstant(Tensor tensor) {
  values_.push_back({.type = tensor.Type(), .kind = ValueKind::kConstant, .constant = std::move(tensor)});
  return static_cast<ValueId>(values_.size()) - 1;
}

std::vector<ValueId> Graph::Add(Op op, std::vector<ValueId> in) { return Add(std::move(op), std::move(in), {}); }

std::vector<ValueId> Graph::Add(Op op, std::vector<ValueId> in, std::vector<Point> points) {
  std::vector<TensorType> types;
  types.reserve(in.size());
  for (const ValueId id : in) {
    CIRCLET_CHECK(id >= 0 && id < static_cast<ValueId>(values_.size()), "{}: no value %{}", op.Name(), id);
    types.push_back(values_[id].type);
  }
  std::vector<ValueId> out;
  for (TensorType& type : op.Infer(types)) {
    out.push_back(static_cast<ValueId>(values_.size()));
    values_.push_back({.type = std::move(type), .kind = ValueKind::kNode, .node = static_cast<int>(nodes_.size())});
  }
  nodes_.push_back({std::move(op), std::move(in), out, std::move(points)});
  return out;
}

ValueId Graph::AddPoint(const Point& point, ValueId value) { return Add(QuantPoint{}, {value}, {point}).front(); }

void Graph::AddOutput(std::string name, ValueId value) { outputs_.push_back({std::move(name), value}); }

void Graph::KeepOutputs(const std::vector<std::string>& names) {
  std::erase_if(outputs_, [&](const Output& output) {
    return std::find(names.begin(), names.end(), output.name) == names.end();
  });
}

Graph WithOutputs(Graph graph, const std::vector<std::string>& names) {
  graph.KeepOutputs(names);
  return graph;
}

namespace {

// The point that has put a value on its grid; null: none.
const Point* PointOf(const Graph& graph, ValueId value) {
  while (graph.At(value).kind == ValueKind::kNode) {
    const Node& node = graph.Nodes()[graph.At(value).node];
    for (const int place : node.op.OutputPoints())
      if (place < static_cast<int>(node.points.size()) && !node.points[place].name.empty()) return &node.points[place];
    if (node.in.size() != 1 || !(node.op.KeepsValues() || node.op.IsView())) return nullptr;
    value = node.in[0];
  }
  return nullptr;
}

}  // namespace

Graph PartOf(const Graph& graph, std::span<const ValueId> given, std::span<const ValueId> wanted) {
  Graph part;
  std::map<ValueId, ValueId> copies;
  for (size_t i = 0; i < given.size(); ++i) {
    const ValueId input = part.AddInput(fmt::format("given.{}", i), graph.TypeOf(given[i]));
    const Point* const point = PointOf(graph, given[i]);
    if (point == nullptr) {
      copies[given[i]] = input;
    } else {
      Point boundary = *point;
      boundary.use = PointUse::kBoundary;
      copies[given[i]] = part.AddPoint(boundary, input);
    }
  }
  // Nodes stand in execution order, so a walk backwards meets every reader of a value before its producer.
  std::vector<bool> needed(graph.Nodes().size());
  std::vector<ValueId> asked(wanted.begin(), wanted.end());
  while (!asked.empty()) {
    const ValueId id = asked.back();
    asked.pop_back();
    if (copies.contains(id) || graph.At(id).kind != ValueKind::kNode || needed[graph.At(id).node]) continue;
    needed[graph.At(id).node] = true;
    const std::vector<ValueId>& in = graph.Nodes()[graph.At(id).node].in;
    asked.insert(asked.end(), in.begin(), in.end());
  }
  const auto copy_of = [&](ValueId id) {
    const auto [it, is_new] = copies.try_emplace(id);
    const Value& value = graph.At(id);
    if (is_new && value.kind == ValueKind::kInput) it->second = part.AddInput(value.name, value.type);
    if (is_new && value.kind == ValueKind::kConstant) it->second = part.AddConstant(value.constant);
    if (is_new && value.kind == ValueKind::kWeight)
      it->second = part.AddWeight(value.name, value.type.shape, value.weight_point, value.weight_axis);
    return it->second;
  };
  for (size_t i = 0; i < needed.size(); ++i) {
    if (!needed[i]) continue;
    const Node& node = graph.Nodes()[i];
    std::vector<ValueId> in;
    for (const ValueId id : node.in) in.push_back(copy_of(id));
    const std::vector<ValueId> out = part.Add(node.op, std::move(in), node.points);
    for (size_t k = 0; k < out.size(); ++k) copies[node.out[k]] = out[k];
  }
  for (size_t i = 0; i < wanted.size(); ++i) part.AddOutput(fmt::format("wanted.{}", i), copy_of(wanted[i]));
  return part;
}

std::string Dump(const Graph& graph) {
  std::string text;
  const auto operands = [&](const std::vector<ValueId>& ids) {
    std::string list;
    for (const ValueId id : ids) list += fmt::format("{}%{}", list.empty() ? "" : ", ", id);
    return list;
  };
  for (size_t id = 0; id < graph.Values().size(); ++id) {
    const Value& value = graph.Values()[id];
    if (value.kind == ValueKind::kInput) text += fmt::format("%{} = input {} \"{}\"\n", id, value.type.ToString(), value.name);
    if (value.kind == ValueKind::kWeight)
      text += fmt::format("%{} = weight {} \"{}\"\n", id, value.type.ToString(), value.name);
    if (value.kind == ValueKind::kConstant) text += fmt::format("%{} = constant {}\n", id, value.type.ToString());
  }
  for (const Node& node : graph.Nodes()) {
    std::string types, points;
    for (const ValueId id : node.out) types += " " + graph.TypeOf(id).ToString();
    for (const Point& point : node.points)
      if (!point.name.empty()) points += fmt::format(" \"{}\"", point.name);
    text += fmt::format("{} = {}({}){}{}\n", operands(node.out), node.op.Name(), operands(node.in), types, points);
  }
  for (const Graph::Output& output : graph.Outputs()) text += fmt::format("output %{} \"{}\"\n", output.value, output.name);
  return text;
}

std::vector<Point> PointsOf(const Graph& graph) {
  std::vector<Point> points;
  std::set<std::string> seen;
  const auto add = [&](const Point& point) {
    if (!point.name.empty() && seen.insert(point.name).second) points.push_back(point);
  };
  for (const Value& value : graph.Values())
    if (value.kind == ValueKind::kWeight) add(value.weight_point);
  for (const Node& node : graph.Nodes())
    for (const Point& point : node.points) add(point);
  return points;
}

}  // namespace circlet
