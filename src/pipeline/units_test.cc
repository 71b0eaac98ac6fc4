#include "pipeline/units.h"

#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "circlet/quant/affine.h"
#include "error_text.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using ::testing::HasSubstr;

// More than the 16 MiB of codes that may stand in memory.
constexpr int64_t kRows = 8200, kWidth = 2051;
constexpr char kTable[] = "table.weight";

Graph Lookup() {
  Graph graph;
  const ValueId ids = graph.AddInput("ids", {DType::kI64, {1, 2}});
  const ValueId weight = graph.AddWeight(
      kTable, {kRows, kWidth}, {.name = kTable, .role = PointRole::kWeight, .kind = WeightKind::kEmbedding}, 0);
  graph.AddOutput("rows", graph.AddPoint({.name = "table.act_out"}, graph.Add(Gather{}, {weight, ids}).front()));
  return graph;
}

class WrittenTable : public testing::Test {
 protected:
  WrittenTable() : table_({DType::kF32, {kRows, kWidth}}), calibration_(Recipe::Load("default"), kDefault) {
    uint32_t state = 1;
    for (float& value : table_.F32()) {
      state = state * 1664525 + 1013904223;
      value = static_cast<float>(static_cast<int32_t>(state)) * 0x1p-31f;
    }
    ParameterStore params;
    for (const auto& [name, dtype, scale] :
         {std::tuple{kTable, DType::kI8, 1 / 127.0f}, {"table.act_out", DType::kI16, 1 / 32767.0f}}) {
      PointParams point{.min = {-1}, .max = {1}, .qparams = {dtype, -1, {scale}, {0}}};
      point.spec.point = name;
      params.Set(point);
    }
    calibration_.UseFrozen(std::move(params));
    spec_ = {.name = "table", .written_first = true, .build = Lookup};
  }

  RoundedWeights Weights(const UnitWriter& units) {
    return RoundedWeights(
        calibration_, [this](const std::string&) { return table_; }, RoundedWeights::Use::kProductsAndFiles,
        [&units](const std::string& name) { return units.WrittenCodes(name); });
  }
  UnitWriter Writer() { return {directory_.Path(), calibration_, store_}; }

  TempDirectory directory_;
  Tensor table_;
  Calibration calibration_;
  ActivationStore store_;
  UnitSpec spec_;
};

// What is looked up is what the file holds, also where that is not what rounding would give.
TEST_F(WrittenTable, IsReadBackFromItsFile) {
  UnitWriter units = Writer();
  EXPECT_TRUE(units.WrittenCodes(kTable).Empty());
  units.Write(spec_, Weights(units));
  const Tensor codes = units.WrittenCodes(kTable);
  const Tensor expected = QuantizeWeight(table_, *calibration_.GridOf(kTable), Rounding::kHalfAwayDivide).codes;
  ASSERT_EQ(codes.Type(), expected.Type());
  EXPECT_TRUE(std::ranges::equal(codes.As<int8_t>(), expected.As<int8_t>()));

  std::string bytes = ReadFile(directory_.Path() / "table.q.circle");
  const auto row = expected.As<int8_t>().subspan(7 * kWidth, kWidth);
  const size_t at = bytes.find(std::string(reinterpret_cast<const char*>(row.data()), row.size()));
  ASSERT_NE(at, std::string::npos);
  bytes[at] = 100;
  WriteFile(directory_.Path() / "table.q.circle", bytes);
  const std::vector<int64_t> ids{7};
  EXPECT_EQ(Weights(units).Rows(kTable, ids).F32()[0], 100 * (1 / 127.0f));
}

TEST_F(WrittenTable, IsFoundByAProcessThatGoesOn) {
  UnitWriter units = Writer();
  units.Write(spec_, Weights(units));
  nlohmann::json state = units.Save();
  UnitWriter again = Writer();
  again.Restore(state);
  EXPECT_EQ(again.WrittenCodes(kTable).GetShape(), (Shape{kRows, kWidth}));

  state["tables"][kTable] = "other.q.circle";
  UnitWriter third = Writer();
  EXPECT_THAT(ErrorText([&] { third.Restore(state); }),
              HasSubstr("table.weight: its file other.q.circle is not there"));
}

TEST_F(WrittenTable, IsNotLookedForInFilesOfOtherUnits) {
  UnitWriter units = Writer();
  spec_.written_first = false;
  units.Write(spec_, Weights(units));
  EXPECT_TRUE(units.WrittenCodes(kTable).Empty());
}

}  // namespace
}  // namespace circlet
