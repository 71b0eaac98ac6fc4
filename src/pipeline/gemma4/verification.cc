#include "pipeline/gemma4/verification.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circlet/io/json.h"
#include "circlet/model/gemma4/vision.h"
#include "pipeline/gemma4/items.h"

namespace circlet::gemma4 {
namespace {

VisionProfile ProfileOf(const Context& context, const Item& text) {
  const VisionConfig& vision = *context.config.vision;
  const Sequence& sequence = context.SequenceOf(text);
  const Picture& image = context.PictureOf(sequence.pictures[0]);
  const PatchLayout layout = LayoutOf(vision, image.positions);
  VisionProfile profile{.name = "custom",
                        .visual_start_idx = sequence.places[0],
                        .num_visual_tokens = layout.tokens,
                        .max_soft_tokens = image.budget,
                        .patch_grid_height = layout.valid / layout.grid_width,
                        .patch_grid_width = layout.grid_width,
                        .patch_size = vision.patch_size,
                        .pooling_kernel_size = vision.pooling_kernel_size};
  for (const VisionProfile& known : VisionProfile::All()) {
    profile.name = known.name;
    if (profile == known) return profile;
  }
  profile.name = "custom";
  return profile;
}

// The most frequent layout among calibration samples with one picture (evaluation samples when there are no others);
// the first of equals.
std::optional<VisionProfile> FrequentProfile(const Context& context) {
  std::vector<std::pair<VisionProfile, int64_t>> counts;
  const auto is_calibration = [](const Item& item) { return item.kind == ItemKind::kCalibration; };
  const bool calibrates = std::any_of(context.texts.begin(), context.texts.end(), is_calibration);
  const ItemKind kind = calibrates ? ItemKind::kCalibration : ItemKind::kEvaluation;
  for (const Item& text : context.texts) {
    if (context.SequenceOf(text).pictures.size() != 1 || text.kind != kind) continue;
    const VisionProfile profile = ProfileOf(context, text);
    const auto same = std::find_if(counts.begin(), counts.end(), [&](const auto& c) { return c.first == profile; });
    if (same == counts.end()) {
      counts.emplace_back(profile, 1);
    } else {
      ++same->second;
    }
  }
  const auto most =
      std::max_element(counts.begin(), counts.end(), [](const auto& a, const auto& b) { return a.second < b.second; });
  if (most == counts.end()) return std::nullopt;
  return most->first;
}

// What --vision-profile or the recipe asks for.
std::optional<VisionProfile> AskedProfile(const std::string& asked, const Context& context) {
  if (!context.config.vision) {
    if (!asked.empty()) Fail("--vision-profile: the model has no vision tower");
    return std::nullopt;
  }
  const VisionConfig& vision = *context.config.vision;
  if (asked.ends_with(".json")) {
    const std::filesystem::path path = asked;
    VisionProfile profile = VisionProfile::FromJson(ReadJson(path), path.filename());
    profile.Validate(&vision, context.max_seq_len);
    return profile;
  }
  return ProfileOf(context.settings.model_args, asked, vision, context.max_seq_len);
}

// validate_static_layout: every sample with pictures is laid out as the exported vision units are.
void CheckLayouts(const RunData& data, const Gemma4Config& config, const std::optional<VisionProfile>& profile) {
  int64_t checked = 0;
  for (const auto* samples : {&data.calibration, &data.evaluation})
    for (const Sample& sample : *samples) {
      if (sample.pixel_values.Empty()) continue;
      const std::span<const int64_t> shape = sample.pixel_values.GetShape().Sizes();
      Within(sample.source, [&] {
        if (!profile) Fail("pictures in several places or none alone; validate_static_layout takes one layout");
        profile->CheckProcessed(config, sample.input_ids, sample.image_position_ids.I64(),
                                {shape.begin(), shape.end()});
      });
      ++checked;
    }
  if (checked == 0)
    Fail(
        "model_args.vision.validate_static_layout: no sample has a picture whose layout could be checked; give one, or "
        "set it to false");
}

// The longest of the samples that fit `profile`. Calibration picks the layout unless one is asked for; a sample that
// was not calibrated on verifies it when there is one.
std::optional<Sample> LongestFitting(const RunData& data, const std::optional<VisionProfile>& profile,
                                     const Context& context) {
  const auto fits = [&](const Item& text) {
    const size_t pictures = context.SequenceOf(text).pictures.size();
    if (!profile) return pictures == 0;
    if (pictures != 1) return false;
    VisionProfile own = ProfileOf(context, text);
    own.name = profile->name;
    return own == *profile;
  };
  std::optional<Sample> chosen;
  size_t at = 0;
  for (const auto* pool : {&data.calibration, &data.evaluation}) {
    const Sample* best = nullptr;
    for (const Sample& sample : *pool)
      if (fits(context.texts[at++]) && (best == nullptr || sample.input_ids.size() > best->input_ids.size()))
        best = &sample;
    if (best != nullptr) chosen = *best;
  }
  return chosen;
}

}  // namespace

void CheckVisionOptions(const RunData& data, const std::string& profile, const Context& context) {
  const std::optional<VisionProfile> asked = AskedProfile(profile, context);
  if (context.settings.model_args.validate_static_layout)
    CheckLayouts(data, context.config, asked ? asked : FrequentProfile(context));
  if (!profile.empty() && context.images.Empty())
    Fail("--vision-profile: has no effect without samples that have pictures");
}

void AddVerification(const RunData& data, const std::string& profile, Context& context) {
  const std::optional<VisionProfile> asked = AskedProfile(profile, context);
  std::optional<Sample> chosen = LongestFitting(data, asked ? asked : FrequentProfile(context), context);
  if (!chosen && asked && !context.images.Empty() && !data.calibration.empty())
    chosen = PatternSample(*asked, context.config,
                           WithoutPlaceholders(context.config, data.calibration.front().input_ids), "pattern");
  if (!chosen) return;
  std::vector<int64_t> ids = chosen->input_ids;
  std::vector<int64_t> keep(chosen->attention_mask.begin(), chosen->attention_mask.end());
  if (keep.empty()) keep.assign(ids.size(), 1);
  ids.resize(context.max_seq_len, context.config.text.pad_token_id);
  keep.resize(context.max_seq_len, 0);
  AddItem({.kind = ItemKind::kVerify,
           .label = "verify",
           .ids = std::move(ids),
           .keep = std::move(keep),
           .sample = &*chosen},
          context);
}

std::optional<VisionProfile> ExportedProfile(const Context& context) {
  if (context.VerifyPicture() == nullptr) return std::nullopt;
  return ProfileOf(context, *context.Verify());
}

}  // namespace circlet::gemma4
