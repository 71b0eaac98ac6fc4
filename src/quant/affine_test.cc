#include "circlet/quant/affine.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <random>

#include "circlet/base/threads.h"
#include "error_text.h"
#include "ops/codes.h"

namespace circlet {
namespace {

using testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

TEST(ComputeQParamsTest, SymmetricGridsReachTheLargerMagnitude) {
  const QParams qparams = ComputeQParams(-2.0f, 1.0f, DType::kI16, true);
  EXPECT_EQ(qparams.scale[0], 2.0f / 32767.0f);
  EXPECT_EQ(qparams.zero_point[0], 0);
}

TEST(ComputeQParamsTest, AsymmetricGridsHoldZero) {
  EXPECT_EQ(ComputeQParams(-1.0f, 3.0f, DType::kU8, false), (QParams{DType::kU8, -1, {4.0f / 255.0f}, {64}}));
  EXPECT_EQ(ComputeQParams(1.0f, 3.0f, DType::kU8, false), (QParams{DType::kU8, -1, {3.0f / 255.0f}, {0}}));
  EXPECT_EQ(ComputeQParams(-3.0f, -1.0f, DType::kU8, false), (QParams{DType::kU8, -1, {3.0f / 255.0f}, {255}}));
  EXPECT_EQ(ComputeQParams(-3.0f, -1.0f, DType::kI8, false).zero_point[0], 127);
}

TEST(ComputeQParamsTest, ConstantTensorsAreRepresentedExactly) {
  EXPECT_EQ(ComputeQParams(0.0f, 0.0f, DType::kU8, false), (QParams{DType::kU8, -1, {1.0f}, {0}}));
  for (const float value : {2.5f, -2.5f}) {
    const QParams qparams = ComputeQParams(value, value, DType::kU8, false);
    EXPECT_EQ(qparams.scale[0], 2.5f);
    EXPECT_EQ(qparams.zero_point[0], value > 0 ? 0 : 255);
    EXPECT_EQ(FakeQuantize(value, qparams.scale[0], qparams.zero_point[0], DType::kU8, Rounding::kHalfEvenReciprocal),
              value);
  }
}

TEST(ComputeQParamsTest, ConstantChannelsAreNoSpecialCase) {
  const std::vector<float> min{0, 2}, max{0, 2};
  EXPECT_EQ(ComputeQParams(min, max, DType::kU8, false, 0), (QParams{DType::kU8, 0, {1e-8f, 2.0f / 255.0f}, {0, 0}}));
}

TEST(ComputeQParamsTest, TheScaleHasAFloor) {
  EXPECT_EQ(ComputeQParams(-1e-7f, 1e-7f, DType::kI16, true).scale[0], 1e-8f);
  EXPECT_EQ(ComputeQParams(-1e-7f, 1e-7f, DType::kU8, false).scale[0], 1e-8f);
}

TEST(ComputeQParamsTest, NeverObservedRangesGiveWhatTheReferenceGives) {
  EXPECT_EQ(ComputeQParams(kInfinity, -kInfinity, DType::kI16, true).scale[0], kInfinity);
  EXPECT_EQ(ComputeQParams(kInfinity, -kInfinity, DType::kU8, false), (QParams{DType::kU8, -1, {1e-8f}, {0}}));
}

TEST(FakeQuantizeTest, TheTwoRoundingsDifferAtTies) {
  EXPECT_EQ(FakeQuantize(0.5f, 1, 3, DType::kU8, Rounding::kHalfEvenReciprocal), 0.0f);
  EXPECT_EQ(FakeQuantize(0.5f, 1, 3, DType::kU8, Rounding::kHalfAwayDivide), 1.0f);
  EXPECT_EQ(FakeQuantize(-2.5f, 1, 3, DType::kU8, Rounding::kHalfEvenReciprocal), -2.0f);
  EXPECT_EQ(FakeQuantize(-2.5f, 1, 3, DType::kU8, Rounding::kHalfAwayDivide), -3.0f);
  EXPECT_EQ(FakeQuantize(-9.0f, 1, 3, DType::kU8, Rounding::kHalfAwayDivide), -3.0f);
  EXPECT_EQ(FakeQuantize(1e30f, 1, 3, DType::kU8, Rounding::kHalfAwayDivide), 252.0f);
}

Tensor RandomMatrix(int64_t rows, int64_t width) {
  std::mt19937 generator(7);
  std::normal_distribution<float> normal;
  Tensor tensor({DType::kF32, {rows, width}});
  for (float& value : tensor.F32()) value = normal(generator);
  return tensor;
}

Tensor AsBF16(const Tensor& tensor) {
  Tensor narrow({DType::kBF16, tensor.GetShape()});
  for (int64_t i = 0; i < tensor.Elements(); ++i)
    narrow.As<uint16_t>()[i] = static_cast<uint16_t>(std::bit_cast<uint32_t>(tensor.F32()[i]) >> 16);
  return narrow;
}

QParams GridOf(const Tensor& weight, DType dtype, bool symmetric, int axis) {
  const WeightRange range = RangeOfWeight(weight, axis);
  return axis < 0 ? ComputeQParams(range.min[0], range.max[0], dtype, symmetric)
                  : ComputeQParams(range.min, range.max, dtype, symmetric, axis);
}

struct WeightCase {
  DType dtype;
  bool symmetric;
  int axis;
};

class QuantizeWeightTest : public testing::TestWithParam<WeightCase> {};

INSTANTIATE_TEST_SUITE_P(Types, QuantizeWeightTest,
                         testing::Values(WeightCase{DType::kU4, false, 0}, WeightCase{DType::kI4, true, 0},
                                         WeightCase{DType::kU8, false, 0}, WeightCase{DType::kI8, true, 0},
                                         WeightCase{DType::kI8, false, -1}, WeightCase{DType::kI16, true, -1},
                                         WeightCase{DType::kI16, false, 0}, WeightCase{DType::kU4, false, -1}));

// Odd widths make rows of 4-bit codes begin inside a byte; many rows make pieces that threads share.
TEST_P(QuantizeWeightTest, CodesDequantizeToTheSnapOfEachValue) {
  const auto& [dtype, symmetric, axis] = GetParam();
  for (const int64_t width : {1, 7, 64, 1025}) {
    const Tensor stored = AsBF16(RandomMatrix(301, width));
    const Tensor weight = ToF32(stored);
    for (const Rounding rounding : {Rounding::kHalfEvenReciprocal, Rounding::kHalfAwayDivide}) {
      const QParams qparams = GridOf(stored, dtype, symmetric, axis);
      const QuantizedWeight quantized = QuantizeWeight(stored, qparams, rounding);
      EXPECT_EQ(quantized.codes.Type(), (TensorType{dtype, weight.GetShape()}));
      const Tensor back({DType::kF32, weight.GetShape()});
      Dequantize(quantized.codes, qparams, 0, back.F32());
      const Tensor snapped = FakeQuantizeWeight(stored, qparams, rounding);
      for (int64_t i = 0; i < weight.Elements(); ++i) {
        const size_t grid = axis < 0 ? 0 : i / width;
        const float expected =
            FakeQuantize(weight.F32()[i], qparams.scale[grid], qparams.zero_point[grid], dtype, rounding);
        ASSERT_EQ(back.F32()[i], expected) << i << " of width " << width;
        ASSERT_EQ(snapped.F32()[i], expected) << i << " of width " << width;
      }
    }
  }
}

// Cut anywhere, inside rows too; the whole has an odd number of codes.
TEST_P(QuantizeWeightTest, PiecesOfTheBytesMakeUpTheWhole) {
  const auto& [dtype, symmetric, axis] = GetParam();
  for (const int64_t width : {1, 7, 1025}) {
    const Tensor stored = AsBF16(RandomMatrix(301, width));
    const QParams qparams = GridOf(stored, dtype, symmetric, axis);
    const Tensor whole = QuantizeWeight(stored, qparams, Rounding::kHalfAwayDivide).codes;
    const std::span<const std::byte> expected(whole.Raw(), static_cast<size_t>(whole.Bytes()));
    for (const size_t piece : {size_t{2}, size_t{126}, size_t{70000}}) {
      if (expected.size() / piece > 2000) continue;
      std::vector<std::byte> found(expected.size());
      for (size_t first = 0; first < found.size(); first += piece)
        QuantizeWeightBytes(stored, qparams, Rounding::kHalfAwayDivide, static_cast<int64_t>(first),
                            std::span(found).subspan(first, std::min(piece, found.size() - first)));
      EXPECT_TRUE(std::ranges::equal(found, expected)) << "width " << width << " in pieces of " << piece;
    }
  }
}

TEST(QuantizeWeightTest, FourBitCodesLieEvenElementFirst) {
  const std::vector<float> values{-8, 7, 1, -1, 3};
  const Tensor weight = Tensor::Of<float>({5}, values);
  const QuantizedWeight quantized = QuantizeWeight(weight, {DType::kI4, -1, {1.0f}, {0}}, Rounding::kHalfAwayDivide);
  const auto* bytes = reinterpret_cast<const uint8_t*>(quantized.codes.Raw());
  EXPECT_EQ(std::vector<int>(bytes, bytes + 3), (std::vector<int>{0x78, 0xf1, 0x03}));
}

TEST(QuantizeWeightTest, RankOneWithAnAxisHasAGridForEachElement) {
  const std::vector<float> values{1, 2, -4};
  const Tensor weight = Tensor::Of<float>({3}, values);
  const QParams qparams = GridOf(weight, DType::kI8, true, 0);
  EXPECT_EQ(qparams.scale, (std::vector<float>{1 / 127.0f, 2 / 127.0f, 4 / 127.0f}));
  const QuantizedWeight quantized = QuantizeWeight(weight, qparams, Rounding::kHalfAwayDivide);
  EXPECT_EQ(quantized.codes.As<int8_t>()[2], -127);
}

TEST(QuantizeWeightTest, EveryThreadCountGivesTheSameBytes) {
  const Tensor weight = RandomMatrix(777, 129);
  const QParams qparams = GridOf(weight, DType::kU4, false, 0);
  const int threads = Threads();
  SetThreads(1);
  const QuantizedWeight one = QuantizeWeight(weight, qparams, Rounding::kHalfAwayDivide);
  SetThreads(3);
  const QuantizedWeight three = QuantizeWeight(weight, qparams, Rounding::kHalfAwayDivide);
  SetThreads(threads);
  EXPECT_EQ(std::memcmp(one.codes.Raw(), three.codes.Raw(), one.codes.Bytes()), 0);
}

TEST(QuantizeWeightTest, UnsignedSixteenBitsAreNoStorageType) {
  const Tensor weight = RandomMatrix(2, 2);
  EXPECT_THAT(ErrorText([&] {
                QuantizeWeight(weight, {DType::kU16, -1, {1.0f}, {0}}, Rounding::kHalfAwayDivide);
              }),
              HasSubstr("weights cannot be stored as uint16; choose int4, uint4, int8, uint8 or int16"));
}

TEST(RangeOfWeightTest, TheFirstNonFiniteValueIsNamed) {
  Tensor weight = RandomMatrix(400, 300);
  weight.F32()[200 * 300 + 17] = std::nanf("");
  weight.F32()[390 * 300 + 2] = -kInfinity;
  EXPECT_THAT(ErrorText([&] { RangeOfWeight(weight, 0); }),
              HasSubstr("row 200, column 17 of the weight is nan; a grid needs finite weights"));
  weight.F32()[200 * 300 + 17] = 0;
  EXPECT_THAT(ErrorText([&] { RangeOfWeight(AsBF16(weight), -1); }),
              HasSubstr("row 390, column 2 of the weight is -inf"));
}

}  // namespace
}  // namespace circlet
