#pragma once

// Where values go to: the norms that read them next, and the sum behind such a norm, as in a residual stream.

#include <span>
#include <string>
#include <vector>

#include "circlet/graph/graph.h"

namespace circlet {

struct NormsBehind {
  std::vector<ValueId> reads;  // what each of them reads, in order of computation
  double eps = 0;
  // Where there is one norm and its output goes into a sum: the sum, and its other operand. -1: else.
  ValueId sum = -1, residual = -1;
  // The parameter that the one norm multiplies with, where it reads a single one of the values themselves; empty: else.
  std::string gain;
};

// The next norms behind values of the graph, on whatever way.
NormsBehind FindNormsBehind(const Graph& graph, std::span<const ValueId> values);

}  // namespace circlet
