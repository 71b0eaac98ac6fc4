#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/preprocess/tokenizer.h"

namespace circlet {

// What the chat templates of Gemma 4 checkpoints differ in (gemma4.md 7.3).
struct ChatFormat {
  bool images_between_newlines = false;  // "\n\n<|image|>\n\n" instead of "<|image|>"; videos likewise
  bool empty_thought = false;            // the larger models: an empty thought ends the generation prompt
  std::string source = "built in";       // the file that says so
};

// Reads chat_template.jinja of a checkpoint directory, else chat_template in its tokenizer_config.json, and looks for
// the literals that tell the variants apart; circlet does not run templates. The default when there is neither.
ChatFormat LoadChatFormat(const std::filesystem::path& directory);
ChatFormat DetectChatFormat(std::string_view chat_template, std::string_view source);

struct ChatOptions {
  bool generation_prompt = false;  // end with the header of the model's turn
  bool thinking = false;
};

struct ChatPrompt {
  std::string text;                 // with one <|image|> an image; starts with <bos>, so encode without special tokens
  std::vector<std::string> images;  // what the image parts name, in order of their placeholders
  bool has_audio = false, has_video = false;
};

// The prompt of a conversation (gemma4.md 7.3). `messages`: [{"role": "user" | "assistant" | "system" | "developer" |
// "tool", "content": text or a list of {"type": "text", "text"}, {"type": "image", "image" or "path"}, {"type":
// "audio"},
// {"type": "video"}, ...}]; an assistant's message may have "tool_calls" [{"function": {"name", "arguments"}}] and
// "reasoning". `tools`, when not null: [{"type": "function", "function": {"name", "description", "parameters"}}].
// Throws Error naming the place ("messages[1].content[0]: ...") for anything else.
ChatPrompt RenderChat(const nlohmann::json& messages, const ChatFormat& format, const ChatOptions& options,
                      const nlohmann::json& tools);
ChatPrompt RenderChat(const nlohmann::json& messages, const ChatFormat& format, const ChatOptions& options);

// One user turn: the images, then the text.
nlohmann::json UserTurn(std::string_view text, std::span<const std::string> images = {});

// The n-th <|image|> becomes <|image>, soft_tokens[n] times <|image|>, <image|> (gemma4.md 7.2). Throws Error unless
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
