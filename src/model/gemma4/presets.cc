#include "model/gemma4/presets.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "circlet/io/packed/packed_weight.h"
#include "circlet/io/packed/quantization_config.h"
#include "circlet/model/gemma4/text.h"

namespace circlet {
namespace {

using nlohmann::json;

struct VisionSizes {
  int hidden, intermediate, layers, heads, head_dim, positions;
};

struct Preset {
  std::string_view name;
  std::string_view layers;  // S sliding, F full
  int kv_shared;
  bool double_wide;
  int hidden, intermediate, heads, kv_heads, head_dim, global_head_dim, ple_dim;
  int vocab, window, max_positions;
  VisionSizes vision;
  int max_soft_tokens;
  bool audio;
  bool packed = false;  // as Google's mobile checkpoints
};

constexpr VisionSizes ReleasedVision(int layers) {
  return {E2b::kVisionHidden, E2b::kVisionIntermediate, layers,
          E2b::kVisionHeads,  E2b::kVisionHeadDim,      E2b::kVisionPositions};
}

// model.md 2.4 for e2b and e4b; the two others keep every structural feature of E2B.
// clang-format off
constexpr Preset kPresets[] = {
    {.name = "tiny", .layers = "SSFSSSF", .kv_shared = 3, .double_wide = true,
     .hidden = 64, .intermediate = 96, .heads = 4, .kv_heads = 1, .head_dim = 16, .global_head_dim = 32, .ple_dim = 8,
     .vocab = 320, .window = 16, .max_positions = 2048,
     .vision = {32, 64, 2, 2, 16, 256}, .max_soft_tokens = 70, .audio = false},
    {.name = "e2b-short", .layers = "SSFSF", .kv_shared = 2, .double_wide = true,
     .hidden = E2b::kHidden, .intermediate = E2b::kIntermediate, .heads = E2b::kHeads, .kv_heads = E2b::kKvHeads,
     .head_dim = E2b::kHeadDim, .global_head_dim = E2b::kGlobalHeadDim,
     .ple_dim = E2b::kPleDim, .vocab = 8192, .window = E2b::kWindow, .max_positions = E2b::kMaxPositions,
     .vision = ReleasedVision(2), .max_soft_tokens = 280, .audio = false},
    {.name = "e2b", .layers = "SSSSFSSSSFSSSSFSSSSFSSSSFSSSSFSSSSF", .kv_shared = 20, .double_wide = true,
     .hidden = E2b::kHidden, .intermediate = E2b::kIntermediate, .heads = E2b::kHeads, .kv_heads = E2b::kKvHeads,
     .head_dim = E2b::kHeadDim, .global_head_dim = E2b::kGlobalHeadDim,
     .ple_dim = E2b::kPleDim, .vocab = 262144, .window = E2b::kWindow, .max_positions = E2b::kMaxPositions,
     .vision = ReleasedVision(16), .max_soft_tokens = 280, .audio = true},
    {.name = "e2b-qat-mobile-short", .layers = "SSFSF", .kv_shared = 2, .double_wide = true,
     .hidden = E2b::kHidden, .intermediate = E2b::kIntermediate, .heads = E2b::kHeads, .kv_heads = E2b::kKvHeads,
     .head_dim = E2b::kHeadDim, .global_head_dim = E2b::kGlobalHeadDim,
     .ple_dim = E2b::kPleDim, .vocab = 8192, .window = E2b::kWindow, .max_positions = E2b::kMaxPositions,
     .vision = ReleasedVision(2), .max_soft_tokens = 280, .audio = false, .packed = true},
    {.name = "e2b-qat-mobile", .layers = "SSSSFSSSSFSSSSFSSSSFSSSSFSSSSFSSSSF", .kv_shared = 20, .double_wide = true,
     .hidden = E2b::kHidden, .intermediate = E2b::kIntermediate, .heads = E2b::kHeads, .kv_heads = E2b::kKvHeads,
     .head_dim = E2b::kHeadDim, .global_head_dim = E2b::kGlobalHeadDim,
     .ple_dim = E2b::kPleDim, .vocab = 262144, .window = E2b::kWindow, .max_positions = E2b::kMaxPositions,
     .vision = ReleasedVision(16), .max_soft_tokens = 280, .audio = true, .packed = true},
    {.name = "e4b", .layers = "SSSSSFSSSSSFSSSSSFSSSSSFSSSSSFSSSSSFSSSSSF", .kv_shared = 18, .double_wide = false,
     .hidden = 2560, .intermediate = 10240, .heads = 8, .kv_heads = 2, .head_dim = 256, .global_head_dim = 512,
     .ple_dim = 256, .vocab = 262144, .window = 512, .max_positions = 131072,
     .vision = ReleasedVision(16), .max_soft_tokens = 280, .audio = true},
};
// clang-format on

const Preset& Find(std::string_view name) {
  for (const Preset& preset : kPresets)
    if (preset.name == name) return preset;
  const std::vector<std::string> names = PresetNames();
  throw Error(fmt::format("make-checkpoint: no preset \"{}\"{}; known are {}", name, NearestHint(name, names),
                          fmt::join(names, ", ")));
}

constexpr int kReleasedVocab = 262144;
constexpr const char* kSpaceMark = "\u2581";

// Control tokens with their ids (model.md 7.1). Small vocabularies have the text ones in front and the multimodal ones
// at the end.
struct ControlTokens {
  std::map<std::string, int> ids;
  int first_byte;  // id of <0x00>; the other bytes follow
  int space;       // id of the space mark
};

struct ReleasedToken {
  const char* content;
  int id;
};
constexpr ReleasedToken kReleasedTokens[] = {
    {"<pad>", 0},
    {"<eos>", 1},
    {"<bos>", 2},
    {"<unk>", 3},
    {"<mask>", 4},
    {"<|tool>", 46},
    {"<tool|>", 47},
    {"<|tool_call>", 48},
    {"<tool_call|>", 49},
    {"<|tool_response>", 50},
    {"<tool_response|>", 51},
    {"<|\"|>", 52},
    {"<|think|>", 98},
    {"<|channel>", 100},
    {"<channel|>", 101},
    {"<|turn>", 105},
    {"<turn|>", 106},
    {"<|image>", 255999},
    {"<|audio>", 256000},
    {"<|image|>", 258880},
    {"<|audio|>", 258881},
    {"<image|>", 258882},
    {"<audio|>", 258883},
    {"<|video|>", 258884},
};
constexpr int kMediaTokens = 7;

ControlTokens ControlTokensOf(int vocab) {
  constexpr int kCount = std::size(kReleasedTokens);
  constexpr int kTextTokens = kCount - kMediaTokens;
  const bool released = vocab == kReleasedVocab;
  ControlTokens tokens;
  for (int i = 0; i < kCount; ++i) {
    const int small_id = i < kTextTokens ? i : vocab - kCount + i;
    tokens.ids[kReleasedTokens[i].content] = released ? kReleasedTokens[i].id : small_id;
  }
  tokens.first_byte = released ? 238 : kTextTokens;
  tokens.space = released ? 236743 : kTextTokens + 256;
  return tokens;
}

json TextJson(const Preset& preset) {
  json layer_types = json::array();
  for (const char type : preset.layers) layer_types.push_back(type == 'F' ? "full_attention" : "sliding_attention");
  return {{"model_type", "gemma4_text"},
          {"dtype", "bfloat16"},
          {"vocab_size", preset.vocab},
          {"vocab_size_per_layer_input", preset.vocab},
          {"hidden_size", preset.hidden},
          {"hidden_size_per_layer_input", preset.ple_dim},
          {"intermediate_size", preset.intermediate},
          {"num_hidden_layers", preset.layers.size()},
          {"num_attention_heads", preset.heads},
          {"num_key_value_heads", preset.kv_heads},
          {"num_global_key_value_heads", nullptr},
          {"head_dim", preset.head_dim},
          {"global_head_dim", preset.global_head_dim},
          {"layer_types", layer_types},
          {"num_kv_shared_layers", preset.kv_shared},
          {"use_double_wide_mlp", preset.double_wide},
          {"attention_k_eq_v", false},
          {"attention_bias", false},
          {"enable_moe_block", false},
          {"use_bidirectional_attention", nullptr},
          {"hidden_activation", "gelu_pytorch_tanh"},
          {"rms_norm_eps", 1e-6},
          {"final_logit_softcapping", 30.0},
          {"sliding_window", preset.window},
          {"max_position_embeddings", preset.max_positions},
          {"rope_parameters",
           {{"sliding_attention", {{"rope_type", "default"}, {"rope_theta", 10000.0}}},
            {"full_attention",
             {{"rope_type", "proportional"}, {"partial_rotary_factor", 0.25}, {"rope_theta", 1000000.0}}}}},
          {"pad_token_id", 0},
          {"eos_token_id", 1},
          {"bos_token_id", 2},
          {"tie_word_embeddings", true}};
}

json VisionJson(const Preset& preset) {
  return {{"model_type", "gemma4_vision"},
          {"dtype", "bfloat16"},
          {"hidden_size", preset.vision.hidden},
          {"intermediate_size", preset.vision.intermediate},
          {"num_hidden_layers", preset.vision.layers},
          {"num_attention_heads", preset.vision.heads},
          {"num_key_value_heads", preset.vision.heads},
          {"head_dim", preset.vision.head_dim},
          {"patch_size", 16},
          {"pooling_kernel_size", 3},
          {"position_embedding_size", preset.vision.positions},
          {"use_clipped_linears", true},
          {"standardize", false},
          {"hidden_activation", "gelu_pytorch_tanh"},
          {"rms_norm_eps", 1e-6},
          {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 100.0}}}};
}

