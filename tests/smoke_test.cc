// Every case from random parameters to a verified file, and every way a case can fail.

#include "circlet/smoke/smoke.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/circle/export.h"
#include "circlet/graph/builder.h"
#include "circlet/smoke/trace.h"

namespace circlet {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

std::filesystem::path OutputDirectory() { return std::filesystem::path(testing::TempDir()) / "smoke_test"; }

SmokeRun Exporting() {
  SmokeRun run;
  run.export_circle = true;
  run.output_dir = OutputDirectory();
  return run;
}

class SmokeCaseTest : public testing::TestWithParam<std::string> {};

TEST_P(SmokeCaseTest, TinyKeepsItsBoundsAndItsFileComputesTheSimulation) {
  const SmokeResult result = RunSmoke(FindSmokeCase(GetParam()), Exporting());
  EXPECT_THAT(result.failures, IsEmpty()) << SmokeText(result);
  EXPECT_TRUE(result.bounds.has_value());
  EXPECT_GT(result.verified, 0);
  EXPECT_GT(result.metrics->MeanAbs(), 0);
}

std::vector<std::string> CaseNames() {
  std::vector<std::string> names;
  for (const SmokeCase& known : SmokeCases()) names.push_back(known.name);
  return names;
}
INSTANTIATE_TEST_SUITE_P(AllCases, SmokeCaseTest, testing::ValuesIn(CaseNames()),
                         [](const auto& info) { return info.param; });

TEST(SmokeTest, E2bWidthsRunInAttentionAndVision) {
  for (const char* name : {"gemma4_text_attention_decode", "gemma4_vision_patch_embedder"}) {
    SmokeRun run = Exporting();
    run.size.profile = "e2b_dims";
    const SmokeResult result = RunSmoke(FindSmokeCase(name), run);
    EXPECT_THAT(result.failures, IsEmpty()) << SmokeText(result);
    EXPECT_GT(result.verified, 0);
  }
}

// y = f(x) on a point, x [1,4].
SmokeCase SmallCase(const Op& op, float value, std::optional<Op> written = std::nullopt) {
  const auto build = [=](const SmokeSize&) {
    const auto graph_of = [](const Op& f) {
      Graph graph;
      const Builder b = Builder(graph).At("small");
      b.Output("y", b.Point("y", b.Add(f, {b.Point("x", b.Input("x", {1, 4}))})));
      return graph;
    };
    SmokePart part{.graph = graph_of(op), .stored = [](const std::string&) { return Tensor(); }};
    if (written) part.exported = graph_of(*written);
    part.calibration = {{{"x", Tensor::Of<float>({1, 4}, std::vector<float>{-1.0f, 0.3f, value, 1.5f})}}};
    part.evaluation = {{"x", Tensor::Of<float>({1, 4}, std::vector<float>{-0.9f, 0.2f, 0.7f, 1.1f})}};
    std::vector<SmokePart> parts;
    parts.push_back(std::move(part));
    return parts;
  };
  return {.name = "small", .profiles = {"tiny"}, .recipe = "smoke-u8", .build = build};
}

TEST(SmokeTest, ProfileThatACaseLacksIsUnavailable) {
  SmokeRun run;
  run.size.profile = "e2b_static_runtime";
  const SmokeResult result = RunSmoke(FindSmokeCase("gemma4_text_attention_k_eq_v_prefill"), run);
  EXPECT_THAT(result.failures, ElementsAre("UNAVAILABLE"));
  EXPECT_THAT(result.messages.front(), HasSubstr("has no profile e2b_static_runtime; choose tiny or e2b_dims"));
}

TEST(SmokeTest, CountsThatDoNotFitAreAConfigFailure) {
  SmokeRun run;
  run.size.profile = "e2b_static_runtime";
  run.size.counts.max_soft_tokens = 300;
  const SmokeResult result = RunSmoke(FindSmokeCase("gemma4_vision_pooler"), run);
  EXPECT_THAT(result.failures, ElementsAre("CONFIG"));
  EXPECT_THAT(result.messages.front(), HasSubstr("max_soft_tokens is 300; choose 70, 140, 280, 560 or 1120"));
}

TEST(SmokeTest, SampleOfAnotherShapeIsTold) {
  SmokeCase damaged = SmallCase(Gelu{}, 0.5f);
  damaged.build = [build = damaged.build](const SmokeSize& size) {
    std::vector<SmokePart> parts = build(size);
    parts[0].evaluation["x"] = Tensor(TensorType{DType::kF32, {1, 3}});
    return parts;
  };
  const SmokeResult result = RunSmoke(damaged, {});
  EXPECT_FALSE(result.Passed());
  EXPECT_THAT(result.messages.front(), HasSubstr("[1,3]"));
}

TEST(SmokeTest, NanInASampleNamesThePoint) {
  const SmokeResult result = RunSmoke(SmallCase(Gelu{}, std::numeric_limits<float>::quiet_NaN()), {});
  EXPECT_THAT(result.failures, ElementsAre("NON-FINITE"));
  EXPECT_THAT(result.messages.front(), HasSubstr("small.x: a calibration sample brought a NaN or an infinity"));
}

TEST(SmokeTest, ImpossibleBoundIsAnAccuracyFailure) {
  SmokeRun run;
  run.bounds = SmokeBounds{.max_mean = 1e-9, .max_peir = 1, .min_mean = 0};
  EXPECT_THAT(RunSmoke(SmallCase(Gelu{}, 0.5f), run).failures, ElementsAre("ACCURACY"));
  run.bounds = SmokeBounds{.max_mean = 1, .max_peir = 1, .min_mean = 0.5};
  const SmokeResult result = RunSmoke(SmallCase(Gelu{}, 0.5f), run);
  EXPECT_THAT(result.failures, ElementsAre("ACCURACY"));
  EXPECT_THAT(result.messages.front(), HasSubstr("some points are not quantized"));
}

TEST(SmokeTest, StrictFailsForABoundWiderThanNeeded) {
  SmokeRun run;
  run.bounds = SmokeBounds{.max_mean = 1, .max_peir = 1, .min_mean = 0};
  EXPECT_TRUE(RunSmoke(SmallCase(Gelu{}, 0.5f), run).Passed());
  run.strict = true;
  EXPECT_THAT(RunSmoke(SmallCase(Gelu{}, 0.5f), run).failures, ElementsAre("STRICT"));
}

TEST(SmokeTest, FullDiskIsAnExportFailure) {
  SmokeRun run = Exporting();
  run.write = [](const circle::Model&, const std::filesystem::path& path) -> int64_t {
    Fail("{}: No space left on device", path.string());
  };
  const SmokeResult result = RunSmoke(SmallCase(Gelu{}, 0.5f), run);
  EXPECT_THAT(result.failures, ElementsAre("EXPORT"));
  EXPECT_THAT(result.artifacts, IsEmpty());
}

TEST(SmokeTest, BrokenOperatorInTheFileIsAVerifyFailure) {
  const SmokeResult result = RunSmoke(SmallCase(Gelu{}, 0.5f, Op(Tanh{})), Exporting());
  EXPECT_THAT(result.failures, ElementsAre("VERIFY"));
  EXPECT_THAT(result.messages.back(), HasSubstr("values of y are not the simulation's"));
}

TEST(SmokeTest, UnknownCaseNamesTheNearest) {
  try {
    FindSmokeCase("gemma4_text_mpl");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("nearest: \"gemma4_text_mlp\""));
  }
}

