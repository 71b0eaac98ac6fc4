// Packed checkpoints that the reference has read (tests/data/qat): their codes, scales and values by checksum, and what
// is refused of damaged ones.

#include <gmock/gmock.h>

#include <cstring>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/exec/executor.h"
#include "circlet/io/file.h"
#include "circlet/model/gemma4/weights.h"
#include "error_text.h"
#include "ops/codes.h"
#include "packed_checkpoint.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

ModelWeights Open(const PackedCheckpoint& checkpoint, bool text_only = false) {
  return ModelWeights::Open(ReadConfig(checkpoint.Path()), checkpoint.Path(), text_only);
}

template <typename T>
std::string Hash(std::span<const T> values) {
  return Sha256(std::as_bytes(values));
}

// Signed codes, a byte each.
std::string HashOfCodes(const Tensor& codes, int32_t zero_point) {
  std::vector<int8_t> values;
  for (int64_t i = 0; i < codes.Elements(); ++i) values.push_back(static_cast<int8_t>(CodeAt(codes, i) - zero_point));
  return Hash<int8_t>(values);
}

std::string ParameterOf(const std::string& module) { return module + ".weight"; }

TEST(PackedParametersTest, MobileCodesScalesAndValuesAreTheReferences) {
  for (const auto& [name, modules] : {std::pair("e2b", 111u), std::pair("w48", 113u), std::pair("tied", 110u)}) {
    const PackedCheckpoint checkpoint(name);
    const ModelWeights weights = Open(checkpoint);
    size_t compared = 0;
    const nlohmann::json recorded = checkpoint.Weights();
    for (const auto& [module, expected] : recorded.items()) {
      const std::string parameter = ParameterOf(module);
      if (!weights.Has(parameter)) {  // keys and values of layers that share them
        EXPECT_TRUE(module.ends_with("k_proj") || module.ends_with("v_proj")) << module;
        continue;
      }
      SCOPED_TRACE(fmt::format("{} {}", name, module));
      const PackedParameter* const packed = weights.Packed(parameter);
      ASSERT_NE(packed, nullptr);
      EXPECT_EQ(packed->form.bits, expected.at("bits"));
      const Tensor codes = weights.Stored(parameter);
      ASSERT_NE(codes.Grid(), nullptr);
      EXPECT_EQ(HashOfCodes(codes, codes.Grid()->zero_point[0]), expected.at("codes_sha256"));
      EXPECT_EQ(Hash<float>(codes.Grid()->scale), expected.at("scale_sha256"));
      EXPECT_EQ(Hash<float>(weights.Float(parameter).F32()), expected.at("dequantized_sha256"));
      if (expected.contains("input_activation_scale")) {
        EXPECT_EQ(packed->input_step.value_or(0), expected.at("input_activation_scale").get<float>());
        EXPECT_EQ(packed->output_step.value_or(0), expected.at("output_activation_scale").get<float>());
      }
      weights.Release(parameter);
      ++compared;
    }
    EXPECT_EQ(compared, modules);
    EXPECT_EQ(weights.GetInventory().packed.size(), compared);
    EXPECT_EQ(weights.GetInventory().cache_steps.size(), 10u);
    EXPECT_EQ(weights.GetConfig().text.ple_groups, 10);
  }
}

TEST(PackedParametersTest, GroupsOfCompressedTensorsAreTheReferences) {
  const PackedCheckpoint checkpoint("w4a16-ct");
  const ModelWeights weights = Open(checkpoint);
  size_t compared = 0;
  const nlohmann::json recorded = checkpoint.Weights();
  for (const auto& [module, expected] : recorded.items()) {
    SCOPED_TRACE(module);
    const std::optional<BlockWeight> blocks = weights.Blocks(ParameterOf(module));
    ASSERT_TRUE(blocks);
    EXPECT_EQ(blocks->block, 32);
    EXPECT_EQ(HashOfCodes(blocks->codes, 8), expected.at("codes_sha256"));
    EXPECT_EQ(Hash<float>(blocks->scales.F32()), expected.at("scale_f32_sha256"));
    EXPECT_EQ(Hash<float>(weights.Stored(ParameterOf(module)).F32()), expected.at("dequantized_sha256"));
    ++compared;
  }
  EXPECT_EQ(compared, 70u);
  EXPECT_EQ(weights.Packed("model.language_model.layers.0.per_layer_projection.weight"), nullptr) << "ignored";
}

