#pragma once

// What a recipe file says: the recipe, and settings of the program: which model, with which data, export, evaluation
// and smoke cases (quantization.md 15). Options of the command line stand above them. Keys of the reference that change
// nothing here are checked and not kept (docs/recipes.md lists them).

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/quant/recipe.h"

namespace circlet {

struct ModelOptions {
  std::string name_or_path;  // empty: given on the command line
};

struct RuntimeOptions {
  uint64_t seed = 42;
};

// One source of calibration samples: a registered name or a path.
struct DataSource {
  std::string dataset;
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
  std::optional<int> max_seq;  // model_args.text.max_seq
};

struct ExportOptions {
  bool enabled = false;
  std::string output_dir;  // empty: given on the command line
  std::optional<int> max_seq_len;
  bool prefill_decode = true;
  enum class Granularity : uint8_t { kMonolithic, kLayer, kBoth } vision = Granularity::kMonolithic;
};

// Perplexity on text, and captions of images.
struct EvaluationOptions {
  bool enabled = false;
  struct Perplexity {
    bool enabled = false;
    std::string dataset = "wikitext2";
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

// debug.static_gemma4_runtime: what `generate` takes from a recipe where its flags leave it open. The comparison run
// that goes with it is `generate --beside`.
struct GenerationOptions {
  std::string model;  // DIR
  std::string prompt;
  std::optional<int> max_seq;       // --context
  std::optional<int> gen_steps;     // --max-new-tokens
  std::optional<int> verify_steps;  // tokens of the answer that are compared
  std::vector<std::string> unused;  // keys that are set and change nothing
};

struct Settings {
  // As Recipe::Load and Recipe::Parse, for all sections; unknown ones are errors too.
  static Settings Load(const std::string& name_or_path, std::span<const std::string> assignments = {});
  static Settings Parse(std::string_view text, const std::string& file, std::span<const std::string> assignments = {});

  ModelOptions model;
  RuntimeOptions runtime;
  CalibrationOptions calibration;
  ModelArgs model_args;
  Recipe recipe;
  EvaluationOptions evaluation;
  ExportOptions export_options;
  SmokeOptions smoke;
  GenerationOptions generation;
};

}  // namespace circlet
