#include "quant/weights/factor.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "circlet/base/threads.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "quant/weights/factor.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace circlet::weights::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// c[r][0, columns) -= sum_k a[r][k] b[k][0, columns), for kRows rows. Each element is one chain of multiply-adds in the
// order of k.
template <int kRows, typename T>
HWY_INLINE void SubtractRows(const T* HWY_RESTRICT a, const T* HWY_RESTRICT b, int64_t b_stride, int64_t steps,
                             int64_t columns, T* HWY_RESTRICT c, int64_t c_stride) {
  const hn::ScalableTag<T> d;
  const auto lanes = static_cast<int64_t>(hn::Lanes(d));
  int64_t j = 0;
  for (; j + 2 * lanes <= columns; j += 2 * lanes) {
    hn::Vec<hn::ScalableTag<T>> left[kRows], right[kRows];
    for (int r = 0; r < kRows; ++r) {
      left[r] = hn::LoadU(d, c + r * c_stride + j);
      right[r] = hn::LoadU(d, c + r * c_stride + j + lanes);
    }
    for (int64_t k = 0; k < steps; ++k) {
      const auto b0 = hn::LoadU(d, b + k * b_stride + j), b1 = hn::LoadU(d, b + k * b_stride + j + lanes);
      for (int r = 0; r < kRows; ++r) {
        const auto factor = hn::Set(d, a[r * steps + k]);
        left[r] = hn::NegMulAdd(factor, b0, left[r]);
        right[r] = hn::NegMulAdd(factor, b1, right[r]);
      }
    }
    for (int r = 0; r < kRows; ++r) {
      hn::StoreU(left[r], d, c + r * c_stride + j);
      hn::StoreU(right[r], d, c + r * c_stride + j + lanes);
    }
  }
  for (; j < columns; ++j)
    for (int r = 0; r < kRows; ++r) {
      T sum = c[r * c_stride + j];
      for (int64_t k = 0; k < steps; ++k) sum = std::fma(-a[r * steps + k], b[k * b_stride + j], sum);
      c[r * c_stride + j] = sum;
    }
}

template <typename T>
void Subtract(const T* a, const T* b, int64_t b_stride, int64_t steps, int64_t rows, int64_t columns, T* c,
              int64_t c_stride) {
  int64_t r = 0;
  for (; r + 6 <= rows; r += 6) SubtractRows<6>(a + r * steps, b, b_stride, steps, columns, c + r * c_stride, c_stride);
  for (; r < rows; ++r) SubtractRows<1>(a + r * steps, b, b_stride, steps, columns, c + r * c_stride, c_stride);
}