TEST(PackedParametersTest, AllBlocksOfTheQ40CheckpointAreRecovered) {
  const PackedCheckpoint checkpoint("q4_0-unquantized");
  const ModelWeights weights = Open(checkpoint);
  const SafetensorsFile steps = OpenGolden("qat/q4_0-unquantized/true.safetensors.xz");
  int64_t recovered = 0;
  const nlohmann::json recorded = checkpoint.Weights();
  for (const auto& [module, expected] : recorded.items()) {
    SCOPED_TRACE(module);
    const std::optional<BlockWeight> blocks = weights.Blocks(ParameterOf(module));
    ASSERT_TRUE(blocks);
    EXPECT_EQ(HashOfCodes(blocks->codes, 8), expected.at("codes_sha256"));
    const Tensor d = ToF32(steps.Get(module + ".d"));
    EXPECT_EQ(Hash<float>(blocks->scales.F32()), Hash<float>(d.F32()));
    recovered += blocks->scales.Elements();
  }
  EXPECT_EQ(recovered, 60544);
  for (const char* off : {"model.language_model.per_layer_model_projection.weight", "model.language_model.norm.weight",
                          "model.language_model.embed_tokens.weight"})
    EXPECT_FALSE(weights.Blocks(off)) << off;
}

// ---- Damage
// -----------------------------------------------------------------------------------------------------------

constexpr char kUp[] = "model.language_model.layers.0.mlp.up_proj";

// What opening says of the checkpoint after `change`.
std::string ErrorAfter(const char* name, const std::function<void(std::map<std::string, Tensor>&)>& change) {
  PackedCheckpoint checkpoint(name);
  change(checkpoint.Tensors());
  checkpoint.Write();
  return ErrorText([&] { Open(checkpoint, /*text_only=*/true); });
}

Tensor With(const Tensor& tensor, int64_t at, float value) {
  const Tensor copy = tensor.Clone();
  copy.F32()[static_cast<size_t>(at)] = value;
  return copy;
}

TEST(PackedParametersTest, MissingPartsAreNamed) {
  for (const char* part : {".weight", ".weight_scale", ".input_activation_scale", ".output_activation_scale"})
    EXPECT_THAT(ErrorAfter("e2b", [&](auto& tensors) { tensors.erase(kUp + std::string(part)); }),
                AllOf(HasSubstr(fmt::format("tensor \"{}{}\"", kUp, part)), HasSubstr("is missing"),
                      HasSubstr("its scales left out")));
  for (const char* part : {".weight_packed", ".weight_scale", ".weight_shape"})
    EXPECT_THAT(ErrorAfter("w4a16-ct", [&](auto& tensors) { tensors.erase(kUp + std::string(part)); }),
                HasSubstr(fmt::format("tensor \"{}{}\"", kUp, part)));
  for (const char* part : {"embedding_quantized", "embedding_scale"})
    EXPECT_THAT(ErrorAfter("e2b",
                           [&](auto& tensors) {
                             tensors.erase(std::string("model.language_model.embed_tokens_per_layer.") + part);
                           }),
                AllOf(HasSubstr(part), HasSubstr("is missing")));
}

TEST(PackedParametersTest, ScalesThatNobodyCanMeanAreNamedWithPlaceAndValue) {
  const std::string scale = kUp + std::string(".weight_scale"), step = kUp + std::string(".input_activation_scale");
  const auto with = [&](const std::string& tensor, int64_t at, float value) {
    return ErrorAfter("e2b", [&](auto& tensors) { tensors.at(tensor) = With(tensors.at(tensor), at, value); });
  };
  EXPECT_THAT(with(scale, 7, 0.0f),
              AllOf(HasSubstr(scale), HasSubstr("the scale at [7,0] is 0"), HasSubstr("positive")));
  EXPECT_THAT(with(scale, 255, -0.5f), HasSubstr("the scale at [255,0] is -0.5"));
  EXPECT_THAT(with(scale, 0, NAN), AllOf(HasSubstr("the scale at [0,0] is nan"), Not(HasSubstr("shard"))));
  EXPECT_THAT(with(scale, 0, 1e-40f), HasSubstr("the scale at [0,0] is 1e-40"));
  EXPECT_THAT(with("model.language_model.embed_tokens_per_layer.embedding_scale", 13, INFINITY),
              HasSubstr("the scale at [1,3] is inf"));
  EXPECT_THAT(with(step, 0, -0.1f), AllOf(HasSubstr(step), HasSubstr("is -0.1"), HasSubstr("or 0 where")));
  EXPECT_THAT(with(step, 0, INFINITY), HasSubstr("is inf"));
  EXPECT_THAT(with(step, 0, 1e-40f), HasSubstr("is 1e-40"));
  EXPECT_THAT(with("model.language_model.layers.2.self_attn.k_cache_scale", 0, NAN), HasSubstr("is nan"));
}

