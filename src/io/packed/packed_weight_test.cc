#include "circlet/io/packed/packed_weight.h"

#include <gmock/gmock.h>

#include <bit>
#include <cmath>
#include <cstring>

#include "golden.h"
#include "ops/codes.h"

namespace circlet {
namespace {

std::vector<int64_t> CodesOf(const Tensor& codes, int32_t zero_point) {
  std::vector<int64_t> values;
  for (int64_t i = 0; i < codes.Elements(); ++i) values.push_back(CodeAt(codes, i) - zero_point);
  return values;
}

// Packed by the reference: widths of 1 to 16, so that rows end within bytes, and every byte there is.
TEST(PackedWeightTest, EveryWidthAndEveryByteUnpacksAsTheReferencePacksIt) {
  const SafetensorsFile micro = OpenGolden("qat/micro.safetensors.xz");
  int compared = 0;
  const auto expect = [&](const std::string& packed, const std::string& codes, int bits) {
    const Tensor& expected = micro.Get(codes);
    const Tensor unpacked = UnpackedRows(micro.Get(packed), bits, expected.GetShape()[1]);
    EXPECT_EQ(unpacked.Type(), (TensorType{DType::kU4, expected.GetShape()})) << packed;
    const auto values = expected.As<int8_t>();
    EXPECT_EQ(CodesOf(unpacked, ZeroPointOf(bits)), std::vector<int64_t>(values.begin(), values.end())) << packed;
    compared += static_cast<int>(values.size());
  };
  for (const int bits : {2, 4}) {
    expect("all_bytes.packed", fmt::format("all_bytes.int{}", bits), bits);
    for (const int width : {1, 2, 3, 4, 5, 7, 8, 9, 16})
      expect(fmt::format("pack{}.{}.packed", bits, width), fmt::format("pack{}.{}.codes", bits, width), bits);
  }
  EXPECT_EQ(compared, 1024 + 512 + 2 * 3 * 55);
}

TEST(PackedWeightTest, BytesThatNeedNotChangeAreShared) {
  const Tensor bytes({DType::kU8, {3, 4}});
  EXPECT_EQ(UnpackedRows(bytes, 4, 8).Raw(), bytes.Raw());
  EXPECT_NE(UnpackedRows(bytes, 4, 7).Raw(), bytes.Raw());
  const Tensor int8({DType::kI8, {3, 4}});
  EXPECT_EQ(UnpackedRows(int8, 8, 4).Raw(), int8.Raw());
  EXPECT_EQ(UnpackedRows(int8, 8, 4).GetDType(), DType::kI8);
}

// ---- Q4_0
// -------------------------------------------------------------------------------------------------------------

uint16_t Bf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// A row of one block: bf16(d q).
Tensor BlockOf(float d, const std::vector<int>& q) {
  const Tensor weight({DType::kBF16, {1, 32}});
  for (size_t i = 0; i < 32; ++i) {
    const uint16_t bits = Bf16(d * static_cast<float>(i < q.size() ? q[i] : 0));
    std::memcpy(weight.Raw() + 2 * i, &bits, 2);
  }
  return weight;
}

TEST(RecoverQ40Test, ScalesAreSignedAndTheSmallestStepsCount) {
  const auto found = [](float d, const std::vector<int>& q) {
    const std::optional<BlockWeight> blocks = RecoverQ40(BlockOf(d, q));
    return blocks ? std::pair(blocks->scales.F32()[0], CodesOf(blocks->codes, 8))
                  : std::pair(0.0f, std::vector<int64_t>{});
  };
  const auto padded = [](std::vector<int64_t> q) {
    q.resize(32);
    return q;
  };
  EXPECT_EQ(found(0.25f, {-8, 3, 7}), std::pair(0.25f, padded({-8, 3, 7})));
  EXPECT_EQ(found(-0.25f, {-8, 3, 7}), std::pair(-0.25f, padded({-8, 3, 7})));
  // Multiples of 2 are as many steps of twice the size.
  EXPECT_EQ(found(0.25f, {-6, 4, 2}), std::pair(0.5f, padded({-3, 2, 1})));
  EXPECT_EQ(found(0.25f, {}), std::pair(0.0f, padded({}))) << "a block of zeros";
}

TEST(RecoverQ40Test, WhatDoesNotComeBackExactlyIsNoBlock) {
  EXPECT_FALSE(RecoverQ40(BlockOf(1.0f, {8, -8, 3})));  // -8 .. 7 holds one of them
  EXPECT_FALSE(RecoverQ40(BlockOf(0.1f, {100, 77, 31})));
  EXPECT_FALSE(RecoverQ40(BlockOf(1e9f, {7, 1})));  // d is a float16
  EXPECT_FALSE(RecoverQ40(BlockOf(NAN, {1, 2})));
  EXPECT_FALSE(RecoverQ40(BlockOf(INFINITY, {1, 2})));
  const Tensor one_nan = BlockOf(0.25f, {-8, 3, 7});
  const uint16_t nan = Bf16(NAN);
  std::memcpy(one_nan.Raw() + 40, &nan, 2);
  EXPECT_FALSE(RecoverQ40(one_nan));
  EXPECT_FALSE(RecoverQ40(Tensor({DType::kF32, {1, 32}})));
  EXPECT_FALSE(RecoverQ40(Tensor({DType::kBF16, {2, 33}})));
  Tensor weight({DType::kBF16, {3, 64}});
  EXPECT_TRUE(RecoverQ40(weight));
  const uint16_t one_off = Bf16(1.0f), another = Bf16(1.01f);
  std::memcpy(weight.Raw() + 2 * 150, &one_off, 2);
  std::memcpy(weight.Raw() + 2 * 151, &another, 2);
  EXPECT_FALSE(RecoverQ40(weight)) << "all blocks or none";
}

}  // namespace
}  // namespace circlet
