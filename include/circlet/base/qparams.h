#pragma once

#include <cstdint>
#include <vector>

#include "circlet/base/dtype.h"

namespace circlet {

// An integer grid: real = scale * (code - zero_point), codes of `dtype` (its full storage range).
// One scale and zero point for the whole tensor (axis = -1), or one for each index along `axis`.
struct QParams {
  DType dtype = DType::kI16;
  int axis = -1;
  std::vector<float> scale;
  std::vector<int32_t> zero_point;

  bool PerChannel() const { return axis >= 0; }
  bool operator==(const QParams&) const = default;
};

// How a value finds its code. The two agree except at ties and in the last bit (quantization.md 2.4, format.md 4).
enum class Rounding {
  kHalfEvenReciprocal,  // rint(x * (1/s)) + z: the reference's simulation
  kHalfAwayDivide,      // half away from zero of x / s, + z: the Circle runtimes
};

}  // namespace circlet
