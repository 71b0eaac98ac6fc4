// Every scale, zero point and specification that the reference recorded, reproduced.

#include "golden.h"

#include <gtest/gtest.h>

#include <algorithm>
#include <nlohmann/json.hpp>
#include <sstream>

#include "circlet/io/json.h"
#include "circlet/quant/affine.h"
#include "circlet/quant/params.h"
#include "circlet/quant/recipe.h"
#include "weight_kinds.h"

namespace circlet {
namespace {

struct Golden {
  const char* model;
  const char* recipe;
  const char* suffix;  // ".text" after calibrating without images

  std::string Path() const { return fmt::format("golden/{}/{}{}.qparams.json.xz", model, recipe, suffix); }
};

void PrintTo(const Golden& golden, std::ostream* out) { *out << golden.Path(); }

class GoldenQParamsTest : public testing::TestWithParam<Golden> {};

INSTANTIATE_TEST_SUITE_P(All, GoldenQParamsTest,
                         testing::Values(Golden{"seed_example", "default", ""},
                                         Golden{"seed_example", "default", ".text"},
                                         Golden{"seed_example", "w4a16", ""}, Golden{"seed_example", "w4a16", ".text"},
                                         Golden{"seed_example", "w8a8", ""}, Golden{"seed_example", "w8a8", ".text"},
                                         Golden{"seed_example", "mixed8", ""}, Golden{"tiny_e2b", "default", ""},
                                         Golden{"tiny_e2b", "default", ".text"}, Golden{"tiny_e2b", "w4a16", ""},
                                         Golden{"tiny_e2b", "w4a16", ".text"}, Golden{"tiny_e2b", "w8a8", ""},
                                         Golden{"tiny_e2b", "w8a8", ".text"}, Golden{"tiny_wide", "default", ""},
                                         Golden{"tiny_wide", "default", ".text"}, Golden{"tiny_wide", "w4a16", ""},
                                         Golden{"tiny_wide", "w4a16", ".text"}, Golden{"tiny_wide", "w8a8", ".text"}),
                         [](const auto& info) {
                           std::string name =
                               fmt::format("{}_{}{}", info.param.model, info.param.recipe, info.param.suffix);
                           std::ranges::replace(name, '.', '_');
                           return name;
                         });

TEST_P(GoldenQParamsTest, ScalesAndZeroPointsFollowBitForBitFromTheRanges) {
  const ParameterStore store = ParseParameters(GoldenText(GetParam().Path()), "golden");
  ASSERT_GT(store.Size(), 200u);
  for (const std::string& name : store.Names()) {
    const PointParams& params = *store.Find(name);
    const PointSpec& spec = params.spec;
    const QParams computed = spec.axis < 0
                                 ? ComputeQParams(params.min[0], params.max[0], spec.dtype, spec.scheme.symmetric)
                                 : ComputeQParams(params.min, params.max, spec.dtype, spec.scheme.symmetric, spec.axis);
    EXPECT_EQ(computed, params.qparams) << name;
  }
}

TEST_P(GoldenQParamsTest, TheRecipeGivesEveryPointItsRecordedSpecification) {
  const ParameterStore store = ParseParameters(GoldenText(GetParam().Path()), "golden");
  const Recipe recipe = Recipe::Load(GetParam().recipe);
  for (const std::string& name : store.Names()) {
    EXPECT_EQ(recipe.SpecFor(PointNamed(name), kTico), store.Find(name)->spec) << name;
  }
}

std::vector<std::string> PointLines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) {
    if (!line.starts_with("  \"") || line.find("\"observer\"") == line.npos) continue;
    if (line.ends_with(',')) line.pop_back();
    lines.push_back(line);
  }
  std::ranges::sort(lines);
  return lines;
}

TEST_P(GoldenQParamsTest, AFileReadAndWrittenHasTheSameLines) {
  const std::string text = GoldenText(GetParam().Path());
  const std::string again = ToText(ParseParameters(text, "golden"), nlohmann::json::object());
  const std::vector<std::string> lines = PointLines(text);
  ASSERT_GT(lines.size(), 200u);
  const std::vector<std::string> lines_again = PointLines(again);
  ASSERT_EQ(lines_again.size(), lines.size());
  for (size_t i = 0; i < lines.size(); ++i) ASSERT_EQ(lines_again[i], lines[i]);
  EXPECT_EQ(ParseJson(again, "again").at("points"), lines.size());
}

// In the default dialect a signed weight never has a zero point, whatever the recipe says about it.
TEST(DialectTest, SignedWeightsAreSymmetricPerRowInTheDefaultDialect) {
  const ParameterStore store = ParseParameters(GoldenText("golden/tiny_e2b/default.qparams.json.xz"), "golden");
  const Recipe recipe = Recipe::Load("default");
  int rows = 0;
  for (const std::string& name : store.Names()) {
    const Point point = PointNamed(name);
    if (point.role != PointRole::kWeight || ChannelAxis(point.kind) != 0) continue;
    const PointSpec spec = recipe.SpecFor(point, kDefault);
    EXPECT_EQ(Name(spec.scheme), "per_channel_symm") << name;
    EXPECT_EQ(spec.axis, 0) << name;
    ++rows;
  }
  EXPECT_GT(rows, 70);
}

}  // namespace
}  // namespace circlet
