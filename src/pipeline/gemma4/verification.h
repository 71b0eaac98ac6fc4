#pragma once

// The sample that the exported units are verified with, and the layout that the vision units are made for.

#include <optional>
#include <string>

#include "model/gemma4/vision_profile.h"
#include "pipeline/gemma4/context.h"
#include "pipeline/gemma4/data.h"

namespace circlet::gemma4 {

// Throws Error when --vision-profile has no effect, or when model_args.vision.validate_static_layout is set and a sample
// is not laid out as the exported vision units are. While samples still have their pixels.
void CheckVisionOptions(const RunData& data, const std::string& profile, const Context& context);

// Adds the longest sample with the vision layout of the exported units, right-padded, behind the items of `data`.
// `profile`: what --vision-profile says; without it the recipe, or else the most frequent layout of the calibration
// samples decides.
void AddVerification(const RunData& data, const std::string& profile, Context& context);

// The layout that the exported vision units are made for; none without pictures.
std::optional<VisionProfile> ExportedProfile(const Context& context);

}  // namespace circlet::gemma4
