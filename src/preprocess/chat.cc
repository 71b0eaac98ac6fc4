#include "circlet/preprocess/chat.h"

#include <algorithm>
#include <array>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "preprocess/chat_tools.h"
#include "preprocess/picture_source.h"
#include "preprocess/utf8.h"

namespace circlet {
namespace {

using nlohmann::json;

constexpr std::string_view kImage = "<|image|>", kAudio = "<|audio|>", kVideo = "<|video|>";

// White space as the template's `trim` knows it.
bool IsSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

std::string_view Trim(std::string_view text) {
  while (!text.empty()) {
    const size_t length = Utf8Length(text);
    if (length == 0 || !IsSpace(CodePoint(text.substr(0, length)))) break;
    text.remove_prefix(length);
  }
  while (!text.empty()) {
    size_t begin = text.size() - 1;
    while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xc0) == 0x80) --begin;
    const std::string_view last = text.substr(begin);
    if (Utf8Length(last) != last.size() || !IsSpace(CodePoint(last))) break;
    text.remove_suffix(last.size());
  }
  return text;
}

// The text without its thoughts, "<|channel>...<channel|>".
std::string WithoutThoughts(std::string_view text) {
  constexpr std::string_view kBegin = "<|channel>", kEnd = "<channel|>";
  std::string kept;
  while (true) {
    const size_t end = text.find(kEnd);
    const std::string_view part = text.substr(0, end);
    kept += part.substr(0, part.find(kBegin));
    if (end == std::string_view::npos) return kept;
    text.remove_prefix(end + kEnd.size());
  }
}

class Renderer {
 public:
  Renderer(const json& messages, const ChatFormat& format, const ChatOptions& options, const json& tools)
      : messages_(messages), format_(format), options_(options), tools_(tools) {
    if (!messages.is_array() || messages.empty())
      Fail("messages: expected a list of messages, found {}", messages.is_null() ? "nothing" : messages.dump());
    for (size_t i = 0; i < messages.size(); ++i) {
      const std::string role = At(i).Required<std::string>("role");
      if (role == "user") last_user_ = i;
    }
  }

  ChatPrompt Render() {
    Append("<bos>");
    size_t i = SystemTurn();
    while (i < messages_.size()) i = Turn(i);
    if (options_.generation_prompt && !open_call_) {
      Append("<|turn>model\n");
      if (format_.empty_thought && !options_.thinking) Append("<|channel>thought\n<channel|>");
    }
    return std::move(prompt_);
  }

 private:
  JsonObject At(size_t i) const { return JsonObject(messages_[i], fmt::format("messages[{}]", i)); }
  void Append(std::string_view text) { prompt_.text += text; }

  // Returns the index of the first message that it did not use.
  size_t SystemTurn() {
    const std::string role = At(0).Required<std::string>("role");
    const bool has_system = role == "system" || role == "developer";
    const bool has_tools = tools_.is_array() && !tools_.empty();
    if (!has_system && !has_tools && !options_.thinking) return 0;
    Append("<|turn>system\n");
    if (options_.thinking) Append("<|think|>\n");
    if (has_system) Content(At(0), false);
    if (has_tools) {
      for (size_t i = 0; i < tools_.size(); ++i)
        Append(ToolDeclaration(JsonObject(tools_[i], fmt::format("tools[{}]", i))));
    }
    Append("<turn|>\n");
    return has_system ? 1 : 0;
  }

  size_t Turn(size_t i) {
    const JsonObject message = At(i);
    const std::string role = message.Required<std::string>("role");
    constexpr std::array<std::string_view, 4> kRoles{"user", "assistant", "system", "developer"};
    if (role == "tool") message.FailAt("role", "a tool's answer must follow the assistant's tool_calls; move it there");
    if (std::ranges::find(kRoles, role) == kRoles.end()) {
      message.FailAt("role", fmt::format("expected user, assistant, system, developer or tool, found \"{}\"", role));
    }
    const bool is_model = role == "assistant";
    if (!is_model || !after_model_) Append(fmt::format("<|turn>{}\n", is_model ? "model" : role));
    after_model_ = is_model;
    size_t next = i + 1;
    bool has_calls = false, has_responses = false;
    if (is_model && message.Has("tool_calls")) {
      const std::vector<JsonObject> calls = message.Objects("tool_calls");
      has_calls = !calls.empty();
      if (has_calls && (!last_user_ || i > *last_user_)) Thought(message);
      for (const JsonObject& call : calls) Append(ToolCall(call));
      for (; next < messages_.size() && At(next).Required<std::string>("role") == "tool"; ++next) {
        Append(ToolResponse(At(next), calls));
        has_responses = true;
      }
    }
    const bool has_content = Content(message, is_model);
    open_call_ = (has_calls && !has_responses) || (has_responses && !has_content);
    if (has_calls && !has_responses)
      Append("<|tool_response>");
    else if (!has_responses || has_content)
      Append("<turn|>\n");
    return next;
  }

