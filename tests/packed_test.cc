// Packed checkpoints (docs/packed.md) through the whole program, against what the reference computed of them.

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <mutex>

#include "circlet/exec/executor.h"
#include "circlet/graph/builder.h"
#include "circlet/io/json.h"
#include "circlet/model/gemma4/vision.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/pipeline/verify.h"
#include "circlet/quant/affine.h"
#include "circlet/quant/calibration.h"
#include "circlet/runtime/session.h"
#include "circlet/smoke/trace.h"
#include "error_text.h"
#include "packed_checkpoint.h"
#include "pipeline/gemma4/given.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// The recorded text and picture.
SafetensorsFile Inputs() { return OpenGolden("qat/inputs.safetensors.xz"); }

// The recorded text as the one sample.
std::filesystem::path SampleFile(const TempDirectory& directory) {
  const SafetensorsFile inputs = Inputs();
  const Tensor& ids = inputs.Get("text.input_ids");
  const std::filesystem::path path = directory.Path() / "in.safetensors";
  WriteSafetensors(path, {{"calib.0.input_ids", ids}, {"eval.0.input_ids", ids}});
  return path;
}

struct Difference {
  double mean = 0, largest = 0, largest_value = 0;
};

// Of logits [1,S,V] from the recorded ones, which are those of every fourth position.
Difference FromGolden(const Tensor& logits, const Tensor& golden) {
  constexpr int64_t kEvery = 4;
  const int64_t vocab = golden.GetShape()[1];
  Difference difference;
  for (int64_t row = 0; row < golden.GetShape()[0]; ++row)
    for (int64_t i = 0; i < vocab; ++i) {
      const double expected = golden.F32()[row * vocab + i];
      const double found = logits.F32()[(kEvery * row + kEvery - 1) * vocab + i];
      difference.mean += std::abs(found - expected) / static_cast<double>(golden.Elements());
      difference.largest = std::max(difference.largest, std::abs(found - expected));
      difference.largest_value = std::max(difference.largest_value, std::abs(expected));
    }
  return difference;
}

// Sums of up to 512 products in another order.
TEST(PackedFloatTest, LogitsOfGroupsAndOfQ40AreTheReferences) {
  for (const char* name : {"w4a16-ct", "q4_0-unquantized"}) {
    SCOPED_TRACE(name);
    const PackedCheckpoint checkpoint(name);
    const TempDirectory directory;
    Quantize({.model = checkpoint.Path(),
              .output = directory.Path() / "out",
              .samples = SampleFile(directory),
              .save_stages = true,
              .units = QuantizeOptions::Units::kDeployment,
              .text_only = true});
    const SafetensorsFile stages = SafetensorsFile::Open(directory.Path() / "out/stages.safetensors");
    const Difference difference =
        FromGolden(stages.Get("float.eval.0.logits"), checkpoint.Goldens().Get("text.logits"));
    EXPECT_GT(difference.largest_value, 10);
    EXPECT_LT(difference.largest, 3e-5 * difference.largest_value);
  }
}

// ---- Codes with grids of activations
// -----------------------------------------------------------------------------------

// The model of a mobile checkpoint in the reference's arithmetic: rounded where the checkpoint gives a grid, float
// elsewhere.
class Reference {
 public:
  explicit Reference(const PackedCheckpoint& checkpoint, bool text_only = true)
      : weights_(ModelWeights::Open(ReadConfig(checkpoint.Path()), checkpoint.Path(), text_only)),
        given_(gemma4::GivenBy(weights_, {}, kDefault)),
        calibration_(Recipe::Load("as-checkpoint"), DialectOf()),
        operand_([this](const std::string& name) { return weights_.Stored(name); }) {
    for (const auto& [point, grid] : given_.points) calibration_.GivePoint(point, grid);
  }

  // Codes of the first rows at each point that `golden` (of "text." or "image.") has them of, in the point's order.
  struct Codes {
    std::vector<int> values;
    int64_t rows = 0, heads = 1, head_width = 0;
    // Heads come one behind the other at attn_out, each with `length` rows.
    int64_t IndexOf(int64_t i, int64_t length) const {
      const int64_t width = heads * head_width, row = i / width, column = i % width;
      return (column / head_width * length + row) * head_width + column % head_width;
    }
  };
  std::map<std::string, Codes> GoldenCodes(const SafetensorsFile& golden, const std::string& of) const {
    std::map<std::string, Codes> codes;
    for (const auto& [name, tensor] : golden.Tensors()) {
      const std::string prefix = of + "codes.";
      if (!name.starts_with(prefix)) continue;
      const std::string module = name.substr(prefix.size(), name.rfind('.') - prefix.size());
      const std::string point = name.ends_with(".in") ? InputPoint(module) : module + ".act_out";
      EXPECT_TRUE(given_.points.contains(point)) << point;
      const int64_t heads = point.ends_with(".attn_out") ? 4 : 1;
      const auto values = tensor.As<int8_t>();
      codes[point] = {{values.begin(), values.end()}, tensor.GetShape()[0], heads, tensor.GetShape()[1] / heads};
    }
    return codes;
  }

