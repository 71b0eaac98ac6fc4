#pragma once

// The text side of Gemma 4 as graphs (model.md 3; quantization.md 6.4 - 6.7, 7.5, 8). All graphs have batch 1.
//
// Shapes: S = positions, D = hidden size, L = layers, p = per-layer width, H = heads, KV = K/V heads, h = head size,
// T = keys (prefill: S; decode: cache slots).

#include <optional>

#include "circlet/model/gemma4/block_builder.h"
#include "circlet/model/gemma4/config.h"

namespace circlet {

inline constexpr char kTextRoot[] = "model.language_model";

// Full names of points that more than one graph mentions.
std::string LayerTypeName(const LayerConfig& layer);             // "full_attention", "sliding_attention"
std::string MaskPoint(const LayerConfig& layer);                 // model.language_model.attention_mask_TYPE
std::string RopePoint(const LayerConfig& layer, bool cosine);    // model.language_model.position_embeddings_TYPE_cos
std::string LayerInputPoint(int layer, const Dialect& dialect);  // grid of a layer's hidden input
std::string KeyPoint(int layer, const Dialect& dialect);         // grid of a layer's new K (after RoPE)
std::string ValuePoint(int layer, const Dialect& dialect);
std::string EmbeddingPoint();                       // token embeddings, merged with images or not
std::string TokenPlePoint(const Dialect& dialect);  // token part of the per-layer inputs
std::string PlePoint();                             // combined per-layer inputs
std::string HeadInputPoint(const TextConfig& config, const Dialect& dialect);

// ids [1,S] int64 -> embed_tokens[ids] * sqrt(D), output "hidden" [1,S,D]. `rows` is the table's height: the
// vocabulary, or the number of distinct ids when only those rows are at hand.
void BuildTokenEmbedding(const BlockBuilder& b, const TextConfig& config, int64_t length, int64_t rows);

// hidden [1,S,D], image features written over the placeholders -> "merged", with fusion_points behind model.mm_fusion,
// and "hidden", on the grid that the first layer and the PLE projection read.
void BuildMergedEmbedding(const BlockBuilder& b, const TextConfig& config, int64_t length, bool has_image);

// ids [1,S] -> embed_tokens_per_layer[ids] * sqrt(p), output "per_layer_token_inputs" [1,S,L,p].
void BuildPleEmbedding(const BlockBuilder& b, const TextConfig& config, int64_t length, int64_t rows);

// inputs_embeds [1,S,D], per_layer_token_inputs [1,S,L,p] -> combined per-layer inputs [1,S,L,p].
void BuildPleProjection(const BlockBuilder& b, const TextConfig& config, int64_t length);

enum class Phase { kPrefill, kDecode };

struct DecoderLayerOptions {
  bool inner_outputs = false;  // also "attn_out" and "mlp_out", behind o_proj and down_proj
  // Prefill: "hidden" comes out from this position on, as mask and per_layer_input come in; the positions before make only
  // K and V. A KV-shared layer takes none of them.
  int64_t first = 0;
};

// One decoder layer as a unit. Inputs in order: hidden [1,S,D]; mask [1,1,S,S] (decode [1,1,T]); cos, sin [1,S,h];
// decode of layers with own K/V: past_key, past_value [1,KV,T-1,h]; per_layer_input [1,S,p] (if p > 0); KV-shared
// layers: shared_key, shared_value [1,KV,T,h]. Outputs: hidden; new_key, new_value [1,KV,S,h] of layers with own K/V.
// `slots` = T; decode has S = 1.
void BuildDecoderLayer(const BlockBuilder& b, const TextConfig& config, int layer, Phase phase, int64_t slots,
                       const DecoderLayerOptions& options = {});

// Blocks of one layer by themselves; what comes out of the layer's norm goes in, on that norm's grid.
// hidden [1,S,D] -> hidden [1,S,D].
void BuildTextMlp(const BlockBuilder& b, const TextConfig& config, int layer, int64_t length);
// Inputs and outputs of BuildDecoderLayer without per_layer_input.
void BuildTextAttention(const BlockBuilder& b, const TextConfig& config, int layer, Phase phase, int64_t slots);

// Fused embeddings -> last_hidden_state, the whole stack in one graph. Inputs: inputs_embeds [1,S,D]; per_layer_inputs
// [1,S,L,p]; mask.TYPE [1,1,S,S], then cos.TYPE, sin.TYPE [1,S,h], types in alphabetical order.
void BuildTextModel(const BlockBuilder& b, const TextConfig& config, int64_t length);

// hidden [1,S,D] -> "logits" [1,S,V] of the final norm, soft-capped, and the norm itself, "last_hidden_state".
void BuildHead(const BlockBuilder& b, const TextConfig& config, int64_t length);
// Its two halves. hidden -> last_hidden_state; last_hidden_state -> logits [1,S,rows] of as many rows of the vocabulary,
// which is too large to stand in memory whole.
void BuildFinalNorm(const BlockBuilder& b, const TextConfig& config, int64_t length);
void BuildLogits(const BlockBuilder& b, const TextConfig& config, int64_t length, int64_t rows);
inline constexpr char kHeadWeight[] = "lm_head.weight";

}  // namespace circlet
