#include "circlet/io/yaml.h"

#include <gmock/gmock.h>

#include <cmath>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "error_text.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using nlohmann::json;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string ParseError(std::string_view text) {
  return ErrorText([&] { ParseYaml(text, "q.yaml"); });
}
json Parsed(std::string_view text) { return ToJson(ParseYaml(text, "q.yaml")); }

TEST(ParseYamlTest, PlainScalarsGetTheirTypeByTheCoreSchema) {
  EXPECT_EQ(Parsed("[null, ~, , Null]"), json::parse("[null, null, null, null]"));
  EXPECT_EQ(Parsed("[true, True, FALSE, false]"), json::parse("[true, true, false, false]"));
  EXPECT_EQ(Parsed("[7, -7, +7, 0x1F, 0o17, 007]"), json::parse("[7, -7, 7, 31, 15, 7]"));
  EXPECT_EQ(Parsed("[-9223372036854775808, 9223372036854775807]"), json({INT64_MIN, INT64_MAX}));
  EXPECT_EQ(Parsed("[0.5, .5, -1.e2, 1e-8, 1E+3]"), json::parse("[0.5, 0.5, -100.0, 1e-8, 1000.0]"));
  EXPECT_EQ(Parsed("[-.inf, .INF]"), json({-INFINITY, INFINITY}));
  EXPECT_TRUE(std::isnan(Parsed(".nan").get<double>()));
}

TEST(ParseYamlTest, EverythingElseIsAString) {
  const json strings = {"yes", "off", "int8", "1:3:2", "-",   "+",   "0x",   "1.2.3",
                        "--5", "1e",  "e5",   ".",     "inf", "0o9", "0x-5", "+-5"};
  EXPECT_EQ(Parsed("[yes, off, int8, '1:3:2', \"-\", +, 0x, 1.2.3, --5, 1e, e5, ., inf, 0o9, 0x-5, +-5]"), strings);
  EXPECT_EQ(Parsed("['7', \"true\", 'null', '']"), json({"7", "true", "null", ""}));
}

TEST(ParseYamlTest, ATabInFrontOfTheTextIsNamed) {
  EXPECT_THAT(ErrorText([] { ParseYaml("pipeline:\n\t- name: ptq\n", "q.yaml"); }),
              HasSubstr("q.yaml:2: a tab in front of the text; YAML is indented with blanks"));
  EXPECT_THAT(ErrorText([] { ParseYaml("a: [\n1", "q.yaml"); }), testing::Not(HasSubstr("tab")));
}

TEST(ParseYamlTest, IntegersPast64BitsBecomeFloats) {
  EXPECT_EQ(Parsed("9223372036854775808"), json(9223372036854775808.0));
}

TEST(ParseYamlTest, KeepsTheOrderOfKeysAndTheLines) {
  const YamlNode tree = ParseYaml("# recipe\nz: 1\na:\n  - x\n  - y: 2\n", "q.yaml");
  ASSERT_EQ(tree.members.size(), 2);
  EXPECT_EQ(tree.members[0].key, "z");
  EXPECT_EQ(tree.members[0].value.line, 2);
  EXPECT_EQ(tree.Find("a")->items[1].Find("y")->line, 5);
  EXPECT_EQ(tree.Find("b"), nullptr);
}

TEST(ParseYamlTest, AnEmptyFileIsNull) {
  EXPECT_EQ(ParseYaml("", "q.yaml").kind, YamlNode::Kind::kNull);
  EXPECT_EQ(ParseYaml("# nothing\n", "q.yaml").kind, YamlNode::Kind::kNull);
}

TEST(ParseYamlTest, JsonIsYamlToo) {
  const std::string text = R"({"a": [1, 2.5, "x\n", null], "b": {"c": true}})";
  EXPECT_EQ(Parsed(text), json::parse(text));
}

TEST(ParseYamlTest, BadSyntaxNamesFileAndLine) {
  EXPECT_THAT(ParseError("a: 1\nb: [1, 2\n"), StartsWith("q.yaml:3: "));
  EXPECT_THAT(ParseError("a: 1\n\tb: 2\n"), StartsWith("q.yaml:2: "));
  EXPECT_THAT(ParseError("a: b: c\n"), StartsWith("q.yaml:1: "));
}

TEST(ParseYamlTest, AKeyThatStandsTwiceNamesBothLines) {
  EXPECT_EQ(ParseError("a: 1\nb: 2\na: 3\n"),
            "q.yaml:3: the key \"a\" stands twice in one mapping (also in line 1); remove one");
}

TEST(ParseYamlTest, AliasesCopyAndBombsAreRefused) {
  EXPECT_EQ(Parsed("a: &x {k: 1}\nb: *x\n"), json::parse(R"({"a": {"k": 1}, "b": {"k": 1}})"));
  std::string bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n";
  for (int i = 1; i < 10; ++i) {
    bomb += fmt::format("a{}: &a{} [", i, i);
    for (int k = 0; k < 10; ++k) bomb += fmt::format("{}*a{}", k > 0 ? ", " : "", i - 1);
    bomb += "]\n";
  }
  EXPECT_EQ(ParseError(bomb), "q.yaml:5: more than 100000 values; is it the right file?");
}

