#include <fmt/core.h>

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <memory>
#include <nlohmann/json.hpp>
#include <sstream>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/smoke/smoke.h"
#include "circlet/smoke/trace.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "cli/print.h"
#include "cli/stop.h"

namespace circlet {
namespace {

constexpr char kStaticProfile[] = "e2b_static_runtime";
constexpr char kSmokeMode[] = "wrapper-smoke", kTraceMode[] = "trace";

struct InspectOptions {
  std::string mode = kSmokeMode, config, case_name, profile, export_kind, output_dir, report_json, recipe, compare,
              model, samples, explain, json, csv, widen;
  std::vector<std::string> set;
  std::optional<int> calibration_iters;
  std::optional<int64_t> memory_limit;
  int rows = 30;
  bool list_cases = false, no_plot = false, strict = false, quiet = false;
};

void ListCases() {
  for (const SmokeCase& known : SmokeCases()) {
    std::string profiles;
    for (const std::string& profile : known.profiles) profiles += (profiles.empty() ? "" : ", ") + profile;
    fmt::print("{:44} {:10} {}\n", known.name, known.recipe, profiles);
  }
}

// Assignments to the settings of the runner; all others are the recipe's.
bool OfRunner(const std::string& assignment) {
  return assignment.starts_with("debug.") || assignment.starts_with("runtime.");
}

SmokeRun ReadRun(const InspectOptions& options) {
  SmokeRun run;
  std::vector<std::string> of_runner;
  for (const std::string& assignment : options.set) (OfRunner(assignment) ? of_runner : run.set).push_back(assignment);
  const Settings config =
      options.config.empty() ? Settings::Parse("{}", "settings", of_runner) : Settings::Load(options.config, of_runner);
  const SmokeOptions& smoke = config.smoke;
  if (!options.recipe.empty()) {
    run.recipe = options.recipe;
  } else if (config.recipe.quantizes) {
    run.recipe = options.config;
  }
  run.size = {.profile = options.profile.empty() ? smoke.size_profile : options.profile,
              .counts = smoke.static_runtime,
              .seed = smoke.seed};
  for (const std::string& assignment : of_runner)
    if (assignment.starts_with("debug.wrapper_smoke.gemma4.static_runtime.") && run.size.profile != kStaticProfile)
      Fail("--set {}: has no effect on the profile {}; add --profile {}", assignment, run.size.profile, kStaticProfile);
  run.calibration_iters = options.calibration_iters.value_or(smoke.calibration_iters);
  run.export_circle = options.export_kind.empty() ? smoke.export_circle : options.export_kind == "circle";
  run.output_dir = !options.output_dir.empty() ? options.output_dir
                   : !smoke.output_dir.empty() ? smoke.output_dir
                                               : std::string("out/wrapper_smoke");
  run.plot = smoke.plot && !options.no_plot;
  run.strict = options.strict;
  return run;
}

// What --case names. A suite is of the cases that the profile has.
std::vector<SmokeCase> CasesOf(const InspectOptions& options, const std::string& profile) {
  if (options.case_name.empty()) Fail("which case? --case NAME, --case all, or --list-cases");
  if (options.case_name != "all") return {FindSmokeCase(options.case_name)};
  std::vector<SmokeCase> cases;
  std::ranges::copy_if(SmokeCases(), std::back_inserter(cases),
                       [&](const SmokeCase& known) { return known.Has(profile); });
  return cases;
}

// Of --compare, or the one that all cases run in; "": each case its own.
std::vector<std::string> RecipesOf(const InspectOptions& options, const SmokeRun& run) {
  if (options.compare.empty()) return {run.recipe};
  if (!options.recipe.empty()) Fail("--compare names the recipes; leave --recipe out");
  std::vector<std::string> recipes;
  std::istringstream names(options.compare);
  for (std::string name; std::getline(names, name, ',');) {
    if (name.empty()) Fail("--compare {}: a name is empty; write w8a16,w4a16", options.compare);
    recipes.push_back(name);
  }
  if (recipes.size() < 2)
    Fail("--compare {}: puts two recipes or more side by side; one runs with --recipe", options.compare);
  return recipes;
}

int RunCases(const InspectOptions& options) {
  SmokeRun run = ReadRun(options);
  const std::vector<SmokeCase> cases = CasesOf(options, run.size.profile);
  if (cases.empty()) Fail("no case has the profile {}", run.size.profile);
  const std::vector<std::string> recipes = RecipesOf(options, run);
  const bool single = options.case_name != "all" && recipes.size() == 1;
  run.plot = run.plot && single;
  // A misspelled recipe is told once, before anything runs.
  for (const std::string& recipe : recipes) Settings::Load(recipe.empty() ? cases.front().recipe : recipe, run.set);
  if (options.case_name == "all")
    for (const SmokeCase& known : SmokeCases())
      if (!known.Has(run.size.profile)) fmt::print("{}: left out, has no profile {}\n", known.name, run.size.profile);
  const std::filesystem::path output_dir = run.output_dir;
  std::vector<SmokeResult> results;
  for (const SmokeCase& test_case : cases)
    for (const std::string& recipe : recipes) {
      run.recipe = recipe;
      // Files have the case's name, so each recipe of a comparison needs a directory.
      if (recipes.size() > 1) run.output_dir = output_dir / std::filesystem::path(recipe).stem();
      results.push_back(RunSmoke(test_case, run));
    }
  if (single) {
    Print(SmokeText(results.front()));
  } else {
    if (!options.compare.empty()) Print(SmokeComparison(results, Columns()) + "\n");
    Print(SmokeTable(results, Columns()));
  }
  if (!options.report_json.empty()) {
    WriteSmokeReport(options.report_json, results);
    fmt::print("report: {}\n", options.report_json);
  }
  return std::ranges::all_of(results, &SmokeResult::Passed) ? 0 : 1;
}

struct Traced {
  std::vector<TracePoint> points;
  std::vector<std::string> warnings;
};

Traced TraceCase(const InspectOptions& options, const SmokeRun& run) {
  if (options.case_name.empty()) Fail("trace what? MODEL_DIR --samples FILE, or --case NAME");
  if (options.case_name == "all") Fail("--case all: a trace takes one case; `circlet trace --list-cases` lists all");
  if (!options.samples.empty()) Fail("--samples needs MODEL_DIR; a case draws its own");
  if (!options.widen.empty()) Fail("--widen: needs MODEL_DIR; a case has no residual stream to measure");
  if (options.memory_limit) Fail("--memory-limit: needs MODEL_DIR; a case runs in one piece");
  const SmokeCase& known = FindSmokeCase(options.case_name);
  known.RequireProfile(run.size.profile);
  SmokeSize size = run.size;
  size.padding_patches = false;
  if (run.calibration_iters > 0) size.samples = run.calibration_iters;
  const Recipe recipe = Settings::Load(run.recipe.empty() ? known.recipe : run.recipe, run.set).recipe;
  Traced traced;
  traced.points = Trace(known.build(size), recipe, /*iters=*/0, options.explain, &traced.warnings);
  return traced;
}

Traced TraceCheckpoint(const InspectOptions& options, const SmokeRun& run) {
  if (!options.case_name.empty())
    Fail("--case {}: has no place beside MODEL_DIR {}; leave one out", options.case_name, options.model);
  if (options.samples.empty()) Fail("{}: needs --samples FILE (JSON lines or safetensors)", options.model);
  QuantizeOptions quantize{.model = options.model, .data = options.samples, .recipe = run.recipe, .set = run.set};
  quantize.widen = options.widen;
  quantize.progress = options.quiet ? nullptr : stderr;
  if (options.memory_limit) quantize.memory_limit = *options.memory_limit;
  TellWhenStopped("stopped; trace saves nothing");
  const int iters = options.calibration_iters.value_or(0);
  ModelTrace trace = TraceModel(quantize, iters > 0 ? iters : INT64_MAX, options.explain);
  if (std::string note = MemoryNote(trace.result); !note.empty()) trace.result.notes.push_back(std::move(note));
  return {std::move(trace.points), std::move(trace.result.notes)};
}

int RunTrace(const InspectOptions& options) {
  const SmokeRun run = ReadRun(options);
  const Traced traced = options.model.empty() ? TraceCase(options, run) : TraceCheckpoint(options, run);
  const std::vector<TracePoint>& points = traced.points;
  for (const std::string& text : traced.warnings) fmt::print(stderr, "circlet: warning: {}\n", text);
  if (!options.json.empty()) WriteJson(options.json, TraceJson(points));
  if (!options.csv.empty()) WriteFile(options.csv, TraceCsv(points));
  if (options.explain.empty()) {
    Print(TraceText(points, options.rows, Columns()));
    return 0;
  }
  const auto explained = std::ranges::find_if(
      points, [](const TracePoint& point) { return !point.values.empty() || !point.parameter.empty(); });
  if (explained == points.end())
    Fail("{}: is a table, of which the sample looks up some rows, or has no grid; qparams.json of a run has all scales",
         options.explain);
  Print(ExplainText(*explained));
  return 0;
}

int RunMode(const InspectOptions& options) {
  if (options.list_cases) {
    ListCases();
    return 0;
  }
  return options.mode == kTraceMode ? RunTrace(options) : RunCases(options);
}

void AddCaseOptions(CLI::App& verb, InspectOptions& options) {
  verb.add_option("--case", options.case_name, "Part of the model with random parameters; smoke takes all, too")
      ->type_name("NAME");
  verb.add_flag("--list-cases", options.list_cases, "Names, recipes and profiles of the cases");
  verb.add_option("--config", options.config, "YAML with debug.wrapper_smoke (recipes/wrapper_smoke.yaml)")
      ->type_name("FILE");
  verb.add_option("--profile", options.profile, "Size of a case: tiny, e2b_dims, e2b_static_runtime")
      ->check(OneOf({"tiny", "e2b_dims", kStaticProfile}));
  verb.add_option("--recipe", options.recipe, "Built-in name or YAML file; default: the case's own")
      ->type_name("NAME|FILE");
  verb.add_option("--set", options.set, "KEY=VALUE in the recipe, or debug.wrapper_smoke.KEY=VALUE (repeatable)")
      ->type_name("KEY=VALUE");
  verb.add_option("--calibration-iters", options.calibration_iters, "Calibration samples of each kind; default 3")
      ->check(WholeNumber(0, 1 << 20));
}

void AddSmokeOptions(CLI::App& verb, InspectOptions& options) {
  verb.add_option("--compare", options.compare, "Recipes side by side: w8a16,w4a16")->type_name("NAME,NAME");
  verb.add_option("--export", options.export_kind, "none or circle")->check(OneOf({"none", "circle"}));
  verb.add_option("--output-dir", options.output_dir, "Where files go; default out/wrapper_smoke")->type_name("DIR");
  verb.add_option("--report-json", options.report_json, "Also write the results as JSON")->type_name("FILE");
  verb.add_flag("--no-plot", options.no_plot, "No scatter plot");
  verb.add_flag("--strict", options.strict, "Warnings fail too");
}

void AddTraceOptions(CLI::App& verb, const std::string& model, InspectOptions& options) {
  verb.add_option(model, options.model, "Checkpoint directory, instead of a case");
  verb.add_option("--samples,--data", options.samples, "Its samples, JSON lines or safetensors; the last is measured")
      ->type_name("FILE");
  verb.add_option("--explain", options.explain, "Histogram of one point, or a parameter's rows; names as in recipes")
      ->type_name("POINT");
  verb.add_option("--json", options.json, "Also write all points as JSON")->check(WritableFile())->type_name("FILE");
  verb.add_option("--csv", options.csv, "Also write all points as a table")->check(WritableFile())->type_name("FILE");
  verb.add_option("--widen", options.widen,
                  "Channels for copies of a checkpoint's outliers: auto, off, or how many; default: the recipe's")
      ->type_name("N|auto|off");
  verb.add_option("--memory-limit", options.memory_limit,
                  "Memory that the trace of a checkpoint may take, mapped pages apart; default 3GB")
      ->transform(Size());
  verb.add_flag("--quiet", options.quiet, "No progress");
  verb.add_option("--rows", options.rows, "Points listed")->check(WholeNumber(1, 1 << 30))->capture_default_str();
}

}  // namespace

void AddInspect(CLI::App& app, std::function<int()>& command) {
  auto options = std::make_shared<InspectOptions>();
  CLI::App* smoke = app.add_subcommand("smoke", "Run parts of the model one by one, with random parameters");
  smoke->footer(
      "Example:\n  circlet smoke --case gemma4_model --export circle --output-dir out/wrapper_smoke\n"
      "  circlet smoke --case all --report-json out/smoke.json --strict");
  AddCaseOptions(*smoke, *options);
  AddSmokeOptions(*smoke, *options);
  smoke->callback([options, &command] { command = [options] { return RunMode(*options); }; });

  CLI::App* trace = app.add_subcommand("trace", "List the points of a model by the error that rounding makes there");
  trace->footer(
      "Example:\n  circlet trace examples/tiny-gemma4 --samples examples/tiny-gemma4/eval/calib.jsonl --recipe w8a16\n"
      "  circlet trace --case gemma4_text_decoder_layer_prefill");
  AddTraceOptions(*trace, "MODEL_DIR,--model", *options);
  AddCaseOptions(*trace, *options);
  trace->callback([options, &command] {
    command = [options] {
      options->mode = kTraceMode;
      return RunMode(*options);
    };
  });

  CLI::App* inspect = app.add_subcommand("inspect",
                                         "TICO's spelling: --mode wrapper-smoke is `circlet smoke`, --mode trace is "
                                         "`circlet trace`; its static-gemma4-runtime "
                                         "is `circlet generate --recipe FILE --beside MODEL`");
  inspect->footer("Example:\n  circlet inspect --mode wrapper-smoke --case gemma4_model");
  inspect->add_option("--mode", options->mode, "wrapper-smoke or trace")
      ->check(OneOf({kSmokeMode, kTraceMode}))
      ->capture_default_str();
  AddCaseOptions(*inspect, *options);
  AddSmokeOptions(*inspect, *options);
  AddTraceOptions(*inspect, "--model", *options);
  inspect->callback([=, &command] {
    command = [=] {
      const bool traces = options->mode == kTraceMode;
      for (const CLI::Option* given : inspect->parse_order())
        if (given->get_name() != "--mode" && !(traces ? trace : smoke)->get_option_no_throw(given->get_name()))
          Fail("inspect: {} has no effect in --mode {}; it belongs to --mode {}", given->get_name(), options->mode,
               traces ? kSmokeMode : kTraceMode);
      return RunMode(*options);
    };
  });
}

}  // namespace circlet
