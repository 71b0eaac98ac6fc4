// Any text is a tree or an Error; a tree is written as text that reads back as the same tree.

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/yaml.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  circlet::YamlNode tree;
  try {
    tree = circlet::ParseYaml({reinterpret_cast<const char*>(data), size}, "input");
  } catch (const circlet::Error&) {
    return 0;
  }
  // As text, in which NaN equals NaN.
  const circlet::YamlNode again = circlet::ParseYaml(circlet::DumpYaml(tree), "dump");
  constexpr auto kReplace = nlohmann::json::error_handler_t::replace;
  if (ToJson(again).dump(-1, ' ', false, kReplace) != ToJson(tree).dump(-1, ' ', false, kReplace)) std::abort();
  return 0;
}
