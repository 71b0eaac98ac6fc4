#include "circlet/model/gemma4/make_checkpoint.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/model/gemma4/weights.h"
#include "circlet/preprocess/image.h"
#include "circlet/preprocess/tokenizer.h"
#include "golden.h"
#include "model/gemma4/presets.h"
#include "model/gemma4/random_weights.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

std::map<std::string, std::string> HashesOf(const CheckpointSummary& summary) {
  std::map<std::string, std::string> hashes;
  for (const std::filesystem::path& file : summary.files) hashes[file.filename().string()] = Sha256File(file);
  return hashes;
}

// A whole random tensor as floats [rows, columns].
std::vector<float> Draw(const Parameter& parameter, uint64_t seed = 1) {
  const RandomTensor random(parameter, seed);
  Tensor tensor(TensorType{DType::kBF16, {random.Rows(), random.Columns()}});
  uint16_t* const values = reinterpret_cast<uint16_t*>(tensor.Raw());
  for (int64_t row = 0; row < random.Rows(); ++row) random.FillRow(row, values + row * random.Columns());
  const Tensor floats = ToF32(tensor);
  return {floats.F32().begin(), floats.F32().end()};
}

double Spread(std::span<const float> values) {
  double sum = 0, squares = 0;
  for (const float value : values) {
    sum += value;
    squares += static_cast<double>(value) * value;
  }
  const double mean = sum / values.size();
  return std::sqrt(squares / values.size() - mean * mean);
}

TEST(MakeCheckpointTest, TinyIsReadBackAndFitsItsConfig) {
  const TempDirectory directory;
  int64_t last_done = 0, announced = 0;
  const CheckpointSummary summary = MakeCheckpoint("tiny", 7, directory.Path(), [&](int64_t done, int64_t total) {
    EXPECT_GT(done, last_done);
    last_done = done;
    announced = total;
  });
  EXPECT_EQ(last_done, announced);
  EXPECT_EQ(announced, 2 * summary.parameters);
  const Gemma4Config config = ReadConfig(directory.Path());
  EXPECT_THAT(config.unknown_keys, IsEmpty());
  const ModelWeights weights = ModelWeights::Open(config, directory.Path());
  EXPECT_EQ(static_cast<int64_t>(weights.GetCheckpoint().Names().size()), summary.tensors);
  // K, V and the key norm of the three KV-shared layers, as in the released files.
  EXPECT_EQ(weights.GetInventory().unused.size(), 9u);
  for (const UnusedTensor& tensor : weights.GetInventory().unused)
    EXPECT_THAT(tensor.reason, HasSubstr("reads the keys and values of layer"));
  EXPECT_EQ(weights.Stored("model.language_model.norm.weight").GetDType(), DType::kBF16);
  EXPECT_EQ(LoadImageRules(directory.Path()).max_soft_tokens, 70);
}

TEST(MakeCheckpointTest, TokenizerEncodesEveryTextAndKnowsTheControlTokens) {
  const TempDirectory directory;
  MakeCheckpoint("tiny", 7, directory.Path());
  const Gemma4Config config = ReadConfig(directory.Path());
  const Tokenizer tokenizer = Tokenizer::Load(directory.Path());
  const std::vector<int64_t> ids = tokenizer.Encode("a é<|image|>", true);
  // <bos>, "a", the space, two bytes of the letter, the placeholder.
  ASSERT_EQ(ids.size(), 6u);
  EXPECT_EQ(ids.front(), config.text.bos_token_id);
  EXPECT_EQ(ids.back(), config.image_token_id);
  EXPECT_EQ(tokenizer.Decode(ids, true), "a é");
  EXPECT_EQ(tokenizer.RequireId("<|image>"), config.boi_token_id);
  EXPECT_EQ(tokenizer.RequireId("<image|>"), config.eoi_token_id);
  EXPECT_EQ(tokenizer.RequireId("<|video|>"), config.video_token_id);
  EXPECT_EQ(tokenizer.RequireId("<audio|>"), config.eoa_token_id);
  EXPECT_EQ(tokenizer.IdLimit(), config.text.vocab_size);
  EXPECT_EQ(tokenizer.RequireId("<0xFF>"), tokenizer.RequireId("<0x00>") + 255);
  EXPECT_THAT(config.eos_token_ids,
              ElementsAre(1, tokenizer.RequireId("<turn|>"), tokenizer.RequireId("<|tool_response>")));
}

