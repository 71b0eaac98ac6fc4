#include "circlet/model/gemma4/tables.h"

#include <gmock/gmock.h>

#include <cmath>

#include "circlet/base/error.h"
#include "golden.h"

namespace circlet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

const RopeConfig kSliding{.theta = 1e4f};
const RopeConfig kFull{.type = RopeConfig::Type::kProportional, .theta = 1e6f, .partial_rotary_factor = 0.25};

float At(const Tensor& table, int64_t row, int64_t column) { return table.F32()[row * table.GetShape()[-1] + column]; }

void ExpectNear(const Tensor& found, const Tensor& expected, float tolerance) {
  ASSERT_EQ(found.GetShape(), expected.GetShape());
  for (int64_t i = 0; i < found.Elements(); ++i)
    ASSERT_NEAR(found.F32()[i], expected.F32()[i], tolerance) << "element " << i;
}

std::vector<float> Values(const Tensor& tensor) { return {tensor.F32().begin(), tensor.F32().end()}; }

// The samples of model.md 11.3; six decimals are printed there.
TEST(RopeTablesTest, SlidingTableMatchesTheSamples) {
  const std::vector<float> frequencies = RopeFrequencies(kSliding, 256);
  ASSERT_EQ(frequencies.size(), 128u);
  EXPECT_FLOAT_EQ(frequencies[1], 0.930572041f);
  EXPECT_FLOAT_EQ(frequencies[63], 0.0107460783f);
  EXPECT_FLOAT_EQ(frequencies[127], 1.07460783e-4f);
  const RopeTables tables = TextRopeTables(kSliding, 256, 0, 512, false);
  EXPECT_NEAR(At(tables.cos, 7, 1), 0.973479, 1e-6);
  EXPECT_NEAR(At(tables.sin, 7, 1), 0.228775, 1e-6);
  EXPECT_NEAR(At(tables.cos, 100, 63), 0.476077, 1e-6);
  EXPECT_NEAR(At(tables.sin, 100, 63 + 128), 0.879404, 1e-6);
  EXPECT_NEAR(At(tables.cos, 511, 127 + 128), 0.998493, 1e-6);
  EXPECT_NEAR(At(tables.sin, 511, 127), 0.054885, 1e-6);
}

TEST(RopeTablesTest, ProportionalTableMatchesTheSamplesAndLeavesTheRestUnturned) {
  const std::vector<float> frequencies = RopeFrequencies(kFull, 512);
  ASSERT_EQ(frequencies.size(), 256u);
  EXPECT_FLOAT_EQ(frequencies[1], 0.947463526f);
  EXPECT_FLOAT_EQ(frequencies[63], 0.0333762470f);
  for (int j = 64; j < 256; ++j) EXPECT_EQ(frequencies[j], 0.0f) << j;
  const RopeTables tables = TextRopeTables(kFull, 512, 0, 4001, false);
  EXPECT_NEAR(At(tables.cos, 7, 1), 0.939695, 1e-6);
  EXPECT_NEAR(At(tables.sin, 7, 257), 0.342014, 1e-6);
  EXPECT_NEAR(At(tables.cos, 100, 63), -0.980847, 1e-6);
  EXPECT_NEAR(At(tables.sin, 100, 63), -0.194779, 1e-6);
  EXPECT_NEAR(At(tables.cos, 4000, 63), 0.012700, 3e-5);
  EXPECT_NEAR(At(tables.sin, 4000, 63), 0.999919, 3e-5);
  EXPECT_EQ(At(tables.cos, 4000, 64), 1.0f);
  EXPECT_EQ(At(tables.sin, 4000, 64), 0.0f);
}

TEST(RopeTablesTest, PartialFactorIsReadInDoubleLikeTheReference) {
  // int(0.7 * 20 / 2) is 7; the nearest float32 of 0.7 would give 6.
  RopeConfig rope = kFull;
  rope.partial_rotary_factor = 0.7;
  EXPECT_GT(RopeFrequencies(rope, 20)[6], 0.0f);
  EXPECT_EQ(RopeFrequencies(rope, 20)[7], 0.0f);
}

TEST(RopeTablesTest, FactorDividesProportionalFrequencies) {
  RopeConfig rope = kFull;
  rope.factor = 8.0f;
  EXPECT_FLOAT_EQ(RopeFrequencies(rope, 512)[1], 0.947463526f / 8);
}

