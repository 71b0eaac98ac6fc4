#include "circlet/preprocess/chat.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "preprocess/chat_template.h"
#include "preprocess/picture_source.h"

namespace circlet {

using nlohmann::json;

namespace {

using jinja::Dict;
using jinja::Value;

constexpr std::string_view kImage = "<|image|>", kAudio = "<|audio|>", kVideo = "<|video|>";

// What apply_chat_template itself takes, so that it never reaches a template as a variable.
constexpr std::array<std::string_view, 16> kOwnArguments{"conversation",
                                                         "messages",
                                                         "tools",
                                                         "documents",
                                                         "chat_template",
                                                         "add_generation_prompt",
                                                         "tokenize",
                                                         "padding",
                                                         "truncation",
                                                         "max_length",
                                                         "return_tensors",
                                                         "return_dict",
                                                         "processor_kwargs",
                                                         "continue_final_message",
                                                         "tokenizer_kwargs",
                                                         "return_assistant_tokens_mask"};

Value TextValue(std::string_view text) { return Value(std::string(text)); }

bool IsText(const Value* value, std::string_view text) {
  return value != nullptr && value->AsText() != nullptr && *value->AsText() == text;
}

const std::vector<Value>* AsList(const Value* value) {
  return value != nullptr && value->AsSequence() != nullptr ? &value->AsSequence()->items : nullptr;
}

Value Given(const Dict& dict, std::string_view key) {
  const Value* value = dict.Find(key);
  return value != nullptr ? *value : Value();
}

// One conversation, on its way to the template.
class Conversation {
 public:
  explicit Conversation(std::string_view text)
      : meter_({.bytes = int64_t{1} << 30}), value_(jinja::FromJson(text, meter_)) {
    if (value_.AsDict() == nullptr) Fail("a conversation: expected an object");
    const Value messages = Given(Object(), "messages");
    const std::vector<Value>* list = AsList(&messages);
    if (list == nullptr || list->empty())
      Fail("messages: expected a list of messages, found {}",
           messages.IsNone() ? "nothing" : jinja::ToJson(messages, {}, meter_));
    for (size_t i = 0; i < list->size(); ++i) {
      if ((*list)[i].AsDict() == nullptr)
        Fail("messages[{}]: expected an object, found {}", i, jinja::ToJson((*list)[i], {}, meter_));
      messages_.push_back(WithoutNulls(*(*list)[i].AsDict()));
    }
    TakePicturesOfLine();
    for (size_t i = 0; i < messages_.size(); ++i) TakeParts(i);
    if (placed_ < of_line_.size())
      Fail(
          "images: names {} pictures, and the messages have {} parts {{\"type\": \"image\"}} without a name of their "
          "own; add a part where each picture belongs",
          of_line_.size(), placed_);
  }

  const std::vector<std::string>& Images() const { return images_; }
  const Dict& Object() const { return *value_.AsDict(); }
  bool HasAudio() const { return has_audio_; }
  bool HasVideo() const { return has_video_; }

  // The variables that transformers gives to the template.
  jinja::Variables Variables(const std::vector<std::pair<std::string, std::string>>& special_tokens) {
    RejectUnknownKeys();
    jinja::Variables variables;
    const auto set = [&](std::string_view name, Value value) {
      std::erase_if(variables, [&](const auto& variable) { return variable.first == name; });
      variables.emplace_back(name, std::move(value));
    };
    for (const auto& [name, text] : special_tokens) set(name, TextValue(text));
    if (const Value* thinking = Object().Find("enable_thinking")) set("enable_thinking", *thinking);
    AddKwargs(set);
    std::vector<Value> messages;
    for (Dict& message : messages_) messages.push_back(MakeDict(Finished(std::move(message)), meter_));
    messages_.clear();
    set("messages", MakeList(std::move(messages), meter_));
    set("tools", Objects("tools"));
    set("documents", Objects("documents"));
    set("add_generation_prompt", Flag("add_generation_prompt"));
    return variables;
  }

 private:
  static Dict WithoutNulls(const Dict& message) {
    Dict kept;
    for (const auto& [key, value] : message.Entries())
      if (!value.IsNone()) kept.Set(key, value);
    return kept;
  }

  // Pictures named beside the messages go, in their order, to the parts that name none.
  void TakePicturesOfLine() {
    const Value images = Given(Object(), "images");
    if (images.IsNone()) return;
    const std::vector<Value>* list = AsList(&images);
    if (list == nullptr) Fail("images: expected a list of pictures, found {}", jinja::ToJson(images, {}, meter_));
    for (size_t i = 0; i < list->size(); ++i) {
      const Value& image = (*list)[i];
      const std::string place = fmt::format("images[{}]", i);
      if (image.AsText() == nullptr && image.AsDict() == nullptr)
        Fail("{}: expected the name of a picture, found {}", place, jinja::ToJson(image, {}, meter_));
      of_line_.push_back(image.AsText() != nullptr ? *image.AsText() : Picture(*image.AsDict(), place));
    }
  }