json AudioJson() {
  return {{"model_type", "gemma4_audio"}, {"dtype", "bfloat16"},        {"hidden_size", 1024},
          {"num_hidden_layers", 12},      {"num_attention_heads", 8},   {"subsampling_conv_channels", {128, 32}},
          {"conv_kernel_size", 5},        {"output_proj_dims", 1536},   {"use_clipped_linears", true},
          {"attention_context_left", 13}, {"attention_chunk_size", 12}, {"rms_norm_eps", 1e-6}};
}

// As repositories quote it of the released file; the 2-bit MLPs are those of the layers that share keys and values.
json QuantizationJson(const Preset& preset) {
  const int own = static_cast<int>(preset.layers.size()) - preset.kv_shared;
  const std::string own_layers = own > 10 ? fmt::format("(\\d|1[0-{}])", own - 11) : fmt::format("[0-{}]", own - 1);
  const auto bits = [](int count) { return json{{"num_bits", count}}; };
  const std::string layers = R"(language_model\.layers\.)";
  return {{"quant_method", "gemma"},
          {"num_bits", 4},
          {"quantize_embeddings", true},
          {"modules_to_not_convert",
           {"model.vision_tower.patch_embedder", "model.audio_tower.subsample_conv_projection",
            "model.audio_tower.output_proj", "relative_k_proj", "model.embed_audio", "model.embed_vision",
            "per_layer_model_projection"}},
          {"module_quant_configs",
           {{"^lm_head$", bits(2)},
            {R"(audio_tower(?!.*lconv1d\.linear_start))", bits(2)},
            {R"(audio_tower\.layers\.\d+\.lconv1d\.linear_start\.)", bits(4)},
            {R"(language_model\.embed_tokens$)", bits(2)},
            {R"(language_model\.embed_tokens_per_layer$)", bits(4)},
            {fmt::format(R"({}{}\.mlp\.)", layers, own_layers), bits(4)},
            {fmt::format(R"({}\d+\.mlp\.)", layers), bits(2)},
            {fmt::format(R"({}\d+\.per_layer_input_gate$)", layers), bits(8)},
            {fmt::format(R"({}\d+\.per_layer_projection$)", layers), bits(8)},
            {fmt::format(R"({}\d+\.self_attn\.)", layers), bits(4)},
            {"vision_tower", bits(8)}}}};
}

