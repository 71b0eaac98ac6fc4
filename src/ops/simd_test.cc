#include "ops/simd.h"

#include <gmock/gmock.h>

#include <bit>
#include <cmath>
#include <limits>

#include "ops/test_values.h"

namespace circlet::simd {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
// Every remainder of a vector, and a few vectors.
const std::vector<int64_t> kCounts{0, 1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 100, 257};

// Distance in representable values.
int64_t Ulps(float a, float b) {
  const auto order = [](float x) {
    const int32_t bits = std::bit_cast<int32_t>(x);
    return static_cast<int64_t>(bits < 0 ? std::numeric_limits<int32_t>::min() - bits : bits);
  };
  return std::abs(order(a) - order(b));
}

TEST(SimdTest, InstructionSetIsNamed) { EXPECT_STRNE(InstructionSet(), "?"); }

TEST(SimdTest, MinMaxSkipsWhatIsNotFinite) {
  OnEveryTarget([] {
    for (const int64_t count : kCounts) {
      std::vector<float> x = Normal(static_cast<size_t>(count), 1);
      float low = kInf, high = -kInf;
      for (const float v : x) low = std::min(low, v), high = std::max(high, v);
      Range range = MinMax(x.data(), count);
      EXPECT_EQ(range.min, low) << count;
      EXPECT_EQ(range.max, high) << count;
      EXPECT_TRUE(range.finite) << count;
      for (const float odd : {kInf, -kInf, kNaN}) {
        for (size_t at = 0; at < x.size(); ++at) {
          std::vector<float> damaged = x;
          damaged.insert(damaged.begin() + static_cast<int64_t>(at), odd);
          range = MinMax(damaged.data(), count + 1);
          EXPECT_FALSE(range.finite) << odd << " at " << at << " of " << count;
          EXPECT_EQ(range.min, low) << odd << " at " << at << " of " << count;
          EXPECT_EQ(range.max, high) << odd << " at " << at << " of " << count;
        }
      }
    }
  });
}

TEST(SimdTest, MinMaxOfSignedZerosIsPlusZero) {
  const float zeros[] = {0.0f, -0.0f};
  EXPECT_FALSE(std::signbit(MinMax(zeros, 2).min));
  EXPECT_FALSE(std::signbit(MinMax(zeros + 1, 1).max));
}

// quantization.md 2.4 and format.md 4.2, one value at a time.
float SnapScalar(float x, const Grid& g) {
  float code;
  if (g.rounding == Rounding::kHalfEvenReciprocal) {
    code = std::nearbyint(x * (1.0f / g.scale));
  } else {
    const float v = x / g.scale;
    code = v >= 0 ? std::floor(v + 0.5f) : std::ceil(v - 0.5f);
  }
  code += static_cast<float>(g.zero_point);
  if (code < static_cast<float>(g.min_code)) code = static_cast<float>(g.min_code);
  if (code > static_cast<float>(g.max_code)) code = static_cast<float>(g.max_code);
  return (code - static_cast<float>(g.zero_point)) * g.scale;
}

std::vector<Grid> Grids() {
  std::vector<Grid> grids;
  for (const Rounding rounding : {Rounding::kHalfEvenReciprocal, Rounding::kHalfAwayDivide}) {
    grids.push_back({0.0037f, 0, -32768, 32767, rounding});
    grids.push_back({0.013f, 122, 0, 255, rounding});
    grids.push_back({0.25f, 5, 0, 15, rounding});
  }
  return grids;
}

TEST(SimdTest, SnapIsTheScalarFormulaBitForBit) {
  OnEveryTarget([] {
    for (const Grid& grid : Grids()) {
      std::vector<float> x = Normal(3000, 2, 60 * grid.scale);
      for (int k = -300; k < 300; ++k) x.push_back((static_cast<float>(k) + 0.5f) * grid.scale);  // ties
      for (const float v : {0.0f, -0.0f, 0.49999997f * grid.scale, 1e30f, -1e30f, kInf, -kInf}) x.push_back(v);
      std::vector<float> expected = x;
      for (float& v : expected) v = SnapScalar(v, grid);
      std::vector<float> whole = x;
      Snap(whole.data(), static_cast<int64_t>(x.size()), grid);
      EXPECT_TRUE(SameBits(whole, expected)) << grid.scale;
      // Cut anywhere, the bits are the same.
      for (const int64_t cut : kCounts) {
        std::vector<float> pieces = x;
        Snap(pieces.data(), cut, grid);
        Snap(pieces.data() + cut, static_cast<int64_t>(x.size()) - cut, grid);
        EXPECT_TRUE(SameBits(pieces, expected)) << "cut at " << cut;
      }
    }
  });
}

TEST(SimdTest, SnapKeepsNaN) {
  OnEveryTarget([] {
    for (const Grid& grid : Grids()) {
      std::vector<float> x(37, kNaN);
      Snap(x.data(), 37, grid);
      for (const float v : x) EXPECT_TRUE(std::isnan(v));
    }
  });
}

TEST(SimdTest, DequantizedCodesAreTheSnappedValues) {
  OnEveryTarget([] {
    for (const Grid& grid : Grids())
      for (const int64_t count : kCounts) {
        std::vector<float> x = Normal(static_cast<size_t>(count), 3, 60 * grid.scale), back(x.size());
        std::vector<int16_t> codes(x.size());
        Quantize(x.data(), count, grid, codes.data());
        Dequantize(codes.data(), count, grid.scale, grid.zero_point, back.data());
        Snap(x.data(), count, grid);
        EXPECT_TRUE(SameBits(back, x)) << count;
      }
  });
}

TEST(SimdTest, QuantizeGivesNaNTheSmallestCode) {
  OnEveryTarget([] {
    const std::vector<float> x(19, kNaN);
    std::vector<int16_t> codes(19);
    Quantize(x.data(), 19, {0.25f, 5, 3, 15, Rounding::kHalfEvenReciprocal}, codes.data());
    EXPECT_THAT(codes, ::testing::Each(3));
  });
}

TEST(SimdTest, BFloat16IsWidenedExactly) {
  OnEveryTarget([] {
    for (const int64_t count : kCounts) {
      std::vector<uint16_t> in(static_cast<size_t>(count));
      for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<uint16_t>(i * 251);
      std::vector<float> out(in.size()), expected(in.size());
      for (size_t i = 0; i < in.size(); ++i) expected[i] = std::bit_cast<float>(static_cast<uint32_t>(in[i]) << 16);
      BF16ToF32(in.data(), count, out.data());
      EXPECT_TRUE(SameBits(out, expected)) << count;
    }
  });
}

TEST(ConversionTest, F32ToBF16RoundsToTheNearestEven) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  const std::vector<std::pair<float, float>> cases{{1.0f, 1.0f},
                                                   {0x1.01p0f, 1.0f},
                                                   {0x1.03p0f, 0x1.04p0f},
                                                   {0x1.010002p0f, 0x1.02p0f},
                                                   {-0x1.03p0f, -0x1.04p0f},
                                                   {0.0f, 0.0f},
                                                   {-0.0f, -0.0f},
                                                   {kInf, kInf},
                                                   {-kInf, -kInf},
                                                   {3.4e38f, kInf},
                                                   {0x1p-140f, 0.0f},
                                                   {0x1.8p-133f, 0x1p-132f}};
  OnEveryTarget([&] {
    for (const size_t repeat : {1, 3}) {
      std::vector<float> in, expected;
      for (size_t i = 0; i < repeat; ++i)
        for (const auto& [value, rounded] : cases) {
          in.push_back(value);
          expected.push_back(rounded);
        }
      in.push_back(std::bit_cast<float>(0x7f800001u));  // a NaN whose upper half is that of infinity
      std::vector<uint16_t> codes(in.size());
      F32ToBF16(in.data(), static_cast<int64_t>(in.size()), codes.data());
      std::vector<float> out(in.size());
      BF16ToF32(codes.data(), static_cast<int64_t>(codes.size()), out.data());
      EXPECT_TRUE(std::isnan(out.back()));
      out.pop_back();
      EXPECT_TRUE(SameBits(out, expected));
    }
  });
}

