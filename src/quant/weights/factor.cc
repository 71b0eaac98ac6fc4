#include "quant/weights/factor.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "circlet/base/threads.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "quant/weights/factor.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace circlet::weights::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Columns of a panel of the right operand: two vectors.
template <typename T>
constexpr int64_t kPanel = 2 * hn::MaxLanes(hn::ScalableTag<T>());
// Rows of a tile: two accumulators a row, two vectors of b and one of a must fit the registers (32 with AVX-512, else
// 16).
constexpr int kTileRows = hn::MaxLanes(hn::ScalableTag<float>()) == 16 ? 12 : 6;

// c[r][0, kPanel) -= sum_k a[r][k] b[k][0, kPanel), for kRows rows; b without gaps. Each element is one chain of
// multiply-adds in the order of k.
template <int kRows, typename T>
HWY_INLINE void Tile(const T* HWY_RESTRICT a, const T* HWY_RESTRICT b, int64_t steps, T* HWY_RESTRICT c,
                     int64_t c_stride) {
  const hn::ScalableTag<T> d;
  constexpr int64_t kLanes = kPanel<T> / 2;
  hn::Vec<hn::ScalableTag<T>> left[kRows], right[kRows];
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    left[r] = hn::LoadU(d, c + r * c_stride);
    right[r] = hn::LoadU(d, c + r * c_stride + kLanes);
  }
  for (int64_t k = 0; k < steps; ++k) {
    const auto b0 = hn::LoadU(d, b + k * kPanel<T>), b1 = hn::LoadU(d, b + k * kPanel<T> + kLanes);
#pragma GCC unroll 32
    for (int r = 0; r < kRows; ++r) {
      const auto factor = hn::Set(d, a[r * steps + k]);
      left[r] = hn::NegMulAdd(factor, b0, left[r]);
      right[r] = hn::NegMulAdd(factor, b1, right[r]);
    }
  }
#pragma GCC unroll 32
  for (int r = 0; r < kRows; ++r) {
    hn::StoreU(left[r], d, c + r * c_stride);
    hn::StoreU(right[r], d, c + r * c_stride + kLanes);
  }
}

// The same where c has `columns` columns of the panel only.
template <int kRows, typename T>
HWY_NOINLINE void AnyTile(const T* a, const T* b, int64_t steps, int64_t columns, T* c, int64_t c_stride) {
  if (columns == kPanel<T>) return Tile<kRows>(a, b, steps, c, c_stride);
  T whole[kRows * kPanel<T>] = {};
  for (int r = 0; r < kRows; ++r) std::copy_n(c + r * c_stride, columns, whole + r * kPanel<T>);
  Tile<kRows>(a, b, steps, whole, kPanel<T>);
  for (int r = 0; r < kRows; ++r) std::copy_n(whole + r * kPanel<T>, columns, c + r * c_stride);
}

template <typename T>
void Subtract(const T* a, const T* panels, int64_t steps, int64_t rows, int64_t columns, T* c, int64_t c_stride) {
  for (int64_t at = 0; at < columns; at += kPanel<T>, panels += steps * kPanel<T>) {
    const int64_t width = std::min(kPanel<T>, columns - at);
    int64_t r = 0;
    for (; r + kTileRows <= rows; r += kTileRows)
      AnyTile<kTileRows>(a + r * steps, panels, steps, width, c + r * c_stride + at, c_stride);
    for (; r < rows; ++r) AnyTile<1>(a + r * steps, panels, steps, width, c + r * c_stride + at, c_stride);
  }
}

int64_t PanelOf64() { return kPanel<double>; }
int64_t PanelOf32() { return kPanel<float>; }
void SubtractF64(const double* a, const double* panels, int64_t steps, int64_t rows, int64_t columns, double* c,
                 int64_t c_stride) {
  Subtract(a, panels, steps, rows, columns, c, c_stride);
}
void SubtractF32(const float* a, const float* panels, int64_t steps, int64_t rows, int64_t columns, float* c,
                 int64_t c_stride) {
  Subtract(a, panels, steps, rows, columns, c, c_stride);
}

}  // namespace circlet::weights::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace circlet::weights {
namespace {

HWY_EXPORT(PanelOf64);
HWY_EXPORT(PanelOf32);
HWY_EXPORT(SubtractF64);
HWY_EXPORT(SubtractF32);

constexpr int64_t kBlock = 96;     // rows of L that are finished at a time
constexpr int64_t kGrain = 48;     // rows of the rest that a thread updates at a time
constexpr int64_t kColumns = 256;  // columns of a block's rows that a thread solves at a time; whole panels

// The right operand b [steps, columns] of a product, panel by panel, with zeros behind the last column.
template <typename T>
class RightOperand {
 public:
  RightOperand(int64_t steps, int64_t columns)
      : panel_(sizeof(T) == sizeof(double) ? HWY_DYNAMIC_DISPATCH(PanelOf64)() : HWY_DYNAMIC_DISPATCH(PanelOf32)()),
        steps_(steps),
        columns_(columns),
        data_(static_cast<size_t>((columns + panel_ - 1) / panel_ * panel_ * steps)) {}

