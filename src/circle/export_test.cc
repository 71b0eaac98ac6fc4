// Between graphs and files: which grids export refuses, and how a file's large constants are executed.

#include "circlet/circle/export.h"

#include <gmock/gmock.h>

#include <limits>

#include "circle/test_model.h"
#include "error_text.h"

namespace circlet::circle {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

// ---- Grids --------------------------------------------------------------------------------------------------------

// Every point on one grid.
struct OneGrid final : GridSource {
  explicit OneGrid(QParams given) : grid(std::move(given)) {}
  const QParams* Find(const Point&) const override { return &grid; }
  circlet::Tensor WeightCodes(const std::string&, const QParams&) const override { return {}; }
  std::shared_ptr<const LazyConstant> LazyWeightCodes(const std::string&, const QParams&) const override { return {}; }
  circlet::Tensor WeightFloat(const std::string&) const override { return {}; }
  circlet::Tensor Quantize(const circlet::Tensor& values, const QParams&) const override { return values; }
  QParams grid;
};

TEST(CircleExportTest, AGridThatNoFileCanHoldIsNamedByItsPoint) {
  Graph graph;
  const ValueId x = graph.AddInput("x", {DType::kF32, {1, 2}});
  graph.AddOutput("y", graph.AddPoint({.name = "layers.0.act_out"}, graph.Add(Gelu{}, {x}).front()));
  const auto refused = [&](const QParams& grid) { return ErrorText([&] { ToCircle(graph, OneGrid(grid)); }); };
  const float infinity = std::numeric_limits<float>::infinity();
  EXPECT_THAT(refused({DType::kI16, -1, {infinity}, {0}}),
              AllOf(StartsWith("layers.0.act_out: "), HasSubstr("scale 0 is inf"), HasSubstr("calibrate again")));
  EXPECT_THAT(refused({DType::kU8, -1, {0.5f}, {256}}), HasSubstr("zero point 0 is 256, outside 0..255 of uint8"));
  EXPECT_THAT(refused({DType::kU32, -1, {0.5f}, {0}}), HasSubstr("codes of uint32"));
  EXPECT_EQ(ToCircle(graph, OneGrid({DType::kU8, -1, {0.5f}, {255}})).tensors.size(), 2u);
}

// ---- Large constants ----------------------------------------------------------------------------------------------

circlet::Tensor Counting(DType dtype, Shape shape) {
  circlet::Tensor codes(TensorType{dtype, std::move(shape)});
  for (int64_t i = 0; i < codes.Bytes(); ++i) codes.Raw()[i] = static_cast<std::byte>(i * 29 + 5);
  return codes;
}

// y = GATHER(table, ids) W^T
Model EmbeddingAndHead(const circlet::Tensor& table, const QParams& table_grid, const circlet::Tensor& weight,
                       const QParams& weight_grid) {
  const int64_t width = table.GetShape()[1], n = weight.GetShape()[0];
  Model model;
  model.tensors = {{"ids", {DType::kI64, {1, 3}}},
                   ConstantTensor("table", table, table_grid),
                   Activation("rows", {DType::kI16, {1, 3, width}}, 0.01f),
                   ConstantTensor("w", weight, weight_grid),
                   Activation("y", {DType::kI16, {1, 3, n}}, 0.02f)};
  model.inputs = {0};
  model.outputs = {4};
  model.operators = {{36, {{"axis", int64_t{0}}}, {1, 0}, {2}}, {9, {{"keep_num_dims", int64_t{1}}}, {2, 3, -1}, {4}}};
  return model;
}

QParams RowGrids(DType dtype, int64_t rows) {
  QParams grid{.dtype = dtype, .axis = 0};
  for (int64_t r = 0; r < rows; ++r) {
    grid.scale.push_back(0.001f * static_cast<float>(1 + r % 7));
    grid.zero_point.push_back(static_cast<int32_t>(r % 3));
  }
  return grid;
}

TEST(CircleExportTest, TablesAndWeightsThatStayCodesComputeWhatTheirValuesCompute) {
  for (const auto& [table_type, weight_type] : {std::pair{DType::kU4, DType::kI16}, {DType::kI16, DType::kI4}}) {
    const circlet::Tensor table = Counting(table_type, {50, 15}), weight = Counting(weight_type, {21, 15});
    const Model model = EmbeddingAndHead(table, RowGrids(table_type, 50), weight, RowGrids(weight_type, 21));
    EXPECT_THAT(Verify(model), ::testing::IsEmpty());
    const FileGraph file = ToGraph(model);

    const std::vector<int64_t> ids{49, 7, 0};
    const std::map<std::string, circlet::Tensor> inputs{{"ids", circlet::Tensor::Of<int64_t>({1, 3}, ids)}};
    const circlet::Tensor found = RunModel(model, inputs).at("y");

    Graph plain;
    const ValueId id = plain.AddInput("ids", {DType::kI64, {1, 3}});
    const ValueId t = plain.AddConstant(DequantizedConstant(model.tensors[1]));
    const ValueId w = plain.AddConstant(DequantizedConstant(model.tensors[3]));
    const ValueId rows = plain.AddPoint({.name = "rows"}, plain.Add(Gather{}, {t, id}).front());
    plain.AddOutput("y", plain.AddPoint({.name = "y"}, plain.Add(FullyConnected{}, {rows, w}).front()));
    FileReading reading(file.grids);
    const circlet::Tensor expected = Executor(plain, &reading).Run(inputs, nullptr).at("y");
    ASSERT_EQ(found.Type(), expected.Type());
    EXPECT_TRUE(std::ranges::equal(found.F32(), expected.F32()));
    EXPECT_NE(found.F32()[0], 0);
  }
}

}  // namespace
}  // namespace circlet::circle
