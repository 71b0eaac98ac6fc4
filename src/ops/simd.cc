#include "ops/simd.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/simd.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"
// Needs highway.h before it.
#include "hwy/contrib/math/math-inl.h"

HWY_BEFORE_NAMESPACE();
namespace circlet::simd::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Floats = hn::CappedTag<float, kSoftmaxLanes>;
using V = hn::Vec<Floats>;
constexpr Floats kD;
constexpr int64_t kLanes = hn::MaxLanes(kD);
using Doubles = hn::CappedTag<double, kLanes>;
constexpr Doubles kD64;
constexpr hn::Rebind<float, Doubles> kHalf;  // as many floats
constexpr int64_t kDoubles = static_cast<int64_t>(hn::MaxLanes(kD64));
constexpr float kInf = std::numeric_limits<float>::infinity();
// Whether MulAdd rounds once.
constexpr bool kFused = HWY_TARGET <= HWY_AVX2;

const char* InstructionSetImpl() { return hwy::TargetName(HWY_TARGET); }

// A NaN value stays: x86 returns the second operand of min and max when one is NaN; elsewhere comparisons fail for it.
constexpr bool kSecondOfNaN = HWY_ARCH_X86 && HWY_TARGET != HWY_SCALAR;
HWY_INLINE V MaxKeepingNaN(V value, V low) {
  return kSecondOfNaN ? hn::Max(low, value) : hn::IfThenElse(hn::Lt(value, low), low, value);
}
HWY_INLINE V MinKeepingNaN(V value, V high) {
  return kSecondOfNaN ? hn::Min(high, value) : hn::IfThenElse(hn::Gt(value, high), high, value);
}

// x[0, count) for count < kLanes, zeros behind, and back.
HWY_INLINE V LoadRest(const float* x, int64_t count) {
#if HWY_TARGET == HWY_AVX3
  return hn::MaskedLoad(hn::FirstN(kD, static_cast<size_t>(count)), kD, x);
#else
  HWY_ALIGN float rest[kLanes] = {};
  std::memcpy(rest, x, static_cast<size_t>(count) * sizeof(float));
  return hn::Load(kD, rest);
#endif
}
HWY_INLINE void StoreRest(V v, int64_t count, float* y) {
#if HWY_TARGET == HWY_AVX3
  hn::BlendedStore(v, hn::FirstN(kD, static_cast<size_t>(count)), kD, y);
#else
  HWY_ALIGN float rest[kLanes];
  hn::Store(v, kD, rest);
  std::memcpy(y, rest, static_cast<size_t>(count) * sizeof(float));
#endif
}

// Runs f over all values, the last ones in a padded vector so that each value takes the same path.
template <class F>
HWY_INLINE void Map(const float* x, int64_t count, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) hn::StoreU(f(hn::LoadU(kD, x + i)), kD, y + i);
  if (i < count) StoreRest(f(LoadRest(x + i, count - i)), count - i, y + i);
}

template <class F>
HWY_INLINE void Map2(const float* a, const float* b, int64_t count, float* y, F f) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) hn::StoreU(f(hn::LoadU(kD, a + i), hn::LoadU(kD, b + i)), kD, y + i);
  if (i < count) StoreRest(f(LoadRest(a + i, count - i), LoadRest(b + i, count - i)), count - i, y + i);
}

// ---- Statistics and grids -----------------------------------------------------------------------------------------

// The same for pieces that hold infinities or NaN: these take no part.
Range MinMaxOfFinite(const float* x, int64_t count) {
  Range range{kInf, -kInf, false};
  for (int64_t i = 0; i < count; ++i) {
    if (!std::isfinite(x[i])) continue;
    range.min = std::min(range.min, x[i]);
    range.max = std::max(range.max, x[i]);
  }
  return range;
}

