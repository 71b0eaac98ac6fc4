#include "circlet/model/gemma4/config.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <map>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "circlet/io/packed/quantization_config.h"

namespace circlet {
namespace {

using nlohmann::json;

// Bounds that no Gemma 4 comes near; products of any two sizes stay far inside int64.
constexpr int64_t kMaxSize = int64_t{1} << 24;
constexpr int64_t kMaxLayers = 1024;
constexpr int64_t kMaxId = (int64_t{1} << 31) - 1;
constexpr std::string_view kOnlyGelu = "circlet supports \"gelu_pytorch_tanh\" only";

int Int(const JsonObject& object, std::string_view key, int64_t fallback, int64_t min, int64_t max) {
  const int64_t value = object.Optional<int64_t>(key, fallback);
  if (value < min || value > max)
    object.FailAt(key, fmt::format("{} is out of range; must be {} to {}", value, min, max));
  return static_cast<int>(value);
}

int Size(const JsonObject& object, std::string_view key, int64_t fallback) {
  return Int(object, key, fallback, 1, kMaxSize);
}

std::optional<float> Positive(const JsonObject& object, std::string_view key) {
  const std::optional<float> value = object.Optional<float>(key);
  if (value && !(*value > 0 && std::isfinite(*value))) object.FailAt(key, fmt::format("{}; must be positive", *value));
  return value;
}

// A field with one supported value (or several that mean the same); absent and null are supported too.
void Only(const JsonObject& object, std::string_view key, std::initializer_list<json> supported,
          std::string_view remedy) {
  if (!object.Has(key)) return;
  const json& value = object.Raw(key);
  if (std::find(supported.begin(), supported.end(), value) == supported.end())
    object.FailAt(key, fmt::format("{}; {}", Shown(value), remedy));
}

// Keys that circlet knows and that change nothing here.
void Ignore(const JsonObject& object, std::initializer_list<const char*> keys) {
  for (const char* key : keys) object.Has(key);
}

void CollectUnknown(const JsonObject& object, std::string_view path, std::vector<std::string>& unknown) {
  for (const std::string& key : object.UnknownKeys()) unknown.push_back(fmt::format("{}{}", path, key));
}

const char* TypeName(bool full) { return full ? "full_attention" : "sliding_attention"; }

// `theta` counts where the entry gives none.
RopeConfig ParseRope(const JsonObject& object, std::optional<float> theta, std::string_view path,
                     std::vector<std::string>& unknown) {
  RopeConfig rope;
  const auto old_type = object.Optional<std::string>("type");
  const std::string type = object.Optional<std::string>("rope_type", old_type.value_or("default"));
  if (type == "proportional") {
    rope.type = RopeConfig::Type::kProportional;
    rope.partial_rotary_factor = object.Optional<double>("partial_rotary_factor", 1.0);
    if (!(rope.partial_rotary_factor > 0 && rope.partial_rotary_factor <= 1))
      object.FailAt("partial_rotary_factor", fmt::format("{}; must be above 0, at most 1", rope.partial_rotary_factor));
    rope.factor = Positive(object, "factor").value_or(1.0f);
  } else if (type == "linear") {  // proportional to the whole head
    rope.type = RopeConfig::Type::kProportional;
    Only(object, "partial_rotary_factor", {1.0}, "rope_type \"linear\" turns the whole head");
    if (!object.Has("factor")) object.FailAt("factor", "missing; rope_type \"linear\" divides the frequencies by it");
    rope.factor = *Positive(object, "factor");
  } else if (type == "default") {
    Ignore(object, {"partial_rotary_factor"});  // the whole head turns
  } else {
    object.FailAt("rope_type", fmt::format("\"{}\"; circlet supports \"default\", \"linear\" and \"proportional\"",
                                           Shortened(type)));
  }
  if (const std::optional<float> own = Positive(object, "rope_theta")) theta = own;
  if (!theta) object.FailAt("rope_theta", "missing; give the base of the rotary frequencies");
  rope.theta = *theta;
  CollectUnknown(object, path, unknown);
  return rope;
}

// The frequencies of sliding [0] and full [1] layers; the entry of a type that no layer has may be missing.
struct Ropes {
  std::array<std::optional<RopeConfig>, 2> by_type;
  const char* key;  // where they stand
};

// As in the reference, rope_scaling is the old name of rope_parameters and wins where both stand.
Ropes ParseRopes(const JsonObject& text, const std::string& path, std::vector<std::string>& unknown) {
  const std::optional<float> theta = Positive(text, "rope_theta");
  Ignore(text, {"rope_parameters"});
  Ropes ropes{.key = text.Has("rope_scaling") ? "rope_scaling" : "rope_parameters"};
  const std::optional<JsonObject> parameters = text.OptionalObject(ropes.key);
  if (!parameters) {
    ropes.by_type = {RopeConfig{.theta = 1e4f},
                     RopeConfig{.type = RopeConfig::Type::kProportional, .theta = 1e6f, .partial_rotary_factor = 0.25}};
    return ropes;
  }
  for (const bool full : {false, true}) {
    if (const std::optional<JsonObject> entry = parameters->OptionalObject(TypeName(full)))
      ropes.by_type[full] = ParseRope(*entry, theta, fmt::format("{}{}.{}.", path, ropes.key, TypeName(full)), unknown);
  }
  if (!ropes.by_type[false] && !ropes.by_type[true])
    text.FailAt(ropes.key, fmt::format("{}; expected an entry for each layer type, \"{}\" and \"{}\"",
                                       Shown(text.Raw(ropes.key)), TypeName(false), TypeName(true)));
  CollectUnknown(*parameters, fmt::format("{}{}.", path, ropes.key), unknown);
  return ropes;
}

// What per_layer_config says about one layer.
struct LayerOverride {
  std::optional<int> head_dim, kv_heads;
};

// Keys are layer numbers, zero-padded or not (model.md 2.2, note). A setting that circlet cannot apply to one layer is
// refused: leaving it out would change the model.
std::map<int, LayerOverride> ParsePerLayerConfig(const JsonObject& object, int num_layers) {
  std::map<int, LayerOverride> overrides;
  for (const std::string& key : object.Keys()) {
    int index = -1;
    const char* const end = key.data() + key.size();
    const auto [stop, error] = std::from_chars(key.data(), end, index);
    if (error != std::errc() || stop != end || index < 0 || index >= num_layers)
      object.FailAt(key, fmt::format("no such layer; keys are layer numbers from 0 to {}", num_layers - 1));
    const JsonObject entry = object.Object(key);
    LayerOverride settings;
    if (entry.Has("head_dim")) settings.head_dim = Size(entry, "head_dim", 0);
    if (entry.Has("num_key_value_heads")) settings.kv_heads = Size(entry, "num_key_value_heads", 0);
    if (const std::vector<std::string> others = entry.UnknownKeys(); !others.empty())
      entry.FailAt(others[0], "not supported for one layer; circlet supports head_dim and num_key_value_heads there");
    if (!overrides.emplace(index, settings).second)
      object.FailAt(key, fmt::format("layer {} is given twice; leave one entry", index));
  }
  return overrides;
}

// What is packed how stands at the root. MLX calls the section by another name as well.
void CheckQuantization(const JsonObject& object, bool root) {
  for (const char* key : {"quantization_config", "quantization"}) {
    if (!object.Has(key)) continue;
    RequireReadableMethod(object.Object(key));
    if (!root || key != std::string_view("quantization_config"))
      object.FailAt(key, "circlet reads the section quantization_config at the root of config.json; move it there");
  }
}

// Which layers are full attention; the last one always is.
std::vector<bool> ParseLayerTypes(const JsonObject& text, int num_layers) {
  std::vector<bool> full(num_layers);
  if (text.Has("layer_types")) {
    const auto types = text.Required<std::vector<std::string>>("layer_types");
    if (static_cast<int>(types.size()) != num_layers) {
      text.FailAt("layer_types",
                  fmt::format("{} entries for num_hidden_layers {}; both must agree", types.size(), num_layers));
    }
    for (int i = 0; i < num_layers; ++i) {
      full[i] = types[i] == TypeName(true);
      if (!full[i] && types[i] != TypeName(false)) {
        text.FailAt("layer_types", fmt::format("entry {} is \"{}\"; circlet supports \"sliding_attention\" and "
                                               "\"full_attention\"",
                                               i, types[i]));
      }
    }
  } else {
    for (int i = 0; i < num_layers; ++i) full[i] = (i + 1) % 6 == 0;
  }
  full.back() = true;
  return full;
}

// model.md 3.7: a shared layer reads the last layer of its own type before the first shared one.
void ShareKv(TextConfig& config, const JsonObject& text) {
  const int first_shared = config.NumLayers() - config.num_kv_shared_layers;
  for (int i = 0; i < config.NumLayers(); ++i) {
    LayerConfig& layer = config.layers[i];
    layer.kv_source = i;
    if (i < first_shared) continue;
    layer.kv_shared = true;
    int source = first_shared - 1;
    while (source >= 0 && config.layers[source].full != layer.full) --source;
    if (source < 0) {
      text.FailAt(
          "num_kv_shared_layers",
          fmt::format("{}: layer {} finds no earlier {} layer to share keys and values with; share fewer layers",
                      config.num_kv_shared_layers, i, TypeName(layer.full)));
    }
    LayerConfig& producer = config.layers[source];
    if (producer.head_dim != layer.head_dim || producer.kv_heads != layer.kv_heads) {
      text.FailAt("num_kv_shared_layers",
                  fmt::format("layer {} has {} key/value heads of size {} and shares those of layer {}, {} of size {}; "
                              "both must agree",
                              i, layer.kv_heads, layer.head_dim, source, producer.kv_heads, producer.head_dim));
    }
    layer.kv_source = source;
    producer.stores_kv = true;
  }
}

void CheckLayer(const LayerConfig& layer, int index, int num_heads, const JsonObject& text) {
  if (layer.head_dim % 2 != 0)
    text.FailAt("head_dim", fmt::format("{} in layer {}; must be even for rotary embeddings", layer.head_dim, index));
  if (num_heads % layer.kv_heads != 0) {
    text.FailAt("num_key_value_heads", fmt::format("{} in layer {}; must divide num_attention_heads, which is {}",
                                                   layer.kv_heads, index, num_heads));
  }
}

void ParseLayers(const JsonObject& text, const std::string& path, TextConfig& config,
                 std::vector<std::string>& unknown) {
  const int num_layers = Int(text, "num_hidden_layers", 30, 1, kMaxLayers);
  const int intermediate = Size(text, "intermediate_size", 9216);
  const int head_dim = Size(text, "head_dim", 256);
  const int kv_heads = Size(text, "num_key_value_heads", 4);
  const int global_head_dim = Size(text, "global_head_dim", 512);
  const int global_kv_heads = Size(text, "num_global_key_value_heads", kv_heads);
  const int window = Size(text, "sliding_window", 512);
  const bool bidirectional_pictures = text.Has("use_bidirectional_attention");  // "vision", the only value taken
  const bool double_wide = text.Optional<bool>("use_double_wide_mlp", false);
  config.attention_k_eq_v = text.Optional<bool>("attention_k_eq_v", false);
  config.num_kv_shared_layers = Int(text, "num_kv_shared_layers", 0, 0, num_layers - 1);
  const std::vector<bool> full = ParseLayerTypes(text, num_layers);
  const Ropes ropes = ParseRopes(text, path, unknown);
  const std::optional<JsonObject> per_layer = text.OptionalObject("per_layer_config");
  const std::map<int, LayerOverride> overrides =
      per_layer ? ParsePerLayerConfig(*per_layer, num_layers) : std::map<int, LayerOverride>();

  for (int i = 0; i < num_layers; ++i) {
    LayerConfig layer;
    layer.full = full[i];
    layer.k_eq_v = layer.full && config.attention_k_eq_v;
    layer.window = layer.full ? 0 : window;
    layer.bidirectional_pictures = !layer.full && bidirectional_pictures;
    layer.intermediate = double_wide && i >= num_layers - config.num_kv_shared_layers ? 2 * intermediate : intermediate;
    if (per_layer) {
      const auto it = overrides.find(i);
      const LayerOverride settings = it == overrides.end() ? LayerOverride() : it->second;
      layer.head_dim = settings.head_dim.value_or(head_dim);
      layer.kv_heads = settings.kv_heads.value_or(kv_heads);
    } else {
      layer.head_dim = layer.full ? global_head_dim : head_dim;
      layer.kv_heads = layer.k_eq_v ? global_kv_heads : kv_heads;
    }
    CheckLayer(layer, i, config.num_heads, text);
    if (!ropes.by_type[layer.full])
      text.FailAt(ropes.key, fmt::format("no entry \"{}\", the type of layer {}; add it", TypeName(layer.full), i));
    layer.rope = *ropes.by_type[layer.full];
    config.layers.push_back(layer);
  }
  ShareKv(config, text);
}

// `path` goes in front of unknown keys: "text_config.", or nothing when the file is the text config itself.
TextConfig ParseText(const JsonObject& text, const std::string& path, std::vector<std::string>& unknown) {
  Only(text, "model_type", {"gemma4_text"}, "circlet supports \"gemma4_text\"");
  Only(text, "enable_moe_block", {false},
       "mixture of experts (26B-A4B) is not supported; circlet runs dense models such as E2B and E4B");
  Only(text, "hidden_activation", {"gelu_pytorch_tanh"}, kOnlyGelu);
  Only(text, "attention_bias", {false}, "attention projections with biases are not supported; circlet supports false");
  Only(text, "use_bidirectional_attention", {"vision"},
       "bidirectional text is not supported; circlet runs models where this is null (E2B, E4B) or \"vision\" (31B)");
  CheckQuantization(text, path.empty());

  TextConfig config;
  config.vocab_size = Size(text, "vocab_size", 262144);
  config.hidden_size = Size(text, "hidden_size", 2304);
  config.num_heads = Size(text, "num_attention_heads", 8);
  config.ple_dim = Int(text, "hidden_size_per_layer_input", 256, 0, kMaxSize);
  config.ple_vocab_size = Size(text, "vocab_size_per_layer_input", 262144);
  if (!config.HasPle()) config.ple_vocab_size = 0;
  config.max_positions = Size(text, "max_position_embeddings", 131072);
  // Multimodal placeholders are looked up as the pad id, in both tables (model.md 4).
  const int rows = config.HasPle() ? std::min(config.vocab_size, config.ple_vocab_size) : config.vocab_size;
  config.pad_token_id = Int(text, "pad_token_id", 0, 0, rows - 1);
  config.bos_token_id = Int(text, "bos_token_id", 2, 0, kMaxId);
  config.rms_norm_eps = Positive(text, "rms_norm_eps").value_or(1e-6f);
  config.final_logit_softcapping = Positive(text, "final_logit_softcapping");
  ParseLayers(text, path, config, unknown);

  Ignore(text, {"eos_token_id", "tie_word_embeddings", "num_experts", "top_k_experts", "moe_intermediate_size", "dtype",
                "torch_dtype", "initializer_range", "attention_dropout", "use_cache", "architectures",
                "allow_global_per_layer_attribute_access", "transformers_version", "_name_or_path"});
  CollectUnknown(text, path, unknown);
  return config;
}

VisionConfig ParseVision(const JsonObject& vision, std::vector<std::string>& unknown) {
  Only(vision, "model_type", {"gemma4_vision"}, "circlet supports \"gemma4_vision\"");
  Only(vision, "hidden_activation", {"gelu_pytorch_tanh"}, kOnlyGelu);
  CheckQuantization(vision, false);

  VisionConfig config;
  config.hidden_size = Size(vision, "hidden_size", 768);
  config.intermediate_size = Size(vision, "intermediate_size", 3072);
  config.num_layers = Int(vision, "num_hidden_layers", 16, 1, kMaxLayers);
  config.num_heads = Size(vision, "num_attention_heads", 12);
  config.kv_heads = Size(vision, "num_key_value_heads", 12);
  config.head_dim = Size(vision, "head_dim", 64);
  config.patch_size = Int(vision, "patch_size", 16, 1, 1024);
  config.pooling_kernel_size = Int(vision, "pooling_kernel_size", 3, 1, 1024);
  config.position_embedding_size = Size(vision, "position_embedding_size", 10240);
  config.use_clipped_linears = vision.Optional<bool>("use_clipped_linears", false);
  config.standardize = vision.Optional<bool>("standardize", false);
  config.rms_norm_eps = Positive(vision, "rms_norm_eps").value_or(1e-6f);
  config.rope_theta = Positive(vision, "rope_theta").value_or(100.0f);
  // As with the text, the old name wins; an empty object counts as none.
  Ignore(vision, {"rope_parameters"});
  const bool old_name = vision.Has("rope_scaling") && !vision.Raw("rope_scaling").empty();
  const char* const rope_key = old_name ? "rope_scaling" : "rope_parameters";
  if (const std::optional<JsonObject> rope = vision.OptionalObject(rope_key)) {
    for (const char* key : {"rope_type", "type"})
      Only(*rope, key, {"axial", "default"}, "circlet supports \"axial\" (also spelled \"default\") for vision");
    config.rope_theta = Positive(*rope, "rope_theta").value_or(config.rope_theta);
    CollectUnknown(*rope, fmt::format("vision_config.{}.", rope_key), unknown);
  }
  if (config.num_heads % config.kv_heads != 0) {
    vision.FailAt("num_key_value_heads",
                  fmt::format("{}; must divide num_attention_heads, which is {}", config.kv_heads, config.num_heads));
  }
  if (config.head_dim % 4 != 0) {
    vision.FailAt("head_dim",
                  fmt::format("{}; must be a multiple of 4: two axes, each rotated by halves", config.head_dim));
  }
  // The reference reads neither biases nor dropout of the vision tower (model.md 2.3).
  Ignore(vision, {"attention_bias", "attention_dropout", "dtype", "torch_dtype", "initializer_range", "global_head_dim",
                  "max_position_embeddings", "default_output_length", "architectures",
                  "allow_global_per_layer_attribute_access", "transformers_version", "_name_or_path"});
  CollectUnknown(vision, "vision_config.", unknown);
  return config;
}

std::vector<int> ParseEos(const JsonObject& object) {
  constexpr std::string_view kKey = "eos_token_id";
  if (!object.Has(kKey)) return {};
  std::vector<int> ids = object.Raw(kKey).is_array() ? object.Required<std::vector<int>>(kKey)
                                                     : std::vector<int>{object.Required<int>(kKey)};
  for (const int id : ids)
    if (id < 0) object.FailAt(kKey, fmt::format("{}; token ids start at 0", id));
  return ids;
}

// Fills `architecture`; says whether the file is a text config by itself (model.md 1.1).
bool ParseArchitecture(const JsonObject& top, Gemma4Config& config) {
  static const std::map<std::string, bool> kTextOnly = {{"Gemma4ForConditionalGeneration", false},
                                                        {"Gemma4Model", false},
                                                        {"Gemma4ForCausalLM", true},
                                                        {"Gemma4TextModel", true}};
  Only(top, "model_type", {"gemma4", "gemma4_text"}, "circlet reads Gemma 4 (\"gemma4\", \"gemma4_text\")");
  const std::optional<std::string> model_type = top.Optional<std::string>("model_type");
  const auto architectures = top.Optional<std::vector<std::string>>("architectures");
  if (!architectures) {
    if (!model_type) top.FailAt("model_type", "missing, and architectures too; is this a Gemma 4 checkpoint?");
    config.architecture = *model_type == "gemma4" ? "Gemma4ForConditionalGeneration" : "Gemma4ForCausalLM";
    return kTextOnly.at(config.architecture);
  }
  const auto it = architectures->size() == 1 ? kTextOnly.find(architectures->front()) : kTextOnly.end();
  if (it == kTextOnly.end()) {
    std::vector<std::string> known;
    for (const auto& entry : kTextOnly) known.push_back(entry.first);
    top.FailAt("architectures",
               fmt::format("{}; circlet supports one of {}", Shown(top.Raw("architectures")), fmt::join(known, ", ")));
  }
  config.architecture = it->first;
  if (model_type && (*model_type == "gemma4_text") != it->second) {
    top.FailAt("model_type", fmt::format("\"{}\" does not belong to architectures [\"{}\"]; both must agree",
                                         *model_type, config.architecture));
  }
  return it->second;
}

void ParseTokenIds(const JsonObject& top, Gemma4Config& config) {
  const auto id = [&](std::string_view key, int64_t fallback) { return Int(top, key, fallback, 0, kMaxId); };
  config.image_token_id = id("image_token_id", 258880);
  config.video_token_id = id("video_token_id", 258884);
  config.audio_token_id = id("audio_token_id", 258881);
  config.boi_token_id = id("boi_token_id", 255999);
  config.eoi_token_id = id("eoi_token_id", 258882);
  config.boa_token_id = id("boa_token_id", 256000);
  // The configuration class says eoa_token_index, files also eoa_token_id.
  config.eoa_token_id = id("eoa_token_index", id("eoa_token_id", 258883));
}

}  // namespace

Gemma4Config ParseConfig(const json& object, const std::string& where) {
  Gemma4Config config;
  const JsonObject top(object, where);
  if (ParseArchitecture(top, config)) {
    config.text = ParseText(top, "", config.unknown_keys);
    config.tie_word_embeddings = top.Optional<bool>("tie_word_embeddings", true);
    config.eos_token_ids = ParseEos(top);
    return config;
  }
  const JsonObject text = top.Object("text_config");
  config.text = ParseText(text, "text_config.", config.unknown_keys);
  if (const std::optional<JsonObject> vision = top.OptionalObject("vision_config"))
    config.vision = ParseVision(*vision, config.unknown_keys);
  config.has_audio = top.OptionalObject("audio_config").has_value();
  // The reference asks the top level alone; what text_config says is for Gemma4ForCausalLM.
  config.tie_word_embeddings = top.Optional<bool>("tie_word_embeddings", true);
  CheckQuantization(top, true);
  ParseTokenIds(top, config);
  config.eos_token_ids = ParseEos(top);
  if (config.eos_token_ids.empty()) config.eos_token_ids = ParseEos(text);
  Ignore(top, {"dtype", "torch_dtype", "initializer_range", "transformers_version", "_name_or_path", "use_cache",
               "vision_soft_tokens_per_image"});
  CollectUnknown(top, "", config.unknown_keys);
  return config;
}

Gemma4Config ReadConfig(const std::filesystem::path& directory) {
  const std::filesystem::path path = directory / "config.json";
  Gemma4Config config = ParseConfig(ReadJson(path), path.string());
  config.quantization = QuantizationConfig::Parse(ReadFile(path), path.string());
  const std::filesystem::path generation_path = directory / "generation_config.json";
  if (std::filesystem::exists(generation_path)) {
    const json generation = ReadJson(generation_path);
    const std::vector<int> ids = ParseEos(JsonObject(generation, generation_path.string()));
    if (!ids.empty()) config.eos_token_ids = ids;
  }
  return config;
}

}  // namespace circlet
