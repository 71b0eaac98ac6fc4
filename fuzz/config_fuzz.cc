// Any config.json is refused with an Error, or describes a model whose parameters can be listed.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/model/gemma4/weights.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const nlohmann::json tree = circlet::ParseJson({reinterpret_cast<const char*>(data), size}, "config.json");
    const circlet::Gemma4Config config = circlet::ParseConfig(tree, "config.json");
    for (const circlet::Parameter& parameter : circlet::Parameters(config)) {
      if (parameter.shape.Elements() <= 0) std::abort();
      if (circlet::CanonicalName(parameter.name) != parameter.name) std::abort();
    }
  } catch (const circlet::Error&) {
  }
  return 0;
}
