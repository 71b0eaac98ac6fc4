// A wider residual stream computes the same model.

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>
#include <random>

#include "circlet/io/json.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/pipeline/verify.h"
#include "error_text.h"
#include "fnv_checkpoint.h"
#include "golden.h"
#include "temp_directory.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

int64_t Pick(std::mt19937& random, std::initializer_list<int64_t> choices) {
  return choices.begin()[random() % choices.size()];
}

// Models of every shape: with and without per-layer embeddings, shared keys and values, a tied head, values made of
// keys, pictures, a soft cap. A large epsilon, so that its share of the wider mean shows.
nlohmann::json RandomConfig(std::mt19937& random) {
  nlohmann::json config = nlohmann::json::parse(kConfigA);
  nlohmann::json& text = config["text_config"];
  const int64_t layers = Pick(random, {2, 3, 4});
  text["hidden_size"] = Pick(random, {24, 32, 40, 48});
  text["rms_norm_eps"] = 0.01;
  text["num_hidden_layers"] = layers;
  text["layer_types"] = nlohmann::json::array();
  for (int64_t i = 0; i < layers; ++i)
    text["layer_types"].push_back(i % 2 == 1 || i + 1 == layers ? "full_attention" : "sliding_attention");
  text["num_kv_shared_layers"] = layers == 4 ? Pick(random, {0, 2}) : 0;
  text["use_double_wide_mlp"] = Pick(random, {0, 1}) == 1;
  text["hidden_size_per_layer_input"] = Pick(random, {0, 4});
  if (Pick(random, {0, 1}) == 1) text.erase("final_logit_softcapping");
  if (Pick(random, {0, 0, 1}) == 1) {
    text["attention_k_eq_v"] = true;
    text["num_global_key_value_heads"] = 1;
  }
  config["tie_word_embeddings"] = Pick(random, {0, 1}) == 1;
  config["vision_config"]["position_embedding_size"] = 8;  // pictures of 16 soft tokens
  if (Pick(random, {0, 1}) == 1) config.erase("vision_config");
  return config;
}

// Weights of the FNV law, and channels that the writers of the stream make large.
void WriteCheckpoint(const fs::path& directory, const nlohmann::json& config, const std::vector<int64_t>& large,
                     float factor, bool uneven_norm = false) {
  WriteJson(directory / "config.json", config);
  std::map<std::string, Tensor> tensors;
  for (const Parameter& parameter : Parameters(ReadConfig(directory))) {
    Tensor tensor = FnvTensor(parameter);
    if (parameter.name.ends_with("post_feedforward_layernorm.weight") && !IsVisionTensor(parameter.name))
      for (const int64_t channel : large) tensor.F32()[channel] *= factor;
    if (uneven_norm && parameter.name.ends_with("layers.1.input_layernorm.weight") && !IsVisionTensor(parameter.name))
      for (int64_t channel = 0; channel < tensor.Elements(); channel += 3) tensor.F32()[channel] *= 9;
    tensors.emplace(parameter.name, tensor);
  }
  WriteSafetensors(directory / "model.safetensors", tensors);
}

QuantizeOptions OptionsOf(const fs::path& model, bool pictures) {
  return {.model = model, .random_samples = "2x14", .random_images = pictures ? 1 : 0, .recipe = "w8a16"};
}

class Widened : public testing::TestWithParam<int> {};