json FloatConfigJson(const Preset& preset, const ControlTokens& tokens) {
  return {{"architectures", {"Gemma4ForConditionalGeneration"}},
          {"model_type", "gemma4"},
          {"dtype", "bfloat16"},
          {"tie_word_embeddings", true},
          {"eos_token_id", {tokens.ids.at("<eos>"), tokens.ids.at("<turn|>")}},
          {"image_token_id", tokens.ids.at("<|image|>")},
          {"video_token_id", tokens.ids.at("<|video|>")},
          {"audio_token_id", tokens.ids.at("<|audio|>")},
          {"boi_token_id", tokens.ids.at("<|image>")},
          {"eoi_token_id", tokens.ids.at("<image|>")},
          {"boa_token_id", tokens.ids.at("<|audio>")},
          {"eoa_token_id", tokens.ids.at("<audio|>")},
          {"text_config", TextJson(preset)},
          {"vision_config", VisionJson(preset)},
          {"audio_config", preset.audio ? AudioJson() : json(nullptr)}};
}

json ConfigJson(const Preset& preset, const ControlTokens& tokens) {
  json config = FloatConfigJson(preset, tokens);
  if (!preset.packed) return config;
  config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = false;
  config["quantization_config"] = QuantizationJson(preset);
  config.erase("dtype");
  return config;
}