  // The columns [first, last), which begin a panel, from b of row stride `stride`, or from its transpose.
  void Fill(const T* b, int64_t stride, bool transposed, int64_t first, int64_t last) {
    for (int64_t at = first; at < last; at += panel_) {
      T* const to = data_.data() + at * steps_;
      const int64_t width = std::min(panel_, columns_ - at);
      if (transposed)
        for (int64_t j = 0; j < width; ++j)
          for (int64_t k = 0; k < steps_; ++k) to[k * panel_ + j] = b[(at + j) * stride + k];
      else
        for (int64_t k = 0; k < steps_; ++k) std::copy_n(b + k * stride + at, width, to + k * panel_);
    }
  }
  void Fill(const T* b, int64_t stride, bool transposed) { Fill(b, stride, transposed, 0, columns_); }

  // c [rows, columns) -= a [rows, steps] b, for the columns [first, last) of both; `first` begins a panel.
  void Subtract(const T* a, int64_t rows, int64_t first, int64_t last, T* c, int64_t c_stride) const {
    const T* const panels = data_.data() + first * steps_;
    if constexpr (sizeof(T) == sizeof(double))
      HWY_DYNAMIC_DISPATCH(SubtractF64)(a, panels, steps_, rows, last - first, c + first, c_stride);
    else
      HWY_DYNAMIC_DISPATCH(SubtractF32)(a, panels, steps_, rows, last - first, c + first, c_stride);
  }

 private:
  int64_t panel_, steps_, columns_;
  std::vector<T> data_;
};

// The triangle [begin,end) x [begin,end), when all that stands behind it has been taken off.
template <typename T>
int64_t FactorizeTriangle(T* a, int64_t n, int64_t begin, int64_t end) {
  for (int64_t k = end - 1; k >= begin; --k) {
    T* const row = a + k * n;
    if (!(row[k] > 0) || !std::isfinite(row[k])) return k;
    const T pivot = std::sqrt(row[k]);
    for (int64_t j = begin; j <= k; ++j) row[j] /= pivot;
    for (int64_t i = begin; i < k; ++i)
      for (int64_t j = begin; j <= i; ++j) a[i * n + j] -= row[i] * row[j];
  }
  return -1;
}

// The inverse of L's triangle [begin,end) x [begin,end), times -1, [steps,steps] with zeros above the diagonal: a block
// is solved by a product with it.
template <typename T>
std::vector<T> NegativeInverse(const T* l, int64_t n, int64_t begin, int64_t end) {
  const int64_t steps = end - begin;
  const T* const triangle = l + begin * n + begin;
  std::vector<T> inverse(static_cast<size_t>(steps * steps));
  for (int64_t i = 0; i < steps; ++i) {
    T* const row = inverse.data() + i * steps;
    row[i] = 1;
    for (int64_t k = 0; k < i; ++k)
      for (int64_t j = 0; j <= k; ++j) row[j] += triangle[i * n + k] * inverse[k * steps + j];
    for (int64_t j = 0; j <= i; ++j) row[j] /= -triangle[i * n + i];
  }
  return inverse;
}

template <typename T>
std::vector<T> Transposed(const T* x, int64_t stride, int64_t rows, int64_t columns) {
  std::vector<T> out(static_cast<size_t>(rows * columns));
  for (int64_t i = 0; i < columns; ++i)
    for (int64_t k = 0; k < rows; ++k) out[i * rows + k] = x[k * stride + i];
  return out;
}

template <typename T>
int64_t FactorizeAny(std::span<T> a, int64_t n) {
  for (int64_t end = n; end > 0;) {
    const int64_t begin = std::max<int64_t>(0, end - kBlock), steps = end - begin;
    if (const int64_t bad = FactorizeTriangle(a.data(), n, begin, end); bad >= 0) return bad;
    // Rows of the block left of the triangle: x with L_KK^T x = b.
    T* const rows = a.data() + begin * n;
    const std::vector<T> inverse = NegativeInverse(a.data(), n, begin, end);
    const std::vector<T> left = Transposed(inverse.data(), steps, steps, steps);
    RightOperand<T> block(steps, begin);
    std::vector<T> transposed(static_cast<size_t>(begin * steps));
    ParallelFor(begin, kColumns, [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; at += kColumns) {
        const int64_t to = std::min(last, at + kColumns);
        block.Fill(rows, n, false, at, to);
        for (int64_t k = 0; k < steps; ++k) std::fill(rows + k * n + at, rows + k * n + to, T{0});
        block.Subtract(left.data(), steps, at, to, rows, n);
        block.Fill(rows, n, false, at, to);
        for (int64_t i = at; i < to; ++i)
          for (int64_t k = 0; k < steps; ++k) transposed[i * steps + k] = rows[k * n + i];
      }
    });
    ParallelFor(begin, kGrain, [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to; at += kGrain) {
        const int64_t last = std::min(to, at + kGrain);
        block.Subtract(transposed.data() + at * steps, last - at, 0, last, a.data() + at * n, n);
      }
    });
    end = begin;
  }
  return -1;
}

