#include "circlet/preprocess/tokenizer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "error_text.h"
#include "paths.h"
#include "preprocess/gemma_tokenizer_file.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const std::filesystem::path kData = SourcePath("tests/data");
const std::filesystem::path kTiny = SourcePath("examples/tiny-gemma4");

const Tokenizer& Gemma() {
  static const Tokenizer tokenizer = Tokenizer::Parse(GemmaTokenizerJson(), "gemma3_tokenizer.json");
  return tokenizer;
}

// A vocabulary of a few pieces that tests bend in one place.
json Small() {
  return json::parse(R"({
    "added_tokens": [
      {"id": 0, "content": "<unk>", "special": true},
      {"id": 1, "content": "<bos>", "special": true},
      {"id": 2, "content": "<x>", "special": false},
      {"id": 3, "content": "<x><y>", "special": false}],
    "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": "_"},
    "pre_tokenizer": null,
    "post_processor": {"type": "TemplateProcessing", "single": [
      {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]},
    "decoder": {"type": "Sequence", "decoders": [
      {"type": "Replace", "pattern": {"String": "_"}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}]},
    "model": {"type": "BPE", "unk_token": "<unk>", "fuse_unk": true, "byte_fallback": false,
      "vocab": {"<unk>": 0, "<bos>": 1, "_": 4, "a": 5, "b": 6, "c": 7, "ab": 8, "bc": 9, "abc": 10, "_a": 11, "aa": 12},
      "merges": [["b", "c"], ["a", "b"], ["a", "bc"], ["_", "a"], ["a", "a"]]}})");
}

std::vector<int64_t> Ids(const json& file, std::string_view text) {
  return Tokenizer::Parse(file.dump(), "tokenizer.json").Encode(text, false);
}

std::string ErrorOf(const std::string& text) {
  return ErrorText([&] { Tokenizer::Parse(text, "tokenizer.json"); });
}
std::string ErrorOf(const json& file) { return ErrorOf(file.dump()); }

TEST(TokenizerTest, GemmaTextsHaveTheIdsOfTheReference) {
  const json golden = json::parse(ReadFile(kData / "golden/preprocess/tokenizer.json"));
  ASSERT_EQ(golden["encode"].size(), 66u);
  for (const json& row : golden["encode"]) {
    const std::string text = row["text"];
    const std::vector<int64_t> ids = row["ids"];
    EXPECT_EQ(Gemma().Encode(text, false), ids) << row["text"];
    EXPECT_EQ(Gemma().Encode(text, true), row["ids_special"].get<std::vector<int64_t>>()) << row["text"];
    EXPECT_EQ(Gemma().Decode(ids, false), row["decoded"].get<std::string>());
    EXPECT_EQ(Gemma().Decode(ids, true), row["decoded_skip_special"].get<std::string>());
  }
}

TEST(TokenizerTest, GemmaIdsDecodeToTheTextsOfTheReference) {
  const json golden = json::parse(ReadFile(kData / "golden/preprocess/tokenizer.json"));
  ASSERT_EQ(golden["decode"].size(), 10u);
  for (const json& row : golden["decode"]) {
    const std::vector<int64_t> ids = row["ids"];
    EXPECT_EQ(Gemma().Decode(ids, false), row["decoded"].get<std::string>()) << row;
    EXPECT_EQ(Gemma().Decode(ids, true), row["decoded_skip_special"].get<std::string>()) << row;
    for (size_t i = 0; i < ids.size(); ++i) EXPECT_EQ(Gemma().Piece(ids[i]), row["tokens"][i].get<std::string>());
  }
}

// model.md 8, "Check encodings".
TEST(TokenizerTest, SpacesTabsAndUnknownCharactersFollowTheSpecification) {
  EXPECT_THAT(Gemma().Encode("a  b\n\n\n c\t\td", false), ElementsAre(236746, 138, 236763, 109, 505, 255969, 236753));
  EXPECT_THAT(Gemma().Encode("  leading", false), ElementsAre(138, 26016));
  EXPECT_THAT(Gemma().Encode("na\u00efve \U0001F600\U0001FAE9 \u0378 x", false),
              ElementsAre(1789, 238527, 560, 163543, 478, 397, 409, 407, 236743, 443, 422, 1123));
  EXPECT_THAT(Gemma().Encode("</div>", false), ElementsAre(235));
}

