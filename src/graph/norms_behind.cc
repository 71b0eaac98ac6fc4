#include "graph/norms_behind.h"

#include <algorithm>
#include <set>

#include "circlet/ops/ops.h"

namespace circlet {
namespace {

using Readers = std::vector<std::vector<const Node*>>;  // by value

Readers ReadersOf(const Graph& graph) {
  Readers readers(graph.Values().size());
  for (const Node& node : graph.Nodes())
    for (const ValueId in : node.in) readers[in].push_back(&node);
  return readers;
}

ValueId InFrontOfPoints(const Graph& graph, ValueId value) {
  while (graph.At(value).kind == ValueKind::kNode && graph.Nodes()[graph.At(value).node].op.IsPoint())
    value = graph.Nodes()[graph.At(value).node].in[0];
  return value;
}

const Node* SumBehind(const Readers& readers, ValueId value) {
  for (const Node* const reader : readers[value]) {
    if (std::holds_alternative<Add>(reader->op.kind)) return reader;
    if (!reader->op.IsPoint()) continue;
    if (const Node* const sum = SumBehind(readers, reader->out[0])) return sum;
  }
  return nullptr;
}

}  // namespace

NormsBehind FindNormsBehind(const Graph& graph, std::span<const ValueId> values) {
  const Readers readers = ReadersOf(graph);
  std::vector<const Node*> norms;
  std::set<ValueId> seen;
  std::vector<ValueId> asked(values.begin(), values.end());
  while (!asked.empty()) {
    const ValueId value = asked.back();
    asked.pop_back();
    if (!seen.insert(value).second) continue;
    for (const Node* const reader : readers[value]) {
      if (!std::holds_alternative<RmsNorm>(reader->op.kind))
        asked.insert(asked.end(), reader->out.begin(), reader->out.end());
      else if (reader->in[0] == value && std::ranges::find(norms, reader) == norms.end())
        norms.push_back(reader);
    }
  }
  std::ranges::sort(norms);  // as they stand in the graph
  NormsBehind behind;
  for (const Node* const norm : norms) {
    behind.reads.push_back(norm->in[0]);
    behind.eps = std::get<RmsNorm>(norm->op.kind).eps;
  }
  if (norms.size() != 1) return behind;
  const Node* const sum = SumBehind(readers, norms[0]->out[0]);
  if (sum == nullptr) return behind;
  behind.sum = sum->out[0];
  behind.residual = sum->in[InFrontOfPoints(graph, sum->in[0]) == norms[0]->out[0] ? 1 : 0];
  const Value& gain = graph.At(norms[0]->in[1]);
  if (gain.kind == ValueKind::kWeight && values.size() == 1 &&
      InFrontOfPoints(graph, norms[0]->in[0]) == InFrontOfPoints(graph, values[0]))
    behind.gain = gain.name;
  return behind;
}

}  // namespace circlet