Range MinMaxImpl(const float* x, int64_t count) {
  const V inf = hn::Set(kD, kInf), minus_inf = hn::Set(kD, -kInf);
  // Four of each: one chain would wait for itself.
  V low0 = inf, low1 = inf, low2 = inf, low3 = inf;
  V high0 = minus_inf, high1 = minus_inf, high2 = minus_inf, high3 = minus_inf;
  V odd0 = hn::Zero(kD), odd1 = hn::Zero(kD), odd2 = hn::Zero(kD), odd3 = hn::Zero(kD);
  // x - x is 0 for finite x and NaN otherwise, and a NaN stays in a sum.
  const auto take = [](V v, V& low, V& high, V& odd) HWY_ATTR {
    low = hn::Min(low, v);
    high = hn::Max(high, v);
    odd = hn::Add(odd, hn::Sub(v, v));
  };
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    take(hn::LoadU(kD, x + i), low0, high0, odd0);
    take(hn::LoadU(kD, x + i + kLanes), low1, high1, odd1);
    take(hn::LoadU(kD, x + i + 2 * kLanes), low2, high2, odd2);
    take(hn::LoadU(kD, x + i + 3 * kLanes), low3, high3, odd3);
  }
  for (; i + kLanes <= count; i += kLanes) take(hn::LoadU(kD, x + i), low0, high0, odd0);
  const V low = hn::Min(hn::Min(low0, low1), hn::Min(low2, low3));
  const V high = hn::Max(hn::Max(high0, high1), hn::Max(high2, high3));
  const V odd = hn::Add(hn::Add(odd0, odd1), hn::Add(odd2, odd3));
  Range range{hn::GetLane(hn::MinOfLanes(kD, low)), hn::GetLane(hn::MaxOfLanes(kD, high)), true};
  float rest_odd = hn::GetLane(hn::SumOfLanes(kD, odd));
  for (; i < count; ++i) {
    range.min = std::min(range.min, x[i]);
    range.max = std::max(range.max, x[i]);
    rest_odd += x[i] - x[i];
  }
  if (std::isnan(rest_odd)) return MinMaxOfFinite(x, count);
  return range;
}

// The value in whole steps of the grid, as a float.
template <Rounding kRounding>
HWY_INLINE V StepsOf(V x, V scale_or_reciprocal) {
  if constexpr (kRounding == Rounding::kHalfEvenReciprocal) return hn::Round(hn::Mul(x, scale_or_reciprocal));
  const V quotient = hn::Div(x, scale_or_reciprocal);
  return hn::Trunc(hn::Add(quotient, hn::CopySignToAbs(hn::Set(kD, 0.5f), quotient)));
}

struct GridVectors {
  explicit GridVectors(const Grid& grid)
      : scale(hn::Set(kD, grid.scale)),
        step(grid.rounding == Rounding::kHalfEvenReciprocal ? hn::Set(kD, 1.0f / grid.scale) : scale),
        zero_point(hn::Set(kD, static_cast<float>(grid.zero_point))),
        low(hn::Set(kD, static_cast<float>(grid.min_code))),
        high(hn::Set(kD, static_cast<float>(grid.max_code))) {}
  V scale, step, zero_point, low, high;

  V LowestValue() const { return hn::Mul(hn::Sub(low, zero_point), scale); }
  V HighestValue() const { return hn::Mul(hn::Sub(high, zero_point), scale); }
};

// Rounding is monotone and leaves the grid's ends where they are, so values may be clamped instead of codes, and the zero
// point drops out. Codes have no -0.
template <Rounding kRounding>
HWY_INLINE void SnapWith(float* x, int64_t count, const GridVectors& g) {
  const V low = g.LowestValue(), high = g.HighestValue(), zero = hn::Zero(kD);
  Map(x, count, x, [&](V v) HWY_ATTR {
    const V clamped = MinKeepingNaN(MaxKeepingNaN(v, low), high);
    return hn::Mul(hn::Add(StepsOf<kRounding>(clamped, g.step), zero), g.scale);
  });
}

void SnapImpl(float* x, int64_t count, const Grid& grid) {
  const GridVectors vectors(grid);
  if (grid.rounding == Rounding::kHalfEvenReciprocal)
    SnapWith<Rounding::kHalfEvenReciprocal>(x, count, vectors);
  else
    SnapWith<Rounding::kHalfAwayDivide>(x, count, vectors);
}

template <Rounding kRounding>
HWY_INLINE void QuantizeWith(const float* x, int64_t count, const GridVectors& g, int16_t* codes) {
  const hn::RebindToSigned<Floats> d32;
  const hn::Rebind<int16_t, Floats> d16;
  const auto convert = [&](V v) HWY_ATTR {
    // NaN fails the comparison and becomes the smallest code, as in the reference.
    const V open = hn::Add(StepsOf<kRounding>(v, g.step), g.zero_point);
    const V code = hn::Min(hn::IfThenElse(hn::Gt(open, g.low), open, g.low), g.high);
    return hn::DemoteTo(d16, hn::ConvertTo(d32, code));
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) hn::StoreU(convert(hn::LoadU(kD, x + i)), d16, codes + i);
  if (i == count) return;
  HWY_ALIGN float rest[kLanes] = {};
  HWY_ALIGN int16_t rest_codes[kLanes];
  std::memcpy(rest, x + i, static_cast<size_t>(count - i) * sizeof(float));
  hn::Store(convert(hn::Load(kD, rest)), d16, rest_codes);
  std::memcpy(codes + i, rest_codes, static_cast<size_t>(count - i) * sizeof(int16_t));
}

