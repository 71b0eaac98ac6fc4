#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace circlet {

struct AddedToken;

// A byte-pair tokenizer as tokenizer.json describes it (model.md 8): added tokens found in the raw text, a normalizer
// of literal replacements, a split at a literal, merges by rank, bytes where the vocabulary has no character, and a
// template that adds <bos>. Text is UTF-8. A kind of model, normalizer, pre-tokenizer, post-processor or decoder that
// is not listed there is an Error naming it, so ids never differ silently from the reference's. Copies share the
// tables.
class Tokenizer {
 public:
  // `path` is tokenizer.json itself or a directory that holds it; in a directory tokenizer_config.json,
  // special_tokens_map.json and added_tokens.json may declare more tokens, as in the reference: one that neither the
  // vocabulary has nor a file gives an id takes the next id. Anything wrong with a file is an Error naming file, place
  // and value.
  static Tokenizer Load(const std::filesystem::path& path);
  // The same from memory; `file` stands for the text in errors.
  static Tokenizer Parse(std::string_view json, std::string_view file);

  // Ids of the text; `add_special` also runs the post-processor (<bos> in front). Throws Error when the text is not
  // UTF-8, naming the byte, has a character that the vocabulary cannot express, or grows beyond measure when it is
  // normalized.
  std::vector<int64_t> Encode(std::string_view text, bool add_special) const;
  // Text of the ids; bytes that are no UTF-8 become one U+FFFD each. Throws Error naming an id without a piece.
  std::string Decode(std::span<const int64_t> ids, bool skip_special) const;

  std::optional<int64_t> IdOf(std::string_view piece) const;
  // The id of a control token ("<|turn>") that the caller cannot do without; throws Error naming file and piece.
  int64_t RequireId(std::string_view piece) const;
  // As in the file ("▁the"); throws Error naming the id when there is none. Valid as long as a copy of the tokenizer.
  std::string_view Piece(int64_t id) const;
  bool IsSpecial(int64_t id) const;
  // One more than the largest id.
  int64_t IdLimit() const;

 private:
  struct Tables;
  static Tokenizer Build(std::string_view json, std::string_view file, std::vector<AddedToken> declared);
  explicit Tokenizer(std::shared_ptr<const Tables> tables) : tables_(std::move(tables)) {}
  std::shared_ptr<const Tables> tables_;
};

}  // namespace circlet
