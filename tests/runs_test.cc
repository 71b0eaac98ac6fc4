// What runs count, and what they refuse to take.

#include <gmock/gmock.h>

#include "circlet/io/file.h"
#include "error_text.h"
#include "golden_run.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// ---- Padding --------------------------------------------------------------------------------------------------------

// Ten tokens among padding. Its positions compute something too, which nobody reads.
QuantizeResult RunMasked(const std::vector<int64_t>& mask) {
  const TempDirectory directory;
  const fs::path samples = directory.Path() / "samples.safetensors";
  std::vector<int64_t> ids;
  int64_t next = 30;
  for (const int64_t kept : mask) ids.push_back(kept != 0 ? next++ : 0);
  const auto length = static_cast<int64_t>(ids.size());
  WriteSafetensors(samples, {{"calib.0.input_ids", Tensor::Of<int64_t>({1, length}, ids)},
                             {"calib.0.attention_mask", Tensor::Of<int64_t>({1, length}, mask)}});
  return Quantize({.model = TestData("golden/seed_example/model"), .samples = samples, .recipe = "w8a16"});
}

TEST(Padding, OnlyKeptPositionsCountInErrorsWhereverTheyStand) {
  const QuantizeResult whole = RunMasked({1, 1, 1, 1, 1, 1, 1, 1, 1, 1});
  ASSERT_EQ(whole.output.count, 10 * 256);
  for (const std::vector<int64_t>& mask : std::vector<std::vector<int64_t>>{
           {1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0},
           {0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1},
           {0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 0},
       }) {
    const QuantizeResult padded = RunMasked(mask);
    EXPECT_EQ(padded.output.count, whole.output.count) << "logits";
    ASSERT_EQ(padded.stages.size(), whole.stages.size());
    for (size_t i = 0; i < padded.stages.size(); ++i) {
      EXPECT_EQ(padded.stages[i].accumulated.count, whole.stages[i].accumulated.count) << padded.stages[i].stage;
      EXPECT_EQ(padded.stages[i].alone.count, whole.stages[i].alone.count) << padded.stages[i].stage;
    }
    EXPECT_LE(padded.scatter.size(), 4096u);
  }
}

}  // namespace
}  // namespace circlet
