#include "circlet/preprocess/chat.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "error_text.h"
#include "golden.h"
#include "paths.h"
#include "preprocess/gemma_tokenizer_file.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using nlohmann::json;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

const std::filesystem::path kTiny = SourcePath("examples/tiny-gemma4");

std::vector<std::string> Conversations() {
  std::istringstream text(ReadFile(TestData("chat_templates/conversations.jsonl")));
  std::vector<std::string> lines;
  for (std::string line; std::getline(text, line);) lines.push_back(line);
  return lines;
}

// expected.json.xz, recorded from transformers (scripts/record_chat_templates.py).
const json& Expected() {
  static const json expected = json::parse(GoldenText("chat_templates/expected.json.xz"));
  return expected;
}

std::string Render(const ChatTemplate& chat, std::string_view conversation) {
  return RenderChat(chat, conversation).text;
}

// Compares every conversation; null = the reference refuses it.
void ExpectTexts(const ChatTemplate& chat, const json& texts, const std::string& name) {
  const std::vector<std::string> lines = Conversations();
  ASSERT_EQ(lines.size(), texts.size());
  for (size_t i = 0; i < lines.size(); ++i) {
    if (texts[i].is_null()) {
      EXPECT_THAT(ErrorText([&] { Render(chat, lines[i]); }), HasSubstr(name + ":")) << lines[i];
      continue;
    }
    try {
      EXPECT_EQ(Render(chat, lines[i]), texts[i].get<std::string>()) << name << "\n" << lines[i];
    } catch (const Error& error) {
      ADD_FAILURE() << name << "\n" << lines[i] << "\n" << error.what();
    }
  }
}

TEST(ChatTest, ConversationsHaveTheTextOfTheReferenceInEveryTemplate) {
  const std::vector<std::pair<std::string, std::string>> tokens{
      {"bos_token", "<bos>"}, {"eos_token", "<eos>"}, {"pad_token", "<pad>"}};
  size_t templates = 0;
  for (const auto& entry : std::filesystem::directory_iterator(TestData("chat_templates"))) {
    if (entry.path().extension() != ".jinja") continue;
    ++templates;
    const std::string name = entry.path().filename().string();
    ASSERT_TRUE(Expected()["templates"].contains(name)) << name;
    ExpectTexts(ChatTemplate::Parse(ReadFile(entry.path()), name, tokens), Expected()["templates"][name], name);
  }
  EXPECT_EQ(templates, Expected()["templates"].size());
}

TEST(ChatTest, TheExamplesOwnTemplateGivesTheIdsOfTheReference) {
  const ChatTemplate chat = ChatTemplate::Load(kTiny);
  const Tokenizer tokenizer = Tokenizer::Load(kTiny);
  ExpectTexts(chat, Expected()["example"], "chat_template.jinja");
  const std::vector<std::string> lines = Conversations();
  for (size_t i = 0; i < lines.size(); ++i) {
    const ChatPrompt prompt = RenderChat(chat, lines[i]);
    EXPECT_FALSE(prompt.add_special_tokens);
    EXPECT_EQ(tokenizer.Encode(prompt.text, false), Expected()["example_ids"][i].get<std::vector<int64_t>>())
        << lines[i];
  }
}

TEST(ChatTest, AnyRoleIsTheTemplatesBusiness) {
  const ChatTemplate chat = ChatTemplate::Load(kTiny);
  const char* as_assistant =
      R"({"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]})";
  const char* as_model = R"({"messages": [{"role": "user", "content": "Hello"}, {"role": "model", "content": "Hi"}]})";
  EXPECT_EQ(Render(chat, as_model), Render(chat, as_assistant));
  EXPECT_EQ(Render(chat, R"({"messages": [{"role": "robot", "content": "x"}]})"), "<bos><|turn>robot\nx<turn|>\n");
}