TEST(PackedParametersTest, StorageThatIsNotWhatTheConfigSaysIsNamed) {
  const std::string weight = kUp + std::string(".weight"), scale = kUp + std::string(".weight_scale");
  const auto become = [&](const std::string& tensor, TensorType type) {
    return ErrorAfter("e2b", [&](auto& tensors) { tensors[tensor] = Tensor(type); });
  };
  EXPECT_THAT(become(weight, {DType::kI8, {256, 128}}),
              AllOf(HasSubstr("model.safetensors: tensor \"" + weight + "\" is int8[256,128]"),
                    HasSubstr("expected uint8[256,64], as quantization_config")));
  EXPECT_THAT(become(weight, {DType::kU8, {256, 32}}), HasSubstr("expected uint8[256,64]"));
  EXPECT_THAT(become(weight, {DType::kBF16, {256, 128}}), HasSubstr("is bfloat16[256,128]"));
  EXPECT_THAT(become(scale, {DType::kF32, {256}}), HasSubstr("expected float32 or bfloat16 or float16[256,1]"));
  EXPECT_THAT(become(kUp + std::string(".output_activation_scale"), {DType::kF32, {1}}), HasSubstr("is float32[1]"));
  EXPECT_THAT(become("model.language_model.embed_tokens_per_layer.embedding_scale", {DType::kF32, {2048, 3}}),
              HasSubstr("has 3 scales a row of 160 columns; expected a number that divides"));
  EXPECT_THAT(become("model.language_model.embed_tokens.embedding_scale", {DType::kF32, {2048, 2}}),
              HasSubstr("expected one"));
  EXPECT_THAT(ErrorAfter("w4a16-ct",
                         [](auto& tensors) {
                           Tensor& shape = tensors.at(kUp + std::string(".weight_shape"));
                           shape = shape.Clone();
                           shape.I64()[1] = 96;
                         }),
              HasSubstr("says [256,96], config.json [256,128]"));
  EXPECT_THAT(ErrorAfter("w4a16-ct",
                         [](auto& tensors) {
                           tensors[kUp + std::string(".weight_g_idx")] = Tensor({DType::kI32, {128}});
                         }),
              HasSubstr("columns in another order"));
}

// ---- What the reference cannot read, or reads as something else
// -----------------------------------------------------------------------------------------------------------

// The checkpoint with another config.json.
std::string ErrorWithConfig(const char* name, const std::function<void(nlohmann::json&)>& change) {
  const PackedCheckpoint checkpoint(name);
  nlohmann::json config = ReadJson(checkpoint.Path() / "config.json");
  change(config);
  WriteJson(checkpoint.Path() / "config.json", config);
  return ErrorText([&] { Open(checkpoint, /*text_only=*/true); });
}

TEST(PackedParametersTest, ScalesInBfloat16AreWidened) {
  PackedCheckpoint checkpoint("e2b");
  Tensor& scale = checkpoint.Tensors().at(kUp + std::string(".weight_scale"));
  scale = ToBF16(scale);
  const Tensor wide = ToF32(scale);
  const std::vector<float> widened(wide.F32().begin(), wide.F32().end());
  checkpoint.Write();
  EXPECT_EQ(Open(checkpoint).Stored(ParameterOf(kUp)).Grid()->scale, widened);
}

TEST(PackedParametersTest, ATableIsPackedOrTiedButNotBoth) {
  EXPECT_THAT(ErrorWithConfig("e2b",
                              [](nlohmann::json& config) {
                                config["tie_word_embeddings"] = true;
                                config["text_config"]["tie_word_embeddings"] = true;
                              }),
              AllOf(HasSubstr("embed_tokens: is packed, but tie_word_embeddings of config.json is true"),
                    HasSubstr("modules_to_not_convert"), Not(HasSubstr("shard"))));
  EXPECT_THAT(ErrorAfter("e2b",
                         [](auto& tensors) {
                           std::erase_if(tensors, [](const auto& entry) { return entry.first.starts_with("lm_head"); });
                         }),
              HasSubstr("\"lm_head.weight\" uint8[2048,32] is missing"));
}

TEST(PackedParametersTest, WithoutTheListOfExclusionsFloatModulesAreNamed) {
  for (const nlohmann::json& list : {nlohmann::json(), nlohmann::json::array()})
    EXPECT_THAT(
        ErrorWithConfig(
            "e2b", [&](nlohmann::json& config) { config["quantization_config"]["modules_to_not_convert"] = list; }),
        HasSubstr("per_layer_model_projection.weight\" is bfloat16[160,128], expected uint8[160,64], as "
                  "quantization_config"));
}

