#pragma once

// The wrapper smoke runner (quantization.md 11): small random models, one a part of Gemma 4, each taken all the way:
// observe, freeze, compare float with fake-quantized on a sample that was not calibrated on, write a Circle file, read
// it back, run it and compare the codes. docs/smoke.md has the cases, the figures and the JSON.

#include <filesystem>
#include <functional>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/circle/model.h"
#include "circlet/exec/executor.h"
#include "circlet/graph/graph.h"
#include "circlet/quant/calibration.h"
#include "circlet/report/metrics.h"
#include "circlet/settings/settings.h"

namespace circlet {

using SmokeValues = std::map<std::string, Tensor>;  // by graph input or output

// One graph with samples. A case has several when its inputs have several forms (text alone, text with an image); they
// share parameters and points.
struct SmokePart {
  std::string name;  // "text", "image"
  Graph graph;
  std::optional<Graph> exported;  // what is written, inputs and outputs alike; empty: `graph`
  WeightSource stored;            // float32
  std::vector<SmokeValues> calibration;
  SmokeValues evaluation;
  int64_t real = 0;  // positions of axis 1 of the first output that are compared, the rest is padding; 0: all
};

// How large a case is built. Counts of e2b_static_runtime obey the rules of vision profiles (quantization.md 8.1).
struct SmokeSize {
  std::string profile = "tiny";  // tiny, e2b_dims, e2b_static_runtime
  SmokeOptions::StaticRuntime counts;
  bool padding_patches = true;  // behind the picture, as exported graphs have them
  int samples = 3;              // calibration samples of each part
  uint64_t seed = SmokeOptions().seed;
};

struct SmokeCase {
  std::string name;                   // "gemma4_text_mlp"
  std::vector<std::string> profiles;  // that it can be built in
  std::string recipe;                 // what it is quantized with unless told otherwise
  // Throws Error for sizes that do not fit.
  std::function<std::vector<SmokePart>(const SmokeSize&)> build;

  bool Has(std::string_view profile) const;
  // Throws Error with the profiles that there are.
  void RequireProfile(std::string_view profile) const;
};

// Every Gemma 4 case of quantization.md 11.2 but the draft model's, in its order.
const std::vector<SmokeCase>& SmokeCases();
// Throws Error with the nearest name.
const SmokeCase& FindSmokeCase(std::string_view name);

// Mean and PEIR that a run may have at most, and the mean that a run which quantizes at all has at least.
struct SmokeBounds {
  double max_mean = 0, max_peir = 0, min_mean = 0;
};
// From figures measured with this program; empty: none were taken for this combination.
std::optional<SmokeBounds> BoundsOf(std::string_view case_name, std::string_view profile, std::string_view recipe);

struct SmokeRun {
  SmokeSize size;
  std::string recipe;            // built-in name or file; empty: the case's own
  std::vector<std::string> set;  // assignments in the recipe
  int calibration_iters = 3;     // of each part; 0 or less: all that are built
  bool export_circle = false;
  std::filesystem::path output_dir;  // of NAME.q.circle
  bool plot = true;
  bool strict = false;                // warnings fail too
  std::optional<SmokeBounds> bounds;  // instead of BoundsOf
  // Writes a file and gives its size; by default circle::Write.
  std::function<int64_t(const circle::Model&, const std::filesystem::path&)> write;
};

// Kinds of `failures`: UNAVAILABLE, CONFIG, SHAPE, NON-FINITE, ACCURACY, EXPORT, VERIFY and, for warnings, STRICT; in
// order of first occurrence, each once.
struct SmokeResult {
  std::string name, profile, recipe;
  std::vector<std::string> failures;
  std::optional<ErrorMetrics> metrics;  // of the first output, all parts together
  Shape float_shape, quant_shape;       // of the last part
  std::optional<SmokeBounds> bounds;
  std::map<std::string, std::string> artifacts;  // "circle": path
  std::vector<std::string> messages;             // failures and warnings in words
  int warnings = 0;
  std::string plot;
  int64_t points = 0, operators = 0, bytes = 0, verified = 0;  // verified: output codes compared
  double seconds = 0;

  bool Passed() const { return failures.empty(); }
};

// Runs one case. Every exception becomes a failure of the result.
SmokeResult RunSmoke(const SmokeCase& test_case, const SmokeRun& run);

// The box, artifacts, messages and plot of one case.
std::string SmokeText(const SmokeResult& result);
// One line a case, and how many passed.
std::string SmokeTable(std::span<const SmokeResult> results, int columns = 0);
// One row a case: mean |diff| and PEIR by recipe.
std::string SmokeComparison(std::span<const SmokeResult> results, int columns = 0);
// docs/smoke.md. Figures that are not finite are null.
nlohmann::json SmokeJson(const SmokeResult& result);
nlohmann::json SmokeSuiteJson(std::span<const SmokeResult> results);

// SmokeJson of the one result, or else SmokeSuiteJson, as a file; makes the directory that it goes to.
void WriteSmokeReport(const std::filesystem::path& path, std::span<const SmokeResult> results);

// One of the classical first tries (quantization.md 10.4): a tiny random model, 20 samples of each kind, error boxes on
// a sample that was not calibrated on and on one that was, scatter plot, NAME.q.circle in `output_dir`. Gives what is
// to be printed. Throws Error with the nearest name.
std::string RunExample(std::string_view name, const std::filesystem::path& output_dir, uint64_t seed = 123);
const std::vector<std::string>& ExampleNames();

}  // namespace circlet