TEST(TokenizerTest, TheExampleCheckpointDecodesItsOwnHeldOutText) {
  const Tokenizer tokenizer = Tokenizer::Load(kTiny);
  const std::string text = ReadFile(kTiny / "eval/heldout.txt");
  const std::vector<int64_t> ids = tokenizer.Encode(text, false);
  EXPECT_EQ(ids.size(), 29244u);  // reference.json
  EXPECT_EQ(tokenizer.Decode(ids, false), text);
  EXPECT_EQ(tokenizer.RequireId("<|image|>"), 2043);
  EXPECT_EQ(tokenizer.IdLimit(), 2048);
  EXPECT_TRUE(tokenizer.IsSpecial(2043));
  EXPECT_FALSE(tokenizer.IsSpecial(300));
}

TEST(TokenizerTest, MergesGoByRankAndThenFromTheLeft) {
  // "abc": b+c has rank 0, so a+bc wins over ab+c; "aaa": the left pair first.
  EXPECT_THAT(Ids(Small(), "abc"), ElementsAre(10));
  EXPECT_THAT(Ids(Small(), "aaa"), ElementsAre(12, 5));
  EXPECT_THAT(Ids(Small(), " ab"), ElementsAre(4, 8));
  EXPECT_THAT(Ids(Small(), ""), IsEmpty());
}

TEST(TokenizerTest, MergesAsStringsMeanTheSame) {
  json file = Small();
  file["model"]["merges"] = {"b c", "a b", "a bc", "_ a", "a a"};
  EXPECT_THAT(Ids(file, "abc aaa"), ElementsAre(10, 11, 12));
}

TEST(TokenizerTest, MergesBeforeTheVocabularyAreRead) {
  const std::string text = R"({"model": {"merges": [["a", "b"]], "vocab": {"a": 0, "b": 1, "ab": 2}, "type": "BPE"}})";
  EXPECT_THAT(Tokenizer::Parse(text, "t").Encode("ab", false), ElementsAre(2));
}

TEST(TokenizerTest, TheLongestAddedTokenWinsAndSplitsTheText) {
  EXPECT_THAT(Ids(Small(), "a<x><y>b"), ElementsAre(5, 3, 6));
  EXPECT_THAT(Ids(Small(), "a<x><z"), ElementsAre(5, 2, 0));  // "<z" is unknown, fused
}

TEST(TokenizerTest, UnknownCharactersAreFusedOnlyWhenTheFileSaysSo) {
  json file = Small();
  EXPECT_THAT(Ids(file, "a??b"), ElementsAre(5, 0, 6));
  file["model"]["fuse_unk"] = false;
  EXPECT_THAT(Ids(file, "a??b"), ElementsAre(5, 0, 0, 6));
  file["model"]["unk_token"] = nullptr;
  EXPECT_THROW(Ids(file, "a??b"), Error);
}

TEST(TokenizerTest, BytesStandForACharacterOnlyWhenAllOfThemHavePieces) {
  json file = Small();
  file["model"]["byte_fallback"] = true;
  file["model"]["vocab"]["<0xC3>"] = 20;
  EXPECT_THAT(Ids(file, "\u00e9"), ElementsAre(0));
  file["model"]["vocab"]["<0xA9>"] = 21;
  EXPECT_THAT(Ids(file, "\u00e9"), ElementsAre(20, 21));
  const Tokenizer tokenizer = Tokenizer::Parse(file.dump(), "t");
  const std::vector<int64_t> broken{5, 21, 20, 5, 20, 21};
  EXPECT_EQ(tokenizer.Decode(broken, false), "a\uFFFD\uFFFDa\u00e9");
}

TEST(TokenizerTest, IgnoreMergesTakesAWholeWordOfTheVocabulary) {
  json file = Small();
  file["model"]["merges"] = json::array();
  EXPECT_THAT(Ids(file, "abc"), ElementsAre(5, 6, 7));
  file["model"]["ignore_merges"] = true;
  EXPECT_THAT(Ids(file, "abc"), ElementsAre(10));
}

TEST(TokenizerTest, SplitMergedWithPreviousCutsBehindEachOccurrence) {
  json file = Small();
  file["normalizer"] = nullptr;
  file["model"]["vocab"][" "] = 13;
  file["model"]["vocab"]["a "] = 14;
  file["model"]["vocab"][" a"] = 15;
  file["model"]["merges"] = json::parse(R"([[" ", "a"], ["a", " "]])");
  EXPECT_THAT(Ids(file, "a a"), ElementsAre(5, 15));  // " a" has the lower rank
  file["pre_tokenizer"] = {
      {"type", "Split"}, {"pattern", {{"String", " "}}}, {"behavior", "MergedWithPrevious"}, {"invert", false}};
  EXPECT_THAT(Ids(file, "a a"), ElementsAre(14, 5));  // no merge across the cut
}

TEST(TokenizerTest, AHundredThousandCharactersInOneWordTakeNoQuadraticTime) {
  const std::string text(100000, 'a');
  EXPECT_EQ(Ids(Small(), text).size(), 50000u);
}

