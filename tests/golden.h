#pragma once

// Access to the recorded results under tests/data (tests/data/golden/README.md).

#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <string>

#include "circlet/base/error.h"
#include "circlet/io/safetensors.h"
#include "paths.h"
#include "temp_directory.h"

namespace circlet {

inline std::filesystem::path TestData(const std::string& relative) { return SourcePath("tests/data/" + relative); }

// The text of TestData("golden/tiny_e2b/default.qparams.json.xz"), unpacked.
inline std::string GoldenText(const std::string& relative) {
  FILE* pipe = popen(("xz -dc '" + TestData(relative).string() + "'").c_str(), "r");
  CIRCLET_CHECK(pipe != nullptr, "cannot run xz");
  std::string text;
  char block[1 << 14];
  for (size_t count; (count = fread(block, 1, sizeof block, pipe)) > 0;) text.append(block, count);
  CIRCLET_CHECK(pclose(pipe) == 0, "cannot unpack {}: is xz installed?", relative);
  return text;
}

// TestData(`relative`), an .xz file, unpacked as `path`.
inline void UnpackGolden(const std::string& relative, const std::filesystem::path& path) {
  const std::string command = "xz -dc '" + TestData(relative).string() + "' > '" + path.string() + "'";
  CIRCLET_CHECK(std::system(command.c_str()) == 0, "cannot unpack {}: is xz installed?", relative);
}

// TestData("golden/tiny_e2b/float.safetensors.xz"), unpacked. The tensors stay valid after the unpacked file is gone.
inline SafetensorsFile OpenGolden(const std::string& relative) {
  const TempDirectory directory;
  const std::filesystem::path unpacked = directory.Path() / "golden.safetensors";
  UnpackGolden(relative, unpacked);
  return SafetensorsFile::Open(unpacked);
}

}  // namespace circlet