void QuantizeImpl(const float* x, int64_t count, const Grid& grid, int16_t* codes) {
  const GridVectors vectors(grid);
  if (grid.rounding == Rounding::kHalfEvenReciprocal)
    QuantizeWith<Rounding::kHalfEvenReciprocal>(x, count, vectors, codes);
  else
    QuantizeWith<Rounding::kHalfAwayDivide>(x, count, vectors, codes);
}

void DequantizeImpl(const int16_t* codes, int64_t count, float scale, int32_t zero_point, float* x) {
  const hn::RebindToSigned<Floats> d32;
  const hn::Rebind<int16_t, Floats> d16;
  const auto zero = hn::Set(d32, zero_point);
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto code = hn::PromoteTo(d32, hn::LoadU(d16, codes + i));
    hn::StoreU(hn::Mul(hn::ConvertTo(kD, hn::Sub(code, zero)), hn::Set(kD, scale)), kD, x + i);
  }
  for (; i < count; ++i) x[i] = static_cast<float>(codes[i] - zero_point) * scale;
}

// Calls store(i, codes of x[i, i + lanes), how many of them) for all of them; the codes' sum, or NaN. A whole number
// added to 1.5 * 2^23 stands in the low bits of the float.
template <class Store>
HWY_INLINE double CodesOfGrid(const float* x, int64_t count, float scale, int32_t zero_point, Store store) {
  const hn::RebindToUnsigned<Floats> d32;
  const V reciprocal = hn::Set(kD, 1.0f / scale), shift = hn::Set(kD, 0x1.8p23f + static_cast<float>(zero_point));
  const auto shift_bits = hn::Set(d32, 0x4b400000u);
  auto sum = hn::Zero(d32);
  V odd = hn::Zero(kD);  // x - x is 0, or NaN
  const auto convert = [&](V v) HWY_ATTR {
    odd = hn::Add(odd, hn::Sub(v, v));
    return hn::Sub(hn::BitCast(d32, hn::MulAdd(v, reciprocal, shift)), shift_bits);
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto codes = convert(hn::LoadU(kD, x + i));
    sum = hn::Add(sum, codes);
    store(i, codes, kLanes);
  }
  if (i < count) {
    const auto codes = convert(LoadRest(x + i, count - i));
    sum = hn::Add(sum, hn::IfThenElseZero(hn::FirstN(d32, static_cast<size_t>(count - i)), codes));
    store(i, codes, count - i);
  }
  const auto total = static_cast<int32_t>(hn::GetLane(hn::SumOfLanes(d32, sum)));
  return static_cast<double>(total) + static_cast<double>(hn::GetLane(hn::SumOfLanes(kD, odd)));
}

// The low bytes of the first `count` elements.
template <class Codes>
HWY_INLINE void StoreBytes(Codes codes, int64_t count, uint8_t* to) {
  const hn::Rebind<uint8_t, Floats> d8;
  const auto bytes = hn::TruncateTo(d8, codes);
  if (count == kLanes) return hn::StoreU(bytes, d8, to);
  HWY_ALIGN uint8_t rest[kLanes];
  hn::Store(bytes, d8, rest);
  std::memcpy(to, rest, static_cast<size_t>(count));
}

double CodesOf8BitsImpl(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* codes) {
  return CodesOfGrid(x, count, scale, zero_point,
                     [&](int64_t i, auto code, int64_t n) HWY_ATTR { StoreBytes(code, n, codes + i); });
}

double CodesOf16BitsImpl(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* high, uint8_t* low) {
  return CodesOfGrid(x, count, scale, zero_point, [&](int64_t i, auto code, int64_t n) HWY_ATTR {
    StoreBytes(hn::ShiftRight<8>(code), n, high + i);
    StoreBytes(code, n, low + i);
  });
}

int64_t SumOfCodesImpl(const int8_t* codes, int64_t count) {
  int64_t sum = 0, i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::ScalableTag<uint8_t> d8;
  const hn::Repartition<uint64_t, decltype(d8)> d64;
  const auto sign = hn::Set(d8, 0x80);  // sums are of unsigned bytes: each code counts 128 too many
  constexpr int64_t kBytes = hn::MaxLanes(d8);
  auto sums = hn::Zero(d64);
  for (; i + kBytes <= count; i += kBytes)
    sums = hn::Add(sums, hn::SumsOf8(hn::Xor(hn::LoadU(d8, reinterpret_cast<const uint8_t*>(codes) + i), sign)));
  sum = static_cast<int64_t>(hn::GetLane(hn::SumOfLanes(d64, sums))) - 128 * i;
#endif
  for (; i < count; ++i) sum += codes[i];
  return sum;
}

