// Shape rules and readers: what they refuse, and with which words.

#include <gmock/gmock.h>

#include "circlet/ops/ops.h"
#include "error_text.h"
#include "ops/test_values.h"

namespace circlet {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;

TensorType F32(Shape shape) { return {DType::kF32, std::move(shape)}; }
TensorType I64(Shape shape) { return {DType::kI64, std::move(shape)}; }

struct Refused {
  Op op;
  std::vector<TensorType> in;
  std::string place_and_values, remedy;
};

TEST(ShapeRuleTest, EachRefusalNamesOperatorShapesAndRule) {
  const std::vector<Refused> cases{
      {Add{}, {F32({2, 3}), F32({2, 4})}, "add: shapes [2,3] and [2,4]", "must be equal or one of them 1"},
      {Add{}, {F32({2})}, "add: inputs are (float32[2])", "takes 2 inputs, not 1"},
      {Mul{}, {F32({2}), I64({2})}, "mul: inputs are (float32[2], int64[2])", "must be float32"},
      {Gelu{}, {I64({2})}, "gelu: inputs are (int64[2])", "must be float32"},
      {FullyConnected{},
       {F32({1, 5}), F32({3, 4})},
       "fully_connected: inputs are (float32[1,5], float32[3,4])",
       "W must be [N,K]"},
      {FullyConnected{}, {F32({1, 4}), F32({3, 4}), F32({4})}, "float32[4]", "the bias must be [3]"},
      {BatchMatMul{},
       {F32({2, 3, 4}), F32({2, 3, 4})},
       "batch_matmul: inputs are",
       "a must be [..,M,K] and b [..,K,N]"},
      {BatchMatMul{.transpose_b = true}, {F32({2, 3, 4}), F32({2, 3, 5})}, "batch_matmul", "b [..,N,K]"},
      {BatchMatMul{}, {F32({2, 3, 4}), F32({3, 4, 3})}, "batch_matmul: shapes [2] and [3]", "must be equal"},
      {RmsNorm{},
       {F32({1, 8, 256}), F32({512})},
       "rms_norm: inputs are (float32[1,8,256], float32[512])",
       "gamma must be [256]"},
      {Softmax{}, {F32({})}, "softmax: inputs are (float32[])", "at least one axis"},
      {Reshape{{3, 4}}, {F32({2, 5})}, "reshape: inputs are (float32[2,5]); [3,4] has 12 elements", "it must have 10"},
      {Transpose{{0, 0}}, {F32({2, 5})}, "transpose: inputs are (float32[2,5]); perm [0,0]", "each of the 2 axes once"},
      {Transpose{{1, 0}}, {F32({2, 5, 3})}, "perm [1,0]", "each of the 3 axes once"},
      {Transpose{{}}, {F32({2})}, "perm has 0 axes", "must have 1"},
      {Slice{{0, 2}, {1, 9}}, {F32({2, 5})}, "axis 1: [2, 9)", "must lie in [0, 5)"},
      {Slice{{0}, {1}}, {F32({2, 5})}, "begin has 1 and end 1 entries", "both must have 2"},
      {Split{.axis = 1, .parts = 2}, {F32({2, 5})}, "axis 1 of size 5", "2 equal parts"},
      {Split{.axis = 2, .parts = 2}, {F32({2, 5})}, "axis 2", "must lie in [-2, 1]"},
      {SplitV{.axis = 1, .sizes = {2, 2}}, {F32({2, 5})}, "sum to 4 but axis 1 has size 5", "must be equal"},
      {SplitV{.axis = 1, .sizes = {-1, 6}}, {F32({2, 5})}, "part 0 has size -1", "must not be negative"},
      {Concat{.axis = 0},
       {F32({2, 5}), F32({2, 4})},
       "concat: inputs are (float32[2,5], float32[2,4])",
       "but for axis 0, in shape"},
      {Concat{.axis = 0}, {F32({2}), I64({2})}, "int64[2]", "all must agree in type"},
      {Concat{}, {}, "concat", "at least one input"},
      {BroadcastTo{{3, 1}},
       {F32({3, 2})},
       "broadcast_to: inputs are (float32[3,2])",
       "broadcast to [3,1] and not beyond"},
      {Gather{}, {F32({5}), I64({2})}, "gather: inputs are (float32[5], int64[2])", "table must be [rows, width]"},
      {Gather{}, {F32({5, 2}), F32({2})}, "gather", "ids must be int32 or int64"},
      {Rope{}, {F32({1, 4, 2, 8}), F32({1, 4, 4}), F32({1, 4, 8})}, "rope: inputs are", "cos and sin must be [1,4,8]"},
      {Rope{.parts = 2}, {F32({1, 4, 2, 6}), F32({1, 4, 6}), F32({1, 4, 6})}, "h = 6", "2 parts of two halves"},
      {Rope{}, {F32({4, 2, 6}), F32({1, 4, 6}), F32({1, 4, 6})}, "float32[4,2,6]", "x must be [1,S,H,h]"},
      {Attention{},
       {F32({1, 4, 5, 8}), F32({1, 3, 5, 8}), F32({1, 3, 5, 8}), F32({1, 5, 5})},
       "attention: inputs are",
       "4 query heads do not share 3 key heads evenly"},
      {Attention{},
       {F32({1, 4, 5, 8}), F32({1, 2, 7, 8}), F32({1, 2, 7, 8}), F32({1, 7, 5})},
       "float32[1,7,5]",
       "the mask must be [1,1,5,7] or [1,5,7]"},
      {Attention{},
       {F32({1, 4, 5, 8}), F32({1, 2, 7, 8}), F32({1, 2, 6, 8}), F32({1, 5, 7})},
       "float32[1,2,6,8]",
       "k and v [1,KV,T,h]"},
      {Attention{},
       {F32({1, 4, 5, 8}), F32({1, 2, 7, 6}), F32({1, 2, 7, 6}), F32({1, 5, 7})},
       "float32[1,4,5,8], float32[1,2,7,6]",
       "k and v [1,KV,T,h]"},
      {Attention{},
       {F32({1, 4, 5, 8}), F32({1, 2, 7, 8}), F32({1, 2, 7, 8}), F32({1, 5, 7}), F32({1, 2, 3, 8})},
       "attention: inputs are",
       "perhaps k and v of the past"},
      {Attention{},
       {F32({1, 4, 5, 8}), F32({1, 2, 7, 8}), F32({1, 2, 7, 8}), F32({1, 5, 7}), F32({1, 1, 3, 8}), F32({1, 1, 3, 8})},
       "float32[1,1,3,8]",
       "k and v of the past must be [1,2,P,8]"},
      {Attention{},
       {F32({1, 4, 5, 8}), F32({1, 2, 7, 8}), F32({1, 2, 7, 8}), F32({1, 5, 7}), F32({1, 2, 3, 8}), F32({1, 2, 3, 8})},
       "float32[1,5,7]",
       "the mask must be [1,1,5,10] or [1,5,10]"},
      {GatedLinear{}, {F32({1, 4, 6}), F32({1, 4, 8}), F32({5, 8})}, "gated_linear", "a must be float32[1,4,5]"},
      {QuantPoint{}, {I64({3})}, "point: inputs are (int64[3])", "must be float32"},
  };
  for (const Refused& c : cases)
    EXPECT_THAT(ErrorText([&] { c.op.Infer(c.in); }), AllOf(HasSubstr(c.place_and_values), HasSubstr(c.remedy)));
}

TEST(ShapeRuleTest, GatherNamesTheIdOutsideItsTable) {
  const int64_t ids[] = {0, 4, 5, -1};
  const std::vector<Tensor> in{NormalTensor({5, 2}, 1), Tensor::Of<int64_t>({4}, ids)};
  const std::vector<Tensor> out{Tensor(F32({4, 2}))};
  EXPECT_THAT(
      ErrorText([&] { Gather{}.Eval({.in = in, .out = out}); }),
      HasSubstr("id 5 at position 2 is outside the table of 5 rows; ids must lie in [0, 4]: check the tokenizer"));
}

TEST(ShapeRuleTest, PackedTypesAreNotMoved) {
  const std::vector<Tensor> in{Tensor({DType::kI4, {2, 2}})}, out{Tensor({DType::kI4, {2, 2}})};
  EXPECT_THAT(ErrorText([&] {
                Transpose{{1, 0}}.Eval({.in = in, .out = out});
              }),
              AllOf(HasSubstr("transpose: int4[2,2]"), HasSubstr("types of whole bytes")));
}

// ---- Readers ------------------------------------------------------------------------------------------------------

// An operator of a file: float32 x of a shape, then constants.
CircleNode FileNode(Shape x, std::vector<std::vector<int32_t>> constants, std::vector<CircleOption> options = {}) {
  CircleNode node{.options = std::move(options), .types = {F32(std::move(x))}, .constants = {Tensor()}};
  for (const std::vector<int32_t>& values : constants) {
    node.constants.push_back(Tensor::Of<int32_t>({static_cast<int64_t>(values.size())}, values));
    node.types.emplace_back(node.constants.back().Type());
  }
  return node;
}

CircleNode Swapped(CircleNode node) {  // SPLIT has its axis first
  std::swap(node.types[0], node.types[1]);
  std::swap(node.constants[0], node.constants[1]);
  return node;
}

TEST(CircleFormTest, ReshapeTakesItsInputBeforeItsOption) {
  const std::vector<CircleOption> option{{"new_shape", std::vector<int32_t>{6, -1}}};
  EXPECT_EQ(Reshape::Parse(FileNode({4, 6}, {}, option)).op.shape, (Shape{6, 4}));
  EXPECT_EQ(Reshape::Parse(FileNode({4, 6}, {{2, -1, 3}}, option)).op.shape, (Shape{2, 4, 3}));
  EXPECT_THAT(ErrorText([&] {
                Reshape::Parse(FileNode({4, 6}, {{7, -1}}));
              }),
              AllOf(HasSubstr("reshape"), HasSubstr("24 elements over 7"), HasSubstr("must divide")));
  EXPECT_THAT(ErrorText([&] { Reshape::Parse(FileNode({4, 6}, {{-1, -1}})); }), HasSubstr("more than one"));
}

TEST(CircleFormTest, SlicesResolveNegativeBoundsAndMasks) {
  const Slice plain = Slice::Parse(FileNode({4, 6}, {{-3, 1}, {9, -1}, {1, 1}})).op;
  EXPECT_TRUE(plain == (Slice{{1, 1}, {4, 5}}));
  const Slice masked =
      Slice::Parse(FileNode({4, 6}, {{2, 2}, {3, 3}, {1, 1}}, {{"begin_mask", int64_t{1}}, {"end_mask", int64_t{2}}}))
          .op;
  EXPECT_TRUE(masked == (Slice{{0, 2}, {3, 6}}));
  EXPECT_THAT(ErrorText([&] {
                Slice::Parse(FileNode({4}, {{0}, {4}, {2}}));
              }),
              AllOf(HasSubstr("slice: a stride is 2"), HasSubstr("only 1")));
  EXPECT_THAT(ErrorText([&] {
                Slice::Parse(FileNode({4}, {{0}, {4}, {1}}, {{"shrink_axis_mask", int64_t{1}}}));
              }),
              AllOf(HasSubstr("slice: option shrink_axis_mask is 1"), HasSubstr("only 0")));
  EXPECT_THAT(ErrorText([&] { Slice::Parse(FileNode({4, 6}, {{0}, {4}, {1}})); }), HasSubstr("[4,6] needs 2"));
}

TEST(CircleFormTest, SplitsMustHaveTheirOutputs) {
  CircleNode node = Swapped(FileNode({4, 6}, {{1}}, {{"num_splits", int64_t{3}}}));
  node.outputs = {F32({4, 2}), F32({4, 2}), F32({4, 2})};
  EXPECT_TRUE(Split::Parse(node).op == (Split{.axis = 1, .parts = 3}));
  node.outputs.pop_back();
  EXPECT_THAT(ErrorText([&] { Split::Parse(node); }),
              AllOf(HasSubstr("split: num_splits is 3"), HasSubstr("2 outputs"), HasSubstr("must be equal")));

  CircleNode sized = FileNode({4, 6}, {{1, -1}, {-1}}, {{"num_splits", int64_t{2}}});
  sized.outputs.resize(2);
  EXPECT_TRUE(SplitV::Parse(sized).op == (SplitV{.axis = -1, .sizes = {1, 5}}));
}

TEST(CircleFormTest, OptionsThatCannotBeExecutedAreRefused) {
  CircleNode two = FileNode({4, 6}, {}, {{"fused_activation_function", int64_t{1}}});
  two.types.push_back(F32({4, 6}));
  two.constants.emplace_back();
  const auto relu = AllOf(HasSubstr("option fused_activation_function is 1"), HasSubstr("only 0 can be executed"));
  EXPECT_THAT(ErrorText([&] { Add::Parse(two); }), relu);
  EXPECT_THAT(ErrorText([&] { Concat::Parse(two); }), relu);
  EXPECT_THAT(ErrorText([&] { FullyConnected::Parse(two); }), relu);
  two.options = {{"weights_format", int64_t{127}}};
  EXPECT_THAT(ErrorText([&] { FullyConnected::Parse(two); }), HasSubstr("option weights_format is 127"));
  two.options = {{"adjoint_lhs", int64_t{1}}};
  EXPECT_THAT(ErrorText([&] { BatchMatMul::Parse(two); }), HasSubstr("option adjoint_lhs is 1"));
  two.options = {{"batch_dims", int64_t{1}}};
  EXPECT_THAT(ErrorText([&] { Gather::Parse(two); }), HasSubstr("option batch_dims is 1"));
  EXPECT_THAT(ErrorText([&] { Gelu::Parse(FileNode({4}, {})); }), HasSubstr("option approximate is 0; only 1"));
  EXPECT_THAT(ErrorText([&] { Softmax::Parse(FileNode({4}, {}, {{"beta", 0.5}})); }), HasSubstr("option beta is 0.5"));
}

TEST(CircleFormTest, FullyConnectedMayDropDimensionsOnlyWhereNoneAreLost) {
  CircleNode node = FileNode({4, 6}, {});
  node.types.push_back(F32({2, 6}));
  node.constants.emplace_back();
  EXPECT_EQ(FullyConnected::Parse(node).inputs, (std::vector<int>{0, 1}));
  node.types[0] = F32({1, 4, 6});
  EXPECT_THAT(ErrorText([&] { FullyConnected::Parse(node); }), HasSubstr("option keep_num_dims is 0; only 1"));
}

TEST(CircleFormTest, ConstantsThatAreMissingOrComputedAreNamed) {
  EXPECT_THAT(ErrorText([&] { Transpose::Parse(FileNode({4, 6}, {})); }), HasSubstr("input 1 is absent"));
  CircleNode computed = FileNode({4, 6}, {{1, 0}});
  computed.constants[1] = Tensor();
  EXPECT_THAT(ErrorText([&] { Transpose::Parse(computed); }),
              AllOf(HasSubstr("input 1 (int32[2]) is computed"), HasSubstr("must be a constant")));
  CircleNode real = FileNode({4, 6}, {{1, 0}});
  real.constants[1] = NormalTensor({2}, 1);
  EXPECT_THAT(ErrorText([&] { Transpose::Parse(real); }), HasSubstr("input 1 is float32[2]; it must be an int32"));
  EXPECT_THAT(ErrorText([&] { Add::Parse(FileNode({4}, {})); }),
              HasSubstr("add: input 1 is absent; the operator takes 2"));
  CircleNode wrong = FileNode({4}, {}, {{"beta", int64_t{1}}});
  EXPECT_THAT(ErrorText([&] { Softmax::Parse(wrong); }), HasSubstr("option beta is not a real number"));
}

TEST(CircleFormTest, WideConstantsMustFitTheFormat) {
  CircleNode node = FileNode({4, 6}, {{1, 0}});
  const int64_t values[] = {1, int64_t{1} << 40};
  node.constants[1] = Tensor::Of<int64_t>({2}, values);
  EXPECT_THAT(ErrorText([&] { Transpose::Parse(node); }), HasSubstr("1099511627776 does not fit int32"));
}

TEST(CircleFormTest, OptionsAreWrittenAsTheReferenceWritesThem) {
  const std::vector<TensorType> two{F32({1, 4}), F32({3, 4})};
  EXPECT_EQ(Add{}.Emit(two, two).options, (std::vector<CircleOption>{{"pot_scale_int16", int64_t{0}}}));
  EXPECT_EQ(Sub{}.Emit(two, two).options, (std::vector<CircleOption>{{"pot_scale_int16", int64_t{0}}}));
  EXPECT_TRUE(Mul{}.Emit(two, two).options.empty());
  EXPECT_EQ(Gelu{}.Emit(two, two).options, (std::vector<CircleOption>{{"approximate", int64_t{1}}}));
  EXPECT_EQ(Softmax{}.Emit(two, two).options, (std::vector<CircleOption>{{"beta", 1.0}}));
  EXPECT_EQ((Concat{.axis = -1}.Emit(two, two).options), (std::vector<CircleOption>{{"axis", int64_t{-1}}}));
  EXPECT_EQ((RmsNorm{.eps = 1e-6f}.Emit(two, two).options), (std::vector<CircleOption>{{"epsilon", double{1e-6f}}}));
  const CircleOp linear = FullyConnected{}.Emit(two, two);
  EXPECT_EQ(linear.options, (std::vector<CircleOption>{{"keep_num_dims", int64_t{1}}}));
  ASSERT_EQ(linear.inputs.size(), 3u);
  EXPECT_EQ(linear.inputs[2].kind, CircleArg::Kind::kAbsent);
  const CircleOp split = Split{.axis = -1, .parts = 2}.Emit(two, two);
  EXPECT_EQ(split.options, (std::vector<CircleOption>{{"num_splits", int64_t{2}}}));
  EXPECT_EQ(split.inputs[0].kind, CircleArg::Kind::kInt);
  EXPECT_EQ(split.inputs[0].ints, std::vector<int32_t>{-1});
  const CircleOp slice = Slice{{0, 1}, {1, 2}}.Emit(two, two);
  EXPECT_EQ(slice.inputs[3].ints, (std::vector<int32_t>{1, 1}));
}

// ---- Traits -------------------------------------------------------------------------------------------------------

TEST(OpTest, TraitsComeFromTheOperators) {
  EXPECT_EQ(Op(Rope{}).Name(), "rope");
  EXPECT_TRUE(Op(Reshape{}).IsView());
  EXPECT_FALSE(Op(Transpose{}).IsView());
  EXPECT_TRUE(Op(Reshape{}).KeepsValues());
  EXPECT_TRUE(Op(Gather{}).KeepsValues());
  EXPECT_FALSE(Op(Requantize{}).KeepsValues());
  EXPECT_TRUE(Op(Add{}).InPlace());
  EXPECT_FALSE(Op(RmsNorm{}).InPlace());
  EXPECT_TRUE(Op(Attention{}).Fused());
  EXPECT_FALSE(Op(Softmax{}).Fused());
  EXPECT_TRUE(Op(QuantPoint{}).IsPoint());
  EXPECT_FALSE(Op(Requantize{}).IsPoint());
  EXPECT_EQ(Op(FullyConnected{}).WeightInput(), 1);
  EXPECT_EQ(Op(GatedLinear{}).WeightInput(), 2);
  EXPECT_TRUE(Op(Attention{}).TakesCodes(4));
  EXPECT_FALSE(Op(Attention{}).TakesCodes(0));
  EXPECT_EQ(Op(FullyConnected{}).TableInput(), -1);
  EXPECT_EQ(Op(Gather{}).TableInput(), 0);
  EXPECT_EQ(Op(BatchMatMul{}).WeightInput(), -1);
}

TEST(OpTest, ProductsOfEachOperator) {
  using Products = std::vector<MatrixProduct>;
  const std::vector<TensorType> linear{F32({1, 5, 8}), F32({6, 8}), F32({6})};
  EXPECT_EQ(Op(FullyConnected{}).Products(linear), (Products{{.m = 5, .n = 6, .k = 8}}));
  EXPECT_EQ(Op(FullyConnected{}).Products(linear)[0].Flops(), 2 * 5 * 6 * 8);
  const std::vector<TensorType> matrices{F32({3, 5, 8}), F32({1, 8, 7})}, transposed{F32({3, 5, 8}), F32({1, 7, 8})};
  EXPECT_EQ(Op(BatchMatMul{}).Products(matrices),
            (Products{{.m = 5, .n = 7, .k = 8, .transposed = false, .count = 3}}));
  EXPECT_EQ(Op(BatchMatMul{}).Products(matrices)[0].Flops(), 3 * 2 * 5 * 7 * 8);
  EXPECT_EQ(Op(BatchMatMul{.transpose_b = true}).Products(transposed),
            (Products{{.m = 5, .n = 7, .k = 8, .count = 3}}));
  const std::vector<TensorType> heads{F32({1, 4, 5, 8}), F32({1, 2, 7, 8}), F32({1, 2, 7, 8}), F32({1, 5, 7})};
  EXPECT_EQ(Op(Attention{}).Products(heads), (Products{{.m = 5, .n = 7, .k = 8, .count = 4},
                                                       {.m = 5, .n = 8, .k = 7, .transposed = false, .count = 4}}));
  EXPECT_EQ(Op(GatedLinear{}).Products(std::vector<TensorType>{F32({1, 5, 6}), linear[0], linear[1]}),
            Op(FullyConnected{}).Products(linear));
  EXPECT_TRUE(Op(Softmax{}).Products(linear).empty());
}

}  // namespace
}  // namespace circlet