TEST(TokenizerTest, TextThatIsNotUtf8NamesTheByte) {
  try {
    Ids(Small(), "ab\xff");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("byte 2 (0xFF) is not UTF-8"));
  }
}

TEST(TokenizerTest, AnIdWithoutAPieceIsNamed) {
  const Tokenizer tokenizer = Tokenizer::Parse(Small().dump(), "tokenizer.json");
  for (const int64_t id : {int64_t{-1}, int64_t{13}, INT64_MAX}) {
    try {
      tokenizer.Decode(std::vector<int64_t>{id}, false);
      FAIL() << id;
    } catch (const Error& error) {
      EXPECT_THAT(error.what(), HasSubstr(fmt::format("no piece has id {}; ids run from 0 to 12", id)));
    }
  }
}

TEST(TokenizerTest, KindsThatAreNotImplementedAreNamed) {
  const auto with = [](const char* pointer, json value) {
    json file = Small();
    file[json::json_pointer(pointer)] = std::move(value);
    return ErrorOf(file);
  };
  EXPECT_THAT(with("/model/type", "Unigram"), HasSubstr("model.type is \"Unigram\"; circlet reads \"BPE\""));
  EXPECT_THAT(with("/model/dropout", 0.1), HasSubstr("model.dropout: 0.1 is not implemented"));
  EXPECT_THAT(with("/model/end_of_word_suffix", "</w>"), HasSubstr("model.end_of_word_suffix: \"</w>\""));
  EXPECT_THAT(with("/normalizer", {{"type", "NFKC"}}), HasSubstr("normalizer.type: \"NFKC\" is not implemented"));
  EXPECT_THAT(with("/normalizer/pattern", {{"Regex", " +"}}), HasSubstr("normalizer.pattern: {\"Regex\":\" +\"}"));
  EXPECT_THAT(with("/pre_tokenizer", {{"type", "ByteLevel"}}), HasSubstr("pre_tokenizer.type: \"ByteLevel\""));
  EXPECT_THAT(with("/post_processor", {{"type", "BertProcessing"}}),
              HasSubstr("post_processor.type: \"BertProcessing\""));
  EXPECT_THAT(with("/decoder", {{"type", "Metaspace"}}), HasSubstr("decoder.type: \"Metaspace\""));
  EXPECT_THAT(with("/added_tokens/2/single_word", true), HasSubstr("single_word: true is not implemented"));
  EXPECT_THAT(with("/decoder", {{"type", "Metaspace"}}), HasSubstr("use the tokenizer.json of a Gemma checkpoint"));
}

TEST(TokenizerTest, DamagedTablesAreNamed) {
  const auto with = [](const char* pointer, json value) {
    json file = Small();
    file[json::json_pointer(pointer)] = std::move(value);
    return ErrorOf(file);
  };
  EXPECT_THAT(with("/model/vocab/c", 6), HasSubstr("id 6 belongs to \"b\" and to \"c\""));
  EXPECT_THAT(with("/model/vocab/c", -1), HasSubstr("piece \"c\" has id -1; ids run from 0 to"));
  EXPECT_THAT(with("/model/vocab/c", 1u << 30), HasSubstr("piece \"c\" has id 1073741824"));
  EXPECT_THAT(with("/model/vocab/c", "7"), HasSubstr("piece \"c\": expected an integer id, found \"7\""));
  EXPECT_THAT(with("/model/vocab/c", 7.5), HasSubstr("piece \"c\": expected an integer id, found 7.5"));
  EXPECT_THAT(with("/model/vocab/c", json::array()), HasSubstr("piece \"c\": expected an integer id, found an array"));
  EXPECT_THAT(with("/model/merges/1", {"a", "q"}),
              HasSubstr("model.merges[1] (\"a\" + \"q\"): \"q\" is not in model.vocab"));
  EXPECT_THAT(with("/model/merges/1", {"a", "c"}), HasSubstr("\"ac\" is not in model.vocab"));
  EXPECT_THAT(with("/model/merges/1", {"a"}), HasSubstr("model.merges[1]: expected two pieces"));
  EXPECT_THAT(with("/model/merges/1", {"a", "b", "c"}), HasSubstr("model.merges[1]: expected two pieces"));
  EXPECT_THAT(with("/model/merges/1", "abc"), HasSubstr("found \"abc\""));
  EXPECT_THAT(with("/model/merges/1", 5), HasSubstr("model.merges[1]: expected two pieces"));
  EXPECT_THAT(with("/model/merges/1", json::object()), HasSubstr("model.merges[1]: expected two pieces"));
  EXPECT_THAT(with("/added_tokens/2/id", 5), HasSubstr("added_tokens[2]: id 5 belongs to \"a\" and to \"<x>\""));
  EXPECT_THAT(with("/added_tokens/1/id", 5), HasSubstr("\"<bos>\" has id 5 here and id 1 in model.vocab"));
  EXPECT_THAT(with("/added_tokens/2/content", ""), HasSubstr("an added token cannot be empty"));
  EXPECT_THAT(with("/added_tokens/2/id", 1u << 30), HasSubstr("1073741824 for \"<x>\""));
  EXPECT_THAT(with("/model/unk_token", "<none>"), HasSubstr("model.unk_token: \"<none>\" is neither in"));
  EXPECT_THAT(with("/model/vocab", json::array()),
              HasSubstr("model.vocab (an object) or model.merges (an array) is missing"));
}