  void TakeParts(size_t index) {
    const std::vector<Value>* parts = AsList(messages_[index].Find("content"));
    if (parts == nullptr) return;
    std::vector<Value> taken;
    for (size_t k = 0; k < parts->size(); ++k) {
      const Value& part = (*parts)[k];
      taken.push_back(
          part.AsDict() == nullptr ? part : Part(*part.AsDict(), fmt::format("messages[{}].content[{}]", index, k)));
    }
    messages_[index].Set("content", MakeList(std::move(taken), meter_));
  }

  Value Part(const Dict& part, const std::string& place) {
    const Value* type = part.Find("type");
    const bool other_form = IsText(type, "image_url");  // of other servers; templates know "image"
    if (other_form || IsText(type, "image")) images_.push_back(Picture(part, place));
    if (other_form) {
      Dict image;
      image.Set("type", TextValue("image"));
      image.Set("url", TextValue(images_.back()));
      return MakeDict(std::move(image), meter_);
    }
    has_audio_ |= IsText(type, "audio");
    has_video_ |= IsText(type, "video");
    return MakeDict(part, meter_);
  }

  std::string Picture(const Dict& part, const std::string& place) {
    const json tree = json::parse(jinja::ToJson(MakeDict(part, meter_), {}, meter_));
    const JsonObject object(tree, place);
    if (NamesPicture(object) || of_line_.empty()) return PictureOf(object);
    if (placed_ == of_line_.size())
      Fail("{}: names no picture, and images has {}, which stand in the parts before it; add one to images", place,
           of_line_.size());
    return of_line_[placed_++];
  }

  // Reasoning stands under each name that templates read; beside pictures a message always has a list or a text.
  Dict Finished(Dict message) {
    if (!images_.empty() && !jinja::Truth(Given(message, "content"))) message.Set("content", MakeList({}, meter_));
    for (const std::string_view name : {"reasoning_content", "thinking", "reasoning"}) {
      const Value* reasoning = message.Find(name);
      if (reasoning == nullptr) continue;
      Dict aliased;
      aliased.Set("thinking", *reasoning);
      for (const auto& [key, value] : message.Entries()) aliased.Set(key, value);
      aliased.Set("reasoning_content", *reasoning);
      return aliased;
    }
    return message;
  }

  void RejectUnknownKeys() const {
    static const std::vector<std::string> known{"type",
                                                "messages",
                                                "images",
                                                "add_generation_prompt",
                                                "enable_thinking",
                                                "documents",
                                                "tools",
                                                "chat_template_kwargs"};
    for (const auto& [key, value] : Object().Entries()) {
      if (std::ranges::find(known, *key.AsText()) != known.end()) continue;
      Fail("unknown key \"{}\"{}; a chat line has {}, and variables of the template in chat_template_kwargs",
           *key.AsText(), NearestHint(*key.AsText(), known), fmt::join(known, ", "));
    }
  }

  template <typename Set>
  void AddKwargs(const Set& set) {
    const Value kwargs = Given(Object(), "chat_template_kwargs");
    if (kwargs.IsNone()) return;
    if (kwargs.AsDict() == nullptr) Fail("chat_template_kwargs: expected an object");
    for (const auto& [key, value] : kwargs.AsDict()->Entries()) {
      const std::string& name = *key.AsText();
      if (std::ranges::find(kOwnArguments, name) != kOwnArguments.end())
        Fail(
            "chat_template_kwargs: \"{}\" is no variable of a template; tools, documents and add_generation_prompt are "
            "keys of the line",
            name);
      if (name == "enable_thinking" && Object().Find(name) != nullptr)
        Fail("enable_thinking stands in the line and in chat_template_kwargs; remove one");
      set(name, value);
    }
  }

  Value Objects(std::string_view key) {
    const Value value = Given(Object(), key);
    if (value.IsNone()) return value;
    const std::vector<Value>* list = AsList(&value);
    if (list == nullptr) Fail("{}: expected a list of objects, found {}", key, jinja::ToJson(value, {}, meter_));
    for (size_t i = 0; i < list->size(); ++i)
      if ((*list)[i].AsDict() == nullptr)
        Fail("{}[{}]: expected an object, found {}", key, i, jinja::ToJson((*list)[i], {}, meter_));
    return value;
  }