  void Thought(const JsonObject& message) {
    std::string reasoning = message.Optional<std::string>("reasoning", "");
    if (reasoning.empty()) reasoning = message.Optional<std::string>("reasoning_content", "");
    if (!reasoning.empty()) Append(fmt::format("<|channel>thought\n{}\n<channel|>", reasoning));
  }

  // Whether there was any.
  bool Content(const JsonObject& message, bool is_model) {
    const size_t before = prompt_.text.size();
    const json& content = message.Raw("content");
    if (content.is_string()) {
      Text(content.get_ref<const std::string&>(), is_model);
    } else if (content.is_array()) {
      for (const JsonObject& part : message.Objects("content")) Part(part, is_model);
    } else if (!content.is_null()) {
      message.FailAt("content", fmt::format("expected a text or a list of parts, found {}", content.dump()));
    } else if (!is_model) {
      message.FailAt("content", "is missing; a message needs a text or a list of parts");
    }
    return prompt_.text.size() > before;
  }
  void Text(std::string_view text, bool is_model) {
    if (is_model)
      Append(Trim(WithoutThoughts(text)));
    else
      Append(Trim(text));
  }
  void Part(const JsonObject& part, bool is_model) {
    const std::string type = part.Required<std::string>("type");
    if (type == "text") {
      Text(part.Required<std::string>("text"), is_model);
    } else if (type == "image" || type == "image_url") {
      prompt_.images.push_back(PictureOf(part));
      Picture(kImage);
    } else if (type == "video") {
      prompt_.has_video = true;
      Picture(kVideo);
    } else if (type == "audio") {
      prompt_.has_audio = true;
      Append(kAudio);
    } else {
      part.FailAt("type", fmt::format("expected \"text\", \"image\", \"audio\" or \"video\", found \"{}\"", type));
    }
  }
  void Picture(std::string_view placeholder) {
    const std::string_view around = format_.images_between_newlines ? "\n\n" : "";
    Append(fmt::format("{}{}{}", around, placeholder, around));
  }

  const json& messages_;
  const ChatFormat& format_;
  const ChatOptions& options_;
  const json& tools_;
  std::optional<size_t> last_user_;
  ChatPrompt prompt_;
  bool after_model_ = false;  // the previous message that is no tool's answer was the assistant's
  bool open_call_ = false;    // the model goes on after a tool call or its answer
};

// A literal of the template, with its line ends as they are or as escapes of a quoted string.
bool Holds(std::string_view text, std::string_view literal) {
  std::string escaped;
  for (const char c : literal) escaped += c == '\n' ? std::string("\\n") : std::string(1, c);
  return text.find(literal) != std::string_view::npos || text.find(escaped) != std::string_view::npos;
}

}  // namespace

ChatFormat DetectChatFormat(std::string_view text, std::string_view source) {
  ChatFormat format;
  format.images_between_newlines = Holds(text, "\n\n<|image|>\n\n");
  format.empty_thought = Holds(text, "<|channel>thought\n<channel|>");
  format.source = source;
  return format;
}

ChatFormat LoadChatFormat(const std::filesystem::path& directory) {
  std::error_code ignored;
  const std::filesystem::path own = directory / "chat_template.jinja";
  if (std::filesystem::exists(own, ignored)) return DetectChatFormat(ReadFile(own), own.filename().string());
  const std::filesystem::path config = directory / "tokenizer_config.json";
  if (!std::filesystem::exists(config, ignored)) return {};
  const json tree = ReadJson(config);
  const JsonObject object(tree, config.string());
  const json& text = object.Raw("chat_template");
  if (text.is_string()) return DetectChatFormat(text.get_ref<const std::string&>(), config.filename().string());
  if (!text.is_array()) return {};
  // Several named templates: conversations use the one called "default".
  for (const JsonObject& named : object.Objects("chat_template")) {
    if (named.Optional<std::string>("name", "") == "default")
      return DetectChatFormat(named.Required<std::string>("template"), config.filename().string());
  }
  return {};
}

ChatPrompt RenderChat(const json& messages, const ChatFormat& format, const ChatOptions& options, const json& tools) {
  return Renderer(messages, format, options, tools).Render();
}

ChatPrompt RenderChat(const json& messages, const ChatFormat& format, const ChatOptions& options) {
  return RenderChat(messages, format, options, json());
}

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
