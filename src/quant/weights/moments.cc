#include "quant/weights/moments.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/gemm.h"
#include "ops/simd.h"
#include "quant/weights/row_loops.h"

namespace circlet::weights {
namespace {

constexpr int64_t kPiecePositions = 2048;  // of one product: float32 sums of so many terms stay good to 1e-6
constexpr int64_t kBlockRows = 256;        // of the product that stand in memory at a time

// [count, width] -> [width, count], each row times the root of its weight.
std::vector<float> Transposed(const float* x, int64_t count, int64_t width, const float* roots) {
  std::vector<float> out(static_cast<size_t>(count * width));
  constexpr int64_t kTile = 32;
  ParallelFor(width, kTile, [&](int64_t begin, int64_t end) {
    for (int64_t first = 0; first < count; first += kTile)
      for (int64_t column = begin; column < end; ++column)
        for (int64_t t = first; t < std::min(count, first + kTile); ++t)
          out[column * count + t] = roots == nullptr ? x[t * width + column] : x[t * width + column] * roots[t];
  });
  return out;
}

}  // namespace

Magnitude MagnitudeOf(const Tensor& tensor) {
  constexpr int64_t kPiece = int64_t{1} << 16;
  const std::span<const float> values = tensor.F32();
  const int64_t pieces = (tensor.Elements() + kPiece - 1) / kPiece;
  std::vector<Magnitude> found(static_cast<size_t>(pieces));
  ParallelItems(pieces, [&](int64_t piece, int) {
    const int64_t begin = piece * kPiece, count = std::min(kPiece, tensor.Elements() - begin);
    const simd::Range range = simd::MinMax(values.data() + begin, count);
    found[piece] = {std::max(0.0f, std::max(-range.min, range.max)), range.finite};
  });
  Magnitude all;
  for (const Magnitude& part : found) {
    all.largest = std::max(all.largest, part.largest);
    all.finite &= part.finite;
  }
  return all;
}

Moment Moment::Symmetric(int64_t columns, double bound, int64_t positions) {
  return Moment(Kind::kSymmetric, columns, columns, bound, positions);
}

Moment Moment::Cross(int64_t rows, int64_t columns, double bound, int64_t positions) {
  return Moment(Kind::kCross, rows, columns, bound, positions);
}

Moment::Moment(Kind kind, int64_t rows, int64_t columns, double bound, int64_t positions)
    : kind_(kind), rows_(rows), columns_(columns), bound_(bound), limit_(positions) {
  if (!(bound > 0) || !std::isfinite(bound)) Fail("second moments of values up to {}; the range must be finite", bound);
  CIRCLET_CHECK(rows > 0 && columns > 0 && positions > 0, "a moment [{},{}] of {} positions", rows, columns, positions);
  // A power of two: dividing by it loses nothing. 2^60 and not 2^63, for what float32 sums exceed the exact ones by.
  const double largest = bound * bound * static_cast<double>(positions);
  quantum_ = std::exp2(std::ceil(std::log2(largest)) - 60);
  sums_.resize(static_cast<size_t>(kind == Kind::kSymmetric ? columns * (columns + 1) / 2 : rows * columns));
}

int64_t Moment::RowStart(int64_t row) const {
  // Row r of the upper half has columns_ - r elements and begins with the diagonal.
  return kind_ == Kind::kSymmetric ? row * columns_ - row * (row + 1) / 2 : row * columns_;
}

double Moment::At(int64_t row, int64_t column) const {
  if (kind_ == Kind::kSymmetric && column < row) std::swap(row, column);
  return static_cast<double>(sums_[static_cast<size_t>(RowStart(row) + column)]) * quantum_;
}

void Moment::Add(const Tensor& x, std::span<const float> weights) {
  CIRCLET_CHECK(kind_ == Kind::kSymmetric, "a cross moment takes two tensors");
  Add(x, x, weights);
}

void Moment::Add(const Tensor& a, const Tensor& x, std::span<const float> weights) {
  const int64_t count = x.Elements() / columns_;
  CIRCLET_CHECK(count * columns_ == x.Elements() && a.Elements() == count * rows_, "moments of {} and {}",
                a.Type().ToString(), x.Type().ToString());
  CIRCLET_CHECK(weights.empty() || static_cast<int64_t>(weights.size()) == count, "{} weights for {} positions",
                weights.size(), count);
  CIRCLET_CHECK(added_ + count <= limit_, "{} positions more than the {} announced", added_ + count, limit_);
  const auto limit = static_cast<float>(bound_ * (1 + 1e-6));
  for (const Tensor* tensor : {&a, &x}) {
    if (const Magnitude found = MagnitudeOf(*tensor); !found.finite || found.largest > limit)
      for (const float value : tensor->F32())
        if (!(std::abs(value) <= limit)) Fail("{} at the input of a matrix, where no value passes {}", value, bound_);
    if (&a == &x || a.Raw() == x.Raw()) break;
  }
  std::vector<float> roots(weights.size());
  std::transform(weights.begin(), weights.end(), roots.begin(), [](float w) { return std::sqrt(w); });
  for (int64_t first = 0; first < count; first += kPiecePositions) {
    const int64_t size = std::min(kPiecePositions, count - first);
    const float* const part = roots.empty() ? nullptr : roots.data() + first;
    const std::vector<float> xt = Transposed(x.F32().data() + first * columns_, size, columns_, part);
    if (kind_ == Kind::kSymmetric)
      AddPiece(xt, xt, size);
    else
      AddPiece(Transposed(a.F32().data() + first * rows_, size, rows_, part), xt, size);
  }
  added_ += count;
}

void Moment::AddPiece(std::span<const float> a, std::span<const float> x, int64_t count) {
  const double inverse = 1 / quantum_;
  std::vector<float> product(static_cast<size_t>(std::min(kBlockRows, rows_) * columns_));
  for (int64_t begin = 0; begin < rows_; begin += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, rows_ - begin);
    const int64_t first = kind_ == Kind::kSymmetric ? begin : 0, width = columns_ - first;
    gemm::Linear(a.data() + begin * count, x.data() + first * count, nullptr, rows, width, count, product.data());
    ParallelFor(rows, 8, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        const int64_t skip = kind_ == Kind::kSymmetric ? row : 0;
        int64_t* const sums = sums_.data() + RowStart(begin + row) + first;
        const float* const values = product.data() + row * width;
        AddRounded(values + skip, width - skip, inverse, sums + skip);
      }
    });
  }
}

