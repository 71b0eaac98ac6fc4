#include "ops/integer_product.h"

#include <algorithm>
#include <cmath>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/codes.h"
#include "ops/gemm.h"
#include "ops/internal.h"
#include "ops/onednn_product.h"
#include "ops/row_product.h"
#include "ops/simd.h"
#include "ops/thread_scratch.h"

namespace circlet {
namespace {

// So many products of two bytes, offsets included, stay below 2^31.
constexpr int64_t kMostTerms = 1 << 15;

// More rows of x than these are multiplied by oneDNN, if it can: what it takes of W is unpacked for them.
constexpr int64_t kFewRows = 8;

bool IsBytes(const QParams& grid) { return IsInteger(grid.dtype) && BitWidth(grid.dtype) <= 8; }

bool FitIntegers(const QParams& x, const QParams& w, int64_t k) {
  return k > 0 && k <= kMostTerms && !x.PerChannel() && (IsBytes(x) || x.dtype == DType::kI16) && w.axis <= 0;
}

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

// A computed right operand as signed bytes, and what every row of y needs of it. A NaN in it reaches its column of y,
// or all of y when it is not transposed.
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

// Rows of x for products that are summed row by row of W.
class SteppedRows {
 public:
  SteppedRows(const float* x, int64_t rows, int64_t k, const QParams& grid, DType w) {
    const int64_t stride = simd::StepElements(k, w);
    // Steps from the zero point on, but of 16 bits with a zero point, which would leave them.
    const bool wide = BitWidth(grid.dtype) == 16 && grid.zero_point[0] != 0;
    const int32_t added = wide ? grid.zero_point[0] : 0;
    int16_t* const steps = ThreadScratch<int16_t, struct RowSteps>((rows + 1) * stride);
    double* const sums = ThreadScratch<double, struct StepSums>(rows);
    ParallelFor(rows, RowGrain(k), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        sums[row] = simd::StepsOfRow(x + row * k, k, grid.scale[0], added, w, steps + row * stride);
    });
    int16_t* const ones = steps + rows * stride;
    if (wide) {
      const std::vector<float> ones_of_k(static_cast<size_t>(k), 1.0f);
      simd::StepsOfRow(ones_of_k.data(), k, 1.0f, 0, w, ones);
    }
    rows_ = {steps, rows, k, sums, grid.scale[0], static_cast<double>(added), ones};
  }
  const simd::StepRows& Rows() const { return rows_; }

