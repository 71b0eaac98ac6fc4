#include "circlet/preprocess/chat.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "error_text.h"
#include "preprocess/gemma_tokenizer_file.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

std::string Render(const char* messages, const ChatOptions& options = {}, const ChatFormat& format = {},
                   const char* tools = "null") {
  return RenderChat(json::parse(messages), format, options, json::parse(tools)).text;
}

std::string ErrorOf(const char* messages) {
  return ErrorText([&] { Render(messages); });
}

// Gemma 3's tokenizer with the control tokens that Gemma 4 has in their place (gemma4.md 7.1).
const Tokenizer& Gemma4() {
  static const Tokenizer tokenizer = [] {
    constexpr std::pair<std::string_view, std::string_view> kRenamed[] = {
        {"<start_of_turn>", "<|turn>"},   {"<end_of_turn>", "<turn|>"},  {"<unused92>", "<|think|>"},
        {"<start_of_image>", "<|image>"}, {"<unused2978>", "<|image|>"}, {"<unused2980>", "<image|>"}};
    std::string text = GemmaTokenizerJson();
    for (const auto& [from, to] : kRenamed) {
      const std::string quoted = fmt::format("\"{}\"", from);
      for (size_t at = text.find(quoted); at != std::string::npos; at = text.find(quoted, at))
        text.replace(at, quoted.size(), fmt::format("\"{}\"", to));
    }
    return Tokenizer::Parse(text, "tokenizer.json");
  }();
  return tokenizer;
}

TEST(ChatTest, WorkedExamplesHaveTheIdsOfTheSpecification) {
  const auto ids = [](const char* messages, const ChatOptions& options, std::vector<int64_t> soft_tokens) {
    return Gemma4().Encode(ExpandImages(Render(messages, options), soft_tokens), false);
  };
  EXPECT_THAT(
      ids(R"([{"role": "user", "content": "What is 2+2?"}])", {.generation_prompt = true}, {}),
      ElementsAre(2, 105, 2364, 107, 3689, 563, 236743, 236778, 236862, 236778, 236881, 106, 107, 105, 4368, 107));
  EXPECT_THAT(ids(R"([{"role": "user", "content": [{"type": "image", "image": "a"},
                      {"type": "text", "text": "Describe this image."}]}])",
                  {.generation_prompt = true}, {3}),
              ElementsAre(2, 105, 2364, 107, 255999, 258880, 258880, 258880, 258882, 82858, 672, 2471, 236761, 106, 107,
                          105, 4368, 107));
  EXPECT_THAT(ids(R"([{"role": "system", "content": "You are terse."}, {"role": "user", "content": "Hi"}])",
                  {.generation_prompt = true, .thinking = true}, {}),
              ElementsAre(2, 105, 9731, 107, 98, 107, 3048, 659, 17514, 236761, 106, 107, 105, 2364, 107, 10979, 106,
                          107, 105, 4368, 107));
  EXPECT_EQ(FindPlaceholders(Gemma4()).image, 258880);
}

// gemma4.md 7.4, example 1.
TEST(ChatTest, AUserTurnAsksForTheModels) {
  EXPECT_EQ(Render(R"([{"role": "user", "content": " What is 2+2?\n"}])", {.generation_prompt = true}),
            "<bos><|turn>user\nWhat is 2+2?<turn|>\n<|turn>model\n");
}

// Example 2.
TEST(ChatTest, ImagesStandBareOrBetweenNewlines) {
  const char* messages = R"([{"role": "user", "content": [
    {"type": "image", "image": "a.png"}, {"type": "text", "text": "Describe this image."}]}])";
  const ChatPrompt prompt = RenderChat(json::parse(messages), {}, {.generation_prompt = true});
  EXPECT_THAT(prompt.images, ElementsAre("a.png"));
  EXPECT_EQ(ExpandImages(prompt.text, std::vector<int64_t>{3}),
            "<bos><|turn>user\n<|image><|image|><|image|><|image|><image|>Describe this image.<turn|>\n<|turn>model\n");
  EXPECT_EQ(Render(messages, {}, {.images_between_newlines = true}),
            "<bos><|turn>user\n\n\n<|image|>\n\nDescribe this image.<turn|>\n");
}

// Example 3.
TEST(ChatTest, ThinkingOpensTheSystemTurn) {
  EXPECT_EQ(Render(R"([{"role": "system", "content": "You are terse. "}, {"role": "user", "content": "Hi"}])",
                   {.generation_prompt = true, .thinking = true}),
            "<bos><|turn>system\n<|think|>\nYou are terse.<turn|>\n<|turn>user\nHi<turn|>\n<|turn>model\n");
  EXPECT_EQ(Render(R"([{"role": "user", "content": "Hi"}])", {.thinking = true}),
            "<bos><|turn>system\n<|think|>\n<turn|>\n<|turn>user\nHi<turn|>\n");
}

