#pragma once

// What several operators' shape rules and readers share.

#include <algorithm>
#include <cstring>

#include "circlet/ops/op.h"

namespace circlet {

// Elements a thread takes at a time in elementwise loops: enough to hide the hand-over.
inline constexpr int64_t kElementGrain = 1 << 15;

// Rows a thread takes at a time so that a piece has about kElementGrain elements.
inline int64_t RowGrain(int64_t row) { return std::max<int64_t>(1, kElementGrain / std::max<int64_t>(1, row)); }

// Copies a row that may be a few values short, where a call of memcpy would cost more than the copy.
inline void CopyShort(const float* from, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) std::memcpy(to + i, from + i, 8 * sizeof(float));
  if (i + 4 <= count) {
    std::memcpy(to + i, from + i, 4 * sizeof(float));
    i += 4;
  }
  for (; i < count; ++i) to[i] = from[i];
}

inline void ExpectFloat(std::string_view op, Types in) {
  for (const TensorType& type : in)
    if (type.dtype != DType::kF32) ShapeError(op, in, "all must be float32");
}

// An axis of `rank` axes, counted from the front; throws the shape error of `op`.
inline int ResolveAxis(std::string_view op, Types in, int64_t axis, int rank) {
  if (axis < -rank || axis >= rank)
    ShapeError(op, in, fmt::format("axis {} must lie in [{}, {}]", axis, -rank, rank - 1));
  return static_cast<int>(axis < 0 ? axis + rank : axis);
}

inline int64_t Product(std::span<const int64_t> sizes) {
  int64_t product = 1;
  for (const int64_t size : sizes) product *= size;
  return product;
}

// An option of a file that Eval knows in one meaning only.
inline void ExpectOption(std::string_view op, const CircleNode& node, std::string_view option, int64_t known,
                         int64_t schema_default) {
  const int64_t value = node.Int(option, schema_default);
  if (value != known)
    Fail("{}: option {} is {}; only {} can be executed, so the file must be written without it", op, option, value,
         known);
}
inline void ExpectNoActivation(std::string_view op, const CircleNode& node) {
  ExpectOption(op, node, "fused_activation_function", 0, 0);
}

inline void ExpectArgs(std::string_view op, const CircleNode& node, int count) {
  for (int i = 0; i < count; ++i)
    if (!node.Has(i)) Fail("{}: input {} is absent; the operator takes {}", op, i, count);
}

// The input's type, which a reader needs to resolve -1 and negative bounds.
inline const TensorType& ArgType(std::string_view op, const CircleNode& node, int input) {
  if (!node.Has(input)) Fail("{}: input {} is absent; its shape is needed", op, input);
  return *node.types[static_cast<size_t>(input)];
}

inline std::vector<int32_t> Narrow(std::string_view op, std::span<const int64_t> values) {
  std::vector<int32_t> result;
  result.reserve(values.size());
  for (const int64_t value : values) {
    if (value != static_cast<int32_t>(value))
      Fail("{}: {} does not fit int32, which the Circle format asks for", op, value);
    result.push_back(static_cast<int32_t>(value));
  }
  return result;
}

}  // namespace circlet
