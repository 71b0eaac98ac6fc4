#include <algorithm>
#include <cstring>

#include "circlet/base/error.h"
#include "ops/aligned.h"
#include "ops/gemm.h"
#include "ops/simd.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "ops/block_product.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace circlet::gemm::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Floats = hn::ScalableTag<float>;
using V = hn::Vec<Floats>;
constexpr Floats kD;
constexpr int64_t kLanes = hn::MaxLanes(kD);
constexpr int64_t kColumns = 2 * kLanes;
// Rows of a tile: two accumulators a row, two vectors of b and one of a must fit the registers (32 with AVX-512, else
// 16).
constexpr int kTileRows = kLanes == 16 ? 12 : 6;
// Steps of k after which the sums go back to memory: the rows of a that a tile walks stay in the first-level cache.
constexpr int64_t kSteps = 512;

int64_t PanelColumnsImpl() { return kColumns; }

struct Floating {
  static HWY_INLINE V MulAdd(V a, V b, V sum) { return hn::MulAdd(a, b, sum); }
};

// sum + a.low * b.low + a.high * b.high, by lane. As an instruction: the target's headers do not offer it.
struct Bf16Pairs {
  static HWY_INLINE V MulAdd([[maybe_unused]] V a, [[maybe_unused]] V b, V sum) {
#if HWY_TARGET == HWY_AVX3
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
#endif
    return sum;
  }
};

// int32 sum + the four products of unsigned bytes of a and signed ones of b, by lane; all in the bits of floats.
struct ByteQuads {
  static HWY_INLINE V MulAdd([[maybe_unused]] V a, [[maybe_unused]] V b, V sum) {
#if HWY_TARGET == HWY_AVX3
    asm("vpdpbusd %2, %1, %0" : "+v"(sum.raw) : "v"(a.raw), "v"(b.raw));
#endif
    return sum;
  }
};

// The same where no instruction sums bytes exactly: in halves of 16 bits, two products to a sum.
struct ByteHalves {
  static HWY_INLINE V MulAdd(V a, V b, V sum) {
#if HWY_TARGET == HWY_SCALAR
    uint8_t left[4];
    int8_t right[4];
    int32_t total;
    std::memcpy(left, &a.raw, sizeof(left));
    std::memcpy(right, &b.raw, sizeof(right));
    std::memcpy(&total, &sum.raw, sizeof(total));
    for (int i = 0; i < 4; ++i) total += left[i] * right[i];
    std::memcpy(&sum.raw, &total, sizeof(total));
    return sum;
#else
    const hn::RebindToSigned<Floats> d32;
    const hn::Repartition<int16_t, Floats> d16;
    const hn::Repartition<uint16_t, Floats> du16;
    const auto left = hn::BitCast(du16, a);
    const auto right = hn::BitCast(d16, b);
    auto other = hn::Zero(d32);
    auto total =
        hn::ReorderWidenMulAccumulate(d32, hn::BitCast(d16, hn::And(left, hn::Set(du16, 255))),
                                      hn::ShiftRight<8>(hn::ShiftLeft<8>(right)), hn::BitCast(d32, sum), other);
    total = hn::ReorderWidenMulAccumulate(d32, hn::BitCast(d16, hn::ShiftRight<8>(left)), hn::ShiftRight<8>(right),
                                          total, other);
    return hn::BitCast(kD, hn::Add(total, other));
#endif
  }
};

