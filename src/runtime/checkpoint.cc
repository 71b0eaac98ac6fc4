#include <algorithm>
#include <functional>
#include <numeric>

#include "circlet/base/error.h"
#include "circlet/exec/executor.h"
#include "circlet/model/gemma4/tables.h"
#include "circlet/model/gemma4/text.h"
#include "circlet/model/gemma4/vision.h"
#include "circlet/model/gemma4/weights.h"
#include "circlet/preprocess/image.h"
#include "circlet/quant/calibration.h"
#include "ops/table.h"
#include "pipeline/gemma4/job.h"
#include "runtime/units.h"

namespace circlet::runtime {
namespace {

// Keys of a checkpoint's values, as pipeline.json has them.
std::string HiddenKey(int layer) { return layer == 0 ? "inputs_embeds" : fmt::format("hidden.{}", layer); }

class GraphUnit : public RunnableUnit {
 public:
  GraphUnit(std::string unit, const Graph& graph, WeightSource weights, std::unique_ptr<PointReading> reading,
            const std::function<std::string(const std::string& end, bool output)>& key_of)
      : weights_(std::move(weights)), reading_(std::move(reading)), executor_(graph, reading_.get()) {
    name = std::move(unit);
    for (const ValueId id : graph.Inputs()) inputs.push_back({graph.At(id).name, key_of(graph.At(id).name, false)});
    for (const Graph::Output& output : graph.Outputs()) outputs.push_back({output.name, key_of(output.name, true)});
    for (const Value& value : graph.Values())
      if (value.kind == ValueKind::kWeight && IsLinear(value.weight_point.kind)) linears_.push_back(value.name);
  }
  Values Run(const Values& given) override {
    return Within(name, [&] { return executor_.Run(given, weights_); });
  }
  std::vector<Tensor> LinearWeights() override {
    std::vector<Tensor> weights;
    for (const std::string& linear : linears_) weights.push_back(weights_(linear));
    return weights;
  }

 protected:
  WeightSource weights_;
  std::unique_ptr<PointReading> reading_;
  Executor executor_;
  std::vector<std::string> linears_;
};

// A table is read by the rows that are asked for: its graph sees just those.
class TableUnit final : public GraphUnit {
 public:
  using Rows = std::function<Tensor(std::span<const int64_t> wanted)>;
  // `rows` gives those of the table as float32; `groups` of them make up one.
  TableUnit(std::string unit, const Graph& graph, Rows rows, int64_t groups, std::unique_ptr<PointReading> reading,
            std::string output_key)
      : GraphUnit(std::move(unit), graph, nullptr, std::move(reading),
                  [&](const std::string&, bool output) { return output ? output_key : ""; }),
        rows_(std::move(rows)),
        groups_(groups) {}

  Values Run(const Values& given) override {
    const std::span<const int64_t> ids = given.at("ids").I64();
    const auto count = static_cast<int64_t>(ids.size());
    std::vector<int64_t> wanted;
    for (const int64_t id : ids)
      for (int64_t group = 0; group < groups_; ++group) wanted.push_back(id * groups_ + group);
    const Tensor rows = rows_(wanted);
    weights_ = [rows](const std::string&) { return rows; };
    executor_.ForgetWeights();
    std::vector<int64_t> places(ids.size());
    std::iota(places.begin(), places.end(), 0);
    return GraphUnit::Run({{"ids", Tensor::Of<int64_t>({1, count}, places)}});
  }

