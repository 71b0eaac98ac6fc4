#include "circlet/io/json.h"

#include <gmock/gmock.h>

#include <cmath>
#include <cstring>
#include <limits>
#include <nlohmann/json.hpp>

#include "circlet/io/yaml.h"
#include "error_text.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string ParseError(std::string_view text) {
  return ErrorText([&] { ParseJson(text, "a.json"); });
}

TEST(ParseJsonTest, BuildsTheSameTreeAsTheLibrary) {
  const std::string text =
      R"({"b": [1, -2, 3.5, 18446744073709551615, {}, [], [[null]]], "a": {"x": true, "y": "\u00e9\n"}, "": ""})";
  EXPECT_EQ(ParseJson(text, "a.json"), json::parse(text));
  EXPECT_EQ(ParseJson(" 7 ", "a.json"), json(7));
}

TEST(ParseJsonTest, SyntaxErrorsNameFileLineAndColumn) {
  EXPECT_THAT(ParseError("{\n  \"a\": 1,\n  \"b\" 2\n}"), StartsWith("a.json: line 3, column 7: syntax error"));
  EXPECT_THAT(ParseError(""), StartsWith("a.json: line 1, column 1: "));
  EXPECT_THAT(ParseError("[1, 2"), HasSubstr("unexpected end of input"));
  EXPECT_THAT(ParseError("[1] x"), StartsWith("a.json: line 1, column 5: "));
  EXPECT_THAT(ParseError("{\"a\": nan}"), StartsWith("a.json: line 1, column 8: "));
}

TEST(ParseJsonTest, NumbersThatNoDoubleHoldsAreErrors) {
  EXPECT_THAT(ParseError("[1e999]"), StartsWith("a.json: line 1, column "));
}

TEST(ParseJsonTest, BytesThatAreNotUtf8AreErrors) {
  EXPECT_THAT(ParseError("[\"\xff\"]"), StartsWith("a.json: line 1, column 3: "));
  EXPECT_THAT(ParseError("[\"\xc3\"]"), StartsWith("a.json: line 1, column "));
}

TEST(ParseJsonTest, AKeyThatStandsTwiceIsNamedWithItsPlace) {
  EXPECT_EQ(ParseError("{\"a\": {\"b\": 1,\n\"b\": 2}}"),
            "a.json: line 2, column 3: the key \"b\" stands twice in one object; remove one");
  EXPECT_NO_THROW(ParseJson(R"({"a": {"b": 1}, "b": 2})", "a.json"));
}

TEST(ParseJsonTest, NestingEndsAtTheLimit) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_NO_THROW(ParseJson(nested(kJsonDepthLimit), "a.json"));
  EXPECT_EQ(ParseError(nested(kJsonDepthLimit + 1)),
            "a.json: line 1, column 65: nested more than 64 deep; is it the right file?");
  EXPECT_THAT(ParseError(std::string(1 << 20, '[')), HasSubstr("nested more than 64 deep"));
}

TEST(ReadJsonTest, NamesTheFileAndRefusesLargeOnes) {
  const TempDirectory directory;
  const std::string path = directory.Path() / "x.json";
  WriteFile(path, "[");
  EXPECT_THAT(ErrorText([&] { ReadJson(path); }), StartsWith(path + ": line 1, column "));
  EXPECT_THAT(ErrorText([&] { ReadJson(path, 0); }), StartsWith(path + ": has 1 B, at most 0 B are read"));
}

TEST(DumpJsonTest, SortsKeysIndentsByTwoAndEndsTheLine) {
  EXPECT_EQ(DumpJson({{"b", 1}, {"a", {1, 2}}}), "{\n  \"a\": [\n    1,\n    2\n  ],\n  \"b\": 1\n}\n");
}

TEST(DumpJsonTest, BytesThatAreNotUtf8DoNotStopAReport) { EXPECT_EQ(DumpJson("a\xff"), "\"a\xef\xbf\xbd\"\n"); }

TEST(DumpJsonTest, WrittenFilesReadBack) {
  const TempDirectory directory;
  const json value = {{"x", {1.5, nullptr, "é"}}};
  WriteJson(directory.Path() / "x.json", value);
  EXPECT_EQ(ReadJson(directory.Path() / "x.json"), value);
}

TEST(F32Test, WritesTheShortestDecimalThatReadsBack) {
  EXPECT_EQ(F32(0.1f).dump(), "0.1");
  EXPECT_EQ(F32(1e-8f).dump(), "1e-08");
  EXPECT_EQ(F32(1.5253473e-05f).dump(), "1.5253473e-05");
  EXPECT_EQ(F32(16777216.0f).dump(), "16777216.0");
  EXPECT_EQ(F32(3.4028235e38f).dump(), "3.4028235e+38");
  EXPECT_EQ(F32(-0.0f).dump(), "-0.0");
  EXPECT_EQ(F32(INFINITY).dump(), "\"inf\"");
  EXPECT_EQ(F32(-INFINITY).dump(), "\"-inf\"");
  EXPECT_EQ(F32(NAN).dump(), "\"nan\"");
}