// c[r][0, kVectors * kLanes) (+)= a[r][0, steps) b, for kRows rows; `fresh`: c holds nothing yet.
template <class Type, int kRows, int kVectors>
HWY_INLINE void Tile(const float* HWY_RESTRICT a, int64_t a_stride, const float* HWY_RESTRICT b, int64_t steps,
                     bool fresh, float* HWY_RESTRICT c, int64_t c_stride) {
  V left[kRows], right[kRows];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    left[r] = fresh ? hn::Zero(kD) : hn::LoadU(kD, c + r * c_stride);
    if constexpr (kVectors == 2) right[r] = fresh ? hn::Zero(kD) : hn::LoadU(kD, c + r * c_stride + kLanes);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const V b_left = hn::Load(kD, b + k * kColumns);
    [[maybe_unused]] const V b_right = hn::Load(kD, b + k * kColumns + kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const V a_value = hn::Set(kD, a[r * a_stride + k]);
      left[r] = Type::MulAdd(a_value, b_left, left[r]);
      if constexpr (kVectors == 2) right[r] = Type::MulAdd(a_value, b_right, right[r]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    hn::StoreU(left[r], kD, c + r * c_stride);
    if constexpr (kVectors == 2) hn::StoreU(right[r], kD, c + r * c_stride + kLanes);
  }
}

// A tile at the right edge: c has `columns` columns only.
template <class Type, int kRows, int kVectors>
HWY_INLINE void EdgeTile(const float* a, int64_t a_stride, const float* b, int64_t steps, bool fresh, float* c,
                         int64_t c_stride, int64_t columns) {
  constexpr int64_t kWidth = kVectors * kLanes;
  HWY_ALIGN float whole[kRows * kWidth] = {};
  const size_t bytes = static_cast<size_t>(columns) * sizeof(float);
  if (!fresh)
    for (int r = 0; r < kRows; ++r) std::memcpy(whole + r * kWidth, c + r * c_stride, bytes);
  Tile<Type, kRows, kVectors>(a, a_stride, b, steps, fresh, whole, kWidth);
  for (int r = 0; r < kRows; ++r) std::memcpy(c + r * c_stride, whole + r * kWidth, bytes);
}

template <class Type, int kRows, int kVectors>
HWY_NOINLINE void AnyTile(const float* a, int64_t a_stride, const float* b, int64_t steps, bool fresh, float* c,
                          int64_t c_stride, int64_t columns) {
  if (columns == kVectors * kLanes)
    Tile<Type, kRows, kVectors>(a, a_stride, b, steps, fresh, c, c_stride);
  else
    EdgeTile<Type, kRows, kVectors>(a, a_stride, b, steps, fresh, c, c_stride, columns);
}

// The rows of c in the columns of one panel; a panel that is filled by half at most takes one vector, and twice the
// rows.
template <class Type, int kVectors>
HWY_INLINE void MultiplyPanel(const float* a, int64_t a_stride, int64_t m, const float* b, int64_t steps, bool fresh,
                              float* c, int64_t c_stride, int64_t columns) {
  int64_t row = 0;
  const auto advance = [&](auto tile, int64_t rows) HWY_ATTR {
    for (; row + rows <= m; row += rows)
      tile(a + row * a_stride, a_stride, b, steps, fresh, c + row * c_stride, c_stride, columns);
  };
  constexpr int kRows = kTileRows * 2 / kVectors;
  advance(AnyTile<Type, kRows, kVectors>, kRows);
  advance(AnyTile<Type, 4, kVectors>, 4);
  advance(AnyTile<Type, 1, kVectors>, 1);
}

template <class Type>
HWY_INLINE void MultiplyWith(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
                             int64_t c_stride) {
  for (int64_t k = part.k_begin; k < part.k_end; k += kSteps) {
    const int64_t steps = std::min(kSteps, part.k_end - k);
    for (int64_t panel = part.first; panel < part.last; ++panel) {
      const int64_t columns = std::min(kColumns, b.n - panel * kColumns);
      const auto multiply = columns <= kLanes ? MultiplyPanel<Type, 1> : MultiplyPanel<Type, 2>;
      multiply(a + k, a_stride, m, b.data + (panel * b.k + k) * kColumns, steps, k == part.k_begin,
               c + panel * kColumns, c_stride, columns);
    }
  }
}

void MultiplyImpl(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
                  int64_t c_stride) {
  MultiplyWith<Floating>(a, a_stride, m, b, part, c, c_stride);
}
void MultiplyPairsImpl(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
                       int64_t c_stride) {
  CIRCLET_CHECK(HWY_TARGET == HWY_AVX3, "bf16 products need AVX-512");
  MultiplyWith<Bf16Pairs>(a, a_stride, m, b, part, c, c_stride);
}
void MultiplyQuadsImpl(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
                       int64_t c_stride) {
  if (HWY_TARGET == HWY_AVX3 && MultipliesBytes())
    MultiplyWith<ByteQuads>(a, a_stride, m, b, part, c, c_stride);
  else
    MultiplyWith<ByteHalves>(a, a_stride, m, b, part, c, c_stride);
}

// ---- Few rows -------------------------------------------------------------------------------------------------------

HWY_INLINE float MulAddOne(float a, float b, float sum) {
  const hn::CappedTag<float, 1> d;
  return hn::GetLane(hn::MulAdd(hn::Set(d, a), hn::Set(d, b), hn::Set(d, sum)));
}

// Whether step i is 0 in all rows of a.
template <int kRows>
HWY_INLINE bool NothingToAdd(const float* a, int64_t a_stride, int64_t i) {
  for (int r = 0; r < kRows; ++r)
    if (a[r * a_stride + i] != 0) return false;
  return true;
}

// kVectors vectors of columns of c += a b.
template <int kRows, int kVectors>
HWY_INLINE void RowsOfColumns(const float* a, int64_t a_stride, const float* b, int64_t k, int64_t n, float* c,
                              int64_t c_stride) {
  V sum[kRows][kVectors];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::LoadU(kD, c + r * c_stride + v * kLanes);
  for (int64_t i = 0; i < k; ++i) {
    if (NothingToAdd<kRows>(a, a_stride, i)) continue;
    V right[kVectors];
    for (int v = 0; v < kVectors; ++v) right[v] = hn::LoadU(kD, b + i * n + v * kLanes);
    for (int r = 0; r < kRows; ++r) {
      const V factor = hn::Set(kD, a[r * a_stride + i]);
      for (int v = 0; v < kVectors; ++v) sum[r][v] = hn::MulAdd(factor, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < kVectors; ++v) hn::StoreU(sum[r][v], kD, c + r * c_stride + v * kLanes);
}

#if HWY_TARGET != HWY_SCALAR
// Four neighbours along k of the rows r, r + 4, r + 8 .. of b, a block each.
template <class D>
HWY_INLINE hn::Vec<D> Blocks(D d, const float* row, int64_t stride) {
  if constexpr (hn::MaxLanes(d) == 4) {
    return hn::LoadU(d, row);
  } else {
    const hn::Half<D> half;
    constexpr int64_t kHalf = static_cast<int64_t>(hn::MaxLanes(half));
    return hn::Combine(d, Blocks(half, row + kHalf * stride, stride), Blocks(half, row, stride));
  }
}
#endif

// c[.][0, kLanes) += a b^T for as many rows of b [.,k]: four steps of k at a time, turned so that a vector has one of
// all rows.
template <int kRows>
HWY_INLINE void RowsOfRows(const float* a, int64_t a_stride, const float* b, int64_t k, float* c, int64_t c_stride) {
  V sum[kRows];
  for (int r = 0; r < kRows; ++r) sum[r] = hn::LoadU(kD, c + r * c_stride);
  int64_t i = 0;
#if HWY_TARGET != HWY_SCALAR
  const hn::Repartition<double, Floats> d64;
  for (; i + 4 <= k; i += 4) {
    const V v0 = Blocks(kD, b + i, k), v1 = Blocks(kD, b + k + i, k), v2 = Blocks(kD, b + 2 * k + i, k),
            v3 = Blocks(kD, b + 3 * k + i, k);
    const auto low01 = hn::BitCast(d64, hn::InterleaveLower(kD, v0, v1));
    const auto low23 = hn::BitCast(d64, hn::InterleaveLower(kD, v2, v3));
    const auto high01 = hn::BitCast(d64, hn::InterleaveUpper(kD, v0, v1));
    const auto high23 = hn::BitCast(d64, hn::InterleaveUpper(kD, v2, v3));
    const V turned[] = {hn::BitCast(kD, hn::InterleaveLower(d64, low01, low23)),
                        hn::BitCast(kD, hn::InterleaveUpper(d64, low01, low23)),
                        hn::BitCast(kD, hn::InterleaveLower(d64, high01, high23)),
                        hn::BitCast(kD, hn::InterleaveUpper(d64, high01, high23))};
    for (int r = 0; r < kRows; ++r)
      for (int step = 0; step < 4; ++step)
        sum[r] = hn::MulAdd(hn::Set(kD, a[r * a_stride + i + step]), turned[step], sum[r]);
  }
#endif
  for (int r = 0; r < kRows; ++r) {
    float* const to = c + r * c_stride;
    hn::StoreU(sum[r], kD, to);
    for (int64_t rest = i; rest < k; ++rest)
      for (int64_t row = 0; row < kLanes; ++row)
        to[row] = MulAddOne(a[r * a_stride + rest], b[row * k + rest], to[row]);
  }
}

template <int kRows>
void MultiplyTile(const float* a, int64_t a_stride, const float* b, int64_t k, int64_t n, bool transposed,
                  int64_t first, int64_t last, float* c, int64_t c_stride) {
  int64_t j = first;
  if (transposed) {
    for (; j + kLanes <= last; j += kLanes) RowsOfRows<kRows>(a, a_stride, b + j * k, k, c + j, c_stride);
  } else {
    constexpr int kVectors = kRows == 1 ? 8 : kLanes == 16 ? 4 : 2;  // the sums of a tile fit the registers
    for (; j + kVectors * kLanes <= last; j += kVectors * kLanes)
      RowsOfColumns<kRows, kVectors>(a, a_stride, b + j, k, n, c + j, c_stride);
    for (; j + kLanes <= last; j += kLanes) RowsOfColumns<kRows, 1>(a, a_stride, b + j, k, n, c + j, c_stride);
  }
  for (; j < last; ++j)
    for (int r = 0; r < kRows; ++r) {
      float& sum = c[r * c_stride + j];
      for (int64_t i = 0; i < k; ++i)
        if (transposed || !NothingToAdd<kRows>(a, a_stride, i))
          sum = MulAddOne(a[r * a_stride + i], transposed ? b[j * k + i] : b[i * n + j], sum);
    }
}

void MultiplyFewRowsImpl(const float* a, int64_t a_stride, int64_t m, const float* b, int64_t k, int64_t n,
                         bool transposed, int64_t first, int64_t last, float* c, int64_t c_stride) {
  int64_t row = 0;
  const auto advance = [&](auto tile, int64_t rows) {
    for (; row + rows <= m; row += rows)
      tile(a + row * a_stride, a_stride, b, k, n, transposed, first, last, c + row * c_stride, c_stride);
  };
  advance(MultiplyTile<4>, 4);
  advance(MultiplyTile<1>, 1);
}

// One panel from rows of the transposed operand. They go through a small tile: rows whose distance is a multiple of
// 4096 bytes share their cache sets, so each line must be read in one go.
void PackTransposed(const float* rows, int64_t stride, int64_t columns, int64_t k, float* to) {
  constexpr int64_t kTile = 16;
  float tile[kColumns][kTile] = {};
  for (int64_t k0 = 0; k0 < k; k0 += kTile) {
    const int64_t depth = std::min(kTile, k - k0);
    for (int64_t j = 0; j < columns; ++j)
      std::memcpy(tile[j], rows + j * stride + k0, static_cast<size_t>(depth) * sizeof(float));
    for (int64_t i = 0; i < depth; ++i)
      for (int64_t j = 0; j < kColumns; ++j) to[(k0 + i) * kColumns + j] = tile[j][i];
  }
}

void PackImpl(const float* b, int64_t stride, bool transposed, const Panels& panels, int64_t first, int64_t last) {
  for (int64_t panel = first; panel < last; ++panel) {
    float* to = panels.data + panel * panels.k * kColumns;
    const int64_t columns = std::min(kColumns, panels.n - panel * kColumns);
    if (transposed) {
      PackTransposed(b + panel * kColumns * stride, stride, columns, panels.k, to);
      continue;
    }
    const float* from = b + panel * kColumns;
    for (int64_t k = 0; k < panels.k; ++k) {
      std::memcpy(to + k * kColumns, from + k * stride, static_cast<size_t>(columns) * sizeof(float));
      std::fill(to + k * kColumns + columns, to + (k + 1) * kColumns, 0.0f);
    }
  }
}

}  // namespace circlet::gemm::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace circlet::gemm {

HWY_EXPORT(PanelColumnsImpl);
HWY_EXPORT(MultiplyImpl);
HWY_EXPORT(MultiplyPairsImpl);
HWY_EXPORT(MultiplyQuadsImpl);
HWY_EXPORT(MultiplyFewRowsImpl);
HWY_EXPORT(PackImpl);

int64_t PanelColumns() { return HWY_DYNAMIC_DISPATCH(PanelColumnsImpl)(); }
int64_t PanelCount(int64_t n) { return (n + PanelColumns() - 1) / PanelColumns(); }
int64_t PackedFloats(int64_t k, int64_t n) { return PanelCount(n) * PanelColumns() * k; }

void Pack(const float* b, int64_t stride, bool transposed, const Panels& panels, int64_t first, int64_t last) {
  HWY_DYNAMIC_DISPATCH(PackImpl)(b, stride, transposed, panels, first, last);
}
void Multiply(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
              int64_t c_stride) {
  HWY_DYNAMIC_DISPATCH(MultiplyImpl)(a, a_stride, m, b, part, c, c_stride);
}
void MultiplyFewRows(const float* a, int64_t a_stride, int64_t m, const float* b, int64_t k, int64_t n, bool transposed,
                     int64_t first, int64_t last, float* c, int64_t c_stride) {
  HWY_DYNAMIC_DISPATCH(MultiplyFewRowsImpl)(a, a_stride, m, b, k, n, transposed, first, last, c, c_stride);
}
void MultiplyPairs(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
                   int64_t c_stride) {
  HWY_DYNAMIC_DISPATCH(MultiplyPairsImpl)(a, a_stride, m, b, part, c, c_stride);
}

void MultiplyQuads(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
                   int64_t c_stride) {
  HWY_DYNAMIC_DISPATCH(MultiplyQuadsImpl)(a, a_stride, m, b, part, c, c_stride);
}

void PairAlongRows(const float* x, int64_t x_stride, int64_t rows, int64_t k, float* pairs, int64_t stride) {
  for (int64_t row = 0; row < rows; ++row) {
    auto* to = reinterpret_cast<uint16_t*>(pairs + row * stride);
    simd::F32ToBF16(x + row * x_stride, k, to);
    if (k % 2 != 0) to[k] = 0;
  }
}

void PairRows(const float* x, int64_t k, int64_t n, int64_t first, int64_t last, float* pairs) {
  const auto upper = Aligned<uint16_t>(2 * n);
  uint16_t* const lower = upper.get() + n;
  for (int64_t pair = first; pair < last; ++pair) {
    simd::F32ToBF16(x + 2 * pair * n, n, upper.get());
    std::fill_n(lower, n, uint16_t{0});
    if (2 * pair + 1 < k) simd::F32ToBF16(x + (2 * pair + 1) * n, n, lower);
    for (int64_t i = 0; i < n; ++i) {
      const uint32_t both = upper[static_cast<size_t>(i)] | static_cast<uint32_t>(lower[i]) << 16;
      std::memcpy(pairs + pair * n + i, &both, sizeof(both));
    }
  }
}

void QuadRows(const int8_t* x, int64_t k, int64_t n, int64_t first, int64_t last, float* quads) {
  for (int64_t quad = first; quad < last; ++quad) {
    auto* const to = reinterpret_cast<int8_t*>(quads + quad * n);
    for (int64_t i = 0; i < 4; ++i) {
      const int64_t row = 4 * quad + i;
      for (int64_t column = 0; column < n; ++column) to[4 * column + i] = row < k ? x[row * n + column] : int8_t{0};
    }
  }
}

}  // namespace circlet::gemm
#endif  // HWY_ONCE
