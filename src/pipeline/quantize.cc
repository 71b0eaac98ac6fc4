#include "circlet/pipeline/quantize.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <nlohmann/json.hpp>

#include "circlet/base/communicator.h"
#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "circlet/io/safetensors.h"
#include "circlet/preprocess/samples.h"
#include "circlet/report/terminal.h"
#include "ops/tally.h"
#include "pipeline/estimate.h"
#include "pipeline/gemma4/head.h"
#include "pipeline/manifest.h"
#include "pipeline/gemma4/items.h"
#include "pipeline/run_state.h"
#include "pipeline/gemma4/text_stages.h"
#include "pipeline/gemma4/vision_stages.h"

namespace circlet {
using namespace gemma4;
namespace {

double SecondsSince(std::chrono::steady_clock::time_point begin) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
}

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
      ~Stop() { clock.seconds_[phase] += SecondsSince(begin); }
    } stop{*this, phase};
    return body();
  }

 private:
  std::map<std::string, double>& seconds_;
};

// For activations of a run that writes nothing.
std::filesystem::path TemporaryDirectory() {
  std::error_code error;
  std::filesystem::path path = std::filesystem::temp_directory_path(error);
  if (error) {
    const char* set = std::getenv("TMPDIR");
    Fail("TMPDIR={}: cannot be used for activations: {}; set it to a directory with room", set != nullptr ? set : "/tmp",
         error.message());
  }
  return path;
}

