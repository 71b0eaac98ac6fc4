#pragma once

// A recipe: what a model is quantized to (quantization.md 15), the section `pipeline` of a YAML file or of a built-in
// one. The file's other sections are settings of the program (settings/settings.h).

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/io/json.h"
#include "circlet/io/yaml.h"
#include "circlet/quant/spec.h"
#include "circlet/quant/weight_rounding.h"
#include "circlet/quant/widening.h"

namespace circlet {

struct Override {
  std::string path;  // as written, dots between parts
  QuantSpec spec;
  std::string where;  // "quant.yaml:14"
};

// A rule that selects points by what they are (quantization.md 4.8, 15.2).
struct OverridePolicy {
  std::string name;
  bool allow_empty = false;
  enum class Component : uint8_t { kAll, kText, kVision } component = Component::kAll;
  struct Slice {
    int64_t begin = 0, end = INT64_MAX, step = 1;
  };
  std::optional<std::vector<int64_t>> layers;  // explicit indices
  std::optional<Slice> slice;                  // "a:b:c"; neither = every layer
  bool outside = false;             // points of no layer; `modules` are paths then: "per_layer_model_projection"
  std::vector<std::string> modules;  // within a layer: "self_attn", "mlp.down_proj", "": the layer; empty: every linear
  bool several_modules = false;                // `modules`, less specific than `module`
  std::vector<std::string> observers;          // leaf names
  bool by_observer_role = false;               // observer_role, less specific than `observers`
  QuantSpec spec;
  std::string where;

  bool Matches(const Point& point) const;
  int Specificity() const;  // higher wins; equal: the later one
};

// The arguments of the reference's builder: the two roles, and what overrides them for kinds of weights
// (quantization.md 4.5).
struct BuilderSpecs {
  QuantSpec activation = QuantSpec::Affine(DType::kI16);
  QuantSpec weight = QuantSpec::Affine(DType::kI16);
  std::optional<QuantSpec> linear_weight, embedding_weight, lm_head_weight, vision_patch_embed_weight, norm_weight;
};

class Recipe {
 public:
  // A built-in name (default, w4a16, w8a8, mixed8, w8a16, as-checkpoint, smoke-u8) or the path of a YAML or JSON file,
  // with assignments "a.b.c=value" on top. Errors name file and line: unknown keys of the section with the nearest
  // known one, keys of the reference that circlet does not support yet, stages other than ptq, values of the wrong type
  // or out of range. Other sections are passed over; Settings reads all of a file.
  static Recipe Load(const std::string& name_or_path, std::span<const std::string> assignments = {});
  static Recipe Parse(std::string_view text, const std::string& file, std::span<const std::string> assignments = {});
  // From a file's tree; `root`: the same, whose section is read of it.
  static Recipe FromTree(const YamlNode& tree, const JsonObject& root, const std::string& file);
  // The text behind a built-in name or a path.
  static std::string TextOf(const std::string& name_or_path);
  static std::vector<std::string> BuiltinNames();
  static std::string BuiltinText(std::string_view name);  // throws Error with the nearest name

  const std::string& Name() const { return name_; }
  // The whole recipe as read, assignments included, for the manifest and effective_config.yaml.
  const std::string& EffectiveYaml() const { return effective_yaml_; }

  std::optional<WeightRounding> rounding;  // its gptq stage
  bool quantizes = true;  // whether the pipeline has its ptq stage
  BuilderSpecs specs;
  std::optional<WideningOption> widen;   // of the residual stream; not given: off
  // Codes and grids that a packed checkpoint holds stay as they are; those of up to 4 bits are written in this type,
  // int4 or uint4. Not given: all is rounded as the recipe says.
  std::optional<DType> packed_weights;
  std::vector<OverridePolicy> policies;  // weakest first
  std::vector<Override> overrides;       // raw_overrides
  // How much of the difference between channels is moved from norms and from up's rows into the columns of the matrices
  // behind them; 0: nothing.
  float fold = 0;

  // The specification of a point: builder default, then policies, then overrides (quantization.md 4.4, 4.5, 4.8).
  PointSpec SpecFor(const Point& point, const Dialect& dialect) const;

  // Where the last policy or override stands that speaks of the point; empty: none does.
  std::string PlaceOf(const Point& point) const;

  // What the recipe does that ruins models with real weights, a line each: ranges that are cut.
  std::vector<std::string> Cautions() const;

  // What every override and every policy without allow_empty that matches none of `points` is told:
  // "quant.yaml:14: no point "a.b"; nearest: "a.c"".
  std::vector<std::string> UnusedOverrides(std::span<const Point> points) const;
  // Throws Error with those texts, one a line. To be called before calibration.
  void CheckAllUsed(std::span<const Point> points) const;

 private:
  std::string name_;
  std::string effective_yaml_;
};

// What a parameter of the kind is rounded to where the recipe says nothing: linears and tables per row, a position
// table to int16.
WrapperDefault WrapperDefaultOf(WeightKind kind);

}  // namespace circlet
