#include "circlet/model/gemma4/weights.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "error_text.h"
#include "fnv_checkpoint.h"
#include "golden.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::Not;

Gemma4Config ConfigA() { return ParseConfig(nlohmann::json::parse(kConfigA), "config.json"); }

std::map<std::string, Tensor> TensorsOf(const Gemma4Config& config) {
  std::map<std::string, Tensor> tensors;
  for (const Parameter& parameter : Parameters(config)) tensors.emplace(parameter.name, FnvTensor(parameter));
  return tensors;
}

// The inventory of `tensors` as a one-file checkpoint.
Inventory InventoryOf(Gemma4Config config, const std::map<std::string, Tensor>& tensors) {
  const TempDirectory directory;
  WriteSafetensors(directory.Path() / "model.safetensors", tensors);
  return CheckInventory(config, Checkpoint::Open(directory.Path()));
}

std::string ErrorOf(const Gemma4Config& config, const std::map<std::string, Tensor>& tensors) {
  return ErrorText([&] { InventoryOf(config, tensors); });
}

std::string ReasonOf(const Inventory& inventory, std::string_view name) {
  for (const UnusedTensor& tensor : inventory.unused)
    if (tensor.name == name) return tensor.reason;
  return "used";
}

Tensor Zeros(Shape shape) { return Tensor(TensorType{DType::kF32, std::move(shape)}); }

TEST(FnvCheckpointTest, HashesAndValuesMatchTheSamples) {
  const auto expect = [](const char* name, uint32_t hash, std::vector<float> values) {
    EXPECT_EQ(Fnv1a(name), hash);
    for (uint32_t i = 0; i < values.size(); ++i) EXPECT_NEAR(FnvWeight(name, hash, i), values[i], 1e-8) << name << i;
  };
  expect("model.language_model.embed_tokens.weight", 397100724u, {-0.16007280f, -0.13024630f, 0.19529615f});
  expect("model.language_model.layers.0.self_attn.q_proj.weight", 506693737u, {0.14757328f, 0.22991461f, -0.23965138f});
  expect("model.language_model.layers.0.input_layernorm.weight", 3940196498u, {0.75426614f, 0.98753422f, 0.90678525f});
}

TEST(CanonicalNameTest, FourPrefixStylesMeanTheSameParameter) {
  for (const char* prefix : {"model.language_model.", "language_model.", "model.", ""}) {
    EXPECT_EQ(CanonicalName(std::string(prefix) + "layers.0.layer_scalar"),
              "model.language_model.layers.0.layer_scalar");
    EXPECT_EQ(CanonicalName(std::string(prefix) + "norm.weight"), "model.language_model.norm.weight");
  }
  for (const char* prefix : {"model.", ""}) {
    EXPECT_EQ(CanonicalName(std::string(prefix) + "vision_tower.std_bias"), "model.vision_tower.std_bias");
    EXPECT_EQ(CanonicalName(std::string(prefix) + "embed_vision.embedding_projection.weight"),
              "model.embed_vision.embedding_projection.weight");
    EXPECT_EQ(CanonicalName(std::string(prefix) + "audio_tower.output_proj.bias"),
              "model.audio_tower.output_proj.bias");
  }
  EXPECT_EQ(CanonicalName("lm_head.weight"), "lm_head.weight");
}

TEST(ParametersTest, RecordedCheckpointsHoldExactlyTheParameters) {
  for (const char* model : {"seed_example", "tiny_e2b", "tiny_wide"}) {
    const std::filesystem::path directory = TestData(fmt::format("golden/{}/model", model));
    const Gemma4Config config = ReadConfig(directory);
    const ModelWeights weights = ModelWeights::Open(config, directory);
    EXPECT_THAT(weights.GetInventory().unused, IsEmpty()) << model;
    EXPECT_EQ(weights.GetInventory().name_in_checkpoint.size(), Parameters(config).size()) << model;
  }
}