TEST_P(Widened, StreamComputesTheSameModelAndItsFilesAreExact) {
  std::mt19937 random(static_cast<unsigned>(GetParam()));
  const nlohmann::json config = RandomConfig(random);
  const int64_t width = config["text_config"]["hidden_size"];
  const bool pictures = config.contains("vision_config");
  SCOPED_TRACE(config.dump());
  const TempDirectory directory;
  WriteCheckpoint(directory.Path(), config, {Pick(random, {0, 5}), width - 1},
                  static_cast<float>(Pick(random, {1, 20})));
  QuantizeOptions options = OptionsOf(directory.Path(), pictures);
  options.output = directory.Path() / "narrow";
  options.units = QuantizeOptions::Units::kDeployment;
  const QuantizeResult narrow = Quantize(options);
  options.units = GetParam() % 3 == 0 ? QuantizeOptions::Units::kAll : QuantizeOptions::Units::kDeployment;
  options.widen = fmt::format("{}", width % 16 == 0 ? 16 : Pick(random, {16 - width % 16, 32 - width % 16}));
  options.output = directory.Path() / "out";
  const QuantizeResult wide = Quantize(options);

  ASSERT_TRUE(wide.widening);
  EXPECT_EQ(fmt::format("{}", wide.widening->Width() - width), options.widen);
  EXPECT_EQ(narrow.widening, std::nullopt);
  // Float logits. Factors like 1/sqrt(3) are rounded to float32 (6e-8), and products summed in another order; up to
  // four layers of norms and softmax make at most some 2e-5 of that. A constant of the wrong width makes 1e-3 and more.
  ASSERT_EQ(wide.scatter.size(), narrow.scatter.size());
  ASSERT_GT(narrow.scatter.size(), 500u);
  float largest = 0, difference = 0;
  for (size_t i = 0; i < narrow.scatter.size(); ++i) {
    largest = std::max(largest, std::abs(narrow.scatter[i].first));
    difference = std::max(difference, std::abs(narrow.scatter[i].first - wide.scatter[i].first));
  }
  EXPECT_GT(largest, 0);
  EXPECT_LE(difference, 5e-5f * largest);

  const VerifyResult verified = Verify({.directory = options.output});
  EXPECT_TRUE(verified.exact) << VerifyText(verified);
  EXPECT_TRUE(verified.broken_boundaries.empty());
  const nlohmann::json pipeline = ReadJson(options.output / "pipeline.json");
  for (const char* file : {"pipeline.json", "manifest.json", "qparams.json", "report.json"})
    EXPECT_EQ(ReadJson(options.output / file).at("widening"), ToJson(*wide.widening)) << file;
  for (const nlohmann::json& unit : pipeline.at("units"))
    if (unit.at("name") == "lm_head")
      EXPECT_EQ(unit.at("inputs").at(0).at("shape"), (std::vector<int64_t>{1, 1, wide.widening->Width()}));
}
INSTANTIATE_TEST_SUITE_P(Configurations, Widened, testing::Range(0, 30));

// Factors are powers of two, so that no product and no sum of the float model changes.
class Folded : public testing::TestWithParam<int> {};

TEST_P(Folded, ParametersComputeTheSameModelToTheBitAndItsFilesAreExact) {
  std::mt19937 random(static_cast<unsigned>(100 + GetParam()));
  const nlohmann::json config = RandomConfig(random);
  SCOPED_TRACE(config.dump());
  const TempDirectory directory;
  WriteCheckpoint(directory.Path(), config, {1}, 20, /*uneven_norm=*/true);
  QuantizeOptions options = OptionsOf(directory.Path(), config.contains("vision_config"));
  options.output = directory.Path() / "plain";
  options.units = QuantizeOptions::Units::kDeployment;
  const QuantizeResult plain = Quantize(options);
  options.set = {fmt::format("pipeline.ptq.fold={}", GetParam() % 2 == 0 ? 0.5 : 1.0)};
  options.output = directory.Path() / "out";
  const QuantizeResult folded = Quantize(options);
  ASSERT_GT(plain.scatter.size(), 500u);
  ASSERT_EQ(folded.scatter.size(), plain.scatter.size());
  bool rounds_alike = true;
  for (size_t i = 0; i < plain.scatter.size(); ++i) {
    EXPECT_EQ(folded.scatter[i].first, plain.scatter[i].first) << i;
    rounds_alike = rounds_alike && folded.scatter[i].second == plain.scatter[i].second;
  }
  EXPECT_FALSE(rounds_alike) << "nothing was moved";
  EXPECT_TRUE(Verify({.directory = options.output}).exact);

  // Grids of one are not those of the other.
  options = OptionsOf(directory.Path(), config.contains("vision_config"));
  options.qparams = directory.Path() / "out/qparams.json";
  EXPECT_THAT(ErrorText([&] { Quantize(options); }), HasSubstr("its grids are of parameters with fold"));
}
INSTANTIATE_TEST_SUITE_P(Configurations, Folded, testing::Range(0, 30));

