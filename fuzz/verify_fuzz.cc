// Any manifest.json and pipeline.json, with a line "====" between them, are a verdict or an Error.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "circlet/base/error.h"
#include "circlet/pipeline/verify.h"
#include "unit_directory.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Temporary directory;
  static const bool written = (WriteUnit(directory), true);
  if (!written) std::abort();
  const std::string_view text = View(data, size);
  constexpr std::string_view kBetween = "\n====\n";
  const size_t at = text.find(kBetween);
  directory.Write("manifest.json", text.substr(0, at));
  directory.Write("pipeline.json", at == text.npos ? kPipeline : text.substr(at + kBetween.size()));
  try {
    const circlet::VerifyResult result = circlet::Verify({.directory = directory.Path()});
    int64_t values = 0;
    for (const circlet::UnitVerdict& unit : result.units) values += unit.values;
    if (result.within_bounds && values == 0) std::abort();
    if (VerifyText(result).empty() || VerifyJson(result).empty()) std::abort();
  } catch (const circlet::Error&) {
  }
  return 0;
}