void FinishIntegersImpl(const int32_t* sum, const int32_t* low, const IntegerColumns& columns, double row,
                        int64_t count, float* y) {
  const hn::Rebind<int32_t, Doubles> d32;
  const auto rows = hn::Set(kD64, row), high_digit = hn::Set(kD64, 256.0);
  int64_t j = 0;
  for (; j + kDoubles <= count; j += kDoubles) {
    auto total = hn::PromoteTo(kD64, hn::LoadU(d32, sum + j));
    if (low != nullptr) total = hn::MulAdd(total, high_digit, hn::PromoteTo(kD64, hn::LoadU(d32, low + j)));
    total = hn::Add(total, hn::LoadU(kD64, columns.offset + j));
    total = hn::NegMulAdd(hn::LoadU(kD64, columns.zero_point + j), rows, total);
    total = hn::MulAdd(total, hn::LoadU(kD64, columns.scale + j), hn::LoadU(kD64, columns.bias + j));
    hn::StoreU(hn::DemoteTo(kHalf, total), kHalf, y + j);
  }
  for (; j < count; ++j) {
    double total = sum[j];
    if (low != nullptr) total = total * 256 + low[j];
    total = total + columns.offset[j] - columns.zero_point[j] * row;
    y[j] = static_cast<float>(kFused ? std::fma(total, columns.scale[j], columns.bias[j])
                                     : total * columns.scale[j] + columns.bias[j]);
  }
}

void BF16ToF32Impl(const uint16_t* in, int64_t count, float* out) {
  const hn::RebindToUnsigned<Floats> d32;
  const hn::Rebind<uint16_t, Floats> d16;
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    const auto bits = hn::ShiftLeft<16>(hn::PromoteTo(d32, hn::LoadU(d16, in + i)));
    hn::StoreU(hn::BitCast(kD, bits), kD, out + i);
  }
  for (; i < count; ++i) {
    const uint32_t bits = static_cast<uint32_t>(in[i]) << 16;
    std::memcpy(out + i, &bits, sizeof(bits));
  }
}

void F32ToBF16Impl(const float* in, int64_t count, uint16_t* out) {
  const hn::RebindToUnsigned<Floats> d32;
  const hn::Rebind<uint16_t, Floats> d16;
  const auto convert = [&](V v) HWY_ATTR {
    const auto bits = hn::BitCast(d32, v);
    const auto odd = hn::And(hn::ShiftRight<16>(bits), hn::Set(d32, 1));
    const auto rounded = hn::ShiftRight<16>(hn::Add(bits, hn::Add(odd, hn::Set(d32, 0x7fff))));
    const auto nan = hn::Or(hn::ShiftRight<16>(bits), hn::Set(d32, 0x40));  // quiet, and not an infinity
    return hn::TruncateTo(d16, hn::IfThenElse(hn::RebindMask(d32, hn::IsNaN(v)), nan, rounded));
  };
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) hn::StoreU(convert(hn::LoadU(kD, in + i)), d16, out + i);
  if (i == count) return;
  HWY_ALIGN float rest[kLanes] = {};
  HWY_ALIGN uint16_t rest_out[kLanes];
  std::memcpy(rest, in + i, static_cast<size_t>(count - i) * sizeof(float));
  hn::Store(convert(hn::Load(kD, rest)), d16, rest_out);
  std::memcpy(out + i, rest_out, static_cast<size_t>(count - i) * sizeof(uint16_t));
}

// ---- Elementwise --------------------------------------------------------------------------------------------------

// f(op) with op as a function of two vectors. A NaN of the first operand survives max and min.
template <class F>
HWY_INLINE void WithBinary(BinaryOp op, F f) {
  switch (op) {
    case BinaryOp::kAdd:
      return f([](V a, V b) HWY_ATTR { return hn::Add(a, b); });
    case BinaryOp::kSub:
      return f([](V a, V b) HWY_ATTR { return hn::Sub(a, b); });
    case BinaryOp::kMul:
      return f([](V a, V b) HWY_ATTR { return hn::Mul(a, b); });
    case BinaryOp::kMax:
      return f([](V a, V b) HWY_ATTR { return MaxKeepingNaN(a, b); });
    case BinaryOp::kMin:
      return f([](V a, V b) HWY_ATTR { return MinKeepingNaN(a, b); });
  }
}

void BinaryImpl(BinaryOp op, const float* a, const float* b, int64_t count, float* y) {
  WithBinary(op, [&](auto apply) HWY_ATTR { Map2(a, b, count, y, apply); });
}

