#include "pipeline/gemma4/job.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "circlet/io/safetensors.h"
#include "circlet/model/gemma4/widening.h"
#include "pipeline/gemma4/contract.h"
#include "pipeline/gemma4/items.h"
#include "pipeline/gemma4/stream.h"
#include "pipeline/gemma4/verification.h"
#include "pipeline/stored_codes.h"

namespace circlet::gemma4 {
namespace {

// How a name of the Hugging Face hub becomes a directory.
std::string HubHint(const std::string& model) {
  const bool name = std::ranges::count(model, '/') == 1 && model.find_first_of("./\\") != 0 && !model.ends_with('/');
  return name ? fmt::format("; circlet downloads nothing: `hf download {} --local-dir DIR` makes one", model) : "";
}

ModelWeights OpenWeights(const QuantizeOptions& options) {
  if (!std::filesystem::is_directory(options.model))
    Fail("{}: {}; give a checkpoint directory with config.json and safetensors{}", options.model.string(),
         std::filesystem::exists(options.model) ? "is no directory" : "does not exist",
         std::filesystem::exists(options.model) ? "" : HubHint(options.model.string()));
  return ModelWeights::Open(ReadConfig(options.model), options.model, options.text_only);
}

bool WritesWholeModel(const QuantizeOptions& options, const ModelWeights& weights) {
  constexpr int64_t kSmallModelBytes = int64_t{1} << 30;
  if (options.units != QuantizeOptions::Units::kAuto) return options.units == QuantizeOptions::Units::kAll;
  int64_t bytes = 0;
  for (const auto& [canonical, stored] : weights.GetInventory().name_in_checkpoint)
    bytes += weights.StoredBytes(canonical);
  return bytes <= kSmallModelBytes;
}

// The recipe's `fold` that a file of grids was made with.
float FoldOf(const std::filesystem::path& qparams) {
  const nlohmann::json json = ReadJson(qparams);
  return static_cast<float>(JsonObject(json, qparams.string()).Optional<double>("fold", 0.0));
}

// Adds the seconds that `body` takes.
template <typename Body>
auto Timed(double& seconds, const Body& body) {
  const auto begin = std::chrono::steady_clock::now();
  auto result = body();
  seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

}  // namespace

Gemma4Job::Gemma4Job(const RunSettings& settings)
    : settings_(settings),
      weights_(Timed(load_seconds_, [&] { return OpenWeights(settings.options); })),
      config_(weights_.GetConfig()),
      data_(Timed(load_seconds_, [&] { return ReadData(settings.options, settings.file, config_); })),
      calibration_(settings.recipe, RunDialect()),
      context_{.config = config_,
               .settings = settings.file,
               .weights = weights_,
               .calibration = calibration_,
               .world_rank = settings.world.Rank(),
               .world_size = settings.world.Size()},
      whole_(WritesWholeModel(settings.options, weights_)),
      text_tables_(context_),
      text_stages_(context_, text_tables_) {
  const QuantizeOptions& options = settings.options;
  const float fold = settings.recipe.fold;
  if (fold > 0) Fold(fold);
  if (!options.qparams.empty()) {
    ParameterStore frozen = ParameterStore::Load(options.qparams);
    if (const float of_grids = FoldOf(options.qparams); of_grids != fold)
      Fail(
          "{}: its grids are of parameters with fold {}, recipe {} has {}; give --set pipeline.ptq.fold={}, or "
          "calibrate anew",
          options.qparams.string(), of_grids, settings.recipe.Name(), fold, of_grids);
    SettleWidening(&frozen);
    calibration_.UseFrozen(std::move(frozen));
    context_.texts.SetFrozen();
    context_.images.SetFrozen();
  } else {
    SettleWidening(nullptr);
  }
  if (settings.watcher != nullptr) MeasureOne(settings.watcher->CalibrationSamples(), data_);
  MakeItems(data_, options.compute, options.max_seq_len, context_);
  CheckVisionOptions(data_, options.vision_profile, context_);
  if (options.save_stages && data_.evaluation.empty())
    Fail("--save-stages: has no effect without evaluation samples (--eval-data, or eval.N.* in --samples)");
  if (settings.Writes()) {
    AddVerification(data_, options.vision_profile, context_);
    samples_hash_ = HashOfSamples();
  }
  data_.ReleasePictures();
  profile_ = ExportedProfile(context_);
  points_ = text_stages_.Points();
  if (config_.vision && !options.text_only)
    for (Point& point : VisionPoints(config_, calibration_.GetDialect())) points_.push_back(std::move(point));
  Give();
  if (!options.qparams.empty()) calibration_.CheckTypes(points_, options.qparams.string());
}

// Whether the checkpoint's codes and grids go to the files.
bool Gemma4Job::KeepsCodes() const { return weights_.HoldsCodes() && settings_.recipe.packed_weights.has_value(); }

// With the points that the checkpoint's grids need.
Dialect Gemma4Job::RunDialect() {
  const QuantizeOptions& options = settings_.options;
  Dialect dialect = DialectFromName(options.dialect);
  const std::string config = (options.model / "config.json").string();
  using Flag = std::pair<bool, const char*>;
  const auto refuse = [](const Flag& flag) {
    if (flag.first)
      Fail("{}: has an effect only on a checkpoint of codes with grids of activations (quant_method \"gemma\")",
           flag.second);
  };
  const std::array<Flag, 3> of_grids{Flag{options.int16_twin, "--int16-twin"}, Flag{options.kv_scales, "--kv-scales"},
                                     Flag{options.elsewhere_float, "--elsewhere float"}};
  if (!weights_.HoldsCodes()) {
    if (settings_.recipe.packed_weights)
      Fail("recipe {}: keeps the codes of a checkpoint (packed_weights), and {} has none; choose another recipe",
           settings_.recipe.Name(), options.model.string());
    refuse({options.requantize, "--requantize"});
    for (const Flag& flag : of_grids) refuse(flag);
    return dialect;
  }
  if (!settings_.recipe.packed_weights) {
    const auto& [parameter, packed] = *weights_.GetInventory().packed.begin();
    if (!options.requantize)
      Fail(
          "{}: the checkpoint holds its weight as codes of {} bits, trained for the grids of activations that it "
          "gives; "
          "recipe {} would round them again. Leave out --recipe (as-checkpoint keeps codes and grids), or say "
          "--requantize",
          parameter.substr(0, parameter.rfind('.')), packed.form.bits, settings_.recipe.Name());
    for (const auto& [given, flag] : of_grids)
      if (given)
        Fail("{}: has no effect with recipe {}, which keeps no grids of the checkpoint; leave one of them out", flag,
             settings_.recipe.Name());
    return dialect;
  }
  if (options.dialect != kDefault.name)
    Fail(
        "--dialect {}: codes and grids of a checkpoint go to files of the dialect default; leave it out, or choose "
        "another recipe with --requantize",
        options.dialect);
  if (settings_.recipe.rounding)
    Fail("recipe {}: its gptq stage makes codes, packed_weights keeps the checkpoint's; leave one of them out",
         settings_.recipe.Name());
  if (settings_.recipe.widen.value_or(WideningOption{}) != WideningOption{})
    Fail("--widen: a wider stream would change the codes of {}; leave it out", config);
  if (options.compute == Compute::kBf16)
    Fail("--compute bf16: products of the checkpoint's codes are sums of integers; leave it out");
  if (options.kv_scales && weights_.GetInventory().cache_steps.empty())
    Fail("--kv-scales: {} holds no steps for keys and values; leave it out", options.model.string());
  given_ = GivenBy(weights_, {.int16_twin = options.int16_twin, .kv_scales = options.kv_scales}, dialect);
  dialect.given = &given_.added;
  return dialect;
}

// Hands codes and grids to the calibration. A recipe that says otherwise of one of them is obeyed with --requantize
// only.
void Gemma4Job::Give() {
  if (!KeepsCodes()) return;
  const bool requantize = settings_.options.requantize;
  const auto contradicts = [&](const Point& point, const std::string& what) {
    const std::string place = settings_.recipe.PlaceOf(point);
    if (!place.empty() && !requantize)
      Fail("{}: {} contradicts the checkpoint, which gives {}; leave it out, or say --requantize", point.name, place,
           what);
    return !place.empty();
  };
  for (const Point& point : points_) {
    if (const auto given = given_.points.find(point.name); given != given_.points.end()) {
      if (!contradicts(point, fmt::format("{} with scale {}", Name(given->second.dtype), given->second.scale[0])))
        calibration_.GivePoint(point.name, given->second);
      continue;
    }
    const PackedParameter* const packed = point.role == PointRole::kWeight ? weights_.Packed(point.name) : nullptr;
    if (packed == nullptr || contradicts(point, fmt::format("codes of {} bits", packed->form.bits))) continue;
    const Tensor codes = Stored()(point.name);
    QParams grid = *codes.Grid();
    if (point.kind == WeightKind::kPatchProjection)  // pixels stay in [0,1], so the projection is doubled
      for (float& scale : grid.scale) scale *= 2;
    if (grid.dtype == DType::kU4 && *settings_.recipe.packed_weights == DType::kI4) {
      grid.dtype = DType::kI4;
      grid.zero_point.assign(grid.zero_point.size(), 0);
    }
    calibration_.GiveCodes(point.name, std::move(grid));
    weights_.Release(point.name);
  }
}

std::string Gemma4Job::RoundedBefore(const std::string& parameter) const {
  if (const PackedParameter* const packed = weights_.Packed(parameter)) {
    if (packed->form.group != 0) return fmt::format("int4 in groups of {}", packed->form.group);
    return calibration_.HoldsCodes(parameter) ? "" : fmt::format("codes of {} bits", packed->form.bits);
  }
  const bool linear_of_text = parameter.starts_with(kTextRoot) && parameter.find("norm") == parameter.npos;
  if (!linear_of_text || !weights_.Has(parameter) || weights_.GetWidening() != nullptr) return "";
  return weights_.Blocks(parameter) ? "Q4_0" : "";
}

void Gemma4Job::DescribePacked(QuantizeResult& result) const {
  for (const auto& [name, grid] : given_.points)
    if (const PointParams* const params = calibration_.Params().Find(name); params != nullptr && params->Given())
      result.given.push_back({name, grid, params->beyond.values, params->beyond.beyond});
  if (!KeepsCodes()) return;
  result.unused_scales = given_.unused;
  result.modules_without_scale = given_.without;
  for (const auto& [parameter, packed] : weights_.GetInventory().packed)
    if (calibration_.HoldsCodes(parameter)) {
      result.stored_codes.push_back(
          {.parameter = parameter, .bits = packed.form.bits, .codes = packed.shape.Elements()});
      if (!settings_.Writes()) continue;
      result.stored_codes.back() = DescribeCodes(parameter, packed.form.bits, Stored()(parameter));
      weights_.Release(parameter);
    }
}

// From a file of grids comes the stream that they were calibrated on.
void Gemma4Job::SettleWidening(const ParameterStore* frozen) {
  const int64_t width = config_.text.hidden_size;
  const std::optional<WideningOption>& asked = settings_.recipe.widen;
  widen_ = asked.value_or(WideningOption{});
  if (frozen == nullptr) {
    const int64_t most = widen_.MostAdded(width);
    if (most == 0) {
      widening_ = Widening{.model_width = width};
    } else {
      Widen(config_, {.model_width = width, .channels = {{0, most + 1}}});
    }
    return;
  }
  widening_ = frozen->GetWidening().value_or(Widening{.model_width = width});
  const std::string file = settings_.options.qparams.string();
  if (widening_->model_width != width)
    Fail("{}: is of a residual stream of {} channels, the model's has {}; give the file that was made with this model",
         file, widening_->model_width, width);
  if (asked && !asked->automatic && widening_->Width() != width + asked->MostAdded(width))
    Fail(
        "{}: was calibrated on a residual stream of {} channels, widen {} makes it {}; leave out --widen, or calibrate "
        "anew",
        file, widening_->Width(), asked->ToString(), width + asked->MostAdded(width));
  Widen(config_, *widening_);
}

std::string Gemma4Job::PreparationText() const {
  if (widening_) return "";
  return fmt::format(
      "residual stream: counted with {} channels, {}\n", config_.text.hidden_size,
      widen_.automatic ? "the most that widen auto may come to" : fmt::format("{} of them copies", widen_.channels));
}

nlohmann::json Gemma4Job::Prepare(const nlohmann::json& saved, const Preparation& preparation) {
  if (!saved.is_null()) {
    widening_ = WideningFromJson(saved, "the unfinished run's widening");
  } else if (!widening_) {
    Widen(config_, {.model_width = config_.text.ModelWidth()});
    widening_ = ChooseCopies(MeasureStream(context_, settings_, preparation), config_.text.hidden_size, widen_);
  }
  Widen(config_, *widening_);
  if (!widening_->Empty()) weights_.Widen(*widening_, preparation.directory);
  prepared_ = true;
  return ToJson(*widening_);
}

nlohmann::json Gemma4Job::Contract(const std::vector<std::string>& units) const {
  nlohmann::json contract = ContractOf(context_, units, profile_);
  contract["calibrated_on"] = {{"lines", data_.calibrated_on.lines}, {"pictures", data_.calibrated_on.pictures}};
  return contract;
}

void Gemma4Job::Fold(float strength) {
  if (const auto& packed = weights_.GetInventory().packed; !packed.empty())
    Fail("fold: factors cannot be moved between packed parameters such as {}; leave it out", packed.begin()->first);
  folded_ = std::make_unique<FoldedParameters>(strength);
}

WeightSource Gemma4Job::Stored() const {
  const WeightSource stored = picture_tables_
                                  ? picture_tables_->Parameters()
                                  : WeightSource([this](const std::string& name) { return weights_.Stored(name); });
  if (folded_ == nullptr) return stored;
  return [this, stored](const std::string& name) { return (*folded_)(name, stored(name), stored); };
}

std::vector<PhaseSpec> Gemma4Job::Phases() {
  constexpr int64_t kShareOfLimit = 100;
  head_ = std::make_shared<Head>(context_, std::min(int64_t{64} << 20, settings_.options.memory_limit / kShareOfLimit));
  text_units_.emplace(context_, text_tables_);
  std::vector<PhaseSpec> phases;
  if (!context_.images.Empty()) AddVisionPhases(phases);
  const auto add = [&](Stage stage, std::vector<UnitSpec> units = {}) {
    phases.push_back(
        {.name = stage.name, .items = &context_.texts, .stage = std::move(stage), .units = std::move(units)});
  };
  add(text_stages_.Tables());
  add(text_stages_.Embeddings(), text_units_->Embedding());
  if (config_.text.HasPle()) add(text_stages_.PerLayerInputs(), text_units_->PerLayerInputs());
  // Behind all that goes into the layers: in this order the units stand in pipeline.json.
  if (vision_units_) AddVisionUnits(phases.back());
  for (int i = 0; i < config_.text.NumLayers(); ++i) add(text_stages_.Layer(i), text_units_->Layer(i));
  add(text_stages_.Norm());

  PhaseSpec head{.name = "logits", .items = &context_.texts, .output = head_, .units = {}};
  head.units.push_back(text_units_->LmHead());
  if (whole_) head.units.push_back(text_units_->Model());
  if (whole_ && vision_units_ && !context_.GetDialect().fusion_points) head.units.push_back(vision_units_->Full());
  AddProcessorFiles(settings_.options.model, head);
  head.files[kTextTablesFile] = [this](const auto& path) {
    WriteSafetensors(path, RopeTablesOf(context_.max_seq_len, text_tables_));
  };
  if (profile_)
    head.files["vision_profile.json"] = [profile = profile_->ToJson()](const auto& path) { WriteJson(path, profile); };
  phases.push_back(std::move(head));
  return phases;
}

void Gemma4Job::AddVisionPhases(std::vector<PhaseSpec>& phases) {
  picture_tables_.emplace(context_);
  vision_stages_.emplace(context_, *picture_tables_);
  if (const Item* picture = context_.VerifyPicture())
    vision_units_.emplace(context_, *picture_tables_, context_.PictureOf(picture->id).pixel_values);
  std::map<int, Tensor> pixels;
  for (const Item& image : context_.images) {
    Tensor& held = context_.pictures[image.id - Context::kFirstPicture].pixel_values;
    pixels[image.id] = held;
    // Those stages are the last to read them.
    if (prepared_ || !NeedsPreparation()) held = Tensor();
  }
  for (Stage& stage : vision_stages_->All(std::move(pixels)))
    phases.push_back({.name = stage.name, .items = &context_.images, .stage = std::move(stage)});
}

void Gemma4Job::AddVisionUnits(PhaseSpec& phase) {
  using Granularity = ExportOptions::Granularity;
  const Granularity granularity = settings_.file.export_options.vision;
  const auto add = [&](std::vector<UnitSpec> units) {
    std::move(units.begin(), units.end(), std::back_inserter(phase.units));
  };
  if (whole_ || granularity != Granularity::kMonolithic) {
    add(vision_units_->Split());
    phase.files[kVisionTablesFile] = [this](const auto& path) { WriteSafetensors(path, vision_units_->Tables()); };
  }
  if (whole_ || granularity != Granularity::kLayer) phase.units.push_back(vision_units_->Prefill());
  phase.units.push_back(vision_units_->Fusion());
  if (whole_) add(vision_units_->Parts());
}

// The graph from ids and pixels to the last hidden state runs once in one piece.
int64_t Gemma4Job::WholeGraphBytes() const {
  int64_t bytes = 0;
  if (whole_ && !context_.images.Empty())
    for (const Parameter& parameter : Parameters(config_)) bytes += 4 * parameter.shape.Elements();
  return bytes;
}

// Of all sequences and pictures, whichever process has their pixels. Collective.
std::string Gemma4Job::HashOfSamples() const {
  std::string all;
  const auto add = [&](const auto& values) { all += Sha256(std::as_bytes(std::span(values.data(), values.size()))); };
  for (const Item& text : context_.texts) {
    const Sequence& sequence = context_.SequenceOf(text);
    all += text.label;
    add(sequence.ids);
    add(sequence.keep);
    add(sequence.places);
  }
  nlohmann::json mine = nlohmann::json::array();
  for (const Picture& picture : context_.pictures) {
    add(picture.positions);
    const Tensor& pixels = picture.pixel_values;
    mine.push_back(pixels.Empty() ? "" : Sha256({pixels.Raw(), static_cast<size_t>(pixels.Bytes())}));
  }
  std::vector<std::string> pictures(context_.pictures.size());
  for (const std::string& rank : settings_.world.AllGather(mine.dump())) {
    const nlohmann::json hashes = nlohmann::json::parse(rank);
    for (size_t i = 0; i < pictures.size(); ++i)
      if (pictures[i].empty()) pictures[i] = hashes.at(i).get<std::string>();
  }
  for (const std::string& picture : pictures) all += picture;
  return Sha256(std::as_bytes(std::span(all)));
}

void Gemma4Job::Describe(QuantizeResult& result) const {
  const QuantizeOptions& options = settings_.options;
  result.seconds["load"] += load_seconds_;
  result.output_on_calibration_data = data_.evaluation.empty();
  if (profile_)
    result.vision_profile =
        fmt::format("{}x{} patches, {} soft tokens from position {} ({})", profile_->patch_grid_height,
                    profile_->patch_grid_width, profile_->num_visual_tokens, profile_->visual_start_idx,
                    options.vision_profile.empty() ? "the most frequent of the calibration samples" : profile_->name);
  result.pictures = static_cast<int64_t>(context_.pictures.size());
  result.model = options.model.filename().empty() ? options.model.parent_path().filename().string()
                                                  : options.model.filename().string();
  result.calibration_samples = static_cast<int64_t>(data_.calibration.size());
  result.evaluation_samples = static_cast<int64_t>(data_.evaluation.size());
  result.random_data = data_.random;
  result.skipped = data_.skipped;
  result.shortened = data_.shortened;
  result.dated = data_.dated;
  result.max_seq_len = context_.max_seq_len;
  if (widening_ && (settings_.recipe.widen.value_or(WideningOption{}) != WideningOption{} || !widening_->Empty()))
    result.widening = *widening_;
  for (const auto& [canonical, stored] : weights_.GetInventory().name_in_checkpoint)
    if (!context_.images.Empty() || !IsVisionTensor(canonical)) result.weight_bytes += weights_.StoredBytes(canonical);
  DescribeUnused(result);
  DescribePacked(result);
}

// What the run did not use or had to assume. Of parts that do not run, one line is enough on the terminal.
void Gemma4Job::DescribeUnused(QuantizeResult& result) const {
  const bool runs_vision = !context_.images.Empty();
  const Inventory& inventory = weights_.GetInventory();
  result.notes = inventory.notes;
  result.notes.insert(result.notes.end(), data_.overlaps.begin(), data_.overlaps.end());
  result.unknown_keys = config_.unknown_keys;
  std::vector<std::string> keys, tensors;
  for (const std::string& key : config_.unknown_keys)
    if (runs_vision || !key.starts_with("vision_config.")) keys.push_back(key);
  for (const UnusedTensor& tensor : inventory.unused) {
    result.unused_tensors.push_back(fmt::format("{}: {}", tensor.name, tensor.reason));
    if (!IsVisionTensor(tensor.name) && !IsAudioTensor(tensor.name)) tensors.push_back(tensor.name);
  }
  if (config_.vision && !runs_vision) {
    const char* const why = settings_.options.text_only ? "--text-only" : "no sample has a picture";
    result.notes.push_back(fmt::format("vision units are left out: {}", why));
    if (!settings_.options.text_only)
      for (const auto& [canonical, stored] : inventory.name_in_checkpoint)
        if (IsVisionTensor(canonical))
          result.unused_tensors.push_back(fmt::format("{}: vision tower: {}", stored, why));
  }
  const auto note = [&](const std::vector<std::string>& names, const char* what, const char* list) {
    constexpr size_t kNamed = 3;
    if (names.empty()) return;
    std::vector<std::string> first;
    for (const std::string& name : std::span(names).first(std::min(names.size(), kNamed)))
      first.push_back(Shortened(name));
    result.notes.push_back(fmt::format("{} that are not used: {}, {}{} (all: {} of the JSON report)", what,
                                       names.size(), fmt::join(first, ", "), names.size() > kNamed ? " ..." : "",
                                       list));
  };
  note(keys, "keys of config.json", "unknown_config_keys");
  note(tensors, "stored tensors", "unused_tensors");
}

}  // namespace circlet::gemma4

namespace circlet {

namespace {

// Codes that were trained for what they are stay as they are, unless somebody asks for a recipe.
QuantizeOptions WithRecipe(QuantizeOptions options) {
  if (!options.recipe.empty()) return options;
  options.recipe = "default";
  const std::filesystem::path config = options.model / "config.json";
  if (options.model.empty() || !std::filesystem::is_regular_file(config)) return options;
  const std::optional<QuantizationConfig> packed = ReadConfig(options.model).quantization;
  if (packed && packed->GetMethod() == QuantizationConfig::Method::kGemma) options.recipe = "as-checkpoint";
  return options;
}

}  // namespace

namespace gemma4 {

Simulation Simulate(const QuantizeOptions& asked) {
  RunSettings settings(WithRecipe(asked));
  settings.options.eval_text.clear();
  const bool frozen = !settings.options.qparams.empty();
  const bool sized = settings.options.max_seq_len.has_value();
  if (frozen) {
    settings.file.calibration.datasets.clear();
    settings.options.data.clear();
    settings.options.samples.clear();
    settings.options.random_samples.clear();
    settings.options.max_seq_len = settings.options.max_seq_len.value_or(2);  // of no sample
  }
  Gemma4Job job(settings);
  Simulation made{.recipe = settings.recipe, .dialect = settings.options.dialect};
  Calibration& calibration = job.GetCalibration();
  QuantizeResult result;
  if (frozen) {
    job.Describe(result);
  } else {
    result = RunJob(settings, job, &made.solved);
    made.notes = NotesText(result);
  }
  made.grids = calibration.Params();
  if (result.widening) made.grids.SetWidening(*result.widening);
  made.pictures = std::ranges::any_of(job.Points(), [&](const Point& point) {
    return point.name == ProjectedPoint() && made.grids.Find(point.name) != nullptr;
  });
  if (sized || !frozen) made.length = result.max_seq_len;
  return made;
}

}  // namespace gemma4

// The only family there is; with another one config.json's "architectures" chooses here.
QuantizeResult Quantize(const QuantizeOptions& asked) {
  const QuantizeOptions options = WithRecipe(asked);
  if (options.resume && options.force)
    Fail("--resume goes on with an unfinished run, --force starts again: give one of them");
  const RunSettings settings(options);
  gemma4::Gemma4Job job(settings);
  return RunJob(settings, job);
}

QuantizeResult QuantizeWatched(const QuantizeOptions& options, Watcher& watcher) {
  CIRCLET_CHECK(options.output.empty(), "a watched run writes nothing");
  RunSettings settings(WithRecipe(options));
  settings.watcher = &watcher;
  gemma4::Gemma4Job job(settings);
  watcher.Expect(job.Points());
  return RunJob(settings, job);
}

std::string DryRun(const QuantizeOptions& options) {
  const RunSettings settings(WithRecipe(options));
  gemma4::Gemma4Job job(settings);
  return DryRunJob(settings, job);
}

}  // namespace circlet
