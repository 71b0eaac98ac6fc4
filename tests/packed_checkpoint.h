#pragma once

// The recorded packed checkpoints of tests/data/qat, put together: what they share with examples/tiny-gemma4 is stored
// there alone, what tied shares with w48 in w48.

#include <fstream>
#include <map>
#include <nlohmann/json.hpp>
#include <string>

#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "golden.h"

namespace circlet {

class PackedCheckpoint {
 public:
  // "e2b", "w48", "tied", "w4a16-ct" or "q4_0-unquantized".
  explicit PackedCheckpoint(const std::string& name) : name_("qat/" + name + "/") {
    namespace fs = std::filesystem;
    const fs::path example = SourcePath("examples/tiny-gemma4");
    for (const fs::path& file : EntriesOf(example))
      if (fs::is_regular_file(file) && file.extension() != ".safetensors" && file.filename() != "config.json")
        fs::copy_file(file, Path() / file.filename());
    fs::copy_file(TestData(name_ + "config.json"), Path() / "config.json");
    const SafetensorsFile packed = OpenGolden(name_ + "packed.safetensors.xz");
    tensors_ = packed.Tensors();
    Share(SafetensorsFile::Open(example / "model.safetensors"), "shared.txt");
    if (name == "tied") Share(OpenGolden("qat/w48/packed.safetensors.xz"), "shared_with_w48.txt");
    Write();
  }

  const std::filesystem::path& Path() const { return directory_.Path(); }
  SafetensorsFile Goldens() const { return OpenGolden(name_ + "goldens.safetensors.xz"); }
  nlohmann::json Weights() const { return nlohmann::json::parse(GoldenText(name_ + "weights.json.xz")); }
  // For a damaged one.
  std::map<std::string, Tensor>& Tensors() { return tensors_; }
  void Write() const { WriteSafetensors(Path() / "model.safetensors", tensors_); }

 private:
  void Share(const SafetensorsFile& from, const char* list) {
    std::ifstream names(TestData(name_ + list));
    for (std::string tensor; std::getline(names, tensor);)
      if (!tensor.empty()) tensors_.emplace(tensor, from.Get(tensor));
  }

  std::string name_;
  TempDirectory directory_;
  std::map<std::string, Tensor> tensors_;
};

}  // namespace circlet
