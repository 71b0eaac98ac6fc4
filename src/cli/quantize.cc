#include <fmt/core.h>

#include <memory>

#include "circlet/base/error.h"
#include "circlet/pipeline/quantize.h"
#include "cli/commands.h"

namespace circlet {

void AddQuantize(CLI::App& app, std::function<int()>& command) {
  auto options = std::make_shared<QuantizeOptions>();
  CLI::App* quantize = app.add_subcommand("quantize", "Calibrate a checkpoint, measure it and export Circle files");
  quantize->footer(
      "Example:\n  circlet quantize examples/tiny-gemma4 --data examples/tiny-gemma4/eval/calib.jsonl --recipe w8a16 "
      "--output out/");
  quantize->add_option("MODEL_DIR", options->model, "Checkpoint directory (config.json, safetensors, tokenizer.json)")->required();
  quantize->add_option("--output,-o", options->output, "New directory for the result")->required();
  quantize->add_flag("--force", options->force, "Replace what an earlier run wrote to the output directory");
  quantize->add_option("--data", options->data, "Calibration samples, JSON lines");
  quantize->add_option("--samples", options->samples, "Calibration (calib.N.*) and evaluation (eval.N.*) samples, safetensors");
  quantize->add_option("--random-samples", options->random_samples, "NxLENGTH samples of random ids, to try the machinery");
  quantize->add_option("--recipe", options->recipe, "default, w8a16, w4a16, w8a8, mixed8, or a YAML file")->capture_default_str();
  quantize->add_option("--set", options->set, "KEY=VALUE in the recipe (repeatable)");
  quantize->add_option("--dialect", options->dialect, "default, or tico: the reference's points and rounding")->capture_default_str();
  quantize->add_option("--qparams", options->qparams, "Frozen grids instead of calibration");
  quantize->add_option("--max-seq-len", options->max_seq_len, "Positions of the exported units");
  quantize->add_option("--eval-text", options->eval_text, "Text for perplexity, float against quantized");
  quantize->add_option("--eval-windows", options->eval_windows, "Only the first N windows of it")->check(CLI::PositiveNumber);
  quantize->add_flag("--save-stages", options->save_stages, "Keep every stage's values of the evaluation samples");
  static const std::map<std::string, QuantizeOptions::Units> kUnits{{"auto", QuantizeOptions::Units::kAuto},
                                                                    {"deployment", QuantizeOptions::Units::kDeployment},
                                                                    {"all", QuantizeOptions::Units::kAll}};
  quantize->add_option("--units", options->units, "auto, deployment, or all (whole-graph files too)")
      ->transform(CLI::CheckedTransformer(kUnits));
  auto quiet = std::make_shared<bool>(false);
  quantize->add_flag("--quiet", *quiet, "No progress");
  quantize->callback([options, quiet, &command] {
    command = [options, quiet] {
      options->progress = *quiet ? nullptr : stderr;
      const QuantizeResult result = Quantize(*options);
      fmt::print("{}\nwritten to {}; next: circlet verify {}\n", ReportText(result), options->output.string(),
                 options->output.string());
      return 0;
    };
  });
}

}  // namespace circlet