void MulRowsImpl(const float* x, int64_t stride, const float* factors, int64_t rows, int64_t width, float* y) {
  for (int64_t row = 0; row < rows; ++row)
    Map2(x + row * stride, factors, width, y + row * width, [](V a, V b) HWY_ATTR { return hn::Mul(a, b); });
}

void BinaryScalarImpl(BinaryOp op, const float* a, float b, int64_t count, float* y) {
  const V repeated = hn::Set(kD, b);
  WithBinary(op, [&](auto apply) HWY_ATTR { Map(a, count, y, [&](V v) HWY_ATTR { return apply(v, repeated); }); });
}

void NegImpl(const float* x, int64_t count, float* y) {
  Map(x, count, y, [](V v) HWY_ATTR { return hn::Neg(v); });
}

// Highway's Exp makes 0 of NaN.
HWY_INLINE V ExpKeepingNaN(V x) { return hn::IfThenElse(hn::IsNaN(x), x, hn::Exp(kD, x)); }

HWY_INLINE V TanhOf(V x) {
  const V magnitude = hn::Abs(x);
  // Near 0 an odd polynomial; elsewhere 1 - 2 / (exp(2|x|) + 1), which loses nothing since it is above 1/2. From 9.02
  // on the result rounds to 1.
  const V square = hn::Mul(x, x);
  V series = hn::Set(kD, -5.70498872745e-3f);
  for (const float coefficient : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    series = hn::MulAdd(series, square, hn::Set(kD, coefficient));
  const V small = hn::MulAdd(hn::Mul(series, square), x, x);
  const V bounded = hn::Min(magnitude, hn::Set(kD, 9.5f));
  const V grown = hn::Exp(kD, hn::Add(bounded, bounded));
  const V one = hn::Set(kD, 1.0f);
  const V large = hn::Sub(one, hn::Div(hn::Set(kD, 2.0f), hn::Add(grown, one)));
  const V result = hn::IfThenElse(hn::Lt(magnitude, hn::Set(kD, 0.625f)), small, hn::CopySignToAbs(large, x));
  return hn::IfThenElse(hn::IsNaN(x), x, result);
}

void TanhImpl(const float* x, int64_t count, float* y) {
  Map(x, count, y, [](V v) HWY_ATTR { return TanhOf(v); });
}

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), without the cancellation of 1 + tanh.
HWY_INLINE V GeluOf(V x) {
  constexpr double kSqrt2OverPi = 0.79788456080286535588;
  const V cubic = hn::Set(kD, static_cast<float>(-2 * kSqrt2OverPi * 0.044715));
  const V linear = hn::Set(kD, static_cast<float>(-2 * kSqrt2OverPi));
  const V exponent = hn::Mul(x, hn::MulAdd(hn::Mul(x, x), cubic, linear));
  const V limit = hn::Set(kD, 88.0f);
  const V grown = ExpKeepingNaN(MinKeepingNaN(exponent, limit));
  const V y = hn::Div(x, hn::Add(hn::Set(kD, 1.0f), grown));
  return hn::IfThenZeroElse(hn::Gt(exponent, limit), y);
}

void GeluImpl(const float* x, int64_t count, float* y) {
  Map(x, count, y, [](V v) HWY_ATTR { return GeluOf(v); });
}

// ---- Rows ---------------------------------------------------------------------------------------------------------

// In 16 chains, each half of which is added to the other: the same tree whatever the width of a vector. Squares of
// float32 are exact.
HWY_INLINE double SumOfSquares(const float* x, int64_t count) {
  constexpr int64_t kChains = 16, kVectors = kChains / kDoubles;
  hn::Vec<Doubles> sums[kVectors];
  for (auto& sum : sums) sum = hn::Zero(kD64);
  int64_t i = 0;
  for (; i + kChains <= count; i += kChains)
    for (int64_t v = 0; v < kVectors; ++v) {
      const auto value = hn::PromoteTo(kD64, hn::LoadU(kHalf, x + i + v * kDoubles));
      sums[v] = hn::MulAdd(value, value, sums[v]);
    }
  for (int64_t n = kVectors / 2; n > 0; n /= 2)
    for (int64_t v = 0; v < n; ++v) sums[v] = hn::Add(sums[v], sums[v + n]);
  HWY_ALIGN double lanes[kDoubles];
  hn::Store(sums[0], kD64, lanes);
  for (int64_t n = kDoubles / 2; n > 0; n /= 2)
    for (int64_t lane = 0; lane < n; ++lane) lanes[lane] += lanes[lane + n];
  double sum = lanes[0];
  for (; i < count; ++i) sum += static_cast<double>(x[i]) * x[i];
  return sum;
}

