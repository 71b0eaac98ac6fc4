#include "ops/strided_copy.h"

#include <algorithm>
#include <cstring>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/internal.h"

namespace circlet {
namespace {

struct Axis {
  int64_t size, stride;
};

// The view without axes of size 1, with axes merged that follow each other in the source as in the destination.
std::vector<Axis> Simplified(const StridedCopy& copy) {
  std::vector<Axis> axes;
  for (size_t i = 0; i < copy.sizes.size(); ++i) {
    const Axis axis{copy.sizes[i], copy.strides[i]};
    if (axis.size == 1) continue;
    if (!axes.empty() && axes.back().stride == axis.stride * axis.size)
      axes.back() = {axes.back().size * axis.size, axis.stride};
    else
      axes.push_back(axis);
  }
  return axes;
}

// to[i][j] = from[i * 1 + j * stride] for i < rows, j < columns: a transposed tile, walked in squares that fit the
// cache.
template <typename T>
void TransposeTile(const T* from, int64_t stride, T* to, int64_t rows, int64_t columns) {
  constexpr int64_t kSquare = 16;
  for (int64_t i0 = 0; i0 < rows; i0 += kSquare)
    for (int64_t j0 = 0; j0 < columns; j0 += kSquare)
      for (int64_t i = i0; i < std::min(rows, i0 + kSquare); ++i)
        for (int64_t j = j0; j < std::min(columns, j0 + kSquare); ++j) to[i * columns + j] = from[i + j * stride];
}

template <typename T>
void Copy(const std::vector<Axis>& axes, const T* from, T* to) {
  // Innermost: a contiguous run, a transposed pair of axes, or single elements.
  const Axis last = axes.back();
  const bool run = last.stride == 1;
  const bool transposed = !run && last.stride > 1 && axes.size() >= 2 && axes[axes.size() - 2].stride == 1;
  const size_t outer_axes = axes.size() - (transposed ? 2 : 1);
  int64_t outer = 1;
  for (size_t i = 0; i < outer_axes; ++i) outer *= axes[i].size;
  const int64_t tile = transposed ? last.size * axes[outer_axes].size : last.size;
  ParallelFor(outer, RowGrain(tile), [&](int64_t begin, int64_t end) {
    for (int64_t index = begin; index < end; ++index) {
      const T* source = from;
      int64_t rest = index;
      for (size_t i = outer_axes; i-- > 0;) {
        source += rest % axes[i].size * axes[i].stride;
        rest /= axes[i].size;
      }
      T* target = to + index * tile;
      if (run)
        std::memcpy(target, source, static_cast<size_t>(tile) * sizeof(T));
      else if (transposed)
        TransposeTile(source, last.stride, target, axes[outer_axes].size, last.size);
      else
        for (int64_t i = 0; i < tile; ++i) target[i] = source[i * last.stride];
    }
  });
}

}  // namespace

std::vector<int64_t> RowMajorStrides(const Shape& shape) {
  std::vector<int64_t> strides(static_cast<size_t>(shape.Rank()), 1);
  for (int i = shape.Rank() - 2; i >= 0; --i)
    strides[static_cast<size_t>(i)] = strides[static_cast<size_t>(i) + 1] * shape[i + 1];
  return strides;
}

void StridedCopy::Run(const std::byte* from, std::byte* to) const {
  if (std::find(sizes.begin(), sizes.end(), 0) != sizes.end()) return;
  std::vector<Axis> axes = Simplified(*this);
  if (axes.empty()) axes.push_back({1, 1});
  switch (element_bytes) {
    case 1:
      return Copy(axes, reinterpret_cast<const uint8_t*>(from), reinterpret_cast<uint8_t*>(to));
    case 2:
      return Copy(axes, reinterpret_cast<const uint16_t*>(from), reinterpret_cast<uint16_t*>(to));
    case 4:
      return Copy(axes, reinterpret_cast<const uint32_t*>(from), reinterpret_cast<uint32_t*>(to));
    case 8:
      return Copy(axes, reinterpret_cast<const uint64_t*>(from), reinterpret_cast<uint64_t*>(to));
    default:
      CIRCLET_CHECK(false, "no copy of elements of {} bytes", element_bytes);
  }
}

}  // namespace circlet