  // Runs the recorded text through the stack. `golden`: whose side a value takes that float32 cannot decide.
  void RunText(const std::map<std::string, Codes>& golden) {
    const SafetensorsFile inputs = Inputs();
    const auto narrow = inputs.Get("text.input_ids").As<int32_t>();
    const std::vector<int64_t> wide(narrow.begin(), narrow.end());
    length_ = static_cast<int64_t>(wide.size());
    Graph graph;
    BuildGemma4Full(BlockBuilder(graph, calibration_.GetDialect()), weights_.GetConfig(), length_, nullptr);
    Run(graph, {{"ids", Tensor::Of<int64_t>({1, length_}, wide)}}, operand_, golden);
  }

  // The recorded picture through the vision tower; gives the features [tokens,D].
  Tensor RunPicture(const std::map<std::string, Codes>& golden) {
    const SafetensorsFile inputs = Inputs();
    const Tensor& bytes = inputs.Get("image.pixel_values_u8");
    const auto pairs = inputs.Get("image.image_position_ids").As<int32_t>();
    const std::vector<int64_t> positions(pairs.begin(), pairs.end());
    Tensor pixels({DType::kF32, bytes.GetShape()});
    std::ranges::transform(bytes.As<uint8_t>(), pixels.F32().begin(), [](uint8_t v) { return v * (1.0f / 255); });
    length_ = bytes.GetShape()[1];
    const Gemma4Config& config = weights_.GetConfig();
    Graph graph;
    BuildVisionPrefill(BlockBuilder(graph, calibration_.GetDialect()), config, positions);
    const VisionWeights vision(*config.vision, operand_, calibration_.GetDialect());
    return Run(graph, {{"pixel_values", pixels}}, vision.For(positions), golden).begin()->second;
  }

  std::vector<int> CodesAt(const std::string& point) const {
    std::vector<int> codes;
    const QParams& grid = given_.points.at(point);
    for (const float value : values_.at(point))
      codes.push_back(static_cast<int>(std::lround(value / grid.scale[0])) + grid.zero_point[0]);
    return codes;
  }
  int64_t Length() const { return length_; }
  // Values that took the reference's side against what was computed here.
  int64_t Undecided() const { return undecided_; }

 private:
  using Values = std::map<std::string, std::vector<float>>;
  using Side = std::vector<int>;  // a code for each value of a point, or kNoSide
  static constexpr int kNoSide = 1000;

  class Capture final : public PointReading {
   public:
    Capture(Reference& run, const std::map<std::string, Codes>& golden)
        : run_(run), golden_(golden), rounding_(ObserveReading::Reference(run.calibration_)) {}
    PointVisitor* At(const Point& point, const TensorType& type) override {
      PointVisitor* const rounding = rounding_->At(point, type);
      if (rounding == nullptr) return nullptr;
      Side side;
      if (const auto codes = golden_.find(point.name); codes != golden_.end()) {
        side.assign(static_cast<size_t>(type.shape.Elements()), kNoSide);
        for (size_t i = 0; i < codes->second.values.size(); ++i)
          side[static_cast<size_t>(codes->second.IndexOf(static_cast<int64_t>(i), run_.length_))] =
              codes->second.values[i];
      }
      visitors_.push_back(std::make_unique<Visitor>(*rounding, run_.given_.points.at(point.name), std::move(side),
                                                    run_.values_[point.name], run_.undecided_));
      return visitors_.back().get();
    }
    bool Writes() const override { return true; }
    const QParams* GridAt(const Point& point) override { return rounding_->GridAt(point); }

   private:
    struct Visitor final : PointVisitor {
      Visitor(PointVisitor& r, const QParams& g, Side c, std::vector<float>& v, int64_t& u)
          : rounding(r), grid(g), side(std::move(c)), values(v), undecided(u) {}
      // Two orders of a float32 sum differ by two roundings of 2^-24 now and then.
      static bool IsUndecided(float steps) {
        const float size = std::abs(steps);
        return std::abs(size - std::floor(size) - 0.5f) < 2.5e-7f * size;
      }
      void Visit(std::span<float> part, int64_t first) override {
        const std::vector<float> before(part.begin(), part.end());
        rounding.Visit(part, first);
        const std::lock_guard lock(mutex);
        for (size_t i = 0; i < part.size() && !side.empty(); ++i) {
          const int code = side[static_cast<size_t>(first) + i];
          if (code == kNoSide || !IsUndecided(before[i] / grid.scale[0])) continue;
          const float value = static_cast<float>(code - grid.zero_point[0]) * grid.scale[0];
          undecided += part[i] != value;
          part[i] = value;
        }
        values.resize(std::max(values.size(), static_cast<size_t>(first) + part.size()));
        std::ranges::copy(part, values.begin() + first);
      }
      PointVisitor& rounding;
      const QParams& grid;
      Side side;
      std::vector<float>& values;
      int64_t& undecided;
      std::mutex mutex;
    };
    Reference& run_;
    const std::map<std::string, Codes>& golden_;
    std::unique_ptr<ObserveReading> rounding_;
    std::vector<std::unique_ptr<Visitor>> visitors_;
  };