// Patterns are searched in the names that the checkpoint's own class gives its modules.
TEST(PackedParametersTest, PatternsOfATextOnlyCheckpointAreForItsNames) {
  PackedCheckpoint checkpoint("w48");
  const PackedCheckpoint whole("w48");
  std::map<std::string, Tensor> renamed;
  for (const auto& [name, tensor] : checkpoint.Tensors())
    if (name.find("vision") == name.npos) {
      const size_t at = name.find("language_model.");
      renamed[at == name.npos ? name : name.substr(0, at) + name.substr(at + 15)] = tensor;
    }
  checkpoint.Tensors() = renamed;
  checkpoint.Write();
  const nlohmann::json config = ReadJson(checkpoint.Path() / "config.json");
  nlohmann::json text = config.at("text_config");
  text["architectures"] = {"Gemma4ForCausalLM"};
  text["tie_word_embeddings"] = false;
  text["quantization_config"] = config.at("quantization_config");
  WriteJson(checkpoint.Path() / "config.json", text);
  EXPECT_THAT(ErrorText([&] { Open(checkpoint); }), HasSubstr("as quantization_config of config.json says"))
      << "patterns for the names of the whole model";
  nlohmann::json own = nlohmann::json::object();
  const std::string prefix = R"(language_model\.)";
  for (const auto& [pattern, options] : config.at("quantization_config").at("module_quant_configs").items())
    own[pattern.starts_with(prefix) ? pattern.substr(prefix.size()) : pattern] = options;
  text["quantization_config"]["module_quant_configs"] = own;
  WriteJson(checkpoint.Path() / "config.json", text);
  const Tensor stored = Open(checkpoint).Stored(ParameterOf(kUp)), expected = Open(whole).Stored(ParameterOf(kUp));
  EXPECT_EQ(*stored.Grid(), *expected.Grid());
}

TEST(PackedParametersTest, PartsOfAnotherFamilyAreRefused) {
  EXPECT_THAT(ErrorAfter("q4_0-unquantized",
                         [](auto& tensors) {
                           tensors[kUp + std::string(".weight_scale")] = Tensor({DType::kF32, {256, 1}});
                         }),
              HasSubstr("no quantization_config"));
  EXPECT_THAT(
      ErrorAfter(
          "e2b",
          [](auto& tensors) {
            tensors["model.language_model.per_layer_model_projection.weight_scale"] = Tensor({DType::kF32, {160, 1}});
          }),
      AllOf(HasSubstr("per_layer_model_projection.weight_scale\" belongs to codes"), HasSubstr("do not mix")));
  EXPECT_THAT(ErrorAfter("e2b",
                         [](auto& tensors) {
                           tensors[kUp + std::string(".weight_packed")] = Tensor({DType::kI32, {256, 16}});
                         }),
              HasSubstr("up_proj.weight_packed\" belongs to codes"));
}

TEST(PackedParametersTest, WithoutBoundsNothingIsClipped) {
  PackedCheckpoint checkpoint("e2b");
  std::erase_if(checkpoint.Tensors(),
                [](const auto& entry) { return entry.first.ends_with("put_min") || entry.first.ends_with("put_max"); });
  checkpoint.Write();
  const ModelWeights weights = Open(checkpoint);
  EXPECT_FALSE(weights.GetConfig().vision->use_clipped_linears);
  EXPECT_THAT(weights.GetInventory().notes, testing::Contains(HasSubstr("holds no bounds: nothing is clipped")));
}

// Codes in one shard, their scales in another.
TEST(PackedParametersTest, AWeightAndItsScaleMayLieInDifferentShards) {
  PackedCheckpoint checkpoint("e2b");
  std::map<std::string, Tensor> codes = checkpoint.Tensors(), scales;
  for (auto it = codes.begin(); it != codes.end();) {
    auto next = std::next(it);
    if (it->first.ends_with("_scale")) scales.insert(codes.extract(it));
    it = next;
  }
  const std::filesystem::path path = checkpoint.Path();
  std::filesystem::remove(path / "model.safetensors");
  const std::string first = "model-00001-of-00002.safetensors", second = "model-00002-of-00002.safetensors";
  WriteSafetensors(path / first, codes);
  WriteSafetensors(path / second, scales);
  nlohmann::json index;
  for (const auto& [name, tensor] : codes) index["weight_map"][name] = first;
  for (const auto& [name, tensor] : scales) index["weight_map"][name] = second;
  WriteFile(path / "model.safetensors.index.json", index.dump());
  const PackedCheckpoint whole("e2b");
  const Tensor stored = Open(checkpoint).Stored(ParameterOf(kUp)), expected = Open(whole).Stored(ParameterOf(kUp));
  EXPECT_EQ(std::memcmp(stored.Raw(), expected.Raw(), static_cast<size_t>(expected.Bytes())), 0);
  EXPECT_EQ(*stored.Grid(), *expected.Grid());
  // Half of a scale.
  std::filesystem::resize_file(path / second, std::filesystem::file_size(path / second) - 2);
  EXPECT_THAT(ErrorText([&] { Open(checkpoint); }), HasSubstr(second));
}

}  // namespace
}  // namespace circlet