TEST(ChatTest, EveryKeyOfALineReachesTheTemplate) {
  const ChatTemplate chat = ChatTemplate::Parse(
      "{{ [tools, documents, enable_thinking, add_generation_prompt, effort, bos_token] | tojson }}", "t",
      {{"bos_token", "<s>"}});
  EXPECT_EQ(Render(chat, R"({"type": "chat", "messages": [{}], "tools": [{"z": 1, "a": 2}], "documents": [{"t": "x"}],
    "enable_thinking": true, "add_generation_prompt": true, "chat_template_kwargs": {"effort": "low", "bos_token": "<b>"}})"),
            R"([[{"z": 1, "a": 2}], [{"t": "x"}], true, true, "low", "<b>"])");
  const ChatTemplate defaults = ChatTemplate::Parse(
      "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ enable_thinking is defined }}", "t");
  EXPECT_EQ(Render(defaults, R"({"messages": [{}]})"), "TrueTrueFalseFalse");
  EXPECT_EQ(Render(ChatTemplate::Parse("{{ enable_thinking }}", "t"),
                   R"({"messages": [{}], "chat_template_kwargs": {"enable_thinking": true}})"),
            "True");
}

TEST(ChatTest, MessagesReachTheTemplateWholeButForNulls) {
  const ChatTemplate chat = ChatTemplate::Parse("{{ messages | tojson }}", "t");
  EXPECT_EQ(
      Render(chat, R"({"messages": [{"role": "x", "content": null, "name": "n", "calls": [null], "a": {"b": null}}]})"),
      R"([{"role": "x", "name": "n", "calls": [null], "a": {"b": null}}])");
  // Reasoning stands under every name that templates read.
  EXPECT_EQ(Render(chat, R"({"messages": [{"content": "x", "reasoning": "r"}]})"),
            R"([{"thinking": "r", "content": "x", "reasoning": "r", "reasoning_content": "r"}])");
}

TEST(ChatTest, PicturesAreTakenFromEveryFormOfPart) {
  const ChatTemplate chat = ChatTemplate::Parse("{{ messages | tojson }}", "t", {{"bos_token", "<bos>"}});
  const char* conversation = R"({"messages": [{"role": "user", "content": [{"type": "image", "path": "a"},
    {"type": "image", "url": "b"}, {"type": "image", "image": "c"},
    {"type": "image_url", "image_url": {"url": "d"}}, {"type": "image_url", "image_url": "e"}]}, {"role": "x"}]})";
  const ChatPrompt prompt = RenderChat(chat, conversation);
  EXPECT_THAT(prompt.images, ElementsAre("a", "b", "c", "d", "e"));
  EXPECT_THAT(prompt.text, HasSubstr(R"({"type": "image", "url": "d"}, {"type": "image", "url": "e"}]}, )"
                                     R"({"role": "x", "content": []})"));
  EXPECT_TRUE(HasPictures(conversation));
  EXPECT_FALSE(HasPictures(R"({"messages": [{"content": [{"type": "text", "text": "image"}]}, {"content": "x"}]})"));
  const auto error = [&](const char* part) {
    return ErrorText([&] { RenderChat(chat, fmt::format(R"({{"messages": [{{"content": [{}]}}]}})", part)); });
  };
  EXPECT_THAT(error(R"({"type": "image"})"), HasSubstr("messages[0].content[0]: path: is missing, and so are"));
  EXPECT_THAT(error(R"({"type": "image", "path": 5})"), HasSubstr("messages[0].content[0]: path: expected a string"));
  EXPECT_THAT(error(R"({"type": "image", "path": "a", "url": "b"})"), HasSubstr("names a picture, and so does"));
  EXPECT_TRUE(RenderChat(chat, R"({"messages": [{"content": [{"type": "audio"}]}]})").has_audio);
  EXPECT_TRUE(RenderChat(chat, R"({"messages": [{"content": [{"type": "video"}]}]})").has_video);
}

// transformers' processor puts <bos> before a prompt with pictures that lacks it; its tokenizer never does.
TEST(ChatTest, OnlyPromptsWithPicturesMayGetSpecialTokens) {
  const char* pictured = R"({"messages": [{"content": [{"type": "image", "path": "a"}]}]})";
  const char* text = R"({"messages": [{"content": "x"}]})";
  const ChatTemplate bare = ChatTemplate::Parse("x", "t", {{"bos_token", "<bos>"}});
  const ChatTemplate own = ChatTemplate::Parse("{{ bos_token }}x", "t", {{"bos_token", "<bos>"}});
  EXPECT_FALSE(RenderChat(bare, text).add_special_tokens);
  EXPECT_TRUE(RenderChat(bare, pictured).add_special_tokens);
  EXPECT_FALSE(RenderChat(own, text).add_special_tokens);
  EXPECT_FALSE(RenderChat(own, pictured).add_special_tokens);
}