TEST(ParseYamlTest, AnAliasInsideItsOwnNodeIsAnError) {
  EXPECT_EQ(ParseError("a: &x [*x]\n"), "q.yaml:1: an alias inside the node that it names; write the value out");
}

TEST(ParseYamlTest, AliasesCannotGoPastTheDepthLimit) {
  std::string deep = "a: &x " + std::string(40, '[') + std::string(40, ']') + "\n";
  deep += "b: " + std::string(40, '[') + "*x" + std::string(40, ']') + "\n";
  EXPECT_EQ(ParseError(deep), "q.yaml:2: nested more than 64 deep; is it the right file?");
}

TEST(ParseYamlTest, DeepNestingIsRefused) {
  const auto nested = [](int depth) { return std::string(depth, '[') + std::string(depth, ']'); };
  EXPECT_NO_THROW(ParseYaml(nested(64), "q.yaml"));
  EXPECT_EQ(ParseError(nested(65)), "q.yaml:1: nested more than 64 deep; is it the right file?");
  EXPECT_THAT(ParseError(std::string(100'000, '[')), StartsWith("q.yaml:1: "));
}

TEST(ParseYamlTest, WhatWeDoNotSupportSaysWhatToWriteInstead) {
  EXPECT_EQ(ParseError("a: !!python/object x\n"),
            "q.yaml:1: the tag \"tag:yaml.org,2002:python/object\" is not supported; remove it");
  EXPECT_EQ(ParseError("? [a]\n: 1\n"),
            "q.yaml:1: a key must be a plain word, found a list or a mapping; put it in quotes");
  EXPECT_EQ(ParseError("x: &x {a: 1}\ny:\n  <<: *x\n"),
            "q.yaml:3: merge keys (<<) are not supported; write the keys out");
  EXPECT_EQ(ParseError("a: 1\n---\nb: 2\n"), "q.yaml:3: a second document begins here; keep one");
}

TEST(ParseYamlTest, BytesThatAreNotUtf8TextAreRefused) {
  for (const std::string_view bad : {"\x80", "\xc1\x81", "\xc3", "\xe0\x90\x80", "\xed\xa0\x80", "\xf0\x80\x80\x80",
                                     "\xf4\x90\x80\x80", "\xf5\x80\x80\x80", "\xe2\x82x"}) {
    EXPECT_EQ(ParseError("a: 1\nb: " + std::string(bad)), "q.yaml:2: is not UTF-8; save the file as UTF-8 text");
  }
  EXPECT_EQ(ParseError(std::string_view("a\0b", 3)),
            "q.yaml:1: the control character 0x00 is no text; is it the right file?");
  EXPECT_EQ(Parsed("'\u00e9\u20ac\U0001f642\U0010ffff'"), json("\u00e9\u20ac\U0001f642\U0010ffff"));
}

TEST(ParseYamlTest, LargeFilesAreRefused) {
  EXPECT_EQ(ParseError(std::string((1 << 20) + 1, '#')),
            "q.yaml: has 1.0 MiB, at most 1.0 MiB are read; is it the right file?");
  const TempDirectory directory;
  WriteFile(directory.Path() / "q.yaml", std::string((1 << 20) + 1, '#'));
  EXPECT_THAT(ErrorText([&] { ReadYaml(directory.Path() / "q.yaml"); }), HasSubstr("q.yaml: has 1.0 MiB"));
}

void ExpectSame(const YamlNode& a, const YamlNode& b) {
  ASSERT_EQ(a.kind, b.kind);
  ASSERT_EQ(ToJson(a), ToJson(b));
  ASSERT_EQ(a.members.size(), b.members.size());
  for (size_t i = 0; i < a.members.size(); ++i) {
    EXPECT_EQ(a.members[i].key, b.members[i].key);
    ExpectSame(a.members[i].value, b.members[i].value);
  }
}

TEST(DumpYamlTest, IsBlockStyleInTheOrderOfTheTree) {
  const std::string text =
      "z: 1\n"
      "pipeline:\n"
      "  - name: ptq\n"
      "    bits: [8, 16]\n"
      "  - - a\n"
      "    - ''\n"
      "empty: {}\n";
  EXPECT_EQ(DumpYaml(ParseYaml(text, "q.yaml")),
            "z: 1\n"
            "pipeline:\n"
            "  - name: ptq\n"
            "    bits:\n"
            "      - 8\n"
            "      - 16\n"
            "  - - a\n"
            "    - \"\"\n"
            "empty: {}\n");
}

TEST(DumpYamlTest, WhatItWritesReadsBackAsTheSameTree) {
  for (const std::string_view text :
       {"x", "'true'", "\"7\"", "''", "[]", "{}", "~", "1.0", "1e300", "1e20", "1e15", "-4e15", "6e16", "-2.5e-9",
        "[-.inf, 100000.0, 123456789.0]",
        "{'a b': 'c: d', '#': '- x', '-1': \"tab\\t, null \\0, line\\n\", 'é': 'ä', '': 1}",
        "[[1, [2, {a: [3]}]], {b: {c: {d: []}}}, {e: [{f: 1, g: 2}, {}]}]"}) {
    const YamlNode tree = ParseYaml(text, "q.yaml");
    ExpectSame(ParseYaml(DumpYaml(tree), "dump of " + std::string(text)), tree);
  }
}

// --- Overrides ---

json Overridden(std::string_view text, std::string_view assignment) {
  YamlNode tree = ParseYaml(text, "q.yaml");
  ApplyOverride(tree, assignment);
  return ToJson(tree);
}
std::string OverrideError(std::string_view text, std::string_view assignment) {
  return ErrorText([&] { Overridden(text, assignment); });
}

constexpr std::string_view kRecipe = "seed: 1\npipeline:\n- {name: gptq, mse: null}\n- {name: ptq}\n- plain\n";

TEST(ApplyOverrideTest, SetsNestedValuesWithTheirYamlType) {
  EXPECT_EQ(Overridden(kRecipe, "seed=7")["seed"], 7);
  EXPECT_EQ(Overridden(kRecipe, "seed='7'")["seed"], "7");
  EXPECT_EQ(Overridden(kRecipe, "seed=")["seed"], nullptr);
  EXPECT_EQ(Overridden(kRecipe, "seed=[1, {a: b=c}]")["seed"], json::parse(R"([1, {"a": "b=c"}])"));
}

TEST(ApplyOverrideTest, CreatesMissingMappings) {
  EXPECT_EQ(Overridden(kRecipe, "model_args.vision.profile=e2b")["model_args"]["vision"]["profile"], "e2b");
  EXPECT_EQ(Overridden("", "a.b=1"), json::parse(R"({"a": {"b": 1}})"));
}

TEST(ApplyOverrideTest, SelectsListItemsByNameOrIndex) {
  EXPECT_EQ(Overridden(kRecipe, "pipeline.gptq.mse=smse")["pipeline"][0]["mse"], "smse");
  EXPECT_EQ(Overridden(kRecipe, "pipeline.1.activation=int16")["pipeline"][1]["activation"], "int16");
  EXPECT_EQ(Overridden(kRecipe, "pipeline.3.name=cle")["pipeline"][3]["name"], "cle");
}

TEST(ApplyOverrideTest, UnknownNamesListTheNamesThereAre) {
  EXPECT_EQ(OverrideError(kRecipe, "pipeline.gtpq.mse=1"),
            "--set pipeline.gtpq.mse=1: pipeline.gtpq: no item of the list has this name; nearest: \"gptq\"; there "
            "are: gptq, ptq");
  EXPECT_EQ(OverrideError("a: [1]", "a.x=1"),
            "--set a.x=1: a.x: no item of the list has this name; there are: none with a name");
  EXPECT_EQ(OverrideError("a: [{name: x}, {name: x}]", "a.x.b=1"),
            "--set a.x.b=1: a.x: 2 items of the list have this name; use an index");
}

TEST(ApplyOverrideTest, IndicesLeaveNoHoles) {
  EXPECT_EQ(OverrideError(kRecipe, "pipeline.4.x=1"),
            "--set pipeline.4.x=1: pipeline.4: the list has 3 items; use 0 to 3 (3 appends)");
  EXPECT_THAT(OverrideError(kRecipe, "pipeline.99999999999999999999=1"), HasSubstr("the list has 3 items"));
}

TEST(ApplyOverrideTest, BadAssignmentsSayWhatIsWrong) {
  EXPECT_EQ(OverrideError(kRecipe, "seed"),
            "--set seed: expected KEY=VALUE, as in --set pipeline.ptq.activation=int16");
  EXPECT_THAT(OverrideError(kRecipe, "=1"), HasSubstr("expected KEY=VALUE"));
  EXPECT_EQ(OverrideError(kRecipe, "a..b=1"), "--set a..b=1: a.: an empty part in the key; write a.b.c=value");
  EXPECT_THAT(OverrideError(kRecipe, "a.=1"), HasSubstr("an empty part in the key"));
  EXPECT_EQ(OverrideError(kRecipe, "seed.x=1"),
            "--set seed.x=1: seed.x: the value before this part is 1, not a mapping or a list; set that one, or "
            "correct the key");
  EXPECT_THAT(OverrideError(kRecipe, "seed=[1"), StartsWith("--set seed=[1:1: "));
}

}  // namespace
}  // namespace circlet