  std::map<std::string, Tensor> Run(const Graph& graph, const std::map<std::string, Tensor>& inputs,
                                    const WeightSource& stored, const std::map<std::string, Codes>& golden) {
    Capture capture(*this, golden);
    return Executor(graph, &capture).Run(inputs, [&](const std::string& name) {
      return calibration_.ReferenceOperand(stored(name));
    });
  }

  // The point whose codes the reference calls a module's input.
  std::string InputPoint(const std::string& module) const {
    if (given_.points.contains(module + ".act_in")) return module + ".act_in";
    const std::string parent = module.substr(0, module.rfind('.')), layer = parent.substr(0, parent.rfind('.'));
    const std::string leaf = module.substr(module.rfind('.') + 1);
    if (leaf == "o_proj") return parent + ".attn_out";
    if (leaf == "down_proj") return parent + ".mul";
    if (leaf == "per_layer_projection") return parent + ".per_layer_mul";
    if (leaf == "input_proj") return parent + ".act_in";
    if (leaf == "embedding_projection") return parent + ".embedding_pre_projection_norm.act_out";
    return layer + (parent.ends_with("mlp") ? ".pre_feedforward_layernorm.act_out" : ".input_layernorm.act_out");
  }
  Dialect DialectOf() const {
    Dialect dialect = kDefault;
    dialect.given = &given_.added;
    return dialect;
  }

  ModelWeights weights_;
  gemma4::GivenGrids given_;
  Calibration calibration_;
  WeightSource operand_;
  Values values_;
  int64_t length_ = 0;
  int64_t undecided_ = 0;
};

struct Agreeing {
  int64_t values = 0, equal = 0, near = 0;
  void Add(int found, int expected) {
    ++values;
    equal += found == expected;
    near += std::abs(found - expected) <= 1;
  }
  double Equal() const { return static_cast<double>(equal) / static_cast<double>(values); }
  double Near() const { return static_cast<double>(near) / static_cast<double>(values); }
};

struct Agreement {
  Agreeing first, all;  // layer 0, and every layer with recorded codes
};

Agreement AgreementOf(const Reference& reference, const std::map<std::string, Reference::Codes>& golden) {
  Agreement agreement;
  for (const auto& [point, expected] : golden) {
    const std::vector<int> found = reference.CodesAt(point);
    const bool of_first = point.find("layers.0.") != point.npos;
    for (size_t i = 0; i < expected.values.size(); ++i) {
      const int code = found[static_cast<size_t>(expected.IndexOf(static_cast<int64_t>(i), reference.Length()))];
      agreement.all.Add(code, expected.values[i]);
      if (of_first) agreement.first.Add(code, expected.values[i]);
    }
  }
  return agreement;
}

