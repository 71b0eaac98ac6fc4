#include "circlet/preprocess/tokenizer.h"

#include <algorithm>
#include <array>
#include <map>
#include <nlohmann/json.hpp>
#include <queue>
#include <set>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "preprocess/flat_tables.h"
#include "preprocess/tokenizer_file.h"
#include "preprocess/tokenizer_rules.h"
#include "preprocess/utf8.h"

namespace circlet {
namespace {

// Longest match among many literals: (node, byte) -> node.
class Trie {
 public:
  // Of two equal literals the first one counts.
  void Add(std::string_view literal, int32_t id) {
    if (literal.empty()) return;
    uint32_t node = 0;
    for (const char c : literal) {
      const uint8_t byte = static_cast<uint8_t>(c);
      uint32_t child = edges_.Find(node, byte);
      if (child == PairTable::kNone) {
        child = static_cast<uint32_t>(id_at_.size());
        edges_.Set(node, byte, child);
        id_at_.push_back(-1);
      }
      node = child;
    }
    if (id_at_[node] < 0) id_at_[node] = id;
    starts_[static_cast<uint8_t>(literal[0])] = true;
  }

  struct Match {
    size_t length = 0;  // 0 = none
    int32_t id = -1;
  };
  Match LongestAt(std::string_view text) const {
    Match match;
    if (!starts_[static_cast<uint8_t>(text[0])]) return match;
    uint32_t node = 0;
    for (size_t i = 0; i < text.size(); ++i) {
      node = edges_.Find(node, static_cast<uint8_t>(text[i]));
      if (node == PairTable::kNone) break;
      if (id_at_[node] >= 0) match = {i + 1, id_at_[node]};
    }
    return match;
  }

 private:
  PairTable edges_;
  std::vector<int32_t> id_at_{-1};
  std::array<bool, 256> starts_{};
};

// Bytes of white space (Unicode's, as in the reference's \s) that `text` starts or ends with.
bool IsSpace(uint32_t c) {
  return (c >= 9 && c <= 13) || c == 32 || c == 0x85 || c == 0xa0 || c == 0x1680 || (c >= 0x2000 && c <= 0x200a) ||
         c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}
size_t SpaceAtStart(std::string_view text) {
  size_t end = 0;
  while (end < text.size()) {
    const size_t length = Utf8Length(text.substr(end));
    if (length == 0 || !IsSpace(CodePoint(text.substr(end, length)))) break;
    end += length;
  }
  return end;
}
size_t SpaceAtEnd(std::string_view text) {
  size_t begin = text.size();
  while (begin > 0) {
    size_t letter = begin - 1;
    while (letter > 0 && (static_cast<uint8_t>(text[letter]) & 0xc0) == 0x80) --letter;
    if (!IsSpace(CodePoint(text.substr(letter, begin - letter)))) break;
    begin = letter;
  }
  return text.size() - begin;
}

size_t LimitOf(std::string_view text) { return kNormalizedGrowth * text.size() + kNormalizedRoom; }

struct Symbol {
  int32_t id;
  int32_t previous, next;  // -1 at the ends
};

// A merge that was possible when it was queued; it still is when the two symbols are the same.
struct Candidate {
  uint32_t rank;
  int32_t left;  // index of the left symbol
  int32_t left_id, right_id;

  // Lowest rank first, leftmost on ties.
  bool operator<(const Candidate& other) const { return rank != other.rank ? rank > other.rank : left > other.left; }
};

}  // namespace

struct Tokenizer::Tables {
  std::string file;  // for errors
  std::string pool;  // the bytes of the pieces of the vocabulary
  TokenizerRules rules;
  std::vector<std::string_view> pieces;  // by id; no data = no such id
  std::vector<bool> special;
  PieceTable ids;
  PairTable ranks;              // of merges
  std::vector<int32_t> merged;  // id by rank
  struct Strip {
    bool left = false, right = false;
  };
  Trie added, added_normalized;     // looked for in the text, and between its matches in normalized text
  std::map<int32_t, Strip> strips;  // of added tokens that take white space with them
  std::array<int32_t, 256> byte_ids;
  int32_t unk_id = -1;
  std::vector<int64_t> prefix, suffix;

