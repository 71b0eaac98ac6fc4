#pragma once

#include <cstdint>
#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/base/qparams.h"
#include "circlet/base/tensor.h"
#include "circlet/quant/observer.h"
#include "circlet/quant/spec.h"
#include "circlet/quant/widening.h"

namespace circlet {

// What calibration found out about one point.
struct PointParams {
  PointSpec spec;
  std::vector<float> min, max;  // one element, or one a channel; +inf, -inf: never observed
  QParams qparams;              // empty scale for points that are not affine
  Observer::Beyond beyond;      // of calibration values, where the grid was given
  bool operator==(const PointParams&) const = default;

  bool Observed() const { return !min.empty() && min.front() <= max.front(); }
  // Whether the checkpoint says the grid (PointSpec::observer): nobody changes it.
  bool Given() const { return spec.kind == QuantKind::kAffine && spec.observer.kind == ObserverSpec::Kind::kGiven; }
  // Whether it is that of a parameter's codes, which the checkpoint holds as well: no file of grids repeats it.
  bool GivenWithCodes() const { return Given() && spec.axis >= 0; }
};

// Of a parameter, whose values are all at hand: exact ranges, one a row or one in all as `spec` says. Throws Error
// "POINT: ..." when a weight is not finite.
PointParams ParamsOfWeight(const Tensor& weight, const PointSpec& spec);
// Of a point that was observed; throws what Observer::Freeze throws. min and max are those observed, unclipped.
PointParams ParamsOf(const Observer& observer, const PointSpec& spec, float headroom_below);

// Quantization parameters by point name, in the order in which they were added. Not thread-safe while it changes.
class ParameterStore {
 public:
  // Adds or replaces.
  void Set(PointParams params);

  const PointParams* Find(std::string_view point) const;
  // Throws Error "POINT: ..." with the nearest name when it is absent, and when it needs a range but was never
  // observed.
  const PointParams& Get(std::string_view point) const;
  const std::vector<std::string>& Names() const { return names_; }
  size_t Size() const { return names_.size(); }
  // The recipe that the grids were made with, as the file they come from says; empty: it says none.
  const std::string& RecipeName() const { return recipe_; }
  void SetRecipeName(std::string name) { recipe_ = std::move(name); }

  // The wider stream that they belong to, as the file says; none: the model's own.
  const std::optional<Widening>& GetWidening() const { return widening_; }
  void SetWidening(Widening widening) { widening_ = std::move(widening); }

  // The schema of the reference's goldens: {..., "points": N, "quant_points": {NAME: {observer, dtype, qscheme,
  // channel_axis, min, max, scale, zero_point}}}; numbers are the shortest decimals of their float32, one point a line.
  // `header` is an object whose members stand in front. Grids of stored codes (GivenWithCodes) are left out. Written
  // whole or not at all.
  void Save(const std::filesystem::path& path, const nlohmann::json& header) const;
  // Throws Error naming the file, the point and the field: unknown names, lists of different lengths, scales that are
  // not positive, zero points outside the element type. Observer arguments are not in the file: they come back as
  // defaults.
  static ParameterStore Load(const std::filesystem::path& path);

 private:
  std::vector<std::string> names_;
  std::map<std::string, PointParams, std::less<>> params_;
  std::string recipe_;
  std::optional<Widening> widening_;
};

// The text that Save writes.
std::string ToText(const ParameterStore& store, const nlohmann::json& header);
ParameterStore ParseParameters(std::string_view text, std::string_view file);

}  // namespace circlet
