#include "smoke/sizes.h"

#include <algorithm>
#include <tuple>

#include "circlet/base/error.h"
#include "circlet/model/gemma4/vision.h"
#include "model/gemma4/presets.h"
#include "model/gemma4/vision_profile.h"

namespace circlet {
namespace {

constexpr float kEps = 1e-6f;

struct TextSizes {
  int vocab, hidden, heads, kv_heads, head_dim, full_head_dim, intermediate, window, ple_dim;
};

TextConfig MakeText(const TextSizes& sizes) {
  TextConfig text;
  text.vocab_size = sizes.vocab;
  text.hidden_size = sizes.hidden;
  text.num_heads = sizes.heads;
  text.ple_dim = sizes.ple_dim;
  text.ple_vocab_size = sizes.ple_dim > 0 ? sizes.vocab : 0;
  text.max_positions = E2b::kMaxPositions;
  text.rms_norm_eps = kEps;
  const LayerConfig sliding{.full = false,
                            .head_dim = sizes.head_dim,
                            .kv_heads = sizes.kv_heads,
                            .intermediate = sizes.intermediate,
                            .rope = {},
                            .window = sizes.window};
  LayerConfig full = sliding;
  full.full = true;
  full.head_dim = sizes.full_head_dim;
  full.window = 0;
  full.rope = {.type = RopeConfig::Type::kProportional, .theta = 1e6f, .partial_rotary_factor = 0.25};
  full.kv_source = 1;
  full.stores_kv = true;
  LayerConfig shared = full;
  shared.kv_shared = true;
  shared.stores_kv = false;
  text.layers = {sliding, full, shared};
  text.num_kv_shared_layers = 1;
  return text;
}

Gemma4Config MakeConfig(const TextSizes& text, const VisionConfig& vision) {
  Gemma4Config config;
  config.architecture = "Gemma4ForConditionalGeneration";
  config.text = MakeText(text);
  config.vision = vision;
  config.image_token_id = 10;
  config.video_token_id = 11;
  config.audio_token_id = 12;
  return config;
}

constexpr TextSizes kTinyText{256, 64, 2, 2, 32, 32, 128, 4, 0};
// The vocabulary is short: its size changes no figure but the table's own bytes.
constexpr TextSizes kE2bText{8192,          E2b::kHidden,        E2b::kHeads,        E2b::kKvHeads,
                             E2b::kHeadDim, E2b::kGlobalHeadDim, E2b::kIntermediate, E2b::kWindow,
                             E2b::kPleDim};

VisionConfig TinyVision() {
  return {.hidden_size = 32,
          .intermediate_size = 64,
          .num_layers = 1,
          .num_heads = 4,
          .kv_heads = 2,
          .head_dim = 8,
          .position_embedding_size = 64,
          .use_clipped_linears = false,
          .standardize = true,
          .rms_norm_eps = kEps,
          .rope_theta = 100.0f};
}

VisionConfig E2bVision() {
  return {.hidden_size = E2b::kVisionHidden,
          .intermediate_size = E2b::kVisionIntermediate,
          .num_layers = 1,
          .num_heads = E2b::kVisionHeads,
          .kv_heads = E2b::kVisionHeads,
          .head_dim = E2b::kVisionHeadDim,
          .position_embedding_size = E2b::kVisionPositions,
          .use_clipped_linears = true,
          .standardize = false,
          .rms_norm_eps = kEps,
          .rope_theta = 100.0f};
}

SmokeSizes StaticSizes(const SmokeOptions::StaticRuntime& counts) {
  VisionProfile profile =
      counts.profile.empty() ? VisionProfile::All().front() : VisionProfile::Named(counts.profile);
  profile.num_visual_tokens = counts.num_visual_tokens.value_or(profile.num_visual_tokens);
  profile.max_soft_tokens = counts.max_soft_tokens.value_or(profile.max_soft_tokens);
  profile.patch_grid_height = counts.patch_grid_height.value_or(profile.patch_grid_height);
  profile.patch_grid_width = counts.patch_grid_width.value_or(profile.patch_grid_width);
  profile.pooling_kernel_size = counts.pooling_kernel_size.value_or(profile.pooling_kernel_size);
  constexpr int64_t kBudgets[] = {70, 140, 280, 560, 1120};
  if (std::ranges::find(kBudgets, profile.max_soft_tokens) == std::end(kBudgets))
    Fail("static_runtime: max_soft_tokens is {}; choose 70, 140, 280, 560 or 1120", profile.max_soft_tokens);
  const int64_t length = counts.max_seq.value_or(2048);
  profile.Validate(nullptr, length);

  SmokeSizes sizes{.config = MakeConfig(kE2bText, E2bVision())};
  sizes.length = sizes.slots = length;
  sizes.start = profile.visual_start_idx;
  SetPicture(sizes, static_cast<int>(profile.patch_size), static_cast<int>(profile.pooling_kernel_size),
             profile.patch_grid_height, profile.patch_grid_width, profile.PaddingPatches());
  sizes.patches = profile.Patches();
  return sizes;
}

}  // namespace

void SetPicture(SmokeSizes& sizes, int patch_size, int pooling_kernel, int64_t grid_height, int64_t grid_width,
                int64_t padding) {
  sizes.config.vision->patch_size = patch_size;
  sizes.config.vision->pooling_kernel_size = pooling_kernel;
  sizes.positions.clear();
  for (int64_t y = 0; y < grid_height; ++y)
    for (int64_t x = 0; x < grid_width; ++x) sizes.positions.insert(sizes.positions.end(), {x, y});
  sizes.positions.insert(sizes.positions.end(), 2 * padding, int64_t{-1});
}

void DropPadding(SmokeSizes& sizes) {
  sizes.positions.resize(2 * LayoutOf(*sizes.config.vision, sizes.positions).valid);
}

SmokeSizes SizesOf(const SmokeSize& size) {
  if (size.profile == "e2b_static_runtime") return StaticSizes(size.counts);
  if (size.profile == "e2b_dims") {
    SmokeSizes sizes{.config = MakeConfig(kE2bText, E2bVision())};
    SetPicture(sizes, 16, 3, 6, 6, 9);
    return sizes;
  }
  CIRCLET_CHECK(size.profile == "tiny", "no size profile {}", size.profile);
  SmokeSizes sizes{.config = MakeConfig(kTinyText, TinyVision())};
  sizes.causal = false;
  SetPicture(sizes, 16, 3, 6, 6);
  return sizes;
}

bool CountsAreStandard(const SmokeSize& size) {
  const SmokeSizes given = SizesOf(size), standard = SizesOf({.profile = size.profile});
  const auto counts = [](const SmokeSizes& sizes) {
    return std::tuple(sizes.length, sizes.start, sizes.config.vision->pooling_kernel_size, sizes.positions);
  };
  return counts(given) == counts(standard);
}

SmokeSizes ExampleSizes() {
  SmokeSizes sizes{.config = MakeConfig(kTinyText, TinyVision())};
  sizes.config.vision->kv_heads = 4;
  sizes.length = 16;
  SetPicture(sizes, 4, 2, 4, 4);
  return sizes;
}

}  // namespace circlet
