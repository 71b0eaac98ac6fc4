#include "pipeline/gemma4/contract.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/model/gemma4/tables.h"
#include "circlet/preprocess/chat.h"
#include "circlet/preprocess/samples.h"

namespace circlet::gemma4 {
namespace {

using nlohmann::json;
using Names = std::vector<std::string>;

bool Has(const Names& names, const std::string& name) { return std::ranges::find(names, name) != names.end(); }

// Those of `names` that were written.
Names Among(const Names& written, const Names& names) {
  Names found;
  for (const std::string& name : names)
    if (Has(written, name)) found.push_back(name);
  return found;
}

Names LayersOf(const char* prefix, int count, bool two_digits = false) {
  Names names;
  for (int i = 0; i < count; ++i)
    names.push_back(two_digits ? fmt::format("{}_{:02}", prefix, i) : fmt::format("{}_{}", prefix, i));
  return names;
}

Names Joined(std::initializer_list<Names> lists) {
  Names all;
  for (const Names& list : lists) all.insert(all.end(), list.begin(), list.end());
  return all;
}

struct Parts {
  Names vision_encoder, vision_pixels;  // encoder layers; those from pixels to pooled tokens
  Names prefill_layers, decode_layers;
};

Parts PartsOf(const Context& context, const Names& written) {
  const int layers = context.config.text.NumLayers();
  Parts parts;
  if (context.config.vision)
    parts.vision_encoder =
        Among(written, LayersOf("vision_encoder_layer", context.config.vision->num_layers, /*two_digits=*/true));
  parts.vision_pixels = Among(written, Joined({{"vision_patch_embedder"}, parts.vision_encoder, {"vision_pooler"}}));
  parts.prefill_layers =
      Among(written, Joined({LayersOf("decoder_layer_prefill", layers), LayersOf("decoder_layer", layers)}));
  parts.decode_layers = Among(written, LayersOf("decoder_layer_decode", layers));
  return parts;
}

json PhasesOf(const Parts& parts, const Names& written) {
  const Names split = Among(written, Joined({parts.vision_pixels, {"vision_post_projection"}}));
  const Names embeddings{"token_embedding", "ple_embedding"}, head{"lm_head"};
  return {{"picture", split.empty() ? Among(written, {"vision_prefill"}) : split},
          {"prefill", Among(written, Joined({embeddings,
                                             {"multimodal_fusion_prefill", "multimodal_fusion",
                                              "ple_projection_prefill", "ple_projection"},
                                             parts.prefill_layers,
                                             head}))},
          {"decode", parts.decode_layers.empty()
                         ? Names()
                         : Among(written, Joined({embeddings, {"ple_projection_decode"}, parts.decode_layers, head}))}};
}

// What the units stand for that are in no phase.
std::map<std::string, Names> ReplacedBy(const Parts& parts, const Names& written) {
  const Names embeddings = Among(written, {"token_embedding", "ple_embedding"});
  const Names projection = Among(written, {"ple_projection_prefill", "ple_projection"});
  const Names fusion = Among(written, {"multimodal_fusion_prefill", "multimodal_fusion"});
  const Names post = Among(written, {"vision_post_projection"});
  const Names pictures = Joined({parts.vision_pixels, post});
  std::map<std::string, Names> replaces{
      {"vision_prefill", pictures},
      {"vision_model", parts.vision_pixels},
      {"vision_encoder", parts.vision_encoder},
      {"multimodal_embedder", post},
      {"gemma4_model", parts.prefill_layers},
      {"gemma4_model_full", Joined({embeddings, pictures, fusion, projection, parts.prefill_layers})}};
  std::erase_if(replaces, [&](const auto& entry) { return entry.second.empty() || !Has(written, entry.first); });
  return replaces;
}

json LayerFacts(const LayerConfig& layer, int index) {
  json facts{
      {"index", index}, {"attention", LayerTypeName(layer)}, {"window", layer.window}, {"kv_source", layer.kv_source}};
  if (layer.bidirectional_pictures) facts["bidirectional_pictures"] = true;
  return facts;
}

// An id that the model lacks is left out.
json IdsOf(std::initializer_list<std::pair<const char*, int>> ids) {
  json object = json::object();
  for (const auto& [name, id] : ids)
    if (id >= 0) object[name] = id;
  return object;
}

}  // namespace

json ContractOf(const Context& context, const Names& written, const std::optional<VisionProfile>& profile) {
  const Gemma4Config& config = context.config;
  const int64_t slots = context.max_seq_len;
  const Parts parts = PartsOf(context, written);
  json units = json::object();
  for (const auto& [name, replaced] : ReplacedBy(parts, written)) units[name]["replaces"] = replaced;
  for (const Names* layers : {&parts.prefill_layers, &parts.decode_layers})
    for (size_t i = 0; i < layers->size(); ++i)
      units[(*layers)[i]]["layer"] = LayerFacts(config.text.layers[i], static_cast<int>(i));

  json contract{
      {"units", units},
      {"phases", PhasesOf(parts, written)},
      {"context", slots},
      {"vocabulary", config.text.vocab_size},
      {"bos_token_id", config.text.bos_token_id},
      {"pad_token_id", config.text.pad_token_id},
      {"stop_token_ids", config.eos_token_ids},
      {"placeholder_token_ids",
       IdsOf({{"image", config.image_token_id}, {"video", config.video_token_id}, {"audio", config.audio_token_id}})},
      {"mask", {{"seen", 0}, {"unseen", kMaskFill}}},
      {"cache", {{"slots", slots}, {"first_past_slot", 0}, {"newest_slot", slots - 1}}},
      {"tables", kTextTablesFile}};
  if (profile)
    contract["picture"] = {{"position", profile->visual_start_idx},
                           {"soft_tokens", profile->num_visual_tokens},
                           {"patches", profile->Patches()},
                           {"patch_grid", {profile->patch_grid_height, profile->patch_grid_width}}};
  if (profile && !parts.vision_encoder.empty()) contract["picture"]["tables"] = kVisionTablesFile;
  return contract;
}

std::map<std::string, Tensor> RopeTablesOf(int64_t length, TextTables& tables) {
  std::map<std::string, Tensor> all;
  for (const LayerConfig& layer : tables.Types())
    for (const bool cosine : {true, false})
      all[(cosine ? "cos." : "sin.") + LayerTypeName(layer)] = tables.Rope(0, length, layer, cosine);
  return all;
}

void AddProcessorFiles(const std::filesystem::path& model, PhaseSpec& phase) {
  for (const std::string& name : ProcessorFiles(model))
    phase.files[name] = [from = model / name](const std::filesystem::path& path) { WriteFile(path, ReadFile(from)); };
  // An output has no folders.
  if (std::string templates = JoinedTemplates(model); !templates.empty())
    phase.files["chat_template.json"] = [templates = std::move(templates)](const std::filesystem::path& path) {
      WriteFile(path, templates);
    };
}

}  // namespace circlet::gemma4
