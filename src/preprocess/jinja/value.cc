#include "preprocess/jinja/value.h"

#include <algorithm>
#include <charconv>
#include <cmath>

#include "preprocess/jinja/evaluator.h"
#include "preprocess/jinja/text.h"
#include "preprocess/utf8.h"

namespace circlet::jinja {
namespace {

constexpr int64_t kPerValue = sizeof(Value);

int DepthOver(const std::vector<Value>& items) {
  int depth = 0;
  for (const Value& item : items) depth = std::max(depth, item.Depth());
  CheckDepth(depth + 1);
  return depth + 1;
}

// The same text for keys that Python holds equal: 1, 1.0 and True.
std::string KeyText(const Value& key) {
  if (const std::string* text = key.AsText()) return "s" + *text;
  if (const std::optional<int64_t> integer = key.Integer()) return fmt::format("i{}", *integer);
  if (const double* number = key.AsFloat()) {
    if (*number == std::floor(*number) && std::abs(*number) < 9e18)
      return fmt::format("i{}", static_cast<int64_t>(*number));
    return fmt::format("f{}", *number);
  }
  if (key.IsNone()) return "n";
  if (const Sequence* sequence = key.AsSequence(); sequence != nullptr && sequence->IsTuple()) {
    std::string text = "t";
    for (const Value& item : sequence->items) {
      const std::string part = KeyText(item);
      text += fmt::format("{}:{}", part.size(), part);
    }
    return text;
  }
  RequireDefined(key);
  Fail("a value of type {} cannot be the key of a dict", key.TypeName());
}

std::string TextRepr(std::string_view text) {
  const char quote = text.find('\'') != text.npos && text.find('"') == text.npos ? '"' : '\'';
  std::string out(1, quote);
  for (; !text.empty(); text.remove_prefix(FirstCharacter(text).size())) {
    const std::string_view character = FirstCharacter(text);
    const uint32_t c = CodePoint(character);
    if (c == static_cast<uint32_t>(quote) || c == '\\') {
      out += '\\';
      out += character;
    } else if (c == '\n' || c == '\r' || c == '\t') {
      out += c == '\n' ? "\\n" : c == '\r' ? "\\r" : "\\t";
    } else if (c < 0x20 || (c >= 0x7f && c <= 0xa0) || c == 0xad) {
      out += fmt::format("\\x{:02x}", c);
    } else if ((IsSpace(c) && c != ' ') || (c >= 0x200b && c <= 0x200f) || (c >= 0x202a && c <= 0x202e) ||
               (c >= 0x2060 && c <= 0x206f) || (c >= 0xe000 && c <= 0xf8ff) || c == 0xfeff) {
      out += fmt::format("\\u{:04x}", c);  // what Python calls not printable, as far as texts have it
    } else {
      out += character;
    }
  }
  return out + quote;
}

class ReprWriter {
 public:
  explicit ReprWriter(Meter& meter) : meter_(meter) {}

  void Write(const Value& value) {
    meter_.Step();
    if (value.AsUndefined() != nullptr) return Put("Undefined");
    if (value.IsNone()) return Put("None");
    if (const bool* truth = value.AsBool()) return Put(*truth ? "True" : "False");
    if (const int64_t* integer = value.AsInt()) return Put(fmt::format("{}", *integer));
    if (const double* number = value.AsFloat()) return Put(FloatText(*number));
    if (const std::string* text = value.AsText())
      return Put(value.IsSafe() ? fmt::format("Markup({})", TextRepr(*text)) : TextRepr(*text));
    if (const Sequence* sequence = value.AsSequence()) return WriteSequence(*sequence);
    if (const Dict* dict = value.AsDict()) return WriteDict(*dict);
    Fail("a value of type {} has no text that means anything; is a call missing its parentheses?", value.TypeName());
  }
  std::string Take() { return std::move(out_); }

