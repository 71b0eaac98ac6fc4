#pragma once

// The Gemma 3 tokenizer of tests/data, unpacked: the vocabulary of Gemma 4 under older names (model.md 8).

#include <cstdlib>
#include <filesystem>
#include <string>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "paths.h"
#include "temp_directory.h"

namespace circlet {

inline std::string GemmaTokenizerJson() {
  const TempDirectory directory;
  const std::filesystem::path packed = SourcePath("tests/data/tokenizer/gemma3_tokenizer.json.xz");
  const std::filesystem::path file = directory.Path() / "tokenizer.json";
  const std::string command = fmt::format("xz -dc '{}' > '{}'", packed.string(), file.string());
  CIRCLET_CHECK(std::system(command.c_str()) == 0, "cannot unpack {}: is xz installed?", packed.string());
  return ReadFile(file);
}

}  // namespace circlet
