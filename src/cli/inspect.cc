#include <fmt/core.h>

#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/smoke/smoke.h"
#include "circlet/smoke/trace.h"
#include "cli/commands.h"

namespace circlet {
namespace {

struct InspectOptions {
  std::string mode = "wrapper-smoke", config, case_name, profile, export_kind, output_dir, report_json, recipe, compare,
      model, samples, explain;
  std::vector<std::string> set;
  std::optional<int> calibration_iters;
  int rows = 30;
  bool list_cases = false, no_plot = false, strict = false;
};

void ListCases() {
  for (const SmokeCase& known : SmokeCases()) {
    std::string profiles;
    for (const std::string& profile : known.profiles) profiles += (profiles.empty() ? "" : ", ") + profile;
    fmt::print("{:44} {:10} {}\n", known.name, known.recipe, profiles);
  }
}

// Assignments to debug.wrapper_smoke are the runner's, the others the recipe's.
SmokeRun ReadRun(const InspectOptions& options) {
  SmokeRun run;
  std::vector<std::string> of_config;
  for (const std::string& assignment : options.set)
    (assignment.starts_with("debug.") ? of_config : run.set).push_back(assignment);
  SmokeOptions smoke;
  if (!options.config.empty() || !of_config.empty()) {
    const Recipe recipe = Recipe::Load(options.config.empty() ? "default" : options.config, of_config);
    smoke = recipe.smoke;
    if (!options.config.empty() && recipe.quantizes) run.recipe = options.config;
  }
  if (!options.recipe.empty()) run.recipe = options.recipe;
  run.size.profile = options.profile.empty() ? smoke.size_profile : options.profile;
  run.size.counts = smoke.static_runtime;
  run.calibration_iters = options.calibration_iters.value_or(smoke.calibration_iters);
  run.export_circle = options.export_kind.empty() ? smoke.export_circle : options.export_kind == "circle";
  run.output_dir = !options.output_dir.empty() ? options.output_dir
                   : !smoke.output_dir.empty() ? smoke.output_dir
                                               : std::string("out/wrapper_smoke");
  run.plot = smoke.plot && !options.no_plot;
  run.strict = options.strict;
  return run;
}

int RunCases(const InspectOptions& options) {
  SmokeRun run = ReadRun(options);
  std::vector<SmokeCase> cases;
  if (options.case_name.empty()) Fail("inspect: which case? --case NAME, --case all, or --list-cases");
  if (options.case_name == "all") {
    cases = SmokeCases();
    run.plot = false;
  } else {
    cases.push_back(FindSmokeCase(options.case_name));
  }
  std::vector<std::string> recipes{run.recipe};
  if (!options.compare.empty()) {
    recipes.clear();
    std::istringstream names(options.compare);
    for (std::string name; std::getline(names, name, ',');) recipes.push_back(name);
    run.plot = false;
  }
  std::vector<SmokeResult> results;
  for (const SmokeCase& test_case : cases)
    for (const std::string& recipe : recipes) {
      run.recipe = recipe;
      results.push_back(RunSmoke(test_case, run));
    }
  const bool single = results.size() == 1 && options.case_name != "all";
  if (!options.report_json.empty()) {
    nlohmann::json report = SmokeSuiteJson(results);
    if (single) {
      report = SmokeJson(results.front());
      report["schema_version"] = 1;
    }
    WriteJson(options.report_json, report);
    if (single) results.front().artifacts["report"] = options.report_json;
  }
  if (single) {
    fmt::print("{}", SmokeText(results.front()));
  } else {
    if (!options.compare.empty()) fmt::print("{}\n", SmokeComparison(results));
    fmt::print("{}", SmokeTable(results));
  }
  for (const SmokeResult& result : results)
    if (!result.Passed()) return 1;
  return 0;
}

int RunTrace(const InspectOptions& options) {
  const SmokeRun run = ReadRun(options);
  std::vector<SmokePart> parts;
  std::string recipe = run.recipe;
  int iters = options.calibration_iters.value_or(0);
  if (!options.model.empty()) {
    if (options.samples.empty()) Fail("inspect: --model needs --samples FILE (JSON lines or safetensors)");
    parts = ModelParts(options.model, options.samples);
    if (recipe.empty()) recipe = "default";
    // Every sample is a part of its own.
    if (iters > 0 && iters + 1 < static_cast<int>(parts.size())) parts.erase(parts.begin() + iters, parts.end() - 1);
  } else {
    if (options.case_name.empty()) Fail("inspect: trace what? --case NAME, or --model DIR --samples FILE");
    const SmokeCase& known = FindSmokeCase(options.case_name);
    SmokeSize size = run.size;
    if (run.calibration_iters > 0) size.samples = run.calibration_iters;
    parts = known.build(size);
    if (recipe.empty()) recipe = known.recipe;
  }
  const std::vector<TracePoint> points = Trace(std::move(parts), Recipe::Load(recipe, run.set), iters, options.explain);
  if (options.explain.empty()) {
    fmt::print("{}", TraceText(points, options.rows));
    return 0;
  }
  for (const TracePoint& point : points) {
    if (point.name != options.explain) continue;
    fmt::print("{}", ExplainText(point));
    return 0;
  }
  Fail("inspect: {} is a parameter's grid; `--explain` shows points that values pass", options.explain);
}

}  // namespace

void AddInspect(CLI::App& app, std::function<int()>& command) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* inspect = app.add_subcommand("inspect", "Run parts of the model one by one and find what is inexact");
  inspect->footer(
      "Example:\n  circlet inspect --case gemma4_model --export circle --output-dir out/wrapper_smoke\n"
      "  circlet inspect --case all --report-json out/smoke.json --strict\n"
      "  circlet inspect --mode trace --case gemma4_text_decoder_layer_prefill");
  inspect->add_option("--mode", options->mode, "wrapper-smoke or trace")
      ->check(CLI::IsMember({"wrapper-smoke", "trace"}))
      ->capture_default_str();
  inspect->add_option("--config", options->config, "YAML with debug.wrapper_smoke (recipes/wrapper_smoke.yaml)");
  inspect->add_option("--case", options->case_name, "One case, or all");
  inspect->add_flag("--list-cases", options->list_cases, "Names, recipes and profiles of the cases");
  inspect->add_option("--profile", options->profile, "Size: tiny, e2b_dims, e2b_static_runtime")
      ->check(CLI::IsMember({"tiny", "e2b_dims", "e2b_static_runtime"}));
  inspect->add_option("--recipe", options->recipe, "Built-in name or YAML file; default: the case's own");
  inspect->add_option("--compare", options->compare, "Recipes side by side: w8a16,w4a16");
  inspect->add_option("--set", options->set, "KEY=VALUE in the recipe, or debug.wrapper_smoke.KEY=VALUE (repeatable)");
  inspect->add_option("--calibration-iters", options->calibration_iters, "Calibration samples of each kind; default 3");
  inspect->add_option("--export", options->export_kind, "none or circle")->check(CLI::IsMember({"none", "circle"}));
  inspect->add_option("--output-dir", options->output_dir, "Where files go; default out/wrapper_smoke");
  inspect->add_option("--report-json", options->report_json, "Also write the results as JSON");
  inspect->add_option("--model", options->model, "trace: a checkpoint instead of a case");
  inspect->add_option("--samples", options->samples, "trace: its samples, JSON lines or safetensors; the last is measured");
  inspect->add_option("--explain", options->explain, "trace: histogram of one point");
  inspect->add_option("--rows", options->rows, "trace: points listed")->check(CLI::PositiveNumber)->capture_default_str();
  inspect->add_flag("--no-plot", options->no_plot, "No scatter plot");
  inspect->add_flag("--strict", options->strict, "Warnings fail too");
  inspect->callback([options, &command] {
    command = [options] {
      if (options->list_cases) {
        ListCases();
        return 0;
      }
      return options->mode == "trace" ? RunTrace(*options) : RunCases(*options);
    };
  });
}

}  // namespace circlet