// Where a directory that does not exist yet would be made.
std::filesystem::path NearestDirectory(std::filesystem::path path) {
  path = std::filesystem::absolute(path);
  while (!std::filesystem::exists(path)) path = path.parent_path();
  return path;
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

// Samples that several processes observe are merged, which an average over their order cannot be.
void CheckShareable(const Calibration& calibration, const std::vector<Point>& points) {
  for (const Point& point : points)
    if (calibration.OrderMatters(point))
      Fail(
          "{}: its EMA observer depends on the order of the samples and cannot be shared between processes; run one "
          "process, "
          "or choose minmax or percentile",
          point.name);
}

// Calls body(name) with each parameter that a step reads.
template <typename Body>
void ForWeights(const Step& step, const std::vector<Item>& items, const Body& body) {
  const Graph graph = step.build(items.front());
  for (const Value& value : graph.Values())
    if (value.kind == ValueKind::kWeight) body(value.name);
}

// A run from its options to its stages; everything cheap is checked here.
class Run {
 public:
  explicit Run(const QuantizeOptions& asked)
      : recipe_(Recipe::Load(asked.recipe, asked.set)),
        options_(WithRecipe(asked, recipe_)),
        world_(World()),
        clock_(result_.seconds),
        weights_(clock_.Time("load", [&] { return OpenWeights(options_); })),
        config_(weights_.GetConfig()),
        data_(clock_.Time("load", [&] { return LoadRunData(options_, recipe_, config_); })),
        calibration_(recipe_, DialectFromName(options_.dialect)),
        context_{.config = config_, .weights = weights_, .calibration = calibration_, .store = store_, .world = world_},
        text_(context_),
        whole_(WritesWholeModel(options_, weights_)) {
    if (options_.compute == Compute::kBf16 && !Bf16Supported())
      Fail("--compute bf16: takes a processor with AVX-512 BF16; leave it out");
    if (!options_.qparams.empty()) calibration_.UseFrozen(ParameterStore::Load(options_.qparams));
    MakeItems(data_, options_, context_);
    ReleasePictures(data_);
    if (config_.text.bidirectional_pictures && !context_.images.empty())
      Fail("{}: use_bidirectional_attention is \"vision\": text runs, but soft tokens of one picture would see each other, "
           "which circlet does not do; leave samples with pictures out with --text-only",
           (options_.model / "config.json").string());
    points_ = text_.Points();
    if (config_.vision && !options_.text_only)
      for (Point& point : VisionPoints(config_, calibration_.GetDialect())) points_.push_back(std::move(point));
    std::vector<std::string> names;
    for (const Point& point : points_) names.push_back(point.name);
    recipe_.CheckAllUsed(names);
    if (!options_.output.empty()) CheckExportable(calibration_, points_);
    if (world_.Size() > 1) {
      CheckShareable(calibration_, points_);
      if (options_.save_stages) Fail("--save-stages: takes one process; run without mpirun");
    }
    if (!context_.images.empty()) vision_.emplace(context_);
    if (const Item* repeated = Repeated(context_.items))
      result_.compute_change = ComputeChange{.sample = repeated->label};
    profile_ = ExportedProfile(context_);
    constexpr int64_t kShareOfLimit = 100;
    context_.head_slice_bytes = std::min(context_.head_slice_bytes, options_.memory_limit / kShareOfLimit);
    MakePhases();
    Estimate();
  }

  std::string DryRun() const;
  QuantizeResult Compute();

 private:
  // A stage, and what is written and forgotten behind it.
  struct Phase {
    std::string name;
    const std::vector<Item>* items = nullptr;
    std::optional<Stage> stage;   // none: the head
    std::function<void()> write;  // files; may be empty
    std::function<void()> drop;   // may be empty
  };

  static ModelWeights OpenWeights(const QuantizeOptions& options) {
    if (!std::filesystem::is_directory(options.model))
      Fail("{}: is no directory; give a checkpoint directory with config.json and safetensors", options.model.string());
    return ModelWeights::Open(ReadConfig(options.model), options.model, options.text_only);
  }

  void MakePhases();
  void WriteVisionUnits();
  void Estimate();
  int64_t NeededMemory() const;
  int64_t ActivationBudget() const;
  int64_t NeededDisk() const;
  StageContext ContextOf(const std::vector<Item>& items);
  std::function<PointSpec(const std::string&)> SpecsOfPoints() const;
  void TellStart(int64_t budget) const;
  void TellSaved(int done) const;
  void Prefetch(const Phase& phase) const;
  void RunPhase(const Phase& phase);
  void ShareChange();
  void FillResult();
  void FillUnused();

  QuantizeResult result_;
  Recipe recipe_;
  QuantizeOptions options_;
  Communicator& world_;
  Clock clock_;
  ModelWeights weights_;
  Gemma4Config config_;  // as the weights correct it
  RunData data_;
  Calibration calibration_;
  ActivationStore store_;
  RunContext context_;
  TextRun text_;
  bool whole_;
  std::vector<Point> points_;
  std::optional<VisionRun> vision_;
  std::optional<VisionProfile> profile_;
  std::vector<Phase> phases_;
  std::vector<StageEstimate> estimates_;
  std::optional<UnitWriter> units_;
  Captured captured_;
  std::optional<Progress> progress_;
  std::mutex progress_mutex_;
  std::optional<HeadResult> head_;
};

void Run::MakePhases() {
  const auto add = [&](const std::vector<Item>& items, std::optional<Stage> stage, std::function<void()> write = {},
                       std::function<void()> drop = {}) {
    phases_.push_back({stage ? stage->name : "logits", &items, std::move(stage), std::move(write), std::move(drop)});
  };
  if (vision_) {
    std::vector<Stage> stages = vision_->Stages();
    for (size_t i = 0; i < stages.size(); ++i)
      add(context_.image_items, std::move(stages[i]), {}, [this, i] { vision_->DropAfter(i); });
  }
  const bool ple = config_.text.HasPle();
  const auto write_inputs = [this, ple] {
    text_.WriteEmbeddingUnits(*units_);
    if (ple) text_.WritePleUnits(*units_);
    if (vision_) WriteVisionUnits();
  };
  const auto drop_pictures = [this] {
    if (vision_) vision_->DropAll();
  };
  add(context_.items, text_.Tables());
  if (ple) {
    add(context_.items, text_.Embeddings());
    add(context_.items, text_.PerLayerInputs(), write_inputs, drop_pictures);
  } else {
    add(context_.items, text_.Embeddings(), write_inputs, drop_pictures);
  }
  for (int i = 0; i < config_.text.NumLayers(); ++i)
    add(
        context_.items, text_.Layer(i), [this, i] { text_.WriteLayerUnits(*units_, i); },
        [this, i] { text_.DropAfterLayer(i); });
  add(context_.items, text_.Norm(), {}, [this] { text_.DropAfterNorm(); });
  add(context_.items, std::nullopt, [this] {
    text_.WriteHeadUnit(*units_);
    if (whole_) text_.WriteModelUnit(*units_);
    if (whole_ && vision_) vision_->WriteFullUnit(*units_);
    if (profile_) units_->WriteSettings("vision_profile.json", profile_->ToJson());
  });
}

void Run::WriteVisionUnits() {
  using Granularity = ExportOptions::Granularity;
  const Granularity granularity = recipe_.export_options.vision;
  if (whole_ || granularity != Granularity::kMonolithic) vision_->WriteSplitUnits(*units_);
  if (whole_ || granularity != Granularity::kLayer) vision_->WritePrefillUnit(*units_);
  vision_->WriteFusionUnit(*units_);
  if (whole_) vision_->WritePartUnits(*units_);
  calibration_.DropWeights();
}

void Run::Estimate() {
  for (const Phase& phase : phases_)
    estimates_.push_back(phase.stage ? EstimateStage(*phase.stage, *phase.items, world_.Rank())
                                     : EstimateHead(context_));
}

// Without the activations.
int64_t Run::NeededMemory() const {
  int64_t bytes = 0;
  for (const StageEstimate& estimate : estimates_) bytes = std::max(bytes, estimate.MemoryBytes());
  // The graph from ids and pixels to the last hidden state runs once in one piece.
  if (whole_ && vision_ && !options_.output.empty())
    for (const Parameter& parameter : Parameters(config_)) bytes += 4 * parameter.shape.Elements();
  return OwnMemoryBytes() + bytes;
}

// What a stage leaves of the limit. A tenth is for what is not counted: grids, plans, values that are compared, and the
// allocator's holes.
int64_t Run::ActivationBudget() const { return options_.memory_limit / 10 * 9 - NeededMemory(); }

int64_t Run::NeededDisk() const {
  const int64_t activations = ActivationBytes(context_);
  if (!options_.output.empty()) return OutputBytes(context_, whole_) + activations;
  return std::max<int64_t>(0, activations - std::max<int64_t>(0, ActivationBudget()));
}

std::string Run::DryRun() const {
  const double rate = MeasuredFlops();
  TextTable table({"stage", "weights", "working memory", "GFLOP", "seconds"});
  double flops = 0;
  for (const StageEstimate& estimate : estimates_) {
    flops += estimate.flops;
    table.Row({estimate.name, HumanBytes(estimate.weight_bytes), HumanBytes(estimate.working_bytes),
               fmt::format("{:.1f}", estimate.flops / 1e9), fmt::format("{:.1f}", estimate.flops / rate)});
  }
  const int64_t activations = ActivationBytes(context_), memory = NeededMemory();
  std::string text = table.ToString();
  text += fmt::format("time: products of {:.1f} TFLOP at {:.0f} GFLOP/s take {:.0f} s, a run up to 1.5 times that\n",
                      flops / 1e12, rate / 1e9, flops / rate);
  text += fmt::format("memory: {} for the largest stage, {} of activations, limit {}: {}\n", HumanBytes(memory),
                      HumanBytes(activations), HumanBytes(options_.memory_limit),
                      ActivationBudget() < 0             ? "too little, raise --memory-limit"
                      : activations > ActivationBudget() ? "what does not fit goes to files"
                                                         : "enough");
  if (options_.output.empty()) return text;
  const int64_t files = OutputBytes(context_, whole_);
  RequireFreeSpace(NearestDirectory(options_.output), files + activations);
  text += fmt::format("disk: {} of files, up to {} of activations until the run is over\n", HumanBytes(files),
                      HumanBytes(activations));
  return text;
}

StageContext Run::ContextOf(const std::vector<Item>& items) {
  return {calibration_,
          store_,
          items,
          options_.save_stages ? &captured_ : nullptr,
          world_,
          options_.compute,
          result_.compute_change ? &*result_.compute_change : nullptr,
          [this] {
            const std::lock_guard lock(progress_mutex_);
            progress_->Advance();
          }};
}

// Whole weights that the phase will read; of tables it takes rows.
void Run::Prefetch(const Phase& phase) const {
  if (!phase.stage || phase.items->empty()) return;
  for (const Step& step : phase.stage->steps)
    if (!step.own) ForWeights(step, *phase.items, [&](const std::string& name) { weights_.Prefetch(name); });
}

void Run::RunPhase(const Phase& phase) {
  const StageContext stage = ContextOf(*phase.items);
  clock_.Time("stages", [&] {
    if (phase.stage) {
      StageRunner runner(stage);
      progress_->Begin(phase.name, runner.Work(*phase.stage));
      Within(phase.name, [&] { runner.Run(*phase.stage, result_.stages); });
      if (!phase.items->empty())
        for (const Step& step : phase.stage->steps)
          ForWeights(step, *phase.items, [&](const std::string& name) { weights_.Release(name); });
    } else {
      progress_->Begin(phase.name, HeadWork(context_));
      head_ = Within(phase.name, [&] { return RunHead(context_, stage); });
    }
  });
  if (units_ && world_.Rank() == 0 && phase.write) clock_.Time("export", phase.write);
  if (phase.drop) phase.drop();
  calibration_.DropWeights();
}

QuantizeResult Run::Compute() {
  const auto begin = std::chrono::steady_clock::now();
  const bool writes = !options_.output.empty();
  const int64_t budget = ActivationBudget();
  if (budget < 0)
    Fail(
        "--memory-limit {}: the largest stage alone takes {} with a tenth to spare; give at least that, or shorter "
        "samples",
        HumanBytes(options_.memory_limit), HumanBytes(NeededMemory() / 9 * 10));
  if (options_.resume && options_.save_stages)
    Fail("--save-stages: values of finished stages are not saved; leave out --resume");
  std::optional<OutputRun> output;
  std::optional<RunState> state;
  result_.phases = static_cast<int>(phases_.size());
  std::optional<RunParts> parts;
  if (writes) {
    output.emplace(options_, data_.files, world_);
    const nlohmann::json identity = IdentityOf(options_, context_, output->Inputs());
    if (!output->Begin(identity)) {
      result_.done_already = true;
      result_.output_directory = options_.output.string();
      return std::move(result_);
    }
    RequireFreeSpace(output->Directory(), std::max<int64_t>(0, NeededDisk() - output->Bytes()));
    state.emplace(output->StateDirectory(), identity, options_.save_every, world_);
    store_.UseFiles(state->ValuesDirectory(), budget);
    units_.emplace(output->Directory(), calibration_, store_);
    parts.emplace(
        RunParts{calibration_, store_, *units_, result_.stages, head_, result_.compute_change, result_.seconds});
    result_.resumed_phases = state->Load(*parts, SpecsOfPoints(), result_.phases);
  } else {
    const std::filesystem::path directory = TemporaryDirectory();
    RequireFreeSpace(directory, NeededDisk());
    store_.UseFiles(directory, budget, ActivationStore::Files::kNameless);
  }
  TellStart(budget);
  progress_.emplace(world_.Rank() == 0 ? options_.progress : nullptr);
  gemm::Tally tally;
  std::optional<gemm::TallyScope> tallying;
  if (options_.timings) tallying.emplace(tally);
  for (int done = result_.resumed_phases; done < result_.phases; ++done) {
    if (done + 1 < result_.phases) Prefetch(phases_[done + 1]);
    RunPhase(phases_[done]);
    if (!state) continue;
    if (!state->Save(done + 1, *parts)) continue;
    output->Keep();
    TellSaved(done + 1);
  }
  progress_->End();
  tallying.reset();
  if (result_.compute_change) ShareChange();
  FillResult();
  weights_.GetCheckpoint().RequireUnchanged();
  world_.Barrier();
  if (output && world_.Rank() == 0) {
    clock_.Time("export", [&] {
      units_->WriteCodes();
      if (options_.save_stages) WriteSafetensors(output->Directory() / "stages.safetensors", captured_);
    });
    output->Finish(calibration_, *units_, result_);
  }
  const double run_seconds = SecondsSince(begin);
  if (options_.timings)
    result_.products = ProductTimes{.flops = static_cast<double>(tally.Flops()),
                                    .alone_seconds = gemm::SecondsAlone(tally),
                                    .run_seconds = run_seconds};
  return std::move(result_);
}

void Run::TellSaved(int done) const {
  if (options_.saved) options_.saved(phases_[done - 1].name, done, result_.phases);
}

void Run::TellStart(int64_t budget) const {
  if (result_.resumed_phases > 0) TellSaved(result_.resumed_phases);
  if (options_.progress == nullptr || world_.Rank() != 0) return;
  if (options_.resume && result_.resumed_phases == 0)
    fmt::print(options_.progress, "{}: no saved state to go on from, the run starts at its beginning\n",
               options_.output.string());
  if (result_.resumed_phases > 0)
    fmt::print(options_.progress, "going on behind {}: {} of {} stages are done\n",
               phases_[result_.resumed_phases - 1].name, result_.resumed_phases, result_.phases);
  if (const int64_t activations = ActivationBytes(context_); activations > budget)
    fmt::print(options_.progress, "activations of {} pass the memory limit by {}, which goes to files\n",
               HumanBytes(activations), HumanBytes(activations - budget));
}

std::function<PointSpec(const std::string&)> Run::SpecsOfPoints() const {
  std::map<std::string, PointSpec> specs;
  for (const Point& point : points_) specs[point.name] = recipe_.SpecFor(point, calibration_.GetDialect());
  return [specs = std::move(specs)](const std::string& point) {
    const auto it = specs.find(point);
    if (it == specs.end()) Fail("{}: is no point of this run; start again with --force", point);
    return it->second;
  };
}

// One process has it.
void Run::ShareChange() {
  const std::vector<std::string> all = world_.AllGather(SaveChange(*result_.compute_change).dump());
  result_.compute_change = RestoreChange(nlohmann::json::parse(all[Repeated(context_.items)->rank]));
}

// What the run did not use or had to assume. Of parts that do not run, one line is enough on the terminal.
void Run::FillUnused() {
  const Inventory& inventory = weights_.GetInventory();
  result_.notes = inventory.notes;
  result_.unknown_keys = config_.unknown_keys;
  std::vector<std::string> keys, tensors;
  for (const std::string& key : config_.unknown_keys)
    if (vision_ || !key.starts_with("vision_config.")) keys.push_back(key);
  for (const UnusedTensor& tensor : inventory.unused) {
    result_.unused_tensors.push_back(fmt::format("{}: {}", tensor.name, tensor.reason));
    if (!IsVisionTensor(tensor.name) && !IsAudioTensor(tensor.name)) tensors.push_back(tensor.name);
  }
  if (config_.vision && !vision_) {
    const char* const why = options_.text_only ? "--text-only" : "no sample has a picture";
    result_.notes.push_back(fmt::format("vision units are left out: {}", why));
    if (!options_.text_only)
      for (const auto& [canonical, stored] : inventory.name_in_checkpoint)
        if (IsVisionTensor(canonical)) result_.unused_tensors.push_back(fmt::format("{}: vision tower: {}", stored, why));
  }
  const auto note = [&](const std::vector<std::string>& names, const char* what, const char* list) {
    constexpr size_t kNamed = 3;
    if (names.empty()) return;
    std::vector<std::string> first;
    for (const std::string& name : std::span(names).first(std::min(names.size(), kNamed))) first.push_back(Shortened(name));
    result_.notes.push_back(fmt::format("{} that are not used: {}, {}{} (all: {} of the JSON report)", what, names.size(),
                                        fmt::join(first, ", "), names.size() > kNamed ? " ..." : "", list));
  };
  note(keys, "keys of config.json", "unknown_config_keys");
  note(tensors, "stored tensors", "unused_tensors");
}

void Run::FillResult() {
  std::erase_if(result_.stages, [](const StageError& error) { return error.accumulated.count == 0; });
  result_.stages.push_back(head_->error);
  result_.output = head_->error.accumulated;
  result_.output_name = "logits";
  result_.output_shape.assign(head_->shape.Sizes().begin(), head_->shape.Sizes().end());
  result_.scatter = std::move(head_->scatter);
  result_.output_on_calibration_data = data_.evaluation.empty();
  if (head_->window_tokens > 0)
    result_.perplexity = Perplexity{static_cast<int64_t>(data_.windows.size()), head_->window_tokens,
                                    std::exp(head_->float_nll / head_->window_tokens),
                                    std::exp(head_->quantized_nll / head_->window_tokens)};
  if (head_->captions > 0) result_.captions = Captions{head_->captions, head_->float_exact, head_->quantized_exact};
  if (profile_)
    result_.vision_profile =
        fmt::format("{}x{} patches, {} soft tokens from position {} ({})", profile_->patch_grid_height,
                    profile_->patch_grid_width, profile_->num_visual_tokens, profile_->visual_start_idx,
                    options_.vision_profile.empty() ? "the most frequent of the calibration samples" : profile_->name);
  result_.pictures = static_cast<int64_t>(context_.images.size());
  result_.model = options_.model.filename().empty() ? options_.model.parent_path().filename().string()
                                                    : options_.model.filename().string();
  result_.recipe = recipe_.Name();
  result_.output_directory = options_.output.string();
  result_.dialect = calibration_.GetDialect().name;
  result_.calibration_samples = static_cast<int64_t>(data_.calibration.size());
  result_.evaluation_samples = static_cast<int64_t>(data_.evaluation.size());
  result_.random_data = data_.random;
  result_.skipped = data_.skipped;
  result_.shortened = data_.shortened;
  result_.dated = data_.dated;
  result_.points = static_cast<int64_t>(calibration_.Params().Size());
  result_.max_seq_len = context_.max_seq_len;
  FillUnused();
  if (units_)
    for (const Unit& unit : units_->Units()) result_.units.push_back(unit.file);
  result_.spilled_bytes = store_.SpilledBytes();
}

}  // namespace

QuantizeResult Quantize(const QuantizeOptions& options) {
  if (options.resume && options.force)
    Fail("--resume goes on with an unfinished run, --force starts again: give one of them");
  return Run(options).Compute();
}

std::string DryRun(const QuantizeOptions& options) { return Run(options).DryRun(); }

}  // namespace circlet
