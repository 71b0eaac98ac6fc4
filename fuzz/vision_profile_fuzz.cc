// Any JSON is a profile or an Error; a profile that Validate passes holds its own positions and reads back as itself.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "model/gemma4/vision_profile.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using circlet::VisionProfile;
  try {
    const nlohmann::json json = circlet::ParseJson({reinterpret_cast<const char*>(data), size}, "profile.json");
    const VisionProfile profile = VisionProfile::FromJson(json, "profile.json");
    profile.Validate(nullptr, 4096);
    if (profile.ValidPatches() + profile.PaddingPatches() != profile.Patches()) std::abort();
    if (profile.Patches() > 1 << 16) return 0;  // takes long
    profile.CheckPositions(profile.Positions());
    if (!(VisionProfile::FromJson(profile.ToJson(), "again") == profile)) std::abort();
  } catch (const circlet::Error&) {
  }
  return 0;
}
