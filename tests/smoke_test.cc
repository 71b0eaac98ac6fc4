// Every case from random parameters to a verified file, and every way a case can fail.

#include "circlet/smoke/smoke.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cmath>
#include <limits>
#include <new>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/circle/export.h"
#include "circlet/graph/builder.h"
#include "circlet/io/file.h"
#include "circlet/smoke/trace.h"
#include "paths.h"
#include "smoke/point_trace.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using testing::ElementsAre;
using testing::HasSubstr;
using testing::IsEmpty;

// Of this process: cases of one name run side by side.
std::filesystem::path OutputDirectory() {
  static const TempDirectory directory;
  return directory.Path();
}

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

// The text layers, the embeddings and the whole models take seconds each at these widths; scripts/smoke_bounds.sh runs
// all.
TEST(SmokeTest, E2bWidthsKeepTheirBoundsAndTheirFilesComputeTheSimulation) {
  for (const char* name : {"gemma4_text_attention_sliding_prefill", "gemma4_text_attention_decode",
                           "gemma4_vision_patch_embedder", "gemma4_vision_attention", "gemma4_vision_encoder_layer",
                           "gemma4_vision_encoder", "gemma4_vision_pooler", "gemma4_multimodal_embedder"}) {
    SmokeRun run = Exporting();
    run.size.profile = "e2b_dims";
    run.strict = true;
    const SmokeResult result = RunSmoke(FindSmokeCase(name), run);
    EXPECT_THAT(result.failures, IsEmpty()) << SmokeText(result);
    EXPECT_TRUE(result.bounds.has_value()) << name;
    EXPECT_GT(result.verified, 0);
  }
}

TEST(SmokeTest, EveryCaseHasBoundsInEachProfileAndRecipe) {
  for (const SmokeCase& known : SmokeCases())
    for (const std::string& profile : known.profiles)
      for (const char* recipe : {"default", "w8a16", "w4a16", "w8a8", "smoke-u8", "mixed8"}) {
        const std::optional<SmokeBounds> bounds = BoundsOf(known.name, profile, recipe);
        ASSERT_TRUE(bounds.has_value()) << known.name << ", " << profile << ", " << recipe;
        EXPECT_GT(bounds->min_mean, 0);
      }
}

// 16 bits stand for a run that quantizes next to nothing: its error is far below that of 8.
TEST(SmokeTest, ARunThatHardlyQuantizesIsBelowTheLowerBoundOfItsCase) {
  for (const char* name : {"gemma4_text_mlp", "gemma4_vision_pooler", "gemma4_text_decoder_layer_sliding_prefill"}) {
    SmokeRun run;
    run.recipe = "default";
    run.bounds = BoundsOf(name, "tiny", "smoke-u8");
    const SmokeResult result = RunSmoke(FindSmokeCase(name), run);
    EXPECT_THAT(result.failures, ElementsAre("ACCURACY")) << name;
    EXPECT_THAT(result.messages.front(), HasSubstr("some points are not quantized"));
  }
}

TEST(SmokeTest, BoundsAreForTheCountsAndSamplesThatTheyWereMeasuredWith) {
  const SmokeCase& pooler = FindSmokeCase("gemma4_vision_pooler");
  SmokeRun run;
  run.size.profile = "e2b_static_runtime";
  run.size.counts = {.profile = "e2b_66x36_264", .max_seq = 2048};
  EXPECT_TRUE(RunSmoke(pooler, run).bounds.has_value()) << "the profile's own counts, spelled out";
  run.size.counts.max_seq = 1024;
  EXPECT_FALSE(RunSmoke(pooler, run).bounds.has_value());
  run = {.size = {.seed = 5}};
  EXPECT_FALSE(RunSmoke(pooler, run).bounds.has_value());
  run = {.calibration_iters = 1};
  const SmokeResult result = RunSmoke(pooler, run);
  EXPECT_FALSE(result.bounds.has_value());
  EXPECT_THAT(result.messages.front(), HasSubstr("no bounds are known for gemma4_vision_pooler"));
}

