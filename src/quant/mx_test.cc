#include "circlet/quant/mx.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <random>

#include "error_text.h"

namespace circlet {
namespace {

using testing::HasSubstr;

// Every magnitude of a format with `exponent_bits` and `fraction_bits` stored bits, written out as the OCP tables do:
// subnormals, then each binade. Integers: multiples of one step.
std::vector<float> Magnitudes(int exponent_bits, int fraction_bits, float largest) {
  std::vector<float> values;
  const int steps = 1 << fraction_bits;
  if (exponent_bits == 0) {
    for (int k = 0; k < 2 * steps; ++k) values.push_back(static_cast<float>(k) / static_cast<float>(steps));
  } else {
    const int bias = (1 << (exponent_bits - 1)) - 1;
    for (int k = 0; k < steps; ++k)
      values.push_back(std::ldexp(static_cast<float>(k) / static_cast<float>(steps), 1 - bias));
    for (int e = 1; e < (1 << exponent_bits); ++e)
      for (int k = 0; k < steps; ++k)
        values.push_back(std::ldexp(1.0f + static_cast<float>(k) / static_cast<float>(steps), e - bias));
  }
  std::erase_if(values, [&](float value) { return value > largest; });
  return values;
}

struct FormatCase {
  MxFormat format;
  int exponent_bits, fraction_bits;
  float largest;
};

class MxFormatTest : public testing::TestWithParam<FormatCase> {};

INSTANTIATE_TEST_SUITE_P(
    Formats, MxFormatTest,
    testing::Values(FormatCase{MxFormat::kInt8, 0, 6, 127.0f / 64}, FormatCase{MxFormat::kInt4, 0, 2, 1.75f},
                    FormatCase{MxFormat::kInt2, 0, 0, 1.0f}, FormatCase{MxFormat::kFp8E5M2, 5, 2, 57344.0f},
                    FormatCase{MxFormat::kFp8E4M3, 4, 3, 448.0f}, FormatCase{MxFormat::kFp6E3M2, 3, 2, 28.0f},
                    FormatCase{MxFormat::kFp6E2M3, 2, 3, 7.5f}, FormatCase{MxFormat::kFp4, 2, 1, 6.0f},
                    FormatCase{MxFormat::kFp16, 5, 10, 65504.0f}),
    [](const auto& info) { return std::string(Name(info.param.format)); });

float Naive(float x, const std::vector<float>& magnitudes, MxRounding rounding) {
  const float magnitude = std::abs(x);
  const auto above = std::ranges::lower_bound(magnitudes, magnitude);
  if (above == magnitudes.end()) return std::copysign(magnitudes.back(), x);
  if (*above == magnitude) return x;
  const float high = *above;
  const float low = *(above - 1);
  const bool low_is_even = (above - 1 - magnitudes.begin()) % 2 == 0;
  const float up = high - magnitude;
  const float down = magnitude - low;
  bool take_low = down < up;
  if (down == up) take_low = rounding == MxRounding::kEven && low_is_even;
  if (rounding == MxRounding::kFloor) take_low = true;
  return std::copysign(take_low ? low : high, x);
}

// The block's first value is the largest of the format, so that the shared exponent is 0 and the format itself shows.
TEST_P(MxFormatTest, ValuesGoToTheNeighboursThatTheRoundingSays) {
  const FormatCase& format = GetParam();
  const std::vector<float> magnitudes = Magnitudes(format.exponent_bits, format.fraction_bits, format.largest);
  std::vector<float> probes = magnitudes;
  for (size_t i = 1; i < magnitudes.size(); ++i) {
    const float middle = (magnitudes[i - 1] + magnitudes[i]) / 2;
    probes.insert(probes.end(), {middle, std::nextafter(middle, 0.0f), std::nextafter(middle, 1e9f)});
  }
  for (const MxRounding rounding : {MxRounding::kNearest, MxRounding::kFloor, MxRounding::kEven}) {
    for (const float probe : probes) {
      for (const float x : {probe, -probe}) {
        Tensor block = Tensor::Of<float>({3}, std::vector<float>{format.largest, x, 0});
        MxFakeQuantize(block, {.format = format.format, .rounding = rounding});
        ASSERT_EQ(block.F32()[0], format.largest);
        ASSERT_EQ(block.F32()[1], Naive(x, magnitudes, rounding)) << x << " " << Name(rounding);
        ASSERT_EQ(block.F32()[2], 0.0f);
      }
    }
  }
}

TEST_P(MxFormatTest, ScalingABlockByAPowerOfTwoScalesTheResult) {
  std::mt19937 generator(3);
  std::normal_distribution<float> normal;
  Tensor values({DType::kF32, {5, 32}});
  for (float& value : values.F32()) value = normal(generator);
  Tensor scaled = values.Clone();
  for (float& value : scaled.F32()) value *= 1024;
  MxFakeQuantize(values, {.format = GetParam().format});
  MxFakeQuantize(scaled, {.format = GetParam().format});
  for (int64_t i = 0; i < values.Elements(); ++i) EXPECT_EQ(scaled.F32()[i], values.F32()[i] * 1024);
}

TEST(MxTest, ValuesBeyondTheLargestSaturate) {
  for (const auto& [format, value, largest] :
       {std::tuple(MxFormat::kFp8E4M3, 500.0f, 448.0f), std::tuple(MxFormat::kInt8, 1.999f, 127.0f / 64),
        std::tuple(MxFormat::kFp4, -7.9f, -6.0f)}) {
    Tensor values = Tensor::Of<float>({1}, std::vector<float>{value});
    MxFakeQuantize(values, {.format = format});
    EXPECT_EQ(values.F32()[0], largest);
  }
}

TEST(MxTest, BlocksOf32ShareAnExponentAndTheLastMayBeShort) {
  Tensor values({DType::kF32, {1, 40}});
  for (float& value : values.F32()) value = 0.01f;
  values.F32()[0] = 64;  // int4 steps of 16 in its block
  MxFakeQuantize(values, {.format = MxFormat::kInt4});
  EXPECT_EQ(values.F32()[0], 64.0f);
  EXPECT_EQ(values.F32()[31], 0.0f);
  EXPECT_EQ(values.F32()[32], std::ldexp(5.0f, -9));  // 0.01 in steps of 2^-9
  EXPECT_EQ(values.F32()[39], std::ldexp(5.0f, -9));
}

TEST(MxTest, BlocksLieAlongTheAxis) {
  std::mt19937 generator(5);
  std::normal_distribution<float> normal;
  Tensor rows({DType::kF32, {3, 70, 4}});
  Tensor columns({DType::kF32, {3, 4, 70}});
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t i = 0; i < 70; ++i)
      for (int64_t j = 0; j < 4; ++j)
        rows.F32()[(b * 70 + i) * 4 + j] = columns.F32()[(b * 4 + j) * 70 + i] = normal(generator);
  MxFakeQuantize(rows, {.format = MxFormat::kFp4, .axis = 1});
  MxFakeQuantize(columns, {.format = MxFormat::kFp4, .axis = -1});
  for (int64_t b = 0; b < 3; ++b)
    for (int64_t i = 0; i < 70; ++i)
      for (int64_t j = 0; j < 4; ++j) ASSERT_EQ(rows.F32()[(b * 70 + i) * 4 + j], columns.F32()[(b * 4 + j) * 70 + i]);
}

TEST(MxTest, WithoutASharedExponentSmallValuesKeepTheirDigits) {
  Tensor values = Tensor::Of<float>({2}, std::vector<float>{1024, 0.011f});
  MxFakeQuantize(values, {.format = MxFormat::kInt8, .shared_max = false});
  EXPECT_EQ(values.F32()[0], 1024.0f);
  EXPECT_NEAR(values.F32()[1], 0.011f, 0.011f / 128);
  EXPECT_NE(values.F32()[1], 0.0f);
}

TEST(MxTest, ZeroBlocksStayZeroAndTinyOnesStopAtTheSmallestExponent) {
  Tensor values = Tensor::Of<float>({2}, std::vector<float>{0, 0});
  MxFakeQuantize(values, {});
  EXPECT_EQ(values.F32()[0], 0.0f);
  const float denormal = std::numeric_limits<float>::denorm_min();
  Tensor tiny = Tensor::Of<float>({1}, std::vector<float>{denormal});
  MxFakeQuantize(tiny, {.format = MxFormat::kInt8});
  EXPECT_EQ(tiny.F32()[0], 0.0f);  // below half a step of 2^-127 / 64
}

TEST(MxTest, TheLargestExponentIsStillOne) {
  const float large = std::ldexp(1.5f, 127);
  Tensor values = Tensor::Of<float>({2}, std::vector<float>{large, -large});
  MxFakeQuantize(values, {.format = MxFormat::kInt8});
  EXPECT_EQ(values.F32()[0], large);
  EXPECT_EQ(values.F32()[1], -large);
}

TEST(MxTest, ABlockWithANaNOrAnInfinityIsAllNaN) {
  for (const float bad : {std::nanf(""), std::numeric_limits<float>::infinity()}) {
    Tensor values({DType::kF32, {64}});
    for (float& value : values.F32()) value = 1;
    values.F32()[3] = bad;
    MxFakeQuantize(values, {});
    EXPECT_TRUE(std::isnan(values.F32()[31]));
    EXPECT_EQ(values.F32()[32], 1.0f);
  }
}

TEST(MxTest, UnknownNamesAndAxesAreErrors) {
  EXPECT_THAT(ErrorText([] { MxFormatFromName("fp5"); }),
              HasSubstr("unknown MX element format \"fp5\"; known are int8, int4, int2, fp8_e5m2, fp8_e4m3"));
  EXPECT_THAT(ErrorText([] { MxRoundingFromName("dither"); }),
              HasSubstr("unknown MX rounding \"dither\"; known are nearest, floor, even"));
  Tensor values({DType::kF32, {2, 2}});
  EXPECT_THAT(ErrorText([&] { MxFakeQuantize(values, {.axis = 2}); }),
              HasSubstr("axis 2, but the tensor has shape [2,2]"));
}

}  // namespace
}  // namespace circlet