  Value Flag(std::string_view key) {
    const Value* value = Object().Find(key);
    if (value == nullptr) return false;
    if (value->AsBool() == nullptr)
      Fail("{}: expected true or false, found {}", key, jinja::ToJson(*value, {}, meter_));
    return *value;
  }

  jinja::Meter meter_;
  Value value_;
  std::vector<Dict> messages_;
  std::vector<std::string> images_;   // of all parts
  std::vector<std::string> of_line_;  // of the key "images"
  size_t placed_ = 0;                 // of them, in parts
  bool has_audio_ = false, has_video_ = false;
};

}  // namespace

struct ChatRenderer {
  // A template called "tool_use" is there for conversations with tools.
  static const jinja::Template& Choose(ChatTemplate::State& state, bool has_tools) {
    if (state.sources.empty())
      Fail(
          "the checkpoint has no chat template, which a conversation needs: chat_template.jinja, chat_template.json or "
          "the key chat_template of tokenizer_config.json");
    for (const char* name : {"tool_use", "default"})
      if ((has_tools || std::string_view(name) == "default") && state.sources.contains(name)) return state.Get(name);
    std::vector<std::string> names;
    for (const auto& [name, source] : state.sources) names.push_back(name);
    Fail("none of the chat templates is called \"default\"; there are {}", fmt::join(names, ", "));
  }

  static ChatPrompt Render(ChatTemplate::State& state, std::string_view text) {
    Conversation conversation(text);
    jinja::Variables variables = conversation.Variables(state.special_tokens);
    const bool has_tools = !Given(conversation.Object(), "tools").IsNone();
    const jinja::Template& chosen = Choose(state, has_tools);
    jinja::Rendering rendering = chosen.Render(std::move(variables), state.now);
    ChatPrompt prompt{.text = std::move(rendering.text),
                      .images = conversation.Images(),
                      .has_audio = conversation.HasAudio(),
                      .has_video = conversation.HasVideo()};
    if (rendering.date_line) prompt.date_place = fmt::format("{}:{}", chosen.File(), *rendering.date_line);
    // transformers' tokenizer adds no special token to a rendered conversation; its processor, which prepares those
    // with pictures, does so when the prompt does not begin with <bos>.
    const auto bos = std::ranges::find(state.special_tokens, "bos_token", &std::pair<std::string, std::string>::first);
    prompt.add_special_tokens =
        !prompt.images.empty() && (bos == state.special_tokens.end() || !prompt.text.starts_with(bos->second));
    return prompt;
  }

  static ChatPrompt Render(const ChatTemplate& chat, std::string_view text) { return Render(*chat.state_, text); }
};

ChatPrompt RenderChat(const ChatTemplate& chat, std::string_view conversation) {
  return ChatRenderer::Render(chat, conversation);
}

bool HasPictures(std::string_view conversation) { return !Conversation(conversation).Images().empty(); }

json UserTurn(std::string_view text, std::span<const std::string> images) {
  json content = json::array();
  for (const std::string& image : images) content.push_back({{"type", "image"}, {"image", image}});
  content.push_back({{"type", "text"}, {"text", text}});
  return json::array({{{"role", "user"}, {"content", std::move(content)}}});
}

std::string ExpandImages(std::string_view prompt, std::span<const int64_t> soft_tokens) {
  std::string expanded;
  size_t count = 0;
  for (size_t begin = 0;;) {
    const size_t at = prompt.find(kImage, begin);
    expanded += prompt.substr(begin, at - begin);
    if (at == std::string_view::npos) break;
    if (count < soft_tokens.size()) {
      expanded += "<|image>";
      for (int64_t i = 0; i < soft_tokens[count]; ++i) expanded += kImage;
      expanded += "<image|>";
    }
    ++count;
    begin = at + kImage.size();
  }
  if (count != soft_tokens.size()) {
    Fail("the prompt has {} times \"{}\" for {} images; each image needs one, and a text must not spell it", count,
         kImage, soft_tokens.size());
  }
  return expanded;
}

Placeholders FindPlaceholders(const Tokenizer& tokenizer) {
  return {tokenizer.IdOf(kImage).value_or(-1), tokenizer.IdOf(kVideo).value_or(-1),
          tokenizer.IdOf(kAudio).value_or(-1)};
}

std::vector<int64_t> TokenTypes(std::span<const int64_t> ids, const Placeholders& placeholders) {
  std::vector<int64_t> types;
  types.reserve(ids.size());
  for (const int64_t id : ids) {
    const bool known = id >= 0;
    types.push_back(known && id == placeholders.image   ? 1
                    : known && id == placeholders.video ? 2
                    : known && id == placeholders.audio ? 3
                                                        : 0);
  }
  return types;
}

}  // namespace circlet
