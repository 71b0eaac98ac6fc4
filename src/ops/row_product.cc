#include "ops/row_product.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "circlet/base/dtype.h"
#include "circlet/base/error.h"
#include "hwy/cache_control.h"
#include "ops/gemm.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/row_product.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace circlet::simd::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Words = hn::ScalableTag<int16_t>;
constexpr Words kD16;
constexpr hn::RepartitionToWide<Words> kD32;
constexpr hn::RebindToUnsigned<Words> kDU16;
constexpr int64_t kLanes = hn::MaxLanes(kD16);
static_assert(kPlanePad % kLanes == 0);
// Steps after which sums of 32 bits go to wider ones: two fields of at most 255 by values of at most 2^15, two of each
// to a sum, stay below 2^31 for 64 of them.
constexpr int64_t kSteps = 64;
// Rows of W whose sums are finished together; rows of x that share the unpacking of one row of W, or rows of W that
// are summed side by side with one of x.
constexpr int64_t kChunk = 16;
constexpr int kTile = 4;
// Bytes of W that are asked for ahead of those that are summed, at least: a processor that follows a row by itself
// stops at its end.
constexpr int64_t kAhead = 6144;

// What makes signed fields unsigned, and by how much a field is larger than its code then.
struct Signs {
  uint16_t flip = 0;
  double offset = 0;
};
Signs SignsOf(DType dtype) {
  if (dtype == DType::kI8) return {0x8080, 128};
  if (dtype == DType::kI4) return {0x8888, 8};
  return {};
}

#if HWY_TARGET == HWY_SCALAR

template <int kFields, int kRows, int kColumns, bool>
void SumsOfTile(const int16_t* x, int64_t row_stride, int64_t plane, const uint8_t* w, int64_t bytes, uint16_t flip,
                double* totals) {
  for (int j = 0; j < kColumns; ++j, w += bytes) {
    int64_t sums[kRows] = {};
    for (int64_t i = 0; 2 * i < bytes; ++i) {
      uint16_t lane = 0;
      std::memcpy(&lane, w + 2 * i, static_cast<size_t>(std::min<int64_t>(2, bytes - 2 * i)));
      lane ^= flip;
      for (int p = 0; p < kFields; ++p) {
        const int64_t field = lane >> (16 / kFields * p) & ((1 << 16 / kFields) - 1);
        for (int r = 0; r < kRows; ++r) sums[r] += field * x[r * row_stride + p * plane + i];
      }
    }
    for (int r = 0; r < kRows; ++r) totals[r * kChunk + j] = static_cast<double>(sums[r]);
  }
}

#else

using Lanes = hn::Vec<Words>;
using Sums = hn::Vec<decltype(kD32)>;

HWY_INLINE int64_t Total(Sums sums) {
  const hn::Half<decltype(kD32)> half;
  const hn::RepartitionToWide<decltype(kD32)> d64;
  const auto low = hn::PromoteTo(d64, hn::LowerHalf(half, sums)), high = hn::PromoteTo(d64, hn::UpperHalf(half, sums));
  return hn::GetLane(hn::SumOfLanes(d64, hn::Add(low, high)));
}

// The fields of 16-bit lanes, the lowest first; the second and the fourth nibble 16 times too large, which saves a
// shift.
template <int kFields>
HWY_INLINE void FieldsOf(hn::Vec<decltype(kDU16)> lanes, Lanes* fields) {
  if constexpr (kFields == 4) {
    const auto low = hn::Set(kDU16, 15), high = hn::Set(kDU16, 240), upper = hn::ShiftRight<8>(lanes);
    fields[0] = hn::BitCast(kD16, hn::And(lanes, low));
    fields[1] = hn::BitCast(kD16, hn::And(lanes, high));
    fields[2] = hn::BitCast(kD16, hn::And(upper, low));
    fields[3] = hn::BitCast(kD16, hn::And(upper, high));
  } else {
    fields[0] = hn::BitCast(kD16, hn::And(lanes, hn::Set(kDU16, 255)));
    fields[1] = hn::BitCast(kD16, hn::ShiftRight<8>(lanes));
  }
}