 private:
  simd::StepRows rows_;
};

// y [rows of x, n] by rows of W.
void MultiplyByRows(const simd::StepRows& x, const simd::CodeRows& w, int64_t n, float* y) {
  constexpr int64_t kPieceBytes = int64_t{1} << 17, kRowsTogether = 16;
  const int64_t row_bytes = std::max<int64_t>(1, x.k * BitWidth(w.dtype) / 8 * std::max<int64_t>(1, x.count / 4));
  const int64_t grain = std::max<int64_t>(1, kPieceBytes / row_bytes / kRowsTogether) * kRowsTogether;
  ParallelFor(n, grain, [&](int64_t begin, int64_t end) { simd::MultiplyRows(x, w, begin, end, y, n); });
}

void LinearByRows(const Tensor& x, const Tensor& w, const float* bias, const Tensor& y) {
  const int64_t n = w.GetShape()[0], k = w.GetShape()[1], m = x.Elements() / k;
  Tensor codes = w;
  if (BitWidth(w.GetDType()) == 4 && k % 2 != 0) {  // rows that begin within a byte
    codes = Tensor::Uninitialized({DType::kI8, {n, k}});
    SignedCodes(w, 0, codes.As<int8_t>());
  }
  const QParams& grid = *w.Grid();
  const simd::CodeRows rows{codes.Raw(), codes.GetDType(), grid.scale.data(), grid.zero_point.data(), grid.PerChannel(),
                            bias};
  constexpr int64_t kBlockElements = int64_t{8} << 20;
  const int64_t block = std::max<int64_t>(1, kBlockElements / k);
  for (int64_t row = 0; row < m; row += block) {
    const SteppedRows stepped(x.F32().data() + row * k, std::min(block, m - row), k, *x.Grid(), codes.GetDType());
    MultiplyByRows(stepped.Rows(), rows, n, y.F32().data() + row * n);
  }
}

// y = a b of computed operands. A NaN in b reaches its column of y, or all of y when it is not transposed.
void MatMulByRows(const float* a, const QParams& a_grid, const float* b, const QParams& b_grid, bool transposed,
                  int64_t m, int64_t n, int64_t k, float* y) {
  const int64_t rows = transposed ? n : k, width = transposed ? k : n;
  int8_t* const bytes = ThreadScratch<int8_t, struct RowBytes>(2 * n * k);
  const int32_t zero_point = UnsignedZeroPoint(b_grid) - 128;
  std::vector<float> scales(static_cast<size_t>(n), b_grid.scale[0]);
  const std::vector<int32_t> zero_points(static_cast<size_t>(n), zero_point);
  for (int64_t row = 0; row < rows; ++row) {
    const double sum = simd::CodesOf8Bits(b + row * width, width, b_grid.scale[0], zero_point,
                                          reinterpret_cast<uint8_t*>(bytes + row * width));
    if (std::isnan(sum)) std::fill_n(scales.begin() + (transposed ? row : 0), transposed ? 1 : n, NAN);
  }
  int8_t* codes = bytes;
  if (!transposed) {
    codes = bytes + n * k;
    ParallelFor(n, RowGrain(k), [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; ++j)
        for (int64_t i = 0; i < k; ++i) codes[j * k + i] = bytes[i * n + j];
    });
  }
  const SteppedRows stepped(a, m, k, a_grid, DType::kI8);
  MultiplyByRows(
      stepped.Rows(),
      {reinterpret_cast<const std::byte*>(codes), DType::kI8, scales.data(), zero_points.data(), true, nullptr}, n, y);
}

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
  return x != nullptr && w != nullptr && IsBytes(*w) && FitIntegers(*x, *w, k);
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
  if (!gemm::MultipliesBytes()) return MatMulByRows(a, a_grid, b, b_grid, transposed, m, n, k, y);
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

// Rows of x in blocks whose codes and sums are a few MiB, and so many columns that 64 rows of sums are; fewer where W
// has to be unpacked.
void IntegerLinear(const Tensor& x, const Tensor& w, const float* bias, const Tensor& y) {
  constexpr int64_t kBlockBytes = int64_t{8} << 20, kSliceBytes = int64_t{3} << 19, kFewestRows = 64;
  constexpr int64_t kMostColumns = kBlockBytes / (8 * kFewestRows);
  const int64_t n = w.GetShape()[0], k = w.GetShape()[1], m = x.Elements() / k;
  CIRCLET_CHECK(SummedInIntegers(x.Grid(), w.Grid(), k), "a product of codes that is not summed in integers");
  if (y.Elements() == 0) return;
  if (m <= kFewRows || !gemm::MultipliesBytes()) return LinearByRows(x, w, bias, y);
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
    sets += isa == dnnl::cpu_isa::sse41                                     ? " oneDNN SSE4"
            : isa == dnnl::cpu_isa::avx                                     ? " oneDNN AVX"
            : isa == dnnl::cpu_isa::avx2 || isa == dnnl::cpu_isa::avx2_vnni ? " oneDNN AVX2"
                                                                            : "";
  return sets;
}

bool SameOwnSums(const std::string& a, const std::string& b) {
  const auto own = [](const std::string& sets) {
    const std::string set = sets.substr(0, sets.find(' '));
    return set == "AVX2" ? "AVX3" : set;
  };
  return own(a) == own(b);
}

}  // namespace circlet
