#include "ops/integer_product.h"

#include <algorithm>
#include <cmath>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/codes.h"
#include "ops/gemm.h"
#include "ops/internal.h"
#include "ops/onednn_product.h"
#include "ops/simd.h"
#include "ops/thread_scratch.h"

namespace circlet {
namespace {

// So many products of two bytes, offsets included, stay below 2^31.
constexpr int64_t kMostTerms = 1 << 15;

bool IsBytes(const QParams& grid) { return IsInteger(grid.dtype) && BitWidth(grid.dtype) <= 8; }

// Rows of x as unsigned codes; those of 16 bits in two digits, all the high ones first.
class CodedRows {
 public:
  CodedRows(const float* x, int64_t rows, int64_t k, const QParams& grid)
      : digits_(BitWidth(grid.dtype) == 16 ? 2 : 1),
        count_(rows),
        zero_point_(UnsignedZeroPoint(grid)),
        scale_(grid.scale[0]) {
    uint8_t* const codes = ThreadScratch<uint8_t, struct RowCodes>(digits_ * rows * k);
    double* const sums = ThreadScratch<double, struct RowSums>(rows);
    ParallelFor(rows, RowGrain(k), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        const float* const from = x + row * k;
        uint8_t *const to = codes + row * k, *const low = to + rows * k;
        sums[row] = digits_ == 2 ? simd::CodesOf16Bits(from, k, scale_, zero_point_, to, low)
                                 : simd::CodesOf8Bits(from, k, scale_, zero_point_, to);
      }
    });
    codes_ = codes;
    sums_ = sums;
  }

  int64_t Count() const { return count_; }
  int64_t Digits() const { return digits_; }
  double ZeroPoint() const { return zero_point_; }
  double Scale() const { return scale_; }
  double Sum(int64_t row) const { return sums_[row]; }
  const uint8_t* Codes() const { return codes_; }

 private:
  int64_t digits_, count_;
  int32_t zero_point_;
  float scale_;
  const uint8_t* codes_;
  const double* sums_;
};

// Rows of W as signed bytes, and what every row of y needs of them.
struct CodedColumns {
  const int8_t* codes;
  simd::IntegerColumns finish;

  CodedColumns(const Tensor& w, int64_t first, int64_t count, const CodedRows& x, const float* bias) {
    const QParams& grid = *w.Grid();
    const int64_t k = w.GetShape()[1];
    // Unsigned bytes move by half their range, and their zero points with them.
    const int32_t shift = w.GetDType() == DType::kU8 ? 128 : 0;
    codes = reinterpret_cast<const int8_t*>(w.Raw()) + first * k;
    if (w.GetDType() != DType::kI8) {
      int8_t* const bytes = ThreadScratch<int8_t, struct ColumnCodes>(count * k);
      SignedCodes(w, first * k, {bytes, static_cast<size_t>(count * k)});
      codes = bytes;
    }
    double* const numbers = ThreadScratch<double, struct ColumnNumbers>(4 * count);
    double *const offset = numbers, *const zero_point = offset + count, *const scale = zero_point + count,
                 *const biases = scale + count;
    ParallelFor(count, RowGrain(k), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j) {
        const auto channel = static_cast<size_t>(grid.PerChannel() ? first + j : 0);
        zero_point[j] = grid.zero_point[channel] - shift;
        const auto sum = static_cast<double>(simd::SumOfCodes(codes + j * k, k));
        offset[j] = -x.ZeroPoint() * (sum - static_cast<double>(k) * zero_point[j]);
        scale[j] = x.Scale() * grid.scale[channel];
        biases[j] = bias == nullptr ? 0 : bias[first + j];
      }
    });
    finish = {offset, zero_point, scale, biases};
  }
};

// A computed right operand as signed bytes, and what every row of y needs of it. A NaN in it reaches its column of y, or
// all of y when it is not transposed.
struct CodedMatrix {
  const int8_t* codes;
  simd::IntegerColumns finish;

  CodedMatrix(const float* b, const QParams& grid, bool transposed, int64_t n, int64_t k, const CodedRows& a) {
    const int64_t rows = transposed ? n : k, width = transposed ? k : n;
    int8_t* const bytes = ThreadScratch<int8_t, struct MatrixCodes>(rows * width);
    double* const numbers = ThreadScratch<double, struct MatrixNumbers>(4 * n + rows);
    double *const offset = numbers, *const zero_points = offset + n, *const scales = zero_points + n,
                 *const biases = scales + n, *const row_sums = biases + n;
    const int32_t zero_point = UnsignedZeroPoint(grid) - 128;
    ParallelFor(rows, RowGrain(width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        row_sums[row] = simd::CodesOf8Bits(b + row * width, width, grid.scale[0], zero_point,
                                           reinterpret_cast<uint8_t*>(bytes + row * width));
    });
    std::fill_n(zero_points, n, zero_point);
    std::fill_n(scales, n, a.Scale() * grid.scale[0]);
    std::fill_n(biases, n, 0.0);
    const double of_zero_points = static_cast<double>(k) * zero_point;
    if (transposed) {
      for (int64_t j = 0; j < n; ++j) offset[j] = -a.ZeroPoint() * (row_sums[j] - of_zero_points);
    } else {
      std::fill_n(offset, n, a.ZeroPoint() * of_zero_points);
      for (int64_t row = 0; a.ZeroPoint() != 0 && row < k; ++row)
        for (int64_t j = 0; j < n; ++j) offset[j] -= a.ZeroPoint() * bytes[row * n + j];
      for (int64_t row = 0; row < k; ++row)
        if (std::isnan(row_sums[row])) std::fill_n(offset, n, row_sums[row]);
    }
    codes = bytes;
    finish = {offset, zero_points, scales, biases};
  }
};