// Padding patches attend to what a rounded mask leaves of the mask, so they alone are off by half.
TEST(SmokeTest, PaddingPatchesAreNotCompared) {
  const SmokeCase& encoder = FindSmokeCase("gemma4_vision_encoder");
  SmokeRun run{.recipe = "default"};
  run.size.profile = "e2b_dims";
  EXPECT_EQ(encoder.build(run.size)[0].real, 36);
  EXPECT_LT(RunSmoke(encoder, run).metrics->MeanAbs(), 0.01);
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

// A small case whose evaluated sample is changed.
SmokeResult RunDamaged(const std::function<void(SmokeValues& evaluation)>& change) {
  SmokeCase damaged = SmallCase(Gelu{}, 0.5f);
  damaged.build = [build = damaged.build, change](const SmokeSize& size) {
    std::vector<SmokePart> parts = build(size);
    change(parts[0].evaluation);
    return parts;
  };
  return RunSmoke(damaged, {});
}

TEST(SmokeTest, SampleOfAnotherShapeIsTold) {
  const SmokeResult result = RunDamaged([](SmokeValues& evaluation) { evaluation["x"] = Tensor(TensorType{DType::kF32, {1, 3}}); });
  EXPECT_THAT(result.failures, ElementsAre("SHAPE"));
  EXPECT_THAT(result.messages.front(), HasSubstr("input \"x\" is float32[1,3], expected float32[1,4]"));
}

TEST(SmokeTest, EveryExceptionIsAResult) {
  const auto failing = [](const std::function<void()>& body) {
    SmokeCase test_case = SmallCase(Gelu{}, 0.5f);
    test_case.build = [body](const SmokeSize&) -> std::vector<SmokePart> {
      body();
      return {};
    };
    const SmokeResult result = RunSmoke(test_case, {});
    EXPECT_THAT(result.failures, ElementsAre("CONFIG"));
    return result.messages.front();
  };
  EXPECT_EQ(failing([] { throw std::bad_alloc(); }), "CONFIG: out of memory");
  EXPECT_THAT(failing([] { CIRCLET_CHECK(1 > 2, "one is small"); }), HasSubstr("CONFIG: this is a bug: "));
  EXPECT_EQ(failing([] { throw std::runtime_error("else"); }), "CONFIG: else");
}

TEST(SmokeTest, NanInASampleNamesThePoint) {
  const SmokeResult result = RunSmoke(SmallCase(Gelu{}, std::numeric_limits<float>::quiet_NaN()), {});
  EXPECT_THAT(result.failures, ElementsAre("NON-FINITE"));
  EXPECT_THAT(result.messages.front(), HasSubstr("small.x: a calibration sample brought a NaN or an infinity"));
}

TEST(SmokeTest, InfinityInTheEvaluatedSampleIsNotFinite) {
  const SmokeResult result = RunDamaged([](SmokeValues& evaluation) { evaluation["x"].F32()[2] = std::numeric_limits<float>::infinity(); });
  EXPECT_THAT(result.failures, ElementsAre("NON-FINITE"));
  EXPECT_THAT(result.messages, ElementsAre("NON-FINITE: the float model gives 1 values that are not finite"));
}

TEST(SmokeTest, ImpossibleBoundIsAnAccuracyFailure) {
  SmokeRun run;
  run.bounds = SmokeBounds{.max_mean = 1e-9, .max_peir = 1, .min_mean = 0};
  EXPECT_THAT(RunSmoke(SmallCase(Gelu{}, 0.5f), run).failures, ElementsAre("ACCURACY"));
  run.bounds = SmokeBounds{.max_mean = 1, .max_peir = 1, .min_mean = 0.5};
  const SmokeResult result = RunSmoke(SmallCase(Gelu{}, 0.5f), run);
  EXPECT_THAT(result.failures, ElementsAre("ACCURACY"));
  EXPECT_THAT(result.messages.front(), HasSubstr("some points are not quantized"));
  run.bounds = SmokeBounds{.max_mean = 1, .max_peir = 1e-5, .min_mean = 0};
  const SmokeResult wide = RunSmoke(SmallCase(Gelu{}, 0.5f), run);
  EXPECT_THAT(wide.messages, testing::Contains(HasSubstr(fmt::format("PEIR is {:.6f} %, at most 0.001000 % is allowed",
                                                                     100 * wide.metrics->Peir()))));
}

TEST(SmokeTest, FiguresOfATraceThatAreNotFiniteAreEmptyInATable) {
  const std::string table = TraceCsv({{.name = "x", .min = std::numeric_limits<float>::quiet_NaN(), .max = 2}});
  EXPECT_THAT(table, testing::EndsWith("\n0,x,0.0,0.0,0.0,0.0,0,,,,,,,2.0\n"));
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

TEST(SmokeTest, FileThatDoesNotReadBackIsAVerifyFailure) {
  SmokeRun run = Exporting();
  run.write = [](const circle::Model& model, const std::filesystem::path& path) {
    const int64_t bytes = circle::Write(model, path);
    std::filesystem::resize_file(path, bytes / 2);
    return bytes;
  };
  const SmokeResult result = RunSmoke(SmallCase(Gelu{}, 0.5f), run);
  EXPECT_THAT(result.failures, ElementsAre("VERIFY"));
  EXPECT_THAT(result.messages.back(), HasSubstr("small.q.circle"));
}

TEST(SmokeTest, OutputDirectoryThatCannotBeIsAnExportFailure) {
  SmokeRun run = Exporting();
  run.output_dir = "/proc/circlet/out";
  const SmokeResult result = RunSmoke(SmallCase(Gelu{}, 0.5f), run);
  EXPECT_THAT(result.failures, ElementsAre("EXPORT"));
  EXPECT_THAT(result.messages.back(), HasSubstr("EXPORT: /proc/circlet/out: cannot be created: No such file"));
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
  EXPECT_GT(points[1].own, 0);
  EXPECT_THAT(ExplainText(points[1]), HasSubstr("grid low"));
}

// As in real models: one position holds a massive value, so that the grid of the sum is too coarse for all others,
// whose share of the tensor's energy is nothing. The norm behind it makes both positions equally loud.
TEST(SmokeTest, TraceBlamesThePointWhoseGridIsTooCoarseForMostPositions) {
  SmokePart part{.name = "massive"};
  {
    const Builder b(part.graph);
    const ValueId x = b.Input("x", {1, 16, 8});
    const ValueId stream = b.Point("stream", b.Add(Add{}, {x, x}));
    b.Output("y", b.Point("norm", b.Add(RmsNorm{}, {stream, b.Weight("gamma", {8}, WeightKind::kNone)})));
  }
  std::vector<float> values(16 * 8);
  for (size_t i = 0; i < values.size(); ++i) values[i] = std::sin(static_cast<float>(i));
  values[3] = 1e5f;
  part.stored = [](const std::string&) { return Tensor::Of<float>({8}, std::vector<float>(8, 1.0f)); };
  part.evaluation["x"] = Tensor::Of<float>({1, 16, 8}, values);
  part.calibration = {part.evaluation};
  const std::vector<TracePoint> points = Trace({part}, Recipe::Load("default"), 0);
  const auto stream = std::ranges::find(points, "stream", &TracePoint::name);
  ASSERT_NE(stream, points.end());
  EXPECT_EQ(stream->errors.positions, 16);
  EXPECT_GT(stream->error_out, 0.5) << "a step of 6 for values of at most 2";
  const nlohmann::json first = TraceJson(points).at("points").at(0);
  EXPECT_EQ(first.at("point"), "stream");
  const auto norm = std::ranges::find(points, "norm", &TracePoint::name);
  EXPECT_GT(stream->own, 0.5);
  EXPECT_LT(norm->own, 0.01) << "it passes on what the stream has lost";
}

TEST(SmokeTest, TraceLeavesOutThePaddingPatchesOfACase) {
  const SmokeCase& encoder = FindSmokeCase("gemma4_vision_encoder");
  const std::string point = "model.vision_tower.encoder.layers.0.self_attn.attn_out";
  SmokeSize size{.profile = "e2b_dims", .padding_patches = false};
  const std::vector<TracePoint> points = Trace(encoder.build(size), Recipe::Load("default"), 0, point);
  const auto traced = std::ranges::find(points, point, &TracePoint::name);
  ASSERT_NE(traced, points.end());
  EXPECT_EQ(traced->values.size(), 36u * 768);
  EXPECT_LT(traced->error_out, 0.01) << "a rounded mask changes what padding patches compute by half";
}

// As quantize meets them: what a step makes is what the next one reads, and a point's figures are those of its grid there.
TEST(SmokeTest, ACheckpointIsTracedStepByStepWithoutThePaddingPatchesOfPictures) {
  const std::filesystem::path model = SourcePath("examples/tiny-gemma4");
  const TempDirectory directory;
  const std::string line = fmt::format(
      R"({{"type": "chat", "messages": [{{"role": "user", "content": [{{"type": "image", "image": "{}"}}]}}]}})",
      (model / "eval/images/calib_00.png").string());
  WriteFile(directory.Path() / "samples.jsonl", line + "\n" + line + "\n");
  const QuantizeOptions options{.model = model, .data = directory.Path() / "samples.jsonl", .recipe = "w8a16"};
  const std::string explained = "model.vision_tower.encoder.layers.0.input_layernorm.act_out";
  const std::vector<TracePoint> points = TraceModel(options, 1, explained).points;
  const auto find = [&](const std::string& name) {
    const auto it = std::ranges::find(points, name, &TracePoint::name);
    EXPECT_NE(it, points.end()) << name;
    return *it;
  };
  EXPECT_EQ(find(explained).values.size(), 24u * 24 * 64) << "the budget is 630 patches";
  // Behind the last sum of a layer stands the norm of the next one, in another graph: it feeds that one's points, and its
  // own error is taken behind that norm.
  const TracePoint sum = find("model.language_model.layers.3.layer_scalar_out");
  const TracePoint norm = find("model.language_model.layers.4.input_layernorm.act_out");
  EXPECT_EQ(norm.error_in, sum.error_out);
  EXPECT_GT(sum.own, 0);
  const TracePoint head = find("lm_head.act_out");
  EXPECT_EQ(head.error_in, find("model.language_model.norm.act_out").error_out);
  EXPECT_GT(head.own, find("model.language_model.norm.act_out").own) << "its weight has 8 bits";
  EXPECT_EQ(head.errors.positions, norm.errors.positions);
}

// The weight that reads a value next may stand in the step behind: with it small channels count as the model sees them.
TEST(SmokeTest, APointIsBlamedForWhatTheNextStepsNormAmplifies) {
  const auto gamma = [](float first) {
    std::vector<float> values(8, first);
    values[3] = 1e-3f;
    return values;
  };
  Calibration calibration(Recipe::Load("default"), kDefault);
  Graph writer, reader;
  {
    const Builder b(writer);
    b.Output("hidden", b.Point("stream", b.Input("x", {1, 4, 8})));
  }
  {
    const Builder b(reader);
    const ValueId hidden = b.Boundary("stream", b.Input("hidden", {1, 4, 8}));
    b.Output("y", b.Point("norm", b.Add(RmsNorm{}, {hidden, b.Weight("gamma", {8}, WeightKind::kNone)})));
  }
  std::vector<float> values(4 * 8);
  for (size_t i = 0; i < values.size(); ++i) values[i] = i % 8 == 3 ? 1e4f : std::sin(static_cast<float>(i) + 0.3f);
  const Tensor x = Tensor::Of<float>({1, 4, 8}, values);
  const WeightSource stored = [&](const std::string&) { return Tensor::Of<float>({8}, gamma(1)); };
  PointTrace trace("");
  const auto see = [&](const std::string& name, const Graph& graph, const std::string& input, const std::string& reads,
                       const std::string& keeps) {
    ObserveReading observe(calibration);
    observe.Begin(0);
    Executor(graph, &observe).Run({{input, x}}, stored);
    observe.End();
    calibration.Freeze(graph, stored);
    trace.See({.name = name,
               .graph = graph,
               .calibration = calibration,
               .on_grid = true,
               .reads = {{input, {reads}}},
               .keeps = {{"hidden", {keeps}}},
               .parameter = [&](const std::string& parameter, bool) { return stored(parameter); },
               .run = [&](Chain, PointReading& reading) { Executor(graph, &reading).Run({{input, x}}, stored); }});
  };
  see("writer", writer, "x", "", "key");
  see("reader", reader, "hidden", "key", "");
  const std::vector<TracePoint> points = trace.Take();
  ASSERT_EQ(points.size(), 2u);
  // A step of 0.3 in 1e4 is nothing; against values of at most 1, which is what the norm lets through, it is not.
  EXPECT_LT(points[0].error_out, 1e-4);
  EXPECT_GT(points[0].own, 0.01);
  EXPECT_EQ(points[1].error_in, points[0].error_out);
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