// One value of e2b (position 27 of the first attention) is -61.500006 steps, 1e-7 of itself from a tie, so that the
// order of a float32 sum decides its code, and one code that differs moves all behind it. Such a value of the first
// layer takes the reference's side; nothing else does.
TEST(PackedMobileTest, CodesAtLinearsAreTheReferences) {
  for (const char* name : {"e2b", "w48"}) {
    SCOPED_TRACE(name);
    const PackedCheckpoint checkpoint(name);
    Reference reference(checkpoint);
    const std::map<std::string, Reference::Codes> golden = reference.GoldenCodes(checkpoint.Goldens(), "text.");
    std::map<std::string, Reference::Codes> of_first = golden;
    std::erase_if(of_first, [](const auto& point) { return point.first.find("layers.0.") == std::string::npos; });
    reference.RunText(of_first);
    EXPECT_LE(reference.Undecided(), 1);
    const Agreement agreement = AgreementOf(reference, golden);
    EXPECT_GT(agreement.first.values, 50'000);
    EXPECT_GT(agreement.all.values, 2 * agreement.first.values);
    EXPECT_GE(agreement.first.Equal(), 0.9999);
    EXPECT_GE(agreement.all.Near(), 0.995);
  }
}

// One flipped code of the millions in the tower moves all behind it: codes are held in the first layer (tied has none
// recorded), features in the mean.
TEST(PackedMobileTest, CodesAtTheFirstVisionLayerAreTheReferences) {
  for (const char* name : {"e2b", "w48", "tied"}) {
    SCOPED_TRACE(name);
    const PackedCheckpoint checkpoint(name);
    Reference reference(checkpoint, /*text_only=*/false);
    const std::map<std::string, Reference::Codes> golden = reference.GoldenCodes(checkpoint.Goldens(), "image.");
    const Tensor features = reference.RunPicture({});
    const Agreement agreement = AgreementOf(reference, golden);
    if (name != std::string("tied")) {
      EXPECT_GT(agreement.first.values, 20'000);
      EXPECT_GE(agreement.first.Near(), 0.98);
    }
    const SafetensorsFile goldens = checkpoint.Goldens();
    const Tensor& expected = goldens.Get("image.vision.projected");
    ASSERT_EQ(features.Elements(), expected.Elements());
    double difference = 0, size = 0;
    for (int64_t i = 0; i < expected.Elements(); ++i) {
      difference += std::abs(features.F32()[i] - expected.F32()[i]);
      size += std::abs(expected.F32()[i]);
    }
    EXPECT_LE(difference, 0.01 * size);
  }
}

// From golden input codes, a linear at a time: sums of integers, so ties alone may differ.
TEST(PackedMobileTest, OutputCodesOfLinearsFollowFromTheReferencesInputCodes) {
  for (const char* name : {"e2b", "w48"}) {
    SCOPED_TRACE(name);
    const PackedCheckpoint checkpoint(name);
    const ModelWeights weights = ModelWeights::Open(ReadConfig(checkpoint.Path()), checkpoint.Path());
    const SafetensorsFile goldens = checkpoint.Goldens();
    int64_t values = 0, different = 0;
    for (const auto& [tensor, input] : goldens.Tensors()) {
      const size_t prefix = tensor.find("codes.") + 6;
      if (tensor.find("codes.") == tensor.npos || !tensor.ends_with(".in")) continue;
      const std::string module = tensor.substr(prefix, tensor.size() - prefix - 3);
      if (module.ends_with(".input_proj")) continue;  // the reference's input is 2 (x - 0.5) of a pixel
      const Tensor& golden = goldens.Get(tensor.substr(0, prefix) + module + ".out");
      const PackedParameter& packed = *weights.Packed(module + ".weight");
      Calibration calibration(Recipe::Load("as-checkpoint"), kDefault);
      calibration.GivePoint("in", {DType::kI8, -1, {*packed.input_step}, {0}});
      calibration.GivePoint("out", {DType::kI8, -1, {*packed.output_step}, {0}});
      Graph graph;
      const Builder b(graph);
      const Tensor codes = weights.Stored(module + ".weight");
      const ValueId x = b.Point("in", b.Input("x", {1, input.GetShape()[0], input.GetShape()[1]}));
      b.Output("y",
               b.Point("out", b.Add(FullyConnected{}, {x, b.Weight("weight", codes.GetShape(), WeightKind::kLinear)})));
      const Tensor rows(TensorType{DType::kF32, {1, input.GetShape()[0], input.GetShape()[1]}});
      for (int64_t i = 0; i < rows.Elements(); ++i)
        rows.F32()[i] = static_cast<float>(input.As<int8_t>()[i]) * *packed.input_step;
      const auto reading = ObserveReading::Reference(calibration);
      const Tensor y = Executor(graph, reading.get())
                           .Run({{"x", rows}}, [&](const std::string&) { return calibration.ReferenceOperand(codes); })
                           .at("y");
      for (int64_t i = 0; i < y.Elements(); ++i) {
        const auto code = static_cast<int>(std::lround(y.F32()[i] / *packed.output_step));
        ++values;
        different += code != golden.As<int8_t>()[i];
        ASSERT_LE(std::abs(code - golden.As<int8_t>()[i]), 1) << module << " " << i;
      }
    }
    EXPECT_GT(values, 150'000);
    EXPECT_LE(static_cast<double>(different), 1e-5 * static_cast<double>(values));
  }
}

// Ties go away from zero here and to even there (docs/packed.md).
TEST(PackedMobileTest, ActivationsAreRoundedAsTheReferenceRoundsThemButForTies) {
  const SafetensorsFile micro = OpenGolden("qat/micro.safetensors.xz");
  for (const char* set : {"random", "near_ties", "ties", "published"}) {
    const std::string name = std::string("srq.") + set;
    const float scale = micro.Get(name + ".scale").F32()[0];
    const bool tied = set != std::string("random");
    int64_t different = 0;
    for (int64_t i = 0; i < micro.Get(name + ".x").Elements(); ++i) {
      const float x = micro.Get(name + ".x").F32()[i];
      const auto code = std::lround(FakeQuantize(x, scale, 0, DType::kI8, Rounding::kHalfAwayDivide) / scale);
      const int expected = micro.Get(name + ".code").As<int8_t>()[i];
      EXPECT_LE(std::abs(code - expected), tied ? 1 : 0) << name << " " << i << ": " << x;
      different += code != expected;
    }
    EXPECT_EQ(different > 0, tied) << name;
  }
}

// A run on the recorded text; the output lives as long as the object.
class PackedRun {
 public:
  using Adjust = std::function<void(QuantizeOptions&)>;
  explicit PackedRun(const std::string& name, const Adjust& adjust = {}) : checkpoint_(name) {
    options_ = {.model = checkpoint_.Path(),
                .output = directory_.Path() / "out",
                .samples = SampleFile(directory_),
                .units = QuantizeOptions::Units::kDeployment,
                .text_only = true};
    if (adjust) adjust(options_);
    result_ = Quantize(options_);
  }
  const QuantizeResult& Result() const { return result_; }
  const PackedCheckpoint& Checkpoint() const { return checkpoint_; }
  std::filesystem::path Output() const { return options_.output; }
  nlohmann::json Json(const char* file) const { return ReadJson(Output() / file); }
  VerifyResult Verified() const { return Verify({.directory = Output()}); }

 private:
  TempDirectory directory_;
  PackedCheckpoint checkpoint_;
  QuantizeOptions options_;
  QuantizeResult result_;
};

TEST(PackedMobileTest, FilesHoldTheCodesAndScalesAndComputeWhatWasSimulated) {
  int compared_layers = 0;
  for (const auto& [name, weights] : {std::pair("e2b", 83), std::pair("w48", 83), std::pair("tied", 81)}) {
    SCOPED_TRACE(name);
    const PackedRun run(name, [](QuantizeOptions& options) { options.save_stages = true; });
    EXPECT_EQ(run.Result().recipe, "as-checkpoint");
    // Every packed weight that text reads, by the reference's checksums.
    const nlohmann::json recorded = run.Checkpoint().Weights(), listed = run.Json("manifest.json").at("stored_codes");
    EXPECT_EQ(listed.size(), static_cast<size_t>(weights));
    for (const auto& [parameter, sums] : listed.items()) {
      const nlohmann::json& expected = recorded.at(parameter.substr(0, parameter.rfind('.')));
      EXPECT_EQ(sums.at("codes_sha256"), expected.at("codes_sha256")) << parameter;
      EXPECT_EQ(sums.at("scales_sha256"), expected.at("scale_sha256")) << parameter;
    }
    const VerifyResult verified = run.Verified();
    EXPECT_TRUE(verified.exact);
    EXPECT_EQ(verified.stored_codes, weights);
    EXPECT_THAT(verified.lost_codes, testing::IsEmpty());
    // The float chain is the reference's arithmetic: a mean of 1e-6 when no code flips, 0.06 when steps are ignored.
    const SafetensorsFile stages = SafetensorsFile::Open(run.Output() / "stages.safetensors");
    const Difference difference =
        FromGolden(stages.Get("float.eval.0.logits"), run.Checkpoint().Goldens().Get("text.logits"));
    EXPECT_LE(difference.mean, 0.02);
    // Recorded of tied alone. No code flips there: float32 in two orders is what remains.
    const SafetensorsFile goldens = run.Checkpoint().Goldens();
    for (const auto& [tensor, expected] : goldens.Tensors()) {
      if (!tensor.starts_with("text.layers.")) continue;
      ++compared_layers;
      const Tensor& layer = stages.Get("float.eval.0." + tensor.substr(5));
      const double largest =
          std::abs(*std::ranges::max_element(expected.F32(), {}, [](float v) { return std::abs(v); }));
      for (int64_t i = 0; i < expected.Elements(); ++i)
        ASSERT_NEAR(layer.F32()[i], expected.F32()[i], 2e-6 * largest) << tensor << " " << i;
    }
  }
  EXPECT_EQ(compared_layers, 10);
}

TEST(PackedMobileTest, GivenGridsStandInTheFilesAsTheCheckpointSaysThem) {
  const PackedRun run("e2b");
  const ModelWeights weights =
      ModelWeights::Open(ReadConfig(run.Checkpoint().Path()), run.Checkpoint().Path(), /*text_only=*/true);
  const nlohmann::json points = run.Json("qparams.json").at("quant_points");
  int64_t outputs = 0, inputs = 0;
  for (const auto& [parameter, packed] : weights.GetInventory().packed) {
    const std::string module = parameter.substr(0, parameter.rfind('.'));
    EXPECT_FALSE(points.contains(parameter)) << "codes and scales stand in the files";
    if (!packed.output_step) continue;
    const nlohmann::json& point = points.at(module + ".act_out");
    EXPECT_EQ(point.at("scale").at(0).get<float>(), *packed.output_step) << module;
    EXPECT_EQ(point.at("dtype"), "int8");
    EXPECT_EQ(point.at("observer"), "GivenObserver");
    ++outputs;
    if (!module.ends_with("per_layer_input_gate")) continue;
    EXPECT_EQ(points.at(module + ".act_in").at("scale").at(0).get<float>(), *packed.input_step);
    ++inputs;
  }
  EXPECT_EQ(outputs, 80);
  EXPECT_EQ(inputs, 10);
  for (const char* producer : {"input_layernorm.act_out", "self_attn.attn_out", "pre_feedforward_layernorm.act_out",
                               "mlp.mul", "per_layer_mul"})
    EXPECT_EQ(points.at(fmt::format("model.language_model.layers.3.{}", producer)).at("dtype"), "int8") << producer;
  EXPECT_EQ(points.at("model.language_model.layers.3.mlp_residual_out").at("dtype"), "int16");
  // The report tells how many values lie beyond, what nothing reads and who has no step.
  const nlohmann::json report = run.Json("report.json");
  EXPECT_EQ(report.at("given_grids").size(), 140u);
  int64_t beyond = 0;
  for (const nlohmann::json& given : report.at("given_grids")) beyond += given.at("beyond").get<int64_t>();
  EXPECT_GT(beyond, 0);
  EXPECT_THAT(report.at("unused_tensors").dump(), HasSubstr("layers.9.self_attn.k_cache_scale")) << "a shared layer's";
  EXPECT_EQ(report.at("unused_scales").size(), 10u);
  EXPECT_THAT(report.at("unused_scales").at(0).get<std::string>(),
              HasSubstr("k_cache_scale: the reference does not read it"));
  EXPECT_THAT(report.at("modules_without_scale").get<std::vector<std::string>>(),
              testing::ElementsAre("lm_head: input, output"));
  EXPECT_THAT(ReportText(run.Result()), AllOf(HasSubstr("83 weights are the checkpoint's codes: 17 of 2 bits"),
                                              HasSubstr("140 points have the checkpoint's grids")));
}

// The reference's linear has no bias: it reads 2 (x - 0.5) of a pixel x.
TEST(PackedMobileTest, ThePatchProjectionsOutputHasItsStepWhereTheBiasIsInIt) {
  const TempDirectory directory;
  const SafetensorsFile inputs = Inputs();
  const Tensor& bytes = inputs.Get("image.pixel_values_u8");
  Tensor pixels({DType::kF32, bytes.GetShape()});
  std::ranges::transform(bytes.As<uint8_t>(), pixels.F32().begin(), [](uint8_t v) { return v * (1.0f / 255); });
  WriteSafetensors(directory.Path() / "in.safetensors",
                   {{"calib.0.input_ids", inputs.Get("image.input_ids")},
                    {"calib.0.pixel_values", pixels},
                    {"calib.0.image_position_ids", inputs.Get("image.image_position_ids")}});
  const PackedRun run("tied", [&](QuantizeOptions& options) {
    options.samples = directory.Path() / "in.safetensors";
    options.text_only = false;
  });
  EXPECT_TRUE(run.Verified().exact);
  const ModelWeights weights = ModelWeights::Open(ReadConfig(run.Checkpoint().Path()), run.Checkpoint().Path(), false);
  const std::string projection = "model.vision_tower.patch_embedder.input_proj";
  const nlohmann::json point = run.Json("qparams.json").at("quant_points").at(projection + ".act_out");
  EXPECT_EQ(point.at("scale").at(0).get<float>(), weights.Packed(projection + ".weight")->output_step.value());
  EXPECT_EQ(point.at("dtype"), "int8");
  EXPECT_THAT(run.Json("report.json").at("unused_scales").dump(), testing::Not(HasSubstr("input_proj")));
}

TEST(PackedMobileTest, FlagsChangeTheGridsAsTheySay) {
  const PackedRun twin("e2b", [](QuantizeOptions& options) {
    options.int16_twin = true;
    options.set = {"pipeline.ptq.packed_weights=int4"};
  });
  const nlohmann::json plain_step = twin.Json("report.json").at("given_grids").at(0);
  EXPECT_EQ(plain_step.at("dtype"), "int16");
  EXPECT_TRUE(twin.Verified().exact);
  EXPECT_EQ(twin.Verified().stored_codes, 83) << "int4 codes are the same signed codes";
  const PackedRun caches("e2b", [](QuantizeOptions& options) { options.kv_scales = true; });
  const nlohmann::json points = caches.Json("qparams.json").at("quant_points");
  EXPECT_EQ(points.at("model.language_model.layers.0.self_attn.k_rot").at("dtype"), "int8");
  EXPECT_FLOAT_EQ(points.at("model.language_model.layers.4.self_attn.v_norm.act_out").at("scale").at(0).get<float>(),
                  6.0f / 127);
  EXPECT_FALSE(caches.Json("report.json").contains("unused_scales"));
  EXPECT_TRUE(caches.Verified().exact);
}

// Weights that are the checkpoint's codes lose nothing, what is given keeps its grid, and the rest is measured.
TEST(PackedMobileTest, ATraceShowsWhatIsRoundedBesidesTheCheckpointsCodes) {
  for (const char* name : {"e2b", "tied"}) {
    SCOPED_TRACE(name);
    const PackedCheckpoint checkpoint(name);
    const TempDirectory directory;
    const ModelTrace trace = TraceModel(
        {.model = checkpoint.Path(), .samples = SampleFile(directory), .text_only = true}, /*samples=*/3, "");
    const auto find = [&](const std::string& point) {
      return *std::ranges::find(trace.points, "model.language_model." + point, &TracePoint::name);
    };
    const TracePoint given = find("layers.3.mlp.up_proj.act_out"), observed = find("layers.3.mlp_residual_out");
    ASSERT_TRUE(given.grid && observed.grid);
    EXPECT_EQ(given.grid->dtype, DType::kI8);
    EXPECT_EQ(observed.grid->dtype, DType::kI16);
    EXPECT_LT(given.own, 1e-6) << "float values lie on the grid already, and codes are no error";
    // bfloat16 in the checkpoint, so rounded here.
    EXPECT_GT(find("per_layer_model_projection.act_out").own, 1e-3);
    const auto head = std::ranges::find(trace.points, "lm_head.act_out", &TracePoint::name);
    ASSERT_NE(head, trace.points.end());
    EXPECT_EQ(head->own > 1e-3, std::string(name) == "tied");
  }
}

TEST(PackedMobileTest, ElsewhereFloatRoundsNothingButWhatIsGiven) {
  const PackedRun run("e2b", [](QuantizeOptions& options) {
    options.output.clear();
    options.elsewhere_float = true;
  });
  EXPECT_EQ(run.Result().given.size(), 140u);
  EXPECT_GT(run.Result().output.count, 0);
  EXPECT_LT(run.Result().output.MaxAbs(), 1e-4) << "both chains are the reference's";
  EXPECT_THAT(ErrorText([] { PackedRun("e2b", [](QuantizeOptions& options) { options.elsewhere_float = true; }); }),
              AllOf(HasSubstr("--elsewhere float"), HasSubstr("use evaluate")));
}

// Prefill, and the last positions token by token.
TEST(PackedMobileTest, ASessionOverTheCheckpointHasTheReferencesLogits) {
  const PackedCheckpoint checkpoint("e2b");
  const SafetensorsFile inputs = Inputs();
  const auto narrow = inputs.Get("text.input_ids").As<int32_t>();
  const std::vector<int64_t> ids(narrow.begin(), narrow.end());
  const SafetensorsFile goldens = checkpoint.Goldens();
  const Tensor& golden = goldens.Get("text.logits");
  const int64_t vocab = golden.GetShape()[1];
  const auto session = runtime::OpenSession(checkpoint.Path(), {.text_only = true});
  circlet::Sample prompt{.source = "text"};
  prompt.input_ids.assign(ids.begin(), ids.begin() + 40);
  session->Prefill(prompt);
  double difference = 0;
  const auto add = [&](int64_t position) {
    const std::vector<float> logits = runtime::ValuesOf(session->Logits(position));
    const std::span<const float> expected = golden.F32().subspan(position / 4 * vocab, vocab);
    for (int64_t i = 0; i < vocab; ++i)
      difference += std::abs(logits[i] - expected[i]) / static_cast<double>(golden.Elements());
  };
  for (int64_t position = 3; position < 40; position += 4) add(position);
  for (int64_t position = 40; position < 48; ++position) {
    session->Decode(ids[position]);
    if (position % 4 == 3) add(position);
  }
  EXPECT_LE(difference, 0.02);
}

TEST(PackedMobileTest, ARecipeThatSaysOtherwiseIsAnErrorWithTheModule) {
  const auto error = [](const PackedRun::Adjust& adjust) { return ErrorText([&] { PackedRun run("e2b", adjust); }); };
  EXPECT_THAT(error([](QuantizeOptions& options) { options.recipe = "w8a16"; }),
              AllOf(HasSubstr("lm_head: the checkpoint holds its weight as codes of 2 bits"), HasSubstr("recipe w8a16"),
                    HasSubstr("as-checkpoint"), HasSubstr("--requantize")));
  const std::string weight = "model.language_model.layers.3.mlp.up_proj.weight";
  EXPECT_THAT(
      error([&](QuantizeOptions& options) { options.set = {"pipeline.ptq.raw_overrides={" + weight + ": uint8}"}; }),
      AllOf(HasSubstr(weight), HasSubstr("contradicts the checkpoint, which gives codes of 4 bits")));
  const std::string point = "model.language_model.layers.3.mlp.up_proj.act_out";
  EXPECT_THAT(
      error([&](QuantizeOptions& options) { options.set = {"pipeline.ptq.raw_overrides={" + point + ": int16}"}; }),
      AllOf(HasSubstr(point), HasSubstr("which gives int8 with scale")));
  EXPECT_THAT(error([](QuantizeOptions& options) { options.dialect = "tico"; }), HasSubstr("--dialect tico"));
  EXPECT_THAT(error([](QuantizeOptions& options) { options.widen = "auto"; }), HasSubstr("--widen"));
  EXPECT_THAT(
      ErrorText([] { PackedRun run("w4a16-ct", [](QuantizeOptions& options) { options.recipe = "as-checkpoint"; }); }),
      AllOf(HasSubstr("recipe as-checkpoint"), HasSubstr("has none")));
  EXPECT_THAT(ErrorText([] { PackedRun run("w4a16-ct", [](QuantizeOptions& options) { options.kv_scales = true; }); }),
              HasSubstr("--kv-scales"));
}

TEST(PackedMobileTest, FlagsOfGridsThatAreNotThereAreRefused) {
  PackedCheckpoint checkpoint("e2b");
  std::erase_if(checkpoint.Tensors(), [](const auto& entry) { return entry.first.ends_with("_cache_scale"); });
  checkpoint.Write();
  const auto error = [&](const PackedRun::Adjust& adjust) {
    return ErrorText([&] {
      PackedRun run("e2b", [&](QuantizeOptions& options) {
        options.model = checkpoint.Path();
        adjust(options);
      });
    });
  };
  EXPECT_THAT(error([](QuantizeOptions& options) { options.kv_scales = true; }),
              AllOf(HasSubstr("--kv-scales"), HasSubstr("holds no steps for keys and values; leave it out")));
  EXPECT_THAT(error([](QuantizeOptions& options) {
                options.recipe = "w8a16";
                options.requantize = options.int16_twin = true;
              }),
              AllOf(HasSubstr("--int16-twin: has no effect with recipe w8a16"), HasSubstr("leave one of them out")));
}

TEST(PackedMobileTest, RequantizeObeysTheRecipeWhereItSaysOtherwise) {
  const std::string weight = "model.language_model.layers.3.mlp.up_proj.weight";
  const PackedRun one("e2b", [&](QuantizeOptions& options) {
    options.set = {"pipeline.ptq.raw_overrides={" + weight + ": uint8}"};
    options.requantize = true;
  });
  EXPECT_EQ(one.Json("manifest.json").at("stored_codes").size(), 82u);
  EXPECT_EQ(one.Json("qparams.json").at("quant_points").at(weight).at("dtype"), "uint8");
  EXPECT_TRUE(one.Verified().exact);
  const PackedRun all("e2b", [](QuantizeOptions& options) {
    options.recipe = "w8a16";
    options.requantize = true;
  });
  EXPECT_FALSE(all.Json("manifest.json").contains("stored_codes"));
  EXPECT_FALSE(all.Json("report.json").contains("given_grids"));
  EXPECT_EQ(all.Result().second_roundings.front().form, "codes of 4 bits");
  EXPECT_TRUE(all.Verified().exact);
}

TEST(PackedMobileTest, VerifyFindsCodesThatAreNotTheCheckpoints) {
  const PackedRun run("e2b");
  nlohmann::json manifest = run.Json("manifest.json");
  const std::string weight = "model.language_model.layers.3.mlp.up_proj.weight";
  manifest["stored_codes"][weight]["codes_sha256"] = std::string(64, '0');
  manifest["stored_codes"]["model.nowhere.weight"] = manifest["stored_codes"][weight];
  WriteJson(run.Output() / "manifest.json", manifest);
  const VerifyResult verified = run.Verified();
  EXPECT_EQ(verified.verdict, VerifyResult::Verdict::kDamaged);
  EXPECT_EQ(verified.stored_codes, 82);
  EXPECT_THAT(verified.lost_codes,
              testing::Contains(AllOf(HasSubstr(weight), HasSubstr("its codes in decoder_layer_prefill_3"),
                                      HasSubstr("are not the checkpoint's"))));
  EXPECT_THAT(verified.lost_codes, testing::Contains(HasSubstr("model.nowhere.weight: no file holds its codes")));
}

TEST(PackedMobileTest, AResumedRunWritesTheSameBytes) {
  const PackedRun whole("e2b");
  const PackedRun resumed("e2b", [&](QuantizeOptions& options) {
    options.model = whole.Checkpoint().Path();
    options.save_every = 0;
    QuantizeOptions first = options;
    first.on_progress = [](const ProgressInfo& progress) { return progress.number < 8; };
    EXPECT_THAT(ErrorText([&] { Quantize(first); }), HasSubstr("stopped by the caller"));
    options.resume = true;
  });
  EXPECT_GT(resumed.Result().resumed_phases, 0);
  for (const char* file : {"report.json", "qparams.json", "pipeline.json"})
    EXPECT_EQ(ReadFile(whole.Output() / file), ReadFile(resumed.Output() / file)) << file;
}

// ---- Weights that are rounded a second time
// -----------------------------------------------------------------------------

TEST(PackedFloatTest, ASecondRoundingIsReportedModuleByModule) {
  for (const auto& [name, form] :
       {std::pair("w4a16-ct", "int4 in groups of 32"), std::pair("q4_0-unquantized", "Q4_0")}) {
    SCOPED_TRACE(name);
    std::map<std::string, double> errors;
    for (const char* recipe : {"w8a16", "w4a16"}) {
      const PackedRun run(name, [&](QuantizeOptions& options) { options.recipe = recipe; });
      ASSERT_EQ(run.Result().second_roundings.size(), 70u);
      for (const SecondRounding& rounding : run.Result().second_roundings) EXPECT_EQ(rounding.form, form);
      errors[recipe] = run.Result().second_roundings[0].relative_error;
      EXPECT_THAT(ReportText(run.Result()), HasSubstr("70 weights were rounded before"));
      EXPECT_EQ(run.Json("report.json").at("second_roundings").size(), 70u);
    }
    EXPECT_GT(errors["w8a16"], 1e-4);
    EXPECT_LT(errors["w8a16"], 0.02);
    EXPECT_GT(errors["w4a16"], 5 * errors["w8a16"]);
  }
}

}  // namespace
}  // namespace circlet