// `count` columns of y, of row stride `stride`. The sums stand where their results will, unless each needs two.
void Multiply(const CodedRows& x, const CodedColumns& w, int64_t count, int64_t k, float* y, int64_t stride) {
  const bool in_place = x.Digits() == 1;
  const int64_t rows = x.Count(), sum_stride = in_place ? stride : count;
  int32_t* const sums =
      in_place ? reinterpret_cast<int32_t*>(y) : ThreadScratch<int32_t, struct DigitSums>(x.Digits() * rows * count);
  const gemm::ProductShape shape{
      .m = x.Digits() * rows, .n = count, .k = k, .operand = gemm::Operand::kBytes, .y_stride = sum_stride};
  gemm::ProductOf(shape).Run(x.Codes(), w.codes, nullptr, sums);
  ParallelFor(rows, RowGrain(count), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      const int32_t* const sum = sums + row * sum_stride;
      simd::FinishIntegers(sum, in_place ? nullptr : sum + rows * sum_stride, w.finish, x.Sum(row), count,
                           y + row * stride);
    }
  });
}

}  // namespace

bool SummedInIntegers(const QParams* x, const QParams* w, int64_t k) {
  if (!gemm::MultipliesBytes() || x == nullptr || w == nullptr || k == 0 || k > kMostTerms) return false;
  const bool x_fits = !x->PerChannel() && (IsBytes(*x) || x->dtype == DType::kI16);
  return x_fits && IsBytes(*w) && w->axis <= 0;
}

bool BytesSummedInIntegers(const QParams* a, const QParams* b, int64_t k) {
  return SummedInIntegers(a, b, k) && IsBytes(*a) && !b->PerChannel();
}

int32_t UnsignedZeroPoint(const QParams& grid) {
  return grid.zero_point[0] - static_cast<int32_t>(CodesOf(grid.dtype).min);
}

void IntegerMatMul(const float* a, const QParams& a_grid, const float* b, const QParams& b_grid, bool transposed,
                   int64_t m, int64_t n, int64_t k, float* y) {
  CIRCLET_CHECK(BytesSummedInIntegers(&a_grid, &b_grid, k), "a product of bytes that is not summed in integers");
  const CodedRows rows(a, m, k, a_grid);
  const CodedMatrix matrix(b, b_grid, transposed, n, k, rows);
  gemm::ProductOf({.m = m, .n = n, .k = k, .transposed = transposed, .operand = gemm::Operand::kBytes})
      .Run(rows.Codes(), matrix.codes, nullptr, y);
  ParallelFor(m, RowGrain(n), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* const to = y + row * n;
      simd::FinishIntegers(reinterpret_cast<const int32_t*>(to), nullptr, matrix.finish, rows.Sum(row), n, to);
    }
  });
}

// Rows of x in blocks whose codes and sums are a few MiB, and so many columns that 64 rows of sums are; fewer where W has
// to be unpacked.
void IntegerLinear(const Tensor& x, const Tensor& w, const float* bias, const Tensor& y) {
  constexpr int64_t kBlockBytes = int64_t{16} << 20, kSliceBytes = int64_t{8} << 20, kFewestRows = 64;
  constexpr int64_t kMostColumns = kBlockBytes / (8 * kFewestRows);
  const int64_t n = w.GetShape()[0], k = w.GetShape()[1], m = x.Elements() / k;
  CIRCLET_CHECK(SummedInIntegers(x.Grid(), w.Grid(), k), "a product of codes that is not summed in integers");
  if (y.Elements() == 0) return;
  const int64_t digits = BitWidth(x.Grid()->dtype) == 16 ? 2 : 1;
  gemm::Count({.m = digits * m, .n = n, .k = k, .operand = gemm::Operand::kBytes});
  const int64_t slice = std::min(n, w.GetDType() == DType::kI8 ? kMostColumns : std::max<int64_t>(1, kSliceBytes / k));
  const int64_t row_bytes = digits == 2 ? std::max(2 * k, 8 * slice) : k;
  const int64_t block = std::max(kFewestRows, kBlockBytes / row_bytes);
  for (int64_t row = 0; row < m; row += block) {
    const CodedRows rows(x.F32().data() + row * k, std::min(block, m - row), k, *x.Grid());
    for (int64_t first = 0; first < n; first += slice) {
      const int64_t count = std::min(slice, n - first);
      const CodedColumns columns(w, first, count, rows, bias);
      Multiply(rows, columns, count, k, y.F32().data() + row * n + first, n);
    }
  }
}

std::string InstructionSets() {
  std::string sets = simd::InstructionSet();
  // oneDNN may be held to less than the processor has (ONEDNN_MAX_CPU_ISA).
  if (const dnnl::cpu_isa isa = dnnl::get_effective_cpu_isa(); sets.starts_with("AVX3"))
    sets += isa == dnnl::cpu_isa::sse41                                      ? " oneDNN SSE4"
            : isa == dnnl::cpu_isa::avx                                      ? " oneDNN AVX"
            : isa == dnnl::cpu_isa::avx2 || isa == dnnl::cpu_isa::avx2_vnni ? " oneDNN AVX2"
                                                                             : "";
  return sets + (gemm::MultipliesBytes() ? " VNNI" : "");
}

}  // namespace circlet
