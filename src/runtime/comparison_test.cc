#include <gmock/gmock.h>

#include <nlohmann/json.hpp>

#include "circlet/runtime/measure.h"

namespace circlet::runtime {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

Compared One(const char* source, double divergence, const char* first, const char* second, int64_t pictures = 0) {
  Compared one{.source = source, .prompt = "<b>What</b> is it?", .pictures = pictures};
  one.first.text = first;
  one.second.text = second;
  one.diverges = one.first.text != one.second.text;
  one.same_tokens = 2;
  one.tokens = 4;
  one.same_top = one.diverges ? 3 : 4;
  one.divergence = divergence;
  return one;
}

Comparison Three() {
  return ComparisonOf("a<b (files)", "c (float)",
                      {One("p:1", 0.1, "It was so.", "It was so."),
                       One("p:2 & <img>", 0.9, "Köln, it's </td><script>x</script>", "Kölle", 1),
                       One("p:3", 0.4, "He said \"no\"", "He said \"yes\"")});
}

TEST(ComparisonTest, PromptsThatDifferMostComeFirst) {
  const nlohmann::json json = nlohmann::json::parse(ComparisonJson(Three()));
  std::vector<std::string> sources;
  for (const nlohmann::json& prompt : json.at("prompts")) sources.push_back(prompt.at("source"));
  EXPECT_THAT(sources, testing::ElementsAre("p:2 & <img>", "p:3", "p:1"));
  EXPECT_EQ(json.at("tokens"), 12);
  EXPECT_NEAR(json.at("kl").get<double>(), 1.4 / 12, 1e-12);
  EXPECT_NEAR(json.at("same_top").get<double>(), 10. / 12, 1e-12);
  EXPECT_GT(json.at("kl_standard_error"), 0);
}

TEST(ComparisonTest, TextsAndPicturesHaveFiguresOfTheirOwn) {
  const Comparison comparison = Three();
  const nlohmann::json json = nlohmann::json::parse(ComparisonJson(comparison));
  EXPECT_EQ(json.at("text").at("tokens"), 8);
  EXPECT_NEAR(json.at("pictures").at("kl").get<double>(), 0.9 / 4, 1e-12);
  EXPECT_THAT(ComparisonText(comparison),
              AllOf(HasSubstr("2 of 3 texts part"), HasSubstr("pictures: KL(c (float) || a<b (files)) 0.225 nats"),
                    HasSubstr("same top-1 at 75.00 % of 4 tokens")));
  const Comparison text = ComparisonOf("a", "b", {One("p", 0, "x", "x")});
  EXPECT_FALSE(nlohmann::json::parse(ComparisonJson(text)).contains("text")) << "there is nothing else";
  EXPECT_THAT(ComparisonText(text), Not(HasSubstr("pictures")));
}

TEST(ComparisonTest, ThePageHasBothTextsAndMarksWhereTheyPart) {
  const std::string page = ComparisonHtml(Three());
  EXPECT_THAT(page, AllOf(HasSubstr("<h2>p:3</h2>"), HasSubstr("<td>He said &quot;<mark>no&quot;</mark></td>"),
                          HasSubstr("<td>He said &quot;<mark>yes&quot;</mark></td>"),
                          HasSubstr("<td>It was so.</td><td>It was so.</td>"), HasSubstr("2 of 3 texts part")));
  EXPECT_LT(page.find("p:2"), page.find("p:3"));
  EXPECT_LT(page.find("p:3"), page.find("p:1"));
  EXPECT_THAT(page, HasSubstr("<td>Köl<mark>n, it&#39;s"));
  const Comparison accents = ComparisonOf("a", "b", {One("p", 1, "\xc3\xa9", "\xc3\xa8")});
  EXPECT_THAT(ComparisonHtml(accents), HasSubstr("<td><mark>\xc3\xa9</mark></td><td><mark>\xc3\xa8</mark></td>"))
      << "no character is cut";
}

TEST(ComparisonTest, NothingOfNamesAndTextsIsMarkup) {
  const std::string page = ComparisonHtml(Three());
  EXPECT_THAT(
      page, AllOf(HasSubstr("<h2>p:2 &amp; &lt;img&gt;</h2>"), HasSubstr("a&lt;b (files)"),
                  HasSubstr("&lt;b&gt;What&lt;/b&gt; is it?"), HasSubstr("&lt;/td&gt;&lt;script&gt;x&lt;/script&gt;")));
  EXPECT_THAT(page, AllOf(Not(HasSubstr("<script")), Not(HasSubstr("<img")), Not(HasSubstr("<b>"))));
  const Comparison control = ComparisonOf("a", "b", {One("p", 1, "x\x01y\x1b[31m\n", "z")});
  EXPECT_THAT(ComparisonHtml(control), AllOf(Not(HasSubstr("\x01")), Not(HasSubstr("\x1b"))));
}

}  // namespace
}  // namespace circlet::runtime
