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

}  // namespace
}  // namespace circlet
