#pragma once

// A copy of the smallest golden model with its samples, to run and to spoil.

#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <vector>

#include "golden.h"
#include "temp_directory.h"

namespace circlet {

class GoldenModelTest : public testing::Test {
 protected:
  GoldenModelTest() {
    std::filesystem::copy(TestData("golden/seed_example/model"), model_);
    UnpackGolden("golden/seed_example/inputs.safetensors.xz", samples_);
  }

  std::vector<std::string> Quantize(const std::vector<std::string>& more = {}) const {
    std::vector<std::string> arguments{"quantize", model_,     "--samples", samples_, "--recipe",
                                       "w8a16",    "--output", out_,        "--quiet"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    return arguments;
  }

  TempDirectory directory_;
  const std::string model_ = directory_.Path() / "model";
  const std::string samples_ = directory_.Path() / "inputs.safetensors";
  const std::string out_ = directory_.Path() / "out";
};

}  // namespace circlet
