#pragma once

// Access to the recorded results under tests/data (tests/data/golden/README.md).

#include <cstdlib>
#include <filesystem>
#include <string>

#include "circlet/base/error.h"
#include "circlet/io/safetensors.h"
#include "temp_directory.h"

namespace circlet {

inline std::filesystem::path TestData(const std::string& relative) {
  return std::filesystem::path(CIRCLET_SOURCE_DIR) / "tests" / "data" / relative;
}

// TestData("golden/tiny_e2b/float.safetensors.xz"), unpacked. The tensors stay valid after the unpacked file is gone.
inline SafetensorsFile OpenGolden(const std::string& relative) {
  const TempDirectory directory;
  const std::filesystem::path unpacked = directory.Path() / "golden.safetensors";
  const std::string command = "xz -dc '" + TestData(relative).string() + "' > '" + unpacked.string() + "'";
  CIRCLET_CHECK(std::system(command.c_str()) == 0, "cannot unpack {}: is xz installed?", relative);
  return SafetensorsFile::Open(unpacked);
}

}  // namespace circlet