json GenerationJson(const ControlTokens& tokens) {
  return {{"do_sample", true},
          {"temperature", 1.0},
          {"top_k", 64},
          {"top_p", 0.95},
          {"bos_token_id", 2},
          {"pad_token_id", 0},
          {"eos_token_id", {tokens.ids.at("<eos>"), tokens.ids.at("<turn|>"), tokens.ids.at("<|tool_response>")}}};
}

json ProcessorJson(const Preset& preset) {
  return {{"processor_class", "Gemma4Processor"},
          {"image_seq_length", preset.max_soft_tokens},
          {"image_processor",
           {{"image_processor_type", "Gemma4ImageProcessor"},
            {"do_convert_rgb", true},
            {"do_normalize", false},
            {"do_rescale", true},
            {"do_resize", true},
            {"image_mean", {0.0, 0.0, 0.0}},
            {"image_std", {1.0, 1.0, 1.0}},
            {"max_soft_tokens", preset.max_soft_tokens},
            {"patch_size", 16},
            {"pooling_kernel_size", 3},
            {"resample", 3},
            {"rescale_factor", 1.0 / 255}}}};
}

// A vocabulary of the control tokens, the 256 bytes, the space mark and nothing else that text could become, in the
// structure of Gemma's file (model.md 8): every text has an encoding. (As three bytes a space would not come back: the
// decoder turns marks into spaces before it joins bytes.)
json TokenizerJson(const Preset& preset, const ControlTokens& tokens) {
  std::vector<std::string> pieces(preset.vocab);
  json added = json::array();
  std::map<int, std::string> by_id;
  for (const auto& [content, id] : tokens.ids) by_id[id] = content;
  for (const auto& [id, content] : by_id) {
    pieces[id] = content;
    added.push_back({{"id", id},
                     {"content", content},
                     {"special", true},
                     {"normalized", false},
                     {"lstrip", false},
                     {"rstrip", false},
                     {"single_word", false}});
  }
  for (int byte = 0; byte < 256; ++byte) pieces[tokens.first_byte + byte] = fmt::format("<0x{:02X}>", byte);
  pieces[tokens.space] = kSpaceMark;
  json vocab = json::object();
  for (int id = 0; id < preset.vocab; ++id) vocab[pieces[id].empty() ? fmt::format("<unused{}>", id) : pieces[id]] = id;
  const json space = {{"String", " "}};
  return {
      {"version", "1.0"},
      {"truncation", nullptr},
      {"padding", nullptr},
      {"added_tokens", added},
      {"normalizer", {{"type", "Replace"}, {"pattern", space}, {"content", kSpaceMark}}},
      {"pre_tokenizer", {{"type", "Split"}, {"pattern", space}, {"behavior", "MergedWithPrevious"}, {"invert", false}}},
      {"post_processor",
       {{"type", "TemplateProcessing"},
        {"single",
         {{{"SpecialToken", {{"id", "<bos>"}, {"type_id", 0}}}}, {{"Sequence", {{"id", "A"}, {"type_id", 0}}}}}},
        {"pair", json::array()},
        {"special_tokens", {{"<bos>", {{"id", "<bos>"}, {"ids", {2}}, {"tokens", {"<bos>"}}}}}}}},
      {"decoder",
       {{"type", "Sequence"},
        {"decoders",
         {{{"type", "Replace"}, {"pattern", {{"String", kSpaceMark}}}, {"content", " "}},
          {{"type", "ByteFallback"}},
          {{"type", "Fuse"}}}}}},
      {"model",
       {{"type", "BPE"},
        {"dropout", nullptr},
        {"unk_token", "<unk>"},
        {"continuing_subword_prefix", nullptr},
        {"end_of_word_suffix", nullptr},
        {"fuse_unk", true},
        {"byte_fallback", true},
        {"ignore_merges", false},
        {"vocab", vocab},
        {"merges", json::array()}}}};
}

json TokenizerConfigJson(const Preset& preset) {
  return {{"tokenizer_class", "GemmaTokenizer"},
          {"model_max_length", preset.max_positions},
          {"padding_side", "left"},
          {"pad_token", "<pad>"},
          {"bos_token", "<bos>"},
          {"eos_token", "<eos>"},
          {"unk_token", "<unk>"},
          {"image_token", "<|image|>"},
          {"boi_token", "<|image>"},
          {"eoi_token", "<image|>"}};
}

