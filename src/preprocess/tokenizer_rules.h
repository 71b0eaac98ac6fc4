#pragma once

// The parts of tokenizer.json around the two tables (gemma4.md 8), checked and reduced to what circlet does with them.

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace circlet {

struct Replacement {
  std::string from, to;  // literal; `from` is not empty
};

struct AddedToken {
  int32_t id = 0;
  std::string content;
  bool special = false;
};

struct TokenizerRules {
  std::vector<AddedToken> added_tokens;
  std::vector<Replacement> normalizer;      // one after the other, on text between added tokens
  std::string split_after;                  // normalized text is cut behind each occurrence; empty = never
  std::vector<std::string> prefix, suffix;  // pieces that the post-processor puts around the ids
  std::optional<std::string> unk_token;
  bool fuse_unk = false, byte_fallback = false, ignore_merges = false;
  std::vector<Replacement> decoder;  // on each piece
  bool decode_bytes = false;         // runs of <0xXX> pieces are bytes
};

// Throws Error naming `file`, the place and the value for every kind or option that is not implemented.
TokenizerRules ReadTokenizerRules(const nlohmann::json& settings, std::string_view file);

// Added tokens that tokenizer_config.json declares: added_tokens_decoder {"id": {content, ...}} with ids, and
// extra_special_tokens (a list or a mapping to strings) with id -1, to be looked up in the vocabulary.
std::vector<AddedToken> ReadConfiguredTokens(const nlohmann::json& config, std::string_view file);

std::string Apply(const std::vector<Replacement>& replacements, std::string_view text);

}  // namespace circlet
