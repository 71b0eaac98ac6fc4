#include "exec/value_grids.h"

#include <algorithm>

namespace circlet {

std::vector<const QParams*> GridsOfValues(const Graph& graph, const std::vector<std::vector<PointVisitor*>>& visitors,
                                          const std::vector<std::vector<const QParams*>>& point_grids, bool writes) {
  std::vector<const QParams*> grids(graph.Values().size(), nullptr);
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const Node& node = graph.Nodes()[i];
    const QParams* grid = nullptr;
    if (node.op.KeepsValues() || node.op.IsView() || node.op.IsPoint()) {
      grid = grids[node.in[0]];
      const auto shared = [&](ValueId id) { return grid != nullptr && grids[id] != nullptr && *grids[id] == *grid; };
      if (!std::ranges::all_of(node.in, shared)) grid = nullptr;
    }
    for (const int place : node.op.OutputPoints()) {
      if (place >= static_cast<int>(node.points.size()) || node.points[place].name.empty()) continue;
      const bool changes = visitors[i][place] != nullptr && writes;
      if (point_grids[i][place] == nullptr && !changes) continue;
      grid = point_grids[i][place];
      break;
    }
    for (const ValueId id : node.out) grids[id] = grid;
  }
  return grids;
}

}  // namespace circlet
