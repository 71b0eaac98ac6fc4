#include "circlet/io/packed/quantization_config.h"

#include <gmock/gmock.h>

#include "error_text.h"
#include "io/packed/pattern.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Optional;
using Module = QuantizationConfig::Module;

// ---- Patterns
// ---------------------------------------------------------------------------------------------------------

std::optional<size_t> Search(const std::string& pattern, std::string_view name) {
  return Pattern(pattern, "test").Search(name);
}

std::string PatternError(const std::string& pattern) {
  return ErrorText([&] { Pattern(pattern, "config.json:3: patterns"); });
}

TEST(PatternTest, FindsWhereTheLeftmostMatchBegins) {
  EXPECT_THAT(Search("b+", "abbb"), Optional(1u));
  EXPECT_THAT(Search("", "abc"), Optional(0u));
  EXPECT_THAT(Search("c|b", "abc"), Optional(1u));
  EXPECT_THAT(Search(R"(layers\.(\d|1[0-4])\.mlp\.)", "x.layers.14.mlp.up"), Optional(2u));
  EXPECT_EQ(Search(R"(layers\.(\d|1[0-4])\.mlp\.)", "x.layers.15.mlp.up"), std::nullopt);
  EXPECT_THAT(Search("^lm_head$", "lm_head"), Optional(0u));
  EXPECT_EQ(Search("^lm_head$", "my.lm_head"), std::nullopt);
  EXPECT_THAT(Search(R"(tower(?!.*lconv1d\.start))", "tower.lconv1d.end"), Optional(0u));
  EXPECT_EQ(Search(R"(tower(?!.*lconv1d\.start))", "tower.x.lconv1d.start"), std::nullopt);
  EXPECT_THAT(Search("(?=.*z)a", "bazz"), Optional(1u));
  EXPECT_THAT(Search("[^a-c.]x{2,3}?", "ax.xdxx"), Optional(4u));
  EXPECT_THAT(Search("a{,2}b{1}", "aaab"), Optional(1u));
  EXPECT_THAT(Search("{a}", "{a}"), Optional(0u));  // no count, so a character
  EXPECT_THAT(Search(R"(\bk_proj\b)", "relative_k_proj.k_proj"), Optional(16u));
  EXPECT_THAT(Search(R"([\d\-]+$)", "a-1-"), Optional(1u));
}

TEST(PatternTest, TakesPolynomialTime) {
  const std::string name(100, 'a');
  EXPECT_EQ(Search("(a*)*b", name), std::nullopt);
  EXPECT_EQ(Search("(a|aa)+$b", name), std::nullopt);
  EXPECT_EQ(Search("(.*.*.*=)*", "x").value_or(9), 0u);
  EXPECT_THAT(ErrorText([&] { Search("(((a*){200}){200}){200}c", name); }), HasSubstr("takes too long to match"));
}

TEST(PatternTest, NamesWhatItDoesNotRead) {
  EXPECT_THAT(PatternError("(a"),
              AllOf(HasSubstr("config.json:3: patterns: pattern \"(a\", character 3: a group is not closed"),
                    HasSubstr("Python's regular expressions")));
  EXPECT_THAT(PatternError("a)"), HasSubstr("\")\" closes nothing"));
  EXPECT_THAT(PatternError("*a"), HasSubstr("character 1: nothing to repeat"));
  EXPECT_THAT(PatternError("a**"), HasSubstr("repeats a repetition"));
  EXPECT_THAT(PatternError("[b-a]"), HasSubstr("a range of no characters"));
  EXPECT_THAT(PatternError("[a"), HasSubstr("a class is not closed"));
  EXPECT_THAT(PatternError("a\\"), HasSubstr("a backslash stands at the end"));
  EXPECT_THAT(PatternError("(a)\\1"), HasSubstr("\\1 is not supported"));
  EXPECT_THAT(PatternError("(?<=a)b"), HasSubstr("only (?: (?= and (?! are supported"));
  EXPECT_THAT(PatternError("a{3,2}"), HasSubstr("the second count is smaller"));
  EXPECT_THAT(PatternError("a{99999999999}"), HasSubstr("repeats too often"));
  EXPECT_THAT(PatternError("(?=(?!a)b)"), HasSubstr("a lookahead within a lookahead"));
  EXPECT_THAT(PatternError(std::string(100, '(')), HasSubstr("nested too deeply"));
  EXPECT_THAT(PatternError(std::string(2000, 'a')), HasSubstr("2000 characters"));
}

// ---- quantization_config
// ----------------------------------------------------------------------------------------------

QuantizationConfig Parsed(const std::string& section) {
  return QuantizationConfig::Parse("{\"quantization_config\":\n" + section + "}", "config.json").value();
}

std::string ErrorOf(const std::string& section) {
  return ErrorText([&] { Parsed(section); });
}

int BitsOf(const QuantizationConfig& config, std::string_view module, Module kind = Module::kLinear,
           bool tied = false) {
  return config.FormOf(module, kind, tied).bits;
}