float BinaryScalarly(BinaryOp op, float a, float b) {
  switch (op) {
    case BinaryOp::kAdd:
      return a + b;
    case BinaryOp::kSub:
      return a - b;
    case BinaryOp::kMul:
      return a * b;
    case BinaryOp::kMax:
      return std::max(a, b);
    case BinaryOp::kMin:
      return std::min(a, b);
  }
  return 0;
}

TEST(SimdTest, BinaryIsExactForEveryRemainder) {
  OnEveryTarget([] {
    for (const BinaryOp op : {BinaryOp::kAdd, BinaryOp::kSub, BinaryOp::kMul, BinaryOp::kMax, BinaryOp::kMin})
      for (const int64_t count : kCounts) {
        const size_t size = static_cast<size_t>(count);
        const std::vector<float> a = Normal(size, 4), b = Normal(size, 5);
        std::vector<float> y(size), expected(size);
        Binary(op, a.data(), b.data(), count, y.data());
        for (size_t i = 0; i < size; ++i) expected[i] = BinaryScalarly(op, a[i], b[i]);
        EXPECT_TRUE(SameBits(y, expected)) << count;
        BinaryScalar(op, a.data(), 0.3f, count, y.data());
        for (size_t i = 0; i < size; ++i) expected[i] = BinaryScalarly(op, a[i], 0.3f);
        EXPECT_TRUE(SameBits(y, expected)) << count;
      }
  });
}