// model.md 10: parameters of E2B without towers: tables, projections, attention, MLP, and the small rest.
TEST(ParametersTest, E2bCountsMatchTheCostModel) {
  nlohmann::json text = {{"hidden_size", 1536},        {"intermediate_size", 6144},  {"num_hidden_layers", 35},
                         {"num_key_value_heads", 1},   {"num_kv_shared_layers", 20}, {"use_double_wide_mlp", true},
                         {"model_type", "gemma4_text"}};
  text["layer_types"] = nlohmann::json::array();
  for (int i = 0; i < 35; ++i) text["layer_types"].push_back(i % 5 == 4 ? "full_attention" : "sliding_attention");
  const Gemma4Config config = ParseConfig(text, "config.json");
  int64_t attention = 0, mlp = 0, ple = 0;
  for (const Parameter& parameter : Parameters(config)) {
    if (parameter.name.find(".self_attn.") != std::string::npos) attention += parameter.shape.Elements();
    if (parameter.name.find(".mlp.") != std::string::npos) mlp += parameter.shape.Elements();
    if (parameter.name.ends_with("per_layer_input_gate.weight") ||
        parameter.name.ends_with("per_layer_projection.weight"))
      ple += parameter.shape.Elements();
  }
  EXPECT_EQ(attention, 278412288);
  EXPECT_EQ(mlp, 1557135360);
  EXPECT_EQ(ple, 27525120);
}

TEST(InventoryTest, ScalesOfCodesWithoutAQuantizationConfigAreRefused) {
  std::map<std::string, Tensor> tensors = TensorsOf(ConfigA());
  tensors.emplace("model.language_model.layers.0.mlp.up_proj.weight_scale", Zeros({96, 1}));
  EXPECT_THAT(ErrorOf(ConfigA(), tensors),
              AllOf(HasSubstr("model.safetensors: tensor \"model.language_model.layers.0.mlp.up_proj.weight_scale\""),
                    HasSubstr("no quantization_config"), HasSubstr("give the config.json")));
}

TEST(InventoryTest, UnusedTensorsAreListedWithTheReason) {
  Gemma4Config config = ConfigA();
  std::map<std::string, Tensor> tensors = TensorsOf(config);
  tensors["model.language_model.layers.4.self_attn.k_proj.weight"] = Zeros({16, 32});
  tensors["model.language_model.layers.5.self_attn.v_proj.weight"] = Zeros({32, 32});
  tensors["model.language_model.layers.5.self_attn.k_norm.weight"] = Zeros({16});
  tensors["model.language_model.layers.6.layer_scalar"] = Zeros({1});
  tensors["model.audio_tower.output_proj.bias"] = Zeros({24});
  tensors["model.embed_audio.embedding_projection.weight"] = Zeros({32, 24});
  tensors["lm_head.weight"] = tensors.at("model.language_model.embed_tokens.weight");
  tensors["model.language_model.mystery"] = Zeros({1});
  const Inventory inventory = InventoryOf(config, tensors);
  EXPECT_EQ(inventory.unused.size(), 8u);
  EXPECT_EQ(ReasonOf(inventory, "model.language_model.layers.4.self_attn.k_proj.weight"),
            "layer 4 reads the keys and values of layer 2");
  EXPECT_EQ(ReasonOf(inventory, "model.language_model.layers.5.self_attn.v_proj.weight"),
            "layer 5 reads the keys and values of layer 3");
  EXPECT_EQ(ReasonOf(inventory, "model.language_model.layers.5.self_attn.k_norm.weight"),
            "layer 5 reads the keys and values of layer 3");
  EXPECT_EQ(ReasonOf(inventory, "model.language_model.layers.6.layer_scalar"), "config.json says 6 layers");
  EXPECT_EQ(ReasonOf(inventory, "model.audio_tower.output_proj.bias"), "audio tower: circlet does not run audio");
  EXPECT_EQ(ReasonOf(inventory, "model.embed_audio.embedding_projection.weight"),
            "audio tower: circlet does not run audio");
  EXPECT_EQ(ReasonOf(inventory, "lm_head.weight"), "equal to embed_tokens.weight, which it is tied to");
  EXPECT_EQ(ReasonOf(inventory, "model.language_model.mystery"), "circlet knows no such Gemma 4 tensor");

  config.vision.reset();
  EXPECT_EQ(ReasonOf(InventoryOf(config, tensors), "model.vision_tower.std_bias"),
            "vision tower: config.json has no vision_config");
}

