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
#include "error_text.h"
#include "packed_checkpoint.h"
#include "pipeline/gemma4/given.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// The recorded text as the one sample.
std::filesystem::path SampleFile(const TempDirectory& directory) {
  const SafetensorsFile inputs = SafetensorsFile::Open(TestData("qat/inputs.safetensors"));
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
  explicit Reference(const PackedCheckpoint& checkpoint, const gemma4::GivenOptions& options = {})
      : weights_(ModelWeights::Open(ReadConfig(checkpoint.Path()), checkpoint.Path(), /*text_only=*/true)),
        given_(gemma4::GivenBy(weights_, options, kDefault)),
        calibration_(Recipe::Load("as-checkpoint"), DialectOf()) {
    for (const auto& [point, grid] : given_.points) calibration_.GivePoint(point, grid);
  }

  // Runs the recorded text through the stack; afterwards CodesAt tells what went through points.
  void Run() {
    const SafetensorsFile inputs = SafetensorsFile::Open(TestData("qat/inputs.safetensors"));
    const auto narrow = inputs.Get("text.input_ids").As<int32_t>();
    const std::vector<int64_t> wide(narrow.begin(), narrow.end());
    length_ = static_cast<int64_t>(wide.size());
    const Tensor ids = Tensor::Of<int64_t>({1, length_}, wide);
    Graph graph;
    BuildGemma4Full(BlockBuilder(graph, calibration_.GetDialect()), weights_.GetConfig(), length_, nullptr);
    Capture capture(calibration_, values_);
    Executor(graph, &capture).Run({{"ids", ids}}, [&](const std::string& name) {
      return calibration_.ReferenceOperand(weights_.Stored(name));
    });
  }

  std::vector<int> CodesAt(const std::string& point) const {
    std::vector<int> codes;
    const float scale = given_.points.at(point).scale[0];
    for (const float value : values_.at(point)) codes.push_back(static_cast<int>(std::lround(value / scale)));
    return codes;
  }
  bool Has(const std::string& point) const { return given_.points.contains(point); }
  int64_t Length() const { return length_; }

 private:
  using Values = std::map<std::string, std::vector<float>>;
  class Capture final : public PointReading {
   public:
    Capture(const Calibration& calibration, Values& values)
        : rounding_(ObserveReading::Reference(calibration)), values_(values) {}
    PointVisitor* At(const Point& point, const TensorType& type) override {
      PointVisitor* const rounding = rounding_->At(point, type);
      if (rounding == nullptr) return nullptr;
      visitors_.push_back(std::make_unique<Visitor>(*rounding, values_[point.name]));
      return visitors_.back().get();
    }
    bool Writes() const override { return true; }
    const QParams* GridAt(const Point& point) override { return rounding_->GridAt(point); }

   private:
    struct Visitor final : PointVisitor {
      Visitor(PointVisitor& r, std::vector<float>& v) : rounding(r), values(v) {}
      void Visit(std::span<float> part, int64_t first) override {
        rounding.Visit(part, first);
        const std::lock_guard lock(mutex);
        values.resize(std::max(values.size(), static_cast<size_t>(first) + part.size()));
        std::ranges::copy(part, values.begin() + first);
      }
      PointVisitor& rounding;
      std::vector<float>& values;
      std::mutex mutex;
    };
    std::unique_ptr<ObserveReading> rounding_;
    std::vector<std::unique_ptr<Visitor>> visitors_;
    Values& values_;
  };
  Dialect DialectOf() const {
    Dialect dialect = kDefault;
    dialect.given = &given_.added;
    return dialect;
  }

  ModelWeights weights_;
  gemma4::GivenGrids given_;
  Calibration calibration_;
  Values values_;
  int64_t length_ = 0;
};

// The point whose codes the reference calls a module's input.
std::string InputPoint(const Reference& reference, const std::string& module) {
  if (reference.Has(module + ".act_in")) return module + ".act_in";
  const std::string parent = module.substr(0, module.rfind('.')), layer = parent.substr(0, parent.rfind('.'));
  const std::string leaf = module.substr(module.rfind('.') + 1);
  if (leaf == "o_proj") return parent + ".attn_out";
  if (leaf == "down_proj") return parent + ".mul";
  if (leaf == "per_layer_projection") return parent + ".per_layer_mul";
  return layer + (parent.ends_with("mlp") ? ".pre_feedforward_layernorm.act_out" : ".input_layernorm.act_out");
}

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

