#pragma once

#include <set>
#include <string>
#include <string_view>

#include "circlet/base/qparams.h"

namespace circlet {

// Points that are where they are because a checkpoint gives their grids (docs/packed.md), by full name.
struct GivenPoints {
  std::set<std::string, std::less<>> inputs;   // act_in of linears that do not share the grid of what they read
  std::set<std::string, std::less<>> outputs;  // act_out of clipped linears ahead of bounds, of the patch projection
};

// Where circlet computes what the reference computes, and where it deliberately does better. Each switch means one
// thing; docs/dialects.md says which graphs it changes, its reason and its measured effect.
struct Dialect {
  std::string_view name;
  // Points on values that their producer's point has rounded already: act_in of linears, norms and layers, the parts of
  // attention (logits_raw, present_key), hidden, encoder_out. Each has a grid of its own and rounds once more.
  bool requantizing_points;
  // A table's rows, each on a grid of its own, come out of the lookup on the common one; without: a QUANTIZE behind it.
  bool gather_requantizes;
  // Token embeddings and the fusion of text and pictures have grids of their own (embed_tokens.act_out,
  // model.mm_fusion) besides that of the merged embeddings.
  bool fusion_points;
  // A graph of several stages has points that the stages lack (model.per_layer_inputs), so that its file is held to
  // what the graph computes; without: to what the stages computed.
  bool whole_graph_points;
  // The bias of the patch embedder is an operand of its linear; without: part of the position embeddings.
  bool patch_bias_operand;
  // The vision position table has a grid, and is rounded ahead of the lookup.
  bool position_table_grid;
  // The vision pooler's stage multiplies padding patches by 0, its file does not.
  bool pooler_masks_padding;
  // Pictures run with the padding patches of their sample, and ranges cover them; without: the verification picture
  // alone.
  bool run_padding_patches;
  // Soft tokens lose their batch axis at the pooler's end; without: behind the projection.
  bool rank2_soft_tokens;
  // The vision mask's grid covers what pictures had; without: both of the mask's values.
  bool observed_mask_range;
  // Points on the pieces that RoPE moves around (q_x1, q_x2, q_neg, q_cat), each with a range of its own; without them
  // the pieces share the grid of the tensor they are cut from.
  bool rope_piece_points;
  // RoPE of the vision tower negates values; without: its table holds negated sines.
  bool negated_rope_values;
  // Statistics of attention sums include masked keys, -120 lower than the others.
  bool observe_masked_keys;
  // Signed linear weights per tensor, signed tables per row with a zero point (quantization.md 4.4); otherwise signed
  // weights are symmetric per row, zero point 0. Unsigned weights are asymmetric per row in both.
  bool signed_weights_as_reference;
  // act_out of a clipped linear sees values before the output clamp.
  bool clamp_after_point;
  // The PLE projection leaves some values without a grid.
  bool ple_float_holes;
  // K is transposed by an operator of its own ahead of the product.
  bool explicit_k_transpose;
  // The vision tower multiplies all query heads of a key head in one BATCH_MATMUL; without: head by head.
  bool batched_vision_heads;
  // A file computes the simulation's codes, every one of them; without: within bounds (pipeline/verify.h).
  bool exact_files;
  // Of ties, and of the division by the scale.
  Rounding rounding;
  // Of a run, no matter of the dialect; null: none. Outlives every graph.
  const GivenPoints* given = nullptr;

  bool operator==(const Dialect&) const = default;
};

inline constexpr Dialect kTico{
    .name = "tico",
    .requantizing_points = true,
    .gather_requantizes = true,
    .fusion_points = true,
    .whole_graph_points = true,
    .patch_bias_operand = true,
    .position_table_grid = true,
    .pooler_masks_padding = true,
    .run_padding_patches = true,
    .rank2_soft_tokens = true,
    .observed_mask_range = true,
    .rope_piece_points = true,
    .negated_rope_values = true,
    .observe_masked_keys = true,
    .signed_weights_as_reference = true,
    .clamp_after_point = true,
    .ple_float_holes = true,
    .explicit_k_transpose = true,
    .batched_vision_heads = true,
    .exact_files = false,
    .rounding = Rounding::kHalfEvenReciprocal,
};

inline constexpr Dialect kDefault{
    .name = "default",
    .requantizing_points = false,
    .gather_requantizes = false,
    .fusion_points = false,
    .whole_graph_points = false,
    .patch_bias_operand = false,
    .position_table_grid = false,
    .pooler_masks_padding = false,
    .run_padding_patches = false,
    .rank2_soft_tokens = false,
    .observed_mask_range = false,
    .rope_piece_points = false,
    .negated_rope_values = false,
    .observe_masked_keys = false,
    .signed_weights_as_reference = false,
    .clamp_after_point = false,
    .ple_float_holes = false,
    .explicit_k_transpose = false,
    .batched_vision_heads = false,
    .exact_files = true,
    .rounding = Rounding::kHalfAwayDivide,
};

// Throws Error listing the known names.
const Dialect& DialectFromName(std::string_view name);

}  // namespace circlet