// As data sets for training name them: parts say where, the line says which.
TEST(ChatTest, PicturesBesideTheMessagesGoToThePartsThatNameNone) {
  const ChatTemplate chat = ChatTemplate::Parse("{% for m in messages %}{{ m.content | length }}{% endfor %}", "t");
  const std::string part = R"({"type": "image"})", named = R"({"type": "image", "path": "own.png"})";
  const auto line = [](const std::string& images, const std::string& first, const std::string& second) {
    return fmt::format(R"({{"images": {}, "messages": [{{"content": [{}]}}, {{"content": [{}]}}]}})", images, first,
                       second);
  };
  EXPECT_THAT(RenderChat(chat, line(R"(["a.png", {"path": "b.png"}])", part + "," + named, part)).images,
              ElementsAre("a.png", "own.png", "b.png"));
  EXPECT_TRUE(HasPictures(line(R"(["a.png"])", "", part)));
  EXPECT_THAT(RenderChat(chat, line("null", named, "")).images, ElementsAre("own.png"));
  EXPECT_THAT(RenderChat(chat, line("[]", "", named)).images, ElementsAre("own.png"));
  const auto error = [&](const std::string& text) { return ErrorText([&] { RenderChat(chat, text); }); };
  EXPECT_EQ(
      error(line(R"(["a.png", "b.png"])", named, part)),
      "images: names 2 pictures, and the messages have 1 parts {\"type\": \"image\"} without a name of their own; "
      "add a part where each picture belongs");
  EXPECT_EQ(
      error(line(R"(["a.png"])", part, part)),
      "messages[1].content[0]: names no picture, and images has 1, which stand in the parts before it; add one to "
      "images");
  EXPECT_EQ(error(line(R"("a.png")", part, "")), "images: expected a list of pictures, found \"a.png\"");
  EXPECT_EQ(error(line("[5]", part, "")), "images[0]: expected the name of a picture, found 5");
  EXPECT_THAT(error(line("[{}]", part, "")), HasSubstr("images[0]: path: is missing"));
}

TEST(ChatTest, WhatIsNoConversationIsNamed) {
  const ChatTemplate chat = ChatTemplate::Load(kTiny);
  const auto error = [&](const char* text) { return ErrorText([&] { Render(chat, text); }); };
  EXPECT_EQ(error("{}"), "messages: expected a list of messages, found nothing");
  EXPECT_EQ(error(R"({"messages": []})"), "messages: expected a list of messages, found []");
  EXPECT_EQ(error(R"({"messages": ["x"]})"), "messages[0]: expected an object, found \"x\"");
  EXPECT_THAT(error(R"({"messages": [{}], "imagse": 1})"),
              HasSubstr("unknown key \"imagse\"; nearest: \"images\"; a chat line has type, messages, images"));
  EXPECT_THAT(error(R"({"messages": [{}], "tool": []})"), HasSubstr("unknown key \"tool\"; nearest: \"tools\""));
  EXPECT_EQ(error(R"({"messages": [{}], "tools": [5]})"), "tools[0]: expected an object, found 5");
  EXPECT_EQ(error(R"({"messages": [{}], "documents": "x"})"), "documents: expected a list of objects, found \"x\"");
  EXPECT_EQ(error(R"({"messages": [{}], "add_generation_prompt": 1})"),
            "add_generation_prompt: expected true or false, found 1");
  EXPECT_EQ(error(R"({"messages": [{}], "chat_template_kwargs": []})"), "chat_template_kwargs: expected an object");
  EXPECT_THAT(error(R"({"messages": [{}], "chat_template_kwargs": {"tools": []}})"),
              HasSubstr("\"tools\" is no variable of a template"));
  EXPECT_THAT(
      error(R"({"messages": [{}], "enable_thinking": true, "chat_template_kwargs": {"enable_thinking": true}})"),
      HasSubstr("enable_thinking stands in the line and in chat_template_kwargs"));
  EXPECT_THAT(error(R"({"messages": [{"role": "user"}, {"content": "x"}]})"), HasSubstr("chat_template.jinja:4: "));
}

