#pragma once

// config.json of a Gemma 4 checkpoint, checked and with every layer's geometry worked out (model.md 1.1, 2).

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "circlet/io/packed/quantization_config.h"

namespace circlet {

struct RopeConfig {
  enum class Type { kDefault, kProportional };
  Type type = Type::kDefault;
  float theta = 10000.0f;
  double partial_rotary_factor = 1.0;  // kProportional: share of the head that turns
  float factor = 1.0f;                 // kProportional: all frequencies are divided by it
  bool operator==(const RopeConfig&) const = default;
};

// What distinguishes one text layer from another. A KV-shared layer owns no K/V weights: it reads the K/V that layer
// `kv_source` computed (model.md 3.7); of any other layer kv_source is its own index.
struct LayerConfig {
  bool full = false;  // full or sliding attention
  int head_dim = 0;
  int kv_heads = 0;
  bool kv_shared = false;
  int kv_source = 0;
  bool stores_kv = false;  // a later layer reads this layer's K/V
  int intermediate = 0;    // MLP width, doubling applied
  bool k_eq_v = false;     // V is made of the raw K projection; there is no v_proj
  RopeConfig rope;
  int window = 0;  // keys that a query sees, itself included; 0 = all (full attention)
  // use_bidirectional_attention "vision": on sliding layers of a prefill, soft tokens that stand side by side see each
  // other (model.md 3.5).
  bool bidirectional_pictures = false;
  bool operator==(const LayerConfig&) const = default;
};

struct TextConfig {
  int vocab_size = 0;
  int hidden_size = 0;     // channels of the residual stream
  int added_channels = 0;  // of those, copies that widen it (widening.h)
  int num_heads = 0;
  int ple_dim = 0;         // hidden_size_per_layer_input; 0 = the model has no per-layer embeddings
  int ple_vocab_size = 0;  // 0 without per-layer embeddings
  int ple_groups = 1;      // rows of the stored per-layer table that make up a token's: one a scale
  int max_positions = 0;   // max_position_embeddings, informative
  int pad_token_id = 0;
  int bos_token_id = 0;
  float rms_norm_eps = 0;
  std::optional<float> final_logit_softcapping;
  int num_kv_shared_layers = 0;
  bool attention_k_eq_v = false;
  std::vector<LayerConfig> layers;

  int NumLayers() const { return static_cast<int>(layers.size()); }
  bool HasPle() const { return ple_dim > 0; }
  // The width that config.json states and the model's constants are made of.
  int ModelWidth() const { return hidden_size - added_channels; }
  // Of the norms over the stream, whose mean is over all channels.
  float StreamEps() const {
    return rms_norm_eps * (static_cast<float>(ModelWidth()) / static_cast<float>(hidden_size));
  }
};

struct VisionConfig {
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_layers = 0;
  int num_heads = 0;
  int kv_heads = 0;
  int head_dim = 0;  // a multiple of 4: two halves (x, y), each rotated by halves
  int patch_size = 0;
  int pooling_kernel_size = 0;
  int position_embedding_size = 0;
  bool use_clipped_linears = false;
  bool standardize = false;
  float rms_norm_eps = 0;
  float rope_theta = 0;

  int PatchValues() const { return 3 * patch_size * patch_size; }
};

struct Gemma4Config {
  std::string architecture;  // "Gemma4ForConditionalGeneration", ...
  TextConfig text;
  std::optional<VisionConfig> vision;  // absent: text-only
  bool has_audio = false;              // the audio tower itself is not built; its tensors are known and left unused
  bool tie_word_embeddings = true;

  // Placeholders and marks in input_ids; -1 in a text-only checkpoint, where every id is an ordinary one. Placeholder
  // ids may lie outside the vocabulary.
  int image_token_id = -1, video_token_id = -1, audio_token_id = -1;
  int boi_token_id = -1, eoi_token_id = -1;
  int boa_token_id = -1, eoa_token_id = -1;
  // Ids that end generation: generation_config.json, else config.json (model.md 9). May be empty.
  std::vector<int> eos_token_ids;

  // What config.json says of weights that are stored as codes; ReadConfig fills it.
  std::optional<QuantizationConfig> quantization;

  // Keys that circlet does not know, with their place ("text_config.new_thing"), for the report.
  std::vector<std::string> unknown_keys;
};

// Reads DIRECTORY/config.json and, when there is one, generation_config.json. Handles the four classes of model.md 1.1
// and both spellings of the full layers' head sizes. null equals absent; the last layer is always full attention.
// Throws Error naming file, field, value and what is supported: wrong types, sizes out of range or not fitting each
// other, features that circlet lacks (mixture of experts, bidirectional text attention, attention biases, ...), and
// weights quantized by a method that circlet does not read.
Gemma4Config ReadConfig(const std::filesystem::path& directory);

// The same from parsed JSON, without generation_config.json and quantization; `where` stands for the file in errors.
Gemma4Config ParseConfig(const nlohmann::json& config, const std::string& where);

}  // namespace circlet