void SubtractF64(const double* a, const double* b, int64_t b_stride, int64_t steps, int64_t rows, int64_t columns,
                 double* c, int64_t c_stride) {
  Subtract(a, b, b_stride, steps, rows, columns, c, c_stride);
}
void SubtractF32(const float* a, const float* b, int64_t b_stride, int64_t steps, int64_t rows, int64_t columns,
                 float* c, int64_t c_stride) {
  Subtract(a, b, b_stride, steps, rows, columns, c, c_stride);
}

}  // namespace circlet::weights::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace circlet::weights {
namespace {

HWY_EXPORT(SubtractF64);
HWY_EXPORT(SubtractF32);

// c [rows, columns] -= a [rows, steps] b [steps, columns].
void Subtract(const double* a, const double* b, int64_t b_stride, int64_t steps, int64_t rows, int64_t columns,
              double* c, int64_t c_stride) {
  HWY_DYNAMIC_DISPATCH(SubtractF64)(a, b, b_stride, steps, rows, columns, c, c_stride);
}
void Subtract(const float* a, const float* b, int64_t b_stride, int64_t steps, int64_t rows, int64_t columns, float* c,
              int64_t c_stride) {
  HWY_DYNAMIC_DISPATCH(SubtractF32)(a, b, b_stride, steps, rows, columns, c, c_stride);
}

constexpr int64_t kBlock = 96;     // rows of L that are finished at a time
constexpr int64_t kGrain = 48;     // rows of the rest that a thread updates at a time
constexpr int64_t kColumns = 256;  // columns of a block's rows that a thread solves at a time

// The triangle [begin,end) x [begin,end), when all that stands behind it has been taken off.
template <typename T>
int64_t FactorizeTriangle(T* a, int64_t n, int64_t begin, int64_t end) {
  for (int64_t k = end - 1; k >= begin; --k) {
    T* const row = a + k * n;
    if (!(row[k] > 0) || !std::isfinite(row[k])) return k;
    const T pivot = std::sqrt(row[k]);
    for (int64_t j = begin; j <= k; ++j) row[j] /= pivot;
    for (int64_t i = begin; i < k; ++i) Subtract(&row[i], row + begin, n, 1, 1, i + 1 - begin, a + i * n + begin, n);
  }
  return -1;
}

// Columns [first, last) of x [.., last - first] with L_KK^T x = b, where L_KK is the triangle of rows [begin, end).
template <typename T>
void SolveColumns(T* a, int64_t n, int64_t begin, int64_t end, int64_t first, int64_t last) {
  for (int64_t k = end - 1; k >= begin; --k) {
    const T* const factors = a + k * n;
    T* const row = a + k * n;
    for (int64_t j = first; j < last; ++j) row[j] /= factors[k];
    for (int64_t i = begin; i < k; ++i) Subtract(&factors[i], row + first, n, 1, 1, last - first, a + i * n + first, n);
  }
}

template <typename T>
int64_t FactorizeAny(std::span<T> a, int64_t n) {
  std::vector<T> transposed;
  for (int64_t end = n; end > 0;) {
    const int64_t begin = std::max<int64_t>(0, end - kBlock), steps = end - begin;
    if (const int64_t bad = FactorizeTriangle(a.data(), n, begin, end); bad >= 0) return bad;
    ParallelFor(begin, kColumns, [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; at += kColumns)
        SolveColumns(a.data(), n, begin, end, at, std::min(last, at + kColumns));
    });
    transposed.resize(static_cast<size_t>(begin * steps));
    ParallelFor(begin, kColumns, [&](int64_t first, int64_t last) {
      for (int64_t k = 0; k < steps; ++k)
        for (int64_t i = first; i < last; ++i) transposed[i * steps + k] = a[(begin + k) * n + i];
    });
    ParallelFor(begin, kGrain, [&](int64_t from, int64_t to) {
      for (int64_t at = from; at < to; at += kGrain) {
        const int64_t last = std::min(to, at + kGrain);
        Subtract(transposed.data() + at * steps, a.data() + begin * n, n, steps, last - at, last, a.data() + at * n, n);
      }
    });
    end = begin;
  }
  return -1;
}

// b [rows, n] -> b (L^T L)^-1 = (b L^-1) L^-T.
template <typename T>
void Solve(const T* l, int64_t n, T* b, int64_t rows) {
  std::vector<T> solved(static_cast<size_t>(rows * kBlock)), triangle, across;
  const auto take = [&](int64_t begin, int64_t end) {
    for (int64_t r = 0; r < rows; ++r) std::copy(b + r * n + begin, b + r * n + end, solved.data() + r * (end - begin));
  };
  // y L = b, from the last column on: y_i is known when all behind it have been taken off.
  for (int64_t end = n; end > 0;) {
    const int64_t begin = std::max<int64_t>(0, end - kBlock);
    for (int64_t i = end - 1; i >= begin; --i)
      for (int64_t r = 0; r < rows; ++r) {
        T* const row = b + r * n;
        row[i] /= l[i * n + i];
        Subtract(&row[i], l + i * n + begin, n, 1, 1, i - begin, row + begin, n);
      }
    take(begin, end);
    Subtract(solved.data(), l + begin * n, n, end - begin, rows, begin, b, n);
    end = begin;
  }
  // x L^T = y, from the first column on.
  for (int64_t begin = 0; begin < n;) {
    const int64_t end = std::min(n, begin + kBlock), steps = end - begin, rest = n - end;
    triangle.resize(static_cast<size_t>(steps * steps));
    for (int64_t i = 0; i < steps; ++i)
      for (int64_t j = i; j < steps; ++j) triangle[i * steps + j] = l[(begin + j) * n + begin + i];
    for (int64_t r = 0; r < rows; ++r) {
      T* const row = b + r * n + begin;
      for (int64_t i = 0; i < steps; ++i) {
        row[i] /= triangle[i * steps + i];
        Subtract(&row[i], triangle.data() + i * steps + i + 1, steps, 1, 1, steps - i - 1, row + i + 1, n);
      }
    }
    take(begin, end);
    across.resize(static_cast<size_t>(steps * rest));
    for (int64_t j = 0; j < rest; ++j)
      for (int64_t k = 0; k < steps; ++k) across[k * rest + j] = l[(end + j) * n + begin + k];
    Subtract(solved.data(), across.data(), rest, steps, rows, rest, b + end, n);
    begin = end;
  }
}

template <typename T>
void SolveAny(std::span<const T> l, int64_t n, std::span<T> b, int64_t rows) {
  // The transposed blocks are made once a piece of rows, so pieces are large.
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
