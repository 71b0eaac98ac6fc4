#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "circlet/preprocess/tokenizer.h"

namespace circlet {

// The chat templates of a checkpoint, with the special tokens that they may name (bos_token ...). A template is a
// program in the language of jinja2 as transformers sets it up; it is run within limits and without access to anything
// outside (docs/data.md).
class ChatTemplate {
 public:
  // No template: RenderChat is an Error that names the places where one may be.
  ChatTemplate();
  // Reads what transformers would take: its tokenizer takes chat_template.jinja with the files in chat_templates/, else
  // `chat_template` of tokenizer_config.json; its processor takes `chat_template` of processor_config.json, else
  // chat_template.json, else the same files. An Error when both have one and they differ, and for a file that is there
  // and cannot be read.
  static ChatTemplate Load(const std::filesystem::path& directory);
  // One template; `file` stands for it in errors, `special_tokens` are its variables.
  static ChatTemplate Parse(std::string_view text, std::string_view file,
                            std::vector<std::pair<std::string, std::string>> special_tokens = {});

  bool Empty() const;

  struct State;  // src/preprocess/chat_template.h

 private:
  friend struct ChatRenderer;
  std::shared_ptr<State> state_;
};

// All templates of a checkpoint that has a folder chat_templates/, as the one file chat_template.json, which says the same
// beside its other files; empty: it has no such folder.
std::string JoinedTemplates(const std::filesystem::path& directory);

struct ChatPrompt {
  std::string text;                 // with one <|image|> an image
  std::vector<std::string> images;  // what the image parts name, in order of their placeholders
  bool has_audio = false, has_video = false;
  bool add_special_tokens = false;  // whether the tokenizer still has to write <bos>
  std::string date_place;           // "chat_template.jinja:3" when the template wrote the date there, else empty
};

// The prompt that transformers makes of a conversation. `conversation` is the JSON object of a data line, whose order
// of keys reaches the template:
//   messages                the messages, whole; keys that are null are left out, as transformers does
//   tools, documents        lists of objects, or null
//   add_generation_prompt   whether the prompt ends where the model begins; default false
//   enable_thinking         a variable of the template
//   chat_template_kwargs    an object of further variables
//   type                    "chat"; optional
// Throws Error for another key, for what no template takes, and for all that the template itself refuses.
ChatPrompt RenderChat(const ChatTemplate& chat, std::string_view conversation);
// Whether a message of the conversation has a picture.
bool HasPictures(std::string_view conversation);

// The messages of one user turn: the images, then the text.
nlohmann::json UserTurn(std::string_view text, std::span<const std::string> images = {});

// The n-th <|image|> becomes <|image>, soft_tokens[n] times <|image|>, <image|> (model.md 7.2). Throws Error unless
// there are as many placeholders as numbers.
std::string ExpandImages(std::string_view prompt, std::span<const int64_t> soft_tokens);

// Ids of the soft-token placeholders; -1 = the tokenizer has none.
struct Placeholders {
  int64_t image = -1, video = -1, audio = -1;
  bool operator==(const Placeholders&) const = default;
};
Placeholders FindPlaceholders(const Tokenizer& tokenizer);

// 1 at image, 2 at video, 3 at audio placeholders, else 0.
std::vector<int64_t> TokenTypes(std::span<const int64_t> ids, const Placeholders& placeholders);

}  // namespace circlet