// Example 4.
TEST(ChatTest, ToolsAreDeclaredCalledAndAnswered) {
  const char* tools = R"([{"type": "function", "function": {"name": "get_weather", "description": "Current weather.",
    "parameters": {"type": "object", "required": ["city"], "properties": {
      "unit": {"type": "string", "enum": ["C", "F"]}, "days": {"type": "integer"},
      "city": {"type": "string", "description": "City name"}}}}}])";
  const std::string declaration =
      "<|tool>declaration:get_weather{description:<|\"|>Current "
      "weather.<|\"|>,parameters:{properties:{city:{description:"
      "<|\"|>City name<|\"|>,type:<|\"|>STRING<|\"|>},days:{type:<|\"|>INTEGER<|\"|>},unit:{enum:[<|\"|>C<|\"|>,<|\"|>F"
      "<|\"|>],type:<|\"|>STRING<|\"|>}},required:[<|\"|>city<|\"|>],type:<|\"|>OBJECT<|\"|>}}<tool|>";
  const std::string call =
      "<|tool_call>call:get_weather{city:<|\"|>Oslo<|\"|>,days:2,flag:true,opts:{a:[1,<|\"|>x<|\"|>]}}<tool_call|>";
  const std::string start =
      "<bos><|turn>system\n" + declaration + "<turn|>\n<|turn>user\nWeather?<turn|>\n<|turn>model\n";
  json messages = json::parse(R"([{"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": null, "reasoning": "Ask.", "tool_calls": [{"id": "1", "function": {"name": "get_weather",
      "arguments": {"opts": {"a": [1, "x"]}, "flag": true, "days": 2, "city": "Oslo"}}}]}])");
  const auto render = [&] { return RenderChat(messages, {}, {.generation_prompt = true}, json::parse(tools)).text; };
  const std::string thought = "<|channel>thought\nAsk.\n<channel|>";
  EXPECT_EQ(render(), start + thought + call + "<|tool_response>");

  messages.push_back(json::parse(R"({"role": "tool", "tool_call_id": "1", "content": {"temp": 21}})"));
  const std::string answered = start + thought + call + "<|tool_response>response:get_weather{temp:21}<tool_response|>";
  EXPECT_EQ(render(), answered);

  // The model's next message goes on in the same turn.
  messages.push_back(json::parse(R"({"role": "assistant", "content": "21 degrees."})"));
  EXPECT_EQ(render(), answered + "21 degrees.<turn|>\n<|turn>model\n");

  // Thoughts before the last question are dropped.
  messages.push_back(json::parse(R"({"role": "user", "content": "Thanks"})"));
  EXPECT_EQ(render(), start + call +
                          "<|tool_response>response:get_weather{temp:21}<tool_response|>21 degrees.<turn|>\n"
                          "<|turn>user\nThanks<turn|>\n<|turn>model\n");

  messages[2]["content"] = "21 C";
  EXPECT_THAT(render(), HasSubstr("response:get_weather{value:<|\"|>21 C<|\"|>}<tool_response|>"));
  messages[1]["tool_calls"][0]["function"]["arguments"] = "{\"Unit\": 1, \"city\": \"Oslo\"}";
  EXPECT_THAT(render(), HasSubstr("call:get_weather{city:<|\"|>Oslo<|\"|>,Unit:1}<tool_call|>"));
}

TEST(ChatTest, ThoughtsOfEarlierAnswersAreRemoved) {
  EXPECT_EQ(Render(R"([{"role": "user", "content": "a"},
    {"role": "assistant", "content": "<|channel>thought\nhm<channel|> yes <|channel>x<channel|>"}])"),
            "<bos><|turn>user\na<turn|>\n<|turn>model\nyes<turn|>\n");
}

TEST(ChatTest, WhiteSpaceOfAnyKindIsTrimmed) {
  EXPECT_EQ(Render(R"([{"role": "user", "content": "\u00a0\u3000\u0085x\u00e9 \u2028\t"}])"),
            "<bos><|turn>user\nx\u00e9<turn|>\n");
}

