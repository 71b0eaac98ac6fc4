#include "circlet/model/gemma4/config.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "fnv_checkpoint.h"
#include "golden.h"
#include "paths.h"

namespace circlet {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

// E2B as published (model.md 2.4).
json E2b() {
  json text = {{"model_type", "gemma4_text"}, {"hidden_size", 1536}, {"intermediate_size", 6144}, {"head_dim", 256}};
  text.update({{"num_hidden_layers", 35}, {"num_attention_heads", 8}, {"num_key_value_heads", 1}});
  text.update({{"global_head_dim", 512}, {"num_global_key_value_heads", nullptr}, {"attention_k_eq_v", false}});
  text.update({{"num_kv_shared_layers", 20}, {"use_double_wide_mlp", true}, {"final_logit_softcapping", 30.0}});
  text["layer_types"] = json::array();
  for (int i = 0; i < 35; ++i) text["layer_types"].push_back(i % 5 == 4 ? "full_attention" : "sliding_attention");
  return {{"architectures", {"Gemma4ForConditionalGeneration"}},
          {"model_type", "gemma4"},
          {"text_config", text},
          {"vision_config", {{"model_type", "gemma4_vision"}, {"use_clipped_linears", true}}},
          {"audio_config", {{"model_type", "gemma4_audio"}}},
          {"eos_token_id", {1, 106}}};
}

Gemma4Config Parse(const json& config) { return ParseConfig(config, "config.json"); }

std::string ErrorOf(const json& config) {
  try {
    Parse(config);
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

std::string ErrorWith(const char* pointer, const json& value) {
  json config = E2b();
  config[json::json_pointer(pointer)] = value;
  return ErrorOf(config);
}

TEST(ConfigTest, E2bLayersShareTheLastProducerOfTheirType) {
  const Gemma4Config config = Parse(E2b());
  ASSERT_EQ(config.text.NumLayers(), 35);
  for (int i = 0; i < 35; ++i) {
    const LayerConfig& layer = config.text.layers[i];
    EXPECT_EQ(layer.full, i % 5 == 4) << i;
    EXPECT_EQ(layer.head_dim, layer.full ? 512 : 256) << i;
    EXPECT_EQ(layer.kv_heads, 1) << i;
    EXPECT_EQ(layer.window, layer.full ? 0 : 512) << i;
    EXPECT_EQ(layer.kv_shared, i >= 15) << i;
    EXPECT_EQ(layer.kv_source, i < 15 ? i : layer.full ? 14 : 13) << i;
    EXPECT_EQ(layer.stores_kv, i == 13 || i == 14) << i;
    EXPECT_EQ(layer.intermediate, i < 15 ? 6144 : 12288) << i;
    EXPECT_EQ(layer.rope.type, layer.full ? RopeConfig::Type::kProportional : RopeConfig::Type::kDefault) << i;
    EXPECT_EQ(layer.rope.theta, layer.full ? 1e6f : 1e4f) << i;
  }
  EXPECT_EQ(config.text.ple_dim, 256);
  EXPECT_EQ(config.text.vocab_size, 262144);
  EXPECT_EQ(config.text.final_logit_softcapping, 30.0f);
  ASSERT_TRUE(config.vision.has_value());
  EXPECT_EQ(config.vision->num_layers, 16);
  EXPECT_EQ(config.vision->PatchValues(), 768);
  EXPECT_TRUE(config.has_audio);
  EXPECT_TRUE(config.tie_word_embeddings);
  EXPECT_EQ(config.image_token_id, 258880);
  EXPECT_EQ(config.eoa_token_id, 258883);
  EXPECT_THAT(config.eos_token_ids, ElementsAre(1, 106));
  EXPECT_THAT(config.unknown_keys, IsEmpty());
}

TEST(ConfigTest, BothSpellingsOfFullLayersHeadSizesAgree) {
  json published = E2b();
  json resaved = E2b();
  resaved["text_config"].erase("global_head_dim");
  resaved["text_config"].erase("num_global_key_value_heads");
  for (const char* layer : {"04", "09", "14", "19", "24", "29", "34"})
    resaved["text_config"]["per_layer_config"][layer] = {{"head_dim", 512}};
  EXPECT_EQ(Parse(published).text.layers, Parse(resaved).text.layers);

  // With per_layer_config the global keys count for nothing, and layers not listed take the base values.
  resaved["text_config"]["global_head_dim"] = 64;
  resaved["text_config"]["per_layer_config"] = json::object();
  EXPECT_EQ(Parse(resaved).text.layers[4].head_dim, 256);
}

TEST(ConfigTest, FullLayersAre512WideWhenNothingIsSaid) {
  json config = E2b();
  config["text_config"].erase("global_head_dim");
  EXPECT_EQ(Parse(config).text.layers[4].head_dim, 512);
}

TEST(ConfigTest, GlobalKvHeadsCountOnlyWithKEqualsV) {
  json config = E2b();
  config["text_config"]["num_global_key_value_heads"] = 4;
  EXPECT_EQ(Parse(config).text.layers[4].kv_heads, 1);
  config["text_config"]["attention_k_eq_v"] = true;
  const Gemma4Config parsed = Parse(config);
  EXPECT_EQ(parsed.text.layers[4].kv_heads, 4);
  EXPECT_TRUE(parsed.text.layers[4].k_eq_v);
  EXPECT_EQ(parsed.text.layers[3].kv_heads, 1);
  EXPECT_FALSE(parsed.text.layers[3].k_eq_v);
}

TEST(ConfigTest, LastLayerIsFullAttentionWhateverTheListSays) {
  json config = E2b();
  config["text_config"]["layer_types"][34] = "sliding_attention";
  EXPECT_TRUE(Parse(config).text.layers[34].full);
  config["text_config"].erase("layer_types");
  const Gemma4Config parsed = Parse(config);
  EXPECT_TRUE(parsed.text.layers[5].full);
  EXPECT_FALSE(parsed.text.layers[4].full);
  EXPECT_TRUE(parsed.text.layers[34].full);
}

TEST(ConfigTest, NullEqualsAbsent) {
  json config = E2b();
  config["vision_config"] = nullptr;
  config["audio_config"] = nullptr;
  config["text_config"]["hidden_size_per_layer_input"] = nullptr;
  config["text_config"]["final_logit_softcapping"] = nullptr;
  config["text_config"]["rope_parameters"] = nullptr;
  const Gemma4Config parsed = Parse(config);
  EXPECT_FALSE(parsed.vision.has_value());
  EXPECT_FALSE(parsed.has_audio);
  EXPECT_EQ(parsed.text.ple_dim, 256);
  EXPECT_FALSE(parsed.text.final_logit_softcapping.has_value());
}

TEST(ConfigTest, TextOnlyClassesReadTheFileItselfAsTextConfig) {
  for (const char* architecture : {"Gemma4ForCausalLM", "Gemma4TextModel"}) {
    json config = E2b()["text_config"];
    config["architectures"] = {architecture};
    config["tie_word_embeddings"] = false;
    config["eos_token_id"] = 1;
    const Gemma4Config parsed = Parse(config);
    EXPECT_EQ(parsed.architecture, architecture);
    EXPECT_EQ(parsed.text.layers, Parse(E2b()).text.layers);
    EXPECT_FALSE(parsed.vision.has_value());
    EXPECT_FALSE(parsed.tie_word_embeddings);
    EXPECT_EQ(parsed.image_token_id, -1);
    EXPECT_THAT(parsed.eos_token_ids, ElementsAre(1));
    EXPECT_THAT(parsed.unknown_keys, IsEmpty());
  }
  json bare = E2b();
  bare["architectures"] = {"Gemma4Model"};
  EXPECT_TRUE(Parse(bare).vision.has_value());
}

TEST(ConfigTest, AliasOfEndOfAudioIsRead) {
  json config = E2b();
  config["eoa_token_id"] = 7;
  EXPECT_EQ(Parse(config).eoa_token_id, 7);
  config["eoa_token_index"] = 8;
  EXPECT_EQ(Parse(config).eoa_token_id, 8);
}

TEST(ConfigTest, RecordedAndBundledConfigsAreReadWithoutUnknownKeys) {
  const Gemma4Config e2b = ReadConfig(TestData("golden/tiny_e2b/model"));
  EXPECT_THAT(e2b.unknown_keys, IsEmpty());
  EXPECT_EQ(e2b.text.layers[2].head_dim, 32);
  EXPECT_EQ(e2b.text.layers[6].kv_source, 2);
  EXPECT_EQ(e2b.text.layers[5].kv_source, 3);
  EXPECT_THAT(e2b.eos_token_ids, ElementsAre(1));

  const Gemma4Config wide = ReadConfig(TestData("golden/tiny_wide/model"));
  EXPECT_THAT(wide.unknown_keys, IsEmpty());
  EXPECT_FALSE(wide.text.HasPle());
  EXPECT_FALSE(wide.tie_word_embeddings);
  EXPECT_EQ(wide.text.layers[1].head_dim, 24);
  EXPECT_EQ(wide.text.layers[1].kv_heads, 1);
  EXPECT_EQ(wide.text.layers[0].kv_heads, 2);

  const Gemma4Config seed = ReadConfig(TestData("golden/seed_example/model"));
  EXPECT_THAT(seed.unknown_keys, IsEmpty());
  EXPECT_EQ(seed.text.layers[0].rope.type, RopeConfig::Type::kDefault);
  EXPECT_EQ(seed.text.layers[0].head_dim, 32);

  const std::filesystem::path example = SourcePath("examples/tiny-gemma4");
  const Gemma4Config tiny = ReadConfig(example);
  EXPECT_THAT(tiny.unknown_keys, IsEmpty());
  EXPECT_EQ(tiny.eoa_token_id, 2046);
  EXPECT_THAT(tiny.eos_token_ids, ElementsAre(1, 19, 12)) << "generation_config.json decides";
}

TEST(ConfigTest, UnknownKeysAreListedWithTheirPlace) {
  json config = E2b();
  config["new_top"] = 1;
  config["text_config"]["new_thing"] = {{"a", 1}};
  config["text_config"]["rope_parameters"] = {
      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 1e4}, {"turns", 3}}},
      {"full_attention", {{"rope_type", "default"}, {"rope_theta", 1e4}}}};
  config["vision_config"]["zoom"] = 2;
  EXPECT_THAT(Parse(config).unknown_keys,
              ::testing::UnorderedElementsAre("new_top", "text_config.new_thing", "vision_config.zoom",
                                              "text_config.rope_parameters.sliding_attention.turns"));
}

