// Any text is a tree or an Error; a tree is written as text that reads back as the same tree.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  try {
    const nlohmann::json tree = circlet::ParseJson({reinterpret_cast<const char*>(data), size}, "input");
    if (circlet::ParseJson(circlet::DumpJson(tree), "dump") != tree) std::abort();
  } catch (const circlet::Error&) {
  }
  return 0;
}
