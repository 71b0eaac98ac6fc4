#include "circlet/model/gemma4/folding.h"

#include <algorithm>
#include <cmath>

#include "circlet/base/error.h"

namespace circlet {
namespace {

constexpr std::string_view kLayers = "model.language_model.layers.";
constexpr std::string_view kUp = "mlp.up_proj.weight";

// "model.language_model.layers.3." of a parameter of a layer; empty: of another one.
std::string_view LayerOf(std::string_view name) {
  if (!name.starts_with(kLayers)) return {};
  const size_t dot = name.find('.', kLayers.size());
  return dot == name.npos ? std::string_view() : name.substr(0, dot + 1);
}

// The norm whose factors the columns of a linear take; empty: no norm's.
std::string_view NormInFront(std::string_view linear) {
  for (const std::string_view name : {"self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"})
    if (linear == name) return "input_layernorm.weight";
  if (linear == "mlp.gate_proj.weight" || linear == kUp) return "pre_feedforward_layernorm.weight";
  return {};
}

// The size of each row: of a vector its values.
std::vector<double> Sizes(const Tensor& parameter) {
  const Tensor values = ToF32(parameter);
  const int64_t rows = values.GetShape()[0], width = values.Elements() / rows;
  std::vector<double> sizes;
  for (int64_t row = 0; row < rows; ++row) {
    double sum = 0;
    for (const float value : values.F32().subspan(row * width, width)) sum += double{value} * value;
    sizes.push_back(std::sqrt(sum));
  }
  return sizes;
}

}  // namespace

const FoldedParameters::Exponents& FoldedParameters::Of(const std::string& parameter,
                                                        const WeightSource& source) const {
  const std::lock_guard lock(mutex_);
  const auto [it, is_new] = exponents_.try_emplace(parameter);
  if (!is_new) return it->second;
  constexpr double kMost = 8;
  std::vector<double> logs;
  double sum = 0;
  int64_t count = 0;
  for (const double size : Sizes(source(parameter))) {
    logs.push_back(size > 0 && std::isfinite(size) ? std::log2(size) : NAN);
    if (std::isnan(logs.back())) continue;
    sum += logs.back();
    ++count;
  }
  const double mean = count > 0 ? sum / static_cast<double>(count) : 0;
  for (const double log : logs)
    it->second.push_back(
        std::isnan(log) ? 0 : static_cast<int8_t>(std::clamp(std::rint(strength_ * (log - mean)), -kMost, kMost)));
  return it->second;
}

Tensor FoldedParameters::operator()(std::string_view name, const Tensor& stored, const WeightSource& source) const {
  const std::string layer(LayerOf(name));
  if (layer.empty()) return stored;
  const std::string_view part = name.substr(layer.size());
  const Exponents *rows = nullptr, *columns = nullptr;
  if (part == "input_layernorm.weight" || part == "pre_feedforward_layernorm.weight")
    rows = &Of(std::string(name), source);
  if (const std::string_view norm = NormInFront(part); !norm.empty()) columns = &Of(layer + std::string(norm), source);
  if (part == kUp) rows = &Of(std::string(name), source);
  if (part == "mlp.down_proj.weight") columns = &Of(layer + std::string(kUp), source);
  if (rows == nullptr && columns == nullptr) return stored;
  const Tensor folded = ToF32(stored).Clone();
  const int64_t count = folded.GetShape()[0], width = folded.Elements() / count;
  CIRCLET_CHECK(rows == nullptr || std::ssize(*rows) == count, "{} has {} rows, not {}", name, count, rows->size());
  CIRCLET_CHECK(columns == nullptr || std::ssize(*columns) == width, "{} has {} columns", name, width);
  for (int64_t row = 0; row < count; ++row)
    for (int64_t i = 0; i < width; ++i) {
      float& value = folded.F32()[row * width + i];
      value = std::ldexp(value, (columns == nullptr ? 0 : (*columns)[i]) - (rows == nullptr ? 0 : (*rows)[row]));
    }
  return folded;
}

}  // namespace circlet