 private:
  Rows rows_;
  int64_t groups_;
};

class CheckpointUnits final : public UnitSource {
 public:
  CheckpointUnits(const std::filesystem::path& directory, const SessionOptions& options)
      : simulation_(Simulated(directory, options)),
        weights_(Opened(directory, options, simulation_)),
        config_(weights_.GetConfig()),
        given_(weights_.HoldsCodes() ? gemma4::GivenBy(weights_, {}, kDefault) : gemma4::GivenGrids()),
        dialect_(DialectOf(given_, simulation_)),
        calibration_(simulation_ ? simulation_->recipe : Recipe::Load("default"), dialect_),
        vision_(config_.vision.has_value() && (simulation_ ? simulation_->pictures : !options.text_only)) {
    if (vision_) {
      vision_weights_.emplace(
          *config_.vision, [this](const std::string& name) { return weights_.Stored(name); }, dialect_);
      folded_ = vision_weights_->Folded();
    }
    if (simulation_)
      UseSimulation();
    else
      for (const auto& [point, grid] : given_.points) calibration_.GivePoint(point, grid);
    constexpr int64_t kUsual = 2048;
    const int64_t most = config_.text.max_positions > 0 ? config_.text.max_positions : kUsual;
    const int64_t own = simulation_ && simulation_->length > 0 ? simulation_->length : std::min(kUsual, most);
    facts_ = {.context = options.context > 0 ? options.context : own,
              .vocabulary = config_.text.vocab_size,
              .bos = config_.text.bos_token_id,
              .pad = config_.text.pad_token_id,
              .stops = {config_.eos_token_ids.begin(), config_.eos_token_ids.end()},
              .placeholders = {config_.image_token_id, config_.video_token_id, config_.audio_token_id},
              .pictures = vision_};
    head_ = Make(
        "lm_head", [&](const BlockBuilder& b) { BuildHead(b, config_.text, 1); },
        [&](const std::string&, bool output) {
          return output ? std::string("logits") : HiddenKey(config_.text.NumLayers());
        });
    // The norm's own output is of no use here; the graph names the logits first.
    std::ranges::sort(head_->outputs,
                      [](const End& a, const End& b) { return a.name == "logits" && b.name != a.name; });
    for (const LayerConfig& layer : config_.text.layers) types_.try_emplace(LayerTypeName(layer), layer);
  }

  const ModelFacts& Facts() const override { return facts_; }
  std::string_view LongerBy() const override { return "give --context"; }
  // Graphs are made for a length; those of one prompt serve others that are about as long. A simulation pads as files
  // do, since the order of float sums over keys follows from it.
  int64_t PaddedLength(int64_t length) const override {
    constexpr int64_t kStep = 64;
    if (simulation_) return facts_.context;
    return std::min(facts_.context, (length + kStep - 1) / kStep * kStep);
  }
  std::vector<RunnableUnit*> Prefill(int64_t length) override {
    if (length != prefill_length_) prefill_ = Text(Phase::kPrefill, length, length);
    prefill_length_ = length;
    return Pointers(prefill_);
  }
  std::vector<RunnableUnit*> Decode() override {
    if (decode_.empty()) decode_ = Text(Phase::kDecode, 1, facts_.context);
    return Pointers(decode_);
  }
  RunnableUnit& Head() override { return *head_; }
  float MaskFill() const override { return kMaskFill; }

  Tensor Rope(const std::string& attention, bool cosine, int64_t first, int64_t count) override {
    const LayerConfig& layer = types_.at(attention);
    Turned& turned = rope_[attention];
    if (turned.first != first || turned.count != count)
      turned = {first, count, TextRopeTables(layer.rope, layer.head_dim, first, count, /*negated_sin=*/true)};
    return cosine ? turned.tables.cos : turned.tables.sin;
  }

  std::string PictureFault(std::span<const int64_t>) const override { return ""; }

  Tensor Features(const Tensor& pixels, std::span<const int64_t> positions) override {
    const VisionConfig& vision = *config_.vision;
    // Padding patches change nothing that is read; files have them.
    const int64_t patches = simulation_ ? std::ssize(positions) / 2 : LayoutOf(vision, positions).valid;
    const std::vector<int64_t> taken(positions.begin(), positions.begin() + 2 * patches);
    if (features_ == nullptr || taken != positions_) {
      const std::string baked = VisionWeights::PositionEmbeddingsName();
      const bool rounds = simulation_ && dialect_.position_table_grid;
      const Tensor embeddings = vision_weights_->PositionEmbeddings(
          taken, rounds ? calibration_.GridOf(VisionWeights::PositionTablePoint()) : nullptr);
      Graph graph;
      BuildVisionPrefill(BlockBuilder(graph, dialect_), config_, taken);
      features_ = std::make_unique<GraphUnit>(
          "vision_prefill", graph,
          [this, baked, embeddings](const std::string& name) { return name == baked ? embeddings : Operand(name); },
          Reading(), [](const std::string&, bool) { return ""; });
      positions_ = taken;
    }
    return features_->Run({{"pixel_values", PixelValues(pixels.Slice(0, patches, 1))}}).at("projected");
  }