TEST(InventoryTest, ValuesOfKEqualsVLayersAreNotUsed) {
  const std::filesystem::path directory = TestData("golden/tiny_wide/model");
  const Gemma4Config config = ReadConfig(directory);
  std::map<std::string, Tensor> tensors = TensorsOf(config);
  EXPECT_EQ(tensors.count("model.language_model.layers.1.self_attn.v_proj.weight"), 0u);
  tensors["model.language_model.layers.1.self_attn.v_proj.weight"] = Zeros({24, 96});
  EXPECT_EQ(ReasonOf(InventoryOf(config, tensors), "model.language_model.layers.1.self_attn.v_proj.weight"),
            "attention_k_eq_v: layer 1 makes its values of k_proj");
}

TEST(InventoryTest, MissingAndMisshapenTensorsAreAllNamedWithFileExpectedAndFound) {
  const Gemma4Config config = ConfigA();
  std::map<std::string, Tensor> tensors = TensorsOf(config);
  tensors.erase("model.language_model.layers.3.mlp.up_proj.weight");
  tensors["model.language_model.norm.weight"] = Zeros({33});
  tensors["model.vision_tower.std_bias"] = Tensor(TensorType{DType::kI32, {32}});
  EXPECT_THAT(
      ErrorOf(config, tensors),
      AllOf(HasSubstr(
                "model.safetensors: tensor \"model.language_model.layers.3.mlp.up_proj.weight\" [48,32] is missing"),
            HasSubstr("model.safetensors: tensor \"model.language_model.norm.weight\" is float32[33], expected a float "
                      "type of shape [32]"),
            HasSubstr("tensor \"model.vision_tower.std_bias\" is int32[32], expected a float type of shape [32]"),
            HasSubstr("config.json says 6 layers: was a shard left out of the download")));
}

TEST(InventoryTest, ManyProblemsAreCountedNotListed) {
  const Gemma4Config config = ConfigA();
  std::map<std::string, Tensor> tensors = TensorsOf(config);
  std::erase_if(tensors, [](const auto& entry) { return entry.first.find(".layers.1.") != std::string::npos; });
  const std::string text = ErrorOf(config, tensors);
  EXPECT_THAT(text, HasSubstr("... and "));
  EXPECT_LT(std::count(text.begin(), text.end(), '\n'), 14);
}

TEST(InventoryTest, AdaptersAndOtherNamesShowAStoredNameAndWhatToDo) {
  const Gemma4Config config = ConfigA();
  std::map<std::string, Tensor> adapter, other;
  for (const auto& [name, tensor] : TensorsOf(config)) {
    adapter["base_model.model." + name] = tensor;
    other["transformer." + name] = tensor;
  }
  EXPECT_THAT(ErrorOf(config, adapter), AllOf(HasSubstr("\"base_model.model.model.embed_vision."),
                                              HasSubstr("merge the adapter"), Not(HasSubstr("is missing"))));
  EXPECT_THAT(ErrorOf(config, other),
              AllOf(HasSubstr("is missing"), HasSubstr("other tensors, such as \"transformer.model.")));
}

TEST(InventoryTest, ATowerWithoutAnyTensorIsNone) {
  Gemma4Config config = ConfigA();
  std::map<std::string, Tensor> tensors = TensorsOf(config);
  std::erase_if(tensors, [](const auto& entry) { return IsVisionTensor(entry.first); });
  const TempDirectory directory;
  WriteSafetensors(directory.Path() / "model.safetensors", tensors);
  const ModelWeights weights = ModelWeights::Open(config, directory.Path());
  EXPECT_FALSE(weights.GetConfig().vision.has_value());
  EXPECT_THAT(weights.GetInventory().notes, testing::ElementsAre(HasSubstr("no vision tensors")));
}

