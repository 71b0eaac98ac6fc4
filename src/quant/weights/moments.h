#pragma once

// Second moments: what a rounding method knows of the inputs that a matrix will be multiplied with.
//
// A moment is a sum over positions t of w_t a_t x_t^T; with a = x the matrix is symmetric. Sums are kept in fixed
// point: each product of a piece of positions is computed in float32 at the speed of a matrix product, rounded to a
// multiple of one quantum and added as an integer. Integer sums have no order, so pieces may be added by any thread,
// process or resumed run and give the same bits.

#include <cstdint>
#include <cstdlib>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "circlet/base/tensor.h"
#include "circlet/ops/op.h"
#include "hwy/aligned_allocator.h"

namespace circlet::weights {

// The largest magnitude of a float32 tensor's values; infinite when one of them is not finite.
float MagnitudeOf(const Tensor& tensor);

// A tensor's positions as moments take them, one behind the other in each column. For several moments of the same
// values; the next tensor gets the same memory.
class PositionColumns {
 public:
  // x [.., width], float32. `weights`: one for each position, in [0, 1]; empty: all 1.
  void Set(const Tensor& x, std::span<const float> weights = {});

  int64_t Width() const { return width_; }
  int64_t Count() const { return count_; }
  // What x holds of the largest magnitude, or a value that is not finite.
  float Extreme() const { return extreme_; }
  // Pieces of at most kPiece positions, [width, positions], each value times the root of its position's weight. float32
  // sums of so many terms stay good to 1e-6.
  static constexpr int64_t kPiece = 2048;
  const float* PieceAt(int64_t first) const { return values_.get() + first * width_; }
  // The same rounded to bf16, once for all moments.
  const uint16_t* Bf16PieceAt(int64_t first);

 private:
  int64_t width_ = 0, count_ = 0, room_ = 0;
  float extreme_ = 0;
  hwy::AlignedFreeUniquePtr<float[]> values_;
  hwy::AlignedFreeUniquePtr<uint16_t[]> rounded_;
  bool has_rounded_ = false;
};

class Moment {
 public:
  enum class Kind : uint8_t {
    kSymmetric,  // sum w x x^T, [columns, columns]; the upper half is stored: 0.6 GB for 12288 columns
    kCross,      // sum w a x^T, [rows, columns]
  };

  // No value handed to Add may be larger than `bound`, and no more than `positions` positions may be added altogether;
  // both fix the quantum, at most 2^-60 of the largest sum possible. Throws Error when bound is not positive and
  // finite.
  static Moment Symmetric(int64_t columns, double bound, int64_t positions);
  // kBf16: products of operands rounded to bf16, each off by at most 2^-8 of its magnitude. For what is not solved for.
  static Moment Cross(int64_t rows, int64_t columns, double bound, int64_t positions,
                      Compute compute = Compute::kFloat32);

  Kind GetKind() const { return kind_; }
  int64_t Rows() const { return rows_; }
  int64_t Columns() const { return columns_; }
  int64_t Positions() const { return added_; }  // that were added so far
  int64_t Bytes() const { return size_ * static_cast<int64_t>(sizeof(int64_t)); }

  // Adds positions of x, `columns` wide; of the cross moment with a, `rows` wide. Throws Error for a NaN, an infinity
  // or a value above the bound.
  void Add(PositionColumns& x);
  void Add(PositionColumns& a, PositionColumns& x);
  // The same of tensors.
  void Add(const Tensor& x, std::span<const float> weights = {});
  void Add(const Tensor& a, const Tensor& x, std::span<const float> weights = {});

  Moment Copy() const;
  // Adds what another one of the same shape, bound and positions has summed up.
  void Merge(const Moment& other);
  // The same, of another process: a part of its Raw() from sum number `first` on; its positions with one of the parts.
  void MergeRaw(int64_t first, std::span<const std::byte> raw, int64_t positions);

  // One element.
  double At(int64_t row, int64_t column) const;

  // All elements of a cross moment, row-major.
  std::vector<float> Values() const;

  // The sums as bytes, for other processes and for a saved run, and back. Throws Error when they are of another moment.
  std::span<const std::byte> Raw() const { return std::as_bytes(Sums()); }
  void Restore(std::span<const std::byte> raw, int64_t positions);

 private:
  Moment(Kind kind, Compute compute, int64_t rows, int64_t columns, double bound, int64_t positions);
  int64_t RowStart(int64_t row) const;  // index of element (row, 0) or, symmetric, of where it would be
  std::span<int64_t> Sums() const { return {sums_.get(), static_cast<size_t>(size_)}; }
  void Require(const PositionColumns& positions, int64_t width) const;
  void AddPiece(const float* a, const float* x, const uint16_t* rounded_x, int64_t count);

  Kind kind_;
  Compute compute_;
  int64_t rows_, columns_;
  double bound_, quantum_;
  int64_t limit_, added_ = 0;
  int64_t size_;
  std::unique_ptr<int64_t[], decltype(&std::free)> sums_;  // memory that is zero until a thread writes there
  hwy::AlignedFreeUniquePtr<float[]> product_;             // of a block of rows
};

}  // namespace circlet::weights
