#include "circlet/io/packed/quantization_config.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>
#include <optional>
#include <utility>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "circlet/io/yaml.h"
#include "io/packed/pattern.h"

namespace circlet {
namespace {

constexpr std::string_view kInstead =
    "give the checkpoint with float weights that it was made from, or one of Google's that were trained to be "
    "quantized "
    "(names end in -qat-mobile-transformers, -qat-w4a16-ct, -qat-q4_0-unquantized)";

struct Foreign {
  std::string_view method, what, recipe;
};

// Methods that people meet, and the recipe that rounds float weights to something like it.
constexpr std::array kForeign{
    Foreign{"gptq", "GPTQ", "w4a16-gptq"},
    Foreign{"awq", "AWQ", "w4a16-gptq"},
    Foreign{"bitsandbytes", "bitsandbytes", "w4a16-mixed"},
    Foreign{"fp8", "fine-grained FP8", "w8a16"},
    Foreign{"fbgemm_fp8", "FBGEMM FP8", "w8a16"},
    Foreign{"mxfp4", "MXFP4", "w4a16-gptq"},
    Foreign{"modelopt", "ModelOpt", "w8a16"},
    Foreign{"torchao", "torchao", "w8a16"},
    Foreign{"quanto", "quanto", "w8a16"},
    Foreign{"hqq", "HQQ", "w4a16-gptq"},
    Foreign{"eetq", "EETQ", "w8a16"},
    Foreign{"mlx", "MLX", "w4a16-gptq"},
};

[[noreturn]] void RefuseMethod(const JsonObject& object, std::string_view method) {
  const auto known = std::ranges::find(kForeign, method, &Foreign::method);
  if (known == kForeign.end())
    object.FailAt("quant_method",
                  fmt::format("\"{}\": the checkpoint is quantized already, in a form that circlet does "
                              "not read; {}",
                              Shortened(method), kInstead));
  object.FailAt(
      "quant_method",
      fmt::format("\"{}\": the checkpoint is quantized already, by {}, which circlet does not read; {}; recipe {} "
                  "rounds float weights to as many bits",
                  method, known->what, kInstead, known->recipe));
}

// MLX writes no quant_method.
std::string MethodOf(const JsonObject& object) {
  if (object.Has("quant_method")) return object.Required<std::string>("quant_method");
  if (object.Has("bits") && object.Has("group_size")) return "mlx";
  object.FailAt("quant_method", fmt::format("is missing, so that nobody knows what the weights are; {}", kInstead));
}

// The key must be absent, null or one of `values`.
void RequireOnly(const JsonObject& object, std::string_view key, std::initializer_list<nlohmann::json> values,
                 std::string_view why) {
  if (!object.Has(key)) return;
  const nlohmann::json& value = object.Raw(key);
  if (std::ranges::find(values, value) == values.end()) object.FailAt(key, fmt::format("{}; {}", Shown(value), why));
}

// A name, or "re:" and a pattern that the name begins with.
struct NameOrPattern {
  std::string text;
  std::optional<Pattern> pattern;

  static std::vector<NameOrPattern> ListOf(const JsonObject& object, std::string_view key) {
    std::vector<NameOrPattern> list;
    for (std::string& text : object.Optional<std::vector<std::string>>(key, {})) {
      NameOrPattern entry{.text = std::move(text), .pattern = {}};
      if (entry.text.starts_with("re:")) entry.pattern.emplace(entry.text.substr(3), object.Where(key));
      list.push_back(std::move(entry));
    }
    return list;
  }
  bool Names(std::string_view module) const { return pattern ? pattern->MatchesFront(module) : text == module; }
};

}  // namespace

struct QuantizationConfig::Rules {
  Method method = Method::kGemma;

  // gemma
  struct Width {
    Pattern pattern;
    int bits;
  };
  struct Kept {
    std::string text;
    Pattern pattern;
  };
  int bits = 4;
  bool tables = false;
  std::vector<Width> widths;
  std::optional<std::vector<Kept>> kept;  // modules_to_not_convert

  // compressed-tensors
  struct Group {
    std::vector<NameOrPattern> targets;
    int64_t size;
  };
  std::vector<Group> groups;
  std::vector<NameOrPattern> ignored;

  bool IsKept(std::string_view module, bool tied) const {
    if (!kept) return module == "lm_head" || (tied && module.ends_with(".embed_tokens"));
    return std::ranges::any_of(
        *kept, [&](const Kept& key) { return module.ends_with(key.text) || key.pattern.MatchesModule(module); });
  }

  // The match that starts furthest left decides, of those at one place the pattern that stands first.
  int WidthOf(std::string_view module) const {
    int decided = bits;
    size_t leftmost = module.size() + 1;
    for (const Width& width : widths) {
      const std::optional<size_t> at = width.pattern.Search(module);
      if (at && *at < leftmost) std::tie(leftmost, decided) = std::pair(*at, width.bits);
    }
    return decided;
  }