TEST(ConfigTest, UnsupportedFeaturesAreRefusedByFieldValueAndWhatIsSupported) {
  EXPECT_THAT(ErrorWith("/text_config/enable_moe_block", true),
              AllOf(HasSubstr("config.json: text_config.enable_moe_block: true; mixture of experts"),
                    HasSubstr("not supported"), HasSubstr("E2B and E4B")));
  EXPECT_THAT(ErrorWith("/text_config/use_bidirectional_attention", "all"),
              AllOf(HasSubstr("text_config.use_bidirectional_attention: \"all\""), HasSubstr("not supported"),
                    HasSubstr("null")));
  for (const char* place : {"/quantization_config", "/text_config/quantization_config", "/vision_config/quantization_config"})
    EXPECT_THAT(ErrorWith(place, {{"quant_method", "gptq"}}),
                AllOf(HasSubstr("quantization_config.quant_method: \"gptq\": the checkpoint is quantized already, by GPTQ"),
                      HasSubstr("-unquantized")));
  EXPECT_THAT(ErrorWith("/text_config/quantization_config", {{"quant_method", "gemma"}}),
              AllOf(HasSubstr("text_config.quantization_config: "), HasSubstr("at the root of config.json")));
  EXPECT_THAT(ErrorWith("/quantization", {{"group_size", 64}, {"bits", 4}}), HasSubstr("by MLX"));
  EXPECT_THAT(ErrorWith("/text_config/hidden_activation", "silu"),
              HasSubstr("text_config.hidden_activation: \"silu\"; circlet supports \"gelu_pytorch_tanh\" only"));
  EXPECT_THAT(ErrorWith("/vision_config/hidden_activation", "gelu"),
              HasSubstr("vision_config.hidden_activation: \"gelu\"; circlet supports \"gelu_pytorch_tanh\" only"));
  EXPECT_THAT(ErrorWith("/text_config/attention_bias", true),
              AllOf(HasSubstr("text_config.attention_bias: true"), HasSubstr("supports false")));
  const json yarn = {{"sliding_attention", {{"rope_type", "yarn"}, {"rope_theta", 1e4}}}};
  EXPECT_THAT(ErrorWith("/text_config/rope_parameters", yarn),
              AllOf(HasSubstr("text_config.rope_parameters.sliding_attention.rope_type: \"yarn\""),
                    HasSubstr("circlet supports \"default\", \"linear\" and \"proportional\"")));
  EXPECT_THAT(ErrorWith("/vision_config/rope_parameters", {{"rope_type", "proportional"}}),
              AllOf(HasSubstr("vision_config.rope_parameters.rope_type: \"proportional\""), HasSubstr("\"axial\"")));
  EXPECT_THAT(ErrorWith("/text_config/layer_types/3", "linear_attention"),
              AllOf(HasSubstr("text_config.layer_types: entry 3 is \"linear_attention\""),
                    HasSubstr("\"sliding_attention\" and \"full_attention\"")));
  EXPECT_THAT(ErrorWith("/architectures", {"Gemma3ForConditionalGeneration"}),
              AllOf(HasSubstr("architectures: [\"Gemma3ForConditionalGeneration\"]"), HasSubstr("Gemma4ForCausalLM")));
  EXPECT_THAT(ErrorWith("/model_type", "gemma3"), HasSubstr("model_type: \"gemma3\"; circlet reads Gemma 4"));
  EXPECT_THAT(ErrorWith("/model_type", "gemma4_text"), HasSubstr("both must agree"));
  EXPECT_THAT(ErrorOf(json::parse(kConfigA, nullptr, true).at("vision_config")),
              HasSubstr("model_type: \"gemma4_vision\""));
}

