#pragma once

// Copies a strided view into a dense row-major array: what TRANSPOSE, STRIDED_SLICE and BROADCAST_TO have in common.

#include <cstddef>
#include <cstdint>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet {

std::vector<int64_t> RowMajorStrides(const Shape& shape);

struct StridedCopy {
  int64_t element_bytes;         // 1, 2, 4 or 8
  std::vector<int64_t> sizes;    // of the destination
  std::vector<int64_t> strides;  // of the source along each of them, in elements; 0 repeats

  // `from`: the source of the destination's first element. Runs in parallel when the copy is large.
  void Run(const std::byte* from, std::byte* to) const;
};

}  // namespace circlet