// sum + the products of neighbours, by lane of 32 bits; what adds neighbours of its own choice puts some of them in
// `other`. With AVX-512 VNNI in one instruction, which the target's headers do not offer.
template <bool kVnni>
HWY_INLINE Sums AddProducts(Lanes a, Lanes b, Sums sum, Sums& other) {
#if HWY_TARGET == HWY_AVX3
  if constexpr (kVnni) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
    return sum;
  }
#endif
  return hn::ReorderWidenMulAccumulate(kD32, a, b, sum, other);
}

// totals[r * kChunk + j] = the sum over row j of W, `bytes` long, of fields by the steps of row r of x. Each sum of a
// tile is a chain of its own, so that they need not wait for each other.
template <int kFields, int kRows, int kColumns, bool kVnni>
HWY_INLINE void SumsOfTile(const int16_t* HWY_RESTRICT x, int64_t row_stride, int64_t plane,
                           const uint8_t* HWY_RESTRICT w, int64_t bytes, uint16_t flip, double* HWY_RESTRICT totals) {
  constexpr int64_t kBytes = 2 * kLanes;
  const auto flips = hn::Set(kDU16, flip);
  int64_t sums[kRows][kColumns] = {};
  const int64_t whole = bytes / kBytes, rest_bytes = bytes - whole * kBytes, steps = whole + (rest_bytes > 0);
  const int64_t ahead = std::max(kColumns * bytes, kAhead);
  HWY_ALIGN uint16_t rest[kColumns * kLanes];
  if (rest_bytes > 0) {
    std::memset(rest, 0, sizeof rest);
    for (int j = 0; j < kColumns; ++j)
      std::memcpy(rest + j * kLanes, w + j * bytes + whole * kBytes, static_cast<size_t>(rest_bytes));
  }
  for (int64_t begin = 0; begin < steps; begin += kSteps) {
    // `high`: of nibbles that are 16 times too large. `other`: see AddProducts.
    Sums sum[kRows][kColumns], high[kRows][kColumns], other[kRows][kColumns], other_high[kRows][kColumns];
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kColumns; ++j) sum[r][j] = high[r][j] = other[r][j] = other_high[r][j] = hn::Zero(kD32);
    const auto take = [&](const uint8_t* from, int64_t stride, int64_t step) HWY_ATTR {
      for (int j = 0; j < kColumns; ++j) {
        Lanes fields[4];
        FieldsOf<kFields>(hn::Xor(hn::LoadU(kDU16, reinterpret_cast<const uint16_t*>(from + j * stride)), flips),
                          fields);
        for (int r = 0; r < kRows; ++r) {
          const int16_t* const of_row = x + r * row_stride + step * kLanes;
          for (int p = 0; p < kFields; ++p) {
            const Lanes value = hn::Load(kD16, of_row + p * plane);
            if (kFields == 4 && p % 2 == 1)
              high[r][j] = AddProducts<kVnni>(fields[p], value, high[r][j], other_high[r][j]);
            else
              sum[r][j] = AddProducts<kVnni>(fields[p], value, sum[r][j], other[r][j]);
          }
        }
      }
    };
    const int64_t end = std::min(whole, begin + kSteps);
    for (int64_t step = begin; step < end; ++step) {
      for (int j = 0; j < kColumns; ++j) hwy::Prefetch(w + j * bytes + step * kBytes + ahead);
      take(w + step * kBytes, bytes, step);
    }
    if (end == whole && whole < std::min(steps, begin + kSteps))
      take(reinterpret_cast<const uint8_t*>(rest), kBytes, whole);
    for (int r = 0; r < kRows; ++r)
      for (int j = 0; j < kColumns; ++j) {
        Sums total = hn::Add(sum[r][j], other[r][j]);
        // Sums of nibbles are far from the ends of 32 bits, and the high ones whole multiples of 16.
        if constexpr (kFields == 4) total = hn::Add(total, hn::ShiftRight<4>(hn::Add(high[r][j], other_high[r][j])));
        sums[r][j] += Total(total);
      }
  }
  for (int r = 0; r < kRows; ++r)
    for (int j = 0; j < kColumns; ++j) totals[r * kChunk + j] = static_cast<double>(sums[r][j]);
}