HWY_INLINE void ScaleRow(const float* x, const float* gamma, int64_t count, double factor, float* y) {
  const auto factors = hn::Set(kD64, factor);
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    const auto value = hn::Mul(hn::PromoteTo(kD64, hn::LoadU(kHalf, x + i)), factors);
    const auto scaled = hn::Mul(value, hn::PromoteTo(kD64, hn::LoadU(kHalf, gamma + i)));
    hn::StoreU(hn::DemoteTo(kHalf, scaled), kHalf, y + i);
  }
  for (; i < count; ++i) y[i] = static_cast<float>(x[i] * factor * gamma[i]);
}

// In float64, rounded once at the end (format.md 4.4). Several rows at a time, so that narrow ones do not each
// wait for a root and two divisions.
void RmsNormRowsImpl(const float* x, const float* gamma, int64_t rows, int64_t width, float eps, float* y) {
  constexpr int64_t kRows = 16;
  const auto one = hn::Set(kD64, 1.0), widths = hn::Set(kD64, static_cast<double>(width)),
             offset = hn::Set(kD64, static_cast<double>(eps));
  HWY_ALIGN double factors[kRows] = {};
  for (int64_t first = 0; first < rows; first += kRows) {
    const int64_t count = std::min(kRows, rows - first);
    const float* const from = x + first * width;
    for (int64_t row = 0; row < count; ++row) factors[row] = SumOfSquares(from + row * width, width);
    for (int64_t row = 0; row < count; row += kDoubles) {
      const auto mean = hn::Div(hn::Load(kD64, factors + row), widths);
      hn::Store(hn::Div(one, hn::Sqrt(hn::Add(mean, offset))), kD64, factors + row);
    }
    for (int64_t row = 0; row < count; ++row)
      ScaleRow(from + row * width, gamma, width, factors[row], y + (first + row) * width);
  }
}

// exp(x) = 2^n exp(x - n ln 2) with Highway's polynomial, for -28 <= x <= 0; NaN stays NaN. Added to 1.5 * 2^23 a value
// loses its fraction and stands in the lowest bits of the sum, whence n goes into the exponent without a conversion.
HWY_INLINE V ExpOfSoftmax(V x) {
  const hn::RebindToSigned<Floats> d32;
  const V shift = hn::Set(kD, 12582912.0f);
  const V shifted = hn::MulAdd(x, hn::Set(kD, 1.442695040888963407f), shift);
  const V n = hn::Sub(shifted, shift);
  V rest = hn::MulAdd(n, hn::Set(kD, -0.693145751953125f), x);
  rest = hn::MulAdd(n, hn::Set(kD, -1.428606765330187045e-6f), rest);
  const V fraction = hn::Add(hn::impl::ExpImpl<float>().ExpPoly(kD, rest), hn::Set(kD, 1.0f));
  const auto power = hn::Add(hn::ShiftLeft<23>(hn::BitCast(d32, shifted)), hn::Set(d32, 0x3f800000));
  return hn::Mul(fraction, hn::BitCast(kD, power));
}

HWY_INLINE V MaxOf(const float* x, int64_t count, V high) {
  V other = high;  // two chains, so that one need not wait for itself
  int64_t i = 0;
  for (; i + 2 * kLanes <= count; i += 2 * kLanes) {
    high = hn::Max(high, hn::LoadU(kD, x + i));
    other = hn::Max(other, hn::LoadU(kD, x + i + kLanes));
  }
  for (; i < count; i += kLanes) high = hn::Max(high, hn::LoadU(kD, x + i));
  return hn::Max(high, other);
}

// The sum of kSoftmaxLanes chains, each half added to the other: the same tree whatever the width of a vector.
template <class D>
HWY_INLINE float SumOfChains([[maybe_unused]] D d, hn::Vec<D> chains) {
#if HWY_TARGET == HWY_SCALAR
  return hn::GetLane(chains);
#else
  if constexpr (hn::MaxLanes(d) > 4) {
    const hn::Half<D> half;
    return SumOfChains(half, hn::Add(hn::LowerHalf(half, chains), hn::UpperHalf(half, chains)));
  } else {
    HWY_ALIGN float lanes[4];
    hn::Store(chains, d, lanes);
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
  }
#endif
}

