#include "circlet/quant/calibration.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>

#include "circle/writer.h"
#include "circlet/circle/model.h"
#include "circlet/exec/executor.h"
#include "circlet/quant/affine.h"
#include "error_text.h"
#include "ops/codes.h"

namespace circlet {
namespace {

using testing::HasSubstr;

// A table of bfloat16 values that repeat only after many rows.
Tensor Table(int64_t rows, int64_t width) {
  Tensor table({DType::kBF16, {rows, width}});
  uint32_t state = 1;
  for (uint16_t& value : table.As<uint16_t>()) {
    state = state * 1664525 + 1013904223;
    value = static_cast<uint16_t>(0x3c00 | (state >> 31 << 15) | (state >> 16 & 0x1ff));
  }
  return table;
}

// ids -> rows of the table, as an embedding is exported.
Graph GatherGraph(const Shape& table) {
  Graph graph;
  const ValueId ids = graph.AddInput("ids", {DType::kI64, {1, 2}});
  const ValueId weight = graph.AddWeight(
      "table.weight", table, {.name = "table.weight", .role = PointRole::kWeight, .kind = WeightKind::kEmbedding}, 0);
  const ValueId rows = graph.Add(Gather{}, {weight, ids}).front();
  graph.AddOutput("rows", graph.AddPoint({.name = "table.act_out"}, rows));
  return graph;
}

Calibration Frozen(ParameterStore params) {
  Calibration calibration(Recipe::Load("default"), kDefault);
  calibration.UseFrozen(std::move(params));
  return calibration;
}

PointParams OnGrid(const std::string& point, const QParams& grid) {
  PointParams params;
  params.spec.point = point;
  params.min = {-1}, params.max = {1};
  params.qparams = grid;
  return params;
}

Calibration CalibrationWith(const QParams& weight_grid) {
  ParameterStore params;
  params.Set(OnGrid("table.weight", weight_grid));
  params.Set(OnGrid("table.act_out", {DType::kI16, -1, {1 / 32767.0f}, {0}}));
  return Frozen(std::move(params));
}

QParams RowGrids(const Tensor& table, DType dtype) {
  const WeightRange range = RangeOfWeight(table, 0);
  return ComputeQParams(range.min, range.max, dtype, /*symmetric=*/false, 0);
}

TEST(CalibratedGridsTest, CodesOfALargeTableAreMadeOnlyWhenTheFileIsWritten) {
  for (const auto& [dtype, rows] : {std::pair{DType::kI8, 8200}, {DType::kI8, 40}, {DType::kU4, 16400}}) {
    const Tensor table = Table(rows, 2051);
    const QParams grid = RowGrids(table, dtype);
    const Calibration calibration = CalibrationWith(grid);
    const CalibratedGrids grids(calibration, [&](const std::string&) { return table; });
    const circle::Model model = circle::ToCircle(GatherGraph(table.GetShape()), grids);
    const circle::Tensor& weight = model.tensors[model.operators[0].inputs[0]];
    EXPECT_EQ(weight.lazy != nullptr, rows > 40);
    EXPECT_EQ(weight.data.Empty(), rows > 40);

    const std::vector<std::byte> file = circle::Serialize(model);
    const circle::Model again = circle::Parse(file, nullptr, "table.q.circle");
    const Tensor& found = again.tensors[again.operators[0].inputs[0]].data;
    const Tensor expected = QuantizeWeight(table, grid, calibration.GetDialect().rounding).codes;
    ASSERT_EQ(found.Type(), expected.Type());
    EXPECT_EQ(std::memcmp(found.Raw(), expected.Raw(), static_cast<size_t>(expected.Bytes())), 0);
  }
}

TEST(CalibratedGridsTest, MxPointsAreRefused) {
  PointParams mx = OnGrid("table.weight", {});
  mx.spec.kind = QuantKind::kMx;
  ParameterStore params;
  params.Set(mx);
  const Calibration calibration = Frozen(std::move(params));
  const Tensor table = Table(4, 3);
  const CalibratedGrids grids(calibration, [&](const std::string&) { return table; });
  EXPECT_THAT(ErrorText([&] { circle::ToCircle(GatherGraph(table.GetShape()), grids); }),
              HasSubstr("table.weight: MX formats are simulated only"));
}

// Attention over 70 keys of 2 heads and rotation of heads of 48 in 2 parts: no point has the width of its node's
// output.
Graph FusedGraph(int64_t keys) {
  Graph graph;
  const auto input = [&](const char* name, Shape shape) {
    return graph.AddInput(name, {DType::kF32, std::move(shape)});
  };
  const auto points = [](const std::string& prefix, int count) {
    std::vector<Point> all(static_cast<size_t>(count));
    for (size_t i = 0; i < all.size(); ++i) all[i].name = fmt::format("{}.{}", prefix, i);
    return all;
  };
  const ValueId rotated = graph.Add(Rope{.parts = 2, .negated_sin = false},
                                    {input("x", {1, 3, 2, 96}), input("cos", {1, 3, 96}), input("sin", {1, 3, 96})},
                                    points("rope", Rope::kPoints))[0];
  graph.AddOutput("rotated", rotated);
  const ValueId seen = graph.Add(Attention{.skip_masked = false},
                                 {input("q", {1, 2, 3, 40}), input("k", {1, 1, keys, 40}), input("v", {1, 1, keys, 40}),
                                  input("mask", {1, 1, 3, keys})},
                                 points("attention", Attention::kScale))[0];
  graph.AddOutput("seen", seen);
  return graph;
}

Calibration MxCalibration(const Graph& graph, const MxSpec& mx) {
  ParameterStore params;
  for (const Point& point : PointsOf(graph)) {
    PointParams all = OnGrid(point.name, {});
    all.spec.kind = QuantKind::kMx;
    all.spec.mx = mx;
    params.Set(all);
  }
  return Frozen(std::move(params));
}

std::map<std::string, Tensor> InputsOf(const Graph& graph) {
  std::map<std::string, Tensor> inputs;
  uint32_t state = 7;
  for (const ValueId id : graph.Inputs()) {
    Tensor tensor(graph.TypeOf(id));
    for (float& value : tensor.F32()) {
      state = state * 1664525 + 1013904223;
      value = std::ldexp(static_cast<float>(state >> 8) / (1 << 23) - 1.0f, static_cast<int>(state >> 3 & 3) - 2);
    }
    inputs.emplace(graph.At(id).name, tensor);
  }
  return inputs;
}

// The expansion has a tensor at each point, and blocks lie in its rows.
TEST(MxReadingTest, FusedKernelsRoundTheBlocksOfTheirExpansions) {
  const WeightSource none = [](const std::string& name) -> Tensor { throw Bug(name); };
  const Calibration calibration = MxCalibration(FusedGraph(70), {.format = MxFormat::kFp8E4M3});
  FakeQuantReading fused(calibration);  // for both lengths
  for (const int64_t keys : {70, 33}) {
    const Graph graph = FusedGraph(keys);
    FakeQuantReading alone(calibration);
    const auto found = Executor(graph, &fused).Run(InputsOf(graph), none);
    const auto expected = Executor(Expanded(graph), &alone).Run(InputsOf(graph), none);
    const auto plain = Executor(graph, nullptr).Run(InputsOf(graph), none);
    for (const auto& [name, tensor] : expected) {
      double worst = 0, moved = 0;
      for (int64_t i = 0; i < tensor.Elements(); ++i) {
        worst = std::max<double>(worst, std::abs(tensor.F32()[i] - found.at(name).F32()[i]));
        moved = std::max<double>(moved, std::abs(tensor.F32()[i] - plain.at(name).F32()[i]));
      }
      EXPECT_EQ(worst, 0) << name << " " << keys;
      EXPECT_GT(moved, 1e-3) << name << " " << keys;
    }
  }
}

TEST(MxReadingTest, AnAxisThatIsNotTheLastIsAnErrorThatNamesThePoint) {
  const Graph graph = FusedGraph(40);
  const Calibration calibration = MxCalibration(graph, {.axis = 1});
  FakeQuantReading reading(calibration);
  EXPECT_THAT(ErrorText([&] { Executor(graph, &reading); }),
              HasSubstr("rope.0: MX blocks of activations lie along the last axis, -1 or here 3; axis 1 is another"));
}

TEST(CalibratedGridsTest, AWeightThatNoFileCanStoreIsNamed) {
  const Tensor table = Table(4, 3);
  const Calibration calibration = CalibrationWith(RowGrids(table, DType::kU16));
  const CalibratedGrids grids(calibration, [&](const std::string&) { return table; });
  EXPECT_THAT(ErrorText([&] { circle::ToCircle(GatherGraph(table.GetShape()), grids); }),
              HasSubstr("table.weight: weights cannot be stored as uint16"));
}

// Codes of every type come as int8 codes or as values; either way they are the values of the grid.
TEST(RoundedWeightsTest, AreTheValuesOfTheirGrids) {
  const Tensor table = Table(12, 33);
  for (const DType dtype : {DType::kI4, DType::kU4, DType::kI8, DType::kU8, DType::kI16}) {
    const QParams grid = RowGrids(table, dtype);
    Calibration calibration = CalibrationWith(grid);
    const WeightSource rounded = RoundedWeights(calibration, [&](const std::string&) { return table; });
    const RoundedWeights with_codes(
        calibration, [&](const std::string&) { return table; }, RoundedWeights::Use::kProductsAndFiles);
    Tensor whole = rounded("table.weight"), rows = calibration.RoundedRows("table.weight", table, 0),
           beside = with_codes("table.weight");
    const Tensor expected = FakeQuantizeWeight(table, grid, calibration.GetDialect().rounding);
    for (Tensor* tensor : {&whole, &rows, &beside}) {
      if (tensor->GetDType() == DType::kF32) {
        EXPECT_TRUE(std::ranges::equal(tensor->F32(), expected.F32())) << Name(dtype);
        continue;
      }
      EXPECT_NE(dtype, DType::kI16);
      ASSERT_EQ(tensor->Type(), (TensorType{DType::kI8, table.GetShape()})) << Name(dtype);
      const QParams& own = *tensor->Grid();
      for (int64_t i = 0; i < table.Elements(); ++i) {
        const auto row = static_cast<size_t>(i / 33);
        ASSERT_EQ(static_cast<float>(tensor->As<int8_t>()[i] - own.zero_point[row]) * own.scale[row], expected.F32()[i])
            << Name(dtype) << " " << i;
      }
    }
  }
}

TEST(RoundedWeightsTest, ProductsAndFilesTakeTheSameCodesMadeOnce) {
  const Tensor table = Table(12, 33);
  const Calibration calibration = CalibrationWith(RowGrids(table, DType::kI8));
  int asked = 0;
  const WeightSource stored = [&](const std::string&) {
    ++asked;
    return table;
  };
  using Use = RoundedWeights::Use;
  const RoundedWeights rounded(calibration, stored, Use::kProductsAndFiles);
  EXPECT_FALSE(rounded.HoldsCodes("table.weight"));
  const Tensor operand = rounded("table.weight"), codes = rounded.Codes("table.weight");
  EXPECT_TRUE(rounded.HoldsCodes("table.weight"));
  const circle::Model model = circle::ToCircle(GatherGraph(table.GetShape()), CalibratedGrids(calibration, rounded));
  EXPECT_EQ(model.tensors[model.operators[0].inputs[0]].data.Raw(), codes.Raw());
  if (operand.GetDType() == DType::kI8) {
    EXPECT_EQ(operand.Raw(), codes.Raw());
  }
  EXPECT_EQ(asked, 1);

  // Codes that lay elsewhere in between are taken as they are.
  const RoundedWeights again(calibration, stored, Use::kProductsAndFiles, [&](const std::string&) { return codes; });
  EXPECT_TRUE(again.HoldsCodes("table.weight"));
  EXPECT_EQ(again.Codes("table.weight").Raw(), codes.Raw());
  again("table.weight");
  EXPECT_EQ(asked, 1);
}

// What a table's rows and a head's slices are, whether codes exist already or not.
TEST(RoundedWeightsTest, RowsAndSlicesAreThoseOfTheWhole) {
  const Tensor table = Table(12, 33);
  const std::vector<int64_t> ids{11, 0, 6, 6};
  for (const DType dtype : {DType::kI4, DType::kU4, DType::kI8, DType::kU8, DType::kI16}) {
    for (const bool by_row : {true, false}) {
      const QParams grid = by_row ? RowGrids(table, dtype) : QParams{dtype, -1, {1 / 64.0f}, {0}};
      const Calibration calibration = CalibrationWith(grid);
      const Tensor expected = FakeQuantizeWeight(table, grid, calibration.GetDialect().rounding);
      const WeightSource stored = [&](const std::string&) { return table; };
      const RoundedWeights rounding(calibration, stored),
          held(calibration, stored, RoundedWeights::Use::kProductsAndFiles);
      held.Codes("table.weight");
      for (const RoundedWeights* weights : {&rounding, &held}) {
        const Tensor rows = weights->Rows("table.weight", ids);
        ASSERT_EQ(rows.GetShape(), (Shape{4, 33}));
        for (size_t i = 0; i < ids.size(); ++i)
          for (int64_t j = 0; j < 33; ++j)
            ASSERT_EQ(rows.F32()[static_cast<int64_t>(i) * 33 + j], expected.F32()[ids[i] * 33 + j]) << Name(dtype);
        // Rows 2 to 5: packed codes begin in the middle of the table, at a whole byte.
        const Tensor slice = weights->Slice("table.weight", 2, 6);
        Tensor values = slice;
        if (slice.GetDType() != DType::kF32) {
          values = Tensor(TensorType{DType::kF32, slice.GetShape()});
          Dequantize(slice, *slice.Grid(), 0, values.F32());
        }
        EXPECT_TRUE(std::ranges::equal(values.F32(), expected.F32().subspan(2 * 33, 4 * 33))) << Name(dtype);
      }
    }
  }
}

TEST(RoundedWeightsTest, RowsAndSlicesAreReadFromCodesThatExist) {
  const Tensor table = Table(12, 33);
  const Calibration calibration = CalibrationWith({DType::kI8, -1, {0.5f}, {0}});
  const Tensor codes({DType::kI8, table.GetShape()});
  std::ranges::fill(codes.As<int8_t>(), int8_t{6});  // not what rounding the table gives
  const RoundedWeights weights(
      calibration, [&](const std::string&) { return table; }, RoundedWeights::Use::kProducts,
      [&](const std::string&) { return codes; });
  const std::vector<int64_t> ids{3};
  EXPECT_EQ(weights.Rows("table.weight", ids).F32()[32], 3.0f);
  const Tensor slice = weights.Slice("table.weight", 4, 8);
  EXPECT_EQ(slice.GetDType() == DType::kF32 ? slice.F32()[0] : 0.5f * slice.As<int8_t>()[0], 3.0f);
}

TEST(RoundedWeightsTest, AnIdOutsideTheTableIsNamed) {
  const Tensor table = Table(5, 4);
  const Calibration calibration = CalibrationWith(RowGrids(table, DType::kU8));
  const RoundedWeights weights(calibration, [&](const std::string&) { return table; });
  const std::vector<int64_t> ids{4, 5};
  const std::string text = "id 5 at position 1 is outside the table of 5 rows; ids must lie in [0, 4]";
  EXPECT_THAT(ErrorText([&] { weights.Rows("table.weight", ids); }), HasSubstr(text));
  weights.Codes("table.weight");
  EXPECT_THAT(ErrorText([&] { weights.Rows("table.weight", ids); }), HasSubstr(text));
}

TEST(RoundedWeightsTest, ANaNUnderGridsFromAFileIsNamed) {
  const Tensor table = Table(12, 33);
  const Calibration calibration = CalibrationWith(RowGrids(table, DType::kU8));
  table.As<uint16_t>()[5 * 33 + 7] = 0x7fc0;  // NaN
  EXPECT_THAT(ErrorText([&] { calibration.RoundedRows("table.weight", table, 0); }),
              HasSubstr("table.weight: row 5, column 7 of the weight is nan"));
}

}  // namespace
}  // namespace circlet
