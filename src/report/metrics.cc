#include "circlet/report/metrics.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet {
namespace {

constexpr int64_t kBlock = 1 << 16;
constexpr int kLanes = 8;  // independent sums, so that the additions need not wait for each other

ErrorMetrics OfBlock(std::span<const float> reference, std::span<const float> quantized) {
  ErrorMetrics block;
  block.count = static_cast<int64_t>(reference.size());
  double sum_abs[kLanes] = {}, sum_squares[kLanes] = {};
  float largest = 0;
  float low = std::numeric_limits<float>::infinity(), high = -low;
  for (size_t i = 0; i < reference.size(); ++i) {
    const float f = reference[i], q = quantized[i];
    const bool finite_f = std::isfinite(f), finite_q = std::isfinite(q);
    block.nonfinite_reference += !finite_f;
    block.nonfinite_quantized += !finite_q;
    if (!finite_f || !finite_q) continue;
    const float difference = std::abs(q - f);
    sum_abs[i % kLanes] += difference;
    sum_squares[i % kLanes] += static_cast<double>(difference) * difference;
    largest = std::max(largest, difference);
    low = std::min(low, f);
    high = std::max(high, f);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    block.sum_abs += sum_abs[lane];
    block.sum_squares += sum_squares[lane];
  }
  block.max_abs = largest;
  block.reference_min = low;
  block.reference_max = high;
  return block;
}

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();

}  // namespace

void ErrorMetrics::Add(std::span<const float> reference, std::span<const float> quantized) {
  CIRCLET_CHECK(reference.size() == quantized.size(), "{} reference values, {} quantized", reference.size(),
                quantized.size());
  const auto total = static_cast<int64_t>(reference.size());
  std::vector<ErrorMetrics> blocks(static_cast<size_t>((total + kBlock - 1) / kBlock));
  ParallelFor(total, kBlock, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end; at += kBlock) {
      const auto size = static_cast<size_t>(std::min(kBlock, end - at));
      blocks[at / kBlock] = OfBlock(reference.subspan(at, size), quantized.subspan(at, size));
    }
  });
  for (const ErrorMetrics& block : blocks) Merge(block);
}

void ErrorMetrics::Add(const Tensor& reference, const Tensor& quantized) {
  if (reference.GetShape() != quantized.GetShape()) {
    Fail("metrics: the float output has shape {}, the quantized one {}; only equal shapes can be compared",
         reference.GetShape().ToString(), quantized.GetShape().ToString());
  }
  Add(reference.F32(), quantized.F32());
}

void ErrorMetrics::Merge(const ErrorMetrics& other) {
  count += other.count;
  nonfinite_reference += other.nonfinite_reference;
  nonfinite_quantized += other.nonfinite_quantized;
  sum_abs += other.sum_abs;
  sum_squares += other.sum_squares;
  max_abs = std::max(max_abs, other.max_abs);
  reference_min = std::min(reference_min, other.reference_min);
  reference_max = std::max(reference_max, other.reference_max);
}

double ErrorMetrics::MeanAbs() const { return Finite() && count > 0 ? sum_abs / static_cast<double>(count) : kNan; }
double ErrorMetrics::MaxAbs() const { return Finite() && count > 0 ? max_abs : kNan; }
double ErrorMetrics::Mse() const { return Finite() && count > 0 ? sum_squares / static_cast<double>(count) : kNan; }

double ErrorMetrics::Peir() const {
  const double interval = reference_max - reference_min;
  return MaxAbs() / (interval == 0 ? 1.0 : interval);
}

}  // namespace circlet
