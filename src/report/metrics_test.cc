#include "circlet/report/metrics.h"

#include <gmock/gmock.h>

#include <cmath>
#include <fstream>
#include <nlohmann/json.hpp>
#include <random>
#include <vector>

#include "circlet/base/threads.h"
#include "error_text.h"
#include "golden.h"

namespace circlet {
namespace {

ErrorMetrics Of(const std::vector<float>& reference, const std::vector<float>& quantized) {
  ErrorMetrics metrics;
  metrics.Add(reference, quantized);
  return metrics;
}

TEST(ErrorMetricsTest, FollowsTheDefinitions) {
  const ErrorMetrics metrics = Of({-1, 0, 3}, {-1.5, 0.25, 3});
  EXPECT_DOUBLE_EQ(metrics.MeanAbs(), 0.25);
  EXPECT_DOUBLE_EQ(metrics.MaxAbs(), 0.5);
  EXPECT_DOUBLE_EQ(metrics.Mse(), (0.25 + 0.0625) / 3);
  EXPECT_DOUBLE_EQ(metrics.Peir(), 0.5 / 4);
}

TEST(ErrorMetricsTest, TheIntervalIsThatOfTheReferenceAlone) { EXPECT_DOUBLE_EQ(Of({0, 1}, {0, 9}).Peir(), 8); }

TEST(ErrorMetricsTest, AnIntervalOfZeroCountsAsOne) { EXPECT_DOUBLE_EQ(Of({2, 2}, {2, 2.5}).Peir(), 0.5); }

TEST(ErrorMetricsTest, ValuesThatAreNotFiniteAreCountedAndSpoilTheFigures) {
  const ErrorMetrics metrics = Of({1, NAN, INFINITY, 4}, {1, 2, -INFINITY, NAN});
  EXPECT_EQ(metrics.nonfinite_reference, 2);
  EXPECT_EQ(metrics.nonfinite_quantized, 2);
  EXPECT_FALSE(metrics.Finite());
  for (const double figure : {metrics.MeanAbs(), metrics.MaxAbs(), metrics.Mse(), metrics.Peir()}) {
    EXPECT_TRUE(std::isnan(figure));
  }
}

TEST(ErrorMetricsTest, NothingComparedIsNotZeroError) {
  EXPECT_TRUE(std::isnan(ErrorMetrics{}.MeanAbs()));
  EXPECT_TRUE(std::isnan(ErrorMetrics{}.Peir()));
}

std::vector<float> Noise(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::vector<float> values(count);
  for (float& value : values) value = static_cast<float>(generator()) / 1e8f - 20.0f;
  return values;
}

TEST(ErrorMetricsTest, TheBitsDoNotDependOnThreads) {
  const std::vector<float> reference = Noise(300'001, 1), quantized = Noise(300'001, 2);
  const int before = Threads();
  SetThreads(1);
  const ErrorMetrics one = Of(reference, quantized);
  SetThreads(3);
  const ErrorMetrics three = Of(reference, quantized);
  SetThreads(before);
  EXPECT_EQ(one, three);
}

TEST(ErrorMetricsTest, MergedPartsAreTheWhole) {
  const std::vector<float> reference = Noise(1000, 1), quantized = Noise(1000, 2);
  ErrorMetrics parts;
  for (size_t at = 0; at < 1000; at += 250) {
    ErrorMetrics part;
    part.Add(std::span(reference).subspan(at, 250), std::span(quantized).subspan(at, 250));
    parts.Merge(part);
  }
  const ErrorMetrics whole = Of(reference, quantized);
  EXPECT_EQ(parts.count, 1000);
  EXPECT_DOUBLE_EQ(parts.MeanAbs(), whole.MeanAbs());
  EXPECT_EQ(parts.MaxAbs(), whole.MaxAbs());
  EXPECT_EQ(parts.Peir(), whole.Peir());
}

TEST(ErrorMetricsTest, OtherShapesAreAnErrorWithBoth) {
  ErrorMetrics metrics;
  EXPECT_EQ(ErrorText([&] {
              metrics.Add(Tensor({DType::kF32, {2, 3}}), Tensor({DType::kF32, {3, 2}}));
            }),
            "metrics: the float output has shape [2,3], the quantized one [3,2]; only equal shapes can be compared");
}

TEST(ErrorMetricsTest, GivesTheFiguresOfTheReference) {
  // float32 sums of the reference move its mean by some 1e-7; its maxima are exact.
  constexpr double kMeanTolerance = 1e-5, kPeirTolerance = 1e-6;
  const SafetensorsFile reference = OpenGolden("golden/seed_example/float.safetensors.xz");
  const SafetensorsFile quantized = OpenGolden("golden/seed_example/quant.safetensors.xz");
  std::ifstream file(TestData("golden/seed_example/metrics.json"));
  const nlohmann::json recorded = nlohmann::json::parse(file)["recipes"];
  int compared = 0;
  for (const auto& [recipe, samples] : recorded.items()) {
    for (const auto& [sample, stages] : samples.items()) {
      for (const auto& [stage, figures] : stages.items()) {
        const Tensor* f = reference.Find(fmt::format("{}.{}", sample, stage));
        const Tensor* q = quantized.Find(fmt::format("{}.{}.{}", recipe, sample, stage));
        if (f == nullptr || q == nullptr) continue;
        ErrorMetrics metrics;
        metrics.Add(*f, *q);
        const double mean = figures["mean_abs_diff"], peir = figures["peir"];
        EXPECT_NEAR(metrics.MeanAbs(), mean, kMeanTolerance * mean) << recipe << " " << sample << " " << stage;
        EXPECT_EQ(metrics.MaxAbs(), figures["max_abs_diff"].get<double>()) << recipe << " " << sample << " " << stage;
        EXPECT_NEAR(metrics.Peir(), peir, kPeirTolerance * peir) << recipe << " " << sample << " " << stage;
        ++compared;
      }
    }
  }
  EXPECT_GT(compared, 20);
}

TEST(PositionErrorsTest, EachPositionIsHeldAgainstItsOwnValues) {
  // The first position is massive and hardly off, the second is small and half wrong.
  const std::vector<float> reference{1e5f, 0, 3, 4}, quantized{1e5f, 10, 3, 6.5f};
  PositionErrors errors;
  errors.Add(reference, quantized, 2);
  ASSERT_EQ(errors.relative.size(), 2u);
  EXPECT_FLOAT_EQ(errors.relative[0], 1e-4f);
  EXPECT_FLOAT_EQ(errors.relative[1], 0.5f);
  EXPECT_LT(errors.total.Relative(), 2e-4) << "one value decides over the whole tensor";
  EXPECT_EQ(errors.total.count, 4);
  EXPECT_DOUBLE_EQ(errors.total.Peir(), 10.0 / 1e5);
}

TEST(PositionErrorsTest, RowsOfZerosAndNaNsDoNotLookGood) {
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  PositionErrors errors;
  errors.Add(std::vector<float>{0, 0, 0, 0, 1, 1}, std::vector<float>{0, 0, 0, 1, 1, kNaN}, 2);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(errors.relative, (std::vector<float>{0, kInfinity, kInfinity}));
  EXPECT_EQ(Summarize(errors.relative).median, kInfinity);
}

TEST(PositionErrorsTest, RanksAreNearestOnes) {
  std::vector<float> relative(200);
  for (size_t i = 0; i < relative.size(); ++i) relative[i] = static_cast<float>((i * 77) % 200 + 1);
  EXPECT_EQ(Summarize(relative), (PositionSummary{.positions = 200, .median = 100, .percentile_99 = 198}));
  EXPECT_EQ(Summarize({3, 1, 2}), (PositionSummary{.positions = 3, .median = 2, .percentile_99 = 3}));
  EXPECT_EQ(Summarize({7}), (PositionSummary{.positions = 1, .median = 7, .percentile_99 = 7}));
  EXPECT_TRUE(std::isnan(Summarize({}).median));
}

}  // namespace
}  // namespace circlet
