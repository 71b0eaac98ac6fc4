#include "preprocess/jinja/template.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "error_text.h"
#include "golden.h"

namespace circlet::jinja {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string Render(std::string_view text, const Limits& limits = {}) {
  return Template(text, "chat_template.jinja").Render({}, 0, limits).text;
}

std::string ErrorOf(std::string_view text, const Limits& limits = {}) {
  return ErrorText([&] { Render(text, limits); });
}

// tests/data/chat_templates/expected.json.xz: jinja2 as transformers sets it up.
TEST(JinjaTest, EveryConstructGivesTheTextOfTheReference) {
  const nlohmann::json expected = nlohmann::json::parse(GoldenText("chat_templates/expected.json.xz")).at("snippets");
  std::string rest = ReadFile(TestData("chat_templates/snippets.txt"));
  ASSERT_TRUE(rest.ends_with('\n'));
  rest.pop_back();
  size_t count = 0, refused = 0;
  constexpr std::string_view kBetween = "\n----\n";
  for (size_t begin = 0; begin <= rest.size(); ++count) {
    const size_t end = std::min(rest.find(kBetween, begin), rest.size());
    const std::string text = rest.substr(begin, end - begin);
    begin = end + kBetween.size();
    ASSERT_LT(count, expected.size());
    if (expected[count].is_null()) {
      ++refused;
      EXPECT_THROW(Render(text), Error) << text;
      continue;
    }
    try {
      EXPECT_EQ(Render(text), expected[count].get<std::string>()) << text;
    } catch (const Error& error) {
      ADD_FAILURE() << text << "\n" << error.what();
    }
  }
  EXPECT_EQ(count, expected.size());
  EXPECT_EQ(refused, 57u);
}

TEST(JinjaTest, ErrorsNameFileAndLine) {
  EXPECT_EQ(ErrorOf("\n\n{{ 1 + none }}"), "chat_template.jinja:3: + between values of type int and NoneType");
  EXPECT_EQ(ErrorOf("a\n{% for x in [1] %}\n{{ y.z }}\n{% endfor %}"), "chat_template.jinja:3: \"y\" is undefined");
  EXPECT_EQ(ErrorOf("{% macro m() %}\n{{ none | length }}{% endmacro %}\n\n{{ m() }}"),
            "chat_template.jinja:2: a value of type NoneType has no length");
  EXPECT_EQ(ErrorOf("{{ [1,\n 2]\n | map('float') | length }}"),
            "chat_template.jinja:3: a value of type generator has no length");
  EXPECT_EQ(ErrorOf("{# two\nlines #}\r\n{{ raise_exception('roles: ' ~ 2) }}"),
            "chat_template.jinja:3: the template refuses the conversation: roles: 2");
  EXPECT_EQ(ErrorOf("{% if x %}\n{{ 'a' }}\n"), "chat_template.jinja:1: the block that begins here has no \"endif\"");
  EXPECT_EQ(ErrorOf("\n{{ 'a }}"), "chat_template.jinja:2: the text in quotes has no end");
  EXPECT_EQ(ErrorOf("\n\n{# a"), "chat_template.jinja:3: the comment has no end \"#}\"");
  EXPECT_EQ(ErrorOf("{{ '\\ud800' }}"), "chat_template.jinja:1: the escape is no character");
  EXPECT_EQ(ErrorOf("{{ \xff }}"), "chat_template.jinja: the template is not UTF-8");
}

TEST(JinjaTest, WhatIsNotSupportedIsNamed) {
  EXPECT_EQ(ErrorOf("\n{% include 'x' %}"),
            "chat_template.jinja:2: the tag \"include\" is not supported; a chat template is one file");
  EXPECT_THAT(ErrorOf("{% import 'x' as y %}"), HasSubstr("the tag \"import\" is not supported"));
  EXPECT_THAT(ErrorOf("{% extends 'x' %}"), HasSubstr("the tag \"extends\" is not supported"));
  EXPECT_THAT(ErrorOf("{% do x %}"), HasSubstr("no tag is called \"do\""));
  EXPECT_THAT(ErrorOf("\n{{ 1 | pprint }}"), HasSubstr(":2: the filter \"pprint\" is not supported"));
  EXPECT_THAT(ErrorOf("{{ 1 | prnt }}"), HasSubstr("no filter is called \"prnt\""));
  EXPECT_THAT(ErrorOf("{{ 1 is od }}"), HasSubstr("no test is called \"od\""));
  EXPECT_THAT(ErrorOf("{{ 'a'.encode() }}"), HasSubstr("the member \"encode\" of str is not supported"));
  EXPECT_THAT(ErrorOf("{{ lipsum() }}"), HasSubstr("\"lipsum\" is not supported"));
  EXPECT_THAT(ErrorOf("{{ 'é'.isalpha() }}"), HasSubstr("outside ASCII is not supported"));
  EXPECT_THAT(ErrorOf("{{ 9223372036854775807 + 1 }}"), HasSubstr("does not fit in 64 bits"));
  EXPECT_THAT(ErrorOf("{{ 2 ** 64 }}"), HasSubstr("does not fit in 64 bits"));
  EXPECT_THAT(ErrorOf("{{ -9223372036854775807 - 2 }}"), HasSubstr("does not fit in 64 bits"));
  EXPECT_THAT(ErrorOf("{{ 4611686018427387904 * 2 }}"), HasSubstr("does not fit in 64 bits"));
  EXPECT_THAT(ErrorOf("{{ 99999999999999999999 }}"), HasSubstr("does not fit in 64 bits"));
}

TEST(JinjaTest, TheDateIsTheOneGiven) {
  const Template dated("a\n{{ strftime_now('%d %b %Y, %H:%M') }}", "t");
  const Rendering rendering = dated.Render({}, 1700000000);
  EXPECT_EQ(rendering.text, "a\n14 Nov 2023, 22:13");
  EXPECT_EQ(rendering.date_line, 2);
  EXPECT_FALSE(Template("{{ strftime_now is defined }}", "t").Render({}, 0).date_line);
}

// Each would take all time or memory.
TEST(JinjaTest, TimeAndMemoryAreBounded) {
  const Limits small{.steps = 100'000, .bytes = 1 << 20, .depth = 1000};
  const auto loop = [](std::string_view body) {
    return fmt::format(
        "{{% set ns = namespace(x='ab', l=[1], d={{'a': 1}}) %}}{{% for i in range(300) %}}{}{{% endfor %}}", body);
  };
  const auto steps = HasSubstr("the template takes more than 100000 steps");
  const auto bytes = HasSubstr("the template makes more than 1048576 bytes of values");
  EXPECT_THAT(ErrorOf(loop("{% for j in range(999) %}{% endfor %}"), small), ::testing::AnyOf(steps, bytes));
  EXPECT_THAT(ErrorOf(loop("{% set ns.x = ns.x + ns.x %}"), small), bytes);
  EXPECT_THAT(ErrorOf(loop("{% set ns.x = ns.x ~ ns.x %}"), small), bytes);
  EXPECT_THAT(ErrorOf(loop("{% set ns.x = ns.x | replace('a', 'aa') %}"), small), bytes);
  EXPECT_THAT(ErrorOf(loop("{% set ns.x = ns.x.join(ns.x) %}"), small), bytes);
  EXPECT_THAT(ErrorOf(loop("{% set ns.x = '%s%s' % (ns.x, ns.x) %}"), small), bytes);
  EXPECT_THAT(ErrorOf(loop("{% set ns.x = '{0}{0}'.format(ns.x) %}"), small), bytes);
  EXPECT_THAT(ErrorOf(loop("{% set ns.l = ns.l + ns.l %}"), small), bytes);
  EXPECT_THAT(ErrorOf(loop("{% set ns.l = [ns.l, ns.l] %}"), small), HasSubstr("values nested more than 128 deep"));
  EXPECT_THAT(ErrorOf(loop("{% set ns.d = {'a': ns.d} %}"), small), HasSubstr("values nested more than 128 deep"));
  EXPECT_THAT(ErrorOf(loop("{% for y in [ns.l] %}{% set ns.l = [loop] %}{% endfor %}"), small),
              HasSubstr("values nested more than 128 deep"));
  EXPECT_THAT(ErrorOf(loop("{% set ns.l = joiner(ns.l) %}"), small), HasSubstr("values nested more than 128 deep"));
  for (const char* text :
       {"{{ 'a' * 9999999999 }}", "{{ [1] * 9999999999 }}", "{{ 'a'.center(9999999999) }}",
        "{{ 'a'.zfill(9999999999) }}", "{{ 'a' | indent(9999999999) }}", "{{ [[1]] | tojson(indent=9999999999) }}",
        "{{ [1] | batch(9999999999, 'x') | list }}", "{{ [1] | slice(9999999999) | list }}",
        "{{ 'aaaa' | replace('', 'a' * 300000) }}", "{{ 'a'.ljust(9999999999, 'é') }}",
        "{{ ('a' * 100000) | list | length }}", "{{ ['x' * 1000] * 2000 }}"})
    EXPECT_THAT(ErrorOf(text, small), bytes) << text;
  EXPECT_THAT(ErrorOf("{{ '%999999999d' % 1 }}", small), HasSubstr("a width or precision above 10000"));
  EXPECT_THAT(ErrorOf("{{ '{:999999999}'.format(1) }}", small), HasSubstr("a width or precision above 10000"));
  // A list that holds itself twice, twenty times over: small in memory, large as text, and long to compare.
  const std::string twice =
      "{% set ns = namespace(a=[1], b=[1]) %}{% for i in range(40) %}{% set ns.a = [ns.a, ns.a] %}"
      "{% set ns.b = [ns.b, ns.b] %}{% endfor %}";
  EXPECT_THAT(ErrorOf(twice + "{{ ns.a }}", small), ::testing::AnyOf(steps, bytes));
  EXPECT_THAT(ErrorOf(twice + "{{ ns.a | tojson }}", small), ::testing::AnyOf(steps, bytes));
  EXPECT_THAT(ErrorOf(twice + "{{ ns.a == ns.b }}", small), steps);
  EXPECT_THAT(ErrorOf(twice + "{{ ns.a < ns.b }}", small), steps);
}

TEST(JinjaTest, DepthIsBounded) {
  const auto repeated = [](std::string_view text, int count) {
    std::string out;
    for (int i = 0; i < count; ++i) out += text;
    return out;
  };
  EXPECT_THAT(ErrorOf("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}"),
              AllOf(StartsWith("chat_template.jinja:1: "), HasSubstr("does a macro call itself without end?")));
  EXPECT_THAT(ErrorOf("{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}"),
              HasSubstr("nested more than 1000 deep"));
  EXPECT_THAT(ErrorOf("{% macro m() %}{% call m() %}{{ caller() }}{% endcall %}{% endmacro %}{{ m() }}"),
              HasSubstr("nested more than 1000 deep"));
  constexpr std::pair<std::string_view, std::string_view> kBrackets[] = {
      {"(", ")"},      {"[", "]"},   {"{1:", "}"}, {"f(", ")"},         {"x[", "]"},
      {"x | f(", ")"}, {"not ", ""}, {"-", ""},    {"x if y else ", ""}};
  for (const auto& [open, close] : kBrackets) {
    EXPECT_THAT(ErrorOf("{{ " + repeated(open, 100'000) + "x" + repeated(close, 100'000) + " }}"),
                HasSubstr("nested more than 150 deep"))
        << open;
  }
  EXPECT_THAT(ErrorOf(repeated("{% if x %}", 100'000)), HasSubstr("nested more than 150 deep"));
  EXPECT_THAT(ErrorOf("{% set " + repeated("(", 100'000) + "x" + repeated(")", 100'000) + " = 1 %}"),
              HasSubstr("nested more than 150 deep"));
  // Left-deep chains are long and not nested.
  EXPECT_THAT(ErrorOf("{{ 1" + repeated(" + 1", 100'000) + " }}"), HasSubstr("nested more than 1000 deep"));
  EXPECT_EQ(Render("{{ 1" + repeated(" + 1", 500) + " }}"), "501");
  EXPECT_EQ(Render("{{ x" + repeated(" ~ 'a'", 5000) + " }}").size(), 5000u);
  EXPECT_EQ(Render("{% if x %}" + repeated("{% elif x %}", 5000) + "{% else %}y{% endif %}"), "y");
}

// Values that refer to each other must neither leak nor end in one deep recursion.
TEST(JinjaTest, ValuesThatHoldEachOtherAreFreed) {
  EXPECT_EQ(Render("{% set ns = namespace() %}{% set ns.me = ns %}{{ ns.me.me is defined }}"), "True");
  EXPECT_EQ(
      Render("{% set ns = namespace(last=none) %}{% for i in range(20000) %}{% set next = namespace(link=ns.last) %}"
             "{% set ns.last = next %}{% endfor %}{{ ns.last.link is defined }}"),
      "True");
  EXPECT_EQ(
      Render("{% set ns = namespace(f=none) %}{% for i in range(20000) %}{% set old = ns.f %}{% macro m() %}{{ old }}"
             "{% endmacro %}{% set ns.f = m %}{% endfor %}done"),
      "done");
  EXPECT_EQ(Render("{% set ns = namespace(f=none) %}{% for i in range(20000) %}{% set old = ns.f %}{% for j in [1] %}"
                   "{% set ns.f = loop %}{% endfor %}{% endfor %}done"),
            "done");
  EXPECT_EQ(Render("{% for i in [1, 2] %}{{ loop.changed(loop) }}{% endfor %}"), "TrueFalse");
}

TEST(JinjaTest, KeysKeepTheOrderOfTheJson) {
  const Limits limits;
  Meter meter(limits);
  const Value value = FromJson(R"({"b": {"z": 1, "a": [1.0, "é", null]}, "a": true})", meter);
  EXPECT_EQ(Template("{{ x | tojson }} {{ x }}", "t").Render({{"x", value}}, 0).text,
            R"({"b": {"z": 1, "a": [1.0, "é", null]}, "a": true} {'b': {'z': 1, 'a': [1.0, 'é', None]}, 'a': True})");
  EXPECT_THAT(ErrorText([&] { FromJson(R"({"a": 1, "a": 2})", meter); }), HasSubstr("\"a\" stands twice"));
  EXPECT_THAT(ErrorText([&] { FromJson("[18446744073709551615]", meter); }), HasSubstr("does not fit in 64 bits"));
  EXPECT_THAT(ErrorText([&] { FromJson("[99999999999999999999]", meter); }), HasSubstr("does not fit in 64 bits"));
  EXPECT_THAT(ErrorText([&] { FromJson(std::string(100, '['), meter); }), HasSubstr("nested more than 64 deep"));
  EXPECT_THAT(ErrorText([&] { FromJson("{", meter); }), HasSubstr("no JSON"));
}

}  // namespace
}  // namespace circlet::jinja