TEST(QuantizationConfigTest, AConfigWithoutTheSectionHasNone) {
  EXPECT_FALSE(QuantizationConfig::Parse(R"({"model_type": "gemma4"})", "config.json"));
}

// The reference joins the patterns to one alternation and searches once.
TEST(QuantizationConfigTest, TheMatchThatStartsFurthestLeftDecidesAndOfThoseTheFirst) {
  const QuantizationConfig config = Parsed(R"({"quant_method": "gemma", "num_bits": 8, "module_quant_configs": {
      "mlp\\.down_proj$": {"num_bits": 2},
      "layers\\.([0-4])\\.mlp\\.": {},
      "layers\\.\\d+\\.mlp\\.": {"num_bits": 4},
      "a_later_key": {"num_bits": 2}}, "modules_to_not_convert": []})");
  EXPECT_EQ(BitsOf(config, "model.language_model.layers.7.mlp.down_proj"), 4);
  EXPECT_EQ(BitsOf(config, "model.language_model.layers.3.mlp.down_proj"), 8) << "a pattern without num_bits";
  EXPECT_EQ(BitsOf(config, "x.mlp.down_proj"), 2);
  EXPECT_EQ(BitsOf(config, "lm_head"), 8);
}

TEST(QuantizationConfigTest, PatternsKeepTheOrderOfTheFile) {
  const std::string narrow = R"("z?m": {"num_bits": 2})", wide = R"("m": {"num_bits": 8})";
  const auto parsed = [](const std::string& a, const std::string& b) {
    return Parsed(R"({"quant_method": "gemma", "module_quant_configs": {)" + a + ", " + b + "}}");
  };
  EXPECT_EQ(BitsOf(parsed(narrow, wide), "m"), 2);
  EXPECT_EQ(BitsOf(parsed(wide, narrow), "m"), 8);
}

TEST(QuantizationConfigTest, AKeyExcludesModulesByPrefixPatternAndByEnd) {
  const QuantizationConfig config = Parsed(R"({"quant_method": "gemma", "quantize_embeddings": true,
      "modules_to_not_convert": ["model.embed_vision", "relative_k_proj", "patch_embedder", "model\\.\\w+_tower\\.head"]})");
  EXPECT_EQ(BitsOf(config, "model.embed_vision.embedding_projection"), 0);
  EXPECT_EQ(BitsOf(config, "model.audio_tower.layers.0.relative_k_proj"), 0);
  EXPECT_EQ(BitsOf(config, "model.vision_tower.patch_embedder.input_proj"), 4) << "neither a prefix nor the end";
  EXPECT_EQ(BitsOf(config, "model.vision_tower.head.x"), 0);
  EXPECT_EQ(BitsOf(config, "model.vision_tower.headless"), 4);
  EXPECT_EQ(BitsOf(config, "lm_head"), 4);
  EXPECT_EQ(BitsOf(config, "model.language_model.embed_tokens", Module::kTable), 4);
}

TEST(QuantizationConfigTest, WithoutExclusionsTheHeadAndWhatItIsTiedToStayFloat) {
  const QuantizationConfig config = Parsed(R"({"quant_method": "gemma", "quantize_embeddings": true})");
  EXPECT_EQ(BitsOf(config, "lm_head"), 0);
  EXPECT_EQ(BitsOf(config, "model.language_model.embed_tokens", Module::kTable, /*tied=*/true), 0);
  EXPECT_EQ(BitsOf(config, "model.language_model.embed_tokens", Module::kTable), 4);
  EXPECT_EQ(BitsOf(Parsed(R"({"quant_method": "gemma"})"), "model.language_model.embed_tokens", Module::kTable), 0)
      << "quantize_embeddings is false unless said";
}

