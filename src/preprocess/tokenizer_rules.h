#pragma once

// The parts of tokenizer.json around the two tables (model.md 8), checked and reduced to what circlet does with them.

#include <cstdint>
#include <filesystem>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace circlet {

struct Replacement {
  std::string from, to;  // literal; `from` is not empty
};

struct AddedToken {
  int32_t id = -1;  // -1: that of the vocabulary, or the next free one
  std::string content;
  bool special = false;
  bool normalized = false;              // looked for in normalized text, as normalized itself
  bool lstrip = false, rstrip = false;  // takes the white space on that side with it
  bool ordered = true;                  // false: declared in a JSON object, whose order is not kept
  std::string where;                    // "tokenizer.json: added_tokens[3]", for errors
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

// The other files of a checkpoint that may declare tokens; null where there is no such file.
struct TokenDeclarations {
  nlohmann::json config;       // tokenizer_config.json: added_tokens_decoder, NAME_token, extra_special_tokens ...
  nlohmann::json special_map;  // special_tokens_map.json: NAME_token, extra_special_tokens
  nlohmann::json added;        // added_tokens.json: {"content": id}
};

// Tokens that these files declare, in the order in which ids are given to those without one. As in the reference, the
// last two files count only where tokenizer_config.json has no added_tokens_decoder. `directory` stands for errors.
std::vector<AddedToken> ReadDeclaredTokens(const TokenDeclarations& files, const std::filesystem::path& directory);

// Normalized text is at most this many times as long as what it is made of, and a constant: rules that double a text
// again and again would take all memory.
inline constexpr size_t kNormalizedGrowth = 16, kNormalizedRoom = size_t{1} << 20;

// Throws Error when the result grows past `limit` bytes.
std::string Apply(const std::vector<Replacement>& replacements, std::string_view text, size_t limit);

}  // namespace circlet
