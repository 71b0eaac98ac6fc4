#include "preprocess/tokenizer_rules.h"

#include <algorithm>
#include <charconv>
#include <iterator>
#include <map>
#include <set>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "preprocess/tokenizer_file.h"

namespace circlet {
namespace {

using nlohmann::json;

constexpr std::string_view kRemedy =
    "circlet implements the Gemma tokenizer only; use the tokenizer.json of a Gemma checkpoint";

[[noreturn]] void Unsupported(const JsonObject& object, std::string_view key) {
  object.FailAt(key, fmt::format("{} is not implemented; {}", Shown(object.Raw(key)), kRemedy));
}

void RequireFalse(const JsonObject& object, std::string_view key) {
  if (object.Optional<bool>(key, false)) Unsupported(object, key);
}

// The literal of {"String": "x"}; a regular expression is {"Regex": "x"}.
std::string Literal(const JsonObject& object) {
  const JsonObject pattern = object.Object("pattern");
  if (!pattern.Has("String")) Unsupported(object, "pattern");
  std::string text = pattern.Required<std::string>("String");
  if (text.empty()) object.FailAt("pattern", "an empty string matches everywhere; the file is damaged");
  return text;
}

// The members of a {"type": "Sequence"}, or the object alone.
std::vector<JsonObject> Steps(const JsonObject& object, std::string_view members) {
  if (object.Required<std::string>("type") != "Sequence") return {object};
  return object.Objects(members);
}

void ReadNormalizer(const JsonObject& object, TokenizerRules& rules) {
  for (const JsonObject& step : Steps(object, "normalizers")) {
    if (step.Required<std::string>("type") != "Replace") Unsupported(step, "type");
    rules.normalizer.push_back({Literal(step), step.Required<std::string>("content")});
  }
}

void ReadPreTokenizer(const JsonObject& object, TokenizerRules& rules) {
  if (object.Required<std::string>("type") != "Split") Unsupported(object, "type");
  if (object.Required<std::string>("behavior") != "MergedWithPrevious") Unsupported(object, "behavior");
  RequireFalse(object, "invert");
  rules.split_after = Literal(object);
}

void ReadPostProcessor(const JsonObject& object, TokenizerRules& rules) {
  if (object.Required<std::string>("type") != "TemplateProcessing") Unsupported(object, "type");
  std::vector<std::string>* side = &rules.prefix;
  for (const JsonObject& part : object.Objects("single")) {
    if (part.Has("SpecialToken")) {
      side->push_back(part.Object("SpecialToken").Required<std::string>("id"));
    } else if (part.Has("Sequence") && side == &rules.prefix) {
      side = &rules.suffix;
    } else {
      Unsupported(object, "single");
    }
  }
  if (side == &rules.prefix) object.FailAt("single", "the text (\"Sequence\") has no place in it; the file is damaged");
}

void ReadDecoder(const JsonObject& object, TokenizerRules& rules) {
  // Replacements work on single pieces, so they come before the pieces are joined.
  bool joined = false;
  for (const JsonObject& step : Steps(object, "decoders")) {
    const std::string type = step.Required<std::string>("type");
    if (type == "Replace" && !joined && !rules.decode_bytes) {
      rules.decoder.push_back({Literal(step), step.Required<std::string>("content")});
    } else if (type == "ByteFallback" && !joined) {
      rules.decode_bytes = true;
    } else if (type == "Fuse") {
      joined = true;
    } else {
      Unsupported(step, "type");
    }
  }
}

void ReadModel(const JsonObject& model, TokenizerRules& rules) {
  for (const std::string_view key : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!model.Optional<std::string>(key, "").empty()) Unsupported(model, key);
  if (model.Optional<double>("dropout", 0) != 0) Unsupported(model, "dropout");
  rules.unk_token = model.Optional<std::string>("unk_token");
  rules.fuse_unk = model.Optional<bool>("fuse_unk", false);
  rules.byte_fallback = model.Optional<bool>("byte_fallback", false);
  rules.ignore_merges = model.Optional<bool>("ignore_merges", false);
}

constexpr std::string_view kIdRange = "ids run from 0 to 4194303";
static_assert(TokenizerFile::kIdLimit == 4194304);

int32_t CheckedId(const JsonObject& object, std::string_view key, int64_t id, std::string_view content) {
  if (id < 0 || id >= TokenizerFile::kIdLimit)
    object.FailAt(key, fmt::format("{} for \"{}\"; {}", id, Shortened(content), kIdRange));
  return static_cast<int32_t>(id);
}

// {"content": "<x>", "lstrip": false, ...}
AddedToken ReadAddedToken(const JsonObject& token, bool special) {
  RequireFalse(token, "single_word");
  AddedToken added{.content = token.Required<std::string>("content"), .where = token.Where("")};
  if (added.content.empty()) token.FailAt("content", "an added token cannot be empty; the file is damaged");
  added.special = token.Optional<bool>("special", special);
  added.normalized = token.Optional<bool>("normalized", !added.special);
  added.lstrip = token.Optional<bool>("lstrip", false);
  added.rstrip = token.Optional<bool>("rstrip", false);
  return added;
}

// A special token: such an object, or the content alone.
AddedToken ReadSpecialToken(const json& value, std::string where) {
  if (value.is_object()) return ReadAddedToken(JsonObject(value, std::move(where)), true);
  if (!value.is_string() || value.get_ref<const std::string&>().empty())
    Fail("{}: expected a token, found {}", where, Shown(value));
  return {.content = value.get<std::string>(), .special = true, .where = std::move(where)};
}

std::vector<AddedToken> ReadDecoderTokens(const JsonObject& decoder) {
  std::map<int64_t, AddedToken> by_id;
  for (const std::string& key : decoder.Keys()) {
    int64_t id = 0;
    const auto [end, failure] = std::from_chars(key.data(), key.data() + key.size(), id);
    if (failure != std::errc() || end != key.data() + key.size())
      decoder.FailAt(key, "the key must be a token id; the file is damaged");
    const JsonObject object = decoder.Object(key);
    AddedToken token = ReadAddedToken(object, false);
    token.id = CheckedId(object, "", id, token.content);
    by_id.emplace(id, std::move(token));
  }
  std::vector<AddedToken> tokens;
  for (auto& [id, token] : by_id) tokens.push_back(std::move(token));
  return tokens;
}

// {"bos_token": "<bos>", "image_token": {...}}: names end so, values are a token.
void ReadNamedTokens(const JsonObject& root, std::map<std::string, AddedToken>& named) {
  for (const std::string& key : root.Keys()) {
    const json& value = root.Raw(key);
    if (!key.ends_with("_token") || !(value.is_string() || value.is_object())) continue;
    AddedToken token = ReadSpecialToken(value, root.Where(key));
    token.ordered = false;
    named.insert_or_assign(key, std::move(token));
  }
}

// A list, or a mapping from names to tokens.
std::vector<AddedToken> ReadExtraTokens(const JsonObject& root, std::string_view key) {
  const json& extra = root.Raw(key);
  if (!extra.is_null() && !extra.is_array() && !extra.is_object())
    root.FailAt(key, fmt::format("expected a list or a mapping of tokens, found {}", Shown(extra)));
  std::vector<AddedToken> tokens;
  for (const auto& item : extra.items()) {
    tokens.push_back(ReadSpecialToken(item.value(), fmt::format("{}.{}", root.Where(key), Shortened(item.key()))));
    tokens.back().ordered = extra.is_array();
  }
  return tokens;
}

// Tokens of added_tokens.json; `special` are those that the other files call special.
std::vector<AddedToken> ReadAddedTokensFile(const JsonObject& file, const std::set<std::string>& special) {
  std::vector<AddedToken> tokens;
  for (const std::string& content : file.Keys()) {
    if (content.empty()) file.FailAt("", "an added token cannot be empty; the file is damaged");
    const bool is_special = special.contains(content);
    tokens.push_back({.id = CheckedId(file, content, file.Required<int64_t>(content), content),
                      .content = content,
                      .special = is_special,
                      .normalized = !is_special,
                      .where = file.Where("")});
  }
  std::ranges::sort(tokens, {}, &AddedToken::id);
  return tokens;
}

void Append(std::vector<AddedToken> from, std::vector<AddedToken>& to) {
  std::ranges::move(from, std::back_inserter(to));
}

}  // namespace

TokenizerRules ReadTokenizerRules(const json& settings, std::string_view file) {
  const JsonObject root(settings, std::string(file));
  TokenizerRules rules;
  for (const JsonObject& token : root.Objects("added_tokens")) {
    AddedToken added = ReadAddedToken(token, false);
    added.id = CheckedId(token, "id", token.Required<int64_t>("id"), added.content);
    added.where = fmt::format("{}: added_tokens[{}]", file, rules.added_tokens.size());
    rules.added_tokens.push_back(std::move(added));
  }
  // Truncation and padding are the caller's business; a file that asks for them was saved by a training script.
  if (root.Has("normalizer")) ReadNormalizer(root.Object("normalizer"), rules);
  if (root.Has("pre_tokenizer")) ReadPreTokenizer(root.Object("pre_tokenizer"), rules);
  if (root.Has("post_processor")) ReadPostProcessor(root.Object("post_processor"), rules);
  if (root.Has("decoder")) ReadDecoder(root.Object("decoder"), rules);
  ReadModel(root.Object("model"), rules);
  return rules;
}

std::vector<AddedToken> ReadDeclaredTokens(const TokenDeclarations& files, const std::filesystem::path& directory) {
  const json nothing = json::object();
  const auto object = [&](const json& file, const char* name) {
    return JsonObject(file.is_null() ? nothing : file, (directory / name).string());
  };
  const JsonObject config = object(files.config, "tokenizer_config.json");
  const JsonObject special_map = object(files.special_map, "special_tokens_map.json");

  static const std::set<std::string> kStandard{"bos_token", "eos_token", "unk_token", "sep_token",
                                               "pad_token", "cls_token", "mask_token"};
  std::map<std::string, AddedToken> named;
  ReadNamedTokens(config, named);
  const bool has_names_of_its_own =
      std::ranges::any_of(named, [](const auto& entry) { return !kStandard.contains(entry.first); });
  std::vector<AddedToken> extra = ReadExtraTokens(config, "extra_special_tokens");
  if (extra.empty()) extra = ReadExtraTokens(config, "additional_special_tokens");
  if (!has_names_of_its_own) Append(ReadExtraTokens(config, "model_specific_special_tokens"), extra);

  std::vector<AddedToken> tokens;
  if (config.Has("added_tokens_decoder")) {
    tokens = ReadDecoderTokens(config.Object("added_tokens_decoder"));
  } else {
    ReadNamedTokens(special_map, named);
    Append(ReadExtraTokens(special_map, "extra_special_tokens"), extra);
    std::set<std::string> special;
    for (const auto& [name, token] : named) special.insert(token.content);
    for (const AddedToken& token : extra) special.insert(token.content);
    tokens = ReadAddedTokensFile(object(files.added, "added_tokens.json"), special);
  }
  for (auto& [name, token] : named) tokens.push_back(std::move(token));
  Append(std::move(extra), tokens);
  return tokens;
}

std::string Apply(const std::vector<Replacement>& replacements, std::string_view text, size_t limit) {
  std::string current(text);
  for (const Replacement& rule : replacements) {
    size_t at = current.find(rule.from);
    if (at == std::string::npos) continue;
    std::string next;
    next.reserve(std::min(limit, current.size() + current.size() / 4));
    size_t begin = 0;
    for (; at != std::string::npos; at = current.find(rule.from, begin)) {
      next.append(current, begin, at - begin).append(rule.to);
      begin = at + rule.from.size();
      if (next.size() > limit) {
        Fail(
            "a text of {} bytes grows past {} when \"{}\" becomes \"{}\"; no Gemma tokenizer needs that: is "
            "tokenizer.json "
            "damaged?",
            text.size(), limit, Shortened(rule.from), Shortened(rule.to));
      }
    }
    next.append(current, begin);
    current = std::move(next);
  }
  return current;
}

}  // namespace circlet
