// Any text is a recipe or an Error; the recipe that a run writes beside its results says the same as the one it had.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "circlet/base/error.h"
#include "circlet/settings/settings.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using circlet::Recipe;
  using circlet::Settings;
  std::string written;
  try {
    const Recipe recipe = Settings::Parse({reinterpret_cast<const char*>(data), size}, "recipe.yaml", {}).recipe;
    written = recipe.EffectiveYaml();
    for (const char* point : {"model.language_model.layers.0.mlp.gate_proj", "model.language_model.norm.act_out"}) {
      try {
        recipe.SpecFor({.name = point, .role = circlet::PointRole::kWeight}, circlet::kDefault);
      } catch (const circlet::Error&) {  // unsigned and symmetric
      }
    }
  } catch (const circlet::Error&) {
    return 0;
  }
  if (Settings::Parse(written, "effective_config.yaml", {}).recipe.EffectiveYaml() != written) std::abort();
  return 0;
}
