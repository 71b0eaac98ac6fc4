#pragma once

// Integer grids: from observed ranges to scales and zero points, and from floats to codes and back (quantization.md 2).

#include <array>
#include <cstdint>
#include <functional>
#include <span>
#include <vector>

#include "circlet/base/qparams.h"
#include "circlet/base/tensor.h"

namespace circlet {

// Smallest scale of a grid (quantization.md 2.3).
inline constexpr float kScaleFloor = 1e-8f;

// The grid of a whole tensor whose values lie in [min, max] (quantization.md 2.3, in float32 to the last bit). A
// constant tensor is represented exactly on an asymmetric grid. Never observed (+inf, -inf) gives scale +inf, as in the
// reference.
QParams ComputeQParams(float min, float max, DType dtype, bool symmetric);
// One grid for each index along `axis`: min[c], max[c]; constant channels are no special case.
QParams ComputeQParams(std::span<const float> min, std::span<const float> max, DType dtype, bool symmetric, int axis);
// The same with fewer codes than the type holds.
QParams ComputeQParams(std::span<const float> min, std::span<const float> max, DType dtype, CodeRange codes,
                       bool symmetric, int axis);

// Hands over a parameter of any float type as float32: parts of rows with the flat index of their first value, in any
// order, from several threads.
void VisitWeight(const Tensor& weight, const std::function<void(std::span<const float> values, int64_t first)>& visit);

// Exact range of a parameter: one element, or one for each row when `axis` is 0. Values are float32, bfloat16, float16
// or float64. Throws Error naming the row and column of the first NaN or infinity.
struct WeightRange {
  std::vector<float> min, max;
};
WeightRange RangeOfWeight(const Tensor& weight, int axis);

// The types of codes, of weights and activations alike.
inline constexpr std::array kGridTypes{DType::kI4, DType::kU4, DType::kI8, DType::kU8, DType::kI16};
inline constexpr char kGridTypeNames[] = "int4, uint4, int8, uint8 or int16";
// Throws Error unless weights can be stored in `dtype`, one of those.
void RequireWeightType(DType dtype);

struct QuantizedWeight {
  QParams qparams;
  Tensor codes;  // shape of the weight, type qparams.dtype, 4-bit codes packed; row-major over the whole tensor
};

// Codes of a parameter of any float type. qparams.axis is -1 or 0; one grid a row, or one for all (CHECKed).
QuantizedWeight QuantizeWeight(const Tensor& weight, const QParams& qparams, Rounding rounding);
// Codes of at most 8 bits, with their grid, as int8 with theirs: uint8 codes and their zero points less 128.
Tensor SignedWeight(const Tensor& codes);
// Bytes first .. first + out.size() - 1 of those codes alone.
void QuantizeWeightBytes(const Tensor& weight, const QParams& qparams, Rounding rounding, int64_t first,
                         std::span<std::byte> out);
// What Dequantize(Quantize(weight)) gives, in one pass.
Tensor FakeQuantizeWeight(const Tensor& weight, const QParams& qparams, Rounding rounding);

// The reference's snap of one value on a grid: (clamp(R(x) + z) - z) * s. For tests and tools; loops use ops/simd.h.
float FakeQuantize(float x, float scale, int32_t zero_point, DType dtype, Rounding rounding);

}  // namespace circlet