 private:
  void Put(std::string_view text) {
    meter_.Bytes(static_cast<int64_t>(text.size()));
    out_ += text;
  }
  void WriteItems(const std::vector<Value>& items, std::string_view open, std::string_view close) {
    Put(open);
    for (size_t i = 0; i < items.size(); ++i) {
      if (i > 0) Put(", ");
      Write(items[i]);
    }
    Put(close);
  }
  void WriteSequence(const Sequence& sequence) {
    switch (sequence.form) {
      case Sequence::Form::kList:
        return WriteItems(sequence.items, "[", "]");
      case Sequence::Form::kTuple:
      case Sequence::Form::kGroup:
        return WriteItems(sequence.items, "(", sequence.items.size() == 1 ? ",)" : ")");
      case Sequence::Form::kRange: {
        const auto& [start, stop, step] = sequence.range;
        return Put(step == 1 ? fmt::format("range({}, {})", start, stop)
                             : fmt::format("range({}, {}, {})", start, stop, step));
      }
      case Sequence::Form::kView:
        return WriteItems(sequence.items, fmt::format("{}([", sequence.name), "])");
      case Sequence::Form::kGenerator:
        Fail("a {} has no text that means anything; put `| list` after the filter that made it", sequence.name);
    }
  }
  void WriteDict(const Dict& dict) {
    Put("{");
    for (size_t i = 0; i < dict.Entries().size(); ++i) {
      if (i > 0) Put(", ");
      Write(dict.Entries()[i].first);
      Put(": ");
      Write(dict.Entries()[i].second);
    }
    Put("}");
  }

  Meter& meter_;
  std::string out_;
};

class JsonWriter {
 public:
  JsonWriter(const JsonStyle& style, Meter& meter) : style_(style), meter_(meter) {}

  void Write(const Value& value, int level) {
    meter_.Step();
    if (value.IsNone()) return Put("null");
    if (const bool* truth = value.AsBool()) return Put(*truth ? "true" : "false");
    if (const int64_t* integer = value.AsInt()) return Put(fmt::format("{}", *integer));
    if (const double* number = value.AsFloat()) return Put(Number(*number));
    if (const std::string* text = value.AsText()) return PutQuoted(*text);
    if (const Dict* dict = value.AsDict()) return WriteDict(*dict, level);
    const Sequence* sequence = value.AsSequence();
    if (sequence == nullptr || (sequence->form != Sequence::Form::kList && !sequence->IsTuple()))
      Fail("tojson: a value of type {} has no JSON", value.TypeName());
    if (sequence->items.empty()) return Put("[]");
    Put("[");
    for (size_t i = 0; i < sequence->items.size(); ++i) {
      Separate(i, level + 1);
      Write(sequence->items[i], level + 1);
    }
    NewLine(level);
    Put("]");
  }
  std::string Take() { return std::move(out_); }

 private:
  static std::string Number(double number) {
    if (std::isnan(number)) return "NaN";
    if (std::isinf(number)) return number > 0 ? "Infinity" : "-Infinity";
    return FloatText(number);
  }
  void Put(std::string_view text) {
    meter_.Bytes(static_cast<int64_t>(text.size()));
    out_ += text;
  }
  void NewLine(int level) {
    if (!style_.indent) return;
    Put("\n");
    for (int i = 0; i < level; ++i) Put(*style_.indent);
  }
  void Separate(size_t index, int level) {
    if (index > 0) Put(style_.item_separator);
    NewLine(level);
  }
  void WriteDict(const Dict& dict, int level) {
    std::vector<const std::pair<Value, Value>*> entries;
    for (const auto& entry : dict.Entries()) entries.push_back(&entry);
    if (style_.sort_keys) {
      std::ranges::stable_sort(entries,
                               [&](const auto* a, const auto* b) { return Less(a->first, b->first, "<", meter_); });
    }
    if (entries.empty()) return Put("{}");
    Put("{");
    for (size_t i = 0; i < entries.size(); ++i) {
      Separate(i, level + 1);
      PutKey(entries[i]->first);
      Put(style_.key_separator);
      Write(entries[i]->second, level + 1);
    }
    NewLine(level);
    Put("}");
  }
  void PutKey(const Value& key) {
    if (const std::string* text = key.AsText()) return PutQuoted(*text);
    if (key.AsSequence() != nullptr) Fail("tojson: a tuple is the key of a dict; JSON has none");
    Put("\"");
    Write(key, 0);
    Put("\"");
  }
  void PutQuoted(std::string_view text) {
    std::string out = "\"";
    for (; !text.empty(); text.remove_prefix(FirstCharacter(text).size())) {
      const std::string_view character = FirstCharacter(text);
      const uint32_t c = CodePoint(character);
      constexpr std::string_view kShort = "\b\t\n\f\r\"\\", kLetters = "btnfr\"\\";
      if (const size_t at = c < 0x80 ? kShort.find(character[0]) : kShort.npos; at != kShort.npos) {
        out += '\\';
        out += kLetters[at];
      } else if (c < 0x20) {
        out += fmt::format("\\u{:04x}", c);
      } else if (c < 0x7f || !style_.ensure_ascii) {
        out += character;
      } else if (c < 0x10000) {
        out += fmt::format("\\u{:04x}", c);
      } else {
        out += fmt::format("\\u{:04x}\\u{:04x}", 0xd800 + ((c - 0x10000) >> 10), 0xdc00 + ((c - 0x10000) & 0x3ff));
      }
    }
    Put(out + '"');
  }

