#include "circlet/pipeline/quantize.h"

#include <fmt/format.h>

#include <limits>
#include <memory>
#include <set>

#include "circlet/base/communicator.h"
#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/preprocess/samples.h"
#include "circlet/quant/recipe.h"
#include "circlet/runtime/measure.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "cli/print.h"
#include "cli/stop.h"

namespace circlet {

namespace {

// What quantize and evaluate share: the data, the recipe, and what is measured.
void AddCommon(CLI::App& command, QuantizeOptions& options) {
  command.add_option("MODEL_DIR", options.model, "Checkpoint directory (config.json, safetensors, tokenizer.json)");
  command.option_defaults()->group("Data");
  command
      .add_option("--data", options.data,
                  "Calibration samples: JSON lines, an array of them, or gzip of either; - is standard input")
      ->type_name("FILE");
  command
      .add_option("--samples", options.samples,
                  "Calibration (calib.N.*) and evaluation (eval.N.*) samples, safetensors")
      ->type_name("FILE");
  command
      .add_option("--random-samples", options.random_samples, "NxLENGTH samples of random ids, to try the machinery")
      ->type_name("NxLENGTH");
  command.add_option("--random-images", options.random_images, "As many of them with a picture each beside those")
      ->check(WholeNumber(0, 256));
  command.option_defaults()->group("Recipe");
  command
      .add_option("--recipe", options.recipe,
                  fmt::format("{}, or a YAML file; without it as-checkpoint for a checkpoint of codes, else default",
                              fmt::join(Recipe::BuiltinNames(), ", ")))
      ->type_name("NAME|FILE");
  command.add_option("--set", options.set, "KEY=VALUE in the recipe (repeatable)")->type_name("KEY=VALUE");
  command.add_option("--dialect", options.dialect, "default, or tico: points and rounding of TICO 0.3.0")
      ->type_name("{default,tico}");
  command.add_option("--qparams", options.qparams, "Frozen grids instead of calibration")->type_name("FILE");
  command
      .add_option(
          "--widen", options.widen,
          "Channels for copies of the residual stream's outliers: auto, off, or how many; default: the recipe's")
      ->type_name("N|auto|off");
  command.option_defaults()->group("Packed checkpoints");
  command.add_flag("--requantize", options.requantize,
                   "Where the recipe says otherwise than the checkpoint, round anew");
  command.add_flag("--int16-twin", options.int16_twin, "int16 grids with the ends of the checkpoint's int8 ones");
  command.add_flag("--kv-scales", options.kv_scales, "The checkpoint's int8 grids for keys and values too");
  command.option_defaults()->group("Data");
  command.add_option("--max-seq-len", options.max_seq_len, "Positions of the exported units, and longest sample")
      ->check(WholeNumber(2, int64_t{1} << 20));
  CLI::Option* truncate = command.add_flag_callback(
      "--truncate", [&options] { options.long_samples = LongSamples::kTruncate; },
      "Cut longer calibration samples to --max-seq-len tokens");
  command
      .add_flag_callback(
          "--chunk", [&options] { options.long_samples = LongSamples::kChunk; },
          "Split longer calibration samples into parts of --max-seq-len tokens")
      ->excludes(truncate);
  command.add_flag("--text-only", options.text_only, "Leave samples with pictures out");
  command.option_defaults()->group("Measuring");
  command
      .add_option("--eval-data", options.eval_data,
                  "Held-out samples, of the form of --data: the errors are theirs, not the calibration samples'")
      ->type_name("FILE");
  command.add_option("--eval-text", options.eval_text, "Text for perplexity, float against quantized")
      ->type_name("FILE");
  command.add_option("--eval-windows", options.eval_windows, "Only the first N windows of it")
      ->check(WholeNumber(1, std::numeric_limits<int>::max()));
  command.add_option("--eval-captions", options.eval_captions, "Pictures with questions and captions, JSON lines")
      ->type_name("FILE");
  command.add_flag("--strict", options.strict, "Refuse to measure on what was calibrated on; else that is told");
  command
      .add_option("--compute", options.compute,
                  "Precision of the matrix products that calibrate and measure: float32, or bf16 on a processor with "
                  "AVX-512 BF16")
      ->transform(Choice<Compute>({{"float32", Compute::kFloat32}, {"bf16", Compute::kBf16}}))
      ->default_str("float32");
  command.add_flag("--timings", options.timings, "Also measure the run's matrix products alone");
  command.option_defaults()->group("Long runs");
  command
      .add_option(
          "--memory-limit", options.memory_limit,
          "Memory that the run may take, mapped checkpoint pages apart (\"3GB\"); activations past it go to files")
      ->transform(Size())
      ->default_str("3GB");
}

// What a stopped run leaves, and how to go on.
void TellWhenRunStopped(QuantizeOptions& options) {
  const bool first = World().Rank() == 0;
  TellWhenStopped(first ? "stopped; nothing is saved yet, start again with: " + CommandLine("--resume", "") : "");
  options.saved = [first](const std::string& stage, int done, int stages) {
    if (first)
      TellWhenStopped(fmt::format("stopped; {} of {} stages are saved, the last is {}; go on with: {}", done, stages,
                                  stage, CommandLine("--force", "--resume")));
  };
}

// What makes a quantized model has no say in one that is made.
void RefuseBesideFiles(const CLI::App& evaluate) {
  const std::set<std::string> taken{"MODEL_DIR",   "--files", "--eval-text", "--eval-windows", "--eval-captions",
                                    "--eval-chat", "--json",  "--quiet",     "--strict",       "--threads"};
  for (const CLI::Option* given : evaluate.parse_order())
    if (!taken.contains(given->get_name()))
      Fail("{}: has no effect with --files, whose units are made already; leave it out", given->get_name());
}

int EvaluateFiles(const std::string& files, const std::string& chats, const QuantizeOptions& options,
                  const std::string& json) {
  if (options.eval_text.empty() && options.eval_captions.empty() && chats.empty())
    Fail("--files: nothing to measure; give --eval-text, --eval-captions or --eval-chat");
  if (!runtime::IsOutputDirectory(files)) Fail("--files {}: is a checkpoint; give what quantize wrote", files);
  TellWhenStopped("stopped; evaluate saves nothing");
  const auto session = runtime::OpenSession(files);
  std::unique_ptr<runtime::Session> reference;
  if (!options.model.empty()) reference = runtime::OpenSession(options.model, {.context = session->Facts().context});
  const runtime::Measured measured = runtime::Measure(*session, reference.get(), LoadProcessor(files),
                                                      {.text = options.eval_text,
                                                       .captions = options.eval_captions,
                                                       .chats = chats,
                                                       .windows = options.eval_windows,
                                                       .calibrated_on = runtime::CalibratedOn(files),
                                                       .strict = options.strict,
                                                       .progress = options.progress});
  if (!json.empty()) WriteFile(json, runtime::MeasuredJson(measured, "files"));
  Print(runtime::MeasuredText(measured, "files"));
  return 0;
}

// Of several processes the first one tells.
int PrintFirst(const std::string& text) {
  if (World().Rank() == 0) Print(text);
  return 0;
}

}  // namespace

void AddQuantize(CLI::App& app, std::function<int()>& command) {
  auto options = std::make_shared<QuantizeOptions>();
  CLI::App* quantize = app.add_subcommand("quantize", "Calibrate a checkpoint, measure it and export Circle files");
  quantize->footer(
      "Example:\n  circlet quantize examples/tiny-gemma4 --data examples/tiny-gemma4/eval/calib.jsonl --recipe w8a16 "
      "--output out/");
  AddCommon(*quantize, *options);
  quantize->option_defaults()->group("Output");
  quantize->add_option("--output,-o", options->output, "New directory for the result")->type_name("DIR");
  quantize->add_flag("--force", options->force, "Replace what an earlier run wrote to the output directory");
  quantize->add_flag("--save-stages", options->save_stages, "Keep every stage's values of the evaluation samples");
  quantize
      ->add_option("--units", options->units,
                   "deployment, all (whole-graph files too), or auto: all for checkpoints up to 1 GiB")
      ->transform(Choice<QuantizeOptions::Units>({{"auto", QuantizeOptions::Units::kAuto},
                                                  {"deployment", QuantizeOptions::Units::kDeployment},
                                                  {"all", QuantizeOptions::Units::kAll}}))
      ->default_str("auto");
  quantize
      ->add_option("--vision-profile", options->vision_profile,
                   "Layout of the vision units: e2b_66x36_264, e2b_57x42_266, or a JSON file; default: the most "
                   "frequent of the samples")
      ->type_name("NAME|FILE");
  quantize->option_defaults()->group("Long runs");
  quantize->add_flag("--resume", options->resume, "Go on with an unfinished run in the output directory");
  quantize
      ->add_option("--save-every", options->save_every, "Seconds between saved states of the run; 0: after every stage")
      ->check(Number(0, 86400))
      ->capture_default_str();
  struct Switches {
    bool quiet = false, dry_run = false;
  };
  auto switches = std::make_shared<Switches>();
  quantize->add_flag("--dry-run", switches->dry_run, "Only say what the run would need: stages, time, memory, disk");
  quantize->option_defaults()->group("Output");
  quantize->add_flag("--quiet", switches->quiet, "No progress");
  quantize->callback([options, switches, &command] {
    command = [options, switches] {
      options->exports = true;
      options->progress = switches->quiet ? nullptr : stderr;
      if (switches->dry_run) return PrintFirst(DryRun(*options));
      options->command = RepeatableCommand();
      TellWhenRunStopped(*options);
      const QuantizeResult result = Quantize(*options);
      if (result.done_already)
        return PrintFirst(fmt::format("{}: is complete already; next: circlet verify {}\n", result.output_directory,
                                      result.output_directory));
      return PrintFirst(fmt::format("{}\nwritten to {}; next: circlet verify {}\n", ReportText(result, Columns()),
                                    result.output_directory, result.output_directory));
    };
  });
}

void AddEvaluate(CLI::App& app, std::function<int()>& command) {
  struct Options {
    QuantizeOptions quantize;
    std::string json, files, chats;
    bool quiet = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* evaluate = app.add_subcommand("evaluate", "Measure the float and the fake-quantized model; write no files");
  evaluate->footer(
      "Example:\n  circlet evaluate examples/tiny-gemma4 --data examples/tiny-gemma4/eval/calib.jsonl --recipe w4a16 "
      "--eval-text examples/tiny-gemma4/eval/heldout.txt --eval-captions examples/tiny-gemma4/eval/captions.jsonl");
  AddCommon(*evaluate, options->quantize);
  evaluate->option_defaults()->group("Measuring");
  evaluate
      ->add_option("--files", options->files,
                   "Measure the exported files of this directory instead, beside the float model of MODEL_DIR if that "
                   "is given")
      ->type_name("DIR");
  evaluate
      ->add_option("--eval-chat", options->chats,
                   "With --files: conversations, JSON lines, of which the model's last turn counts")
      ->type_name("FILE");
  evaluate->option_defaults()->group("Packed checkpoints");
  evaluate
      ->add_option_function<std::string>(
          "--elsewhere", [options](const std::string&) { options->quantize.elsewhere_float = true; },
          "float: nothing is rounded where the checkpoint gives no grid")
      ->check(CLI::IsMember({"float"}))
      ->type_name("float");
  evaluate->option_defaults()->group("Output");
  evaluate->add_option("--json", options->json, "Also write the report as JSON")
      ->check(WritableFile())
      ->type_name("FILE");
  evaluate->add_flag("--quiet", options->quiet, "No progress");
  evaluate->callback([options, evaluate, &command] {
    command = [options, evaluate] {
      options->quantize.progress = options->quiet ? nullptr : stderr;
      if (!options->files.empty()) {
        RefuseBesideFiles(*evaluate);
        return EvaluateFiles(options->files, options->chats, options->quantize, options->json);
      }
      if (!options->chats.empty()) Fail("--eval-chat: measures exported files; give their directory with --files");
      TellWhenStopped(World().Rank() == 0 ? "stopped; evaluate saves nothing" : "");
      const QuantizeResult result = Quantize(options->quantize);
      if (!options->json.empty() && World().Rank() == 0) WriteFile(options->json, ReportJson(result));
      return PrintFirst(ReportText(result, Columns()));
    };
  });
}

}  // namespace circlet
