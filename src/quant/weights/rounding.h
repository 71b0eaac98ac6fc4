#pragma once

// Rounding a matrix W [rows, columns] to codes so that its products change least, given the second moments of what it
// is multiplied with. Knows matrices and moments; no graph, no model, no files.
//
// The loss of a row's rounded values Q is (Q - T) H' (Q - T)^T: T is the target, W itself or what stands in for it
// (InputCorrection), H' = H + damping * mean(diag H) I the damped moment. Steps, each of which may be left out:
//   1. a range a row, out of factors of the row's extremes, by sum_j H_jj (W_j - Q_j)^2;
//   2. columns rounded in order of descending H_jj, each given the errors before it (GPTQ; here in the form that needs
//      the factor H' = L^T L alone: column i makes (L e)_i least);
//   3. cyclic coordinate descent on the codes;
//   4. the scale that is best for the codes, s = u H' T / u H' u with u = code - zero_point, and again 3.
// A row that comes out no better than rounded to the nearest on its min/max grid keeps that rounding.

#include <cstdint>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include "circlet/base/dtype.h"
#include "circlet/base/tensor.h"
#include "circlet/quant/affine.h"
#include "circlet/quant/weight_rounding.h"
#include "hwy/aligned_allocator.h"
#include "quant/weights/moments.h"

namespace circlet::weights {

struct RoundingOptions {
  DType dtype = DType::kU4;        // element type of the codes
  std::optional<CodeRange> codes;  // fewer codes than the type holds: {0, 7} are 3 bits
  bool symmetric = false;
  WeightRounding method;

  CodeRange Codes() const { return codes.value_or(CodesOf(dtype)); }
};

// A damped moment in the order in which columns are rounded, with its factor. One for all matrices that read the same
// inputs. Two float32 matrices; while they are made, up to 4096 columns take 8 bytes an element more, and beyond the
// moment, given away, is gone before the second one stands.
class Metric {
 public:
  // `room`: n * n values that nobody needs any more, or null. Fresh memory costs more than what is computed in it.
  Metric(Moment moment, const WeightRounding& method, hwy::AlignedFreeUniquePtr<float[]> room = nullptr);

  int64_t Columns() const { return n_; }
  double Damping() const { return damping_; }    // that was used: ten times more when the matrix was not positive
  double Added() const { return added_; }        // to the diagonal, for that
  int64_t DeadColumns() const { return dead_; }  // whose inputs are all zero: rounded to the nearest
  const std::vector<int32_t>& Order() const { return order_; }
  const float* Damped() const { return damped_.get(); }             // [n,n], rows and columns in Order()
  const float* Factor() const { return factor_.get(); }             // [n,n], lower half: L, upper half: its transpose
  const std::vector<float>& Diagonal() const { return diagonal_; }  // of H, undamped, in Order()

 private:
  int64_t n_;
  double damping_, added_;
  int64_t dead_ = 0;
  std::vector<int32_t> order_;
  std::vector<float> diagonal_;
  hwy::AlignedFreeUniquePtr<float[]> damped_, factor_;
};

struct RoundedMatrix {
  QuantizedWeight weight;
  std::vector<double> loss, nearest_loss;  // by row: of the result, and of rounding to the nearest by min/max
  int64_t rows_to_nearest = 0;             // that kept the latter
  int64_t rows_corrected = 0;              // that took the corrected target's codes
};

// `weight` [rows, columns] of any float type; `target` (float32, same shape) null: the weight itself. Throws Error for
// NaN and infinity. The same codes for any number of threads.
RoundedMatrix Round(const Tensor& weight, const Tensor* target, const Metric& metric, const RoundingOptions& options);

// The target that also takes up what the inputs' own rounding has changed: with x the inputs and x_f those of the float
// model, W* = W + (sum_t W (x_f - x) x^T) (H + damping mean(diag H) I)^-1. Little damping extrapolates from few
// positions; 0.3 is known to be safe on real weights. One for all matrices that read the same inputs: 4 bytes an
// element of H beyond 512 columns.
class InputCorrection {
 public:
  InputCorrection(const Moment& moment, double damping);

  double Added() const { return added_; }  // to the diagonal of H

  // The factor's memory, [n, n], for a Metric; null up to 512 columns. Nothing is left to ask for.
  hwy::AlignedFreeUniquePtr<float[]> GiveUp() { return std::move(factor32_); }

  // `change` is the sum above, [rows, columns] row-major. float32 [rows, columns].
  Tensor Target(const Tensor& weight, std::span<const float> change) const;

 private:
  int64_t n_;
  double added_;
  hwy::AlignedFreeUniquePtr<double[]> factor64_;
  hwy::AlignedFreeUniquePtr<float[]> factor32_;
};

// Each row for the weight or for `target` of an InputCorrection, whichever has the smaller true loss E |W x_f - Q x|^2
// before descent; none worse by that than rounded to the nearest. Both losses of a row are by the target that it took.
// `correction_added`: its Added().
RoundedMatrix RoundCorrected(const Tensor& weight, const Tensor& target, std::span<const float> change,
                             double correction_added, const Metric& metric, const RoundingOptions& options);

}  // namespace circlet::weights
