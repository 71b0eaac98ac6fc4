// Fused operators and their expansions: there and back.

#include <algorithm>
#include <initializer_list>
#include <optional>
#include <set>

#include "circlet/graph/graph.h"

namespace circlet {
namespace {

// The graph once more; `add` puts what stands for a node into it, given the node's index and its inputs there, and
// returns the node's outputs there, or nothing where nobody reads them.
template <typename Add>
Graph Rewritten(const Graph& graph, const Add& add) {
  Graph result;
  std::vector<ValueId> renamed(graph.Values().size(), -1);
  for (size_t id = 0; id < renamed.size(); ++id) {
    const Value& value = graph.Values()[id];
    if (value.kind == ValueKind::kInput) renamed[id] = result.AddInput(value.name, value.type);
    if (value.kind == ValueKind::kWeight)
      renamed[id] = result.AddWeight(value.name, value.type.shape, value.weight_point, value.weight_axis);
    if (value.kind == ValueKind::kConstant) renamed[id] = result.AddConstant(value.constant);
  }
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const std::vector<ValueId> out = add(result, i, renamed);
    for (size_t k = 0; k < out.size(); ++k) renamed[graph.Nodes()[i].out[k]] = out[k];
  }
  for (const Graph::Output& output : graph.Outputs()) result.AddOutput(output.name, renamed[output.value]);
  return result;
}

std::vector<ValueId> Renamed(const std::vector<ValueId>& ids, const std::vector<ValueId>& names) {
  std::vector<ValueId> result;
  for (const ValueId id : ids) result.push_back(names[id]);
  return result;
}

// The nodes that read each value, by value.
using Readers = std::vector<std::vector<int>>;

Readers ReadersOf(const Graph& graph) {
  Readers readers(graph.Values().size());
  for (size_t i = 0; i < graph.Nodes().size(); ++i)
    for (const ValueId id : graph.Nodes()[i].in) readers[id].push_back(static_cast<int>(i));
  return readers;
}

// "Adds" what a graph has already: an expansion that is added here is looked up, node by node. Each stands for itself,
// in order, where two compute the same.
class Finder final : public GraphSink {
 public:
  struct Missing {};  // thrown where the graph has no such node

  Finder(const Graph& graph, const Readers& readers, const AlikePoints& alike)
      : graph_(graph), readers_(readers), alike_(alike) {}

  std::vector<ValueId> Add(Op op, std::vector<ValueId> in) override {
    return Find(in.at(0), [&](const Node& node) { return node.points.empty() && node.in == in && node.op == op; });
  }
  ValueId AddPoint(const Point& point, ValueId value) override {
    return Find(value, [&](const Node& node) { return node.op.IsPoint() && alike_(node.points[0], point); })[0];
  }
  ValueId AddConstant(Tensor) override { throw Missing(); }
  const TensorType& TypeOf(ValueId value) const override { return graph_.TypeOf(value); }

  // Whether nothing else reads what was found, but for `result`.
  bool IsAlone(ValueId result) const {
    for (const int i : found)
      for (const ValueId id : graph_.Nodes()[i].out) {
        if (id == result) continue;
        if (std::ranges::any_of(readers_[id], [&](int reader) { return !found.contains(reader); })) return false;
        if (std::ranges::any_of(graph_.Outputs(), [&](const Graph::Output& o) { return o.value == id; })) return false;
      }
    return true;
  }

  std::set<int> found;

 private:
  template <typename IsIt>
  const std::vector<ValueId>& Find(ValueId read, const IsIt& is_it) {
    for (const int i : readers_[read])
      if (is_it(graph_.Nodes()[i]) && found.insert(i).second) return graph_.Nodes()[i].out;
    throw Missing();
  }

  const Graph& graph_;
  const Readers& readers_;
  const AlikePoints& alike_;
};

// A walk from an expansion's result to what it may be an expansion of.
class Origin {
 public:
  Origin(const Graph& graph, size_t points) : points(points), graph_(graph) {}

  // The operator that computes a value, if it is a T; points behind it become those of the fused operator, the last one
  // first.
  template <typename T>
  const Node* Of(ValueId id, std::initializer_list<int> places = {}) {
    auto place = places.begin();
    const Node* node = Producer(id);
    for (; node != nullptr && node->op.IsPoint() && place != places.end(); ++place) {
      points[static_cast<size_t>(*place)] = node->points[0];
      node = Producer(node->in[0]);
    }
    return node != nullptr && std::holds_alternative<T>(node->op.kind) ? node : nullptr;
  }
  // What it is made of, if it is a T, else the value itself.
  template <typename T>
  ValueId Through(ValueId id) {
    const Node* const node = Of<T>(id);
    return node == nullptr ? id : node->in[0];
  }

  std::vector<Point> points;

 private:
  const Node* Producer(ValueId id) const {
    const int node = graph_.At(id).node;
    return node < 0 ? nullptr : &graph_.Nodes()[static_cast<size_t>(node)];
  }

