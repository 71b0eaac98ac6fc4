#pragma once

// Exact sums of codes by codes, a row of W at a time: each weight is read once, in the form in which files store it
// (4-bit codes stay packed), and nothing is unpacked to memory. For few rows of x, where reading W is all that takes
// time; and for any number of them on processors whose oneDNN does not sum bytes exactly. The same results on every
// processor.
//
// W is loaded in lanes of 16 bits, of which masks and shifts make fields: four nibbles or two bytes. A lane's fields
// meet values of x that lie k / fields apart in planes, so that no field has to move.

#include <cstdint>

#include "circlet/base/tensor.h"

namespace circlet::simd {

// Codes of W that stand in a lane: 4 of 4 bits, 2 of 8.
int64_t CodesPerLane(DType w);

// Elements of a plane: multiples of kPlanePad, which are whole vectors of every processor.
inline constexpr int64_t kPlanePad = 32;
int64_t PlaneElements(int64_t k, DType w);
// Room for a row of x, in elements: its planes.
int64_t StepElements(int64_t k, DType w);
// Values on a grid of zero point 0 as whole numbers of steps, `added` to each, in planes for W of that type; zeros
// behind them. They must fit int16. Returns their sum, NaN when a value is NaN or an infinity. At most 2^15 values.
double StepsOfRow(const float* x, int64_t k, float scale, int32_t added, DType w, int16_t* steps);

// Rows of x, StepElements() apart, as StepsOfRow makes them.
struct StepRows {
  const int16_t* steps;
  int64_t count, k;
  const double* sums;  // by row, of the steps
  double scale;
  double zero_point;    // the step that stands for 0; where it is not 0 `ones` is needed
  const int16_t* ones;  // a row of ones
};
// Rows of W [n,k] as stored; of 4-bit codes k is even.
struct CodeRows {
  const std::byte* codes;
  DType dtype;
  const float* scales;         // by row, or one
  const int32_t* zero_points;  // the same
  bool per_row;
  const float* bias;  // by row; null: none
};
// y[i,j] = fma(sum_k (x[i,k] - zero_x) (w[j,k] - zero_w[j]), scale_x scale_w[j], bias[j]) in float64 and rounded once,
// for the rows [first, last) of W; those of y are y_stride apart, and NaN where the sum of x is.
void MultiplyRows(const StepRows& x, const CodeRows& w, int64_t first, int64_t last, float* y, int64_t y_stride);

}  // namespace circlet::simd