TEST(MakeCheckpointTest, SameSeedGivesTheSameBytesForAnyNumberOfThreads) {
  const TempDirectory first, second, third;
  const int threads = Threads();
  SetThreads(1);
  const CheckpointSummary one = MakeCheckpoint("tiny", 7, first.Path());
  SetThreads(3);
  const CheckpointSummary three = MakeCheckpoint("tiny", 7, second.Path());
  SetThreads(threads);
  EXPECT_EQ(HashesOf(one), HashesOf(three));
  EXPECT_NE(HashesOf(one)["model.safetensors"], HashesOf(MakeCheckpoint("tiny", 8, third.Path()))["model.safetensors"]);
}

TEST(MakeCheckpointTest, UnknownPresetNamesTheKnownOnes) {
  const TempDirectory directory;
  try {
    MakeCheckpoint("e2", 1, directory.Path());
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(),
                AllOf(HasSubstr("no preset \"e2\""),
                      HasSubstr("known are tiny, e2b-short, e2b, e2b-qat-mobile-short, e2b-qat-mobile, e4b")));
  }
  EXPECT_THAT(CheckpointPresets(),
              ElementsAre("tiny", "e2b-short", "e2b", "e2b-qat-mobile-short", "e2b-qat-mobile", "e4b"));
}

TEST(MakeCheckpointTest, CheckpointInTheWayIsLeftAlone) {
  const TempDirectory directory;
  WriteFile(directory.Path() / "config.json", "{}");
  try {
    MakeCheckpoint("tiny", 1, directory.Path());
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr(directory.Path().string()), HasSubstr("holds a config.json already"),
                                    HasSubstr("choose another directory")));
  }
  EXPECT_EQ(ReadFile(directory.Path() / "config.json"), "{}");
  EXPECT_FALSE(std::filesystem::exists(directory.Path() / "model.safetensors"));
}

// model.md 1.2, 10: the released file's tensors, and the parameters that count as used.
TEST(PresetTest, E2bHoldsTheTensorsOfTheReleasedFile) {
  const nlohmann::json json = PresetFiles("e2b").at("config.json");
  int text = 0, vision = 0, audio = 0, others = 0;
  for (const Parameter& tensor : StoredTensors(json)) {
    const std::string& name = tensor.name;
    ++(name.starts_with("model.language_model.") ? text
       : name.starts_with("model.vision_tower.") ? vision
       : name.starts_with("model.audio_tower.")  ? audio
                                                 : others);
  }
  EXPECT_EQ(text, 600);
  EXPECT_EQ(vision, 658);
  EXPECT_EQ(audio, 751);
  EXPECT_EQ(others, 2);

  const Gemma4Config config = ParseConfig(json, "config.json");
  EXPECT_EQ(config.text.rms_norm_eps, 1e-6f);
  EXPECT_EQ(config.vision->rms_norm_eps, 1e-6f);
  EXPECT_EQ(config.text.NumLayers(), 35);
  EXPECT_EQ(config.text.layers[20].kv_source, 13);
  EXPECT_EQ(config.text.layers[34].kv_source, 14);
  EXPECT_EQ(config.text.layers[34].intermediate, 12288);
  EXPECT_THAT(config.unknown_keys, IsEmpty());
}

// Without clip bounds, which the cost model does not count.
int64_t CountParameters(const nlohmann::json& config, std::string_view prefix) {
  int64_t count = 0;
  for (const Parameter& tensor : StoredTensors(config))
    if (tensor.name.starts_with(prefix) && tensor.shape.Rank() > 0) count += tensor.shape.Elements();
  return count;
}

// Derived from public counts and sizes of the released mobile file, to the byte.
TEST(PresetTest, E2bQatMobileHoldsTheTensorsOfTheReleasedFile) {
  const nlohmann::json released = nlohmann::json::parse(GoldenText("qat/e2b_tensors.json.xz"));
  const nlohmann::json config = PresetFiles("e2b-qat-mobile").at("config.json");
  EXPECT_EQ(config.at("quantization_config"), released.at("quantization_config"));
  const std::map<DType, std::string> names{
      {DType::kF32, "F32"}, {DType::kBF16, "BF16"}, {DType::kU8, "U8"}, {DType::kI8, "I8"}};
  std::map<std::string, nlohmann::json> found, expected;
  int64_t bytes = 0;
  for (const StoredTensor& tensor : TensorsOfFile(config)) {
    const auto sizes = tensor.type.shape.Sizes();
    found[tensor.name] = {names.at(tensor.type.dtype), std::vector<int64_t>(sizes.begin(), sizes.end())};
    bytes += tensor.type.Bytes();
  }
  for (const auto& [name, type] : released.at("tensors").items()) expected[name] = type;
  EXPECT_EQ(found.size(), 2780u);
  EXPECT_EQ(bytes, released.at("payload_bytes").get<int64_t>());
  for (const auto& [name, type] : expected) EXPECT_EQ(found[name], type) << name;
  EXPECT_EQ(found.size(), expected.size());
}