TEST(RopeTablesTest, VisionTableMatchesTheSamples) {
  std::vector<int64_t> positions = {7, 44, -1, -1};
  const RopeTables tables = VisionRopeTables(100.0f, 64, positions);
  EXPECT_EQ(tables.cos.GetShape(), Shape({1, 2, 64}));
  // x turns elements 0..31, y elements 32..63.
  EXPECT_NEAR(At(tables.cos, 0, 1), 0.511449, 1e-6);
  EXPECT_NEAR(At(tables.sin, 0, 16 + 1), -0.859313, 1e-6);
  EXPECT_NEAR(At(tables.cos, 0, 32 + 15), 0.832745, 1e-6);
  EXPECT_NEAR(At(tables.sin, 0, 48 + 15), 0.553657, 1e-6);
  EXPECT_EQ(At(tables.cos, 1, 20), 1.0f) << "padding takes position 0";
  EXPECT_EQ(At(tables.sin, 1, 60), 0.0f);
}

// model.md 11.1: patch 9 of a grid 6 wide.
TEST(RopeTablesTest, VisionTableOfConfigAMatchesTheReference) {
  const std::vector<int64_t> positions = {3, 1};
  const RopeTables tables = VisionRopeTables(100.0f, 8, positions);
  const float cos[] = {-0.989992f, 0.955337f, -0.989992f, 0.955337f, 0.540302f, 0.995004f, 0.540302f, 0.995004f};
  const float sin[] = {0.141120f, 0.295520f, 0.141120f, 0.295520f, 0.841471f, 0.099833f, 0.841471f, 0.099833f};
  for (int i = 0; i < 8; ++i) {
    EXPECT_NEAR(At(tables.cos, 0, i), cos[i], 1e-6);
    EXPECT_NEAR(At(tables.sin, 0, i), sin[i], 1e-6);
  }
}

TEST(RopeTablesTest, StartMovesTheRows) {
  const RopeTables all = TextRopeTables(kSliding, 16, 0, 24, true);
  const RopeTables last = TextRopeTables(kSliding, 16, 23, 1, true);
  for (int i = 0; i < 16; ++i) {
    EXPECT_EQ(At(last.cos, 0, i), At(all.cos, 23, i));
    EXPECT_EQ(At(last.sin, 0, i), At(all.sin, 23, i));
  }
}

TEST(RopeTablesTest, NegatedSineChangesTheFirstHalfOnly) {
  const RopeTables plain = TextRopeTables(kFull, 32, 0, 5, false);
  const RopeTables negated = TextRopeTables(kFull, 32, 0, 5, true);
  for (int64_t i = 0; i < plain.sin.Elements(); ++i) {
    EXPECT_EQ(negated.cos.F32()[i], plain.cos.F32()[i]);
    EXPECT_EQ(negated.sin.F32()[i], i % 32 < 16 ? -plain.sin.F32()[i] : plain.sin.F32()[i]);
  }
}

// Both recorded models, all layer types; the reference's own float32 powers differ in the last bit.
TEST(RopeTablesTest, RecordedTablesAreReproduced) {
  for (const char* model : {"tiny_e2b", "tiny_wide"}) {
    const Gemma4Config config = ReadConfig(TestData(fmt::format("golden/{}/model", model)));
    const SafetensorsFile golden = OpenGolden(fmt::format("golden/{}/float.safetensors.xz", model));
    for (const LayerConfig& layer : config.text.layers) {
      const std::string type = layer.full ? "full_attention" : "sliding_attention";
      const Tensor& cos = golden.Get("eval.1.rope_cos." + type);
      const RopeTables tables = TextRopeTables(layer.rope, layer.head_dim, 0, cos.GetShape()[1], false);
      ExpectNear(tables.cos, cos, 3e-6f);
      ExpectNear(tables.sin, golden.Get("eval.1.rope_sin." + type), 3e-6f);
    }
    const SafetensorsFile inputs = OpenGolden(fmt::format("golden/{}/inputs.safetensors.xz", model));
    const std::span<const int64_t> positions = inputs.Get("eval.1.image_position_ids").I64();
    const RopeTables vision = VisionRopeTables(config.vision->rope_theta, config.vision->head_dim, positions);
    const Tensor& cos = golden.Get("eval.1.vision.rope_cos");
    const Tensor& sin = golden.Get("eval.1.vision.rope_sin");
    for (int64_t i = 0; i < cos.Elements(); ++i) {
      // The model turns padding patches by position -1; their rows reach nothing.
      if (positions[2 * (i / config.vision->head_dim)] < 0) continue;
      ASSERT_NEAR(vision.cos.F32()[i], cos.F32()[i], 3e-6f) << i;
      ASSERT_NEAR(vision.sin.F32()[i], sin.F32()[i], 3e-6f) << i;
    }
  }
}

