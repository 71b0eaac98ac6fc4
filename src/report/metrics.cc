#include "circlet/report/metrics.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet {
namespace {

constexpr int64_t kBlock = 1 << 16;
constexpr size_t kLanes = 8;  // independent sums, so that the additions need not wait for each other

constexpr float kInfinity = std::numeric_limits<float>::infinity();

struct Lanes {
  double sum_abs[kLanes] = {}, sum_squares[kLanes] = {}, reference_squares[kLanes] = {};
  float largest[kLanes] = {}, low[kLanes], high[kLanes];
  int strange[kLanes] = {};  // differences that are not finite

  Lanes() {
    std::ranges::fill(low, kInfinity);
    std::ranges::fill(high, -kInfinity);
  }
  // Without a branch, so that the lanes of a step become vectors.
  void Take(size_t lane, float f, float q) {
    const float difference = std::abs(q - f);
    strange[lane] += difference < kInfinity ? 0 : 1;
    sum_abs[lane] += difference;
    sum_squares[lane] += static_cast<double>(difference) * difference;
    reference_squares[lane] += static_cast<double>(f) * f;
    largest[lane] = std::max(largest[lane], difference);
    low[lane] = std::min(low[lane], f);
    high[lane] = std::max(high[lane], f);
  }
  void PutInto(ErrorMetrics& block) const {
    block.sum_abs = std::accumulate(std::begin(sum_abs), std::end(sum_abs), 0.0);
    block.sum_squares = std::accumulate(std::begin(sum_squares), std::end(sum_squares), 0.0);
    block.reference_squares = std::accumulate(std::begin(reference_squares), std::end(reference_squares), 0.0);
    block.max_abs = std::ranges::max(largest);
    block.reference_min = std::ranges::min(low);
    block.reference_max = std::ranges::max(high);
  }
};

ErrorMetrics OfBlock(std::span<const float> reference, std::span<const float> quantized) {
  ErrorMetrics block;
  block.count = static_cast<int64_t>(reference.size());
  Lanes all;
  size_t i = 0;
  for (; i + kLanes <= reference.size(); i += kLanes)
    for (size_t lane = 0; lane < kLanes; ++lane) all.Take(lane, reference[i + lane], quantized[i + lane]);
  for (; i < reference.size(); ++i) all.Take(i % kLanes, reference[i], quantized[i]);
  if (std::ranges::all_of(all.strange, [](int count) { return count == 0; })) {
    all.PutInto(block);
    return block;
  }
  Lanes finite;  // pairs of finite values count, the others are counted
  for (i = 0; i < reference.size(); ++i) {
    const float f = reference[i], q = quantized[i];
    block.nonfinite_reference += !std::isfinite(f);
    block.nonfinite_quantized += !std::isfinite(q);
    if (std::isfinite(f) && std::isfinite(q)) finite.Take(i % kLanes, f, q);
  }
  finite.PutInto(block);
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
  reference_squares += other.reference_squares;
  max_abs = std::max(max_abs, other.max_abs);
  reference_min = std::min(reference_min, other.reference_min);
  reference_max = std::max(reference_max, other.reference_max);
}

double ErrorMetrics::MeanAbs() const { return Finite() && count > 0 ? sum_abs / static_cast<double>(count) : kNan; }
double ErrorMetrics::MaxAbs() const { return Finite() && count > 0 ? max_abs : kNan; }
double ErrorMetrics::Mse() const { return Finite() && count > 0 ? sum_squares / static_cast<double>(count) : kNan; }

double ErrorMetrics::Relative() const {
  if (!Finite() || count == 0) return kNan;
  if (sum_squares == 0) return 0;
  return std::sqrt(sum_squares / reference_squares);
}

double ErrorMetrics::Peir() const {
  const double interval = reference_max - reference_min;
  return MaxAbs() / (interval == 0 ? 1.0 : interval);
}

PositionSummary Summarize(std::vector<float> relative) {
  const auto count = static_cast<int64_t>(relative.size());
  if (count == 0) return {.median = kNan, .percentile_99 = kNan};
  const auto ranked = [&](int64_t percent) {
    const auto at = relative.begin() + (count * percent + 99) / 100 - 1;
    std::ranges::nth_element(relative, at);
    return static_cast<double>(*at);
  };
  return {.positions = count, .median = ranked(50), .percentile_99 = ranked(99)};
}

void PositionErrors::Add(const ErrorMetrics& position) {
  total.Merge(position);
  relative.push_back(position.Finite() ? static_cast<float>(position.Relative()) : kInfinity);
}

void PositionErrors::Add(std::span<const float> reference, std::span<const float> quantized, int64_t width) {
  const auto count = static_cast<int64_t>(reference.size()) / width;
  std::vector<ErrorMetrics> rows(count);
  ParallelFor(count, std::max<int64_t>(1, kBlock / width), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      rows[row].Add(reference.subspan(row * width, width), quantized.subspan(row * width, width));
  });
  for (const ErrorMetrics& row : rows) Add(row);
}

}  // namespace circlet