// model.md 1.4.
void AddAudio(const json& audio, int text_hidden, std::vector<Parameter>& list) {
  const int64_t hidden = audio.at("hidden_size");
  const int64_t heads = audio.at("num_attention_heads");
  const int64_t channels0 = audio.at("subsampling_conv_channels")[0];
  const int64_t channels1 = audio.at("subsampling_conv_channels")[1];
  const int64_t out_dims = audio.at("output_proj_dims");
  std::string prefix = "model.audio_tower.";
  const auto add = [&](std::string_view name, Shape shape, WeightKind kind) {
    list.push_back({fmt::format("{}{}", prefix, name), shape, kind});
  };
  const auto add_clipped = [&](const std::string& name, int64_t out, int64_t in) {
    add(name + ".linear.weight", {out, in}, WeightKind::kLinear);
    for (const char* side : {".input", ".output"}) {
      add(fmt::format("{}{}_min", name, side), {}, WeightKind::kLowerBound);
      add(fmt::format("{}{}_max", name, side), {}, WeightKind::kUpperBound);
    }
  };
  add("subsample_conv_projection.layer0.conv.weight", {channels0, 1, 3, 3}, WeightKind::kConvolution);
  add("subsample_conv_projection.layer0.norm.weight", {channels0}, WeightKind::kNorm);
  add("subsample_conv_projection.layer1.conv.weight", {channels1, channels0, 3, 3}, WeightKind::kConvolution);
  add("subsample_conv_projection.layer1.norm.weight", {channels1}, WeightKind::kNorm);
  add("subsample_conv_projection.input_proj_linear.weight", {hidden, channels0 / 4 * channels1}, WeightKind::kLinear);
  add("output_proj.weight", {out_dims, hidden}, WeightKind::kLinear);
  add("output_proj.bias", {out_dims}, WeightKind::kBias);
  const int num_layers = audio.at("num_hidden_layers");
  for (int i = 0; i < num_layers; ++i) {
    prefix = fmt::format("model.audio_tower.layers.{}.", i);
    for (const std::string block : {"feed_forward1", "feed_forward2"}) {
      add_clipped(block + ".ffw_layer_1", 4 * hidden, hidden);
      add_clipped(block + ".ffw_layer_2", hidden, 4 * hidden);
      add(block + ".pre_layer_norm.weight", {hidden}, WeightKind::kNorm);
      add(block + ".post_layer_norm.weight", {hidden}, WeightKind::kNorm);
    }
    for (const char* name : {"q_proj", "k_proj", "v_proj", "post"})
      add_clipped(fmt::format("self_attn.{}", name), hidden, hidden);
    add("self_attn.relative_k_proj.weight", {hidden, hidden}, WeightKind::kLinear);
    // Of a softplus, so around 0.
    add("self_attn.per_dim_scale", {hidden / heads}, WeightKind::kBias);
    add_clipped("lconv1d.linear_start", 2 * hidden, hidden);
    add_clipped("lconv1d.linear_end", hidden, hidden);
    add("lconv1d.depthwise_conv1d.weight", {hidden, 1, audio.at("conv_kernel_size").get<int64_t>()},
        WeightKind::kConvolution);
    for (const char* name :
         {"lconv1d.pre_layer_norm", "lconv1d.conv_norm", "norm_pre_attn", "norm_post_attn", "norm_out"})
      add(fmt::format("{}.weight", name), {hidden}, WeightKind::kNorm);
  }
  list.push_back({"model.embed_audio.embedding_projection.weight", {text_hidden, out_dims}, WeightKind::kLinear});
}

}  // namespace

std::vector<std::string> PresetNames() {
  std::vector<std::string> names;
  for (const Preset& preset : kPresets) names.emplace_back(preset.name);
  return names;
}

std::map<std::string, json> PresetFiles(std::string_view name) {
  const Preset& preset = Find(name);
  const ControlTokens tokens = ControlTokensOf(preset.vocab);
  return {{"config.json", ConfigJson(preset, tokens)},
          {"generation_config.json", GenerationJson(tokens)},
          {"processor_config.json", ProcessorJson(preset)},
          {"tokenizer.json", TokenizerJson(preset, tokens)},
          {"tokenizer_config.json", TokenizerConfigJson(preset)}};
}

