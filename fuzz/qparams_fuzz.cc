// Any text is grids or an Error; grids that were read are written as text that reads back as the same text.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/quant/params.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  std::string text;
  try {
    text = ToText(circlet::ParseParameters({reinterpret_cast<const char*>(data), size}, "qparams.json"), {});
  } catch (const circlet::Error&) {
    return 0;
  }
  if (ToText(circlet::ParseParameters(text, "again"), {}) != text) std::abort();
  return 0;
}
