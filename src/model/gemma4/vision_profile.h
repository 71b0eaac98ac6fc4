#pragma once

// The static layout of an image prompt: one patch grid, one place in the sequence (quantization.md 8.1). Exported
// vision graphs are made for one profile.

#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/model/gemma4/config.h"
#include "circlet/settings/settings.h"

namespace circlet {

struct VisionProfile {
  std::string name;
  int64_t visual_start_idx = 0;                         // position of the first image token
  int64_t num_visual_tokens = 0;                        // V
  int64_t max_soft_tokens = 0;                          // slots that the pooler fills or leaves empty
  int64_t patch_grid_height = 0, patch_grid_width = 0;  // in patches
  int64_t patch_size = 0;                               // in pixels
  int64_t pooling_kernel_size = 0;
  int64_t batch_size = 1;
  bool tokenizer_add_bos_token = false;
  bool operator==(const VisionProfile&) const = default;

  int64_t Patches() const { return max_soft_tokens * pooling_kernel_size * pooling_kernel_size; }  // padding included
  int64_t ValidPatches() const { return patch_grid_height * patch_grid_width; }
  int64_t PaddingPatches() const { return Patches() - ValidPatches(); }
  int64_t SoftHeight() const { return patch_grid_height / pooling_kernel_size; }
  int64_t SoftWidth() const { return patch_grid_width / pooling_kernel_size; }
  int64_t ImageHeight() const { return patch_grid_height * patch_size; }  // pixels
  int64_t ImageWidth() const { return patch_grid_width * patch_size; }
  int64_t PatchValues() const { return 3 * patch_size * patch_size; }
  int64_t VisualEnd() const { return visual_start_idx + num_visual_tokens; }

  // The profiles with a name, default first. An unknown name is an Error with the nearest one.
  static const std::vector<VisionProfile>& All();
  static const VisionProfile& Named(std::string_view name);

  // Throws Error naming the profile, the field and the values: sizes that are not positive or do not fit each other,
  // the vision config (when given) or `max_seq` positions (when given).
  void Validate(const VisionConfig* vision = nullptr, std::optional<int64_t> max_seq = std::nullopt) const;

  // [P,2] (x, y): row by row, then (-1,-1).
  std::vector<int64_t> Positions() const;
  // Of those as little-endian int64.
  std::string PositionsSha256() const;
  // Throws Error with both hashes and the first patch that differs.
  void CheckPositions(std::span<const int64_t> positions) const;
  // What a processor made of a prompt and its image: ids [S], positions [P,2], the pixels' shape, soft tokens if it
  // says.
  void CheckProcessed(const Gemma4Config& config, std::span<const int64_t> ids, std::span<const int64_t> positions,
                      const std::vector<int64_t>& pixel_shape, std::optional<int64_t> soft_tokens = std::nullopt) const;

  // vision_profile.json (quantization.md 17).
  nlohmann::json ToJson() const;
  // What ToJson writes; sizes that follow from others are not read. Throws Error naming the file and the field;
  // Validate judges the values.
  static VisionProfile FromJson(const nlohmann::json& json, const std::string& file);
};

// The profile that a recipe's model_args.vision asks for, validated; empty when it says nothing and `name` is empty.
// With a name the fields of `args` must agree with it; without one all five layout fields are needed, and the profile
// is called "custom".
std::optional<VisionProfile> ProfileOf(const ModelArgs& args, const std::string& name, const VisionConfig& vision,
                                       std::optional<int64_t> max_seq = std::nullopt);

}  // namespace circlet