TEST(F32Test, EveryBitPatternSurvivesTheWayThroughText) {
  for (uint64_t step = 0; step < 200'000; ++step) {
    const auto bits = static_cast<uint32_t>(step * 2654435761u);
    float value;
    std::memcpy(&value, &bits, 4);
    const float back = F32(json::parse(F32(value).dump()), "x");
    if (std::isnan(value)) {
      ASSERT_TRUE(std::isnan(back));
    } else {
      ASSERT_EQ(std::memcmp(&back, &value, 4), 0) << value << " " << back;
    }
  }
}

TEST(F32Test, OtherValuesAreErrorsThatNameTheirPlace) {
  EXPECT_EQ(ErrorText([] { F32(json("1.5"), "qparams.json: scale"); }),
            "qparams.json: scale: expected a float32 number, \"inf\", \"-inf\" or \"nan\", found \"1.5\"");
  EXPECT_THAT(ErrorText([] { F32(json(1e39), "x"); }), HasSubstr("found 1e+39"));
}

// --- JsonObject ---

const json kConfig = json::parse(R"({
  "text_config": {"layers": "x", "width": 64, "eps": 1e-6, "types": ["a", "b"], "big": 3000000000, "whole": 4.0,
                  "tie": true, "none": null, "deep": {"n": -1}},
  "stages": [{"name": "ptq"}, {"name": 3}],
  "mixed": [1, "a"]
})");

JsonObject Root() { return JsonObject(kConfig, "config.json"); }

