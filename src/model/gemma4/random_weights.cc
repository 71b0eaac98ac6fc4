#include "model/gemma4/random_weights.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <memory>
#include <numbers>

#include "circlet/base/hash.h"

namespace circlet {
namespace {

constexpr int kLanes = 4;  // 16-bit draws of one 64-bit hash
constexpr int kDraws = 1 << 16;

uint16_t ToBF16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

using DrawTable = std::array<float, kDraws>;

// Quantile (i + 1/2) / 2^16 of the standard normal distribution for draw i: exact to the draw's resolution, +-4.3 at
// the ends, and one load instead of a logarithm and a cosine.
const DrawTable& NormalDraws() {
  static const std::unique_ptr<const DrawTable> table = [] {
    auto draws = std::make_unique<DrawTable>();
    double x = 0;
    for (int i = kDraws / 2; i < kDraws; ++i) {
      const double upper_tail = 1.0 - (i + 0.5) / kDraws;
      for (int step = 0; step < 8; ++step) {  // Newton, from the neighbour's quantile
        const double excess = 0.5 * std::erfc(x / std::numbers::sqrt2) - upper_tail;
        x += excess * std::sqrt(2 * std::numbers::pi) * std::exp(x * x / 2);
      }
      (*draws)[i] = static_cast<float>(x);
      (*draws)[kDraws - 1 - i] = static_cast<float>(-x);
    }
    return draws;
  }();
  return *table;
}

const DrawTable& UniformDraws() {
  static const std::unique_ptr<const DrawTable> table = [] {
    auto draws = std::make_unique<DrawTable>();
    for (int i = 0; i < kDraws; ++i) (*draws)[i] = static_cast<float>((i + 0.5) / (kDraws / 2) - 1.0);
    return draws;
  }();
  return *table;
}

}  // namespace

RandomTensor::RandomTensor(const Parameter& parameter, uint64_t seed) : key_(Mix(Fnv1a64(parameter.name) ^ Mix(seed))) {
  const Shape& shape = parameter.shape;
  const int64_t elements = shape.Elements();
  if (parameter.kind == WeightKind::kPositionTable) {
    columns_ = shape[-1];  // [axis, position, hidden]: positions are rows too
  } else if (shape.Rank() > 0) {
    columns_ = shape.Rank() == 1 ? elements : elements / std::max<int64_t>(shape[0], 1);
  }
  rows_ = elements / std::max<int64_t>(columns_, 1);
  Choose(parameter.kind, parameter.flow);
}

void RandomTensor::Choose(WeightKind kind, Flow flow) {
  const auto uniform = [&](float center, float spread) {
    normal_ = false;
    center_ = center;
    spread_ = spread;
  };
  const auto pick = [&](int64_t count, int64_t size) {
    std::vector<int64_t> picked;
    for (int64_t i = 0; i < count; ++i)
      picked.push_back(static_cast<int64_t>(Mix(key_ ^ static_cast<uint64_t>(i + 1)) % static_cast<uint64_t>(size)));
    return picked;
  };

  switch (kind) {
    case WeightKind::kUpperBound:
      return uniform(3.0f, 1.0f);
    case WeightKind::kLowerBound:
      return uniform(-3.0f, 1.0f);
    case WeightKind::kLayerScalar:
      return uniform(0.9f, 0.35f);
    case WeightKind::kBias:
      return uniform(0.0f, 0.25f);
    case WeightKind::kNorm:
    case WeightKind::kScale: {
      const float scores = 1.1f * std::pow(static_cast<float>(columns_), -0.25f);
      const float center = flow == Flow::kScores ? scores : flow == Flow::kHead ? 2.5f : 1.0f;
      return uniform(center, 0.25f * center);
    }
    case WeightKind::kPositionTable:
      spread_ = 0.25f;
      return;
    default:
      break;
  }
  spread_ = 1.0f / std::sqrt(static_cast<float>(columns_));
  if (kind == WeightKind::kEmbedding) {
    outlier_columns_ = pick(2, columns_);
    column_factor_ = 4.0f;
    return;
  }
  outlier_columns_ = pick(1, columns_);
  column_factor_ = 2.0f;
  if (flow == Flow::kGate) return;
  outlier_rows_ = pick(rows_ < 256 ? 1 : 3, rows_);
  row_factor_ = flow == Flow::kResidual ? 2.5f : 8.0f;
}

float RandomTensor::RowFactor(int64_t row) const {
  return std::find(outlier_rows_.begin(), outlier_rows_.end(), row) == outlier_rows_.end() ? 1.0f : row_factor_;
}

void RandomTensor::FillRow(int64_t row, uint16_t* out) const {
  const float* const draws = (normal_ ? NormalDraws() : UniformDraws()).data();
  const float spread = spread_ * RowFactor(row);
  const uint64_t groups = static_cast<uint64_t>((columns_ + kLanes - 1) / kLanes);
  const uint64_t first = static_cast<uint64_t>(row) * groups;
  const auto hash = [&](uint64_t group) { return Mix(key_ + (first + group) * kSplitMixStep); };
  const auto draw = [&](uint64_t bits, int lane) { return draws[(bits >> (16 * lane)) & 0xffff]; };

  const uint64_t whole = static_cast<uint64_t>(columns_ / kLanes);
  for (uint64_t group = 0; group < whole; ++group) {
    const uint64_t bits = hash(group);
    for (int lane = 0; lane < kLanes; ++lane) out[group * kLanes + lane] = ToBF16(center_ + spread * draw(bits, lane));
  }
  const uint64_t last = hash(whole);
  for (int64_t column = static_cast<int64_t>(whole) * kLanes; column < columns_; ++column)
    out[column] = ToBF16(center_ + spread * draw(last, static_cast<int>(column % kLanes)));
  for (const int64_t column : outlier_columns_) {
    const uint64_t bits = hash(static_cast<uint64_t>(column / kLanes));
    out[column] = ToBF16(column_factor_ * spread * draw(bits, static_cast<int>(column % kLanes)));
  }
}

}  // namespace circlet