TEST(QuantizationConfigTest, BadOptionsOfModulesAreRefusedWithLineAndKey) {
  EXPECT_THAT(ErrorOf("{\"quant_method\": \"gemma\",\n \"num_bits\": 3}"),
              HasSubstr("config.json:3: quantization_config.num_bits: 3; must be 2, 4 or 8"));
  EXPECT_THAT(
      ErrorOf(R"({"quant_method": "gemma", "module_quant_configs": {"a": {"group_size": 32}}})"),
      AllOf(HasSubstr("quantization_config.module_quant_configs.a.group_size"), HasSubstr("only one is num_bits")));
  EXPECT_THAT(ErrorOf(R"({"quant_method": "gemma", "module_quant_configs": {"(": {}}})"), HasSubstr("not closed"));
  EXPECT_THAT(ErrorOf(R"({"quant_method": "gemma", "module_quant_configs": {"a": 4}})"), HasSubstr("object"));
  EXPECT_THAT(ErrorOf(R"({"quant_method": "gemma", "module_quant_configs": []})"), HasSubstr("object"));
  EXPECT_THAT(ErrorOf(R"({"quant_method": "gemma", "modules_to_not_convert": "lm_head"})"), HasSubstr("list"));
}

TEST(QuantizationConfigTest, OtherMethodsAreRefusedByNameWithWhatToUse) {
  for (const auto& [method, words] : std::map<std::string, std::string>{{"gptq", "by GPTQ"},
                                                                        {"awq", "by AWQ"},
                                                                        {"bitsandbytes", "by bitsandbytes"},
                                                                        {"fp8", "FP8"},
                                                                        {"something-new", "does not read"}})
    EXPECT_THAT(ErrorOf("{\"quant_method\": \"" + method + "\"}"),
                AllOf(HasSubstr("quantization_config.quant_method: \"" + method + "\""), HasSubstr(words),
                      HasSubstr("give the checkpoint with float weights"), HasSubstr("-qat-mobile-transformers")));
  EXPECT_THAT(ErrorOf(R"({"quant_method": "gptq"})"), HasSubstr("recipe w4a16-gptq"));
  EXPECT_THAT(ErrorOf(R"({"group_size": 64, "bits": 4})"), HasSubstr("by MLX"));
  EXPECT_THAT(ErrorOf(R"({"bits": 4})"), HasSubstr("quant_method: is missing"));
}

constexpr char kGroups[] = R"({"quant_method": "compressed-tensors", "format": "pack-quantized",
  "quantization_status": "compressed", "config_groups": {"group_0": {"targets": ["Linear"], "input_activations": null,
  "weights": {"num_bits": 4, "type": "int", "symmetric": true, "strategy": "group", "group_size": 32}}},
  "ignore": ["lm_head", "re:.*vision.*"]})";

std::string GroupsWith(const std::string& from, const std::string& to) {
  std::string text = kGroups;
  const size_t at = text.find(from);
  return at == text.npos ? "{}" : text.replace(at, from.size(), to);
}

TEST(QuantizationConfigTest, GroupsOfCompressedTensorsSayWhichLinearsArePacked) {
  const QuantizationConfig config = Parsed(kGroups);
  EXPECT_EQ(config.GetMethod(), QuantizationConfig::Method::kCompressedTensors);
  EXPECT_EQ(config.FormOf("model.language_model.layers.0.mlp.up_proj", Module::kLinear, true),
            (PackedForm{.bits = 4, .group = 32}));
  EXPECT_EQ(BitsOf(config, "lm_head"), 0);
  EXPECT_EQ(BitsOf(config, "model.vision_tower.encoder.layers.0.mlp.up_proj.linear"), 0);
  EXPECT_EQ(BitsOf(config, "model.language_model.embed_tokens", Module::kTable), 0);
  const QuantizationConfig by_name = Parsed(GroupsWith("\"Linear\"", "\"re:.*mlp\", \"x.q_proj\""));
  EXPECT_EQ(BitsOf(by_name, "x.mlp.up_proj"), 4);
  EXPECT_EQ(BitsOf(by_name, "x.q_proj"), 4);
  EXPECT_EQ(BitsOf(by_name, "y.q_proj"), 0);
}

TEST(QuantizationConfigTest, WhatCompressedTensorsCanHoldBesidesIsRefused) {
  for (const auto& [from, to] : std::vector<std::pair<std::string, std::string>>{
           {"\"pack-quantized\"", "\"float-quantized\""},
           {"\"compressed\"", "\"frozen\""},
           {"\"type\": \"int\"", "\"type\": \"float\""},
           {"\"symmetric\": true", "\"symmetric\": false"},
           {"\"group\", ", "\"channel\", "},
           {"\"input_activations\": null", "\"input_activations\": {\"num_bits\": 8}"},
           {"\"num_bits\": 4", "\"num_bits\": 8"},
           {"\"num_bits\": 4", "\"actorder\": \"group\", \"num_bits\": 4"},
           {"\"group_size\": 32", "\"group_size\": 0"},
           {"\"quant_method\": \"compressed-tensors\",",
            "\"quant_method\": \"compressed-tensors\", \"kv_cache_scheme\": {},"}})
    EXPECT_THAT(ErrorOf(GroupsWith(from, to)), AllOf(HasSubstr("config.json:"), HasSubstr("quantization_config.")))
        << to;
  EXPECT_THAT(ErrorOf(R"({"quant_method": "compressed-tensors", "config_groups": {}})"), HasSubstr("is empty"));
}

TEST(QuantizationConfigTest, PartsOfPackedWeightsAreKnownByTheirLastName) {
  EXPECT_TRUE(IsPackedPart("model.layers.0.mlp.up_proj.weight_scale"));
  EXPECT_TRUE(IsPackedPart("model.embed_tokens.embedding_quantized"));
  EXPECT_FALSE(IsPackedPart("model.layers.0.mlp.up_proj.weight"));
  EXPECT_FALSE(IsPackedPart("model.vision_tower.std_scale"));
}

}  // namespace
}  // namespace circlet