TEST(JsonObjectTest, ReadsEveryType) {
  const JsonObject text = Root().Object("text_config");
  EXPECT_EQ(text.Required<int>("width"), 64);
  EXPECT_EQ(text.Required<int64_t>("big"), 3'000'000'000);
  EXPECT_EQ(text.Required<double>("eps"), 1e-6);
  EXPECT_EQ(text.Required<float>("width"), 64.0f);
  EXPECT_EQ(text.Required<int>("whole"), 4);
  EXPECT_TRUE(text.Required<bool>("tie"));
  EXPECT_THAT(text.Required<std::vector<std::string>>("types"), ElementsAre("a", "b"));
  EXPECT_EQ(text.Object("deep").Required<int>("n"), -1);
}

TEST(JsonObjectTest, AbsentAndNullFallBack) {
  const JsonObject text = Root().Object("text_config");
  EXPECT_EQ(text.Optional<int>("absent", 5), 5);
  EXPECT_EQ(text.Optional<int>("none", 5), 5);
  EXPECT_EQ(text.Optional<int>("width", 5), 64);
  EXPECT_EQ(text.Optional<int>("none"), std::nullopt);
  EXPECT_FALSE(text.Has("none"));
  EXPECT_EQ(text.OptionalObject("none"), std::nullopt);
  EXPECT_TRUE(text.Raw("absent").is_null());
}

TEST(JsonObjectTest, WrongTypesNamePlaceExpectedAndFound) {
  const JsonObject text = Root().Object("text_config");
  EXPECT_EQ(ErrorText([&] { text.Required<int64_t>("layers"); }),
            "config.json: text_config.layers: expected an integer, found \"x\"");
  EXPECT_EQ(ErrorText([&] { text.Required<int>("big"); }),
            "config.json: text_config.big: expected an integer of 32 bits, found 3000000000");
  EXPECT_EQ(ErrorText([&] { text.Required<int>("eps"); }),
            "config.json: text_config.eps: expected an integer of 32 bits, found 1e-06");
  EXPECT_EQ(ErrorText([&] { text.Optional<bool>("width", true); }),
            "config.json: text_config.width: expected true or false, found 64");
  EXPECT_EQ(ErrorText([&] { text.Required<double>("tie"); }),
            "config.json: text_config.tie: expected a number, found true");
  EXPECT_EQ(ErrorText([&] { Root().Required<std::vector<int>>("mixed"); }),
            "config.json: mixed: expected a list, each item an integer of 32 bits, found [1,\"a\"]");
  EXPECT_EQ(ErrorText([&] { text.Object("width"); }), "config.json: text_config.width: expected an object, found 64");
}

TEST(JsonObjectTest, MissingFieldsSayWhatTheyShouldBe) {
  EXPECT_EQ(ErrorText([] { Root().Required<std::string>("model_type"); }),
            "config.json: model_type: is missing; expected a string");
  EXPECT_EQ(ErrorText([] { Root().Object("vision_config"); }),
            "config.json: vision_config: is missing; expected an object");
}

TEST(JsonObjectTest, NumbersBeyondTheTypeAreErrors) {
  const json value = {{"u", 18446744073709551615u}, {"f", 1e39}, {"d", 1e19}};
  const JsonObject object(value, "x.json");
  EXPECT_THAT(ErrorText([&] { object.Required<int64_t>("u"); }), HasSubstr("found 18446744073709551615"));
  EXPECT_THAT(ErrorText([&] { object.Required<float>("f"); }), HasSubstr("x.json: f: expected a number, found 1e+39"));
  EXPECT_THAT(ErrorText([&] { object.Required<int64_t>("d"); }), HasSubstr("expected an integer, found 1e+19"));
}

TEST(JsonObjectTest, ItemsOfListsAreNumberedInErrors) {
  const std::vector<JsonObject> stages = Root().Objects("stages");
  ASSERT_EQ(stages.size(), 2);
  EXPECT_EQ(stages[0].Required<std::string>("name"), "ptq");
  EXPECT_EQ(ErrorText([&] { stages[1].Required<std::string>("name"); }),
            "config.json: stages.1.name: expected a string, found 3");
  EXPECT_EQ(ErrorText([] { Root().Objects("mixed"); }), "config.json: mixed.0: expected an object, found 1");
  EXPECT_TRUE(Root().Objects("absent").empty());
}

TEST(JsonObjectTest, LongValuesAreShortenedBetweenLetters) {
  std::string umlauts;
  for (int i = 0; i < 100; ++i) umlauts += "ä";
  const json value = {{"a", umlauts}};
  EXPECT_EQ(ErrorText([&] { JsonObject(value, "x").Required<int>("a"); }),
            "x: a: expected an integer of 32 bits, found \"" + umlauts.substr(0, 198) + "...");
}

TEST(JsonObjectTest, ARootThatIsNoObjectIsAnError) {
  const json list = {1};
  EXPECT_EQ(ErrorText([&] { JsonObject(list, "x.json"); }), "x.json: expected an object, found [1]");
}

TEST(JsonObjectTest, RemembersWhichKeysWereAskedFor) {
  const json value = {{"a", 1}, {"bits", 2}, {"c", 3}};
  const JsonObject object(value, "x.json");
  object.Optional<int>("a", 0);
  object.Optional<int>("bit", 0);
  EXPECT_THAT(object.UnknownKeys(), ElementsAre("bits", "c"));
  EXPECT_EQ(ErrorText([&] { object.RejectUnknownKeys(); }), "x.json: bits: is no known key; nearest: \"bit\"");
  object.Has("bits");
  object.Raw("c");
  EXPECT_NO_THROW(object.RejectUnknownKeys());
}

TEST(JsonObjectTest, YamlGivesLineNumbersAndOverridesSaySo) {
  YamlNode tree = ParseYaml("a: 1\npipeline:\n- name: ptq\n  bits: x\n", "q.yaml");
  ApplyOverride(tree, "pipeline.ptq.mode=7");
  const json value = ToJson(tree);
  const JsonObject root(value, "q.yaml", &tree);
  const JsonObject stage = root.Objects("pipeline")[0];
  EXPECT_EQ(ErrorText([&] { stage.Required<int>("bits"); }),
            "q.yaml:4: pipeline.0.bits: expected an integer of 32 bits, found \"x\"");
  EXPECT_EQ(ErrorText([&] { stage.Required<std::string>("mode"); }),
            "q.yaml (--set): pipeline.0.mode: expected a string, found 7");
  EXPECT_EQ(ErrorText([&] { stage.Required<int>("absent"); }),
            "q.yaml:3: pipeline.0.absent: is missing; expected an integer of 32 bits");
}

TEST(JsonTest, ATreeThatTakesTooMuchMemoryIsRefusedBeforeItDoes) {
  std::string objects = "[{}";
  for (int i = 0; i < 4'000'000; ++i) objects += ",{}";
  EXPECT_THAT(ErrorText([&] { ParseJson(objects + "]", "x.json"); }),
              AllOf(HasSubstr("x.json: line 1, column "), HasSubstr("takes more than 256 MiB of memory as a tree")));
}

TEST(JsonTest, ErrorsQuoteAtMostTwoHundredBytes) {
  const json long_list(100'000, json("value"));
  EXPECT_EQ(Shown(long_list).size(), 203u);
  EXPECT_THAT(Shown(long_list), testing::StartsWith("[\"value\",\"value\""));
  EXPECT_EQ(Shown(json::parse(R"({"a":[1,null,"x"],"b":{}})")), R"({"a":[1,null,"x"],"b":{}})");
  const json tree{{std::string(1 << 20, 'k'), std::string(1 << 20, 'v')}};
  EXPECT_LT(ErrorText([&] { JsonObject(tree, "x.json").Required<int>(std::string(1 << 20, 'k')); }).size(), 500u);
  EXPECT_LT(ErrorText([&] { ParseJson(std::string(1 << 20, 'x'), "x.json"); }).size(), 500u);
}

}  // namespace
}  // namespace circlet