#endif

template <int kFields, bool kVnni>
HWY_INLINE void SumsOfChunk(const int16_t* x, int64_t rows, int64_t row_stride, int64_t plane, const uint8_t* w,
                            int64_t count, int64_t bytes, uint16_t flip, double* totals) {
  if (rows == kTile) {
    for (int64_t j = 0; j < count; ++j)
      SumsOfTile<kFields, kTile, 1, kVnni>(x, row_stride, plane, w + j * bytes, bytes, flip, totals + j);
    return;
  }
  for (int64_t r = 0; r < rows; ++r) {
    const int16_t* const row = x + r * row_stride;
    double* const to = totals + r * kChunk;
    int64_t j = 0;
    for (; j + kTile <= count; j += kTile)
      SumsOfTile<kFields, 1, kTile, kVnni>(row, 0, plane, w + j * bytes, bytes, flip, to + j);
    for (; j < count; ++j) SumsOfTile<kFields, 1, 1, kVnni>(row, 0, plane, w + j * bytes, bytes, flip, to + j);
  }
}

template <bool kVnni>
auto SumsOf(int64_t fields) {
  return fields == 4 ? SumsOfChunk<4, kVnni> : SumsOfChunk<2, kVnni>;
}

void MultiplyRowsImpl(const StepRows& x, const CodeRows& w, int64_t first, int64_t last, float* y, int64_t y_stride) {
  const int64_t fields = CodesPerLane(w.dtype), plane = PlaneElements(x.k, w.dtype), stride = fields * plane;
  const int64_t bytes = (x.k * BitWidth(w.dtype) + 7) / 8;
  const Signs signs = SignsOf(w.dtype);
  const auto sums_of = HWY_TARGET == HWY_AVX3 && gemm::MultipliesBytes() ? SumsOf<HWY_TARGET == HWY_AVX3>(fields)
                                                                         : SumsOf<false>(fields);
  const auto k = static_cast<double>(x.k);
  for (int64_t chunk = first; chunk < last; chunk += kChunk) {
    const int64_t count = std::min(kChunk, last - chunk);
    const auto* const rows = reinterpret_cast<const uint8_t*>(w.codes) + chunk * bytes;
    double zero[kChunk], scale[kChunk], bias[kChunk], moved[kChunk] = {};
    if (x.zero_point != 0) sums_of(x.ones, 1, stride, plane, rows, count, bytes, signs.flip, moved);
    for (int64_t j = 0; j < count; ++j) {
      const int64_t channel = w.per_row ? chunk + j : 0;
      zero[j] = w.zero_points[channel] + signs.offset;
      scale[j] = x.scale * w.scales[channel];
      bias[j] = w.bias == nullptr ? 0 : w.bias[chunk + j];
      moved[j] = x.zero_point * (k * zero[j] - moved[j]);
    }
    for (int64_t row = 0; row < x.count; row += kTile) {
      const int64_t height = std::min<int64_t>(kTile, x.count - row);
      double totals[kTile * kChunk];
      sums_of(x.steps + row * stride, height, stride, plane, rows, count, bytes, signs.flip, totals);
      for (int64_t r = 0; r < height; ++r)
        for (int64_t j = 0; j < count; ++j) {
          const double total = totals[r * kChunk + j] + moved[j] - zero[j] * x.sums[row + r];
          y[(row + r) * y_stride + chunk + j] =
              static_cast<float>(bias[j] == 0 ? total * scale[j] : std::fma(total, scale[j], bias[j]));
        }
    }
  }
}