TEST(ConfigTest, SizesOutOfRangeNameFieldValueAndRange) {
  for (const char* key : {"hidden_size", "vocab_size", "intermediate_size", "num_attention_heads",
                          "num_key_value_heads", "head_dim", "global_head_dim", "sliding_window"}) {
    for (const int64_t value : {int64_t{0}, int64_t{-3}, int64_t{16777217}, int64_t{1} << 40}) {
      EXPECT_THAT(
          ErrorWith((std::string("/text_config/") + key).c_str(), value),
          HasSubstr(fmt::format("config.json: text_config.{}: {} is out of range; must be 1 to 16777216", key, value)));
    }
  }
  EXPECT_THAT(ErrorWith("/text_config/num_hidden_layers", 1025), HasSubstr("1025 is out of range; must be 1 to 1024"));
  EXPECT_THAT(ErrorWith("/text_config/num_kv_shared_layers", 35), HasSubstr("35 is out of range; must be 0 to 34"));
  EXPECT_THAT(ErrorWith("/text_config/hidden_size_per_layer_input", -1), HasSubstr("must be 0 to"));
  EXPECT_THAT(ErrorWith("/text_config/pad_token_id", 262144), HasSubstr("must be 0 to 262143"));
  EXPECT_THAT(ErrorWith("/text_config/rms_norm_eps", 0.0), HasSubstr("rms_norm_eps: 0; must be positive"));
  EXPECT_THAT(ErrorWith("/text_config/final_logit_softcapping", -30.0), HasSubstr("-30; must be positive"));
  EXPECT_THAT(ErrorWith("/text_config/hidden_size", "big"), HasSubstr("text_config.hidden_size"));
  EXPECT_THAT(ErrorWith("/text_config/use_double_wide_mlp", 1), HasSubstr("text_config.use_double_wide_mlp"));
  EXPECT_THAT(ErrorWith("/vision_config/patch_size", 0), HasSubstr("vision_config.patch_size: 0 is out of range"));
  EXPECT_THAT(ErrorWith("/eos_token_id", -1), HasSubstr("eos_token_id: -1"));
  EXPECT_THAT(ErrorWith("/text_config", nullptr), HasSubstr("text_config"));
  EXPECT_THAT(ErrorOf(json::array()), HasSubstr("config.json"));
}

