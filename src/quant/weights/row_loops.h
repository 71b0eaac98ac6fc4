#pragma once

// The inner loops of rounding, over rows that lie side by side: element (column i, row r) of a panel is [i * width +
// r], with width = gemm::PanelColumns(). Rows do not know of each other. Plain pointers; single-threaded; the same bits
// wherever columns are cut. Sums of a call are float32 and added to float64 ones, so calls take tens of columns.

#include <cstdint>
#include <span>

namespace circlet::weights {

// The grids of a panel's rows, zero points as floats.
struct RowGrid {
  const float *scale, *zero_point;
  float low, high;  // codes
};

// codes = the nearest to `values`, ties to even; errors = how far they lie from `target`.
void Snap(const RowGrid& grid, int64_t width, int64_t columns, const float* values, const float* target, float* codes,
          float* errors);

// loss[r] += sum_i weights[i] (value - nearest)^2; weights null: all 1. To compare ranges by: values are multiplied
// with the scale's reciprocal.
void AddRangeLoss(const RowGrid& grid, int64_t width, int64_t columns, const float* values, const float* weights,
                  double* loss);

// sums[r] += sum_i a[i][r] b[i][r].
void AddDots(int64_t width, int64_t columns, const float* a, int64_t a_stride, const float* b, double* sums);

// A block of columns, `count` of them: `factor` is L at the block's diagonal, row stride n; `carried` [count, stride]
// holds L's rows times the errors of all columns before the block.
struct FactorBlock {
  const float* factor;
  int64_t n, count;
  const float* carried;
  int64_t stride;
};
// Columns in order, each such that (L e)_i is least given those before; `left` gets L e, the losses its squares.
void CompensateBlock(const FactorBlock& block, const RowGrid& grid, int64_t width, const float* target, float* codes,
                     float* errors, float* left, double* loss);
// The same of errors as they stand.
void AddLoss(const FactorBlock& block, int64_t width, const float* errors, float* left, double* loss);
// gradient [count, stride] += the block's triangle of L, transposed, times `left`.
void AddTransposed(const FactorBlock& block, int64_t width, const float* left, float* gradient, int64_t stride);

// sums[r] -= sum_i d_i (change_i + added (d_i + 2 e_i)), d = target - weight (rounding.cc, TrueLosses).
void SubtractCorrection(int64_t width, int64_t columns, float added, const float* errors, const float* target,
                        const float* weight, const float* change, double* sums);

// One pass of coordinate descent over `count` columns: `damped` is H' at the block's diagonal, row stride n; `gradient`
// [count, width] is H' times the errors and follows them. steps [count, width] get what was added to the errors, the
// losses what was gained. Returns whether anything was.
bool DescendBlock(const float* damped, int64_t n, int64_t count, const RowGrid& grid, int64_t width, float* gradient,
                  const float* target, float* codes, float* errors, float* steps, double* loss);

// What one column adds to a row.
struct Change {
  int64_t column;
  float step;
};
// sums[j] += sum over changes of step * matrix[column * n + j], for j < count.
void AddRows(std::span<const Change> changes, const float* matrix, int64_t n, int64_t count, float* sums);

// sums[i] += values[i] * factor, rounded to the nearest integer (ties to even); products below 2^62.
void AddRounded(const float* values, int64_t count, double factor, int64_t* sums);

}  // namespace circlet::weights
