#pragma once

// RoPE tables and additive attention masks: what a host computes for the exported units (model.md 3.5, 3.6, 5.4;
// quantization.md 6.7, 6.11, 9).

#include <span>
#include <vector>

#include "circlet/base/tensor.h"
#include "circlet/model/gemma4/config.h"

namespace circlet {

struct RopeTables {
  Tensor cos, sin;  // [1,S,h] float32
};

// inv_freq[j], j < head_dim/2, in float32: theta^(-2j/head_dim) / factor; kProportional: 0 from
// j = int(partial_rotary_factor * head_dim / 2) on.
std::vector<float> RopeFrequencies(const RopeConfig& rope, int head_dim);

// Tables of positions start .. start+count-1 from float32 angles position * inv_freq[j], duplicated over both halves of
// the head. negated_sin: the first half of each sine row is negated (the operator Rope{negated_sin} and the exported
// units expect it so; the model's own formula does not).
RopeTables TextRopeTables(const RopeConfig& rope, int head_dim, int64_t start, int64_t count, bool negated_sin);

// Tables of patches at `positions` (x, y) pairs [P,2]: the first half of the head turns by x, the second by y, each
// [f, f] with f = position * theta^(-2j/(head_dim/2)). Padding patches (-1,-1) get position 0. Result [1,P,head_dim].
// negated_sin: the first f of each axis is negated in the sine table, as the operator Rope{negated_sin} expects it.
RopeTables VisionRopeTables(float theta, int head_dim, std::span<const int64_t> positions, bool negated_sin = false);

inline constexpr float kMaskFill = -120.0f;

// Additive prefill mask [1,1,S,S]: 0 where query q sees key k, else `fill`. k is seen when k <= q, k > q - window (if
// window > 0) and k < valid (right padding). `places`, in rising order: soft tokens of which those that stand side by
// side see each other, later ones too (LayerConfig::bidirectional_pictures); the window holds for them as well.
Tensor PrefillMask(int64_t length, int64_t valid, int window, float fill = kMaskFill,
                   std::span<const int64_t> places = {});
// The same where keep[k] != 0 tells which keys are real (an attention_mask row of any pattern).
Tensor PrefillMask(std::span<const int64_t> keep, int window, float fill = kMaskFill,
                   std::span<const int64_t> places = {});

// Additive decode mask [1,1,S] of a cache of S slots: the past lies in slots 0 .. past-1, the new token in slot S-1
// (quantization.md 9). Full attention sees the past and slot S-1; a window the last window-1 past slots and slot S-1.
// past <= S-1, else Error.
Tensor DecodeMask(int64_t slots, int64_t past, int window, float fill = kMaskFill);

// Additive vision mask [1,1,P,P], no causal term: fill * (1 - v_i v_j), v = patch is real (x >= 0). Rows of padding
// patches are uniform (quantization.md 6.11). `positions` as for VisionRopeTables.
Tensor VisionMask(std::span<const int64_t> positions, float fill = kMaskFill);

}  // namespace circlet