TEST(ConfigTest, SizesThatDoNotFitEachOtherNameBoth) {
  EXPECT_THAT(ErrorWith("/text_config/num_key_value_heads", 3),
              HasSubstr("num_key_value_heads: 3 in layer 0; must divide num_attention_heads, which is 8"));
  EXPECT_THAT(ErrorWith("/text_config/head_dim", 255), HasSubstr("head_dim: 255 in layer 0; must be even"));
  EXPECT_THAT(ErrorWith("/vision_config/head_dim", 62), HasSubstr("head_dim: 62; must be a multiple of 4"));
  EXPECT_THAT(ErrorWith("/vision_config/num_key_value_heads", 5), HasSubstr("must divide num_attention_heads"));
  EXPECT_THAT(ErrorWith("/text_config/layer_types", {"full_attention"}),
              HasSubstr("layer_types: 1 entries for num_hidden_layers 35; both must agree"));
  EXPECT_THAT(ErrorWith("/text_config/num_kv_shared_layers", 32),
              HasSubstr("num_kv_shared_layers: 32: layer 4 finds no earlier full_attention layer"));
  EXPECT_THAT(ErrorWith("/text_config/per_layer_config", {{"34", {{"head_dim", 512}}}}),
              HasSubstr("layer 34 has 1 key/value heads of size 512 and shares those of layer 14, 1 of size 256"));
}