TEST(SimdTest, ClampingKeepsNaN) {
  OnEveryTarget([] {
    std::vector<float> x(21, kNaN);
    BinaryScalar(BinaryOp::kMax, x.data(), -1.0f, 21, x.data());
    BinaryScalar(BinaryOp::kMin, x.data(), 1.0f, 21, x.data());
    for (const float v : x) EXPECT_TRUE(std::isnan(v));
  });
}

TEST(SimdTest, TanhIsWithinTwoUlps) {
  OnEveryTarget([] {
    std::vector<float> x;
    for (float v = 1e-30f; v < 100; v *= 1.001f) x.push_back(v), x.push_back(-v);
    std::vector<float> y(x.size());
    Tanh(x.data(), static_cast<int64_t>(x.size()), y.data());
    for (size_t i = 0; i < x.size(); ++i)
      EXPECT_LE(Ulps(y[i], static_cast<float>(std::tanh(static_cast<double>(x[i])))), 2) << x[i];
    for (const float odd : {kInf, -kInf}) {
      Tanh(&odd, 1, y.data());
      EXPECT_EQ(y[0], std::copysign(1.0f, odd));
    }
    Tanh(&kNaN, 1, y.data());
    EXPECT_TRUE(std::isnan(y[0]));
  });
}

// The exponent -2u is a float32 too: its rounding, half an ulp of up to |2u|, is what the error grows with.
TEST(SimdTest, GeluIsTheTanhForm) {
  OnEveryTarget([] {
    std::vector<float> x;
    for (float v = 1e-30f; v < 1e6f; v *= 1.001f) x.push_back(v), x.push_back(-v);
    x.push_back(0.0f);
    std::vector<float> y(x.size());
    Gelu(x.data(), static_cast<int64_t>(x.size()), y.data());
    for (size_t i = 0; i < x.size(); ++i) {
      const double v = x[i];
      const double expected = v / (1 + std::exp(-2 * std::sqrt(2 / M_PI) * (v + 0.044715 * v * v * v)));
      const double growth = v < 0 ? 1 + std::min(100.0, std::abs(v) * (1 + v * v)) : 1;
      EXPECT_LE(std::abs(y[i] - expected), 3e-7 * growth * std::abs(expected) + 1e-37) << x[i];
    }
    const float odd[] = {kInf, -kInf, kNaN, -1e30f};
    Gelu(odd, 4, y.data());
    EXPECT_EQ(y[0], kInf);
    EXPECT_EQ(y[1], 0);
    EXPECT_TRUE(std::isnan(y[2]));
    EXPECT_EQ(y[3], 0);
  });
}

TEST(SimdTest, RmsNormRoundsOnce) {
  OnEveryTarget([] {
    for (const int64_t count : kCounts) {
      const size_t size = static_cast<size_t>(count);
      const std::vector<float> x = Normal(size, 6, 30), gamma = Normal(size, 7);
      std::vector<float> y(size);
      RmsNormRows(x.data(), gamma.data(), 1, count, 1e-6f, y.data());
      double sum = 0;
      for (const float v : x) sum += static_cast<double>(v) * v;
      for (size_t i = 0; i < size; ++i) {
        const double expected = gamma[i] * (x[i] / std::sqrt(sum / static_cast<double>(count) + 1e-6f));
        EXPECT_LE(Ulps(y[i], static_cast<float>(expected)), 1) << i << " of " << count;
      }
      std::vector<float> rows = x, both(2 * size);
      rows.insert(rows.end(), gamma.begin(), gamma.end());
      RmsNormRows(rows.data(), gamma.data(), 2, count, 1e-6f, both.data());
      EXPECT_TRUE(SameBits(std::span(both).first(size), y)) << count;
      RmsNormRows(gamma.data(), gamma.data(), 1, count, 1e-6f, y.data());
      EXPECT_TRUE(SameBits(std::span(both).last(size), y)) << count;
    }
  });
}

