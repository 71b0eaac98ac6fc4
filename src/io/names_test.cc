#include "circlet/io/names.h"

#include <gtest/gtest.h>

#include <vector>

namespace circlet {
namespace {

const std::vector<std::string> kPoints = {"self_attn.softmax", "self_attn.logits", "mlp.gate_act", "act"};

TEST(NearestTest, FindsTheMeantNameBehindOneWrongLetterEach) {
  EXPECT_EQ(Nearest("self_atn.softmax", kPoints), "self_attn.softmax");   // one left out
  EXPECT_EQ(Nearest("self_attnn.logits", kPoints), "self_attn.logits");   // one too many
  EXPECT_EQ(Nearest("mlp.gate_akt", kPoints), "mlp.gate_act");            // one replaced
  EXPECT_EQ(Nearest("slef_attn.softmax", kPoints), "self_attn.softmax");  // two swapped
  EXPECT_EQ(Nearest("act", kPoints), "act");
}

TEST(NearestTest, AForgottenPrefixIsFound) {
  EXPECT_EQ(Nearest("norm.weight", std::vector<std::string>{"model.norm.weight"}), "model.norm.weight");
}

TEST(NearestTest, ABeginningMeansTheOnlyNameThatHasIt) {
  const std::vector<std::string> flags{"--help", "--temperature", "--top-k", "--top-p"};
  EXPECT_EQ(Nearest("--temp", flags), "--temperature");
  EXPECT_NE(Nearest("--to", flags), "--temperature");
  EXPECT_EQ(Nearest("--te", std::vector<std::string>{"--temperature", "--template"}), "") << "two have it";
  EXPECT_EQ(Nearest("--t", std::vector<std::string>{"--temperature"}), "") << "says too little";
}

TEST(NearestTest, ASwapCountsOnce) {
  // Two replacements would be more than half of the name.
  EXPECT_EQ(Nearest("atc", kPoints), "act");
}

TEST(NearestTest, StaysSilentWhenNothingIsNear) {
  EXPECT_EQ(Nearest("rotary", kPoints), "");
  EXPECT_EQ(Nearest("", kPoints), "");
  EXPECT_EQ(Nearest("x", {}), "");
}

TEST(NearestTest, TheFirstOfEqualsIsTaken) {
  const std::vector<std::string> names = {"bat", "cat"};
  EXPECT_EQ(Nearest("rat", names), "bat");
}

TEST(NearestTest, HintIsTheEndOfAnErrorOrNothing) {
  EXPECT_EQ(NearestHint("actt", kPoints), "; nearest: \"act\"");
  EXPECT_EQ(NearestHint("rotary", kPoints), "");
}

TEST(ShortenedTest, LongTextIsCutBetweenLetters) {
  EXPECT_EQ(Shortened("ab"), "ab");
  const std::string long_name = std::string(199, 'x') + "\u00e9" + std::string(1 << 20, 'y');
  EXPECT_EQ(Shortened(long_name), std::string(199, 'x') + "...");
}

}  // namespace
}  // namespace circlet