TEST(ConfigTest, TheTopLevelSaysWhetherTheHeadIsTied) {
  json config = E2b();
  config["text_config"]["tie_word_embeddings"] = false;
  EXPECT_TRUE(Parse(config).tie_word_embeddings);
  config["tie_word_embeddings"] = true;
  EXPECT_TRUE(Parse(config).tie_word_embeddings);
  config["tie_word_embeddings"] = false;
  config["text_config"]["tie_word_embeddings"] = true;
  EXPECT_FALSE(Parse(config).tie_word_embeddings);
}

TEST(ConfigTest, RopeScalingOverridesRopeParameters) {
  json config = E2b();
  config["text_config"]["rope_parameters"] = {{"full_attention", {{"rope_theta", 1.0}}},
                                              {"sliding_attention", {{"rope_theta", 2.0}}}};
  config["text_config"]["rope_scaling"] = {
      {"full_attention", {{"type", "linear"}, {"factor", 8.0}, {"rope_theta", 3.0}}},
      {"sliding_attention", {{"rope_type", "default"}, {"partial_rotary_factor", 0.5}, {"rope_theta", 4.0}}}};
  config["vision_config"]["rope_parameters"] = {{"rope_theta", 5.0}};
  config["vision_config"]["rope_scaling"] = {{"type", "axial"}, {"rope_theta", 6.0}};
  const Gemma4Config parsed = Parse(config);
  EXPECT_EQ(parsed.text.layers[4].rope,
            (RopeConfig{.type = RopeConfig::Type::kProportional, .theta = 3.0f, .factor = 8.0f}));
  EXPECT_EQ(parsed.text.layers[0].rope, RopeConfig{.theta = 4.0f});
  EXPECT_EQ(parsed.vision->rope_theta, 6.0f);
  EXPECT_THAT(parsed.unknown_keys, IsEmpty());

  EXPECT_THAT(ErrorWith("/text_config/rope_scaling", {{"rope_type", "linear"}, {"factor", 8.0}}),
              AllOf(HasSubstr("text_config.rope_scaling: {\"factor\":8.0,\"rope_type\":\"linear\"}"),
                    HasSubstr("expected an entry for each layer type")));
}

