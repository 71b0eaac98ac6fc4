#pragma once

// The inner loops, written with Google Highway and chosen at start-up for the processor's best instruction set. Plain
// pointers and counts; single-threaded; no alignment asked. Every function gives the same bits wherever a range is cut,
// so callers may split work between threads as they like.

#include <cstdint>

#include "circlet/base/qparams.h"

namespace circlet::simd {

// "AVX3" (AVX-512), "AVX2", "SSE4", "SSSE3" or "SCALAR".
const char* InstructionSet();

struct Range {
  float min, max;  // +inf, -inf when there are no finite values
  bool finite;     // no NaN and no infinity among the values
};
Range MinMax(const float* x, int64_t count);

// One grid of per-tensor parameters, ready for use.
struct Grid {
  float scale;
  int32_t zero_point;
  int32_t min_code, max_code;
  Rounding rounding;
};
// x[i] = (clamp(R(x[i])) - zero_point) * scale (quantization.md 2.4; format.md 4.2). NaN stays NaN.
void Snap(float* x, int64_t count, const Grid& grid);
void Quantize(const float* x, int64_t count, const Grid& grid, int16_t* codes);  // NaN gets the smallest code
void Dequantize(const int16_t* codes, int64_t count, float scale, int32_t zero_point, float* x);

// Codes of values that lie on their grid, rint(x / scale) + zero_point, as bytes (below 0 in two's complement), or as
// unsigned integers of 16 bits in two digits, 256 high + low. Returns the sum of the codes, NaN when a value is NaN or
// an infinity. At most 2^15 values.
double CodesOf8Bits(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* codes);
double CodesOf16Bits(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* high, uint8_t* low);
int64_t SumOfCodes(const int8_t* codes, int64_t count);
// y[j] = (sum[j] + offset[j] - zero_point[j] * row) * scale[j] + bias[j], in float64 and rounded once; with `low`,
// 256 sum[j] + low[j] stands for sum[j]. y may be where `sum` is.
struct IntegerColumns {
  const double *offset, *zero_point, *scale, *bias;
};
void FinishIntegers(const int32_t* sum, const int32_t* low, const IntegerColumns& columns, double row, int64_t count,
                    float* y);

void BF16ToF32(const uint16_t* in, int64_t count, float* out);
void F32ToBF16(const float* in, int64_t count, uint16_t* out);  // to the nearest, ties to even; NaN stays NaN

// y = a op b; y may be a. A NaN in a survives max and min.
enum class BinaryOp { kAdd, kSub, kMul, kMax, kMin };
void Binary(BinaryOp op, const float* a, const float* b, int64_t count, float* y);
// y[r] = x[r] * factors, for rows of `width` values; those of y follow each other, those of x are `stride` apart.
void MulRows(const float* x, int64_t stride, const float* factors, int64_t rows, int64_t width, float* y);
void BinaryScalar(BinaryOp op, const float* a, float b, int64_t count, float* y);

void Neg(const float* x, int64_t count, float* y);
void Tanh(const float* x, int64_t count, float* y);
void Gelu(const float* x, int64_t count, float* y);  // tanh form

// Each row: y = gamma * x / sqrt(mean(x^2) + eps); the sum runs in a fixed order.
void RmsNormRows(const float* x, const float* gamma, int64_t rows, int64_t width, float eps, float* y);
// Sum of exp(x - shift), in float64. A NaN counts as 0.
double SumOfExp(const float* x, int64_t count, float shift);
// The same, and the sum of exp(x - shift) * (x - y), in which a NaN of either stays.
struct ExpSums {
  double plain = 0, times_difference = 0;
};
ExpSums SumsOfExp(const float* x, const float* y, int64_t count, float shift);
// One row in place: exp(x - max) / sum, terms below exp(-28) are 0. Leading or trailing terms that are 0 may be left
// out by the caller without changing a bit of the others, provided that it starts at a multiple of kSoftmaxLanes.
inline constexpr int64_t kSoftmaxLanes = 16;
void SoftmaxRow(float* x, int64_t count);

}  // namespace circlet::simd
