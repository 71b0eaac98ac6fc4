#include <gmock/gmock.h>

#include <limits>

#include "circle/test_model.h"

namespace circlet::circle {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::StartsWith;

TEST(CircleVerifyTest, AnHonestModelHasNoFaults) { EXPECT_THAT(Verify(SmallModel()), IsEmpty()); }

// One change, one fault.
template <typename Change>
std::string FaultAfter(Change&& change) {
  Model model = SmallModel();
  change(model);
  const std::vector<std::string> faults = Verify(model);
  EXPECT_EQ(faults.size(), 1) << ::testing::PrintToString(faults);
  return faults.empty() ? "" : faults[0];
}

TEST(CircleVerifyTest, ShapesMustFitTheFormat) {
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.tensors[2].type.dtype = m.tensors[2].qparams->dtype = DType::kBF16, m.tensors[2].qparams.reset();
              }),
              StartsWith("tensor 2 \"y\": Circle has no bfloat16"));
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.tensors[8].type.shape = Shape{1, int64_t{1} << 31}, m.tensors[8].signature = {};
              }),
              HasSubstr("tensor 8 \"z\": shape [1,2147483648] has the size 2147483648"));
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.tensors[8].type.shape = Shape{INT32_MAX, INT32_MAX, INT32_MAX};
                m.tensors[8].signature = {};
              }),
              HasSubstr("tensor 8 \"z\""));
}

TEST(CircleVerifyTest, SignatureMustFollowTheShape) {
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.tensors[0].signature = {-1, 8};
              }),
              StartsWith("tensor 0 \"x\": shape_signature [-1,8] has 2 axes, shape [1,1,8] has 3"));
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.tensors[0].signature = {1, -1, 9};
              }),
              HasSubstr("shape_signature [1,-1,9] and shape [1,1,8] differ on axis 2"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[3].signature = {-1}; }),
              HasSubstr("tensor 3 \"gamma\": a constant with the unknown size in shape_signature [-1]"));
}

TEST(CircleVerifyTest, ConstantsMustHaveTheDeclaredType) {
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[3].type.shape = Shape{4}; }),
              StartsWith("tensor 3 \"gamma\": is declared int16[4], but its data is int16[3]"));
}

TEST(CircleVerifyTest, GridsMustBeCompleteAndSound) {
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[1].qparams.reset(); }),
              StartsWith("tensor 1 \"w\": uint4[3,8] without scale and zero point"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[1].qparams->zero_point.pop_back(); }),
              HasSubstr("3 scales and 2 zero points"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[1].qparams->axis = 1; }),
              HasSubstr("tensor 1 \"w\": 3 scales on axis 1, which has size 8 (shape [3,8])"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[1].qparams->axis = 2; }), HasSubstr("shape [3,8] has axes below 2"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[1].qparams->axis = -1; }), HasSubstr("3 scales without an axis"));
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.tensors[0].qparams = QParams{DType::kI16, 1, {1}, {0}};
              }),
              HasSubstr("1 scales on axis 1, which has an unknown size"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[1].qparams->zero_point[1] = 16; }),
              HasSubstr("zero point 1 is 16, outside 0..15 of uint4"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[2].qparams->dtype = DType::kI8; }),
              HasSubstr("tensor 2 \"y\": is int16[1,1,3], its grid is for int8"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.tensors[2].type.dtype = DType::kF32; }),
              HasSubstr("tensor 2 \"y\": scale and zero point on float32[1,1,3]"));
}

TEST(CircleVerifyTest, ComputedTensorsHaveNoInt64Codes) {
  const auto to_int64 = [](Tensor& tensor) { tensor.type.dtype = tensor.qparams->dtype = DType::kI64; };
  EXPECT_THAT(FaultAfter([&](Model& m) { to_int64(m.tensors[4]); }),
              StartsWith("tensor 4 \"n\": scale and zero point on computed int64[1,1,3]"));
  EXPECT_THAT(FaultAfter([&](Model& m) { to_int64(m.tensors[0]); }), HasSubstr("computed int64[1,1,8]"));
}

TEST(CircleVerifyTest, ScalesMustBeFiniteAndPositive) {
  for (const float scale :
       {0.0f, -1.0f, std::numeric_limits<float>::infinity(), std::numeric_limits<float>::quiet_NaN()})
    EXPECT_THAT(FaultAfter([&](Model& m) { m.tensors[1].qparams->scale[2] = scale; }),
                AllOf(StartsWith("tensor 1 \"w\": scale 2 is"), HasSubstr("finite and larger than 0")));
}

TEST(CircleVerifyTest, IndicesMustExist) {
  EXPECT_THAT(FaultAfter([](Model& m) { m.inputs.push_back(9); }), StartsWith("graph input 1: tensor 9 of 9"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.outputs[1] = -1; }), StartsWith("graph output 1: tensor -1 of 9"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.operators[0].inputs[2] = -2; }),
              StartsWith("operator 0 FULLY_CONNECTED: input 2 is tensor -2 of 9"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.operators[0].outputs.push_back(-1); }),
              StartsWith("operator 0 FULLY_CONNECTED: output 1 is tensor -1 of 9"));
}

TEST(CircleVerifyTest, EveryValueIsComputedOnceAndBeforeItIsUsed) {
  EXPECT_THAT(FaultAfter([](Model& m) { std::swap(m.operators[2], m.operators[3]); }),
              StartsWith("operator 2 MUL: input 0, tensor 6 \"r\", is used before it is computed"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.operators[3].outputs.push_back(4); }),
              StartsWith("operator 3 MUL: output 1, tensor 4 \"n\", is already the output of operator 1 RMS_NORM"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.operators[3].outputs.push_back(0); }), HasSubstr("is a graph input"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.operators[3].outputs.push_back(3); }), HasSubstr("is a constant"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.operators.pop_back(); }),
              StartsWith("graph output 0: tensor 8 \"z\" is never computed"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.inputs.push_back(3); }), HasSubstr("tensor 3 \"gamma\" is a constant"));
  EXPECT_THAT(FaultAfter([](Model& m) { m.inputs.push_back(0); }), HasSubstr("tensor 0 \"x\" is listed twice"));
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.operators.push_back({18, {}, {6, 7}, {}});
              }),
              StartsWith("operator 4 MUL: has no output"));
}

TEST(CircleVerifyTest, OptionsMustBeFieldsOfTheOperator) {
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.operators[3].options = {{"beta", 1.0}};
              }),
              StartsWith("operator 3 MUL: has no option \"beta\""));
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.operators[1].options = {{"epsilon", int64_t{1}}};
              }),
              HasSubstr("option \"epsilon\" holds a value that its field cannot store"));
  EXPECT_THAT(FaultAfter([](Model& m) {
                m.operators[3].options = {{"fused_activation_function", int64_t{300}}};
              }),
              HasSubstr("\"fused_activation_function\""));
  EXPECT_THAT(FaultAfter([](Model& m) { m.operators[3].code = 200; }),
              StartsWith("operator 3 OPERATOR_200: builtin operator 200 is not in the schema table"));
}

TEST(CircleVerifyTest, EveryFaultIsListed) {
  Model model = SmallModel();
  model.tensors[1].qparams->scale[0] = 0;
  model.operators[1].inputs[0] = 99;
  model.outputs[0] = 100;
  EXPECT_THAT(Verify(model), ElementsAre(HasSubstr("scale 0 is 0"), HasSubstr("tensor 99"), HasSubstr("tensor 100")));
}

}  // namespace
}  // namespace circlet::circle
