#include "preprocess/chat_template.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdlib>
#include <ctime>
#include <nlohmann/json.hpp>
#include <optional>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using Source = ChatTemplate::State::Source;
using Sources = std::map<std::string, Source>;
using Tokens = std::vector<std::pair<std::string, std::string>>;

constexpr int64_t kTemplateLimitBytes = int64_t{4} << 20;
constexpr std::array<std::string_view, 7> kTokens{"bos_token", "eos_token", "unk_token", "sep_token",
                                                  "pad_token", "cls_token", "mask_token"};

// Whether something has this name, be it a link to nothing.
bool IsThere(const fs::path& path) {
  std::error_code ignored;
  const fs::file_type type = fs::symlink_status(path, ignored).type();
  return type != fs::file_type::not_found && type != fs::file_type::none;
}

std::optional<json> ReadIfThere(const fs::path& path) {
  if (!IsThere(path)) return std::nullopt;
  json tree = ReadJson(path);
  if (!tree.is_object()) Fail("{}: expected an object", path.string());
  return tree;
}

// `chat_template` of a JSON file: one template, or several with names.
Sources FromTree(const std::optional<json>& tree, const fs::path& path) {
  Sources sources;
  if (!tree) return sources;
  const JsonObject object(*tree, path.string());
  const json& value = object.Raw("chat_template");
  const std::string name = path.filename().string();
  const auto from_object = [&] {
    for (const auto& [key, text] : value.items()) {
      if (!text.is_string()) object.FailAt("chat_template", fmt::format("\"{}\": expected a text", key));
      sources[key] = {text.get<std::string>(), fmt::format("{} (chat_template \"{}\")", name, key)};
    }
  };
  if (value.is_string()) {
    sources["default"] = {value.get<std::string>(), name + " (chat_template)"};
  } else if (value.is_array()) {
    for (const JsonObject& named : object.Objects("chat_template")) {
      const std::string key = named.Required<std::string>("name");
      sources[key] = {named.Required<std::string>("template"), fmt::format("{} (chat_template \"{}\")", name, key)};
    }
  } else if (value.is_object()) {
    from_object();
  } else if (!value.is_null()) {
    object.FailAt("chat_template", "expected a text or a list of {\"name\", \"template\"}");
  }
  return sources;
}

// chat_template.jinja, and chat_templates/NAME.jinja.
Sources FromFiles(const fs::path& directory) {
  Sources sources;
  if (const fs::path path = directory / "chat_template.jinja"; IsThere(path))
    sources["default"] = {ReadFile(path, kTemplateLimitBytes), path.filename().string()};
  std::error_code error;
  const fs::path named = directory / "chat_templates";
  if (!fs::is_directory(named, error)) return sources;
  for (const auto& entry : fs::directory_iterator(named, error)) {
    if (entry.path().extension() != ".jinja") continue;
    sources[entry.path().stem().string()] = {ReadFile(entry.path(), kTemplateLimitBytes),
                                             fmt::format("chat_templates/{}", entry.path().filename().string())};
  }
  if (error) Fail("{}: cannot be read: {}", named.string(), error.message());
  return sources;
}

Sources FindSources(const fs::path& directory, const std::optional<json>& tokenizer_config) {
  const Sources files = FromFiles(directory);
  const fs::path config_path = directory / "tokenizer_config.json", legacy_path = directory / "chat_template.json",
                 processor_path = directory / "processor_config.json";
  const Sources tokenizer = files.empty() ? FromTree(tokenizer_config, config_path) : files;
  Sources processor = FromTree(ReadIfThere(processor_path), processor_path);
  if (processor.empty()) processor = FromTree(ReadIfThere(legacy_path), legacy_path);
  if (processor.empty()) processor = files;
  if (tokenizer.empty() || processor.empty()) return tokenizer.empty() ? processor : tokenizer;
  const auto one = tokenizer.find("default");
  const auto other = processor.find("default");
  if (one != tokenizer.end() && other != processor.end() && one->second.text != other->second.text) {
    Fail(
        "{}: two chat templates that differ: transformers' tokenizer takes {}, its processor {}; remove the one that "
        "does not belong to the model",
        directory.string(), one->second.file, other->second.file);
  }
  Sources both = tokenizer;
  both.merge(processor);  // named ones that only the processor has
  return both;
}

