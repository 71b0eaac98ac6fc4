// Any file of codes is a verdict about the unit that it names, or an Error.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "circlet/base/error.h"
#include "circlet/pipeline/verify.h"
#include "unit_directory.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Temporary directory;
  static const bool written = [] {
    WriteUnit(directory);
    directory.Write("manifest.json", kManifest);
    directory.Write("pipeline.json", kPipeline);
    return true;
  }();
  if (!written) std::abort();
  const std::filesystem::path codes = directory.Write("codes.safetensors", View(data, size));
  try {
    const circlet::VerifyResult result = circlet::Verify({.directory = directory.Path(), .codes = codes});
    if (result.within_bounds && result.units.at(0).values == 0) std::abort();
  } catch (const circlet::Error&) {
  }
  try {
    circlet::RunFile({.file = directory.Path() / "unit.q.circle", .inputs = codes, .unit = "unit", .codes = true});
  } catch (const circlet::Error&) {
  }
  return 0;
}