  Tensor Fused(const Tensor& text, std::span<const Tensor> features, std::span<const int64_t> places) override {
    Tensor fused = text;
    size_t used = 0;
    for (const Tensor& visual : features) {
      const int64_t rows = visual.GetShape()[0];
      fused = FuseAt(fused, visual, places.subspan(used, rows));
      used += rows;
    }
    if (!simulation_) return fused;
    const int64_t length = text.GetShape()[1];
    if (merge_ == nullptr || merge_length_ != length)
      merge_ = Make(
          "multimodal_fusion", [&](const BlockBuilder& b) { BuildMergedEmbedding(b, config_.text, length, true); },
          [](const std::string&, bool) { return HiddenKey(0); });
    merge_length_ = length;
    return merge_->Run({{"hidden", fused}}).at("hidden");
  }

 private:
  using Units = std::vector<std::unique_ptr<RunnableUnit>>;

  static std::vector<RunnableUnit*> Pointers(const Units& units) {
    std::vector<RunnableUnit*> pointers;
    for (const auto& unit : units) pointers.push_back(unit.get());
    return pointers;
  }

  static std::optional<gemma4::Simulation> Simulated(const std::filesystem::path& directory,
                                                     const SessionOptions& options) {
    if (!options.simulation) return std::nullopt;
    QuantizeOptions run = *options.simulation;
    run.model = directory;
    run.text_only |= options.text_only;
    gemma4::Simulation made = gemma4::Simulate(run);
    if (options.notes != nullptr) *options.notes += made.notes;
    return made;
  }

  // Of the stream that the grids belong to.
  static ModelWeights Opened(const std::filesystem::path& directory, const SessionOptions& options,
                             const std::optional<gemma4::Simulation>& simulation) {
    ModelWeights weights = ModelWeights::Open(ReadConfig(directory), directory,
                                              options.text_only || (simulation && !simulation->pictures));
    if (simulation && simulation->grids.GetWidening() && !simulation->grids.GetWidening()->Empty())
      weights.Widen(*simulation->grids.GetWidening(), std::filesystem::temp_directory_path());
    return weights;
  }

  static Dialect DialectOf(const gemma4::GivenGrids& given, const std::optional<gemma4::Simulation>& simulation) {
    Dialect dialect = simulation ? DialectFromName(simulation->dialect) : kDefault;
    dialect.given = &given.added;
    return dialect;
  }

  void UseSimulation() {
    calibration_.UseFrozen(simulation_->grids);
    rounded_.emplace(calibration_, [this](const std::string& name) { return Stored(name); });
  }

  std::unique_ptr<PointReading> Reading() const {
    if (simulation_) return std::make_unique<FakeQuantReading>(calibration_);
    return ObserveReading::Reference(calibration_);
  }

  // With the patch projection folded.
  Tensor Stored(const std::string& name) const { return folded_ ? folded_(name) : weights_.Stored(name); }

  // A parameter as products take it, float32 or codes, once for all graphs.
  Tensor Operand(const std::string& name) {
    if (simulation_) {
      const auto solved = simulation_->solved.find(name);
      return solved != simulation_->solved.end() ? solved->second : (*rounded_)(name);
    }
    Tensor& kept = operands_[name];
    if (kept.Empty()) kept = calibration_.ReferenceOperand(Stored(name));
    return kept;
  }

  // Of a table, as float32.
  Tensor Rows(const std::string& name, std::span<const int64_t> wanted) const {
    if (simulation_) return rounded_->Rows(name, wanted);
    const Tensor table = weights_.Stored(name);
    return table.Grid() != nullptr ? DequantizedRows(table, wanted) : ToF32(RowsOf(table, wanted));
  }