class TemplateFilesTest : public ::testing::Test {
 protected:
  void Write(const std::string& name, const std::string& text) { WriteFile(directory_.Path() / name, text); }
  ChatTemplate Load() { return ChatTemplate::Load(directory_.Path()); }
  std::string Rendered(const char* line = R"({"messages": [{}]})") { return Render(Load(), line); }
  std::string LoadError() {
    return ErrorText([&] { Load(); });
  }

  TempDirectory directory_;
};

TEST_F(TemplateFilesTest, WithoutATemplateTheThreePlacesAreNamed) {
  EXPECT_TRUE(Load().Empty());
  EXPECT_EQ(
      ErrorText([&] { Rendered(); }),
      "the checkpoint has no chat template, which a conversation needs: chat_template.jinja, chat_template.json or "
      "the key chat_template of tokenizer_config.json");
}

TEST_F(TemplateFilesTest, EachPlaceIsReadAndTheFileOfItsOwnComesFirst) {
  Write("tokenizer_config.json", R"({"chat_template": "in the config"})");
  EXPECT_EQ(Rendered(), "in the config");
  Write("chat_template.jinja", "in its own file");
  EXPECT_EQ(Rendered(), "in its own file");
  std::filesystem::remove(directory_.Path() / "chat_template.jinja");
  std::filesystem::remove(directory_.Path() / "tokenizer_config.json");
  Write("chat_template.json", R"({"chat_template": "in the older file"})");
  EXPECT_EQ(Rendered(), "in the older file");
}

TEST_F(TemplateFilesTest, NamedTemplatesAreChosenAsTheReferenceDoes) {
  Write("tokenizer_config.json", R"({"chat_template": [{"name": "tool_use", "template": "tools"},
    {"name": "default", "template": "plain"}]})");
  EXPECT_EQ(Rendered(), "plain");
  EXPECT_EQ(Rendered(R"({"messages": [{}], "tools": []})"), "tools");
  Write("tokenizer_config.json", R"({"chat_template": [{"name": "rag", "template": "x"}]})");
  EXPECT_EQ(ErrorText([&] { Rendered(); }), "none of the chat templates is called \"default\"; there are rag");
  std::filesystem::create_directory(directory_.Path() / "chat_templates");
  Write("chat_templates/tool_use.jinja", "file of tools");
  Write("chat_template.jinja", "file");
  EXPECT_EQ(Rendered(), "file");
  EXPECT_EQ(Rendered(R"({"messages": [{}], "tools": [{}]})"), "file of tools");
}

TEST_F(TemplateFilesTest, AFolderOfTemplatesFitsIntoOneFile) {
  Write("chat_template.jinja", "file");
  EXPECT_EQ(JoinedTemplates(directory_.Path()), "");
  std::filesystem::create_directory(directory_.Path() / "chat_templates");
  Write("chat_templates/tool_use.jinja", "file of {{ tools | length }} tools");
  const std::string joined = JoinedTemplates(directory_.Path());
  std::filesystem::remove_all(directory_.Path() / "chat_templates");
  EXPECT_EQ(Rendered(R"({"messages": [{}], "tools": [{}]})"), "file");
  Write("chat_template.json", joined);
  EXPECT_EQ(Rendered(R"({"messages": [{}], "tools": [{}]})"), "file of 1 tools");
  EXPECT_EQ(Rendered(), "file");
}

TEST_F(TemplateFilesTest, PlacesThatDifferForTheReferencesTwoReadersAreRefused) {
  Write("chat_template.jinja", "a");
  Write("chat_template.json", R"({"chat_template": "a"})");
  EXPECT_EQ(Rendered(), "a");
  Write("chat_template.json", R"({"chat_template": "b"})");
  EXPECT_THAT(LoadError(),
              HasSubstr("two chat templates that differ: transformers' tokenizer takes chat_template.jinja, its "
                        "processor chat_template.json (chat_template)"));
}