// piece[i * fields + p] to planes[p * plane + i], i < count.
HWY_INLINE void IntoPlanes(const int16_t* piece, int64_t count, int64_t fields, int64_t plane, int16_t* planes) {
#if HWY_TARGET == HWY_SCALAR
  for (int64_t i = 0; i < count; ++i)
    for (int64_t p = 0; p < fields; ++p) planes[p * plane + i] = piece[i * fields + p];
#else
  for (int64_t i = 0; i < count; i += kLanes) {
    Lanes a, b, c, d;
    if (fields == 2) {
      hn::LoadInterleaved2(kD16, piece + 2 * i, a, b);
      hn::Store(a, kD16, planes + i);
      hn::Store(b, kD16, planes + plane + i);
    } else {
      hn::LoadInterleaved4(kD16, piece + 4 * i, a, b, c, d);
      hn::Store(a, kD16, planes + i);
      hn::Store(b, kD16, planes + plane + i);
      hn::Store(c, kD16, planes + 2 * plane + i);
      hn::Store(d, kD16, planes + 3 * plane + i);
    }
  }
#endif
}

double StepsOfRowImpl(const float* x, int64_t k, float scale, int32_t added, DType w, int16_t* steps) {
  const int64_t fields = CodesPerLane(w), plane = PlaneElements(k, w);
  const hn::ScalableTag<float> d;
  const hn::RebindToSigned<decltype(d)> d32;
  const hn::Rebind<int16_t, decltype(d)> d16;
  constexpr int64_t kFloats = hn::MaxLanes(d);
  const auto reciprocal = hn::Set(d, 1.0f / scale);
  const auto shift = hn::Set(d32, added);
  auto sum = hn::Zero(d32);
  auto odd = hn::Zero(d);  // x - x is 0, or NaN
  // Pieces of whole vectors of all planes.
  constexpr int64_t kPiece = 4 * kPlanePad;
  for (int64_t begin = 0; begin < fields * plane; begin += kPiece) {
    HWY_ALIGN float values[kPiece] = {};
    HWY_ALIGN int16_t piece[kPiece];
    const int64_t count = std::clamp<int64_t>(k - begin, 0, kPiece);
    std::memcpy(values, x + begin, static_cast<size_t>(count) * sizeof(float));
    for (int64_t i = 0; i < kPiece; i += kFloats) {
      const auto value = hn::Load(d, values + i);
      odd = hn::Add(odd, hn::Sub(value, value));
      auto step = hn::Add(hn::NearestInt(hn::Mul(value, reciprocal)), shift);
      if (i + kFloats > count)
        step = hn::IfThenElseZero(hn::FirstN(d32, static_cast<size_t>(std::max<int64_t>(0, count - i))), step);
      sum = hn::Add(sum, step);
      hn::Store(hn::DemoteTo(d16, step), d16, piece + i);
    }
    IntoPlanes(piece, std::min(kPiece, fields * plane - begin) / fields, fields, plane, steps + begin / fields);
  }
  const auto total = static_cast<double>(hn::GetLane(hn::SumOfLanes(d32, sum)));
  return total + static_cast<double>(hn::GetLane(hn::SumOfLanes(d, odd)));
}

}  // namespace circlet::simd::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace circlet::simd {

HWY_EXPORT(MultiplyRowsImpl);
HWY_EXPORT(StepsOfRowImpl);

int64_t CodesPerLane(DType w) { return 16 / BitWidth(w); }
int64_t PlaneElements(int64_t k, DType w) {
  const int64_t fields = CodesPerLane(w);
  return ((k + fields - 1) / fields + kPlanePad - 1) / kPlanePad * kPlanePad;
}
int64_t StepElements(int64_t k, DType w) { return CodesPerLane(w) * PlaneElements(k, w); }

double StepsOfRow(const float* x, int64_t k, float scale, int32_t added, DType w, int16_t* steps) {
  return HWY_DYNAMIC_DISPATCH(StepsOfRowImpl)(x, k, scale, added, w, steps);
}
void MultiplyRows(const StepRows& x, const CodeRows& w, int64_t first, int64_t last, float* y, int64_t y_stride) {
  HWY_DYNAMIC_DISPATCH(MultiplyRowsImpl)(x, w, first, last, y, y_stride);
}

}  // namespace circlet::simd
#endif  // HWY_ONCE
