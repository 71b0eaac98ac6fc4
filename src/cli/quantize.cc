#include <fmt/core.h>

#include <memory>
#include <optional>

#include "circlet/base/communicator.h"
#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/pipeline/quantize.h"
#include "cli/commands.h"

namespace circlet {

namespace {

// What quantize and evaluate share: the data, the recipe, and what is measured.
void AddCommon(CLI::App& command, QuantizeOptions& options) {
  command.add_option("MODEL_DIR", options.model, "Checkpoint directory (config.json, safetensors, tokenizer.json)");
  command.add_option("--data", options.data, "Calibration samples, JSON lines");
  command.add_option("--samples", options.samples, "Calibration (calib.N.*) and evaluation (eval.N.*) samples, safetensors");
  command.add_option("--random-samples", options.random_samples, "NxLENGTH samples of random ids, to try the machinery");
  command.add_option("--recipe", options.recipe, "default, w8a16, w4a16, w8a8, mixed8, smoke-u8, or a YAML file")
      ->capture_default_str();
  command.add_option("--set", options.set, "KEY=VALUE in the recipe (repeatable)");
  command.add_option("--dialect", options.dialect, "default, or tico: the reference's points and rounding")
      ->capture_default_str();
  command.add_option("--qparams", options.qparams, "Frozen grids instead of calibration");
  command.add_option("--max-seq-len", options.max_seq_len, "Positions of the exported units, and longest sample");
  command.add_option("--eval-text", options.eval_text, "Text for perplexity, float against quantized");
  command.add_option("--eval-windows", options.eval_windows, "Only the first N windows of it")->check(CLI::PositiveNumber);
  command.add_option("--eval-captions", options.eval_captions, "Pictures with questions and captions, JSON lines");
  command.add_flag("--text-only", options.text_only, "Leave samples with pictures out");
}

// Samples are not shared between the processes yet: the first does all the work while the others wait for it, and null
// is what they get.
std::optional<QuantizeResult> QuantizeTogether(const QuantizeOptions& options) {
  std::optional<QuantizeResult> result;
  if (World().Rank() == 0) result = Quantize(options);
  World().Barrier();
  return result;
}

}  // namespace

void AddQuantize(CLI::App& app, std::function<int()>& command) {
  auto options = std::make_shared<QuantizeOptions>();
  CLI::App* quantize = app.add_subcommand("quantize", "Calibrate a checkpoint, measure it and export Circle files");
  quantize->footer(
      "Example:\n  circlet quantize examples/tiny-gemma4 --data examples/tiny-gemma4/eval/calib.jsonl --recipe w8a16 "
      "--output out/");
  AddCommon(*quantize, *options);
  quantize->add_option("--output,-o", options->output, "New directory for the result");
  quantize->add_flag("--force", options->force, "Replace what an earlier run wrote to the output directory");
  quantize->add_flag("--save-stages", options->save_stages, "Keep every stage's values of the evaluation samples");
  static const std::map<std::string, QuantizeOptions::Units> kUnits{{"auto", QuantizeOptions::Units::kAuto},
                                                                    {"deployment", QuantizeOptions::Units::kDeployment},
                                                                    {"all", QuantizeOptions::Units::kAll}};
  quantize->add_option("--units", options->units,
                       "deployment, all (whole-graph files too), or auto: all for checkpoints up to 1 GiB")
      ->transform(CLI::CheckedTransformer(kUnits).description("{auto,deployment,all}"));
  quantize->add_option("--vision-profile", options->vision_profile,
                       "Layout of the vision units: e2b_66x36_264, e2b_57x42_266, or a JSON file; default: the most "
                       "frequent of the samples");
  auto quiet = std::make_shared<bool>(false);
  quantize->add_flag("--quiet", *quiet, "No progress");
  quantize->callback([options, quiet, &command] {
    command = [options, quiet] {
      options->exports = true;
      options->progress = *quiet ? nullptr : stderr;
      const std::optional<QuantizeResult> result = QuantizeTogether(*options);
      if (!result) return 0;
      fmt::print("{}\nwritten to {}; next: circlet verify {}\n", ReportText(*result), result->output_directory,
                 result->output_directory);
      return 0;
    };
  });
}

void AddEvaluate(CLI::App& app, std::function<int()>& command) {
  struct Options {
    QuantizeOptions quantize;
    std::string json;
    bool quiet = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* evaluate = app.add_subcommand("evaluate", "Measure the float and the fake-quantized model; write no files");
  evaluate->footer(
      "Example:\n  circlet evaluate examples/tiny-gemma4 --data examples/tiny-gemma4/eval/calib.jsonl --recipe w4a16 "
      "--eval-text examples/tiny-gemma4/eval/heldout.txt --eval-captions examples/tiny-gemma4/eval/captions.jsonl");
  AddCommon(*evaluate, options->quantize);
  evaluate->add_option("--json", options->json, "Also write the report as JSON");
  evaluate->add_flag("--quiet", options->quiet, "No progress");
  evaluate->callback([options, &command] {
    command = [options] {
      options->quantize.progress = options->quiet ? nullptr : stderr;
      const std::optional<QuantizeResult> result = QuantizeTogether(options->quantize);
      if (!result) return 0;
      if (!options->json.empty()) WriteFile(options->json, ReportJson(*result));
      fmt::print("{}", ReportText(*result));
      return 0;
    };
  });
}

}  // namespace circlet
