#pragma once

// Second moments: what a rounding method knows of the inputs that a matrix will be multiplied with.
//
// A moment is a sum over positions t of w_t a_t x_t^T; with a = x the matrix is symmetric. Sums are kept in fixed
// point: each product of a piece of positions is computed in float32 at the speed of a matrix product, rounded to a
// multiple of one quantum and added as an integer. Integer sums have no order, so pieces may be added by any thread,
// process or resumed run and give the same bits.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet::weights {

// The largest magnitude among the finite values of a float32 tensor, and whether all are finite.
struct Magnitude {
  float largest = 0;
  bool finite = true;
};
Magnitude MagnitudeOf(const Tensor& tensor);

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
  static Moment Cross(int64_t rows, int64_t columns, double bound, int64_t positions);

  Kind GetKind() const { return kind_; }
  int64_t Rows() const { return rows_; }
  int64_t Columns() const { return columns_; }
  int64_t Positions() const { return added_; }  // that were added so far
  int64_t Bytes() const { return static_cast<int64_t>(sums_.size() * sizeof(int64_t)); }

  // Adds the positions of x [.., columns], float32; of the cross moment with a [.., rows]. `weights`: one for each
  // position, in [0, 1]; empty: all 1. Throws Error for a NaN, an infinity or a value above the bound.
  void Add(const Tensor& x, std::span<const float> weights = {});
  void Add(const Tensor& a, const Tensor& x, std::span<const float> weights = {});

  // Adds what another one of the same shape, bound and positions has summed up.
  void Merge(const Moment& other);
  // The same, of another process: a part of its Raw() from sum number `first` on; its positions with one of the parts.
  void MergeRaw(int64_t first, std::span<const std::byte> raw, int64_t positions);

  // One element.
  double At(int64_t row, int64_t column) const;

  // All elements of a cross moment, row-major.
  std::vector<float> Values() const;

  // The sums as bytes, for other processes and for a saved run, and back. Throws Error when they are of another moment.
  std::span<const std::byte> Raw() const { return std::as_bytes(std::span(sums_)); }
  void Restore(std::span<const std::byte> raw, int64_t positions);

 private:
  Moment(Kind kind, int64_t rows, int64_t columns, double bound, int64_t positions);
  int64_t RowStart(int64_t row) const;  // index of element (row, 0) or, symmetric, of where it would be
  void AddPiece(std::span<const float> a, std::span<const float> x, int64_t count);

  Kind kind_;
  int64_t rows_, columns_;
  double bound_, quantum_;
  int64_t limit_, added_ = 0;
  std::vector<int64_t> sums_;
};

}  // namespace circlet::weights