TEST(InventoryTest, OneParameterUnderTwoNamesIsAnError) {
  const Gemma4Config config = ConfigA();
  std::map<std::string, Tensor> tensors = TensorsOf(config);
  tensors["language_model.norm.weight"] = Zeros({32});
  EXPECT_THAT(ErrorOf(config, tensors),
              AllOf(HasSubstr("\"model.language_model.norm.weight\""), HasSubstr("\"language_model.norm.weight\""),
                    HasSubstr("keep one of them")));
}

TEST(ModelWeightsTest, TiedHeadIsTheEmbedding) {
  const TempDirectory directory;
  WriteFnvCheckpoint(directory.Path());
  const Gemma4Config config = ReadConfig(directory.Path());
  const ModelWeights weights = ModelWeights::Open(config, directory.Path());
  EXPECT_THAT(weights.GetInventory().unused, IsEmpty());
  EXPECT_TRUE(weights.Has("lm_head.weight"));
  EXPECT_EQ(weights.Stored("lm_head.weight").Raw(), weights.Stored("model.language_model.embed_tokens.weight").Raw());
  EXPECT_NEAR(weights.Float("lm_head.weight").F32()[2], 0.19529615f, 1e-8);
  EXPECT_EQ(weights.ScalarOf("model.vision_tower.encoder.layers.1.mlp.up_proj.input_max"), 1.5f);
  weights.Release("lm_head.weight");
  EXPECT_NEAR(weights.Float("lm_head.weight").F32()[2], 0.19529615f, 1e-8) << "a released tensor can be read again";
}

TEST(ModelWeightsTest, AStoredHeadThatDiffersIsUsedWhateverConfigSays) {
  const TempDirectory directory;
  std::map<std::string, Tensor> tensors = TensorsOf(ConfigA());
  tensors["lm_head.weight"] = Zeros({64, 32});
  WriteSafetensors(directory.Path() / "model.safetensors", tensors);
  const ModelWeights weights = ModelWeights::Open(ConfigA(), directory.Path());
  EXPECT_FALSE(weights.GetConfig().tie_word_embeddings);
  EXPECT_EQ(weights.Float("lm_head.weight").F32()[2], 0.0f);
  EXPECT_THAT(weights.GetInventory().notes, testing::ElementsAre(HasSubstr("lm_head.weight differs")));
}

TEST(ModelWeightsTest, BareNamesAreFoundUnderCanonicalOnes) {
  const TempDirectory directory;
  Gemma4Config config = ConfigA();
  config.vision.reset();
  std::map<std::string, Tensor> bare;
  for (const auto& [name, tensor] : TensorsOf(config))
    bare[name.substr(std::string("model.language_model.").size())] = tensor;
  WriteSafetensors(directory.Path() / "model.safetensors", bare);
  const ModelWeights weights = ModelWeights::Open(config, directory.Path());
  EXPECT_NEAR(weights.Float("model.language_model.layers.0.self_attn.q_proj.weight").F32()[0], 0.14757328f, 1e-8);
}

TEST(ModelWeightsTest, UnknownNameNamesTheNearest) {
  const TempDirectory directory;
  WriteFnvCheckpoint(directory.Path());
  const ModelWeights weights = ModelWeights::Open(ReadConfig(directory.Path()), directory.Path());
  try {
    weights.Stored("model.language_model.layers.0.mlp.up_prj.weight");
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("nearest: \"model.language_model.layers.0.mlp.up_proj.weight\""));
  }
}

TEST(ModelWeightsTest, ErrorsNameTheDirectory) {
  const TempDirectory directory;
  const Gemma4Config config = ConfigA();
  std::map<std::string, Tensor> tensors = TensorsOf(config);
  tensors.erase("model.language_model.norm.weight");
  WriteSafetensors(directory.Path() / "model.safetensors", tensors);
  try {
    ModelWeights::Open(config, directory.Path());
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), AllOf(HasSubstr(directory.Path().string()), HasSubstr("is missing")));
  }
}

}  // namespace
}  // namespace circlet