void Moment::Merge(const Moment& other) {
  CIRCLET_CHECK(
      kind_ == other.kind_ && rows_ == other.rows_ && columns_ == other.columns_ && quantum_ == other.quantum_,
      "moments of different matrices");
  for (size_t i = 0; i < sums_.size(); ++i) sums_[i] += other.sums_[i];
  added_ += other.added_;
}

void Moment::MergeRaw(int64_t first, std::span<const std::byte> raw, int64_t positions) {
  const auto count = static_cast<int64_t>(raw.size() / sizeof(int64_t));
  CIRCLET_CHECK(first >= 0 && first + count <= static_cast<int64_t>(sums_.size()), "{} sums from {} of {}", count,
                first, sums_.size());
  for (int64_t i = 0; i < count; ++i) {
    int64_t sum;
    std::memcpy(&sum, raw.data() + i * sizeof(sum), sizeof(sum));
    sums_[first + i] += sum;
  }
  added_ += positions;
}

std::vector<float> Moment::Values() const {
  CIRCLET_CHECK(kind_ == Kind::kCross, "a symmetric moment is stored by half");
  std::vector<float> values(sums_.size());
  ParallelFor(static_cast<int64_t>(sums_.size()), 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] = static_cast<float>(static_cast<double>(sums_[i]) * quantum_);
  });
  return values;
}

void Moment::Restore(std::span<const std::byte> raw, int64_t positions) {
  if (raw.size() != sums_.size() * sizeof(int64_t) || positions < 0 || positions > limit_)
    Fail("second moments of {} bytes over {} positions, expected {} bytes and at most {}", raw.size(), positions,
         sums_.size() * sizeof(int64_t), limit_);
  std::memcpy(sums_.data(), raw.data(), raw.size());
  added_ = positions;
}

}  // namespace circlet::weights
