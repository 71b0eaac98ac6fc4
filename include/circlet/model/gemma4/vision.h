#pragma once

// The vision side of Gemma 4 as graphs (model.md 5; quantization.md 6.8 - 6.14, 7.3, 7.4, 8). All graphs have batch 1:
// one image. What a picture's patch grid decides (tables, masks, the pool matrix) is constant in a graph.
//
// Shapes: P = patches, padding included; V = slots for soft tokens = P / k^2, k = pooling kernel; valid = soft tokens
// of the real patches; Dv = vision width, hd = vision head size, ps = patch size; D = text width; S = positions.
// `positions` [P,2] are (x, y) pairs, row by row; padding patches stand at the end as (-1,-1). Padding patches are
// computed like others and masked in attention.

#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/exec/executor.h"
#include "circlet/model/gemma4/block_builder.h"
#include "circlet/model/gemma4/config.h"
#include "circlet/model/gemma4/tables.h"

namespace circlet {

inline constexpr char kVisionRoot[] = "model.vision_tower";
inline constexpr char kProjectorRoot[] = "model.embed_vision";

// What the positions of a picture's patches say.
struct PatchLayout {
  int64_t patches = 0;     // P
  int64_t valid = 0;       // real patches, a prefix
  int64_t grid_width = 0;  // max(x) + 1
  int64_t slots = 0;       // V
  int64_t tokens = 0;      // slots that real patches fill, a prefix
};
// Throws Error naming the patch or the size: a real patch behind padding, one coordinate -1, a coordinate outside the
// position table, P not a multiple of k^2, no real patch, filled slots that are no prefix (quantization.md 6.12).
PatchLayout LayoutOf(const VisionConfig& config, std::span<const int64_t> positions);

// [1,V,P]: 1/k^2 where patch p falls into slot v = x / k + (grid_width / k) * (y / k); zero columns for padding.
Tensor PoolMatrix(const VisionConfig& config, std::span<const int64_t> positions);

// [1,P,1]: 1 at real patches, 0 at padding.
Tensor PatchMask(const VisionConfig& config, std::span<const int64_t> positions);

// Full names of points that more than one graph mentions.
std::string VisionMaskPoint();                                         // of [1,1,P,P]
std::string VisionRopePoint(bool cosine);                              // of [1,P,hd]
std::string VisionLayerInputPoint(int layer, const Dialect& dialect);  // grid of a layer's hidden input
std::string PoolerInputPoint(const VisionConfig& config, const Dialect& dialect);
std::string PooledPoint();                                                          // of [1,V,Dv], behind sqrt(Dv)
std::string VisionTokensPoint(const VisionConfig& config, const Dialect& dialect);  // of [valid,Dv], standardized
std::string ProjectedPoint();                                                       // of [valid,D]

// Parameters that the graphs read in another form than the checkpoint stores them (quantization.md 6.8): pixels stay in
// [0,1], so 2 (x - 0.5) W^T = x (2 W)^T - sum_k W.
//   ...patch_embedder.input_proj.weight     2 W [Dv, 3 ps^2]
//   ...patch_embedder.input_proj.bias       -sum_k W [Dv]; read where the linear adds it
//   ...patch_embedder.position_embeddings   [1,P,Dv]: table[0][x] + table[1][y], 0 at padding; the
//                                           bias added to every row where the linear does not add it
// All other names pass to `stored`. Cheap to copy; `stored` must stay valid.
class VisionWeights {
 public:
  VisionWeights(const VisionConfig& config, WeightSource stored, const Dialect& dialect);

  // The folded projection; nothing that depends on a picture. Usable as a step's stored parameters.
  WeightSource Folded() const;
  // The same and the position embeddings of one picture. With `table_grid` the table's values are rounded to it first
  // (position_table_grid, fake-quantized reading; the point "...position_embedding_table").
  WeightSource For(std::span<const int64_t> positions, const QParams* table_grid = nullptr) const;
  Tensor PositionEmbeddings(std::span<const int64_t> positions, const QParams* table_grid = nullptr) const;

  static std::string PositionEmbeddingsName();
  static std::string PositionTablePoint();