  const JsonStyle& style_;
  Meter& meter_;
  std::string out_;
};

}  // namespace

Value::Value(std::string text, bool safe) : data_(std::make_shared<const Text>(Text{std::move(text), safe})) {}

Value Value::MakeUndefined(std::string why) {
  Value value;
  value.data_ = Undefined{std::make_shared<const std::string>(std::move(why))};
  return value;
}

const std::string* Value::AsText() const {
  const Text* text = Get<const Text>();
  return text != nullptr ? &text->text : nullptr;
}

bool Value::IsSafe() const {
  const Text* text = Get<const Text>();
  return text != nullptr && text->safe;
}

std::optional<int64_t> Value::Integer() const {
  if (const bool* truth = AsBool()) return *truth;
  if (const int64_t* integer = AsInt()) return *integer;
  return std::nullopt;
}

std::optional<double> Value::Number() const {
  if (const double* number = AsFloat()) return *number;
  if (const std::optional<int64_t> integer = Integer()) return static_cast<double>(*integer);
  return std::nullopt;
}

int Value::Depth() const {
  if (const Sequence* sequence = AsSequence()) return sequence->depth;
  if (const Dict* dict = AsDict()) return dict->depth;
  if (const Loop* loop = AsLoop()) return loop->depth;
  if (const Callable* callable = AsCallable()) return callable->depth;
  return 0;
}

std::string_view Value::TypeName() const {
  if (AsUndefined() != nullptr) return "Undefined";
  if (IsNone()) return "NoneType";
  if (AsBool() != nullptr) return "bool";
  if (AsInt() != nullptr) return "int";
  if (AsFloat() != nullptr) return "float";
  if (AsText() != nullptr) return "str";
  if (AsDict() != nullptr) return "dict";
  if (AsNamespace() != nullptr) return "namespace";
  if (AsLoop() != nullptr) return "loop";
  if (AsCallable() != nullptr) return "function";
  const Sequence& sequence = *AsSequence();
  switch (sequence.form) {
    case Sequence::Form::kList:
      return "list";
    case Sequence::Form::kTuple:
    case Sequence::Form::kGroup:
      return "tuple";
    case Sequence::Form::kRange:
      return "range";
    default:
      return sequence.name;
  }
}

bool Value::Is(const Value& other) const {
  if (data_.index() != other.data_.index()) return false;
  if (IsNone()) return true;
  if (AsBool() != nullptr) return *AsBool() == *other.AsBool();
  if (AsInt() != nullptr) return *AsInt() == *other.AsInt();
  if (AsText() != nullptr) return AsText() == other.AsText() || *AsText() == *other.AsText();
  return AsSequence() == other.AsSequence() && AsDict() == other.AsDict() && AsNamespace() == other.AsNamespace() &&
         AsLoop() == other.AsLoop() && AsCallable() == other.AsCallable() && AsFloat() == nullptr &&
         AsUndefined() == nullptr;
}

const Value* Dict::Find(const Value& key) const {
  const auto found = index_.find(KeyText(key));
  return found == index_.end() ? nullptr : &entries_[found->second].second;
}

const Value* Dict::Find(std::string_view key) const {
  const auto found = index_.find("s" + std::string(key));
  return found == index_.end() ? nullptr : &entries_[found->second].second;
}

void Dict::Set(const Value& key, Value value) {
  const auto [place, inserted] = index_.emplace(KeyText(key), entries_.size());
  if (inserted)
    entries_.emplace_back(key, std::move(value));
  else
    entries_[place->second].second = std::move(value);
}

void CheckDepth(int depth) {
  constexpr int kLimit = 128;
  if (depth > kLimit) Fail("values nested more than {} deep", kLimit);
}

Value MakeSequence(std::vector<Value> items, Sequence::Form form, Meter& meter, std::string_view name) {
  meter.Bytes(static_cast<int64_t>(items.size()) + 2, kPerValue);
  Sequence sequence{.form = form, .name = name, .depth = DepthOver(items)};
  sequence.items = std::move(items);
  return Value(std::make_shared<const Sequence>(std::move(sequence)));
}

Value MakeDict(Dict dict, Meter& meter) {
  constexpr int64_t kPerEntry = 6 * kPerValue;  // the key twice, the place in the index
  meter.Bytes(static_cast<int64_t>(dict.Entries().size()) + 1, kPerEntry);
  for (const auto& [key, value] : dict.Entries())
    dict.depth = std::max({dict.depth, key.Depth() + 1, value.Depth() + 1});
  CheckDepth(dict.depth);
  return Value(std::make_shared<const Dict>(std::move(dict)));
}

Value MakeText(std::string text, Meter& meter, bool safe) {
  meter.Bytes(static_cast<int64_t>(text.size()) + kPerValue);
  return Value(std::move(text), safe);
}

void FailUndefined(const Undefined& undefined) { Fail("{}", *undefined.why); }

void RequireDefined(const Value& value) {
  if (const Undefined* undefined = value.AsUndefined()) FailUndefined(*undefined);
}

bool Truth(const Value& value) {
  if (value.AsUndefined() != nullptr || value.IsNone()) return false;
  if (const std::optional<double> number = value.Number()) return *number != 0;
  if (const std::string* text = value.AsText()) return !text->empty();
  if (const Sequence* sequence = value.AsSequence())
    return sequence->form == Sequence::Form::kGenerator || !sequence->items.empty();
  if (const Dict* dict = value.AsDict()) return !dict->Entries().empty();
  if (Loop* loop = value.AsLoop()) return loop->Length() != 0;
  return true;
}

bool Equal(const Value& a, const Value& b, Meter& meter) {
  meter.Step();
  if (a.AsInt() != nullptr && b.AsInt() != nullptr) return *a.AsInt() == *b.AsInt();
  if (const auto x = a.Number(), y = b.Number(); x && y) {
    // An int compares with a float exactly.
    const auto exact = [](const Value& v) -> long double {
      return v.Integer() ? static_cast<long double>(*v.Integer()) : static_cast<long double>(*v.AsFloat());
    };
    return exact(a) == exact(b);
  }
  if (a.AsText() != nullptr && b.AsText() != nullptr) return *a.AsText() == *b.AsText();
  if (const Sequence* x = a.AsSequence(), *y = b.AsSequence(); x != nullptr && y != nullptr) {
    if (x->IsTuple() != y->IsTuple() || (x->form != y->form && !x->IsTuple())) return false;
    if (x->form == Sequence::Form::kView || x->form == Sequence::Form::kGenerator) return x == y;
    return x->items.size() == y->items.size() &&
           std::ranges::equal(x->items, y->items, [&](const Value& i, const Value& j) { return Equal(i, j, meter); });
  }
  if (const Dict* x = a.AsDict(), *y = b.AsDict(); x != nullptr && y != nullptr) {
    if (x->Entries().size() != y->Entries().size()) return false;
    return std::ranges::all_of(x->Entries(), [&](const auto& entry) {
      const Value* other = y->Find(entry.first);
      return other != nullptr && Equal(entry.second, *other, meter);
    });
  }
  if (a.AsUndefined() != nullptr && b.AsUndefined() != nullptr) return true;
  return a.Is(b);
}

bool Less(const Value& a, const Value& b, std::string_view sign, Meter& meter) {
  meter.Step();
  RequireDefined(a);
  RequireDefined(b);
  if (const auto x = a.Integer(), y = b.Integer(); x && y) return *x < *y;
  if (const auto x = a.Number(), y = b.Number(); x && y) return *x < *y;
  if (a.AsText() != nullptr && b.AsText() != nullptr) return *a.AsText() < *b.AsText();
  const Sequence *x = a.AsSequence(), *y = b.AsSequence();
  const bool comparable =
      x != nullptr && y != nullptr &&
      ((x->IsTuple() && y->IsTuple()) || (x->form == Sequence::Form::kList && y->form == Sequence::Form::kList));
  if (!comparable) Fail("{} has no order between {} and {}", sign, a.TypeName(), b.TypeName());
  for (size_t i = 0; i < x->items.size() && i < y->items.size(); ++i)
    if (!Equal(x->items[i], y->items[i], meter)) return Less(x->items[i], y->items[i], sign, meter);
  return x->items.size() < y->items.size();
}

bool Contains(const Value& container, const Value& item, Meter& meter) {
  if (const std::string* text = container.AsText()) {
    const std::string* part = item.AsText();
    if (part == nullptr) {
      RequireDefined(item);
      Fail("`in` asks whether a text holds a value of type {}", item.TypeName());
    }
    meter.Step(1 + static_cast<int64_t>(text->size() / 64));
    return text->find(*part) != text->npos;
  }
  if (const Dict* dict = container.AsDict()) {
    if (item.AsUndefined() != nullptr) return false;
    return dict->Find(item) != nullptr;
  }
  if (const Sequence* sequence = container.AsSequence();
      sequence != nullptr && sequence->form == Sequence::Form::kGenerator) {
    while (sequence->consumed < sequence->items.size())
      if (Equal(sequence->items[sequence->consumed++], item, meter)) return true;
    return false;
  }
  const std::vector<Value> items = Items(container, meter);
  return std::ranges::any_of(items, [&](const Value& each) { return Equal(each, item, meter); });
}

int64_t Length(const Value& value) {
  if (value.AsUndefined() != nullptr) return 0;
  if (const std::string* text = value.AsText()) return CharacterCount(*text);
  if (const Dict* dict = value.AsDict()) return static_cast<int64_t>(dict->Entries().size());
  if (Loop* loop = value.AsLoop()) return loop->Length();
  const Sequence* sequence = value.AsSequence();
  if (sequence == nullptr || sequence->form == Sequence::Form::kGenerator)
    Fail("a value of type {} has no length", value.TypeName());
  return static_cast<int64_t>(sequence->items.size());
}

std::vector<Value> Items(const Value& value, Meter& meter) {
  if (value.AsUndefined() != nullptr) return {};
  std::vector<Value> items;
  if (const std::string* text = value.AsText()) {
    meter.Bytes(static_cast<int64_t>(text->size()), 4 * kPerValue);
    for (const std::string_view c : Characters(*text)) items.emplace_back(std::string(c));
  } else if (const Dict* dict = value.AsDict()) {
    for (const auto& entry : dict->Entries()) items.push_back(entry.first);
  } else if (const Sequence* sequence = value.AsSequence()) {
    const bool once = sequence->form == Sequence::Form::kGenerator;
    items.assign(sequence->items.begin() + static_cast<std::ptrdiff_t>(sequence->consumed), sequence->items.end());
    if (once) sequence->consumed = sequence->items.size();
  } else {
    Fail("a value of type {} cannot be walked over", value.TypeName());
  }
  meter.Bytes(static_cast<int64_t>(items.size()), kPerValue);
  meter.Step(static_cast<int64_t>(items.size() / 8));
  return items;
}

std::string Str(const Value& value, Meter& meter) {
  if (value.AsUndefined() != nullptr) return {};
  if (const std::string* text = value.AsText()) {
    meter.Bytes(static_cast<int64_t>(text->size()));
    return *text;
  }
  return Repr(value, meter);
}

std::string Repr(const Value& value, Meter& meter) {
  ReprWriter writer(meter);
  writer.Write(value);
  return writer.Take();
}

std::string FloatText(double value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  char buffer[40];
  const auto end = std::to_chars(buffer, buffer + sizeof buffer, value, std::chars_format::scientific).ptr;
  std::string text(buffer, end);
  const size_t e = text.find('e');
  const int exponent = std::stoi(text.substr(e + 1));
  if (exponent < -4 || exponent >= 16) return text;
  std::string digits;
  for (const char c : std::string_view(text).substr(0, e))
    if (c != '-' && c != '.') digits += c;
  if (exponent < 0) digits.insert(0, static_cast<size_t>(-exponent), '0');
  const size_t whole = exponent < 0 ? 1 : static_cast<size_t>(exponent) + 1;
  if (digits.size() < whole) digits.append(whole - digits.size(), '0');
  std::string out = (std::signbit(value) ? "-" : "") + digits.substr(0, whole) + "." + digits.substr(whole);
  return out.back() == '.' ? out + "0" : out;
}

std::string ToJson(const Value& value, const JsonStyle& style, Meter& meter) {
  JsonWriter writer(style, meter);
  writer.Write(value, 0);
  return writer.Take();
}

}  // namespace circlet::jinja
