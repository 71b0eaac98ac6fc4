#include "exec/value_grids.h"

#include <algorithm>

namespace circlet {

std::vector<const QParams*> GridsOfValues(const Graph& graph, PointReading& reading,
                                          const std::vector<std::vector<PointVisitor*>>& visitors) {
  std::vector<const QParams*> grids(graph.Values().size(), nullptr);
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const Node& node = graph.Nodes()[i];
    const QParams* grid = nullptr;
    if (node.op.KeepsValues() || node.op.IsView() || std::holds_alternative<QuantPoint>(node.op.kind)) {
      grid = grids[node.in[0]];
      const auto shared = [&](ValueId id) { return grid != nullptr && grids[id] != nullptr && *grids[id] == *grid; };
      if (!std::ranges::all_of(node.in, shared)) grid = nullptr;
    }
    for (const int place : node.op.OutputPoints()) {
      if (place >= static_cast<int>(node.points.size()) || node.points[place].name.empty()) continue;
      const QParams* const own = reading.GridAt(node.points[place]);
      const bool changed = visitors[i][place] != nullptr && reading.Writes();
      if (own == nullptr && !changed) continue;
      grid = own;
      break;
    }
    for (const ValueId id : node.out) grids[id] = grid;
  }
  return grids;
}

}  // namespace circlet