TEST(ConfigTest, PerLayerConfigNamesTheEntryItCannotUse) {
  EXPECT_THAT(ErrorWith("/text_config/per_layer_config", {{"35", {{"head_dim", 512}}}}),
              HasSubstr("text_config.per_layer_config.35: no such layer; keys are layer numbers from 0 to 34"));
  EXPECT_THAT(ErrorWith("/text_config/per_layer_config", {{"4x", {{"head_dim", 512}}}}), HasSubstr("no such layer"));
  EXPECT_THAT(ErrorWith("/text_config/per_layer_config", {{"4", {{"head_dim", 512}}}, {"04", {{"head_dim", 256}}}}),
              HasSubstr("layer 4 is given twice"));
  EXPECT_THAT(ErrorWith("/text_config/per_layer_config", {{"4", {{"sliding_window", 8}}}}),
              AllOf(HasSubstr("per_layer_config.4.sliding_window"), HasSubstr("head_dim and num_key_value_heads")));
}

TEST(ConfigTest, RopeOfAUsedLayerTypeMayNotBeMissing) {
  const json only_full = {{"full_attention", {{"rope_type", "default"}, {"rope_theta", 1e4}}}};
  EXPECT_THAT(ErrorWith("/text_config/rope_parameters", only_full),
              HasSubstr("rope_parameters: no entry \"sliding_attention\", the type of layer 0; add it"));
  EXPECT_THAT(ErrorWith("/text_config/rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}),
              HasSubstr("rope_theta: missing"));
}

TEST(ConfigTest, AnyFieldOfAnyTypeIsReadOrRefusedByName) {
  json full = E2b();
  full["text_config"]["per_layer_config"] = {{"4", {{"head_dim", 512}}}};
  full["text_config"]["rope_parameters"] = {
      {"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 1e4}}},
      {"full_attention", {{"rope_type", "proportional"}, {"partial_rotary_factor", 0.25}, {"rope_theta", 1e6}}}};
  full["vision_config"]["rope_parameters"] = {{"rope_type", "axial"}, {"rope_theta", 100.0}};
  const json values =
      json::parse(R"([null, true, 0, -1, 7, 0.5, 1e300, -1e300, 9223372036854775807, 18446744073709551615,
                                      "", "x", [], [1], ["x"], {}, {"x": 1}, {"0": {}}, [[]], [null]])");
  int refused = 0;
  const json fields = full.flatten();
  for (const auto& [pointer, unused] : fields.items()) {
    // The field itself and every object around it.
    for (json::json_pointer at(pointer); !at.empty(); at = at.parent_pointer()) {
      for (const json& value : values) {
        json config = full;
        config[at] = value;
        try {
          Parse(config);
        } catch (const Error& error) {
          ++refused;
          EXPECT_THAT(error.what(), ::testing::StartsWith("config.json: "));
        }
      }
    }
  }
  EXPECT_GT(refused, 500);
}

TEST(ConfigTest, MissingFileNamesThePath) {
  const TempDirectory directory;
  try {
    ReadConfig(directory.Path());
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr((directory.Path() / "config.json").string()));
  }
}

}  // namespace
}  // namespace circlet
