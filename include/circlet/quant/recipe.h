#pragma once

// A recipe: what a model is quantized to, and with which data, export and evaluation (quantization.md 15). One YAML
// file, or the name of a built-in one.

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/quant/spec.h"
#include "circlet/quant/widening.h"

namespace circlet {

struct ModelOptions {
  std::string family = "gemma4";
  std::string name_or_path;  // empty: given on the command line
};

struct RuntimeOptions {
  uint64_t seed = 42;
  bool show_progress = true;
  bool verbose = false;
};

// One source of calibration samples: a registered name or a path.
struct DataSource {
  std::string dataset;
  std::string split;
  std::string config;
  int64_t n_samples = 128;
  bool operator==(const DataSource&) const = default;
};

struct CalibrationOptions {
  std::vector<DataSource> datasets;
  std::optional<int> seq_len;
};

// Static layout of an image prompt, and options of the text graphs (quantization.md 15.1).
struct ModelArgs {
  std::optional<int> visual_start_idx, num_visual_tokens, max_soft_tokens;
  std::optional<int> patch_grid_height, patch_grid_width;  // both or neither
  std::optional<int> image_height, image_width;            // both or neither
  bool validate_static_layout = false;
  std::optional<int> max_seq;              // model_args.text.max_seq
  bool ple_embedding_scale_fusion = true;  // fold sqrt(D) into the PLE table
};

struct ExportOptions {
  bool enabled = false;
  std::string output_dir;        // empty: given on the command line
  bool checkpoint = false;       // artifact ptq_checkpoint: qparams.json and the recipe, for a later export
  bool circle_per_layer = true;  // artifact circle_per_layer
  std::optional<int> max_seq_len;
  bool prefill_decode = true;
  enum class Granularity : uint8_t { kMonolithic, kLayer, kBoth } vision = Granularity::kMonolithic;
};

// Perplexity on text, and captions of images.
struct EvaluationOptions {
  bool enabled = false;
  int64_t n_samples = 50;
  std::optional<int> max_seq_len;
  bool verbose = false;
  struct Perplexity {
    bool enabled = false;
    std::string dataset = "wikitext2";
    std::string split = "test";
    int stride = 512;
  } perplexity;
  bool captions = false;  // evaluation.coco
};

// debug.wrapper_smoke, with its gemma4 section (quantization.md 11.1, 15.6).
struct SmokeOptions {
  int calibration_iters = 3;  // 0 or less: all samples there are
  std::string output_dir;     // empty: given on the command line
  bool export_circle = false;
  bool plot = true;
  std::string size_profile = "tiny";  // tiny, e2b_dims, e2b_static_runtime
  uint64_t seed = 123;                // of parameters and samples; runtime.seed where that is given
  // Replace single figures of e2b_static_runtime.
  struct StaticRuntime {
    std::string profile;
    std::optional<int> max_seq, num_visual_tokens, max_soft_tokens;
    std::optional<int> patch_grid_height, patch_grid_width, pooling_kernel_size;
  } static_runtime;
};

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
  std::vector<std::string> modules;            // within a layer: "self_attn", "mlp.down_proj"; empty: every linear
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
  // A built-in name (default, w4a16, w8a8, mixed8, w8a16, smoke-u8) or the path of a YAML or JSON file, with
  // assignments "a.b.c=value" on top. Errors name file and line: unknown keys with the nearest known one, keys of the
  // reference that circlet does not support yet, stages other than ptq, values of the wrong type or out of range.
  static Recipe Load(const std::string& name_or_path, std::span<const std::string> assignments = {});
  static Recipe Parse(std::string_view text, const std::string& file, std::span<const std::string> assignments = {});
  static std::vector<std::string> BuiltinNames();
  static std::string BuiltinText(std::string_view name);  // throws Error with the nearest name

  const std::string& Name() const { return name_; }
  // The whole recipe as read, assignments included, for the manifest and effective_config.yaml.
  const std::string& EffectiveYaml() const { return effective_yaml_; }

  ModelOptions model;
  RuntimeOptions runtime;
  CalibrationOptions calibration;
  ModelArgs model_args;
  ExportOptions export_options;
  EvaluationOptions evaluation;
  SmokeOptions smoke;
  bool quantizes = true;  // whether the pipeline has its ptq stage
  BuilderSpecs specs;
  std::optional<WideningOption> widen;   // of the residual stream; not given: off
  std::vector<OverridePolicy> policies;  // weakest first
  std::vector<Override> overrides;       // raw_overrides
  bool print_overrides = false;

  // The specification of a point: builder default, then policies, then overrides (quantization.md 4.4, 4.5, 4.8).
  PointSpec SpecFor(const Point& point, const Dialect& dialect) const;

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
