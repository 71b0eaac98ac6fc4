#pragma once

#include "circlet/base/qparams.h"
#include "ops/codes.h"

namespace circlet {

// The smallest and the largest value of a grid for a whole tensor.
struct GridEnds {
  float low, high;
};
inline GridEnds EndsOf(const QParams& grid) {
  const CodeRange codes = CodesOf(grid.dtype);
  const auto value = [&](int64_t code) { return grid.scale[0] * static_cast<float>(code - grid.zero_point[0]); };
  return {value(codes.min), value(codes.max)};
}

}  // namespace circlet