std::vector<Parameter> StoredTensors(const json& config) {
  Gemma4Config stored = ParseConfig(config, "config.json");
  for (LayerConfig& layer : stored.text.layers) layer.kv_shared = false;
  std::vector<Parameter> list = Parameters(stored);
  if (stored.has_audio) AddAudio(config.at("audio_config"), stored.text.hidden_size, list);
  std::ranges::sort(list, {}, &Parameter::name);
  return list;
}

namespace {

// A parameter as one tensor or, when it is packed, as several.
void AddStored(const Parameter& parameter, const PackedForm& form, int64_t groups, std::vector<StoredTensor>& list) {
  using Part = StoredTensor::Part;
  const std::string module = parameter.name.substr(0, parameter.name.rfind('.'));
  if (!form.Packed()) {
    // The tower of sound and both projectors are stored so, where they are not packed.
    const bool wide = IsAudioTensor(parameter.name) || parameter.name.starts_with("model.embed_vision.");
    list.push_back({parameter.name, {wide ? DType::kF32 : DType::kBF16, parameter.shape}, parameter, Part::kValues});
    return;
  }
  const bool table = parameter.kind == WeightKind::kEmbedding;
  const auto add = [&](const char* name, TensorType type, Part part) {
    list.push_back({module + name, std::move(type), parameter, part, form.bits, static_cast<size_t>(groups)});
  };
  const int64_t rows = parameter.shape[0];
  add(table ? ".embedding_quantized" : ".weight",
      {form.bits == 8 ? DType::kI8 : DType::kU8, {rows, PackedRowBytes(form.bits, parameter.shape[1])}}, Part::kCodes);
  add(table ? ".embedding_scale" : ".weight_scale", {DType::kF32, {rows, groups}}, Part::kScales);
  if (table) return;
  add(".input_activation_scale", {DType::kF32, {}}, Part::kInputStep);
  add(".output_activation_scale", {DType::kF32, {}}, Part::kOutputStep);
}

}  // namespace

std::vector<StoredTensor> TensorsOfFile(const json& config) {
  const std::optional<QuantizationConfig> packed = QuantizationConfig::Parse(config.dump(), "config.json");
  std::vector<StoredTensor> list;
  if (!packed) {
    for (const Parameter& parameter : StoredTensors(config))
      list.push_back({parameter.name, {DType::kBF16, parameter.shape}, parameter, StoredTensor::Part::kValues});
    return list;
  }
  const TextConfig text = ParseConfig(config, "config.json").text;
  for (const Parameter& parameter : StoredTensors(config)) {
    const std::string& name = parameter.name;
    const bool bound = parameter.kind == WeightKind::kLowerBound || parameter.kind == WeightKind::kUpperBound;
    const std::string first = fmt::format("{}.layers.", kTextRoot);
    const bool shared_norm = name.starts_with(first) && name.ends_with(".self_attn.k_norm.weight") &&
                             text.layers[std::stoi(name.substr(first.size()))].kv_shared;
    if (bound || shared_norm) continue;
    const bool table = parameter.kind == WeightKind::kEmbedding;
    const bool can = name.ends_with(".weight") && (table || IsLinear(parameter.kind));
    const PackedForm form =
        can ? packed->FormOf(name.substr(0, name.rfind('.')),
                             table ? QuantizationConfig::Module::kTable : QuantizationConfig::Module::kLinear, false)
            : PackedForm{};
    AddStored(parameter, form, name == kPleTable ? text.NumLayers() : 1, list);
  }
  for (int i = 0; i < text.NumLayers(); ++i)
    for (const char* side : {"k", "v"})
      list.push_back({fmt::format("{}.layers.{}.self_attn.{}_cache_scale", kTextRoot, i, side),
                      {DType::kF32, {}},
                      {},
                      StoredTensor::Part::kCacheStep});
  std::ranges::stable_sort(list, std::greater(),
                           [](const StoredTensor& tensor) { return BitWidth(tensor.type.dtype); });
  return list;
}

std::vector<std::vector<Parameter>> SplitIntoShards(const std::vector<Parameter>& tensors, int64_t limit_bytes) {
  std::vector<std::vector<Parameter>> shards;
  int64_t shard_bytes = 0;
  for (const Parameter& tensor : tensors) {
    const int64_t bytes = 2 * tensor.shape.Elements();
    if (shards.empty() || shard_bytes + bytes > limit_bytes) {
      shards.emplace_back();
      shard_bytes = 0;
    }
    shards.back().push_back(tensor);
    shard_bytes += bytes;
  }
  return shards;
}

}  // namespace circlet
