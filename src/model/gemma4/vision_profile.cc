#include "model/gemma4/vision_profile.h"

#include <fmt/ranges.h>

#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "circlet/model/gemma4/vision.h"

namespace circlet {
namespace {

// Far beyond any picture, and so small that products of sizes stay in 64 bits.
constexpr int64_t kLargest = 1 << 16, kMostPatches = 1 << 24, kLongestSequence = 1 << 20;
constexpr int64_t kE2bPatchSize = 16, kE2bKernel = 3, kE2bMaxSoftTokens = 280;

VisionProfile E2bProfile(const char* name, int64_t tokens, int64_t height, int64_t width) {
  return {.name = name,
          .visual_start_idx = 1,
          .num_visual_tokens = tokens,
          .max_soft_tokens = kE2bMaxSoftTokens,
          .patch_grid_height = height,
          .patch_grid_width = width,
          .patch_size = kE2bPatchSize,
          .pooling_kernel_size = kE2bKernel};
}

}  // namespace

const std::vector<VisionProfile>& VisionProfile::All() {
  static const std::vector<VisionProfile> profiles{E2bProfile("e2b_66x36_264", 264, 36, 66),
                                                   E2bProfile("e2b_57x42_266", 266, 42, 57)};
  return profiles;
}

const VisionProfile& VisionProfile::Named(std::string_view name) {
  std::vector<std::string> names;
  for (const VisionProfile& profile : All()) {
    if (profile.name == name) return profile;
    names.push_back(profile.name);
  }
  Fail("no vision profile \"{}\"{}; there are {}", name, NearestHint(name, names), fmt::join(names, ", "));
}

void VisionProfile::Validate(const VisionConfig* vision, std::optional<int64_t> max_seq) const {
  if (name.empty()) Fail("vision profile: the name is empty; give it one");
  const auto fail = [&](const std::string& text) { Fail("vision profile {}: {}", name, text); };
  if (batch_size != 1)
    fail(fmt::format("batch_size is {}; exported vision graphs take one image, set it to 1", batch_size));
  const auto positive = [&](const char* field, int64_t value) {
    if (value < 1 || value > kLargest)
      fail(fmt::format("{} is {}; it must be at least 1 and at most {}", field, value, kLargest));
  };
  positive("num_visual_tokens", num_visual_tokens);
  positive("max_soft_tokens", max_soft_tokens);
  positive("patch_grid_height", patch_grid_height);
  positive("patch_grid_width", patch_grid_width);
  positive("patch_size", patch_size);
  positive("pooling_kernel_size", pooling_kernel_size);
  if (visual_start_idx < 0 || visual_start_idx > kLongestSequence)
    fail(fmt::format("visual_start_idx is {}; it must be at least 0 and at most {}", visual_start_idx,
                     kLongestSequence));
  if (Patches() > kMostPatches)
    fail(fmt::format("max_soft_tokens {} of {} x {} patches each; at most {} patches", max_soft_tokens,
                     pooling_kernel_size, pooling_kernel_size, kMostPatches));
  const auto divisible = [&](const char* field, int64_t value) {
    if (value % pooling_kernel_size != 0)
      fail(fmt::format("{} {} is no multiple of the pooling kernel {}; choose a grid of whole soft tokens", field,
                       value, pooling_kernel_size));
  };
  divisible("patch_grid_height", patch_grid_height);
  divisible("patch_grid_width", patch_grid_width);
  if (num_visual_tokens > max_soft_tokens)
    fail(fmt::format("num_visual_tokens {} is larger than max_soft_tokens {}; raise max_soft_tokens", num_visual_tokens,
                     max_soft_tokens));
  if (num_visual_tokens != SoftHeight() * SoftWidth())
    fail(fmt::format("num_visual_tokens is {}, but a grid of {} x {} patches makes {} x {} = {}; make them agree",
                     num_visual_tokens, patch_grid_height, patch_grid_width, SoftHeight(), SoftWidth(),
                     SoftHeight() * SoftWidth()));
  if (max_seq && VisualEnd() > *max_seq)
    fail(fmt::format("image tokens end at {}, max_seq is {}; raise max_seq or move visual_start_idx", VisualEnd(),
                     *max_seq));
  if (vision == nullptr) return;
  const auto equal = [&](const char* field, int64_t value, int64_t expected) {
    if (value != expected)
      fail(fmt::format("{} is {}, the model's vision_config says {}; choose the model's own profile", field, value,
                       expected));
  };
  equal("patch_size", patch_size, vision->patch_size);
  equal("pooling_kernel_size", pooling_kernel_size, vision->pooling_kernel_size);
  if (std::max(patch_grid_height, patch_grid_width) > vision->position_embedding_size)
    fail(fmt::format("a grid of {} x {} patches leaves the position table of {}; choose a smaller grid",
                     patch_grid_height, patch_grid_width, vision->position_embedding_size));
}

std::vector<int64_t> VisionProfile::Positions() const {
  std::vector<int64_t> positions(static_cast<size_t>(2 * Patches()), -1);
  for (int64_t i = 0; i < ValidPatches(); ++i) {
    positions[static_cast<size_t>(2 * i)] = i % patch_grid_width;
    positions[static_cast<size_t>(2 * i + 1)] = i / patch_grid_width;
  }
  return positions;
}

std::string VisionProfile::PositionsSha256() const {
  const std::vector<int64_t> positions = Positions();
  return Sha256(std::as_bytes(std::span(positions)));
}

void VisionProfile::CheckPositions(std::span<const int64_t> positions) const {
  const std::vector<int64_t> expected = Positions();
  const auto mismatch = std::ranges::mismatch(expected, positions);
  if (mismatch.in1 == expected.end() && mismatch.in2 == positions.end()) return;
  const auto at = [](std::span<const int64_t> list, size_t patch) {
    return 2 * patch + 1 < list.size() ? fmt::format("({},{})", list[2 * patch], list[2 * patch + 1])
                                       : std::string("nothing");
  };
  const size_t patch = static_cast<size_t>(mismatch.in1 - expected.begin()) / 2;
  Fail(
      "vision profile {}: image_position_ids (SHA-256 {}) are not those of the profile (SHA-256 {}): patch {} is {}, "
      "expected {}; resize the image to {} x {} pixels, or choose the profile of its grid",
      name, Sha256(std::as_bytes(positions)), PositionsSha256(), patch, at(positions, patch), at(expected, patch),
      ImageWidth(), ImageHeight());
}

void VisionProfile::CheckProcessed(const Gemma4Config& config, std::span<const int64_t> ids,
                                   std::span<const int64_t> positions, const std::vector<int64_t>& pixel_shape,
                                   std::optional<int64_t> soft_tokens) const {
  Within(fmt::format("vision profile {}", name),
         [&] { CheckStaticLayout(config, ids, visual_start_idx, num_visual_tokens); });
  CheckPositions(positions);
  const std::vector<int64_t> expected{1, Patches(), PatchValues()};
  if (pixel_shape != expected)
    Fail("vision profile {}: pixel_values has shape [{}], expected [{}]; prepare the image with this profile", name,
         fmt::join(pixel_shape, ","), fmt::join(expected, ","));
  if (soft_tokens && *soft_tokens != num_visual_tokens)
    Fail("vision profile {}: the image has {} soft tokens, expected {}; prepare the image with this profile", name,
         *soft_tokens, num_visual_tokens);
}

VisionProfile VisionProfile::FromJson(const nlohmann::json& json, const std::string& file) {
  const JsonObject object(json, file);
  return {.name = object.Optional<std::string>("name", "custom"),
          .visual_start_idx = object.Required<int64_t>("visual_start_idx"),
          .num_visual_tokens = object.Required<int64_t>("num_visual_tokens"),
          .max_soft_tokens = object.Required<int64_t>("max_soft_tokens"),
          .patch_grid_height = object.Required<int64_t>("patch_grid_height"),
          .patch_grid_width = object.Required<int64_t>("patch_grid_width"),
          .patch_size = object.Required<int64_t>("patch_size"),
          .pooling_kernel_size = object.Required<int64_t>("pooling_kernel_size")};
}

nlohmann::json VisionProfile::ToJson() const {
  return {{"name", name},
          {"visual_start_idx", visual_start_idx},
          {"num_visual_tokens", num_visual_tokens},
          {"max_soft_tokens", max_soft_tokens},
          {"patch_grid_height", patch_grid_height},
          {"patch_grid_width", patch_grid_width},
          {"patch_size", patch_size},
          {"pooling_kernel_size", pooling_kernel_size},
          {"batch_size", batch_size},
          {"tokenizer_add_bos_token", tokenizer_add_bos_token},
          {"num_valid_patches", ValidPatches()},
          {"num_patches", Patches()},
          {"num_padding_patches", PaddingPatches()},
          {"soft_grid_height", SoftHeight()},
          {"soft_grid_width", SoftWidth()},
          {"image_height", ImageHeight()},
          {"image_width", ImageWidth()},
          {"patch_vector_size", PatchValues()},
          {"visual_end_idx", VisualEnd()},
          {"image_position_ids_shape", {1, Patches(), 2}},
          {"image_position_ids_sha256", PositionsSha256()}};
}

std::optional<VisionProfile> ProfileOf(const ModelArgs& args, const std::string& name, const VisionConfig& vision,
                                       std::optional<int64_t> max_seq) {
  struct Field {
    const char* name;
    std::optional<int> given;
    int64_t VisionProfile::*member;
  };
  const Field fields[] = {{"visual_start_idx", args.visual_start_idx, &VisionProfile::visual_start_idx},
                          {"num_visual_tokens", args.num_visual_tokens, &VisionProfile::num_visual_tokens},
                          {"max_soft_tokens", args.max_soft_tokens, &VisionProfile::max_soft_tokens},
                          {"patch_grid_height", args.patch_grid_height, &VisionProfile::patch_grid_height},
                          {"patch_grid_width", args.patch_grid_width, &VisionProfile::patch_grid_width}};
  VisionProfile profile;
  if (!name.empty()) {
    profile = VisionProfile::Named(name);
    for (const Field& field : fields)
      if (field.given && *field.given != profile.*field.member)
        Fail("model_args.vision.{}: is {}, profile {} says {}; leave it out, or leave the profile out", field.name,
             *field.given, name, profile.*field.member);
  } else {
    std::vector<std::string> missing;
    for (const Field& field : fields) {
      if (field.given)
        profile.*field.member = *field.given;
      else
        missing.push_back(field.name);
    }
    const bool none = missing.size() == std::size(fields) && !args.image_height && !args.image_width;
    if (none) return std::nullopt;
    if (!missing.empty())
      Fail(
          "model_args.vision: {} missing; a layout needs visual_start_idx, num_visual_tokens, max_soft_tokens, "
          "patch_grid_height and patch_grid_width, or the name of a profile",
          fmt::join(missing, ", "));
    profile.name = "custom";
    profile.patch_size = vision.patch_size;
    profile.pooling_kernel_size = vision.pooling_kernel_size;
  }
  profile.Validate(&vision, max_seq);
  const auto matches = [&](const char* field, std::optional<int> given, int64_t pixels, int64_t patches) {
    if (given && *given != pixels)
      Fail("model_args.vision.{}: is {}, {} patches of {} pixels are {}; make them agree", field, *given, patches,
           profile.patch_size, pixels);
  };
  matches("image_height", args.image_height, profile.ImageHeight(), profile.patch_grid_height);
  matches("image_width", args.image_width, profile.ImageWidth(), profile.patch_grid_width);
  return profile;
}

}  // namespace circlet
