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
constexpr std::string_view kPositionTable = "position_embedding_table";

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

RandomTensor::RandomTensor(std::string_view name, const Shape& shape, uint64_t seed)
    : key_(Mix(Fnv1a64(name) ^ Mix(seed))) {
  const int64_t elements = shape.Elements();
  if (name.ends_with(kPositionTable)) {
    columns_ = shape[-1];  // [axis, position, hidden]: positions are rows too
  } else if (shape.Rank() > 0) {
    columns_ = shape.Rank() == 1 ? elements : elements / std::max<int64_t>(shape[0], 1);
  }
  rows_ = elements / std::max<int64_t>(columns_, 1);
  Choose(name);
}

void RandomTensor::Choose(std::string_view name) {
  const auto ends = [&](std::string_view end) { return name.ends_with(end); };
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

  if (ends("input_max") || ends("output_max")) return uniform(3.0f, 1.0f);
  if (ends("input_min") || ends("output_min")) return uniform(-3.0f, 1.0f);
  if (ends(".layer_scalar")) return uniform(0.9f, 0.35f);
  if (ends("q_norm.weight") || ends("k_norm.weight")) {
    const float base = 1.1f * std::pow(static_cast<float>(columns_), -0.25f);
    return uniform(base, 0.25f * base);
  }
  if (ends("language_model.norm.weight")) return uniform(2.5f, 0.625f);
  const std::string_view module = name.substr(0, name.rfind('.'));
  const bool norm = module.substr(module.rfind('.') + 1).find("norm") != std::string_view::npos;
  if (norm || ends("std_scale")) return uniform(1.0f, 0.25f);
  if (ends("std_bias") || ends(".bias") || ends("per_dim_scale")) return uniform(0.0f, 0.25f);

  spread_ = 1.0f / std::sqrt(static_cast<float>(columns_));
  if (ends("embed_tokens.weight") || ends("embed_tokens_per_layer.weight")) {
    outlier_columns_ = pick(2, columns_);
    column_factor_ = 4.0f;
    return;
  }
  if (ends(kPositionTable)) {
    spread_ = 0.25f;  // smaller than the patch's own embedding
    return;
  }
  outlier_columns_ = pick(1, columns_);
  column_factor_ = 2.0f;
  if (name.find("gate") != std::string_view::npos) return;
  outlier_rows_ = pick(rows_ < 256 ? 1 : 3, rows_);
  row_factor_ =
      ends("down_proj.weight") || ends("down_proj.linear.weight") || ends("per_layer_projection.weight") ? 2.5f : 8.0f;
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
