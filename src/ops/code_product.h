#pragma once

// The two products of an attention, q k^T and p v, in whatever form their operands allow: float32, pairs of bf16, or
// quads of bytes whose sums are exact. A form is chosen once for a run; blocks are then converted and multiplied alike.

#include <algorithm>
#include <vector>

#include "circlet/base/threads.h"
#include "circlet/ops/op.h"
#include "ops/aligned.h"
#include "ops/gemm.h"
#include "ops/integer_product.h"
#include "ops/internal.h"
#include "ops/simd.h"
#include "ops/tally.h"

namespace circlet {

// What stands where a product takes one float: a value, two neighbours along k in bf16, or four in bytes.
enum class Unit : uint8_t { kFloat, kPair, kQuad };

// One of the two products of an attention, q k^T or p v, for all its blocks.
class CodeProduct {
 public:
  // On the grids `left` and `right`, when they are known.
  CodeProduct(Compute compute, const QParams* left, const QParams* right, int64_t k)
      : left_(left), right_(right), k_(k) {
    if (BytesSummedInIntegers(left, right, k))
      unit_ = Unit::kQuad;
    else if (compute == Compute::kBf16)
      unit_ = Unit::kPair;
  }

  gemm::Operand Operand() const {
    return unit_ == Unit::kQuad ? gemm::Operand::kBytes : gemm::FloatOperand(unit_ == Unit::kPair);
  }
  bool Counts() const { return unit_ == Unit::kQuad; }
  bool Converts() const { return unit_ != Unit::kFloat; }
  // Floats that k terms take.
  int64_t Depth(int64_t k) const {
    return unit_ == Unit::kQuad ? gemm::Quads(k) : unit_ == Unit::kPair ? gemm::Pairs(k) : k;
  }
  int64_t Depth() const { return Depth(k_); }

  // A row of the left operand, its terms [begin, end) at their places; the sum of the codes of bytes.
  double Left(const float* x, int64_t begin, int64_t end, float* to) const {
    if (unit_ == Unit::kFloat) {
      CopyShort(x + begin, end - begin, to + begin);
      return 0;
    }
    if (unit_ == Unit::kPair) {
      gemm::PairAlongRows(x + begin, 0, 1, end - begin, to + begin / 2, 0);
      return 0;
    }
    return Bytes(x + begin, end - begin, LeftZeroPoint(), left_->scale[0], to + begin / 4);
  }
  // A row of the right operand that lies along k, whole.
  double RightAlongRow(const float* x, float* to) const {
    if (unit_ == Unit::kPair) {
      gemm::PairAlongRows(x, 0, 1, k_, to, 0);
      return 0;
    }
    return Bytes(x, k_, RightZeroPoint(), right_->scale[0], to);
  }
  // The right operand [k,n] that lies across k.
  void RightAcrossRows(const float* x, int64_t n, float* to, double* row_sums) const {
    if (unit_ == Unit::kPair)
      return ParallelFor(Depth(), RowGrain(2 * n),
                         [&](int64_t begin, int64_t end) { gemm::PairRows(x, k_, n, begin, end, to); });
    const auto codes = Aligned<int8_t>(k_ * n);
    ParallelFor(k_, RowGrain(n), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row)
        row_sums[row] = simd::CodesOf8Bits(x + row * n, n, right_->scale[0], RightZeroPoint(),
                                           reinterpret_cast<uint8_t*>(codes.get() + row * n));
    });
    ParallelFor(Depth(), RowGrain(4 * n),
                [&](int64_t begin, int64_t end) { gemm::QuadRows(codes.get(), k_, n, begin, end, to); });
  }

  void Multiply(const float* a, int64_t a_stride, int64_t m, const gemm::Panels& b, const gemm::Part& part, float* c,
                int64_t c_stride) const {
    const auto multiply = unit_ == Unit::kQuad   ? gemm::MultiplyQuads
                          : unit_ == Unit::kPair ? gemm::MultiplyPairs
                                                 : gemm::Multiply;
    multiply(a, a_stride, m, b, part, c, c_stride);
  }

  int32_t LeftZeroPoint() const { return UnsignedZeroPoint(*left_); }
  int32_t RightZeroPoint() const { return UnsignedZeroPoint(*right_) - 128; }
  double Scale() const { return static_cast<double>(left_->scale[0]) * right_->scale[0]; }

 private:
  static double Bytes(const float* x, int64_t count, int32_t zero_point, float scale, float* to) {
    auto* const bytes = reinterpret_cast<uint8_t*>(to);
    const double sum = simd::CodesOf8Bits(x, count, scale, zero_point, bytes);
    std::fill(bytes + count, bytes + 4 * gemm::Quads(count), uint8_t{0});
    return sum;
  }

  Unit unit_ = Unit::kFloat;
  const QParams *left_, *right_;
  int64_t k_;
};

// What the sums of bytes need to become values, by column.
struct CodeColumns {
  std::vector<double> offset, zero_point, scale, bias;

  CodeColumns(const CodeProduct& product, int64_t count) {
    if (!product.Counts()) return;
    offset.resize(static_cast<size_t>(count));
    bias.resize(static_cast<size_t>(count));
    zero_point.assign(static_cast<size_t>(count), product.RightZeroPoint());
    scale.assign(static_cast<size_t>(count), product.Scale());
  }
  simd::IntegerColumns From(const double* offsets, int64_t first) const {
    return {offsets, zero_point.data() + first, scale.data() + first, bias.data() + first};
  }
};

}  // namespace circlet
