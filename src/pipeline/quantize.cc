#include "circlet/pipeline/quantize.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <nlohmann/json.hpp>

#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/preprocess/samples.h"
#include "circlet/report/terminal.h"
#include "pipeline/manifest.h"
#include "pipeline/text_run.h"

namespace circlet {
namespace {

constexpr int64_t kLongestSequence = int64_t{1} << 20;

// Seconds by phase, for timings.json.
class Clock {
 public:
  explicit Clock(std::map<std::string, double>& seconds) : seconds_(seconds) {}
  template <typename Body>
  decltype(auto) Time(const std::string& phase, Body&& body) {
    struct Stop {
      Clock& clock;
      std::string phase;
      std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
      ~Stop() {
        clock.seconds_[phase] += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
      }
    } stop{*this, phase};
    return body();
  }

 private:
  std::map<std::string, double>& seconds_;
};

struct RunData {
  std::vector<Sample> calibration, evaluation;
  std::vector<std::vector<int64_t>> windows;
  std::vector<std::string> skipped;
  bool random = false;
};

std::pair<int64_t, int64_t> ParseRandom(const std::string& text) {
  int64_t count = 0, length = 0;
  char x = 0, rest = 0;
  if (std::sscanf(text.c_str(), "%ld%c%ld%c", &count, &x, &length, &rest) != 3 || x != 'x' || count < 1 || length < 1 ||
      count > 1'000'000 || length > kLongestSequence)
    Fail("--random-samples {}: expected NxLENGTH, e.g. 8x2048", text);
  return {count, length};
}

SampleOptions OptionsFor(const Gemma4Config& config, const QuantizeOptions& options) {
  return {.vocab_size = config.text.vocab_size,
          .max_length = options.max_seq_len.value_or(0),
          .text_only = true,
          .placeholders = {config.image_token_id, config.video_token_id, config.audio_token_id}};
}

RunData LoadData(const QuantizeOptions& options, const Gemma4Config& config) {
  const int sources = !options.data.empty() + !options.samples.empty() + !options.random_samples.empty();
  if (sources != 1 && options.qparams.empty())
    Fail("calibration data: give exactly one of --data, --samples and --random-samples (found {})", sources);
  RunData data;
  std::optional<Processor> processor;
  if (!options.data.empty() || !options.eval_text.empty()) processor = LoadProcessor(options.model);
  const SampleOptions rules = OptionsFor(config, options);
  if (!options.data.empty()) {
    SampleSet set = LoadJsonl(options.data, *processor, rules);
    data.calibration = std::move(set.samples);
    data.skipped = std::move(set.skipped);
  }
  if (!options.samples.empty()) {
    SampleSet set = SamplesFromSafetensors(options.samples, "calib", rules);
    data.calibration = std::move(set.samples);
    data.skipped = std::move(set.skipped);
    const SafetensorsFile file = SafetensorsFile::Open(options.samples);
    if (file.Find("eval.0.input_ids") != nullptr) {
      SampleSet evaluation = SamplesFromSafetensors(options.samples, "eval", rules);
      data.evaluation = std::move(evaluation.samples);
      data.skipped.insert(data.skipped.end(), evaluation.skipped.begin(), evaluation.skipped.end());
    }
  }
  if (!options.random_samples.empty()) {
    const auto [count, length] = ParseRandom(options.random_samples);
    const std::vector<int64_t> forbidden{config.image_token_id, config.video_token_id, config.audio_token_id,
                                         config.text.pad_token_id};
    data.calibration = RandomSamples(count, length, 42, config.text.vocab_size, forbidden);
    data.random = true;
  }
  if (!options.eval_text.empty()) {
    constexpr int64_t kWindow = 255;
    data.windows = PerplexityWindows(ReadFile(options.eval_text), processor->tokenizer, kWindow, config.text.bos_token_id);
    if (data.windows.empty()) Fail("{}: holds no text", options.eval_text.string());
    if (options.eval_windows && *options.eval_windows < static_cast<int64_t>(data.windows.size()))
      data.windows.resize(*options.eval_windows);
  }
  if (data.calibration.empty() && options.qparams.empty())
    Fail("no calibration sample is left: {} have images, which this run leaves out", data.skipped.size());
  return data;
}

// Items in a fixed order: calibration, evaluation, windows, and the padded sample that the units are verified with.
void MakeItems(const RunData& data, const QuantizeOptions& options, RunContext& context) {
  const auto add = [&](ItemKind kind, int64_t index, std::string label, std::vector<int64_t> ids,
                       std::vector<int64_t> keep, const Sample* sample) {
    if (keep.empty()) keep.assign(ids.size(), 1);
    Item item{static_cast<int>(context.items.size()), kind, index, static_cast<int64_t>(ids.size()), std::move(label)};
    context.items.push_back(item);
    context.texts.push_back({item, std::move(ids), std::move(keep), sample});
  };
  const auto add_samples = [&](const std::vector<Sample>& samples, ItemKind kind, const char* label) {
    for (size_t i = 0; i < samples.size(); ++i)
      add(kind, static_cast<int64_t>(i), fmt::format("{}.{}", label, i), samples[i].input_ids,
          {samples[i].attention_mask.begin(), samples[i].attention_mask.end()}, &samples[i]);
  };
  add_samples(data.calibration, ItemKind::kCalibration, "calib");
  add_samples(data.evaluation, ItemKind::kEvaluation, "eval");
  for (size_t i = 0; i < data.windows.size(); ++i)
    add(ItemKind::kWindow, static_cast<int64_t>(i), fmt::format("window.{}", i), data.windows[i], {}, nullptr);

  int64_t longest = 1;
  for (const Sample& sample : data.calibration)
    longest = std::max(longest, static_cast<int64_t>(sample.input_ids.size()));
  for (const Sample& sample : data.evaluation)
    longest = std::max(longest, static_cast<int64_t>(sample.input_ids.size()));
  const auto& recipe = context.calibration.GetRecipe();
  context.max_seq_len = options.max_seq_len.value_or(recipe.export_options.max_seq_len.value_or((longest + 7) / 8 * 8));
  if (context.max_seq_len < 2 || context.max_seq_len > kLongestSequence)
    Fail("sequence length {}: expected 2 .. {}", context.max_seq_len, kLongestSequence);
  if (longest > context.max_seq_len)
    Fail("a sample has {} tokens, the exported sequence length is {}; raise --max-seq-len", longest, context.max_seq_len);

  const std::vector<Sample>& pool = data.evaluation.empty() ? data.calibration : data.evaluation;
  const auto verify = std::max_element(pool.begin(), pool.end(), [](const Sample& a, const Sample& b) {
    return a.input_ids.size() < b.input_ids.size();
  });
  if (verify == pool.end() || options.output.empty()) return;
  std::vector<int64_t> ids = verify->input_ids;
  std::vector<int64_t> keep(verify->attention_mask.begin(), verify->attention_mask.end());
  if (keep.empty()) keep.assign(ids.size(), 1);
  ids.resize(context.max_seq_len, context.config.text.pad_token_id);
  keep.resize(context.max_seq_len, 0);
  add(ItemKind::kVerify, 0, "verify", std::move(ids), std::move(keep), &*verify);
}

bool WritesWholeModel(const QuantizeOptions& options, const ModelWeights& weights) {
  constexpr int64_t kSmallModelBytes = int64_t{1} << 30;
  if (options.units != QuantizeOptions::Units::kAuto) return options.units == QuantizeOptions::Units::kAll;
  int64_t bytes = 0;
  for (const auto& [canonical, stored] : weights.GetInventory().name_in_checkpoint) bytes += weights.Stored(canonical).Bytes();
  return bytes <= kSmallModelBytes;
}

// What cannot be exported is said before anything is computed.
void CheckExportable(const Calibration& calibration, const std::vector<Point>& points) {
  for (const Point& point : points) {
    const PointSpec spec = calibration.GetRecipe().SpecFor(point, calibration.GetDialect());
    if (spec.kind == QuantKind::kMx)
      Fail("{}: MX formats are simulated only, a Circle file cannot hold them; set the point to an integer type, or use "
           "evaluate", point.name);
  }
}

}  // namespace

QuantizeResult Quantize(const QuantizeOptions& options) {
  QuantizeResult result;
  Clock clock(result.seconds);
  const Gemma4Config config = ReadConfig(options.model);
  Recipe recipe = Recipe::Load(options.recipe, options.set);
  const Dialect& dialect = DialectFromName(options.dialect);
  const RunData data = clock.Time("load", [&] { return LoadData(options, config); });
  const ModelWeights weights = clock.Time("load", [&] { return ModelWeights::Open(config, options.model); });

  Calibration calibration(std::move(recipe), dialect);
  if (!options.qparams.empty()) calibration.UseFrozen(ParameterStore::Load(options.qparams));
  ActivationStore store;
  RunContext context{.config = config, .weights = weights, .calibration = calibration, .store = store};
  MakeItems(data, options, context);
  TextRun text(context);
  const std::vector<Point> points = text.Points();
  {
    std::vector<std::string> names;
    for (const Point& point : points) names.push_back(point.name);
    calibration.GetRecipe().CheckAllUsed(names);
  }
  std::optional<OutputRun> output;
  std::optional<UnitWriter> units;
  if (!options.output.empty()) {
    CheckExportable(calibration, points);
    output.emplace(options.output, options.force);
    units.emplace(output->Directory(), calibration);
  }

  Captured captured;
  Captured* const capture = options.save_stages ? &captured : nullptr;
  StageRunner runner(calibration, store, context.items, capture);
  Progress progress(options.progress);
  const auto run = [&](Stage stage) {
    progress.Begin(stage.name, runner.Work(stage));
    clock.Time("stages", [&] {
      Within(stage.name, [&] { runner.Run(stage, result.stages, [&] { progress.Advance(); }); });
    });
  };
  const auto write = [&](const auto& body) {
    if (units) clock.Time("export", body);
  };
  run(text.Tables());
  run(text.Embeddings());
  if (config.text.HasPle()) run(text.PerLayerInputs());
  write([&] {
    text.WriteEmbeddingUnits(*units);
    if (config.text.HasPle()) text.WritePleUnits(*units);
  });
  const bool whole = WritesWholeModel(options, weights);
  for (int i = 0; i < config.text.NumLayers(); ++i) {
    run(text.Layer(i));
    write([&] { text.WriteLayerUnits(*units, i); });
    text.DropAfterLayer(i);
  }
  progress.Begin("logits", 2 * static_cast<int64_t>(context.items.size()));
  TextRun::HeadResult head = clock.Time("stages", [&] { return text.Head(capture, [&] { progress.Advance(); }); });
  write([&] {
    text.WriteHeadUnit(*units);
    if (whole) text.WriteModelUnit(*units);
  });
  progress.End();

  std::erase_if(result.stages, [](const StageError& error) { return error.accumulated.count == 0; });
  result.stages.push_back(head.error);
  result.output = head.error.accumulated;
  result.output_name = "logits";
  result.output_shape.assign(head.shape.Sizes().begin(), head.shape.Sizes().end());
  result.scatter = std::move(head.scatter);
  result.output_on_calibration_data = data.evaluation.empty();
  if (head.window_tokens > 0)
    result.perplexity = Perplexity{static_cast<int64_t>(data.windows.size()), head.window_tokens,
                                   std::exp(head.float_nll / head.window_tokens),
                                   std::exp(head.quantized_nll / head.window_tokens)};
  result.model = options.model.filename().empty() ? options.model.parent_path().filename().string()
                                                  : options.model.filename().string();
  result.recipe = calibration.GetRecipe().Name();
  result.dialect = dialect.name;
  result.calibration_samples = static_cast<int64_t>(data.calibration.size());
  result.evaluation_samples = static_cast<int64_t>(data.evaluation.size());
  result.random_data = data.random;
  result.skipped = data.skipped;
  result.points = static_cast<int64_t>(calibration.Params().Size());
  result.max_seq_len = context.max_seq_len;
  result.unknown_keys = config.unknown_keys;
  for (const UnusedTensor& tensor : weights.GetInventory().unused)
    result.unused_tensors.push_back(fmt::format("{}: {}", tensor.name, tensor.reason));
  if (units)
    for (const Unit& unit : units->Units()) result.units.push_back(unit.file);

  if (output) {
    clock.Time("export", [&] {
      units->WriteCodes();
      if (options.save_stages) WriteSafetensors(output->Directory() / "stages.safetensors", captured);
    });
    output->Finish(options, calibration, *units, result);
  }
  return result;
}

}  // namespace circlet