  void ReadGemma(const JsonObject& object, const YamlNode& section);
  void ReadCompressedTensors(const JsonObject& object);
};

namespace {

// Anything but 2 and 4 is stored in 8 bits by the reference; numbers that nobody means are refused.
int BitsAt(const JsonObject& object, int otherwise) {
  const int bits = object.Optional<int>("num_bits", otherwise);
  if (bits != 2 && bits != 4 && bits != 8) object.FailAt("num_bits", fmt::format("{}; must be 2, 4 or 8", bits));
  return bits;
}

}  // namespace

// `section`: the same, in the order of the file.
void QuantizationConfig::Rules::ReadGemma(const JsonObject& object, const YamlNode& section) {
  bits = BitsAt(object, 4);
  tables = object.Optional<bool>("quantize_embeddings", false);
  constexpr size_t kMostPatterns = 200;  // each is matched with each module
  if (const std::optional<JsonObject> configs = object.OptionalObject("module_quant_configs")) {
    if (configs->Keys().size() > kMostPatterns)
      object.FailAt("module_quant_configs",
                    fmt::format("{} patterns; circlet reads up to {}", configs->Keys().size(), kMostPatterns));
    for (const auto& [text, unused] : section.Find("module_quant_configs")->members) {
      const JsonObject options = configs->Object(text);
      widths.push_back({Pattern(text, configs->Where(text)), BitsAt(options, bits)});
      for (const std::string& key : options.UnknownKeys())
        options.FailAt(key, "an option that circlet does not know; a module's only one is num_bits");
    }
  }
  if (!object.Has("modules_to_not_convert")) return;
  kept.emplace();
  for (std::string& text : object.Required<std::vector<std::string>>("modules_to_not_convert")) {
    Pattern pattern(text, object.Where("modules_to_not_convert"));
    kept->push_back({std::move(text), std::move(pattern)});
  }
}

void QuantizationConfig::Rules::ReadCompressedTensors(const JsonObject& object) {
  constexpr std::string_view kOnlyPacked =
      "of compressed-tensors circlet reads \"pack-quantized\": int4, symmetric, in groups, float activations";
  RequireOnly(object, "format", {"pack-quantized"}, kOnlyPacked);
  RequireOnly(object, "quantization_status", {"compressed"}, "save the checkpoint compressed");
  RequireOnly(object, "kv_cache_scheme", {}, kOnlyPacked);
  if (!object.Has("config_groups"))
    object.FailAt("config_groups", "is missing; of quant_method \"compressed-tensors\" it says what is packed and how");
  const JsonObject list = object.Object("config_groups");
  for (const std::string& name : list.Keys()) {
    const JsonObject group = list.Object(name);
    RequireOnly(group, "format", {"pack-quantized"}, kOnlyPacked);
    RequireOnly(group, "input_activations", {}, kOnlyPacked);
    RequireOnly(group, "output_activations", {}, kOnlyPacked);
    const JsonObject weights = group.Object("weights");
    if (weights.Required<int>("num_bits") != 4)
      weights.FailAt("num_bits", fmt::format("{}; {}", Shown(weights.Raw("num_bits")), kOnlyPacked));
    RequireOnly(weights, "type", {"int"}, kOnlyPacked);
    RequireOnly(weights, "symmetric", {true}, kOnlyPacked);
    RequireOnly(weights, "strategy", {"group"}, kOnlyPacked);
    RequireOnly(weights, "dynamic", {false}, kOnlyPacked);
    RequireOnly(weights, "actorder", {false, "static", "weight"}, "columns in another order are not read");
    const int64_t size = weights.Required<int64_t>("group_size");
    if (size < 1) weights.FailAt("group_size", fmt::format("{}; must be positive", size));
    groups.push_back({NameOrPattern::ListOf(group, "targets"), size});
  }
  if (groups.empty()) object.FailAt("config_groups", "is empty; it says what is quantized");
  ignored = NameOrPattern::ListOf(object, "ignore");
}

void RequireReadableMethod(const JsonObject& object) {
  const std::string method = MethodOf(object);
  if (method != "gemma" && method != "compressed-tensors") RefuseMethod(object, method);
}

// JSON is YAML, and a tree of YAML keeps the order of keys, which decides here.
std::optional<QuantizationConfig> QuantizationConfig::Parse(std::string_view text, const std::string& file) {
  const YamlNode tree = ParseYaml(text, file);
  const nlohmann::json value = ToJson(tree);
  const JsonObject root(value, file, &tree);
  const std::optional<JsonObject> object = root.OptionalObject("quantization_config");
  if (!object) return std::nullopt;
  RequireReadableMethod(*object);
  Rules rules;
  if (MethodOf(*object) == "gemma") {
    rules.ReadGemma(*object, *tree.Find("quantization_config"));
  } else {
    rules.method = Method::kCompressedTensors;
    rules.ReadCompressedTensors(*object);
  }
  return QuantizationConfig(std::make_shared<const Rules>(std::move(rules)));
}

QuantizationConfig::Method QuantizationConfig::GetMethod() const { return rules_->method; }

PackedForm QuantizationConfig::FormOf(std::string_view module, Module kind, bool tied) const {
  const Rules& rules = *rules_;
  if (rules.method == Method::kGemma) {
    if (kind == Module::kTable && !rules.tables) return {};
    if (rules.IsKept(module, tied)) return {};
    return {.bits = rules.WidthOf(module), .group = 0};
  }
  if (kind == Module::kTable) return {};
  if (std::ranges::any_of(rules.ignored, [&](const NameOrPattern& entry) { return entry.Names(module); })) return {};
  for (const Rules::Group& group : rules.groups)
    if (std::ranges::any_of(group.targets, [&](const NameOrPattern& target) {
          return target.text == "Linear" || target.Names(module);
        }))
      return {.bits = 4, .group = group.size};
  return {};
}

bool IsPackedPart(std::string_view tensor) {
  static constexpr std::array<std::string_view, 12> kParts{"weight_scale",
                                                           "weight_packed",
                                                           "weight_shape",
                                                           "weight_zero_point",
                                                           "weight_g_idx",
                                                           "input_activation_scale",
                                                           "output_activation_scale",
                                                           "embedding_quantized",
                                                           "embedding_scale",
                                                           "weight_scale_inv",
                                                           "qweight",
                                                           "qzeros"};
  const std::string_view last = tensor.substr(tensor.rfind('.') + 1);
  return std::ranges::find(kParts, last) != kParts.end();
}

}  // namespace circlet