  const Graph& graph_;
};

struct Fusion {
  Op op;
  std::vector<ValueId> in;
  std::vector<Point> points;
};

// What the last node of an expansion may stand for: an attention by heads, with keys and values of the past if they are
// joined here.
std::vector<Fusion> AttentionsAt(const Graph& graph, const Node& last) {
  if (!std::holds_alternative<Concat>(last.op.kind)) return {};
  Origin origin(graph, Attention::kPoints);
  const Node* const out = origin.Of<BatchMatMul>(last.in[0], {Attention::kAttnOut});
  const Node* const softmax = out == nullptr ? nullptr : origin.Of<Softmax>(out->in[0], {Attention::kSoftmax});
  const Node* const masked = softmax == nullptr ? nullptr : origin.Of<Add>(softmax->in[0], {Attention::kMaskAdd});
  const Node* const scores =
      masked == nullptr ? nullptr : origin.Of<BatchMatMul>(masked->in[0], {Attention::kLogits, Attention::kLogitsRaw});
  if (scores == nullptr) return {};
  const auto of_head = [&](ValueId id) { return origin.Through<Slice>(origin.Through<Reshape>(id)); };
  const ValueId q = of_head(scores->in[0]), mask = masked->in[1], v = of_head(out->in[1]);
  const ValueId transposed = origin.Through<Transpose>(scores->in[1]), k = of_head(transposed);
  const Op op = Attention{.skip_masked = false, .explicit_transpose = transposed != scores->in[1]};
  std::vector<Fusion> found{{op, {q, k, v, mask}, origin.points}};
  const Node *const keys = origin.Of<Concat>(k), *const values = origin.Of<Concat>(v);
  if (keys != nullptr && values != nullptr && keys->in.size() == 2 && values->in.size() == 2)
    found.insert(found.begin(), {op, {q, keys->in[1], values->in[1], mask, keys->in[0], values->in[0]}, origin.points});
  return found;
}

// The same of a product's factor that is a linear without a bias.
std::vector<Fusion> GatedLinearsAt(const Graph& graph, const Node& last) {
  if (!std::holds_alternative<Mul>(last.op.kind)) return {};
  Origin origin(graph, GatedLinear::kPoints);
  const Node* const linear = origin.Of<FullyConnected>(last.in[1], {GatedLinear::kProduct});
  if (linear == nullptr || linear->in.size() != 2) return {};
  return {{GatedLinear{}, {last.in[0], linear->in[0], linear->in[1]}, origin.points}};
}

// The nodes of the fusion's expansion, if the graph has it, ends it with `last` and reads nothing of it elsewhere.
std::optional<std::set<int>> Expansion(const Fusion& fusion, const Node& last, Finder finder) {
  std::vector<TensorType> types;
  for (const ValueId id : fusion.in) types.push_back(finder.TypeOf(id));
  try {
    fusion.op.Infer(types);
    const std::vector<ValueId> out = fusion.op.Expand(finder, fusion.in, fusion.points);
    if (out == last.out && finder.IsAlone(out[0])) return std::move(finder.found);
  } catch (const Finder::Missing&) {
  } catch (const Error&) {  // shapes that it does not take
  }
  return std::nullopt;
}

}  // namespace

Graph Expanded(const Graph& graph) {
  return Rewritten(graph, [&](Graph& result, size_t i, const std::vector<ValueId>& renamed) {
    const Node& node = graph.Nodes()[i];
    std::vector<ValueId> in = Renamed(node.in, renamed);
    const std::vector<ValueId> out =
        node.op.Fused() ? node.op.Expand(result, in, node.points) : result.Add(node.op, std::move(in), node.points);
    CIRCLET_CHECK(out.size() == node.out.size(), "{} expands to {} values", node.op.Name(), out.size());
    return out;
  });
}

Graph Folded(const Graph& graph, const AlikePoints& alike) {
  const Readers readers = ReadersOf(graph);
  std::vector<std::optional<Fusion>> fusions(graph.Nodes().size());
  std::vector<bool> within(graph.Nodes().size());
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const Node& last = graph.Nodes()[i];
    std::vector<Fusion> may_be = AttentionsAt(graph, last);
    if (may_be.empty()) may_be = GatedLinearsAt(graph, last);
    for (Fusion& fusion : may_be) {
      const auto nodes = Expansion(fusion, last, Finder(graph, readers, alike));
      if (!nodes) continue;
      for (const int node : *nodes) within[node] = true;
      fusions[i] = std::move(fusion);
      break;
    }
  }
  return Rewritten(graph, [&](Graph& result, size_t i, const std::vector<ValueId>& renamed) {
    if (fusions[i]) return result.Add(fusions[i]->op, Renamed(fusions[i]->in, renamed), fusions[i]->points);
    if (within[i]) return std::vector<ValueId>();
    const Node& node = graph.Nodes()[i];
    return result.Add(node.op, Renamed(node.in, renamed), node.points);
  });
}

}  // namespace circlet