void Set(Tokens& tokens, std::string_view name, const std::optional<std::string>& text) {
  std::erase_if(tokens, [&](const auto& token) { return token.first == name; });
  if (text) tokens.emplace_back(name, *text);
}

// Special tokens of one file, as texts or as {"content": text}.
void AddTokens(const json& tree, Tokens& tokens) {
  for (const auto& [key, value] : tree.items()) {
    if (!key.ends_with("_token")) continue;
    const json& text = value.is_object() && value.contains("content") ? value["content"] : value;
    if (text.is_string())
      Set(tokens, key, text.get<std::string>());
    else if (text.is_null() && std::ranges::find(kTokens, key) != kTokens.end())
      Set(tokens, key, std::nullopt);
  }
}

// The variables that transformers makes of a tokenizer's special tokens.
Tokens SpecialTokens(const fs::path& directory, const std::optional<json>& config) {
  Tokens tokens;
  const std::string tokenizer_class =
      config && config->contains("tokenizer_class") && (*config)["tokenizer_class"].is_string()
          ? (*config)["tokenizer_class"].get<std::string>()
          : "";
  if (tokenizer_class.starts_with("Gemma")) {  // what the class has when no file says otherwise
    for (const std::string_view name : {"unk", "bos", "eos", "pad", "mask"})
      Set(tokens, fmt::format("{}_token", name), fmt::format("<{}>", name));
  }
  if (config) {
    AddTokens(*config, tokens);
    for (const char* more : {"model_specific_special_tokens", "extra_special_tokens"})
      if (config->contains(more) && (*config)[more].is_object()) AddTokens((*config)[more], tokens);
  }
  if (!config || !config->contains("added_tokens_decoder")) {
    if (const std::optional<json> legacy = ReadIfThere(directory / "special_tokens_map.json")) {
      AddTokens(*legacy, tokens);
      if (legacy->contains("extra_special_tokens") && (*legacy)["extra_special_tokens"].is_object())
        AddTokens((*legacy)["extra_special_tokens"], tokens);
    }
  }
  return tokens;
}

// Seconds since 1970: of the variable that makes builds repeatable, else of the clock.
int64_t Now() {
  const char* const fixed = std::getenv("SOURCE_DATE_EPOCH");
  if (fixed == nullptr || *fixed == '\0') return std::time(nullptr);
  const std::string_view text = fixed;
  int64_t seconds = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), seconds);
  constexpr int64_t kYear9999 = 253402300799;
  if (error != std::errc() || end != text.data() + text.size() || seconds < 0 || seconds > kYear9999)
    Fail("SOURCE_DATE_EPOCH: expected seconds since 1970, found \"{}\"", text);
  return seconds;
}

}  // namespace

const jinja::Template& ChatTemplate::State::Get(const std::string& name) {
  const std::scoped_lock lock(mutex_);
  const auto found = read_.find(name);
  if (found != read_.end()) return found->second;
  const Source& source = sources.at(name);
  return read_.emplace(name, jinja::Template(source.text, source.file)).first->second;
}

ChatTemplate::ChatTemplate() : state_(std::make_shared<State>()) {}

ChatTemplate ChatTemplate::Load(const fs::path& directory) {
  ChatTemplate chat;
  const std::optional<json> config = ReadIfThere(directory / "tokenizer_config.json");
  chat.state_->sources = FindSources(directory, config);
  chat.state_->special_tokens = SpecialTokens(directory, config);
  chat.state_->now = Now();
  return chat;
}

std::string JoinedTemplates(const fs::path& directory) {
  std::error_code error;
  if (!fs::is_directory(directory / "chat_templates", error)) return "";
  json list = json::array();
  for (const auto& [name, source] : FindSources(directory, ReadIfThere(directory / "tokenizer_config.json")))
    list.push_back({{"name", name}, {"template", source.text}});
  return list.empty() ? "" : DumpJson({{"chat_template", list}});
}

ChatTemplate ChatTemplate::Parse(std::string_view text, std::string_view file, Tokens special_tokens) {
  ChatTemplate chat;
  chat.state_->sources["default"] = {std::string(text), std::string(file)};
  chat.state_->special_tokens = std::move(special_tokens);
  chat.state_->now = Now();
  chat.state_->Get("default");
  return chat;
}

bool ChatTemplate::Empty() const { return state_->sources.empty(); }

}  // namespace circlet