TEST(ChatTest, LargerModelsEndThePromptWithAnEmptyThought) {
  const ChatFormat format{.empty_thought = true};
  const char* messages = R"([{"role": "user", "content": "a"}])";
  EXPECT_THAT(Render(messages, {.generation_prompt = true}, format),
              ::testing::EndsWith("<|turn>model\n<|channel>thought\n<channel|>"));
  EXPECT_THAT(Render(messages, {.generation_prompt = true, .thinking = true}, format),
              ::testing::EndsWith("<|turn>model\n"));
}

TEST(ChatTest, TheTemplateTellsItsVariantByItsLiterals) {
  const ChatFormat bare = DetectChatFormat("{{- '<|image|>' -}}", "x");
  EXPECT_FALSE(bare.images_between_newlines);
  EXPECT_FALSE(bare.empty_thought);
  EXPECT_TRUE(DetectChatFormat(R"({{- '\n\n<|image|>\n\n' -}})", "x").images_between_newlines);
  EXPECT_TRUE(DetectChatFormat(R"({{- '<|channel>thought\n<channel|>' -}})", "x").empty_thought);
  EXPECT_TRUE(DetectChatFormat("<|channel>thought\n<channel|>", "x").empty_thought);
  EXPECT_FALSE(DetectChatFormat(R"({{- '<|channel>thought\n' + reasoning + '\n<channel|>' -}})", "x").empty_thought);
}

TEST(ChatTest, TheTemplateMayStandInTokenizerConfig) {
  const TempDirectory directory;
  EXPECT_EQ(LoadChatFormat(directory.Path()).source, "built in");
  const auto config = [&](const char* text) {
    WriteFile(directory.Path() / "tokenizer_config.json", text);
    return LoadChatFormat(directory.Path());
  };
  EXPECT_EQ(config("{}").source, "built in");
  EXPECT_TRUE(config(R"({"chat_template": "\n\n<|image|>\n\n"})").images_between_newlines);
  const ChatFormat named = config(R"({"chat_template": [{"name": "rag", "template": ""},
    {"name": "default", "template": "\n\n<|image|>\n\n"}]})");
  EXPECT_TRUE(named.images_between_newlines);
  EXPECT_EQ(named.source, "tokenizer_config.json");
  WriteFile(directory.Path() / "chat_template.jinja", "<|image|>");
  EXPECT_FALSE(LoadChatFormat(directory.Path()).images_between_newlines);
}

TEST(ChatTest, WhatIsNoConversationIsNamed) {
  EXPECT_THAT(ErrorOf("null"), HasSubstr("messages: expected a list of messages, found nothing"));
  EXPECT_THAT(ErrorOf("[]"), HasSubstr("messages: expected a list"));
  EXPECT_THAT(ErrorOf(R"([{"content": "a"}])"), HasSubstr("messages[0]: role"));
  EXPECT_THAT(ErrorOf(R"([{"role": "robot", "content": "a"}])"),
              HasSubstr("messages[0]: role: expected user, assistant"));
  EXPECT_THAT(ErrorOf(R"([{"role": "user"}])"), HasSubstr("messages[0]: content: is missing"));
  EXPECT_THAT(ErrorOf(R"([{"role": "user", "content": 5}])"), HasSubstr("expected a text or a list of parts, found 5"));
  EXPECT_THAT(ErrorOf(R"([{"role": "user", "content": [{"type": "smell"}]}])"), HasSubstr("found \"smell\""));
  EXPECT_THAT(ErrorOf(R"([{"role": "user", "content": [{"type": "image"}]}])"), HasSubstr("image"));
  EXPECT_THAT(ErrorOf(R"([{"role": "tool", "content": "a"}])"), HasSubstr("must follow the assistant's tool_calls"));
  EXPECT_THAT(ErrorOf(R"([{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": 5}}]}])"),
              HasSubstr("arguments: expected an object, found 5"));
}

TEST(ChatTest, PlaceholdersAndImagesMustBeEquallyMany) {
  try {
    ExpandImages("a <|image|> b <|image|>", std::vector<int64_t>{2});
    FAIL();
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("the prompt has 2 times \"<|image|>\" for 1 images"));
  }
  EXPECT_EQ(ExpandImages("no image", {}), "no image");
}

TEST(ChatTest, TokenTypesTellPlaceholdersApart) {
  const std::vector<int64_t> ids{5, 10, 11, 12, 13, -1};
  EXPECT_THAT(TokenTypes(ids, {.image = 10, .video = 11, .audio = 12}), ElementsAre(0, 1, 2, 3, 0, 0));
  EXPECT_THAT(TokenTypes(ids, {.image = 10}), ElementsAre(0, 1, 0, 0, 0, 0));
}

}  // namespace
}  // namespace circlet