TEST(MaskTest, RecordedMasksOfTheQuantizedModelAreReproduced) {
  for (const char* model : {"tiny_e2b", "tiny_wide"}) {
    const Gemma4Config config = ReadConfig(TestData(fmt::format("golden/{}/model", model)));
    const SafetensorsFile golden = OpenGolden(fmt::format("golden/{}/quant.safetensors.xz", model));
    const SafetensorsFile inputs = OpenGolden(fmt::format("golden/{}/inputs.safetensors.xz", model));
    const std::span<const int64_t> keep = inputs.Get("eval.2.attention_mask").I64();
    const int64_t length = static_cast<int64_t>(keep.size());
    const int64_t valid = std::count(keep.begin(), keep.end(), 1);
    for (const LayerConfig& layer : config.text.layers) {
      const std::string type = layer.full ? "full_attention" : "sliding_attention";
      // -120 lies on the grid but for the last bits of its scale.
      ExpectNear(PrefillMask(length, length, layer.window), golden.Get("default.eval.1.attn_mask." + type), 1e-4f);
      ExpectNear(PrefillMask(length, valid, layer.window), golden.Get("default.eval.2.attn_mask." + type), 1e-4f);
      ExpectNear(PrefillMask(keep, layer.window), golden.Get("default.eval.2.attn_mask." + type), 1e-4f);
    }
    ExpectNear(VisionMask(inputs.Get("eval.1.image_position_ids").I64()), golden.Get("default.eval.1.vision.attn_mask"),
               1e-4f);
  }
}

TEST(MaskTest, WindowCountsTheQueryItself) {
  const Tensor mask = PrefillMask(4, 4, 2, -1.0f);
  EXPECT_EQ(mask.GetShape(), Shape({1, 1, 4, 4}));
  EXPECT_THAT(Values(mask), ElementsAre(0, -1, -1, -1,  //
                                        0, 0, -1, -1,   //
                                        -1, 0, 0, -1,   //
                                        -1, -1, 0, 0));
}

TEST(MaskTest, PaddingKeysAreHiddenFromEveryQuery) {
  EXPECT_THAT(Values(PrefillMask(3, 2, 0, -1.0f)), ElementsAre(0, -1, -1, 0, 0, -1, 0, 0, -1));
  const std::vector<int64_t> left_padded = {0, 1, 1};
  EXPECT_THAT(Values(PrefillMask(left_padded, 0, -1.0f)), ElementsAre(-1, -1, -1, -1, 0, -1, -1, 0, 0));
}

TEST(MaskTest, SoftTokensThatStandSideBySideSeeEachOtherWithinTheWindow) {
  const std::vector<int64_t> places = {1, 2, 4, 5};
  EXPECT_THAT(Values(PrefillMask(6, 6, 2, -1.0f, places)), ElementsAre(0, -1, -1, -1, -1, -1,  //
                                                                       0, 0, 0, -1, -1, -1,    //
                                                                       -1, 0, 0, -1, -1, -1,   //
                                                                       -1, -1, 0, 0, -1, -1,   //
                                                                       -1, -1, -1, 0, 0, 0,    //
                                                                       -1, -1, -1, -1, 0, 0));
  const std::vector<int64_t> keep = {1, 1, 0}, both = {0, 1, 2};
  EXPECT_THAT(Values(PrefillMask(keep, 0, -1.0f, both)), ElementsAre(0, 0, -1, 0, 0, -1, 0, 0, -1));
}

// The new token stands in the last slot, whatever the past (quantization.md 9).
TEST(MaskTest, DecodeSeesThePastAndTheLastSlot) {
  EXPECT_THAT(Values(DecodeMask(6, 2, 0, -1.0f)), ElementsAre(0, 0, -1, -1, -1, 0));
  EXPECT_THAT(Values(DecodeMask(6, 0, 0, -1.0f)), ElementsAre(-1, -1, -1, -1, -1, 0));
  EXPECT_THAT(Values(DecodeMask(6, 4, 3, -1.0f)), ElementsAre(-1, -1, 0, 0, -1, 0));
  EXPECT_THAT(Values(DecodeMask(6, 1, 3, -1.0f)), ElementsAre(0, -1, -1, -1, -1, 0));
  EXPECT_EQ(DecodeMask(6, 1, 3).GetShape(), Shape({1, 1, 6}));
  EXPECT_EQ(DecodeMask(6, 1, 3).F32()[2], -120.0f);
}

// The recorded decode unit is the last position of the prefill sample: its mask is the prefill mask's last row.
TEST(MaskTest, DecodeOfTheLastPositionEqualsThePrefillRow) {
  for (const int window : {0, 8}) {
    const std::vector<float> prefill = Values(PrefillMask(24, 24, window));
    EXPECT_EQ(Values(DecodeMask(24, 23, window)), std::vector<float>(prefill.end() - 24, prefill.end()));
  }
}

TEST(MaskTest, FullCacheIsAnErrorThatNamesBothCounts) {
  try {
    DecodeMask(8, 8, 0);
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("8 past tokens do not fit into 8 slots"));
    EXPECT_THAT(error.what(), HasSubstr("larger max_seq"));
  }
}

}  // namespace
}  // namespace circlet
