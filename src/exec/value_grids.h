#pragma once

#include <vector>

#include "circlet/exec/executor.h"

namespace circlet {

// The integer grid that each value of a graph lies on under a reading, by value; null where it lies on none. A point
// puts its value on its grid (or takes it off, like MX); what only moves values keeps the grid that its inputs share.
// `visitors` and `point_grids`: the reading's, by node and point; `writes`: whether its visitors change values.
std::vector<const QParams*> GridsOfValues(const Graph& graph, const std::vector<std::vector<PointVisitor*>>& visitors,
                                          const std::vector<std::vector<const QParams*>>& point_grids, bool writes);

}  // namespace circlet