TEST(SimdTest, SumOfExpIsExactToDoubleTerms) {
  OnEveryTarget([] {
    for (const int64_t count : kCounts) {
      const std::vector<float> x = Normal(static_cast<size_t>(count), 11, 20);
      double sum = 0;
      for (const float v : x) sum += std::exp(static_cast<double>(v) - 30.0f);
      // Units in the last place of exp, and of as many additions.
      EXPECT_NEAR(SumOfExp(x.data(), count, 30.0f), sum, 1e-13 * sum) << count;
    }
  });
}

TEST(SimdTest, SumsOfExpWeighTheDifferenceAndKeepANaNOfEither) {
  OnEveryTarget([] {
    for (const int64_t count : kCounts) {
      const std::vector<float> x = Normal(static_cast<size_t>(count), 11, 20);
      std::vector<float> y = Normal(static_cast<size_t>(count), 12, 20);
      double weighted = 0, size = 0;
      for (int64_t i = 0; i < count; ++i) {
        const double term = std::exp(static_cast<double>(x[i]) - 30.0f) * (static_cast<double>(x[i]) - y[i]);
        weighted += term;
        size += std::abs(term);
      }
      const ExpSums sums = SumsOfExp(x.data(), y.data(), count, 30.0f);
      EXPECT_EQ(sums.plain, SumOfExp(x.data(), count, 30.0f)) << count;
      EXPECT_NEAR(sums.times_difference, weighted, 1e-13 * size) << count;
      if (count == 0) continue;
      y[count / 2] = std::numeric_limits<float>::quiet_NaN();
      EXPECT_TRUE(std::isnan(SumsOfExp(x.data(), y.data(), count, 30.0f).times_difference)) << count;
    }
  });
}

TEST(SimdTest, SoftmaxSumsToOneAndCutsFarTerms) {
  OnEveryTarget([] {
    for (const int64_t count : kCounts) {
      std::vector<float> x = Normal(static_cast<size_t>(count), 8, 9);
      if (count > 3) x[2] = -200.0f;
      double sum = 0;
      const float max = count == 0 ? 0 : *std::max_element(x.begin(), x.end());
      const auto term = [&](float v) { return v - max < -28.0f ? 0.0 : std::exp(static_cast<double>(v) - max); };
      for (const float v : x) sum += term(v);
      std::vector<float> y = x;
      SoftmaxRow(y.data(), count);
      // The difference to the maximum is rounded to float32 before exp multiplies that error by it.
      for (size_t i = 0; i < x.size(); ++i)
        EXPECT_LE(std::abs(y[i] - term(x[i]) / sum), (3e-7 + 6e-8 * (max - x[i])) * term(x[i]) / sum) << i;
      if (count > 3) {
        EXPECT_EQ(y[2], 0.0f);
      }
    }
  });
}

TEST(SimdTest, SoftmaxIgnoresMaskedTermsAround) {
  OnEveryTarget([] {
    for (const int64_t count : {5, 16, 40, 133}) {
      std::vector<float> kept = Normal(static_cast<size_t>(count), 9, 3);
      for (const int64_t before : {0, 1, 4})
        for (const int64_t after : {0, 1, 7, 16, 50}) {
          std::vector<float> row(static_cast<size_t>(before * kSoftmaxLanes), -100.0f);
          row.insert(row.end(), kept.begin(), kept.end());
          row.insert(row.end(), static_cast<size_t>(after), -90.0f);
          std::vector<float> alone = kept;
          SoftmaxRow(alone.data(), count);
          SoftmaxRow(row.data(), static_cast<int64_t>(row.size()));
          EXPECT_TRUE(
              SameBits(std::span(row).subspan(static_cast<size_t>(before * kSoftmaxLanes), kept.size()), alone));
        }
    }
  });
}

