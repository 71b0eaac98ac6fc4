#include "quant/weights/moments.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "base/large_pages.h"
#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/aligned.h"
#include "ops/gemm.h"
#include "ops/simd.h"
#include "quant/weights/row_loops.h"

namespace circlet::weights {
namespace {

constexpr int64_t kBlockRows = 256;  // of the product that stand in memory at a time

// The value of the largest magnitude, or the first that is not finite in its piece.
float ExtremeOf(const Tensor& tensor) {
  constexpr int64_t kPiece = int64_t{1} << 16;
  const std::span<const float> values = tensor.F32();
  const int64_t pieces = (tensor.Elements() + kPiece - 1) / kPiece;
  std::vector<float> found(static_cast<size_t>(pieces));
  ParallelItems(pieces, [&](int64_t piece, int) {
    const std::span<const float> part =
        values.subspan(piece * kPiece, std::min(kPiece, tensor.Elements() - piece * kPiece));
    const simd::Range range = simd::MinMax(part.data(), static_cast<int64_t>(part.size()));
    if (!range.finite)
      found[piece] = *std::ranges::find_if_not(part, [](float value) { return std::isfinite(value); });
    else
      found[piece] = -range.min > range.max ? range.min : range.max;
  });
  float extreme = 0;
  for (const float value : found)
    if (std::isfinite(extreme) && !(std::abs(value) <= std::abs(extreme))) extreme = value;
  return extreme;
}

}  // namespace

float MagnitudeOf(const Tensor& tensor) {
  const float extreme = ExtremeOf(tensor);
  return std::isfinite(extreme) ? std::abs(extreme) : std::numeric_limits<float>::infinity();
}

void PositionColumns::Set(const Tensor& x, std::span<const float> weights) {
  width_ = x.GetShape()[-1];
  count_ = x.Elements() / width_;
  CIRCLET_CHECK(weights.empty() || static_cast<int64_t>(weights.size()) == count_, "{} weights for {} positions",
                weights.size(), count_);
  extreme_ = ExtremeOf(x);
  if (room_ < x.Elements()) {
    values_ = Aligned<float>(x.Elements());
    rounded_ = nullptr;
    room_ = x.Elements();
  }
  has_rounded_ = false;
  std::vector<float> roots(weights.size());
  std::ranges::transform(weights, roots.begin(), [](float weight) { return std::sqrt(weight); });
  constexpr int64_t kTile = 32;
  for (int64_t piece = 0; piece < count_; piece += kPiece) {
    const int64_t size = std::min(kPiece, count_ - piece);
    const float* const from = x.F32().data() + piece * width_;
    float* const to = values_.get() + piece * width_;
    ParallelFor(width_, kTile, [&](int64_t begin, int64_t end) {
      for (int64_t first = 0; first < size; first += kTile)
        for (int64_t column = begin; column < end; ++column)
          for (int64_t t = first; t < std::min(size, first + kTile); ++t)
            to[column * size + t] =
                roots.empty() ? from[t * width_ + column] : from[t * width_ + column] * roots[piece + t];
    });
  }
}

const uint16_t* PositionColumns::Bf16PieceAt(int64_t first) {
  if (!has_rounded_) {
    if (rounded_ == nullptr) rounded_ = Aligned<uint16_t>(room_);
    ParallelFor(width_ * count_, 4096, [&](int64_t begin, int64_t end) {
      simd::F32ToBF16(values_.get() + begin, end - begin, rounded_.get() + begin);
    });
    has_rounded_ = true;
  }
  return rounded_.get() + first * width_;
}

Moment Moment::Symmetric(int64_t columns, double bound, int64_t positions) {
  return Moment(Kind::kSymmetric, Compute::kFloat32, columns, columns, bound, positions);
}

Moment Moment::Cross(int64_t rows, int64_t columns, double bound, int64_t positions, Compute compute) {
  return Moment(Kind::kCross, compute, rows, columns, bound, positions);
}

Moment::Moment(Kind kind, Compute compute, int64_t rows, int64_t columns, double bound, int64_t positions)
    : kind_(kind),
      compute_(compute),
      rows_(rows),
      columns_(columns),
      bound_(bound),
      limit_(positions),
      size_(kind == Kind::kSymmetric ? columns * (columns + 1) / 2 : rows * columns),
      sums_(nullptr, std::free) {
  if (!(bound > 0) || !std::isfinite(bound)) Fail("second moments of values up to {}; the range must be finite", bound);
  CIRCLET_CHECK(rows > 0 && columns > 0 && positions > 0, "a moment [{},{}] of {} positions", rows, columns, positions);
  // A power of two: dividing by it loses nothing. 2^60 and not 2^63, for what float32 sums exceed the exact ones by.
  const double largest = bound * bound * static_cast<double>(positions);
  quantum_ = std::exp2(std::ceil(std::log2(largest)) - 60);
  sums_.reset(static_cast<int64_t*>(std::calloc(static_cast<size_t>(size_), sizeof(int64_t))));
  if (sums_ == nullptr) throw std::bad_alloc();
  AskForLargePages(sums_.get(), Bytes());
}

int64_t Moment::RowStart(int64_t row) const {
  // Row r of the upper half has columns_ - r elements and begins with the diagonal.
  return kind_ == Kind::kSymmetric ? row * columns_ - row * (row + 1) / 2 : row * columns_;
}

double Moment::At(int64_t row, int64_t column) const {
  if (kind_ == Kind::kSymmetric && column < row) std::swap(row, column);
  return static_cast<double>(sums_[RowStart(row) + column]) * quantum_;
}

void Moment::Require(const PositionColumns& positions, int64_t width) const {
  CIRCLET_CHECK(positions.Width() == width, "{} values at a position, where a moment takes {}", positions.Width(),
                width);
  if (!(std::abs(positions.Extreme()) <= static_cast<float>(bound_ * (1 + 1e-6))))
    Fail("{} at the input of a matrix, where no value passes {}", positions.Extreme(), bound_);
}

void Moment::Add(PositionColumns& x) {
  CIRCLET_CHECK(kind_ == Kind::kSymmetric, "a cross moment takes two tensors");
  Add(x, x);
}

void Moment::Add(PositionColumns& a, PositionColumns& x) {
  Require(a, rows_);
  Require(x, columns_);
  const int64_t count = x.Count();
  CIRCLET_CHECK(a.Count() == count, "{} positions beside {}", a.Count(), count);
  CIRCLET_CHECK(added_ + count <= limit_, "{} positions more than the {} announced", added_ + count, limit_);
  for (int64_t first = 0; first < count; first += PositionColumns::kPiece)
    AddPiece(a.PieceAt(first), x.PieceAt(first), compute_ == Compute::kBf16 ? x.Bf16PieceAt(first) : nullptr,
             std::min(PositionColumns::kPiece, count - first));
  added_ += count;
}

void Moment::Add(const Tensor& x, std::span<const float> weights) {
  PositionColumns positions;
  positions.Set(x, weights);
  Add(positions);
}

void Moment::Add(const Tensor& a, const Tensor& x, std::span<const float> weights) {
  PositionColumns left, right;
  left.Set(a, weights);
  right.Set(x, weights);
  Add(left, right);
}

void Moment::AddPiece(const float* a, const float* x, const uint16_t* rounded_x, int64_t count) {
  const double inverse = 1 / quantum_;
  if (product_ == nullptr) product_ = Aligned<float>(std::min(kBlockRows, rows_) * columns_);
  float* const product = product_.get();
  for (int64_t begin = 0; begin < rows_; begin += kBlockRows) {
    const int64_t rows = std::min(kBlockRows, rows_ - begin);
    const int64_t first = kind_ == Kind::kSymmetric ? begin : 0, width = columns_ - first;
    if (rounded_x != nullptr)
      gemm::LinearBf16(a + begin * count, rounded_x + first * count, nullptr, rows, width, count, product);
    else
      gemm::Linear(a + begin * count, x + first * count, nullptr, rows, width, count, product);
    ParallelFor(rows, 8, [&](int64_t from, int64_t to) {
      for (int64_t row = from; row < to; ++row) {
        const int64_t skip = kind_ == Kind::kSymmetric ? row : 0;
        int64_t* const sums = sums_.get() + RowStart(begin + row) + first;
        AddRounded(product + row * width + skip, width - skip, inverse, sums + skip);
      }
    });
  }
}

Moment Moment::Copy() const {
  Moment copy(kind_, compute_, rows_, columns_, bound_, limit_);
  copy.Merge(*this);
  return copy;
}

void Moment::Merge(const Moment& other) {
  CIRCLET_CHECK(
      kind_ == other.kind_ && rows_ == other.rows_ && columns_ == other.columns_ && quantum_ == other.quantum_,
      "moments of different matrices");
  for (int64_t i = 0; i < size_; ++i) sums_[i] += other.sums_[i];
  added_ += other.added_;
}

void Moment::MergeRaw(int64_t first, std::span<const std::byte> raw, int64_t positions) {
  const auto count = static_cast<int64_t>(raw.size() / sizeof(int64_t));
  CIRCLET_CHECK(first >= 0 && first + count <= size_, "{} sums from {} of {}", count, first, size_);
  for (int64_t i = 0; i < count; ++i) {
    int64_t sum;
    std::memcpy(&sum, raw.data() + i * sizeof(sum), sizeof(sum));
    sums_[first + i] += sum;
  }
  added_ += positions;
}

std::vector<float> Moment::Values() const {
  CIRCLET_CHECK(kind_ == Kind::kCross, "a symmetric moment is stored by half");
  std::vector<float> values(static_cast<size_t>(size_));
  ParallelFor(size_, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) values[i] = static_cast<float>(static_cast<double>(sums_[i]) * quantum_);
  });
  return values;
}

void Moment::Restore(std::span<const std::byte> raw, int64_t positions) {
  if (static_cast<int64_t>(raw.size()) != Bytes() || positions < 0 || positions > limit_)
    Fail("second moments of {} bytes over {} positions, expected {} bytes and at most {}", raw.size(), positions,
         Bytes(), limit_);
  std::memcpy(sums_.get(), raw.data(), raw.size());
  added_ = positions;
}

}  // namespace circlet::weights