// Sums run in kSoftmaxLanes interleaved chains, whatever the width of a vector.
void SoftmaxRowImpl(float* x, int64_t count) {
  if (count == 0) return;
  constexpr int64_t kVectors = kSoftmaxLanes / kLanes;
  const int64_t whole = count / kSoftmaxLanes * kSoftmaxLanes;
  V rest[kVectors], sums[kVectors], high = hn::Set(kD, -kInf);
  const auto rest_count = [&](int64_t v) { return std::clamp<int64_t>(count - whole - v * kLanes, 0, kLanes); };
  for (int64_t v = 0; v < kVectors; ++v) {
    const auto taken = hn::FirstN(kD, static_cast<size_t>(rest_count(v)));
    rest[v] = hn::IfThenElse(taken, LoadRest(x + whole + v * kLanes, rest_count(v)), hn::Set(kD, -kInf));
    high = hn::Max(high, rest[v]);
    sums[v] = hn::Zero(kD);
  }
  const V max = hn::MaxOfLanes(kD, MaxOf(x, whole, high));

  const V cut = hn::Set(kD, -28.0f);
  const auto grown = [&](V value, V& sum) HWY_ATTR {
    const V below = hn::Sub(value, max);
    const V term = hn::IfThenZeroElse(hn::Lt(below, cut), ExpOfSoftmax(below));
    sum = hn::Add(sum, term);
    return term;
  };
  for (int64_t i = 0; i < whole; i += kSoftmaxLanes)
    for (int64_t v = 0; v < kVectors; ++v)
      hn::StoreU(grown(hn::LoadU(kD, x + i + v * kLanes), sums[v]), kD, x + i + v * kLanes);
  if (whole < count)
    for (int64_t v = 0; v < kVectors; ++v) rest[v] = grown(rest[v], sums[v]);

  for (int64_t n = kVectors / 2; n > 0; n /= 2)
    for (int64_t v = 0; v < n; ++v) sums[v] = hn::Add(sums[v], sums[v + n]);
  const float total = SumOfChains(kD, sums[0]);

  // The quotients that a division gives, at the price of three products: the first is off by little, and its remainder,
  // which the fused product has exactly, corrects it (Markstein). Terms are 0 or at least exp(-28), sums at least 1.
  const V sum = hn::Set(kD, total), reciprocal = hn::Set(kD, 1.0f / total);
  const auto divided = [&](V term) HWY_ATTR {
    if constexpr (!kFused) return hn::Div(term, sum);
    const V quotient = hn::Mul(term, reciprocal);
    return hn::MulAdd(hn::NegMulAdd(quotient, sum, term), reciprocal, quotient);
  };
  for (int64_t i = 0; i < whole; i += kLanes) hn::StoreU(divided(hn::LoadU(kD, x + i)), kD, x + i);
  for (int64_t v = 0; v < kVectors && rest_count(v) > 0; ++v)
    StoreRest(divided(rest[v]), rest_count(v), x + whole + v * kLanes);
}

double SumOfExpImpl(const float* x, int64_t count, float shift) {
  const auto shifts = hn::Set(kD64, static_cast<double>(shift));
  auto sum = hn::Zero(kD64);
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles)
    sum = hn::Add(sum, hn::Exp(kD64, hn::Sub(hn::PromoteTo(kD64, hn::LoadU(kHalf, x + i)), shifts)));
  double total = hn::GetLane(hn::SumOfLanes(kD64, sum));
  for (; i < count; ++i) total += std::exp(static_cast<double>(x[i]) - shift);
  return total;
}

ExpSums SumsOfExpImpl(const float* x, const float* y, int64_t count, float shift) {
  const auto shifts = hn::Set(kD64, static_cast<double>(shift));
  auto plain = hn::Zero(kD64), weighted = hn::Zero(kD64);
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles) {
    const auto of_x = hn::PromoteTo(kD64, hn::LoadU(kHalf, x + i)), of_y = hn::PromoteTo(kD64, hn::LoadU(kHalf, y + i));
    const auto term = hn::Exp(kD64, hn::Sub(of_x, shifts));
    plain = hn::Add(plain, term);
    weighted = hn::MulAdd(term, hn::Sub(of_x, of_y), weighted);
  }
  ExpSums sums{hn::GetLane(hn::SumOfLanes(kD64, plain)), hn::GetLane(hn::SumOfLanes(kD64, weighted))};
  for (; i < count; ++i) {
    const double term = std::exp(static_cast<double>(x[i]) - shift);
    sums.plain += term;
    sums.times_difference += term * (static_cast<double>(x[i]) - y[i]);
  }
  return sums;
}

}  // namespace circlet::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace circlet::simd {

