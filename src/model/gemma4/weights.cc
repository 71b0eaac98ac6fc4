#include "circlet/model/gemma4/weights.h"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cstring>
#include <optional>
#include <set>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/names.h"
#include "io/mapped_file.h"
#include "model/gemma4/packed_parameters.h"
#include "ops/codes.h"

namespace circlet {
namespace {

constexpr std::string_view kText = "model.language_model.";
constexpr std::string_view kVision = "model.vision_tower.";
constexpr std::string_view kHead = "lm_head.weight";
constexpr std::string_view kEmbedding = "model.language_model.embed_tokens.weight";
constexpr size_t kListedProblems = 12;

class ParameterList {
 public:
  void Add(std::string_view prefix, std::string_view name, Shape shape, WeightKind kind, Flow flow = Flow::kInner) {
    list_.push_back({fmt::format("{}{}", prefix, name), std::move(shape), kind, flow});
  }
  std::vector<Parameter> Take() { return std::move(list_); }

 private:
  std::vector<Parameter> list_;
};

void AddTextLayer(const TextConfig& text, int index, ParameterList& list) {
  const LayerConfig& layer = text.layers[index];
  const int64_t hidden = text.hidden_size;
  const int64_t q_width = int64_t{text.num_heads} * layer.head_dim;
  const int64_t kv_width = int64_t{layer.kv_heads} * layer.head_dim;
  const std::string prefix = fmt::format("{}layers.{}.", kText, index);
  list.Add(prefix, "input_layernorm.weight", {hidden}, WeightKind::kNorm);
  list.Add(prefix, "self_attn.q_proj.weight", {q_width, hidden}, WeightKind::kLinear);
  list.Add(prefix, "self_attn.q_norm.weight", {layer.head_dim}, WeightKind::kNorm, Flow::kScores);
  if (!layer.kv_shared) {
    list.Add(prefix, "self_attn.k_proj.weight", {kv_width, hidden}, WeightKind::kLinear);
    list.Add(prefix, "self_attn.k_norm.weight", {layer.head_dim}, WeightKind::kNorm, Flow::kScores);
    if (!layer.k_eq_v) list.Add(prefix, "self_attn.v_proj.weight", {kv_width, hidden}, WeightKind::kLinear);
  }
  list.Add(prefix, "self_attn.o_proj.weight", {hidden, q_width}, WeightKind::kLinear);
  list.Add(prefix, "post_attention_layernorm.weight", {hidden}, WeightKind::kNorm);
  list.Add(prefix, "pre_feedforward_layernorm.weight", {hidden}, WeightKind::kNorm);
  list.Add(prefix, "mlp.gate_proj.weight", {layer.intermediate, hidden}, WeightKind::kLinear, Flow::kGate);
  list.Add(prefix, "mlp.up_proj.weight", {layer.intermediate, hidden}, WeightKind::kLinear);
  list.Add(prefix, "mlp.down_proj.weight", {hidden, layer.intermediate}, WeightKind::kLinear, Flow::kResidual);
  list.Add(prefix, "post_feedforward_layernorm.weight", {hidden}, WeightKind::kNorm);
  if (text.HasPle()) {
    list.Add(prefix, "per_layer_input_gate.weight", {text.ple_dim, hidden}, WeightKind::kLinear, Flow::kGate);
    list.Add(prefix, "per_layer_projection.weight", {hidden, text.ple_dim}, WeightKind::kLinear, Flow::kResidual);
    list.Add(prefix, "post_per_layer_input_norm.weight", {hidden}, WeightKind::kNorm);
  }
  list.Add(prefix, "layer_scalar", {1}, WeightKind::kLayerScalar);
}

void AddText(const TextConfig& text, ParameterList& list) {
  list.Add(kText, "embed_tokens.weight", {text.vocab_size, text.hidden_size}, WeightKind::kEmbedding);
  if (text.HasPle()) {
    const int64_t ple_width = int64_t{text.NumLayers()} * text.ple_dim;
    list.Add(kText, "embed_tokens_per_layer.weight", {text.ple_vocab_size, ple_width}, WeightKind::kEmbedding);
    list.Add(kText, "per_layer_model_projection.weight", {ple_width, text.hidden_size}, WeightKind::kLinear);
    list.Add(kText, "per_layer_projection_norm.weight", {text.ple_dim}, WeightKind::kNorm);
  }
  for (int i = 0; i < text.NumLayers(); ++i) AddTextLayer(text, i, list);
  list.Add(kText, "norm.weight", {text.hidden_size}, WeightKind::kNorm, Flow::kHead);
}

void AddClippableLinear(const VisionConfig& vision, std::string_view prefix, std::string_view name, int64_t out,
                        int64_t in, ParameterList& list, Flow flow = Flow::kInner) {
  list.Add(prefix, fmt::format("{}.linear.weight", name), {out, in}, WeightKind::kLinear, flow);
  if (!vision.use_clipped_linears) return;
  for (const char* side : {"input", "output"}) {
    list.Add(prefix, fmt::format("{}.{}_min", name, side), {}, WeightKind::kLowerBound);
    list.Add(prefix, fmt::format("{}.{}_max", name, side), {}, WeightKind::kUpperBound);
  }
}

void AddVision(const VisionConfig& vision, ParameterList& list) {
  const int64_t hidden = vision.hidden_size;
  const int64_t q_width = int64_t{vision.num_heads} * vision.head_dim;
  const int64_t kv_width = int64_t{vision.kv_heads} * vision.head_dim;
  list.Add(kVision, "patch_embedder.input_proj.weight", {hidden, vision.PatchValues()}, WeightKind::kPatchProjection);
  list.Add(kVision, "patch_embedder.position_embedding_table", {2, vision.position_embedding_size, hidden},
           WeightKind::kPositionTable);
  for (int i = 0; i < vision.num_layers; ++i) {
    const std::string prefix = fmt::format("{}encoder.layers.{}.", kVision, i);
    list.Add(prefix, "input_layernorm.weight", {hidden}, WeightKind::kNorm);
    AddClippableLinear(vision, prefix, "self_attn.q_proj", q_width, hidden, list);
    AddClippableLinear(vision, prefix, "self_attn.k_proj", kv_width, hidden, list);
    AddClippableLinear(vision, prefix, "self_attn.v_proj", kv_width, hidden, list);
    list.Add(prefix, "self_attn.q_norm.weight", {vision.head_dim}, WeightKind::kNorm, Flow::kScores);
    list.Add(prefix, "self_attn.k_norm.weight", {vision.head_dim}, WeightKind::kNorm, Flow::kScores);
    AddClippableLinear(vision, prefix, "self_attn.o_proj", hidden, q_width, list);
    list.Add(prefix, "post_attention_layernorm.weight", {hidden}, WeightKind::kNorm);
    list.Add(prefix, "pre_feedforward_layernorm.weight", {hidden}, WeightKind::kNorm);
    AddClippableLinear(vision, prefix, "mlp.gate_proj", vision.intermediate_size, hidden, list, Flow::kGate);
    AddClippableLinear(vision, prefix, "mlp.up_proj", vision.intermediate_size, hidden, list);
    AddClippableLinear(vision, prefix, "mlp.down_proj", hidden, vision.intermediate_size, list, Flow::kResidual);
    list.Add(prefix, "post_feedforward_layernorm.weight", {hidden}, WeightKind::kNorm);
  }
  if (vision.standardize) {
    list.Add(kVision, "std_bias", {hidden}, WeightKind::kBias);
    list.Add(kVision, "std_scale", {hidden}, WeightKind::kScale);
  }
}

bool Strip(std::string_view& text, std::string_view prefix) {
  if (!text.starts_with(prefix)) return false;
  text.remove_prefix(prefix.size());
  return true;
}

// The layer of "model.language_model.layers.7.mlp..." and what follows it; nothing for other names.
struct LayerName {
  int index;
  std::string_view rest;
};
std::optional<LayerName> ParseTextLayer(std::string_view canonical) {
  if (!Strip(canonical, kText) || !Strip(canonical, "layers.")) return std::nullopt;
  int index = 0;
  const auto [end, error] = std::from_chars(canonical.data(), canonical.data() + canonical.size(), index);
  if (error != std::errc() || index < 0) return std::nullopt;
  canonical.remove_prefix(end - canonical.data());
  return LayerName{index, canonical};
}

std::string WhyUnused(const Gemma4Config& config, std::string_view canonical) {
  if (IsAudioTensor(canonical)) return "audio tower: circlet does not run audio";
  if (!config.vision && IsVisionTensor(canonical)) return "vision tower: config.json has no vision_config";
  if (canonical == kHead) return "equal to embed_tokens.weight, which it is tied to";
  if (const std::optional<LayerName> layer = ParseTextLayer(canonical)) {
    if (layer->index >= config.text.NumLayers())
      return fmt::format("config.json says {} layers", config.text.NumLayers());
    const LayerConfig& geometry = config.text.layers[layer->index];
    const std::string_view rest = layer->rest;
    if (geometry.kv_shared && (rest.starts_with(".self_attn.k_") || rest.starts_with(".self_attn.v_")))
      return fmt::format("layer {} reads the keys and values of layer {}", layer->index, geometry.kv_source);
    if (geometry.k_eq_v && rest.starts_with(".self_attn.v_proj."))
      return fmt::format("attention_k_eq_v: layer {} makes its values of k_proj", layer->index);
  }
  return "circlet knows no such Gemma 4 tensor";
}

bool IsFloat(DType type) {
  return type == DType::kF32 || type == DType::kF16 || type == DType::kBF16 || type == DType::kF64;
}

std::string FilesOf(const Checkpoint& checkpoint) {
  std::set<std::string> files;
  for (const std::string& name : checkpoint.Names()) files.insert(checkpoint.FileOf(name));
  if (files.size() > 1) return fmt::format("{} to {}", *files.begin(), *files.rbegin());
  return files.empty() ? "model.safetensors" : *files.begin();
}

StoredNames NamesOf(const Checkpoint& checkpoint) {
  StoredNames names;
  const auto add = [&](const std::string& stored) {
    const auto [it, inserted] = names.emplace(CanonicalName(stored), stored);
    if (!inserted) {
      throw Error(fmt::format("{}: tensors \"{}\" and \"{}\" are the same parameter; keep one of them",
                              FilesOf(checkpoint), Shortened(stored), Shortened(it->second)));
    }
  };
  for (const std::string& stored : checkpoint.Names()) add(stored);
  for (const auto& [stored, type] : checkpoint.Opaque()) add(stored);
  return names;
}

constexpr const char* kQuantized = "; quantization_config of config.json does not say that these are codes";

// What is wrong with a stored tensor, nothing when it fits.
std::string Misfit(const Checkpoint& checkpoint, const std::string& stored, const Shape& shape) {
  if (const auto opaque = checkpoint.Opaque().find(stored); opaque != checkpoint.Opaque().end())
    return fmt::format("{}: tensor \"{}\" is of type {}, expected a float type of shape {}{}", FilesOf(checkpoint),
                       stored, opaque->second, shape.ToString(), kQuantized);
  const TensorType& type = checkpoint.Find(stored)->Type();
  if (type.shape == shape && IsFloat(type.dtype)) return {};
  return fmt::format("{}: tensor \"{}\" is {}, expected a float type of shape {}{}", checkpoint.FileOf(stored), stored,
                     type.ToString(), shape.ToString(), IsFloat(type.dtype) ? "" : kQuantized);
}

// Whether two float tensors of one shape hold the same values, whatever their types.
bool SameValues(const Tensor& a, const Tensor& b) {
  if (a.GetDType() == b.GetDType()) return std::memcmp(a.Raw(), b.Raw(), static_cast<size_t>(a.Bytes())) == 0;
  const int64_t rows = a.GetShape()[0], width = a.GetShape()[1];
  const auto row = [&](const Tensor& t, int64_t i) {
    return ToF32(Tensor({t.GetDType(), {width}}, t.Raw() + i * (t.Bytes() / rows), std::make_shared<Tensor>(t)));
  };
  for (int64_t i = 0; i < rows; ++i)
    if (!std::ranges::equal(row(a, i).F32(), row(b, i).F32())) return false;
  return true;
}

// The table and the head, one of which may stand for both (config.tie_word_embeddings).
void SettleHead(Gemma4Config& config, const Checkpoint& checkpoint, StoredNames& names, Inventory& inventory) {
  const auto head = names.find(kHead), table = names.find(kEmbedding);
  if (!config.tie_word_embeddings || head == names.end()) return;
  if (table == names.end()) {
    auto node = names.extract(head);
    node.key() = kEmbedding;
    names.insert(std::move(node));
    return;
  }
  const Shape shape{config.text.vocab_size, config.text.hidden_size};
  const bool fit = Misfit(checkpoint, head->second, shape).empty() && Misfit(checkpoint, table->second, shape).empty();
  if (fit && SameValues(*checkpoint.Find(head->second), *checkpoint.Find(table->second))) return;
  config.tie_word_embeddings = false;
  if (fit)
    inventory.notes.push_back(
        "lm_head.weight differs from embed_tokens.weight and is used, although tie_word_embeddings is true");
}

// Google's mobile checkpoints say use_clipped_linears and hold no bounds.
void SettleClips(Gemma4Config& config, const StoredNames& names, Inventory& inventory) {
  if (!config.vision || !config.vision->use_clipped_linears || !config.quantization ||
      config.quantization->GetMethod() != QuantizationConfig::Method::kGemma)
    return;
  const auto is_bound = [](const auto& entry) {
    const std::string& name = entry.first;
    return name.starts_with(kVision) && (name.ends_with("put_min") || name.ends_with("put_max"));
  };
  if (std::ranges::any_of(names, is_bound)) return;
  config.vision->use_clipped_linears = false;
  inventory.notes.push_back("use_clipped_linears is true, but the checkpoint holds no bounds: nothing is clipped");
}

void SettleVision(Gemma4Config& config, const StoredNames& names, Inventory& inventory) {
  if (!config.vision) return;
  if (std::ranges::any_of(names, [](const auto& name) { return IsVisionTensor(name.first); })) return;
  config.vision.reset();
  inventory.notes.push_back(
      "the checkpoint holds no vision tensors, although config.json has a vision_config: only the "
      "text part runs");
}

// Throws what is wrong: `problems`, of which the first ones are listed, and what the stored names tell. `of_another`:
// tensors are missing or of other shapes, as those of another model are.
[[noreturn]] void FailInventory(const Gemma4Config& config, const Checkpoint& checkpoint, const StoredNames& unused,
                                const std::vector<std::string>& problems, bool of_another) {
  for (const auto& [canonical, stored] : unused) {
    const bool adapter = stored.starts_with("base_model.") || stored.find(".base_layer.") != stored.npos ||
                         stored.find(".lora_") != stored.npos;
    if (!adapter) continue;
    Fail(
        "{}: holds tensors such as \"{}\", those of an adapter beside its model; merge the adapter (merge_and_unload "
        "of "
        "the peft library), save the model, and give that",
        FilesOf(checkpoint), Shortened(stored));
  }
  const size_t listed = std::min(problems.size(), kListedProblems);
  std::string text = fmt::format("{}", fmt::join(problems.begin(), problems.begin() + listed, "\n"));
  if (listed < problems.size()) text += fmt::format("\n... and {} more", problems.size() - listed);
  if (!of_another) throw Error(text);
  std::string found;
  if (!unused.empty())
    found = fmt::format("; the checkpoint holds {} other tensors, such as \"{}\"", unused.size(),
                        Shortened(unused.begin()->second));
  throw Error(
      fmt::format("{}{}; config.json says {} layers: was a shard left out of the download, or is config.json that of "
                  "another model?",
                  text, found, config.text.NumLayers()));
}

// Codes without what says how to read them.
void RefuseLeftovers(const Gemma4Config& config, const Checkpoint& checkpoint, const StoredNames& names) {
  if (config.quantization) return;
  for (const auto& [canonical, stored] : names)
    if (IsPackedPart(stored))
      Fail(
          "{}: tensor \"{}\" is part of a quantized checkpoint, but config.json has no quantization_config, which says "
          "what the codes mean; give the config.json that belongs to these weights",
          checkpoint.Find(stored) != nullptr ? checkpoint.FileOf(stored) : FilesOf(checkpoint), Shortened(stored));
}

// Parts of codes beside a weight that is none.
void RefuseStrayParts(const Inventory& inventory, const StoredNames& names) {
  for (const auto& [canonical, stored] : names) {
    const std::string weight = canonical.substr(0, canonical.rfind('.')) + ".weight";
    if (IsPackedPart(canonical) && inventory.name_in_checkpoint.contains(weight))
      Fail(
          "tensor \"{}\" belongs to codes, but quantization_config of config.json says otherwise of \"{}\"; do not mix "
          "tensors of several checkpoints",
          Shortened(stored), Shortened(weight));
  }
}

}  // namespace

std::vector<Parameter> Parameters(const Gemma4Config& config) {
  ParameterList list;
  AddText(config.text, list);
  if (config.vision) {
    AddVision(*config.vision, list);
    list.Add("", "model.embed_vision.embedding_projection.weight",
             {config.text.hidden_size, config.vision->hidden_size}, WeightKind::kLinear);
  }
  if (!config.tie_word_embeddings)
    list.Add("", kHead, {config.text.vocab_size, config.text.hidden_size}, WeightKind::kHead);
  return list.Take();
}

std::string CanonicalName(std::string_view checkpoint_name) {
  std::string_view name = checkpoint_name;
  if (Strip(name, "model.language_model.model.") || Strip(name, "language_model.model.model."))
    return fmt::format("{}{}", kText, name);
  Strip(name, "model.");
  if (Strip(name, "language_model.")) return fmt::format("{}{}", kText, name);
  if (name.starts_with("lm_head.")) return std::string(name);
  for (const char* part : {"vision_tower.", "embed_vision.", "audio_tower.", "embed_audio."})
    if (name.starts_with(part)) return fmt::format("model.{}", name);
  return fmt::format("{}{}", kText, name);
}

bool IsVisionTensor(std::string_view checkpoint_name) {
  const std::string name = CanonicalName(checkpoint_name);
  return name.starts_with(kVision) || name.starts_with("model.embed_vision.");
}

bool IsAudioTensor(std::string_view checkpoint_name) {
  const std::string name = CanonicalName(checkpoint_name);
  return name.starts_with("model.audio_tower.") || name.starts_with("model.embed_audio.");
}

Inventory CheckInventory(Gemma4Config& config, const Checkpoint& checkpoint, bool text_only) {
  StoredNames names = NamesOf(checkpoint);
  RefuseLeftovers(config, checkpoint, names);
  Inventory inventory;
  SettleHead(config, checkpoint, names, inventory);
  SettleVision(config, names, inventory);
  SettleClips(config, names, inventory);
  PackedFinder packed(config, checkpoint, names);
  std::vector<std::string> problems;
  bool misfits = false;
  for (const Parameter& parameter : Parameters(config)) {
    if (text_only && IsVisionTensor(parameter.name)) continue;
    if (packed.Take(parameter, inventory, problems)) continue;
    auto entry = names.extract(parameter.name);
    if (entry.empty()) {
      misfits = true;
      problems.push_back(fmt::format("{}: tensor \"{}\" {} is missing", FilesOf(checkpoint), parameter.name,
                                     parameter.shape.ToString()));
      continue;
    }
    std::string misfit = Misfit(checkpoint, entry.mapped(), parameter.shape);
    if (!misfit.empty()) {
      misfits = true;
      problems.push_back(std::move(misfit));
    }
    inventory.name_in_checkpoint.insert(std::move(entry));
  }
  if (!problems.empty()) FailInventory(config, checkpoint, names, problems, misfits || packed.MissesTensors());
  packed.TakeCacheSteps(inventory);
  if (const auto table = inventory.packed.find(kPleTable); table != inventory.packed.end())
    config.text.ple_groups = static_cast<int>(table->second.shape[0] / config.text.ple_vocab_size);
  RefuseStrayParts(inventory, names);
  for (const auto& [canonical, stored] : names) {
    const bool left_out = text_only && IsVisionTensor(canonical);
    inventory.unused.push_back(
        {stored, left_out ? "vision tower: the run is text only" : WhyUnused(config, canonical)});
  }
  return inventory;
}

ModelWeights::ModelWeights(Gemma4Config config, Checkpoint checkpoint, Inventory inventory)
    : config_(std::move(config)), checkpoint_(std::move(checkpoint)), inventory_(std::move(inventory)) {}

ModelWeights ModelWeights::Open(Gemma4Config config, const std::filesystem::path& directory, bool text_only) {
  Checkpoint checkpoint = Checkpoint::Open(directory);
  Inventory inventory = Within(directory.string(), [&] { return CheckInventory(config, checkpoint, text_only); });
  return ModelWeights(std::move(config), std::move(checkpoint), std::move(inventory));
}

std::string_view ModelWeights::Tied(std::string_view name) const {
  return config_.tie_word_embeddings && name == kHead ? kEmbedding : name;
}

const std::string* ModelWeights::StoredName(std::string_view name) const {
  const auto it = inventory_.name_in_checkpoint.find(Tied(name));
  return it == inventory_.name_in_checkpoint.end() ? nullptr : &it->second;
}

bool ModelWeights::Has(std::string_view name) const { return StoredName(name) != nullptr; }

Tensor ModelWeights::Stored(std::string_view name) const {
  const std::string* stored = StoredName(name);
  if (stored == nullptr) {
    std::vector<std::string> names;
    for (const auto& entry : inventory_.name_in_checkpoint) names.push_back(entry.first);
    throw Error(fmt::format("the model has no parameter \"{}\"{}", name, NearestHint(name, names)));
  }
  if (const PackedParameter* const packed = Packed(name)) {
    const std::lock_guard lock(opened_->mutex);
    Tensor& opened = opened_->tensors[packed->codes];
    return opened.Empty() ? opened = Unpacked(checkpoint_, *packed) : opened;
  }
  const Tensor& narrow = *checkpoint_.Find(*stored);
  if (!widened_) return narrow;
  if (const auto table = wide_tables_.find(Tied(name)); table != wide_tables_.end()) return table->second;
  return (*widened_)(name, narrow);
}

Tensor ModelWeights::Float(std::string_view name) const {
  const Tensor stored = Stored(name);
  if (stored.Grid() == nullptr) return ToF32(stored);
  const Tensor values = Tensor::Uninitialized({DType::kF32, stored.GetShape()});
  Dequantize(stored, *stored.Grid(), 0, values.F32());
  return values;
}

int64_t ModelWeights::StoredBytes(std::string_view name) const {
  const PackedParameter* const packed = Packed(name);
  if (packed == nullptr) return Stored(name).Bytes();
  return checkpoint_.Find(packed->codes)->Bytes() + checkpoint_.Find(packed->scales)->Bytes();
}

const PackedParameter* ModelWeights::Packed(std::string_view name) const {
  const auto found = inventory_.packed.find(Tied(name));
  return found == inventory_.packed.end() ? nullptr : &found->second;
}

std::optional<BlockWeight> ModelWeights::Blocks(std::string_view name) const {
  if (const PackedParameter* const packed = Packed(name))
    return packed->form.group == 0 ? std::nullopt : std::optional(BlocksOf(checkpoint_, *packed));
  return RecoverQ40(Stored(name));
}

void ModelWeights::Widen(const Widening& widening, const std::filesystem::path& directory) {
  CIRCLET_CHECK(!widened_, "the stream is widened already");
  circlet::Widen(config_, widening);
  widened_.emplace(config_, widening);
  for (const std::string_view name : {kEmbedding, kHead})
    if (name == Tied(name)) wide_tables_.emplace(name, InFile(name, directory));
}

// A table of the vocabulary, widened block by block.
Tensor ModelWeights::InFile(std::string_view name, const std::filesystem::path& directory) const {
  constexpr int64_t kBlockBytes = int64_t{16} << 20;
  const Tensor& narrow = *checkpoint_.Find(*StoredName(name));
  const int64_t rows = narrow.GetShape()[0], block = std::max<int64_t>(1, kBlockBytes / (4 * config_.text.hidden_size));
  TensorType type{.shape = {rows, config_.text.hidden_size}};
  const auto file = MappedFile::Nameless(directory, [&](const auto& append) {
    for (int64_t first = 0; first < rows; first += block) {
      const Tensor wide = (*widened_)(name, narrow.Slice(first, std::min(rows, first + block), 0));
      type.dtype = wide.GetDType();
      if (first == 0) RequireFreeSpace(directory, type.Bytes());
      append({wide.Raw(), static_cast<size_t>(wide.Bytes())});
    }
  });
  return Tensor(type, const_cast<std::byte*>(file->Bytes().data()), file);
}

float ModelWeights::ScalarOf(std::string_view name) const {
  const Tensor value = Float(name);
  CIRCLET_CHECK(value.Elements() == 1, "{} has shape {}", name, value.GetShape().ToString());
  return value.F32()[0];
}

void ModelWeights::Release(std::string_view name) const {
  if (const PackedParameter* const packed = Packed(name)) {
    checkpoint_.Release(packed->scales);
    const std::lock_guard lock(opened_->mutex);
    opened_->tensors.erase(packed->codes);
  }
  if (const std::string* stored = StoredName(name)) checkpoint_.Release(*stored);
}

void ModelWeights::Prefetch(std::string_view name) const {
  if (const std::string* stored = StoredName(name)) checkpoint_.Prefetch(*stored);
}

}  // namespace circlet