TEST(TokenizerTest, DamagedJsonNamesTheByte) {
  const std::string text = Small().dump();
  EXPECT_THAT(ErrorOf(text.substr(0, 500)), HasSubstr("not JSON"));
  EXPECT_THAT(ErrorOf(text.substr(0, 500)), HasSubstr("was the download cut off?"));
  EXPECT_THAT(ErrorOf(std::string()), HasSubstr("not JSON"));
  EXPECT_THAT(ErrorOf(std::string("[1]")), HasSubstr("expected a JSON object at the top"));
  EXPECT_THAT(ErrorOf(std::string("{\"a\":1,\"a\":2}")), HasSubstr("the key \"a\" stands twice"));
  EXPECT_THAT(ErrorOf(std::string(1000, '[')), HasSubstr("nested deeper than"));
  EXPECT_THAT(ErrorOf(std::string(R"({"model":{"type":"BPE","vocab":{"a":0,"a":1},"merges":[]}})")),
              HasSubstr("piece \"a\" has the ids 0 and 1"));
}

TEST(TokenizerTest, EveryCutOfTheFileIsAnErrorAndNothingWorse) {
  const std::string text = Small().dump();
  for (size_t length = 0; length < text.size(); ++length)
    EXPECT_THROW(Tokenizer::Parse(text.substr(0, length), "t"), Error) << length;
}

TEST(TokenizerTest, TokenizerConfigMayDeclareTokensOfTheVocabulary) {
  const TempDirectory temporary;
  const std::filesystem::path directory = temporary.Path();
  json file = Small();
  file["model"]["vocab"]["<|video|>"] = 13;
  std::ofstream(directory / "tokenizer.json") << file.dump();
  std::ofstream(directory / "tokenizer_config.json") << R"({"extra_special_tokens": ["<|video|>", "<none>"],
    "added_tokens_decoder": {"14": {"content": "<z>", "special": false}}})";
  const Tokenizer tokenizer = Tokenizer::Load(directory);
  EXPECT_THAT(tokenizer.Encode("a<|video|><z>", false), ElementsAre(5, 13, 14));
  EXPECT_TRUE(tokenizer.IsSpecial(13));
  EXPECT_EQ(tokenizer.IdOf("<none>"), 15);
  EXPECT_THAT(tokenizer.Encode("<none>", false), ElementsAre(15));
}

TEST(TokenizerTest, TokensWhoseIdsDependOnAnOrderThatJsonDoesNotKeepAreRefused) {
  const TempDirectory temporary;
  const std::filesystem::path directory = temporary.Path();
  std::ofstream(directory / "tokenizer.json") << Small().dump();
  std::ofstream(directory / "tokenizer_config.json") << R"({"z_token": "<z>", "w_token": "<w>"})";
  try {
    Tokenizer::Load(directory);
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("tokenizer_config.json: z_token: \"<z>\" is in no vocabulary, nor is \"<w>\""));
    EXPECT_THAT(error.what(), HasSubstr("list both in added_tokens of tokenizer.json"));
  }
}

TEST(TokenizerTest, ANormalizerThatGrowsTheTextBeyondMeasureIsAnError) {
  json file = Small();
  json doubling{{"type", "Replace"}, {"pattern", {{"String", "e"}}}, {"content", "ee"}};
  file["normalizer"] = {{"type", "Sequence"}, {"normalizers", json(40, doubling)}};
  try {
    Ids(file, "e");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("a text of 1 bytes grows past 1048592 when \"e\" becomes \"ee\""));
  }
  file["normalizer"]["normalizers"] = json(18, doubling);
  EXPECT_NO_THROW(Ids(file, "e"));
}

TEST(TokenizerTest, AMissingFileIsNamed) {
  try {
    Tokenizer::Load("/nonexistent/tokenizer.json");
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("/nonexistent/tokenizer.json"));
  }
}

}  // namespace
}  // namespace circlet
