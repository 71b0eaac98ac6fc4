#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet {

// How far quantized values q are from the float values f they stand for (quantization.md 10.1), gathered piece by
// piece. Differences are float32 like the reference's; sums are double, taken in blocks of fixed size and order, so
// that the figures do not depend on threads. Plain data: may be sent between processes.
struct ErrorMetrics {
  int64_t count = 0;
  int64_t nonfinite_reference = 0;  // NaN or infinity in f
  int64_t nonfinite_quantized = 0;  // NaN or infinity in q
  double sum_abs = 0;               // of |q-f| over the pairs with two finite members; likewise below
  double sum_squares = 0;
  double reference_squares = 0;  // of f
  double max_abs = 0;
  double reference_min = std::numeric_limits<double>::infinity();
  double reference_max = -std::numeric_limits<double>::infinity();

  // Equal counts.
  void Add(std::span<const float> reference, std::span<const float> quantized);
  // float32 tensors of one shape; another shape is an Error with both.
  void Add(const Tensor& reference, const Tensor& quantized);
  void Merge(const ErrorMetrics& other);

  bool Finite() const { return nonfinite_reference == 0 && nonfinite_quantized == 0; }
  // NaN when there are no pairs or Finite() is false: a wrong result must not look like a good one.
  double MeanAbs() const;
  double MaxAbs() const;
  double Mse() const;
  // Norm of q - f over that of f; of equal values 0, of others that are 0 in f infinite.
  double Relative() const;
  double Peir() const;  // max|f-q| / (max f - min f), an interval of 0 counts as 1; a ratio, not percent

  bool operator==(const ErrorMetrics&) const = default;
};

// Errors of single positions, each relative to its own float values, so that a few massive values of one position do
// not hide what the others lose. Median and 99th percentile are values that occur (nearest rank). Plain data.
struct PositionSummary {
  int64_t positions = 0;
  double median = 0, percentile_99 = 0;  // infinite: at a position with a NaN or infinity; NaN: no position

  bool operator==(const PositionSummary&) const = default;
};
PositionSummary Summarize(std::vector<float> relative);

// Errors by position, and of all together.
struct PositionErrors {
  ErrorMetrics total;
  std::vector<float> relative;  // of each position

  // One more position.
  void Add(const ErrorMetrics& position);
  // Positions of `width` values each, as many as there are.
  void Add(std::span<const float> reference, std::span<const float> quantized, int64_t width);
};

}  // namespace circlet