HWY_EXPORT(InstructionSetImpl);
HWY_EXPORT(MinMaxImpl);
HWY_EXPORT(SnapImpl);
HWY_EXPORT(QuantizeImpl);
HWY_EXPORT(DequantizeImpl);
HWY_EXPORT(CodesOf8BitsImpl);
HWY_EXPORT(CodesOf16BitsImpl);
HWY_EXPORT(SumOfCodesImpl);
HWY_EXPORT(FinishIntegersImpl);
HWY_EXPORT(BF16ToF32Impl);
HWY_EXPORT(F32ToBF16Impl);
HWY_EXPORT(BinaryImpl);
HWY_EXPORT(MulRowsImpl);
HWY_EXPORT(BinaryScalarImpl);
HWY_EXPORT(NegImpl);
HWY_EXPORT(TanhImpl);
HWY_EXPORT(GeluImpl);
HWY_EXPORT(RmsNormRowsImpl);
HWY_EXPORT(SoftmaxRowImpl);
HWY_EXPORT(SumOfExpImpl);
HWY_EXPORT(SumsOfExpImpl);

const char* InstructionSet() { return HWY_DYNAMIC_DISPATCH(InstructionSetImpl)(); }

Range MinMax(const float* x, int64_t count) {
  Range range = HWY_DYNAMIC_DISPATCH(MinMaxImpl)(x, count);
  // Which of -0 and +0 wins depends on the order of comparison; + 0 makes both +0.
  range.min += 0.0f;
  range.max += 0.0f;
  return range;
}
void Snap(float* x, int64_t count, const Grid& grid) { HWY_DYNAMIC_DISPATCH(SnapImpl)(x, count, grid); }
void Quantize(const float* x, int64_t count, const Grid& grid, int16_t* codes) {
  HWY_DYNAMIC_DISPATCH(QuantizeImpl)(x, count, grid, codes);
}
void Dequantize(const int16_t* codes, int64_t count, float scale, int32_t zero_point, float* x) {
  HWY_DYNAMIC_DISPATCH(DequantizeImpl)(codes, count, scale, zero_point, x);
}
double CodesOf8Bits(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* codes) {
  return HWY_DYNAMIC_DISPATCH(CodesOf8BitsImpl)(x, count, scale, zero_point, codes);
}
double CodesOf16Bits(const float* x, int64_t count, float scale, int32_t zero_point, uint8_t* high, uint8_t* low) {
  return HWY_DYNAMIC_DISPATCH(CodesOf16BitsImpl)(x, count, scale, zero_point, high, low);
}
int64_t SumOfCodes(const int8_t* codes, int64_t count) { return HWY_DYNAMIC_DISPATCH(SumOfCodesImpl)(codes, count); }
void FinishIntegers(const int32_t* sum, const int32_t* low, const IntegerColumns& columns, double row, int64_t count,
                    float* y) {
  HWY_DYNAMIC_DISPATCH(FinishIntegersImpl)(sum, low, columns, row, count, y);
}
void BF16ToF32(const uint16_t* in, int64_t count, float* out) { HWY_DYNAMIC_DISPATCH(BF16ToF32Impl)(in, count, out); }
void F32ToBF16(const float* in, int64_t count, uint16_t* out) { HWY_DYNAMIC_DISPATCH(F32ToBF16Impl)(in, count, out); }
void Binary(BinaryOp op, const float* a, const float* b, int64_t count, float* y) {
  HWY_DYNAMIC_DISPATCH(BinaryImpl)(op, a, b, count, y);
}
void MulRows(const float* x, int64_t stride, const float* factors, int64_t rows, int64_t width, float* y) {
  HWY_DYNAMIC_DISPATCH(MulRowsImpl)(x, stride, factors, rows, width, y);
}
void BinaryScalar(BinaryOp op, const float* a, float b, int64_t count, float* y) {
  HWY_DYNAMIC_DISPATCH(BinaryScalarImpl)(op, a, b, count, y);
}
void Neg(const float* x, int64_t count, float* y) { HWY_DYNAMIC_DISPATCH(NegImpl)(x, count, y); }
void Tanh(const float* x, int64_t count, float* y) { HWY_DYNAMIC_DISPATCH(TanhImpl)(x, count, y); }
void Gelu(const float* x, int64_t count, float* y) { HWY_DYNAMIC_DISPATCH(GeluImpl)(x, count, y); }
void RmsNormRows(const float* x, const float* gamma, int64_t rows, int64_t width, float eps, float* y) {
  HWY_DYNAMIC_DISPATCH(RmsNormRowsImpl)(x, gamma, rows, width, eps, y);
}
double SumOfExp(const float* x, int64_t count, float shift) { return HWY_DYNAMIC_DISPATCH(SumOfExpImpl)(x, count, shift); }
ExpSums SumsOfExp(const float* x, const float* y, int64_t count, float shift) {
  return HWY_DYNAMIC_DISPATCH(SumsOfExpImpl)(x, y, count, shift);
}
void SoftmaxRow(float* x, int64_t count) { HWY_DYNAMIC_DISPATCH(SoftmaxRowImpl)(x, count); }

}  // namespace circlet::simd
#endif  // HWY_ONCE
