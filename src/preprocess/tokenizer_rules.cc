#include "preprocess/tokenizer_rules.h"

#include <charconv>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "preprocess/tokenizer_file.h"

namespace circlet {
namespace {

using nlohmann::json;

constexpr std::string_view kRemedy =
    "circlet implements the Gemma tokenizer only; use the tokenizer.json of a Gemma checkpoint";

[[noreturn]] void Unsupported(const JsonObject& object, std::string_view key) {
  object.FailAt(key, fmt::format("{} is not implemented; {}", object.Raw(key).dump(), kRemedy));
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

AddedToken ReadAddedToken(const JsonObject& token, int64_t id) {
  for (const std::string_view key : {"single_word", "lstrip", "rstrip", "normalized"}) RequireFalse(token, key);
  AddedToken added{0, token.Required<std::string>("content"), token.Optional<bool>("special", false)};
  if (added.content.empty()) token.FailAt("content", "an added token cannot be empty; the file is damaged");
  if (id < 0 || id >= TokenizerFile::kIdLimit)
    token.FailAt("id",
                 fmt::format("{} for \"{}\"; ids run from 0 to {}", id, added.content, TokenizerFile::kIdLimit - 1));
  added.id = static_cast<int32_t>(id);
  return added;
}

}  // namespace

TokenizerRules ReadTokenizerRules(const json& settings, std::string_view file) {
  const JsonObject root(settings, std::string(file));
  TokenizerRules rules;
  for (const JsonObject& token : root.Objects("added_tokens"))
    rules.added_tokens.push_back(ReadAddedToken(token, token.Required<int64_t>("id")));
  // Truncation and padding are the caller's business; a file that asks for them was saved by a training script.
  if (root.Has("normalizer")) ReadNormalizer(root.Object("normalizer"), rules);
  if (root.Has("pre_tokenizer")) ReadPreTokenizer(root.Object("pre_tokenizer"), rules);
  if (root.Has("post_processor")) ReadPostProcessor(root.Object("post_processor"), rules);
  if (root.Has("decoder")) ReadDecoder(root.Object("decoder"), rules);
  ReadModel(root.Object("model"), rules);
  return rules;
}

std::vector<AddedToken> ReadConfiguredTokens(const json& config, std::string_view file) {
  const JsonObject root(config, std::string(file));
  std::vector<AddedToken> tokens;
  if (const auto decoder = root.OptionalObject("added_tokens_decoder")) {
    for (const std::string& key : decoder->Keys()) {
      int64_t id = 0;
      const auto [end, failure] = std::from_chars(key.data(), key.data() + key.size(), id);
      if (failure != std::errc() || end != key.data() + key.size())
        decoder->FailAt(key, "the key must be a token id; the file is damaged");
      tokens.push_back(ReadAddedToken(decoder->Object(key), id));
    }
  }
  const json& extra = root.Raw("extra_special_tokens");
  if (extra.is_null()) return tokens;
  if (!extra.is_array() && !extra.is_object())
    root.FailAt("extra_special_tokens", "expected a list or a mapping of strings");
  for (const json& content : extra) {
    if (!content.is_string() || content.get_ref<const std::string&>().empty())
      root.FailAt("extra_special_tokens", fmt::format("expected strings, found {}", content.dump()));
    tokens.push_back({-1, content.get<std::string>(), true});
  }
  return tokens;
}

std::string Apply(const std::vector<Replacement>& replacements, std::string_view text) {
  std::string current(text);
  for (const Replacement& rule : replacements) {
    size_t at = current.find(rule.from);
    if (at == std::string::npos) continue;
    std::string next;
    next.reserve(current.size() + current.size() / 4);
    size_t begin = 0;
    for (; at != std::string::npos; at = current.find(rule.from, begin)) {
      next.append(current, begin, at - begin).append(rule.to);
      begin = at + rule.from.size();
    }
    next.append(current, begin);
    current = std::move(next);
  }
  return current;
}

}  // namespace circlet
