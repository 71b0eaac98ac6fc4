#include "circlet/quant/widening.h"

#include <gmock/gmock.h>

#include <map>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/quant/params.h"
#include "circlet/quant/recipe.h"

namespace circlet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

template <typename Body>
std::string ErrorOf(const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

// A point of 160 channels: all of them 1 but those given.
StreamPoint PointWith(const std::string& name, const std::map<size_t, float>& large) {
  StreamPoint point{name, std::vector<float>(160, 1.0f)};
  for (const auto& [channel, value] : large) point.maxima[channel] = value;
  return point;
}

TEST(WideningTest, EachCopyGoesToTheChannelThatDecidesTheCoarsestGrid) {
  // 1000 / sqrt(K) is the largest until K = 10, where 400 (shared by none) is larger than 1000 / sqrt(10).
  const std::vector<StreamPoint> points{PointWith("a", {{3, 1000}}), PointWith("b", {{7, 400}})};
  EXPECT_THAT(ChooseCopies(points, 160, {.channels = 16}).channels,
              ElementsAre(Widening::Channel{3, 15}, Widening::Channel{7, 3}));
  EXPECT_EQ(ChooseCopies(points, 160, {.channels = 16}).Width(), 176);
}

TEST(WideningTest, APointCountsByItsOwnMedian) {
  StreamPoint quiet = PointWith("quiet", {{5, 100}});
  for (float& maximum : quiet.maxima) maximum /= 1000;
  const std::vector<StreamPoint> points{PointWith("loud", {{9, 80}}), quiet};
  const Widening widening = ChooseCopies(points, 160, {.automatic = true});
  ASSERT_EQ(widening.channels.size(), 2u);
  EXPECT_GT(widening.channels[0].copies, widening.channels[1].copies);
}

TEST(WideningTest, AutoTakesWholeSixteensWhileThereIsAnOutlierAndATenthAtMost) {
  const auto added = [](float value) {
    const std::vector<StreamPoint> points{PointWith("a", {{3, value}})};
    return ChooseCopies(points, 160, {.automatic = true}).Width() - 160;
  };
  EXPECT_EQ(added(1), 0);
  EXPECT_EQ(added(static_cast<float>(kStreamOutlier)), 0);
  EXPECT_EQ(added(static_cast<float>(kStreamOutlier) + 1), 16);
  EXPECT_EQ(added(1e6f), 16);
  const WideningOption automatic{.automatic = true};
  EXPECT_EQ(automatic.MostAdded(640), 64);
  EXPECT_EQ(automatic.MostAdded(1536), 160);
  EXPECT_EQ(automatic.MostAdded(5376), 544);
  EXPECT_EQ(automatic.MostAdded(40), 8);
  EXPECT_EQ(automatic.MostAdded(32), 0);
}

TEST(WideningTest, ADeadStreamIsNoReasonToFail) {
  const std::vector<StreamPoint> points{{"dead", std::vector<float>(32)}};
  EXPECT_THAT(ChooseCopies(points, 32, {.automatic = true}).channels, IsEmpty());
  EXPECT_THAT(ChooseCopies(points, 32, {.channels = 16}).channels, ElementsAre(Widening::Channel{0, 17}));
}

TEST(WideningTest, ANumberThatMakesNoMultipleOfSixteenIsRefusedWithThoseThatDo) {
  const WideningOption ten{.channels = 10};
  EXPECT_THAT(ErrorOf([&] { ten.MostAdded(640); }),
              HasSubstr("10 channels make the stream of 640 one of 650, which is no multiple of 16; give 16"));
  EXPECT_THAT(ErrorOf([&] { ten.MostAdded(40); }), HasSubstr("give 8 or 24"));
  EXPECT_THAT(ErrorOf([] { WideningOption{.channels = 656}.MostAdded(640); }), HasSubstr("at most as many again"));
}

TEST(WideningTest, AnOptionIsAutoOffOrANumber) {
  for (const char* text : {"auto", "off", "16"}) EXPECT_EQ(WideningOption::Parse(text, "--widen").ToString(), text);
  for (const char* text : {"", "Auto", "-16", "16x", "1e3", "99999999999999999999"})
    EXPECT_THAT(ErrorOf([&] { WideningOption::Parse(text, "--widen"); }),
                HasSubstr("--widen: \"" + std::string(text) + "\""));
  const auto of_recipe = [](const char* value) {
    return Recipe::Parse(std::string("pipeline:\n  - name: ptq\n    widen: ") + value + "\n", "r.yaml").widen;
  };
  EXPECT_EQ(of_recipe("auto"), (WideningOption{.automatic = true}));
  EXPECT_EQ(of_recipe("off"), WideningOption{});
  EXPECT_EQ(of_recipe("64"), WideningOption{.channels = 64});
  EXPECT_THAT(ErrorOf([&] { of_recipe("much"); }), HasSubstr("r.yaml:3: pipeline"));
}

TEST(WideningTest, ComesBackFromJsonAndFromAFileOfGrids) {
  const Widening widening{.model_width = 640, .channels = {{163, 58}, {400, 6}}};
  EXPECT_EQ(WideningFromJson(ToJson(widening), "w"), widening);
  const ParameterStore store = ParseParameters(ToText(ParameterStore(), {{"widening", ToJson(widening)}}), "q.json");
  EXPECT_EQ(store.GetWidening(), widening);
  EXPECT_EQ(ParseParameters(ToText(ParameterStore(), {}), "q.json").GetWidening(), std::nullopt);
}

TEST(WideningTest, DamagedJsonIsNamed) {
  const auto error = [](const char* text) {
    return ErrorOf([&] { WideningFromJson(nlohmann::json::parse(text), "q.json: widening"); });
  };
  EXPECT_THAT(error(R"({"width": 2, "copies": {}})"), HasSubstr("q.json: widening: model_width"));
  EXPECT_THAT(error(R"({"model_width": 0, "width": 0, "copies": {}})"), HasSubstr("model_width: expected 1 .."));
  EXPECT_THAT(error(R"({"model_width": 8, "width": 9, "copies": {"8": 2}})"),
              HasSubstr("expected a channel from 0 to 7"));
  EXPECT_THAT(error(R"({"model_width": 8, "width": 9, "copies": {"x": 2}})"), HasSubstr("expected a channel"));
  EXPECT_THAT(error(R"({"model_width": 8, "width": 9, "copies": {"1": 1}})"), HasSubstr("expected 2 .. 9 copies"));
  EXPECT_THAT(error(R"({"model_width": 8, "width": 9, "copies": {"1": 3}})"),
              HasSubstr("width: is 9, the copies make it 10"));
  EXPECT_THAT(error(R"({"model_width": 8, "width": 10, "copies": {"1": 2, "01": 2}})"), HasSubstr("a channel twice"));
}

}  // namespace
}  // namespace circlet