 private:
  struct State;
  std::shared_ptr<const State> state_;
};

// The tables that graphs of a dialect take, [1,P,hd]. Without negated_rope_values the first half of each axis' sines is
// negated, so that no graph negates values: on an asymmetric grid, whose ends differ, a negated value may not fit.
RopeTables VisionRopeTables(const VisionConfig& config, std::span<const int64_t> positions, const Dialect& dialect);

// mask [1,1,P,P], cos, sin [1,P,hd] -> the same on their points. Without observed_mask_range the mask's grid always
// holds both of its values, also when no picture is padded.
void BuildVisionTables(const BlockBuilder& b, const VisionConfig& config, int64_t patches);

// pixel_values [1,P,3 ps^2] in [0,1] -> hidden [1,P,Dv].
void BuildPatchEmbedder(const BlockBuilder& b, const VisionConfig& config, int64_t patches);

// hidden [1,P,Dv], mask [1,1,P,P], cos, sin [1,P,hd] -> hidden [1,P,Dv].
void BuildVisionLayer(const BlockBuilder& b, const VisionConfig& config, int layer, int64_t patches);

// The attention of a layer by itself, behind the layer's norm and on its grid; shapes as for the layer.
void BuildVisionAttention(const BlockBuilder& b, const VisionConfig& config, int layer, int64_t patches);

struct VisionPoolerOptions {
  // Takes an input "patch_mask" [1,P,1] that multiplies hidden, 1 at real patches and 0 at padding. It keeps padding
  // out of pool_in's range and changes nothing else: their columns of the pool matrix are zero.
  bool patch_mask = false;
};

// hidden [1,P,Dv] -> pooled [1,V,Dv]: mean over k x k patches times sqrt(Dv); unused slots are 0.
void BuildVisionPooler(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions,
                       const VisionPoolerOptions& options = {});

// hidden [tokens,Dv] -> projected [tokens,D]: norm without gain, projection.
void BuildMultimodalEmbedder(const BlockBuilder& b, const Gemma4Config& config, int64_t tokens);

// pooled [1,V,Dv] -> projected [tokens,D] and last_hidden_state [tokens,Dv].
void BuildVisionPost(const BlockBuilder& b, const Gemma4Config& config, std::span<const int64_t> positions);

// Whole parts with tables and mask as constants.
// hidden [1,P,Dv] (patch embeddings) -> hidden [1,P,Dv].
void BuildVisionEncoder(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions);
// pixel_values [1,P,3 ps^2] -> last_hidden_state [tokens,Dv].
void BuildVisionModel(const BlockBuilder& b, const VisionConfig& config, std::span<const int64_t> positions);
// pixel_values [1,P,3 ps^2] -> projected [tokens,D].
void BuildVisionPrefill(const BlockBuilder& b, const Gemma4Config& config, std::span<const int64_t> positions);

// text [1,S,D], visual [V,D] -> fused [1,S,D]: the visual rows at start .. start+V-1 (quantization.md 7.4). All
// of it lies on the grid of the merged embeddings, with fusion_points on grids of its own. Throws Error when
// the span leaves [0,S].
void BuildFusion(const BlockBuilder& b, const TextConfig& config, int64_t length, int64_t start, int64_t tokens);

// The whole model in one graph, for dialects without fusion_points: ids [1,S] and, with `image`, pixel_values [1,P,3
// ps^2] -> last_hidden_state [1,S,D]. Masks and RoPE tables are constants, keys of all positions are valid. `positions`
// and `start` are of the one image; its placeholders stand at start .. start+tokens-1, and the caller puts the pad id
// there.
struct ImageSlot {
  std::vector<int64_t> positions;
  int64_t start = 0;
};
void BuildGemma4Full(const BlockBuilder& b, const Gemma4Config& config, int64_t length, const ImageSlot* image);

// Every point that runs with pictures have besides those of text, in order of computation (Recipe::CheckAllUsed).
std::vector<Point> VisionPoints(const Gemma4Config& config, const Dialect& dialect);

// ---- Placeholders (model.md 4; quantization.md 7.1 - 7.4)
// -------------------------------------------------------------------

// The placeholder positions of one prompt [S], in order. `image_tokens`: soft tokens of each of its images, in order.
// Throws Error: audio and video placeholders by name; image placeholders without images; images without placeholders;
// "image placeholders: expected A (image tokens B + C), got D".
std::vector<int64_t> CheckPlaceholders(const Gemma4Config& config, std::span<const int64_t> ids,
                                       std::span<const int64_t> image_tokens);

// The same for a batch of prompts [B,S]; `image_tokens` by row. Errors name the row.
std::vector<std::vector<int64_t>> CheckPlaceholders(const Gemma4Config& config, const Tensor& ids,
                                                    const std::vector<std::vector<int64_t>>& image_tokens);

// ids with image, video and audio placeholders replaced by the pad id, as embedding lookups take them.
std::vector<int64_t> WithoutPlaceholders(const Gemma4Config& config, std::span<const int64_t> ids);

// text [1,S,D] with the rows of `visual` [.,D] written to `at`, in order. Throws Error when counts or widths differ.
Tensor FuseAt(const Tensor& text, const Tensor& visual, std::span<const int64_t> at);

// Throws Error unless the image placeholders of ids are exactly [start, start + tokens) (validate_static_layout).
void CheckStaticLayout(const Gemma4Config& config, std::span<const int64_t> ids, int64_t start, int64_t tokens);

}  // namespace circlet