TEST(MakeCheckpointTest, APackedOneIsReadBackAsCodesThatFollowTheFloatOne) {
  const TempDirectory directory;
  const CheckpointSummary summary = MakeCheckpoint("e2b-qat-mobile-short", 7, directory.Path());
  const ModelWeights weights = ModelWeights::Open(ReadConfig(directory.Path()), directory.Path());
  EXPECT_EQ(static_cast<int64_t>(weights.GetCheckpoint().Names().size()), summary.tensors);
  EXPECT_FALSE(weights.GetConfig().vision->use_clipped_linears);
  const std::map<std::string, int> bits{{"model.language_model.layers.0.mlp.up_proj.weight", 4},
                                        {"model.language_model.layers.4.mlp.up_proj.weight", 2},
                                        {"model.language_model.layers.4.per_layer_input_gate.weight", 8},
                                        {"model.language_model.embed_tokens.weight", 2}};
  for (const auto& [name, width] : bits) {
    SCOPED_TRACE(name);
    ASSERT_NE(weights.Packed(name), nullptr);
    EXPECT_EQ(weights.Packed(name)->form.bits, width);
    // Against the random values that were packed: half a step at most, of a largest value of 2^(bits - 1) - 1/2 steps.
    Parameter parameter;
    for (const Parameter& candidate : Parameters(weights.GetConfig()))
      if (candidate.name == name) parameter = candidate;
    const RandomTensor random(parameter, 7);
    const Tensor values = weights.Float(name);
    const std::vector<float>& scales = weights.Stored(name).Grid()->scale;
    std::vector<uint16_t> row(random.Columns());
    for (const int64_t at : {int64_t{0}, random.Rows() - 1}) {
      random.FillRow(at, row.data());
      for (int64_t i = 0; i < random.Columns(); ++i) {
        const float value = std::bit_cast<float>(static_cast<uint32_t>(row[i]) << 16);
        ASSERT_NEAR(values.F32()[at * random.Columns() + i], value, 0.5001f * scales[at]) << i;
      }
    }
  }
}

TEST(PresetTest, TowersAndTablesCountAsInTheCostModel) {
  for (const char* preset : {"e2b", "e4b"}) {
    const nlohmann::json config = PresetFiles(preset).at("config.json");
    EXPECT_EQ(CountParameters(config, "model.vision_tower."), 167364608) << preset;
    EXPECT_EQ(CountParameters(config, "model.audio_tower."), 304824608) << preset;
  }
  const nlohmann::json e2b = PresetFiles("e2b").at("config.json");
  EXPECT_EQ(CountParameters(e2b, "model.embed_"), 3538944);
  EXPECT_EQ(CountParameters(e2b, "model.language_model.embed_tokens_per_layer"), 2348810240);
  const nlohmann::json e4b = PresetFiles("e4b").at("config.json");
  EXPECT_EQ(CountParameters(e4b, "model.embed_"), 5898240);
  EXPECT_EQ(ParseConfig(e4b, "config.json").text.layers[41].kv_source, 23);
  EXPECT_EQ(ParseConfig(e4b, "config.json").text.layers[40].kv_source, 22);
}

TEST(PresetTest, ShardsAreCutBeforeTheLimitAndALargeTableStandsAlone) {
  const std::vector<Parameter> tensors = {{"a", {10}}, {"b", {10}}, {"c", {100}}, {"d", {5}}, {"e", {15}}, {"f", {1}}};
  std::vector<size_t> sizes;
  for (const std::vector<Parameter>& shard : SplitIntoShards(tensors, 40)) sizes.push_back(shard.size());
  EXPECT_THAT(sizes, ElementsAre(2, 1, 2, 1));
}

TEST(RandomTensorTest, LinearsAreNormalWithOneOverInAsVariance) {
  const std::vector<float> values = Draw({"gate_proj.weight", {256, 1024}, WeightKind::kLinear, Flow::kGate});
  EXPECT_NEAR(Spread(values) * 32, 1.0, 0.01);
  // Of a normal distribution 4.55 % lie beyond two spreads and 0.27 % beyond three.
  const auto beyond = [&](double spreads) {
    const auto far = [&](float value) { return std::abs(value) * 32 > spreads; };
    return static_cast<double>(std::count_if(values.begin(), values.end(), far)) / values.size();
  };
  EXPECT_NEAR(beyond(2), 0.0455, 0.002);
  EXPECT_NEAR(beyond(3), 0.0027, 0.0006);
}

