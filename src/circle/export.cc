#include "circlet/circle/export.h"

#include "circle/passes/lowered.h"

namespace circlet::circle {

Model ToCircle(const Graph& graph, const GridSource& grids, const ExportOptions& options) {
  const Graph expanded = Expanded(graph);
  Lowered lowered = Lower(expanded, grids, options);
  // Clamps may ask for requantized inputs, holes for grids of constants, and only then all grids are known.
  for (const auto pass : {SettleClamps, FillHoles, QuantizeConstants, QuantizeBiases, JoinReshapes, RemoveUnread})
    pass(lowered);
  return std::move(lowered.model);
}

}  // namespace circlet::circle