// A value of e2b's first attention (position 27) lies 1e-7 of itself from a tie, nearer than any two orders of
// summation agree; on the other side of it everything behind moves. Positions ahead of it know nothing of that.
TEST(PackedMobileTest, CodesAtLinearsAreTheReferences) {
  for (const auto& [name, positions] : {std::pair("e2b", int64_t{27}), std::pair("w48", int64_t{48})}) {
    SCOPED_TRACE(name);
    const PackedCheckpoint checkpoint(name);
    Reference reference(checkpoint);
    reference.Run();
    const SafetensorsFile goldens = checkpoint.Goldens();
    Agreeing first, all, behind;
    for (const auto& [tensor, golden] : goldens.Tensors()) {
      if (!tensor.starts_with("text.codes.")) continue;
      const bool input = tensor.ends_with(".in");
      const std::string module = tensor.substr(11, tensor.rfind('.') - 11);
      const std::string point = input ? InputPoint(reference, module) : module + ".act_out";
      ASSERT_TRUE(reference.Has(point)) << point;
      const std::vector<int> codes = reference.CodesAt(point);
      ASSERT_EQ(static_cast<int64_t>(codes.size()), golden.Elements()) << point;
      const int64_t length = reference.Length(), width = golden.GetShape()[1];
      // Heads come one behind the other at attn_out.
      const int64_t heads = point.ends_with(".attn_out") ? 4 : 1, head = width / heads;
      const bool of_first = module.find("layers.0.") != module.npos;
      for (int64_t s = 0; s < length; ++s)
        for (int64_t i = 0; i < width; ++i) {
          const int expected = golden.As<int8_t>()[s * width + i];
          const int found = codes[(i / head * length + s) * head + i % head];
          if (s >= positions) {
            behind.Add(found, expected);
            continue;
          }
          all.Add(found, expected);
          if (of_first) first.Add(found, expected);
        }
    }
    EXPECT_GT(first.values, 50'000);
    EXPECT_GT(all.values, 2 * first.values);
    EXPECT_GE(first.Equal(), 0.9999);
    EXPECT_GE(all.Near(), 0.995);
    if (behind.values > 0) {
      EXPECT_GE(behind.Near(), 0.95);
    }
  }
}

// From golden input codes, a linear at a time: sums of integers, so ties alone may differ.
TEST(PackedMobileTest, OutputCodesOfLinearsFollowFromTheReferencesInputCodes) {
  const PackedCheckpoint checkpoint("e2b");
  const ModelWeights weights = ModelWeights::Open(ReadConfig(checkpoint.Path()), checkpoint.Path());
  const SafetensorsFile goldens = checkpoint.Goldens();
  int64_t values = 0, different = 0;
  for (const auto& [tensor, input] : goldens.Tensors()) {
    if (!tensor.starts_with("text.codes.") || !tensor.ends_with(".in")) continue;
    const std::string module = tensor.substr(11, tensor.size() - 14);
    const Tensor& golden = goldens.Get("text.codes." + module + ".out");
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
  EXPECT_LE(static_cast<double>(different), 1e-5 * static_cast<double>(values) + 1);
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
  for (const char* name : {"e2b", "w48"}) {
    SCOPED_TRACE(name);
    const PackedRun run(name, [](QuantizeOptions& options) { options.save_stages = true; });
    EXPECT_EQ(run.Result().recipe, "as-checkpoint");
    // Every packed weight that text reads, by the reference's checksums.
    const nlohmann::json recorded = run.Checkpoint().Weights(), listed = run.Json("manifest.json").at("stored_codes");
    EXPECT_EQ(listed.size(), 83u);
    for (const auto& [parameter, sums] : listed.items()) {
      const nlohmann::json& expected = recorded.at(parameter.substr(0, parameter.rfind('.')));
      EXPECT_EQ(sums.at("codes_sha256"), expected.at("codes_sha256")) << parameter;
      EXPECT_EQ(sums.at("scales_sha256"), expected.at("scale_sha256")) << parameter;
    }
    const VerifyResult verified = run.Verified();
    EXPECT_TRUE(verified.exact);
    EXPECT_EQ(verified.stored_codes, 83);
    EXPECT_THAT(verified.lost_codes, testing::IsEmpty());
    // The float chain is the reference's arithmetic: a mean of 1e-6 when no code flips, 0.06 when steps are ignored.
    const SafetensorsFile stages = SafetensorsFile::Open(run.Output() / "stages.safetensors");
    const Difference difference =
        FromGolden(stages.Get("float.eval.0.logits"), run.Checkpoint().Goldens().Get("text.logits"));
    EXPECT_LE(difference.mean, 0.02);
  }
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
  EXPECT_EQ(report.at("unused_scales").size(), 10u);
  EXPECT_THAT(report.at("unused_scales").at(0).get<std::string>(),
              HasSubstr("k_cache_scale: the reference does not read it"));
  EXPECT_THAT(report.at("modules_without_scale").get<std::vector<std::string>>(),
              testing::ElementsAre("lm_head: input, output"));
  EXPECT_THAT(ReportText(run.Result()), AllOf(HasSubstr("83 weights are the checkpoint's codes: 17 of 2 bits"),
                                              HasSubstr("140 points have the checkpoint's grids")));
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
  const SafetensorsFile inputs = SafetensorsFile::Open(TestData("qat/inputs.safetensors"));
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