TEST(SmokeTest, JsonHasNullWhereAFigureIsNotFinite) {
  const std::vector<SmokeResult> results{
      RunSmoke(SmallCase(Gelu{}, 0.5f), {}),
      RunSmoke(SmallCase(Gelu{}, std::numeric_limits<float>::infinity()), {})};
  const nlohmann::json json = SmokeSuiteJson(results);
  EXPECT_EQ(json.at("schema_version"), 1);
  EXPECT_EQ(json.at("cases").at(0).at("case"), "small");
  EXPECT_TRUE(json.at("cases").at(0).at("passed"));
  EXPECT_TRUE(json.at("cases").at(0).at("metrics").at("mean_abs_diff").is_number());
  EXPECT_FALSE(json.at("cases").at(1).at("passed"));
}

TEST(SmokeTest, TraceFollowsTheErrorThroughThePoints) {
  const std::vector<TracePoint> points =
      Trace(SmallCase(Gelu{}, 0.5f).build({}), Recipe::Load("smoke-u8"), 0, "small.y");
  ASSERT_EQ(points.size(), 2u);
  EXPECT_EQ(points[0].name, "small.x");
  EXPECT_EQ(points[0].error_in, 0);
  EXPECT_EQ(points[1].error_in, points[0].error_out);
  EXPECT_EQ(points[1].values.size(), 4u);
  EXPECT_THAT(ExplainText(points[1]), HasSubstr("grid low"));
}

TEST(SmokeTest, TraceOfTheWholeModelTakesAPointThatStandsAtSeveralPlaces) {
  const SmokeSize size;
  const std::vector<TracePoint> points =
      Trace(FindSmokeCase("gemma4_model").build(size), Recipe::Load("default"), 0, "");
  EXPECT_GT(points.size(), 100u);
  EXPECT_GT(points.back().error_out, 0);
}

TEST(SmokeTest, ExampleSavesItsFile) {
  const std::string text = RunExample("gemma4_model", OutputDirectory());
  EXPECT_THAT(text, HasSubstr("Image-Text Quantization Error"));
  EXPECT_THAT(text, HasSubstr("Export output shape: (1, 16, 64)"));
  EXPECT_TRUE(std::filesystem::exists(OutputDirectory() / "gemma4_model.q.circle"));
}

}  // namespace
}  // namespace circlet