  void AddVocab(const TokenizerFile& source);
  void AddMerges(const TokenizerFile& source);
  void AddToken(AddedToken& token);
  void AddTokens();
  int64_t Control(std::string_view piece, std::string_view field) const;

  template <typename Gap>
  void SplitAtTokens(const Trie& tokens, std::string_view text, std::vector<int64_t>& out, const Gap& gap) const;
  void EncodeGap(std::string_view text, std::vector<int64_t>& out) const;
  void EncodeNormal(std::string_view text, std::vector<int64_t>& out) const;
  void EncodeWord(std::string_view word, std::vector<int64_t>& out) const;
  std::vector<Symbol> Split(std::string_view word) const;
  void Merge(std::vector<Symbol>& symbols) const;
};

void Tokenizer::Tables::AddVocab(const TokenizerFile& source) {
  int32_t limit = 0;
  for (const auto& [piece, id] : source.vocab) limit = std::max(limit, id + 1);
  for (const AddedToken& token : rules.added_tokens) limit = std::max(limit, token.id + 1);
  pieces.resize(limit);
  special.resize(limit);
  ids.Reserve(source.vocab.size() + rules.added_tokens.size());
  for (const auto& [piece, id] : source.vocab) {
    if (pieces[id].data() != nullptr)
      Fail("{}: model.vocab: id {} belongs to \"{}\" and to \"{}\"; the file is damaged", file, id,
           Shortened(pieces[id]), Shortened(piece));
    if (ids.Find(piece, pieces) >= 0)
      Fail("{}: model.vocab: piece \"{}\" has the ids {} and {}; the file is damaged", file, Shortened(piece),
           ids.Find(piece, pieces), id);
    pieces[id] = piece;
    ids.Insert(id, pieces);
  }
}

void Tokenizer::Tables::AddMerges(const TokenizerFile& source) {
  ranks.Reserve(source.merges.size());
  merged.reserve(source.merges.size());
  std::string joined;
  for (const auto& merge : source.merges) {
    const std::string_view left = merge.first, right = merge.second;
    const size_t rank = merged.size();
    const auto id_of = [&](std::string_view piece) {
      const int32_t id = ids.Find(piece, pieces);
      if (id < 0)
        Fail("{}: model.merges[{}] (\"{}\" + \"{}\"): \"{}\" is not in model.vocab; the file is damaged", file, rank,
             Shortened(left), Shortened(right), Shortened(piece));
      return id;
    };
    joined.assign(left).append(right);
    // A pair that stands twice has its last rank, as in the reference.
    ranks.Set(static_cast<uint32_t>(id_of(left)), static_cast<uint32_t>(id_of(right)), static_cast<uint32_t>(rank));
    merged.push_back(id_of(joined));
  }
}

// `token.content` must stay where it is: a piece that the vocabulary lacks is a view of it.
void Tokenizer::Tables::AddToken(AddedToken& token) {
  const int32_t known = ids.Find(token.content, pieces);
  if (token.id < 0) token.id = known >= 0 ? known : static_cast<int32_t>(pieces.size());
  if (known >= 0 && known != token.id) {
    Fail("{}: \"{}\" has id {} here and id {} in model.vocab; the file is damaged", token.where,
         Shortened(token.content), token.id, known);
  }
  if (known < 0) {
    if (token.id >= static_cast<int32_t>(pieces.size())) {
      pieces.resize(token.id + 1);
      special.resize(token.id + 1);
    }
    if (pieces[token.id].data() != nullptr) {
      Fail("{}: id {} belongs to \"{}\" and to \"{}\"; the file is damaged", token.where, token.id,
           Shortened(pieces[token.id]), Shortened(token.content));
    }
    pieces[token.id] = token.content;
    ids.Insert(token.id, pieces);
  }
  special[token.id] = special[token.id] || token.special;
}

// Where several files declare a token, the first one tells how it is looked for.
void Tokenizer::Tables::AddTokens() {
  std::set<std::string_view> seen;
  const AddedToken* guessed = nullptr;
  for (AddedToken& token : rules.added_tokens) {
    // Ids go by the order of the declarations, which JSON objects do not keep.
    if (token.id < 0 && token.ordered == false && ids.Find(token.content, pieces) < 0) {
      if (guessed != nullptr)
        Fail(
            "{}: \"{}\" is in no vocabulary, nor is \"{}\", and no file gives their ids; list both in added_tokens of "
            "tokenizer.json",
            token.where, Shortened(token.content), Shortened(guessed->content));
      guessed = &token;
    }
    AddToken(token);
    if (!seen.insert(token.content).second) continue;
    if (token.lstrip || token.rstrip) strips[token.id] = {token.lstrip, token.rstrip};
    if (token.normalized)
      added_normalized.Add(Apply(rules.normalizer, token.content, LimitOf(token.content)), token.id);
    else
      added.Add(token.content, token.id);
  }
}

int64_t Tokenizer::Tables::Control(std::string_view piece, std::string_view field) const {
  const int32_t id = ids.Find(piece, pieces);
  if (id < 0)
    Fail("{}: {}: \"{}\" is neither in model.vocab nor in added_tokens; the file is damaged", file, field,
         Shortened(piece));
  return id;
}

Tokenizer Tokenizer::Load(const std::filesystem::path& path) {
  std::error_code ignored;  // ReadFile says what is wrong
  if (!std::filesystem::is_directory(path, ignored)) return Build(ReadFile(path), path.string(), {});
  const auto read = [&](const char* name) {
    return std::filesystem::exists(path / name, ignored) ? ReadJson(path / name) : nlohmann::json();
  };
  std::vector<AddedToken> declared = ReadDeclaredTokens(
      {read("tokenizer_config.json"), read("special_tokens_map.json"), read("added_tokens.json")}, path);
  const std::filesystem::path file = path / "tokenizer.json";
  return Build(ReadFile(file), file.string(), std::move(declared));
}

Tokenizer Tokenizer::Parse(std::string_view json, std::string_view file) { return Build(json, file, {}); }

Tokenizer Tokenizer::Build(std::string_view json, std::string_view file, std::vector<AddedToken> declared) {
  TokenizerFile source = ParseTokenizerFile(json, file);
  const auto tables = std::make_shared<Tables>();
  tables->file = file;
  tables->rules = ReadTokenizerRules(source.settings, file);
  std::vector<AddedToken>& tokens = tables->rules.added_tokens;
  // Those with ids of their own before those that take the next ones.
  const auto without_id = std::ranges::find(declared, -1, &AddedToken::id);
  tokens.insert(tokens.begin(), declared.begin(), without_id);
  tokens.insert(tokens.end(), without_id, declared.end());
  tables->AddVocab(source);
  tables->AddMerges(source);
  tables->AddTokens();
  for (int byte = 0; byte < 256; ++byte)
    tables->byte_ids[byte] = tables->ids.Find(fmt::format("<0x{:02X}>", byte), tables->pieces);
  const TokenizerRules& rules = tables->rules;
  if (rules.unk_token) tables->unk_id = static_cast<int32_t>(tables->Control(*rules.unk_token, "model.unk_token"));
  for (const std::string& piece : rules.prefix) tables->prefix.push_back(tables->Control(piece, "post_processor"));
  for (const std::string& piece : rules.suffix) tables->suffix.push_back(tables->Control(piece, "post_processor"));
  tables->pool = std::move(source.pool);
  return Tokenizer(tables);
}

// The symbols of a word: characters of the vocabulary, else their bytes, else <unk>.
std::vector<Symbol> Tokenizer::Tables::Split(std::string_view word) const {
  std::vector<Symbol> symbols;
  symbols.reserve(word.size());
  const auto append = [&](int32_t id) {
    const int32_t index = static_cast<int32_t>(symbols.size());
    symbols.push_back({id, index - 1, index + 1});
  };
  bool after_unk = false;
  for (size_t i = 0; i < word.size();) {
    const std::string_view character = word.substr(i, Utf8Length(word.substr(i)));
    i += character.size();
    if (const int32_t id = ids.Find(character, pieces); id >= 0) {
      append(id);
      after_unk = false;
      continue;
    }
    const bool has_bytes = rules.byte_fallback && std::ranges::all_of(character, [&](char c) {
                             return byte_ids[static_cast<uint8_t>(c)] >= 0;
                           });
    if (has_bytes) {
      for (const char c : character) append(byte_ids[static_cast<uint8_t>(c)]);
      after_unk = false;
      continue;
    }
    if (unk_id < 0) {
      Fail(
          "{}: character U+{:04X} (\"{}\") is not in model.vocab, and there is neither byte fallback nor an unk_token "
          "for "
          "it; take it out of the text",
          file, CodePoint(character), character);
    }
    if (!after_unk || !rules.fuse_unk) append(unk_id);
    after_unk = true;
  }
  if (!symbols.empty()) symbols.back().next = -1;
  return symbols;
}

// Merges the pair of lowest rank until none is left. A merge takes one symbol away and queues at most two candidates,
// so a word of n characters costs O(n log n).
void Tokenizer::Tables::Merge(std::vector<Symbol>& symbols) const {
  std::priority_queue<Candidate> queue;
  const auto propose = [&](int32_t left) {
    const int32_t right = left < 0 ? -1 : symbols[left].next;
    if (right < 0) return;
    const uint32_t rank = ranks.Find(static_cast<uint32_t>(symbols[left].id), static_cast<uint32_t>(symbols[right].id));
    if (rank != PairTable::kNone) queue.push({rank, left, symbols[left].id, symbols[right].id});
  };
  for (size_t i = 0; i < symbols.size(); ++i) propose(static_cast<int32_t>(i));
  while (!queue.empty()) {
    const Candidate candidate = queue.top();
    queue.pop();
    Symbol& left = symbols[candidate.left];
    if (left.id != candidate.left_id || left.next < 0 || symbols[left.next].id != candidate.right_id) continue;
    Symbol& right = symbols[left.next];
    left.id = merged[candidate.rank];
    left.next = right.next;
    right.id = -1;
    if (left.next >= 0) symbols[left.next].previous = candidate.left;
    propose(left.previous);
    propose(candidate.left);
  }
}

void Tokenizer::Tables::EncodeWord(std::string_view word, std::vector<int64_t>& out) const {
  if (rules.ignore_merges) {
    if (const int32_t id = ids.Find(word, pieces); id >= 0) {
      out.push_back(id);
      return;
    }
  }
  std::vector<Symbol> symbols = Split(word);
  Merge(symbols);
  for (int32_t i = symbols.empty() ? -1 : 0; i >= 0; i = symbols[i].next) out.push_back(symbols[i].id);
}

// Ids of the tokens in `text`, and gap(piece) for what stands between them.
template <typename Gap>
void Tokenizer::Tables::SplitAtTokens(const Trie& tokens, std::string_view text, std::vector<int64_t>& out,
                                      const Gap& gap) const {
  size_t done = 0;
  for (size_t i = 0; i < text.size();) {
    const Trie::Match match = tokens.LongestAt(text.substr(i));
    if (match.length == 0) {
      ++i;
      continue;
    }
    const auto strip = strips.find(match.id);
    const bool left = strip != strips.end() && strip->second.left, right = strip != strips.end() && strip->second.right;
    const size_t begin = left ? std::max(done, i - SpaceAtEnd(text.substr(0, i))) : i;
    if (done < begin) gap(text.substr(done, begin - done));
    out.push_back(match.id);
    i += match.length;
    done = right ? i + SpaceAtStart(text.substr(i)) : i;
  }
  if (done < text.size()) gap(text.substr(done));
}

void Tokenizer::Tables::EncodeGap(std::string_view text, std::vector<int64_t>& out) const {
  SplitAtTokens(added_normalized, Apply(rules.normalizer, text, LimitOf(text)), out,
                [&](std::string_view piece) { EncodeNormal(piece, out); });
}

void Tokenizer::Tables::EncodeNormal(std::string_view text, std::vector<int64_t>& out) const {
  for (size_t begin = 0; begin < text.size();) {
    size_t end = rules.split_after.empty() ? std::string::npos : text.find(rules.split_after, begin);
    end = end == std::string::npos ? text.size() : end + rules.split_after.size();
    EncodeWord(text.substr(begin, end - begin), out);
    begin = end;
  }
}

std::vector<int64_t> Tokenizer::Encode(std::string_view text, bool add_special) const {
  constexpr size_t kLimitBytes = size_t{1}
                                 << 26;  // symbols are numbered with 32 bits; a normalizer may lengthen the text
  if (text.size() > kLimitBytes)
    Fail("text of {} bytes: the tokenizer takes at most {} at once; cut it into pieces", text.size(), kLimitBytes);
  if (const size_t at = FirstNonUtf8(text); at != std::string_view::npos)
    Fail("text: byte {} (0x{:02X}) is not UTF-8; convert the text", at, static_cast<uint8_t>(text[at]));
  std::vector<int64_t> ids;
  if (add_special) ids = tables_->prefix;
  tables_->SplitAtTokens(tables_->added, text, ids, [&](std::string_view piece) { tables_->EncodeGap(piece, ids); });
  if (add_special) ids.insert(ids.end(), tables_->suffix.begin(), tables_->suffix.end());
  return ids;
}

namespace {

// The byte of "<0x0A>", -1 for any other piece.
int ByteOf(std::string_view piece) {
  if (piece.size() != 6 || !piece.starts_with("<0x") || piece[5] != '>') return -1;
  const auto digit = [](char c) {
    if (c >= '0' && c <= '9') return c - '0';
    if (c >= 'A' && c <= 'F') return c - 'A' + 10;
    return c >= 'a' && c <= 'f' ? c - 'a' + 10 : -256;
  };
  return std::max(-1, 16 * digit(piece[3]) + digit(piece[4]));
}

}  // namespace

std::string Tokenizer::Decode(std::span<const int64_t> ids, bool skip_special) const {
  std::string text, run;
  const auto end_run = [&] {
    if (FirstNonUtf8(run) == std::string_view::npos) {
      text += run;
    } else {
      for (size_t i = 0; i < run.size(); ++i) text += "\xEF\xBF\xBD";
    }
    run.clear();
  };
  for (const int64_t id : ids) {
    const std::string_view piece = Piece(id);
    if (skip_special && tables_->special[id]) continue;
    const int byte = tables_->rules.decode_bytes ? ByteOf(piece) : -1;
    if (byte >= 0) {
      run += static_cast<char>(byte);
      continue;
    }
    end_run();
    text += Apply(tables_->rules.decoder, piece, LimitOf(piece));
  }
  end_run();
  return text;
}

std::optional<int64_t> Tokenizer::IdOf(std::string_view piece) const {
  const int32_t id = tables_->ids.Find(piece, tables_->pieces);
  return id < 0 ? std::nullopt : std::optional<int64_t>(id);
}

int64_t Tokenizer::RequireId(std::string_view piece) const {
  const std::optional<int64_t> id = IdOf(piece);
  if (!id)
    Fail("{}: the vocabulary has no \"{}\"; use the tokenizer.json of a Gemma 4 checkpoint", tables_->file, piece);
  return *id;
}

std::string_view Tokenizer::Piece(int64_t id) const {
  if (id < 0 || id >= IdLimit() || tables_->pieces[id].data() == nullptr)
    Fail("{}: no piece has id {}; ids run from 0 to {}: do the ids belong to this tokenizer?", tables_->file, id,
         IdLimit() - 1);
  return tables_->pieces[id];
}

bool Tokenizer::IsSpecial(int64_t id) const { return id >= 0 && id < IdLimit() && tables_->special[id]; }

int64_t Tokenizer::IdLimit() const { return static_cast<int64_t>(tables_->pieces.size()); }

}  // namespace circlet
