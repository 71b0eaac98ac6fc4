#include "preprocess/tokenizer_file.h"

#include <algorithm>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"

namespace circlet {
namespace {

using nlohmann::json;

class Reader : public nlohmann::json_sax<json> {
 public:
  Reader(TokenizerFile& file, std::string_view name, size_t bytes) : file_(file), name_(name) {
    // Unescaped strings are never longer than their JSON, so the views stay valid. A merge "a b" loses its blank.
    file_.pool.reserve(bytes);
  }

  bool null() override { return Value(nullptr); }
  bool boolean(bool value) override { return Value(value); }
  bool number_integer(number_integer_t value) override { return table_ == kVocab ? Id(value) : Value(value); }
  bool number_unsigned(number_unsigned_t value) override {
    if (table_ == kVocab) return Id(static_cast<int64_t>(std::min<uint64_t>(value, INT64_MAX)));
    return Value(value);
  }
  bool number_float(number_float_t value, const string_t&) override { return Value(value); }
  bool string(string_t& value) override { return table_ == kMerges ? MergeString(value) : Value(value); }
  bool binary(binary_t&) override { return false; }  // no such thing in JSON text

  bool start_object(size_t) override {
    if (table_ != kNone) WrongType("an object");
    if (InModel("vocab")) {
      Once(has_vocab_, "vocab");
      table_ = kVocab;
      return true;
    }
    return Open(json::object());
  }
  bool key(string_t& key) override {
    if (table_ == kVocab) {
      piece_ = Keep(key);
      return true;
    }
    if (stack_.back()->contains(key))
      Fail("{}: the key \"{}\" stands twice in one object; the file is damaged", name_, Shortened(key));
    key_ = std::move(key);
    return true;
  }
  bool end_object() override {
    if (table_ == kVocab) {
      table_ = kNone;
      return true;
    }
    return Close();
  }

  bool start_array(size_t) override {
    if (table_ == kMerges && parts_ < 0) {
      parts_ = 0;
      return true;
    }
    if (table_ != kNone) WrongType("an array");
    if (InModel("merges")) {
      Once(has_merges_, "merges");
      table_ = kMerges;
      parts_ = -1;
      return true;
    }
    return Open(json::array());
  }
  bool end_array() override {
    if (table_ == kMerges) {
      if (parts_ < 0) {
        table_ = kNone;
        return true;
      }
      if (parts_ != 2) BadMerge(fmt::format("an array of {}", parts_));
      parts_ = -1;
      return true;
    }
    return Close();
  }

  bool parse_error(size_t position, const std::string& token, const nlohmann::detail::exception& error) override {
    Fail("{}: byte {}: not JSON (near \"{}\": {}); was the download cut off?", name_, position, Shortened(token), Shortened(error.what()));
  }

  bool HasTables() const { return has_vocab_ && has_merges_; }

 private:
  enum Table { kNone, kVocab, kMerges };

  // Whether the next value is this field of the model.
  bool InModel(std::string_view field) const { return stack_.size() == 2 && in_model_ && key_ == field; }

  bool Open(json value) {
    if (stack_.size() >= static_cast<size_t>(kJsonDepthLimit))
      Fail("{}: nested deeper than {} levels; no tokenizer needs that", name_, kJsonDepthLimit);
    if (stack_.empty()) {
      file_.settings = std::move(value);
      stack_.push_back(&file_.settings);
      return true;
    }
    if (stack_.size() == 1) in_model_ = key_ == "model";
    stack_.push_back(&Place(std::move(value)));
    return true;
  }
  bool Close() {
    stack_.pop_back();
    return true;
  }
  bool Value(json value) {
    if (table_ != kNone) WrongType(Shown(value));
    if (stack_.empty())
      file_.settings = std::move(value);
    else
      Place(std::move(value));
    return true;
  }
  json& Place(json value) {
    json& parent = *stack_.back();
    if (parent.is_array()) return parent.emplace_back(std::move(value));
    return parent[key_] = std::move(value);
  }

  std::string_view Keep(std::string_view text) {
    const size_t begin = file_.pool.size();
    CIRCLET_CHECK(begin + text.size() <= file_.pool.capacity(), "the pool would move: {} of {} bytes",
                  begin + text.size(), file_.pool.capacity());
    file_.pool.append(text);
    return std::string_view(file_.pool).substr(begin);
  }
  bool Id(int64_t id) {
    if (id < 0 || id >= TokenizerFile::kIdLimit)
      Fail("{}: model.vocab: piece \"{}\" has id {}; ids run from 0 to {}", name_, Shortened(piece_), id,
           TokenizerFile::kIdLimit - 1);
    file_.vocab.emplace_back(piece_, static_cast<int32_t>(id));
    return true;
  }
  bool MergeString(std::string_view text) {
    if (parts_ < 0) {  // the older form, "a b"
      const size_t blank = text.find(' ');
      if (blank == std::string_view::npos || text.find(' ', blank + 1) != std::string_view::npos)
        BadMerge(fmt::format("\"{}\"", text));
      const std::string_view left = Keep(text.substr(0, blank));
      file_.merges.emplace_back(left, Keep(text.substr(blank + 1)));
      return true;
    }
    if (parts_ == 0)
      file_.merges.emplace_back(Keep(text), std::string_view());
    else
      file_.merges.back().second = Keep(text);
    ++parts_;
    return true;
  }

  void Once(bool& seen, std::string_view field) {
    if (seen) Fail("{}: model.{} stands twice; the file is damaged", name_, field);
    seen = true;
  }
  [[noreturn]] void BadMerge(std::string_view found) const {
    const size_t rank = file_.merges.size() - (parts_ > 0 ? 1 : 0);
    Fail("{}: model.merges[{}]: expected two pieces, [\"a\", \"b\"] or \"a b\", found {}", name_, rank, Shortened(found));
  }
  [[noreturn]] void WrongType(std::string_view found) const {
    if (table_ == kMerges) BadMerge(found);
    Fail("{}: model.vocab: piece \"{}\": expected an integer id, found {}", name_, Shortened(piece_), Shortened(found));
  }

  TokenizerFile& file_;
  std::string_view name_;
  std::vector<json*> stack_;  // the open containers of the tree
  std::string key_;
  bool in_model_ = false;  // the open member of the root is "model"
  Table table_ = kNone;
  bool has_vocab_ = false, has_merges_ = false;
  std::string_view piece_;
  int parts_ = -1;  // pieces read of the merge that is open, -1 between merges
};

}  // namespace

TokenizerFile ParseTokenizerFile(std::string_view text, std::string_view name) {
  TokenizerFile file;
  Reader reader(file, name, text.size());
  json::sax_parse(text, &reader);
  if (!file.settings.is_object()) Fail("{}: expected a JSON object at the top; is this a tokenizer.json?", name);
  const json model = file.settings.value("model", json());
  if (model.is_object() && model.contains("type") && model["type"] != "BPE") {
    Fail("{}: model.type is {}; circlet reads \"BPE\" tokenizers only: use the tokenizer.json of a Gemma checkpoint",
         name, Shown(model["type"]));
  }
  if (!reader.HasTables()) {
    Fail(
        "{}: model.vocab (an object) or model.merges (an array) is missing; circlet reads BPE tokenizers in the "
        "tokenizer.json format",
        name);
  }
  return file;
}

}  // namespace circlet