// b [rows, n] -> b (L^T L)^-1 = (b L^-1) L^-T.
template <typename T>
void Solve(const T* l, int64_t n, T* b, int64_t rows) {
  std::vector<T> block(static_cast<size_t>(rows * kBlock));
  // The block's columns of b times `right`, which is minus one of the two inverses of the triangle.
  const auto solve = [&](int64_t begin, int64_t steps, const std::vector<T>& right, bool transposed) {
    RightOperand<T> inverse(steps, steps);
    inverse.Fill(right.data(), steps, transposed);
    const auto take = [&](bool clear) {
      for (int64_t r = 0; r < rows; ++r) {
        T* const row = b + r * n + begin;
        std::copy_n(row, steps, block.data() + r * steps);
        if (clear) std::fill_n(row, steps, T{0});
      }
    };
    take(true);
    inverse.Subtract(block.data(), rows, 0, steps, b + begin, n);
    take(false);
  };
  // y L = b, from the last column on: y_i is known when all behind it have been taken off.
  for (int64_t end = n; end > 0;) {
    const int64_t begin = std::max<int64_t>(0, end - kBlock), steps = end - begin;
    solve(begin, steps, NegativeInverse(l, n, begin, end), false);
    RightOperand<T> before(steps, begin);
    before.Fill(l + begin * n, n, false);
    before.Subtract(block.data(), rows, 0, begin, b, n);
    end = begin;
  }
  // x L^T = y, from the first column on.
  for (int64_t begin = 0; begin < n;) {
    const int64_t end = std::min(n, begin + kBlock), steps = end - begin;
    solve(begin, steps, NegativeInverse(l, n, begin, end), true);
    RightOperand<T> behind(steps, n - end);
    behind.Fill(l + end * n + begin, n, true);
    behind.Subtract(block.data(), rows, 0, n - end, b + end, n);
    begin = end;
  }
}

template <typename T>
void SolveAny(std::span<const T> l, int64_t n, std::span<T> b, int64_t rows) {
  // Operands are made once a piece of rows, so pieces are large.
  const int64_t grain = std::max<int64_t>(kGrain, (rows + Threads() - 1) / Threads());
  ParallelFor(rows, grain, [&](int64_t from, int64_t to) { Solve(l.data(), n, b.data() + from * n, to - from); });
}

}  // namespace

int64_t Factorize(std::span<double> a, int64_t n) { return FactorizeAny(a, n); }
int64_t Factorize(std::span<float> a, int64_t n) { return FactorizeAny(a, n); }
void SolveWithFactor(std::span<const double> l, int64_t n, std::span<double> b, int64_t rows) {
  SolveAny(l, n, b, rows);
}
void SolveWithFactor(std::span<const float> l, int64_t n, std::span<float> b, int64_t rows) { SolveAny(l, n, b, rows); }

}  // namespace circlet::weights
#endif