TEST(RandomTensorTest, AFewRowsAndOneColumnStandOut) {
  constexpr int64_t kRows = 512, kColumns = 1024;
  const auto expect = [&](const char* name, Flow flow, double row_factor, int rows) {
    const std::vector<float> values = Draw({name, {kRows, kColumns}, WeightKind::kLinear, flow});
    int found_rows = 0;
    for (int64_t row = 0; row < kRows; ++row) {
      const double spread = 32 * Spread(std::span(values).subspan(row * kColumns, kColumns));
      if (spread > 1.5) {
        ++found_rows;
        EXPECT_NEAR(spread, row_factor, 0.15 * row_factor) << name;
      }
    }
    EXPECT_EQ(found_rows, rows) << name;
    int found_columns = 0;
    for (int64_t column = 0; column < kColumns; ++column) {
      std::vector<float> of_column;
      for (int64_t row = 0; row < kRows; ++row) {
        const float value = values[row * kColumns + column];
        if (32 * std::abs(value) < 8.5) of_column.push_back(value);  // leaves rows that stand out aside
      }
      found_columns += 32 * Spread(of_column) > 1.6;
    }
    EXPECT_EQ(found_columns, 1) << name;
  };
  expect("model.language_model.layers.0.mlp.up_proj.weight", Flow::kInner, 8.0, 3);
  expect("model.language_model.layers.0.mlp.down_proj.weight", Flow::kResidual, 2.5, 3);
  expect("model.vision_tower.encoder.layers.0.mlp.down_proj.linear.weight", Flow::kResidual, 2.5, 3);
  expect("model.language_model.layers.0.mlp.gate_proj.weight", Flow::kGate, 1.0, 0);
}

TEST(RandomTensorTest, EachKindOfParameterHasItsRange) {
  const auto expect_within = [](const Parameter& parameter, float min, float max) {
    for (const float value : Draw(parameter)) {
      EXPECT_GE(value, min * (min < 0 ? 1.01f : 0.99f)) << parameter.name;
      EXPECT_LE(value, max * (max < 0 ? 0.99f : 1.01f)) << parameter.name;
    }
  };
  expect_within({"input_layernorm.weight", {999}, WeightKind::kNorm}, 0.75f, 1.25f);
  expect_within({"norm.weight", {999}, WeightKind::kNorm, Flow::kHead}, 1.875f, 3.125f);
  expect_within({"q_norm.weight", {256}, WeightKind::kNorm, Flow::kScores}, 0.20625f, 0.34375f);
  expect_within({"layer_scalar", {1}, WeightKind::kLayerScalar}, 0.55f, 1.25f);
  expect_within({"input_min", {}, WeightKind::kLowerBound}, -4.0f, -2.0f);
  expect_within({"output_max", {}, WeightKind::kUpperBound}, 2.0f, 4.0f);
  expect_within({"std_bias", {64}, WeightKind::kBias}, -0.25f, 0.25f);
}

TEST(RandomTensorTest, ValuesAreRoundedToNearest) {
  // Cutting bits off would lower the mean of values around 1 by half a step, 0.003.
  double sum = 0;
  for (const float value : Draw({"a_norm.weight", {200000}, WeightKind::kNorm})) sum += value;
  EXPECT_NEAR(sum / 200000, 1.0, 0.0015);
}

// Draw i of 2^16 is the quantile (i + 1/2) / 2^16, so that the ends are +-4.326 spreads and not without bound.
TEST(RandomTensorTest, TheLargestDrawsAreTheQuantilesAtTheEnds) {
  const std::vector<float> values = Draw({"position_embedding_table", {2, 1024, 512}, WeightKind::kPositionTable});
  const auto [least, largest] = std::ranges::minmax(values);
  EXPECT_NEAR(largest / 0.25, 4.326, 0.02);
  EXPECT_NEAR(least / 0.25, -4.326, 0.02);
}

TEST(RandomTensorTest, NamesAndSeedsGiveDifferentNumbers) {
  const std::vector<float> values = Draw({"a.weight", {8, 6}});
  EXPECT_EQ(values, Draw({"a.weight", {8, 6}}));
  EXPECT_NE(values, Draw({"b.weight", {8, 6}}));
  EXPECT_NE(values, Draw({"a.weight", {8, 6}}, 2));
}

}  // namespace
}  // namespace circlet
