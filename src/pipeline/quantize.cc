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
#include "pipeline/run_items.h"
#include "pipeline/text_run.h"
#include "pipeline/vision_run.h"

namespace circlet {
namespace {

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

QuantizeResult Quantize(const QuantizeOptions& asked) {
  QuantizeResult result;
  Clock clock(result.seconds);
  Recipe recipe = Recipe::Load(asked.recipe, asked.set);
  const QuantizeOptions options = WithRecipe(asked, recipe);
  if (!std::filesystem::is_directory(options.model))
    Fail("{}: is no directory; give a checkpoint directory with config.json and safetensors", options.model.string());
  const Gemma4Config config = ReadConfig(options.model);
  const Dialect& dialect = DialectFromName(options.dialect);
  RunData data = clock.Time("load", [&] { return LoadRunData(options, recipe, config); });
  const ModelWeights weights = clock.Time("load", [&] { return ModelWeights::Open(config, options.model); });

  Calibration calibration(std::move(recipe), dialect);
  if (!options.qparams.empty()) calibration.UseFrozen(ParameterStore::Load(options.qparams));
  ActivationStore store;
  RunContext context{.config = config, .weights = weights, .calibration = calibration, .store = store};
  MakeItems(data, options, context);
  ReleasePictures(data);
  TextRun text(context);
  std::vector<Point> points = text.Points();
  if (config.vision && !options.text_only)
    for (Point& point : VisionPoints(config, dialect)) points.push_back(std::move(point));
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
  StageRunner picture_runner(calibration, store, context.image_items, capture);
  Progress progress(options.progress);
  const auto run_with = [&](StageRunner& r, const Stage& stage) {
    progress.Begin(stage.name, r.Work(stage));
    clock.Time("stages", [&] {
      Within(stage.name, [&] { r.Run(stage, result.stages, [&] { progress.Advance(); }); });
    });
  };
  const auto run = [&](const Stage& stage) { run_with(runner, stage); };
  const auto write = [&](const auto& body) {
    if (units) clock.Time("export", body);
  };
  const std::optional<VisionProfile> profile = ExportedProfile(context);
  std::optional<VisionRun> vision;
  if (!context.images.empty()) {
    vision.emplace(context);
    const std::vector<Stage> stages = vision->Stages();
    for (size_t i = 0; i < stages.size(); ++i) {
      run_with(picture_runner, stages[i]);
      vision->DropAfter(i);
    }
  }
  run(text.Tables());
  run(text.Embeddings());
  if (config.text.HasPle()) run(text.PerLayerInputs());
  write([&] {
    text.WriteEmbeddingUnits(*units);
    if (config.text.HasPle()) text.WritePleUnits(*units);
  });
  const bool whole = WritesWholeModel(options, weights);
  if (vision)
    write([&] {
      using Granularity = ExportOptions::Granularity;
      const Granularity granularity = calibration.GetRecipe().export_options.vision;
      if (whole || granularity != Granularity::kMonolithic) vision->WriteSplitUnits(*units);
      if (whole || granularity != Granularity::kLayer) vision->WritePrefillUnit(*units);
      vision->WriteFusionUnit(*units);
      if (whole) vision->WritePartUnits(*units);
      calibration.DropWeights();
    });
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
    if (whole && vision) vision->WriteFullUnit(*units);
    if (profile) WriteJson(units->Directory() / "vision_profile.json", profile->ToJson());
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
  if (head.captions > 0) result.captions = Captions{head.captions, head.float_exact, head.quantized_exact};
  if (profile)
    result.vision_profile = fmt::format(
        "{}x{} patches, {} soft tokens from position {} ({})", profile->patch_grid_height, profile->patch_grid_width,
        profile->num_visual_tokens, profile->visual_start_idx,
        options.vision_profile.empty() ? "the most frequent of the calibration samples" : profile->name);
  result.pictures = static_cast<int64_t>(context.images.size());
  result.model = options.model.filename().empty() ? options.model.parent_path().filename().string()
                                                  : options.model.filename().string();
  result.recipe = calibration.GetRecipe().Name();
  result.output_directory = options.output.string();
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