TEST(WidenedRunTest, AutoTakesNothingWhereThereAreNoOutliers) {
  const std::string tiny = SourcePath("examples/tiny-gemma4");
  QuantizeOptions options{.model = tiny, .data = tiny + "/eval/calib.jsonl", .recipe = "w8a16", .text_only = true};
  const QuantizeResult plain = Quantize(options);
  options.widen = "auto";
  const QuantizeResult result = Quantize(options);
  ASSERT_TRUE(result.widening);
  EXPECT_TRUE(result.widening->Empty());
  EXPECT_EQ(result.output, plain.output);
  EXPECT_THAT(ReportText(result), HasSubstr("residual stream: 128 channels, none of them an outlier"));
}

TEST(WidenedRunTest, AutoFindsAPlantedOutlierAndTheGridGetsFiner) {
  nlohmann::json config = nlohmann::json::parse(kConfigA);
  config["text_config"]["hidden_size"] = 128;
  config.erase("vision_config");
  const TempDirectory directory;
  WriteCheckpoint(directory.Path(), config, {77}, 3000);
  QuantizeOptions options = OptionsOf(directory.Path(), /*pictures=*/false);
  options.recipe = "default";
  const QuantizeResult plain = Quantize(options);
  options.widen = "auto";
  const QuantizeResult result = Quantize(options);
  ASSERT_TRUE(result.widening);
  EXPECT_THAT(result.widening->channels, testing::ElementsAre(Widening::Channel{77, 17}));
  // A step sqrt(17) finer at the sums; other points have their own errors.
  EXPECT_LT(result.output.MeanAbs(), 0.6 * plain.output.MeanAbs());
}

TEST(WidenedRunTest, FrozenGridsBringTheirStreamAndRefuseAnother) {
  nlohmann::json config = nlohmann::json::parse(kConfigA);
  config.erase("vision_config");
  const TempDirectory directory;
  WriteCheckpoint(directory.Path(), config, {7}, 20);
  const auto output = [&](const char* name) { return directory.Path() / name; };
  QuantizeOptions options = OptionsOf(directory.Path(), /*pictures=*/false);
  options.output = output("plain");
  Quantize(options);
  options.output = output("wide");
  options.widen = "16";
  const QuantizeResult wide = Quantize(options);

  options.qparams = output("wide") / "qparams.json";
  for (const char* widen : {"", "auto", "16"}) {
    options.widen = widen;
    options.output = output("again");
    options.force = true;
    const QuantizeResult again = Quantize(options);
    EXPECT_EQ(again.widening, wide.widening) << widen;
    EXPECT_EQ(Sha256File(options.output / "lm_head.q.circle"), Sha256File(output("wide") / "lm_head.q.circle"));
    EXPECT_EQ(ReadJson(options.output / "qparams.json").at("widening"), ToJson(*wide.widening));
  }
  const auto refused = [&](const char* grids, const char* widen) {
    options.qparams = output(grids) / "qparams.json";
    options.widen = widen;
    return ErrorText([&] { Quantize(options); });
  };
  EXPECT_THAT(refused("wide", "off"),
              AllOf(HasSubstr("was calibrated on a residual stream of 48 channels, widen off makes it 32"),
                    HasSubstr("leave out --widen")));
  EXPECT_THAT(refused("wide", "32"), HasSubstr("of 48 channels, widen 32 makes it 64"));
  EXPECT_THAT(refused("plain", "16"), HasSubstr("of 32 channels, widen 16 makes it 48"));
  nlohmann::json grids = ReadJson(output("wide") / "qparams.json");
  grids["widening"]["copies"] = {{"40", 17}};
  WriteJson(output("wide") / "qparams.json", grids);
  EXPECT_THAT(refused("wide", ""), HasSubstr("qparams.json: widening: copies.40: expected a channel from 0 to 31"));
}

TEST(WidenedRunTest, ADryRunCountsTheMostThatAutoMayTake) {
  const std::string tiny = SourcePath("examples/tiny-gemma4");
  const TempDirectory directory;
  const auto told = [&](const char* widen) {
    return DryRun({.model = tiny,
                   .output = directory.Path() / "out",
                   .data = tiny + "/eval/calib.jsonl",
                   .recipe = "w8a16",
                   .widen = widen,
                   .text_only = true});
  };
  EXPECT_THAT(told("auto"),
              HasSubstr("residual stream: counted with 144 channels, the most that widen auto may come to"));
  EXPECT_THAT(told("32"), HasSubstr("residual stream: counted with 160 channels, 32 of them copies"));
  EXPECT_THAT(told("off"), testing::Not(HasSubstr("residual stream")));
}

}  // namespace
}  // namespace circlet