TEST(SimdTest, SoftmaxOfNaNIsNaN) {
  OnEveryTarget([] {
    for (const size_t at : {0u, 15u, 16u, 36u}) {
      std::vector<float> x = Normal(37, 10);
      x[at] = kNaN;
      SoftmaxRow(x.data(), 37);
      for (const float v : x) EXPECT_TRUE(std::isnan(v)) << at;
    }
  });
}

// Values of a grid, as Snap makes them, and their codes.
TEST(IntegersTest, CodesOfAGridAreFoundAgain) {
  OnEveryTarget([] {
    for (const int64_t count : kCounts) {
      for (const auto& [scale, zero_point, max] :
           {std::tuple{0.037f, 117, 255}, {1.0f, 0, 255}, {3.1e-5f, 32768, 65535}, {1e-8f, 65535, 65535}}) {
        std::vector<float> x(static_cast<size_t>(count));
        std::vector<uint32_t> expected(x.size());
        double sum = 0;
        for (size_t i = 0; i < x.size(); ++i) {
          expected[i] = static_cast<uint32_t>(i * 7919 + (i % 3 == 0 ? 0 : max)) % static_cast<uint32_t>(max + 1);
          x[i] = static_cast<float>(static_cast<int32_t>(expected[i]) - zero_point) * scale;
          sum += expected[i];
        }
        std::vector<uint8_t> high(x.size() + 1, 0xa5), low(x.size() + 1, 0xa5);
        const double found = max == 255 ? CodesOf8Bits(x.data(), count, scale, zero_point, low.data())
                                        : CodesOf16Bits(x.data(), count, scale, zero_point, high.data(), low.data());
        EXPECT_EQ(found, sum) << count;
        for (size_t i = 0; i < x.size(); ++i)
          EXPECT_EQ(max == 255 ? low[i] : 256u * high[i] + low[i], expected[i]) << i << " of " << count;
        EXPECT_EQ(low.back(), 0xa5) << "written behind the end";
        EXPECT_EQ(high.back(), 0xa5) << "written behind the end";
        for (const float odd : {kNaN, kInf, -kInf}) {
          if (count == 0) continue;
          x[static_cast<size_t>(count / 2)] = odd;
          EXPECT_TRUE(std::isnan(CodesOf8Bits(x.data(), count, scale, zero_point, low.data()))) << odd;
        }
      }
    }
  });
}

TEST(IntegersTest, SumsOfManyCodesStayWhole) {
  OnEveryTarget([] {
    constexpr int64_t kCount = 1 << 15;
    const std::vector<float> x(kCount, 32767.0f);
    std::vector<uint8_t> high(kCount), low(kCount);
    EXPECT_EQ(CodesOf16Bits(x.data(), kCount, 1.0f, 32768, high.data(), low.data()), 65535.0 * kCount);
    for (const int64_t count : kCounts) {
      std::vector<int8_t> codes(static_cast<size_t>(count));
      int64_t sum = 0;
      for (size_t i = 0; i < codes.size(); ++i) sum += codes[i] = static_cast<int8_t>(i % 5 == 0 ? -128 : i * 53);
      EXPECT_EQ(SumOfCodes(codes.data(), count), sum) << count;
    }
  });
}

// What has fused multiply-adds rounds alike, and squares of float32 are exact everywhere.
TEST(SimdTest, BitsDoNotDependOnTheWidthOfVectors) {
  const std::vector<float> x = Normal(1003, 21, 3.0f), gamma = Normal(1003, 22);
  std::vector<float> norms, others;
  OnEveryTarget([&] {
    std::vector<float> y(x.size());
    RmsNormRows(x.data(), gamma.data(), 1, std::ssize(x), 1e-6f, y.data());
    if (norms.empty()) norms = y;
    EXPECT_TRUE(SameBits(y, norms));
    if (InstructionSet()[0] != 'A') return;
    Gelu(x.data(), std::ssize(x), y.data());
    std::vector<float> all = y;
    Tanh(x.data(), std::ssize(x), y.data());
    all.insert(all.end(), y.begin(), y.end());
    y = x;
    SoftmaxRow(y.data(), std::ssize(y));
    all.insert(all.end(), y.begin(), y.end());
    if (others.empty()) others = all;
    EXPECT_TRUE(SameBits(all, others));
  });
}

}  // namespace
}  // namespace circlet::simd