  std::unique_ptr<RunnableUnit> Make(std::string name, const std::function<void(const BlockBuilder&)>& build,
                                     const std::function<std::string(const std::string&, bool)>& key_of) {
    Graph graph;
    build(BlockBuilder(graph, dialect_));
    return std::make_unique<GraphUnit>(
        std::move(name), graph, [this](const std::string& weight) { return Operand(weight); }, Reading(), key_of);
  }

  // A unit that has an input "visual" only tells the session where pictures go (Fused).
  struct FusionMark final : RunnableUnit {
    FusionMark() {
      name = "multimodal_fusion";
      inputs = {{"text", HiddenKey(0)}, {"visual", ""}};
      outputs = {{"fused", HiddenKey(0)}};
    }
    Values Run(const Values& given) override { return given; }
  };

  Units Text(Phase phase, int64_t length, int64_t slots) {
    const TextConfig& text = config_.text;
    Units units;
    const auto table = [&](const char* name, const std::string& parameter, const std::string& key, const auto& build) {
      Graph graph;
      build(BlockBuilder(graph, dialect_));
      units.push_back(std::make_unique<TableUnit>(
          name, graph, [this, parameter](std::span<const int64_t> wanted) { return Rows(parameter, wanted); },
          parameter == kPleTable ? text.ple_groups : 1, Reading(), key));
    };
    table("token_embedding", "model.language_model.embed_tokens.weight", HiddenKey(0),
          [&](const BlockBuilder& b) { BuildTokenEmbedding(b, text, length, length); });
    if (phase == Phase::kPrefill && vision_) units.push_back(std::make_unique<FusionMark>());
    if (text.HasPle()) {
      table("ple_embedding", "model.language_model.embed_tokens_per_layer.weight", "ple.tokens",
            [&](const BlockBuilder& b) { BuildPleEmbedding(b, text, length, length); });
      units.push_back(Make(
          "ple_projection", [&](const BlockBuilder& b) { BuildPleProjection(b, text, length); },
          [](const std::string& end, bool output) {
            return output ? std::string("ple") : end == "inputs_embeds" ? HiddenKey(0) : std::string("ple.tokens");
          }));
    }
    for (int i = 0; i < text.NumLayers(); ++i) {
      const LayerConfig& layer = text.layers[i];
      units.push_back(Make(
          fmt::format("decoder_layer_{}", i),
          [&](const BlockBuilder& b) { BuildDecoderLayer(b, text, i, phase, slots); },
          [&](const std::string& end, bool output) {
            if (end == "hidden") return HiddenKey(output ? i + 1 : i);
            if (end == "per_layer_input") return std::string("ple");
            if (end.ends_with("_key") || end.ends_with("_value"))
              return fmt::format("kv.{}{}", layer.kv_source, end.substr(end.find('_')));
            return end;
          }));
      units.back()->layer = LayerPlace{i, LayerTypeName(layer), layer.window, layer.bidirectional_pictures};
    }
    return units;
  }

  struct Turned {
    int64_t first = -1, count = 0;
    RopeTables tables;
  };

  std::optional<gemma4::Simulation> simulation_;
  ModelWeights weights_;
  Gemma4Config config_;
  gemma4::GivenGrids given_;
  Dialect dialect_;
  Calibration calibration_;
  bool vision_;
  ModelFacts facts_;
  std::optional<VisionWeights> vision_weights_;
  WeightSource folded_;
  std::optional<RoundedWeights> rounded_;  // of a simulation
  std::map<std::string, Tensor> operands_;
  std::map<std::string, LayerConfig> types_;
  std::map<std::string, Turned> rope_;  // of the step that runs, by attention
  std::unique_ptr<RunnableUnit> head_;
  Units prefill_, decode_;
  int64_t prefill_length_ = 0;
  std::unique_ptr<RunnableUnit> merge_;
  int64_t merge_length_ = 0;  // that merge_ is made for
  std::unique_ptr<GraphUnit> features_;
  std::vector<int64_t> positions_;  // that features_ is made for
};

}  // namespace

std::unique_ptr<UnitSource> OpenCheckpoint(const std::filesystem::path& directory, const SessionOptions& options) {
  return std::make_unique<CheckpointUnits>(directory, options);
}

}  // namespace circlet::runtime
