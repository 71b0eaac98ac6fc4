// Packed checkpoints (docs/packed.md) through the whole program, against what the reference computed of them.

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>

#include "circlet/pipeline/quantize.h"
#include "error_text.h"
#include "packed_checkpoint.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

// The recorded text as the one sample.
std::filesystem::path Sample(const TempDirectory& directory) {
  const SafetensorsFile inputs = SafetensorsFile::Open(TestData("qat/inputs.safetensors"));
  const Tensor& ids = inputs.Get("text.input_ids");
  const std::filesystem::path path = directory.Path() / "in.safetensors";
  WriteSafetensors(path, {{"calib.0.input_ids", ids}, {"eval.0.input_ids", ids}});
  return path;
}

struct Difference {
  double mean = 0, largest = 0, largest_value = 0;
};

// Of logits [1,S,V] from the recorded ones, which are those of every fourth position.
Difference FromGolden(const Tensor& logits, const Tensor& golden) {
  constexpr int64_t kEvery = 4;
  const int64_t vocab = golden.GetShape()[1];
  Difference difference;
  for (int64_t row = 0; row < golden.GetShape()[0]; ++row)
    for (int64_t i = 0; i < vocab; ++i) {
      const double expected = golden.F32()[row * vocab + i];
      const double found = logits.F32()[(kEvery * row + kEvery - 1) * vocab + i];
      difference.mean += std::abs(found - expected) / static_cast<double>(golden.Elements());
      difference.largest = std::max(difference.largest, std::abs(found - expected));
      difference.largest_value = std::max(difference.largest_value, std::abs(expected));
    }
  return difference;
}

// Sums of up to 512 products in another order.
TEST(PackedFloatTest, LogitsOfGroupsAndOfQ40AreTheReferences) {
  for (const char* name : {"w4a16-ct", "q4_0-unquantized"}) {
    SCOPED_TRACE(name);
    const PackedCheckpoint checkpoint(name);
    const TempDirectory directory;
    Quantize({.model = checkpoint.Path(),
              .output = directory.Path() / "out",
              .samples = Sample(directory),
              .save_stages = true,
              .units = QuantizeOptions::Units::kDeployment,
              .text_only = true});
    const SafetensorsFile stages = SafetensorsFile::Open(directory.Path() / "out/stages.safetensors");
    const Difference difference =
        FromGolden(stages.Get("float.eval.0.logits"), checkpoint.Goldens().Get("text.logits"));
    EXPECT_GT(difference.largest_value, 10);
    EXPECT_LT(difference.largest, 3e-5 * difference.largest_value);
  }
}

}  // namespace
}  // namespace circlet
