#include "quant/weights/moments.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "error_text.h"

namespace circlet::weights {
namespace {

using testing::HasSubstr;

Tensor Random(Shape shape, int seed, float scale = 1) {
  Tensor tensor({DType::kF32, shape});
  std::mt19937 random(static_cast<unsigned>(seed));
  std::normal_distribution<float> normal(0, scale);
  for (float& value : tensor.F32()) value = normal(random);
  return tensor;
}

double PlainSum(const Tensor& a, const Tensor& x, int64_t row, int64_t column, std::span<const float> weights = {}) {
  const int64_t rows = a.GetShape()[-1], columns = x.GetShape()[-1];
  double sum = 0;
  for (int64_t t = 0; t < x.Elements() / columns; ++t)
    sum += (weights.empty() ? 1.0 : weights[t]) * a.F32()[t * rows + row] * x.F32()[t * columns + column];
  return sum;
}

TEST(MomentTest, IsTheSumOfProducts) {
  const Tensor x = Random({1, 70, 37}, 1), a = Random({70, 5}, 2);
  std::vector<float> weights(70);
  for (size_t t = 0; t < weights.size(); ++t) weights[t] = static_cast<float>(t % 4) / 3;
  Moment plain = Moment::Symmetric(37, 8, 100), weighted = Moment::Symmetric(37, 8, 100),
         cross = Moment::Cross(5, 37, 8, 100);
  plain.Add(x);
  weighted.Add(x, weights);
  cross.Add(a, x);
  // float32 sums of 70 terms of size 1: a few times 70 * 2^-24.
  for (int64_t i = 0; i < 37; ++i)
    for (int64_t j = 0; j < 37; ++j) {
      EXPECT_NEAR(plain.At(i, j), PlainSum(x, x, i, j), 3e-5);
      EXPECT_NEAR(weighted.At(i, j), PlainSum(x, x, i, j, weights), 3e-5);
      EXPECT_EQ(plain.At(i, j), plain.At(j, i));
      if (i < 5) EXPECT_NEAR(cross.At(i, j), PlainSum(a, x, i, j), 3e-5);
    }
  EXPECT_EQ(plain.Positions(), 70);
}

TEST(MomentTest, AnyOrderAnyThreadsAndAnyProcessGiveTheSameBits) {
  const std::vector<Tensor> samples = {Random({40, 300}, 1), Random({9, 300}, 2, 30), Random({300, 300}, 3)};
  const auto sum_of = [&](const std::vector<int>& order) {
    Moment moment = Moment::Symmetric(300, 500, 1000);
    for (const int i : order) moment.Add(samples[i]);
    return moment;
  };
  const Moment together = sum_of({0, 1, 2});
  Moment merged = sum_of({2});
  merged.Merge(sum_of({1, 0}));
  const int threads = Threads();
  SetThreads(threads == 1 ? 2 : 1);
  const Moment otherwise = sum_of({1, 2, 0});
  SetThreads(threads);
  Moment restored = Moment::Symmetric(300, 500, 1000);
  restored.Restore(together.Raw(), together.Positions());
  for (const Moment* other : std::initializer_list<const Moment*>{&merged, &otherwise, &restored}) {
    EXPECT_EQ(other->Positions(), 349);
    EXPECT_TRUE(std::ranges::equal(other->Raw(), together.Raw()));
  }
}

TEST(MomentTest, InBf16EachProductIsOffByAFewThousandths) {
  if (!Bf16Supported()) GTEST_SKIP() << "needs a processor with AVX-512 BF16";
  const Tensor x = Random({2100, 37}, 1), a = Random({2100, 5}, 2);
  Moment exact = Moment::Cross(5, 37, 8, 2100), rounded = Moment::Cross(5, 37, 8, 2100, Compute::kBf16);
  exact.Add(a, x);
  rounded.Add(a, x);
  bool differs = false;
  for (int64_t i = 0; i < 5; ++i)
    for (int64_t j = 0; j < 37; ++j) {
      double magnitudes = 0;
      for (int64_t t = 0; t < 2100; ++t) magnitudes += std::abs(double{a.F32()[t * 5 + i]} * x.F32()[t * 37 + j]);
      EXPECT_NEAR(rounded.At(i, j), exact.At(i, j), magnitudes / 256);
      differs |= rounded.At(i, j) != exact.At(i, j);
    }
  EXPECT_TRUE(differs);
}

// Columns that were set for one tensor serve several moments, and the next tensor.
TEST(MomentTest, ColumnsServeSeveralMomentsAndTheNextTensor) {
  PositionColumns columns, others;
  Moment once = Moment::Symmetric(12, 8, 90), cross = Moment::Cross(4, 12, 8, 90);
  Moment by_tensor = Moment::Symmetric(12, 8, 90), cross_by_tensor = Moment::Cross(4, 12, 8, 90);
  for (const int64_t count : {50, 7, 33}) {
    const Tensor x = Random({count, 12}, static_cast<int>(count)), a = Random({count, 4}, 5);
    std::vector<float> weights(static_cast<size_t>(count), 0.5f);
    columns.Set(x, weights);
    others.Set(a, weights);
    once.Add(columns);
    cross.Add(others, columns);
    by_tensor.Add(x, weights);
    cross_by_tensor.Add(a, x, weights);
  }
  EXPECT_TRUE(std::ranges::equal(once.Raw(), by_tensor.Raw()));
  EXPECT_TRUE(std::ranges::equal(cross.Raw(), cross_by_tensor.Raw()));
  EXPECT_EQ(once.Positions(), 90);
}

TEST(MomentTest, ValuesBeyondTheBoundAndNaNAreErrors) {
  Moment moment = Moment::Symmetric(2, 4, 10);
  const float big[] = {1, -5}, nan[] = {std::nanf(""), 0};
  EXPECT_THAT(ErrorText([&] { moment.Add(Tensor::Of<float>({1, 2}, big)); }), HasSubstr("-5 at the input of a matrix"));
  EXPECT_THAT(ErrorText([&] { moment.Add(Tensor::Of<float>({1, 2}, nan)); }), HasSubstr("nan at the input"));
  EXPECT_THAT(ErrorText([] { Moment::Symmetric(2, INFINITY, 10); }), HasSubstr("must be finite"));
  EXPECT_THAT(ErrorText([&] { moment.Restore(std::as_bytes(std::span(big)), 1); }),
              HasSubstr("8 bytes over 1 positions"));
}

}  // namespace
}  // namespace circlet::weights
