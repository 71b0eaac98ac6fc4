#include "circlet/runtime/prompts.h"

#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "preprocess/data_lines.h"

namespace circlet::runtime {

Sample TextPrompt(std::string_view text, const Processor& processor, const ModelFacts& facts, std::string source) {
  Sample sample{.source = std::move(source)};
  sample.input_ids = processor.tokenizer.Encode(text, /*add_special=*/true);
  sample.token_types = TokenTypes(sample.input_ids, facts.placeholders);
  for (const int64_t type : sample.token_types)
    if (type != 0)
      Fail("the text holds the placeholder of an image, a video or a sound, but no such thing; use a chat");
  return sample;
}

Sample ChatPromptSample(std::string_view conversation, const Processor& processor, const ModelFacts& facts,
                        const std::filesystem::path& directory, std::string source) {
  // In the order of the text, which reaches the template.
  nlohmann::ordered_json tree = nlohmann::ordered_json::parse(conversation);
  if (!tree.contains("add_generation_prompt")) tree["add_generation_prompt"] = true;
  return ChatSample(tree.dump(), processor, directory,
                    {.vocab_size = facts.vocabulary, .placeholders = facts.placeholders}, std::move(source));
}

std::vector<Sample> LoadPrompts(const std::filesystem::path& path, const Processor& processor,
                                const ModelFacts& facts) {
  constexpr LineForm kPromptLine{R"({"prompt": "..."})", "prompt"};
  const DataFile data = ReadDataFile(path);
  std::vector<Sample> prompts;
  ForEachLine(
      data,
      [&](const JsonObject& object, const DataLine& line) {
        const bool chat = object.Has("messages");
        const char* const key = object.Has("text") && !object.Has("prompt") ? "text" : "prompt";
        const std::string type = object.Optional<std::string>("type", chat ? "chat" : "text");
        if (type != (chat ? "chat" : "text"))
          object.FailAt("type", fmt::format("\"{}\"; expected \"chat\" with messages, or \"text\"", type));
        if (chat) {
          Within(line.place, [&] {
            prompts.push_back(ChatPromptSample(line.text, processor, facts, data.directory, line.source));
          });
          return;
        }
        const std::string text = object.Required<std::string>(key);
        object.RejectUnknownKeys();
        Within(line.place, [&] { prompts.push_back(TextPrompt(text, processor, facts, line.source)); });
      },
      kPromptLine);
  return prompts;
}

}  // namespace circlet::runtime