TEST_F(TemplateFilesTest, AFileThatCannotBeReadIsNoReasonToTakeAnother) {
  Write("tokenizer_config.json", R"({"chat_template": "in the config"})");
  std::filesystem::create_symlink("nowhere", directory_.Path() / "chat_template.jinja");
  EXPECT_THAT(LoadError(), HasSubstr("chat_template.jinja"));
  std::filesystem::remove(directory_.Path() / "chat_template.jinja");
  std::filesystem::create_directory(directory_.Path() / "chat_template.jinja");
  EXPECT_THAT(LoadError(), HasSubstr("chat_template.jinja"));
  std::filesystem::remove(directory_.Path() / "chat_template.jinja");
  Write("tokenizer_config.json", R"({"chat_template": 5})");
  EXPECT_THAT(LoadError(), HasSubstr("tokenizer_config.json: chat_template: expected a text or a list"));
  Write("tokenizer_config.json", "{");
  EXPECT_THAT(LoadError(), HasSubstr("tokenizer_config.json"));
}

TEST_F(TemplateFilesTest, ABrokenTemplateFailsWhenAConversationNeedsIt) {
  Write("chat_template.jinja", "\n{% if %}");
  const ChatTemplate chat = Load();
  EXPECT_THAT(ErrorText([&] { Render(chat, R"({"messages": [{}]})"); }),
              HasSubstr("chat_template.jinja:2: expected an expression"));
}

// The values of transformers 5.24: AutoTokenizer.from_pretrained(...).special_tokens_map.
TEST_F(TemplateFilesTest, SpecialTokensAreTheTemplatesVariables) {
  Write("chat_template.jinja", "{{ [bos_token, eos_token, cls_token, image_token, custom_token] | join(',') }}");
  EXPECT_EQ(Rendered(), ",,,,");
  Write("tokenizer_config.json", R"({"tokenizer_class": "GemmaTokenizer"})");
  EXPECT_EQ(Rendered(), "<bos>,<eos>,,,");
  Write("tokenizer_config.json",
        R"({"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": {"content": "</s>"},
    "image_token": "<img>", "extra_special_tokens": {"custom_token": "<c>"}})");
  EXPECT_EQ(Rendered(), "<s>,</s>,,<img>,<c>");
  Write("special_tokens_map.json", R"({"cls_token": "<cls>", "bos_token": {"content": "<b>"}})");
  EXPECT_EQ(Rendered(), "<b>,</s>,<cls>,<img>,<c>");
  Write("tokenizer_config.json", R"({"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}})");
  EXPECT_EQ(Rendered(), ",,,,");
}

TEST_F(TemplateFilesTest, TheDateOfAPromptCanBeFixedAndIsTold) {
  Write("chat_template.jinja", "x\n{{ strftime_now('%Y-%m-%d') }}");
  ASSERT_EQ(setenv("SOURCE_DATE_EPOCH", "1700000000", 1), 0);
  const ChatPrompt prompt = RenderChat(Load(), R"({"messages": [{}]})");
  ASSERT_EQ(setenv("SOURCE_DATE_EPOCH", "yesterday", 1), 0);
  const std::string error = LoadError();
  unsetenv("SOURCE_DATE_EPOCH");
  EXPECT_EQ(prompt.text, "x\n2023-11-14");
  EXPECT_EQ(prompt.date_place, "chat_template.jinja:2");
  EXPECT_EQ(error, "SOURCE_DATE_EPOCH: expected seconds since 1970, found \"yesterday\"");
  EXPECT_EQ(RenderChat(ChatTemplate::Load(kTiny), R"({"messages": [{"role": "user", "content": "x"}]})").date_place,
            "");
}

TEST(ChatTest, PlaceholdersAndImagesMustBeEquallyMany) {
  EXPECT_THAT(ErrorText([] { ExpandImages("a <|image|> b <|image|>", std::vector<int64_t>{2}); }),
              HasSubstr("the prompt has 2 times \"<|image|>\" for 1 images"));
  EXPECT_EQ(ExpandImages("no image", {}), "no image");
  EXPECT_EQ(ExpandImages("a<|image|>b", std::vector<int64_t>{2}), "a<|image><|image|><|image|><image|>b");
}

TEST(ChatTest, TokenTypesTellPlaceholdersApart) {
  const std::vector<int64_t> ids{5, 10, 11, 12, 13, -1};
  EXPECT_THAT(TokenTypes(ids, {.image = 10, .video = 11, .audio = 12}), ElementsAre(0, 1, 2, 3, 0, 0));
  EXPECT_THAT(TokenTypes(ids, {.image = 10}), ElementsAre(0, 1, 0, 0, 0, 0));
}

}  // namespace
}  // namespace circlet
