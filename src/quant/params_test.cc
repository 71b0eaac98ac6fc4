#include "circlet/quant/params.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/quant/affine.h"
#include "error_text.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using testing::HasSubstr;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

PointParams Point(std::string name, float min, float max) {
  PointParams params{.spec = {.point = std::move(name), .scheme = {.symmetric = true}}, .min = {min}, .max = {max}};
  params.qparams = ComputeQParams(min, max, DType::kI16, true);
  return params;
}

ParameterStore SomeParameters() {
  ParameterStore store;
  store.Set(Point("model.layers.0.act_in", -0.1f, 0.3f));
  store.Set(Point("model.layers.0.act_out", kInfinity, -kInfinity));
  PointParams weight{.spec = {.point = "model.weight", .dtype = DType::kU4, .scheme = {.per_channel = true}, .axis = 0},
                     .min = {0, -1},
                     .max = {1, 2}};
  weight.qparams = ComputeQParams(weight.min, weight.max, DType::kU4, false, 0);
  store.Set(weight);
  store.Set({.spec = {.point = "model.mx", .kind = QuantKind::kMx, .mx = {.format = MxFormat::kFp4, .axis = 1}}});
  store.Set({.spec = {.point = "model.float", .kind = QuantKind::kNone}});
  return store;
}

TEST(ParameterStoreTest, AFileHoldsEverythingThatWasSaved) {
  const TempDirectory directory;
  const ParameterStore store = SomeParameters();
  store.Save(directory.Path() / "qparams.json", {{"recipe", "default"}});
  const ParameterStore loaded = ParameterStore::Load(directory.Path() / "qparams.json");
  ASSERT_EQ(loaded.Size(), store.Size());
  for (const std::string& name : store.Names()) EXPECT_EQ(*loaded.Find(name), *store.Find(name)) << name;
}

TEST(ParameterStoreTest, NumbersAreTheShortestDecimalsAndPointsStandOnALineEach) {
  EXPECT_THAT(ToText(SomeParameters(), {{"recipe", "default"}}), HasSubstr(R"({
 "points": 5,
 "recipe": "default",
 "quant_points":{
  "model.layers.0.act_in":{"observer":"MinMaxObserver","dtype":"int16","qscheme":"per_tensor_symm","channel_axis":null,"min":[-0.1],"max":[0.3],"scale":[9.155553e-06],"zero_point":[0]},
  "model.layers.0.act_out":{"observer":"MinMaxObserver","dtype":"int16","qscheme":"per_tensor_symm","channel_axis":null,"min":["inf"],"max":["-inf"],"scale":["inf"],"zero_point":[0]},
)"));
}

TEST(ParameterStoreTest, ReplacingAPointKeepsItsPlace) {
  ParameterStore store = SomeParameters();
  store.Set(Point("model.layers.0.act_in", -1, 1));
  EXPECT_EQ(store.Size(), 5u);
  EXPECT_EQ(store.Names().front(), "model.layers.0.act_in");
  EXPECT_EQ(store.Get("model.layers.0.act_in").max[0], 1.0f);
}

TEST(ParameterStoreTest, AbsentAndUnobservedPointsAreNamed) {
  const ParameterStore store = SomeParameters();
  EXPECT_EQ(store.Find("model.layers.0.act_im"), nullptr);
  EXPECT_THAT(ErrorText([&] { store.Get("model.layers.0.act_im"); }),
              HasSubstr("model.layers.0.act_im: this point has no quantization parameters; nearest: "
                        "\"model.layers.0.act_in\"; calibrate with this recipe"));
  EXPECT_THAT(ErrorText([&] { store.Get("model.layers.0.act_out"); }),
              HasSubstr("model.layers.0.act_out: no calibration data reached this point; calibrate again"));
  EXPECT_EQ(store.Get("model.mx").spec.kind, QuantKind::kMx);
}

TEST(ParameterStoreTest, DamageNamesFilePointAndField) {
  const auto error = [](std::string_view from, std::string_view to) {
    std::string text = ToText(SomeParameters(), nullptr);
    text.replace(text.find(from), from.size(), to);
    return ErrorText([&] { ParseParameters(text, "q.json"); });
  };
  EXPECT_THAT(
      error("[9.155553e-06]", "[0.0]"),
      HasSubstr("q.json: quant_points.model.layers.0.act_in.scale: value 0 is 0; scales are positive and finite"));
  EXPECT_THAT(error("[9.155553e-06]", "[\"inf\"]"), HasSubstr("value 0 is inf; scales are positive and finite"));
  EXPECT_THAT(error("[9.155553e-06]", "[1e-6,1e-6]"), HasSubstr("hold 1, 1, 2 and 1 values; they must be as many"));
  EXPECT_THAT(error("[9.155553e-06]", "\"x\""), HasSubstr("scale: expected a list of numbers, found \"x\""));
  EXPECT_THAT(error("\"zero_point\":[0]", "\"zero_point\":[40000]"),
              HasSubstr("zero_point: value 0 is 40000, outside the codes of int16 (-32768 to 32767)"));
  EXPECT_THAT(error("\"channel_axis\":0", "\"channel_axis\":null"), HasSubstr("2 values, but channel_axis is null"));
  EXPECT_THAT(error("int16", "int17"), HasSubstr("model.layers.0.act_in.dtype: \"int17\" is no grid type"));
  EXPECT_THAT(error("per_tensor_symm", "symm"), HasSubstr("act_in.qscheme: unknown qscheme \"symm\""));
  EXPECT_THAT(error("MinMaxObserver", "MinObserver"),
              HasSubstr("unknown observer \"MinObserver\"; known are MinMaxObserver"));
  EXPECT_THAT(error("quant_points", "quant"), HasSubstr("q.json: there is no \"quant_points\""));
}

TEST(ParamsOfWeightTest, RangesAreExactPerRowOrPerTensor) {
  const std::vector<float> values{1, -2, 3, 4};
  const Tensor weight = Tensor::Of<float>({2, 2}, values);
  PointSpec spec{.point = "w", .dtype = DType::kI8, .scheme = {.per_channel = true, .symmetric = true}, .axis = 0};
  EXPECT_EQ(ParamsOfWeight(weight, spec).qparams.scale, (std::vector<float>{2 / 127.0f, 4 / 127.0f}));
  spec.axis = -1;
  EXPECT_EQ(ParamsOfWeight(weight, spec).qparams.scale, (std::vector<float>{4 / 127.0f}));
  spec.observer = {.kind = ObserverSpec::Kind::kPercentile, .percentile = 50};
  EXPECT_EQ(ParamsOfWeight(weight, spec).qparams.scale, (std::vector<float>{2.5f / 127.0f}));
}

TEST(ParamsOfWeightTest, ANonFiniteWeightNamesThePoint) {
  const std::vector<float> values{1, std::nanf("")};
  const Tensor weight = Tensor::Of<float>({2}, values);
  EXPECT_THAT(ErrorText([&] { ParamsOfWeight(weight, {.point = "a.weight"}); }),
              HasSubstr("a.weight: row 0, column 1 of the weight is nan"));
}

}  // namespace
}  // namespace circlet
