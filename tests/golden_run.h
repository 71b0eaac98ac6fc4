#pragma once

// The golden models through the whole pipeline.

#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <functional>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/pipeline/quantize.h"
#include "golden.h"
#include "temp_directory.h"

namespace circlet {

// A recorded model and recipe.
struct GoldenCase {
  const char* model;
  const char* recipe;

  std::string Path(const std::string& file) const { return fmt::format("golden/{}/{}", model, file); }
};

inline void PrintTo(const GoldenCase& golden, std::ostream* out) { *out << golden.model << "/" << golden.recipe; }

inline std::string CaseName(const testing::TestParamInfo<GoldenCase>& info) {
  return fmt::format("{}_{}", info.param.model, info.param.recipe);
}

// Length of the recorded units' sequences.
inline int64_t GoldenLength(const std::string& model) {
  return ReadJson(TestData("golden/" + model + "/spec.json")).at("seq").get<int64_t>();
}

// One run on the text samples of a golden model; the output lives as long as the object.
class GoldenRun {
 public:
  using Adjust = std::function<void(QuantizeOptions&)>;

  explicit GoldenRun(const GoldenCase& golden, const std::string& dialect = "tico", const Adjust& adjust = {})
      : options_{.model = TestData(golden.Path("model")),
                 .output = directory_.Path() / "out",
                 .samples = directory_.Path() / "inputs.safetensors",
                 .recipe = golden.recipe,
                 .dialect = dialect,
                 .save_stages = true,
                 .text_only = true} {
    UnpackGolden(golden.Path("inputs.safetensors.xz"), options_.samples);
    options_.max_seq_len = GoldenLength(golden.model);
    if (adjust) adjust(options_);
    result_ = Quantize(options_);
  }

  const std::filesystem::path& Output() const { return options_.output; }
  const QuantizeResult& Result() const { return result_; }
  SafetensorsFile Stages() const { return SafetensorsFile::Open(Output() / "stages.safetensors"); }

  // The run in the reference's dialect on the reference's own grids, made once a program.
  static const GoldenRun& OnRecordedGrids(const GoldenCase& golden) {
    static std::map<std::string, std::unique_ptr<GoldenRun>> runs;
    std::unique_ptr<GoldenRun>& run = runs[golden.Path(golden.recipe)];
    if (run == nullptr) {
      TempDirectory grids;
      const std::filesystem::path file = grids.Path() / "qparams.json";
      UnpackGolden(golden.Path(fmt::format("{}.qparams.json.xz", golden.recipe)), file);
      run = std::make_unique<GoldenRun>(golden, "tico", [&](QuantizeOptions& options) { options.qparams = file; });
    }
    return *run;
  }

 private:
  TempDirectory directory_;
  QuantizeOptions options_;
  QuantizeResult result_;
};

// Largest difference and largest magnitude of two tensors.
struct Difference {
  float largest = 0;
  float magnitude = 0;  // of the expected values
  float Relative() const { return largest / magnitude; }
};

inline Difference Compare(const Tensor& found, const Tensor& expected) {
  EXPECT_EQ(found.GetShape(), expected.GetShape());
  Difference difference;
  if (found.GetShape() != expected.GetShape()) return {INFINITY, 1};
  for (size_t i = 0; i < found.F32().size(); ++i) {
    const float step = std::fabs(found.F32()[i] - expected.F32()[i]);
    difference.largest = step <= difference.largest ? difference.largest : step;  // keeps a NaN
    difference.magnitude = std::max(difference.magnitude, std::fabs(expected.F32()[i]));
  }
  return difference;
}

}  // namespace circlet
