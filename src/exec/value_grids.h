#pragma once

#include <vector>

#include "circlet/exec/executor.h"

namespace circlet {

// The integer grid that each value of a graph lies on under a reading, by value; null where it lies on none. A point
// puts its value on the grid that the reading names (or takes it off, like MX); what only moves values keeps the grid that
// its inputs share. `visitors`: the reading's, by node and point.
std::vector<const QParams*> GridsOfValues(const Graph& graph, PointReading& reading,
                                          const std::vector<std::vector<PointVisitor*>>& visitors);

}  // namespace circlet
