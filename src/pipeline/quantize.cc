#include "pipeline/quantize.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdlib>
#include <mutex>
#include <nlohmann/json.hpp>
#include <optional>
#include <set>

#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/quant/affine.h"
#include "circlet/report/terminal.h"
#include "ops/codes.h"
#include "ops/tally.h"
#include "pipeline/estimate.h"
#include "pipeline/manifest.h"
#include "pipeline/run_state.h"
#include "pipeline/schedule.h"
#include "pipeline/stage.h"
#include "pipeline/step_rounding.h"
#include "pipeline/units.h"

namespace circlet {
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
      double outer_inside = std::exchange(clock.inside_, 0);
      std::chrono::steady_clock::time_point begin = std::chrono::steady_clock::now();
      ~Stop() {
        const double seconds = SecondsSince(begin);
        clock.seconds_[phase] += seconds - clock.inside_;
        clock.inside_ = outer_inside + seconds;
      }
    } stop{*this, phase};
    return body();
  }

 private:
  std::map<std::string, double>& seconds_;
  double inside_ = 0;  // of phases inside the running one
};

// A size as people give it: "10 MB" where that is exact.
std::string AskedBytes(int64_t bytes) {
  for (const auto& [unit, name] : {std::pair(int64_t{1'000'000'000}, "GB"), std::pair(int64_t{1'000'000}, "MB")})
    if (bytes % unit == 0) return fmt::format("{} {}", bytes / unit, name);
  return HumanBytes(bytes);
}

// Where a directory that does not exist yet would be made.
std::filesystem::path NearestDirectory(std::filesystem::path path) {
  path = std::filesystem::absolute(path);
  while (!std::filesystem::exists(path)) path = path.parent_path();
  return path;
}

// What cannot be exported is said before anything is computed.
void CheckExportable(const Calibration& calibration, const std::vector<Point>& points) {
  for (const Point& point : points) {
    const PointSpec spec = calibration.SpecFor(point);
    if (spec.kind == QuantKind::kMx)
      Fail(
          "{}: MX formats are simulated only, a Circle file cannot hold them; set the point to an integer type, or use "
          "evaluate",
          point.name);
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
void ForWeights(const Step& step, const ItemSet& items, const Body& body) {
  if (items.Empty()) return;
  const Graph graph = step.build(items[0]);
  for (const Value& value : graph.Values())
    if (value.kind == ValueKind::kWeight) body(value.name);
}

}  // namespace

Schedule ScheduleOf(std::span<const PhaseSpec> phases, const RunSettings& settings, const Calibration& calibration) {
  const bool writes = settings.Writes() && settings.world.Rank() == 0;
  std::vector<PhaseFlow> flows;
  for (const PhaseSpec& phase : phases) flows.push_back(FlowOf(phase, settings.world.Rank(), writes));
  if (writes) AddCodes(phases, calibration, flows);
  return Schedule(std::move(flows));
}

namespace {

// What is checked before anything is computed.
void CheckPoints(const RunSettings& settings, ModelJob& job) {
  settings.recipe.CheckAllUsed(job.Points());
  if (settings.Writes()) CheckExportable(job.GetCalibration(), job.Points());
  if (settings.world.Size() == 1) return;
  CheckShareable(job.GetCalibration(), job.Points());
  if (settings.options.save_stages) Fail("--save-stages: takes one process; run without mpirun");
}

// Of one process: the phases of a job, one after the other.
class Run {
 public:
  Run(const RunSettings& settings, ModelJob& job, SolvedWeights* solved = nullptr)
      : settings_(settings), job_(job), solved_(solved) {
    CheckPoints(settings, job);
    Declare();
  }

  std::string DryRun() const;
  QuantizeResult Compute();

 private:
  void Declare();
  void Prepare(const std::filesystem::path& directory, const RunState* state);
  int64_t WatchedBytes(const PhaseSpec& phase) const;
  void RequireMemory() const;
  int64_t NeededMemory(int64_t (StageEstimate::*bytes_of)() const = &StageEstimate::MemoryBytes) const;
  int64_t ActivationBudget() const;
  int64_t StoreBudget() const;
  int64_t ActivationBytes() const;
  int64_t NeededDisk() const;
  std::function<PointSpec(const std::string&)> SpecsOfPoints() const;
  void TellStart(int64_t budget) const;
  void TellSaved(int done) const;
  void Prefetch(const PhaseSpec& phase) const;
  void RunPhases(RunState* state, RunParts* parts, OutputRun* output);
  void RunPhase(int number);
  void MeasureSecondRounding(const std::string& name, const WeightSource& stored, const RoundedWeights& rounded);
  void ShareChange();
  void Describe(QuantizeResult& result) const;
  void FillResult();

  const RunSettings& settings_;
  ModelJob& job_;
  SolvedWeights* solved_;  // null: nobody asks for them
  std::vector<PhaseSpec> phases_;  // emptied behind each: what it alone holds goes with it
  Schedule schedule_{{}};
  std::vector<StageEstimate> estimates_;
  std::optional<gemm::Tally> plain_products_;  // with timings, of a run that rounds with moments
  std::set<int> verification_{kCodesItem};  // items whose values units read
  ActivationStore store_;
  QuantizeResult result_;
  std::optional<UnitWriter> units_;
  std::optional<HeadResult> head_;
  std::optional<Captured> captured_;
  std::optional<Progress> progress_;
};

// What the watcher takes beside the phase. Slices of an output stage, it captures at most as often as they stand there.
int64_t Run::WatchedBytes(const PhaseSpec& phase) const {
  if (phase.output) return estimates_.back().working_bytes;
  int64_t bytes = 0;
  for (const Step& step : phase.stage.steps)
    for (const Item& item : *phase.items)
      if (phase.items->PassageOf(item).measured)
        bytes = std::max(bytes, settings_.watcher->Bytes(step.build(item)));
  return bytes;
}

void Run::Declare() {
  phases_ = job_.Phases();
  schedule_ = ScheduleOf(phases_, settings_, job_.GetCalibration());
  estimates_.clear();
  if (settings_.options.timings && job_.GetCalibration().GetRecipe().rounding) plain_products_.emplace();
  for (const PhaseSpec& phase : phases_) {
    estimates_.push_back(phase.output ? phase.output->Estimate()
                                      : EstimateStage(phase.stage, *phase.items, settings_.world.Rank()));
    AddRounding(phase.stage, *phase.items, job_.GetCalibration(), settings_.world.Rank(), estimates_.back());
    if (settings_.watcher != nullptr) estimates_.back().working_bytes += WatchedBytes(phase);
    if (plain_products_)
      AddPlainProducts(phase.stage, *phase.items, job_.GetCalibration(), settings_.world.Rank(), *plain_products_);
    for (const Item& item : *phase.items)
      if (phase.items->PassageOf(item).exported) verification_.insert(item.id);
  }
  result_.phases = static_cast<int>(phases_.size());
}

// What phases depend on, computed once for a run and all that go on with it.
void Run::Prepare(const std::filesystem::path& directory, const RunState* state) {
  if (!job_.NeedsPreparation()) return;
  Clock clock(result_.seconds);
  const nlohmann::json saved = state != nullptr ? state->LoadPreparation() : nlohmann::json();
  const nlohmann::json made = clock.Time("preparation", [&] {
    return job_.Prepare(saved, {.directory = directory,
                                .memory_bytes = ActivationBudget(),
                                .progress = settings_.world.Rank() == 0 ? settings_.options.progress : nullptr});
  });
  if (state != nullptr && saved.is_null()) state->SavePreparation(made);
  Declare();
  RequireMemory();
}

void Run::RequireMemory() const {
  if (ActivationBudget() >= 0) return;
  Fail(
      "--memory-limit {}: the largest stage alone takes {} with a tenth to spare; give at least that, or shorter "
      "samples",
      AskedBytes(settings_.options.memory_limit), HumanBytes(NeededMemory() / 9 * 10));
}

// Without the activations, of the stage that needs most by `bytes_of`.
int64_t Run::NeededMemory(int64_t (StageEstimate::*bytes_of)() const) const {
  int64_t bytes = 0;
  for (const StageEstimate& estimate : estimates_) bytes = std::max(bytes, (estimate.*bytes_of)());
  if (settings_.Writes()) bytes += job_.WholeGraphBytes();
  return OwnMemoryBytes() + bytes;
}

// At most at a time in the store. The bound of the schedule and that of the roundings are taken at different stages.
int64_t Run::ActivationBytes() const {
  int64_t waiting = 0;
  for (const StageEstimate& estimate : estimates_) waiting = std::max(waiting, estimate.waiting_bytes);
  return schedule_.PeakBytes() + waiting;
}

// What a stage leaves of the limit. A tenth is for what is not counted: grids, plans, values that are compared, and the
// allocator's holes.
int64_t Run::ActivationBudget() const { return settings_.options.memory_limit / 10 * 9 - NeededMemory(); }

// The same while weights are not being rounded: rounding sets aside what it takes.
int64_t Run::StoreBudget() const {
  return settings_.options.memory_limit / 10 * 9 - NeededMemory(&StageEstimate::RunningBytes);
}

int64_t Run::NeededDisk() const {
  const int64_t activations = ActivationBytes();
  if (settings_.Writes()) return FilesBytes(phases_, job_.GetCalibration()) + activations;
  return std::max<int64_t>(0, activations - std::max<int64_t>(0, ActivationBudget()));
}

std::string Run::DryRun() const {
  if (settings_.Writes()) OutputDirectory::Check(settings_.options.output, ModeOf(settings_.options));
  const double rate = MeasuredFlops();
  TextTable table({"stage", "weights", "working memory", "GFLOP", "seconds"});
  double flops = 0;
  for (const StageEstimate& estimate : estimates_) {
    flops += estimate.flops;
    table.Row({estimate.name, HumanBytes(estimate.weight_bytes),
               HumanBytes(std::max(estimate.working_bytes, estimate.rounding_bytes)),
               fmt::format("{:.1f}", estimate.flops / 1e9), fmt::format("{:.1f}", estimate.flops / rate)});
  }
  const int64_t activations = ActivationBytes(), memory = NeededMemory();
  QuantizeResult described;
  Describe(described);
  std::string text = table.ToString() + NotesText(described) + job_.PreparationText();
  text += fmt::format(
      "time: products of {:.1f} TFLOP at {:.0f} GFLOP/s (--threads {}) take {:.0f} s, a run up to 1.5 times that\n",
      flops / 1e12, rate / 1e9, Threads(), flops / rate);
  text += fmt::format("memory: {} for the largest stage, {} of activations, limit {}: {}\n", HumanBytes(memory),
                      HumanBytes(activations), AskedBytes(settings_.options.memory_limit),
                      ActivationBudget() < 0             ? "too little, raise --memory-limit"
                      : activations > ActivationBudget() ? "what does not fit goes to files"
                                                         : "enough");
  if (!settings_.Writes()) return text;
  const int64_t files = FilesBytes(phases_, job_.GetCalibration());
  RequireFreeSpace(NearestDirectory(settings_.options.output), files + activations);
  text += fmt::format("disk: {} of files, up to {} of activations until the run is over\n", HumanBytes(files),
                      HumanBytes(activations));
  return text;
}

// Whole weights that the phase will read; of tables it takes rows.
void Run::Prefetch(const PhaseSpec& phase) const {
  for (const Step& step : phase.stage.steps)
    if (!step.own) ForWeights(step, *phase.items, [&](const std::string& name) { job_.Prefetch(name); });
}

void Run::RunPhase(int number) {
  PhaseSpec& phase = phases_[number];
  Clock clock(result_.seconds);
  Calibration& calibration = job_.GetCalibration();
  const bool writes = units_ && settings_.world.Rank() == 0;
  const WeightSource stored = job_.Stored();
  using Use = RoundedWeights::Use;
  const RoundedWeights rounded(calibration, stored, writes ? Use::kProductsAndFiles : Use::kProducts,
                               [this](const std::string& parameter) {
                                 const std::string key = CodesKey(parameter);
                                 if (store_.Has(kCodesItem, Chain::kQuant, key))
                                   return store_.Get(kCodesItem, Chain::kQuant, key);
                                 return units_ ? units_->WrittenCodes(parameter) : Tensor();
                               });
  const auto write = [&](bool first) {
    if (!writes) return;
    clock.Time("export", [&] {
      for (const UnitSpec& unit : phase.units) {
        if (unit.written_first != first) continue;
        progress_->Say("writing " + unit.name);
        units_->Write(unit, rounded);
      }
    });
  };
  std::mutex progress_mutex;
  const StageContext context{.calibration = calibration,
                             .store = store_,
                             .items = *phase.items,
                             .stored = stored,
                             .rounded = rounded,
                             .captured = captured_ ? &*captured_ : nullptr,
                             .world = settings_.world,
                             .compute = settings_.options.compute,
                             .change = result_.compute_change ? &*result_.compute_change : nullptr,
                             .frozen = [&] { write(/*first=*/true); },
                             .advance =
                                 [&] {
                                   const std::lock_guard lock(progress_mutex);
                                   progress_->Advance();
                                 },
                             .say = [&](const std::string& what) { progress_->Say(what); },
                             .linears = &result_.linears,
                             .watcher = settings_.watcher};
  clock.Time("stages", [&] {
    if (phase.output) {
      progress_->Begin(phase.name, phase.output->Work());
      head_ = Within(phase.name, [&] { return phase.output->Run(context); });
      return;
    }
    StageRunner runner(context);
    progress_->Begin(phase.name, runner.Work(phase.stage));
    const size_t before = result_.linears.size();
    Within(phase.name, [&] { runner.Run(phase.stage, result_.stages); });
    if (solved_ != nullptr)
      for (const RoundedLinear& linear : std::span(result_.linears).subspan(before))
        (*solved_)[linear.name] = rounded(linear.name);
    for (const Step& step : phase.stage.steps)
      if (!step.own)
        ForWeights(step, *phase.items, [&](const std::string& name) { MeasureSecondRounding(name, stored, rounded); });
    for (const Step& step : phase.stage.steps)
      ForWeights(step, *phase.items, [&](const std::string& name) { job_.Release(name); });
  });
  write(/*first=*/false);
  if (writes)
    clock.Time("export", [&] {
      for (const UnitSpec& unit : phase.units) units_->Remember(unit, rounded);
      for (const auto& [name, write] : phase.files) units_->WriteFile(name, write);
      for (const std::string& parameter : schedule_.CodesMadeIn(number))
        store_.Put(kCodesItem, Chain::kQuant, CodesKey(parameter), rounded.Codes(parameter),
                   ActivationStore::Read::kLate);
    });
  result_.own_bytes = std::max(result_.own_bytes, OwnMemoryBytes());
  for (const Schedule::Drop& drop : schedule_.After(number))
    store_.Drop(drop.key, drop.keeps_verification ? verification_ : std::set<int>{});
  phase = {.name = phase.name};
}

// By how much a weight that lay on a grid before moves to its new one.
void Run::MeasureSecondRounding(const std::string& name, const WeightSource& stored, const RoundedWeights& rounded) {
  const std::string form = job_.RoundedBefore(name);
  if (form.empty()) return;
  const Tensor before = stored(name), after = rounded(name);
  double changed = 0, all = 0;
  std::mutex mutex;
  std::map<int64_t, std::pair<double, double>> parts;  // summed in order, whatever thread made them
  VisitWeight(before, [&](std::span<const float> values, int64_t first) {
    std::vector<float> now(values.size());
    if (IsInteger(after.GetDType())) {
      Dequantize(after, *after.Grid(), first, now);
    } else {
      std::copy_n(after.F32().begin() + first, now.size(), now.begin());
    }
    std::pair<double, double> part;
    for (size_t i = 0; i < now.size(); ++i) {
      part.first += std::pow(double{now[i]} - values[i], 2);
      part.second += std::pow(double{values[i]}, 2);
    }
    const std::lock_guard lock(mutex);
    parts[first] = part;
  });
  for (const auto& [first, part] : parts) {
    changed += part.first;
    all += part.second;
  }
  result_.second_roundings.push_back({name, form, all > 0 ? std::sqrt(changed / all) : 0});
}

void Run::RunPhases(RunState* state, RunParts* parts, OutputRun* output) {
  constexpr double kFlopsPerByte = 50;  // what a weight's byte costs to read, round and write, in terms of products
  progress_.emplace(settings_.world.Rank() == 0 ? settings_.options.progress : nullptr);
  std::vector<double> costs;
  for (const StageEstimate& estimate : estimates_)
    costs.push_back(estimate.flops + kFlopsPerByte * static_cast<double>(estimate.weight_bytes));
  progress_->Plan(std::move(costs), result_.resumed_phases);
  for (int done = result_.resumed_phases; done < result_.phases; ++done) {
    if (done + 1 < result_.phases) Prefetch(phases_[done + 1]);
    RunPhase(done);
    if (state != nullptr && state->Save(done + 1, *parts)) {
      output->Keep();
      TellSaved(done + 1);
    }
    const QuantizeOptions& options = settings_.options;
    if (options.on_progress && !options.on_progress({phases_[done].name, done + 1, result_.phases, progress_->Done(),
                                                     progress_->SecondsLeft()}))
      Fail("stopped by the caller after {}, {} of {} stages", phases_[done].name, done + 1, result_.phases);
  }
  progress_->End();
}

QuantizeResult Run::Compute() {
  const auto begin = std::chrono::steady_clock::now();
  const QuantizeOptions& options = settings_.options;
  Calibration& calibration = job_.GetCalibration();
  RequireMemory();
  if (options.resume && options.save_stages)
    Fail("--save-stages: values of finished stages are not saved; leave out --resume");
  if (options.save_stages) captured_.emplace();
  if (const Item* repeated = job_.Repeated()) result_.compute_change = ComputeChange{.sample = repeated->label};
  std::optional<OutputRun> output;
  std::optional<RunState> state;
  std::optional<RunParts> parts;
  if (settings_.Writes()) {
    output.emplace(options, job_.Files(), settings_.world);
    const nlohmann::json identity =
        IdentityOf(options, settings_.recipe, settings_.world.Size(), job_.SamplesHash(), output->Inputs());
    if (!output->Begin(identity)) {
      result_.done_already = true;
      result_.output_directory = options.output.string();
      return std::move(result_);
    }
    RequireFreeSpace(output->Directory(), std::max<int64_t>(0, NeededDisk() - output->Bytes()));
    state.emplace(output->StateDirectory(), identity, options.save_every, settings_.world);
    Prepare(output->StateDirectory(), &*state);
    store_.UseFiles(state->ValuesDirectory(), StoreBudget());
    units_.emplace(output->Directory(), calibration, store_);
    parts.emplace(RunParts{calibration, store_, *units_, result_.stages, result_.linears, result_.second_roundings,
                           head_, result_.compute_change, result_.seconds});
    result_.resumed_phases = state->Load(*parts, SpecsOfPoints(), result_.phases);
  } else {
    const std::filesystem::path directory = TemporaryDirectory();
    RequireFreeSpace(directory, NeededDisk());
    Prepare(directory, nullptr);
    store_.UseFiles(directory, StoreBudget(), ActivationStore::Files::kNameless);
  }
  TellStart(ActivationBudget());
  gemm::Tally tally;
  {
    std::optional<gemm::TallyScope> tallying;
    if (options.timings) tallying.emplace(tally);
    RunPhases(state ? &*state : nullptr, parts ? &*parts : nullptr, output ? &*output : nullptr);
  }
  if (result_.compute_change) ShareChange();
  FillResult();
  job_.RequireUnchanged();
  settings_.world.Barrier();
  if (output && settings_.world.Rank() == 0) {
    Clock(result_.seconds).Time("export", [&] {
      units_->WriteCodes();
      if (captured_) WriteSafetensors(output->Directory() / "stages.safetensors", captured_->Values());
    });
    std::vector<std::string> names;
    for (const Unit& unit : units_->Units()) names.push_back(unit.file.name);
    output->Finish(settings_.file, calibration, units_->Pipeline(job_.Contract(names)), *units_, result_);
  }
  const double run_seconds = SecondsSince(begin);
  if (options.timings)
    result_.products = ProductTimes{.flops = static_cast<double>(tally.Flops()),
                                    .alone_seconds = gemm::SecondsAlone(tally),
                                    .run_seconds = run_seconds};
  if (options.timings && plain_products_) {
    result_.products->plain_flops = static_cast<double>(plain_products_->Flops());
    result_.products->plain_seconds = gemm::SecondsAlone(*plain_products_);
  }
  return std::move(result_);
}

void Run::TellSaved(int done) const {
  const QuantizeOptions& options = settings_.options;
  if (options.saved) options.saved(phases_[done - 1].name, done, result_.phases);
}

void Run::TellStart(int64_t budget) const {
  if (result_.resumed_phases > 0) TellSaved(result_.resumed_phases);
  std::FILE* const progress = settings_.options.progress;
  if (progress == nullptr || settings_.world.Rank() != 0) return;
  if (settings_.options.resume && result_.resumed_phases == 0)
    fmt::print(progress, "{}: no saved state to go on from, the run starts at its beginning\n",
               settings_.options.output.string());
  if (result_.resumed_phases > 0)
    fmt::print(progress, "going on after {}: {} of {} stages are done\n", phases_[result_.resumed_phases - 1].name,
               result_.resumed_phases, result_.phases);
  if (const int64_t activations = ActivationBytes(); activations > budget)
    fmt::print(progress, "activations of {} pass the memory limit by {}, which goes to files\n",
               HumanBytes(activations), HumanBytes(activations - budget));
}

std::function<PointSpec(const std::string&)> Run::SpecsOfPoints() const {
  std::map<std::string, PointSpec> specs;
  for (const Point& point : job_.Points()) specs[point.name] = job_.GetCalibration().SpecFor(point);
  return [specs = std::move(specs)](const std::string& point) {
    const auto it = specs.find(point);
    if (it == specs.end()) Fail("{}: is no point of this run; start again with --force", point);
    return it->second;
  };
}

// One process has it.
void Run::ShareChange() {
  const std::vector<std::string> all = settings_.world.AllGather(SaveChange(*result_.compute_change).dump());
  result_.compute_change = RestoreChange(nlohmann::json::parse(all[job_.Repeated()->rank]));
}

void Run::FillResult() {
  std::erase_if(result_.stages, [](const StageError& error) { return error.accumulated.count == 0; });
  result_.stages.push_back(head_->error);
  result_.output = head_->error.accumulated;
  result_.output_by_position = head_->error.accumulated_by_position;
  result_.output_name = "logits";
  result_.output_shape.assign(head_->shape.Sizes().begin(), head_->shape.Sizes().end());
  result_.scatter = std::move(head_->scatter);
  result_.perplexity = head_->perplexity;
  result_.agreement = head_->agreement;
  result_.captions = head_->captions;
  result_.recipe = settings_.recipe.Name();
  if (const Calibration& calibration = job_.GetCalibration(); calibration.Frozen())
    result_.grids = FrozenGrids{settings_.options.qparams.filename().string(), calibration.Params().RecipeName()};
  result_.output_directory = settings_.options.output.string();
  result_.dialect = job_.GetCalibration().GetDialect().name;
  result_.points = static_cast<int64_t>(job_.GetCalibration().Params().Size());
  if (units_)
    for (const Unit& unit : units_->Units()) result_.units.push_back(unit.file);
  result_.spilled_bytes = store_.SpilledBytes();
  result_.activation_bytes = store_.PeakBytes();
  result_.memory_limit = settings_.options.memory_limit;
  Describe(result_);
  if (settings_.recipe.rounding && settings_.options.qparams.empty() && result_.linears.empty())
    result_.notes.push_back(
        fmt::format("{}: its gptq stage has rounded nothing: no linear's weight has up to 8 bits and a grid a row",
                    settings_.recipe.Name()));
}

// What is known before anything is computed.
void Run::Describe(QuantizeResult& result) const {
  job_.Describe(result);
  std::ranges::move(settings_.recipe.Cautions(), std::back_inserter(result.notes));
  if (!settings_.recipe.quantizes)
    result.notes.push_back(
        fmt::format("{}: its pipeline has no ptq stage; every point is int16", settings_.recipe.Name()));
}

QuantizeOptions WithSettings(QuantizeOptions options, Settings& settings) {
  if (options.model.empty()) options.model = settings.model.name_or_path;
  if (options.model.empty()) Fail("no checkpoint: give MODEL_DIR, or model.name_or_path in the recipe");
  if (options.output.empty() && options.exports) options.output = settings.export_options.output_dir;
  if (options.output.empty() && options.exports)
    Fail("no output directory: give --output, or export.output_dir in the recipe");
  if (!options.max_seq_len) options.max_seq_len = settings.export_options.max_seq_len;
  if (!options.max_seq_len) options.max_seq_len = settings.model_args.max_seq;
  if (!options.max_seq_len) options.max_seq_len = settings.calibration.seq_len;
  if (!options.widen.empty()) settings.recipe.widen = WideningOption::Parse(options.widen, "--widen");
  if (options.random_images > 0 && options.random_samples.empty())
    Fail("--random-images: goes with --random-samples; pictures of one's own come with --data or --samples");
  if (settings.evaluation.enabled && settings.evaluation.perplexity.enabled && options.eval_text.empty())
    options.eval_text = settings.evaluation.perplexity.dataset;
  if (options.eval_windows && options.eval_text.empty()) Fail("--eval-windows: has no effect without --eval-text");
  if (options.text_only && !options.eval_captions.empty())
    Fail("--text-only: leaves pictures out, --eval-captions needs them; leave out one of the two");
  if (options.text_only && !options.vision_profile.empty()) Fail("--vision-profile: has no effect with --text-only");
  if (options.text_only && options.random_images > 0) Fail("--random-images: has no effect with --text-only");
  if (settings.evaluation.enabled && settings.evaluation.captions && options.eval_captions.empty())
    Fail("evaluation.coco: circlet downloads nothing; give the pictures and captions with --eval-captions FILE.jsonl");
  return options;
}

}  // namespace

std::filesystem::path TemporaryDirectory() {
  std::error_code error;
  std::filesystem::path path = std::filesystem::temp_directory_path(error);
  if (error) {
    const char* set = std::getenv("TMPDIR");
    Fail("TMPDIR={}: cannot be used for activations and pictures: {}; set it to a directory with room",
         set != nullptr ? set : "/tmp", error.message());
  }
  return path;
}

RunSettings::RunSettings(const QuantizeOptions& asked)
    : file(Settings::Load(asked.recipe, asked.set)), options(WithSettings(asked, file)), world(World()) {
  if (options.elsewhere_float) {
    if (options.exports || Writes())
      Fail(
          "--elsewhere float: is a measurement of the reference's arithmetic, no files are written of it; use "
          "evaluate");
    BuilderSpecs& specs = file.recipe.specs;
    specs.activation = specs.weight = QuantSpec::None();
    specs.linear_weight = specs.embedding_weight = specs.lm_head_weight = specs.vision_patch_embed_weight =
        specs.norm_weight = QuantSpec::None();
  }
  if (file.recipe.rounding && !options.qparams.empty())
    Fail("--qparams: the file has grids, recipe {} also makes codes, which takes calibration; leave one of them out",
         file.recipe.Name());
  if (options.compute == Compute::kBf16 && !Bf16Supported())
    Fail("--compute bf16: takes a processor with AVX-512 BF16; leave it out");
}

QuantizeResult RunJob(const RunSettings& settings, ModelJob& job, SolvedWeights* solved) {
  return Run(settings, job, solved).Compute();
}

std::string DryRunJob(const RunSettings& settings, ModelJob& job) { return Run(settings, job).DryRun(); }

}  // namespace circlet
