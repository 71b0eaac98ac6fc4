// The filters and tests of jinja2 that chat templates use, under their names.

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <map>

#include "circlet/base/error.h"
#include "preprocess/jinja/evaluator.h"
#include "preprocess/jinja/text.h"

namespace circlet::jinja {
namespace {

using Given = const CallArguments&;

std::string TextOf(const Value& value, Evaluator& evaluator) { return Str(value, evaluator.GetMeter()); }
std::vector<Value> ItemsOf(const Value& value, Evaluator& evaluator) { return Items(value, evaluator.GetMeter()); }

// The member of `value` that a filter's argument names: "a.b", "a.0", or an index.
class Member {
 public:
  Member(const Value& attribute, Evaluator& evaluator) : evaluator_(evaluator) {
    if (attribute.IsNone()) return;
    const std::string* text = attribute.AsText();
    if (text == nullptr) {
      parts_.push_back(attribute);
      return;
    }
    for (const std::string_view part : Split(*text, ".", -1)) {
      int64_t index = 0;
      const auto [end, error] = std::from_chars(part.data(), part.data() + part.size(), index);
      const bool number = error == std::errc() && end == part.data() + part.size() && index >= 0;
      parts_.push_back(number ? Value(index) : Value(std::string(part)));
    }
  }
  Value operator()(Value value, const Value& fallback = {}) const {
    for (const Value& part : parts_) {
      value = evaluator_.Item(value, part);
      if (value.AsUndefined() != nullptr && !fallback.IsNone()) value = fallback;
    }
    return value;
  }

 private:
  Evaluator& evaluator_;
  std::vector<Value> parts_;
};

Value IgnoreCase(Value value, bool case_sensitive) {
  const std::string* text = value.AsText();
  return text != nullptr && !case_sensitive ? Value(Lower(*text)) : value;
}

// Items with their keys, in the order of the keys; equal ones keep their order.
std::vector<std::pair<Value, Value>> SortedByKey(std::vector<std::pair<Value, Value>> keyed, bool reverse,
                                                 Meter& meter) {
  std::ranges::stable_sort(keyed, [&](const auto& a, const auto& b) {
    return reverse ? Less(b.first, a.first, "<", meter) : Less(a.first, b.first, "<", meter);
  });
  return keyed;
}

Value UpperFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("upper", arguments, {});
  return evaluator.String(Upper(TextOf(value, evaluator)), value.IsSafe());
}
Value LowerFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("lower", arguments, {});
  return evaluator.String(Lower(TextOf(value, evaluator)), value.IsSafe());
}
Value CapitalizeFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("capitalize", arguments, {});
  return evaluator.String(Capitalize(TextOf(value, evaluator)), value.IsSafe());
}
Value TitleCase(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("title", arguments, {});
  return evaluator.String(TitleFilter(TextOf(value, evaluator)));
}
Value Trim(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("trim", arguments, {"chars"});
  return evaluator.String(std::string(Strip(TextOf(value, evaluator), true, true, given.OptionalString(0))),
                          value.IsSafe());
}
Value ToString(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("string", arguments, {});
  return evaluator.String(TextOf(value, evaluator), value.IsSafe());
}
Value Safe(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("safe", arguments, {});
  return evaluator.String(TextOf(value, evaluator), true);
}
Value EscapeFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("escape", arguments, {});
  if (value.IsSafe()) return value;
  return evaluator.String(Escape(TextOf(value, evaluator)), true);
}
Value ForceEscape(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("forceescape", arguments, {});
  return evaluator.String(Escape(TextOf(value, evaluator)), true);
}

Value Replace(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("replace", arguments, {"old", "new", "count"});
  const std::string text = TextOf(value, evaluator), old = TextOf(given.At(0), evaluator),
                    now = TextOf(given.At(1), evaluator);
  int64_t count = given.OptionalInt(2).value_or(-1);
  std::string out;
  size_t begin = 0;
  while (count != 0) {
    size_t at = old.empty() ? begin : text.find(old, begin);
    if (at == text.npos || at > text.size()) break;
    evaluator.GetMeter().Bytes(static_cast<int64_t>(now.size()));
    out.append(text, begin, at - begin);
    out += now;
    --count;
    begin = at + old.size();
    if (!old.empty()) continue;
    if (at == text.size()) return evaluator.String(std::move(out));
    const std::string_view next = FirstCharacter(std::string_view(text).substr(at));
    out += next;
    begin += next.size();
  }
  out.append(text, begin);
  return evaluator.String(std::move(out));
}

Value Join(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("join", arguments, {"d", "attribute"});
  const std::string separator = given.Has(0) ? TextOf(given.At(0), evaluator) : "";
  const Member member(given.Or(1, {}), evaluator);
  std::string out;
  bool first = true;
  for (const Value& item : ItemsOf(value, evaluator)) {
    if (!first) out += separator;
    evaluator.GetMeter().Bytes(static_cast<int64_t>(separator.size()));
    out += TextOf(member(item), evaluator);
    first = false;
  }
  return evaluator.String(std::move(out));
}

Value Indent(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("indent", arguments, {"width", "first", "blank"});
  RequireDefined(value);
  if (value.AsText() == nullptr) Fail("indent: expected a text, found a value of type {}", value.TypeName());
  const std::string* own = given.Has(0) ? given.At(0).AsText() : nullptr;
  const int64_t width = own != nullptr ? 0 : std::max<int64_t>(0, given.Int(0, 4));
  evaluator.GetMeter().Bytes(width);
  const std::string indent = own != nullptr ? *own : std::string(static_cast<size_t>(width), ' ');
  const std::string text = *value.AsText() + "\n";
  std::string out = given.Bool(1, false) ? indent : "";
  bool first = true;
  for (const std::string_view line : SplitLines(text)) {
    if (!first) out += '\n';
    if (!first && (given.Bool(2, false) || !line.empty())) {
      evaluator.GetMeter().Bytes(static_cast<int64_t>(indent.size()));
      out += indent;
    }
    out += line;
    first = false;
  }
  return evaluator.String(std::move(out), value.IsSafe());
}

Value Center(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("center", arguments, {"width"});
  return CallMethod(Value(TextOf(value, evaluator)), "center", {.positional = {given.Int(0, 80)}}, evaluator);
}

Value Truncate(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("truncate", arguments, {"length", "killwords", "end", "leeway"});
  RequireDefined(value);
  if (value.AsText() == nullptr) Fail("truncate: expected a text, found a value of type {}", value.TypeName());
  const std::string end = given.Has(2) ? given.String(2) : "...";
  const int64_t length = given.Int(0, 255), leeway = given.OptionalInt(3).value_or(5),
                room = length - CharacterCount(end);
  if (room < 0 || leeway < 0) Fail("truncate: a length of {} with a leeway of {}", length, leeway);
  const std::string& text = *value.AsText();
  if (CharacterCount(text) <= length + leeway) return value;
  size_t at = 0;
  for (int64_t i = 0; i < room; ++i) at += FirstCharacter(std::string_view(text).substr(at)).size();
  const std::string cut = text.substr(0, at);
  if (given.Bool(1, false)) return evaluator.String(cut + end);
  const size_t blank = cut.rfind(' ');
  return evaluator.String(cut.substr(0, blank) + end);
}

Value WordCount(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("wordcount", arguments, {});
  int64_t count = 0;
  bool inside = false;
  for (const char c : TextOf(value, evaluator)) {
    if (static_cast<uint8_t>(c) >= 0x80) Fail("wordcount of a text outside ASCII is not supported");
    const bool word = (c >= '0' && c <= '9') || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_';
    count += word && !inside;
    inside = word;
  }
  return count;
}

Value FormatFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  if (!arguments.positional.empty() && !arguments.named.empty()) Fail("format: values with and without names");
  Meter& meter = evaluator.GetMeter();
  Value values = MakeTuple(arguments.positional, meter);
  if (!arguments.named.empty()) {
    Dict dict;
    for (const auto& [name, each] : arguments.named) dict.Set(name, each);
    values = MakeDict(std::move(dict), meter);
  }
  return evaluator.String(PercentFormat(TextOf(value, evaluator), values, meter));
}

Value ToJsonFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("tojson", arguments, {"ensure_ascii", "indent", "separators", "sort_keys"});
  JsonStyle style{.ensure_ascii = given.Bool(0, false), .sort_keys = given.Bool(3, false)};
  if (given.HasValue(1)) {
    const std::string* text = given.At(1).AsText();
    const int64_t width = text != nullptr ? 0 : std::max<int64_t>(0, given.Int(1));
    evaluator.GetMeter().Bytes(width);
    style.indent = text != nullptr ? *text : std::string(static_cast<size_t>(width), ' ');
    style.item_separator = std::string(",");
  }
  if (given.HasValue(2)) {
    const std::vector<Value> separators = ItemsOf(given.At(2), evaluator);
    if (separators.size() != 2 || separators[0].AsText() == nullptr || separators[1].AsText() == nullptr)
      Fail("tojson: separators: expected two texts");
    style.item_separator = *separators[0].AsText();
    style.key_separator = *separators[1].AsText();
  }
  return Value(ToJson(value, style, evaluator.GetMeter()));
}

Value Default(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("default", arguments, {"default_value", "boolean"});
  const bool missing = value.AsUndefined() != nullptr || (given.Bool(1, false) && !Truth(value));
  return missing ? given.Or(0, evaluator.String({})) : value;
}

Value LengthFilter(const Value& value, Given arguments, Evaluator&) {
  const Parameters none("length", arguments, {});
  return Length(value);
}

Value First(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("first", arguments, {});
  if (const Sequence* sequence = value.AsSequence(); sequence != nullptr &&
                                                     sequence->form == Sequence::Form::kGenerator &&
                                                     sequence->consumed < sequence->items.size())
    return sequence->items[sequence->consumed++];
  const std::vector<Value> items = ItemsOf(value, evaluator);
  return items.empty() ? Value::MakeUndefined("the first item of an empty sequence") : items.front();
}
Value Last(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("last", arguments, {});
  if (const Sequence* sequence = value.AsSequence();
      sequence != nullptr && sequence->form == Sequence::Form::kGenerator)
    Fail("last: a {} has no last item; put `| list` before it", sequence->name);
  const std::vector<Value> items = ItemsOf(value, evaluator);
  return items.empty() ? Value::MakeUndefined("the last item of an empty sequence") : items.back();
}
Value List(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("list", arguments, {});
  return MakeList(ItemsOf(value, evaluator), evaluator.GetMeter());
}
Value Reverse(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("reverse", arguments, {});
  std::vector<Value> items = ItemsOf(value, evaluator);
  std::ranges::reverse(items);
  Meter& meter = evaluator.GetMeter();
  if (value.AsText() != nullptr) {
    std::string text;
    for (const Value& item : items) text += *item.AsText();
    return evaluator.String(std::move(text));
  }
  const Sequence* sequence = value.AsSequence();
  if (sequence != nullptr && sequence->form == Sequence::Form::kGenerator) return MakeList(std::move(items), meter);
  return MakeGenerator(std::move(items), meter, "list_reverseiterator");
}

Value ItemsFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters none("items", arguments, {});
  std::vector<Value> items;
  if (value.AsUndefined() == nullptr) {
    if (value.AsDict() == nullptr) Fail("items: expected a dict, found a value of type {}", value.TypeName());
    for (const auto& [key, each] : value.AsDict()->Entries())
      items.push_back(MakeTuple({key, each}, evaluator.GetMeter()));
  }
  return MakeGenerator(std::move(items), evaluator.GetMeter());
}

Value DictSort(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("dictsort", arguments, {"case_sensitive", "by", "reverse"});
  RequireDefined(value);
  if (value.AsDict() == nullptr) Fail("dictsort: expected a dict, found a value of type {}", value.TypeName());
  const std::string by = given.Has(1) ? given.String(1) : "key";
  if (by != "key" && by != "value") Fail("dictsort: by: expected \"key\" or \"value\", found \"{}\"", by);
  Meter& meter = evaluator.GetMeter();
  std::vector<std::pair<Value, Value>> keyed;
  for (const auto& [key, each] : value.AsDict()->Entries())
    keyed.emplace_back(IgnoreCase(by == "key" ? key : each, given.Bool(0, false)), MakeTuple({key, each}, meter));
  std::vector<Value> items;
  for (auto& [key, item] : SortedByKey(std::move(keyed), given.Bool(2, false), meter)) items.push_back(std::move(item));
  return MakeList(std::move(items), meter);
}

Value Sort(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("sort", arguments, {"reverse", "case_sensitive", "attribute"});
  Meter& meter = evaluator.GetMeter();
  std::vector<Member> members;
  if (given.HasValue(2) && given.At(2).AsText() != nullptr) {
    for (const std::string_view part : Split(*given.At(2).AsText(), ",", -1))
      members.emplace_back(Value(std::string(part)), evaluator);
  } else {
    members.emplace_back(given.Or(2, {}), evaluator);
  }
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : ItemsOf(value, evaluator)) {
    std::vector<Value> keys;
    for (const Member& member : members) keys.push_back(IgnoreCase(member(item), given.Bool(1, false)));
    keyed.emplace_back(MakeList(std::move(keys), meter), item);
  }
  std::vector<Value> items;
  for (auto& [key, item] : SortedByKey(std::move(keyed), given.Bool(0, false), meter)) items.push_back(std::move(item));
  return MakeList(std::move(items), meter);
}

Value Unique(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("unique", arguments, {"case_sensitive", "attribute"});
  const Member member(given.Or(1, {}), evaluator);
  Dict seen;
  std::vector<Value> items;
  for (const Value& item : ItemsOf(value, evaluator)) {
    const Value key = IgnoreCase(member(item), given.Bool(0, false));
    evaluator.GetMeter().Bytes(128);
    if (seen.Find(key) != nullptr) continue;
    seen.Set(key, {});
    items.push_back(item);
  }
  return MakeGenerator(std::move(items), evaluator.GetMeter());
}

Value GroupBy(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("groupby", arguments, {"attribute", "default", "case_sensitive"});
  Meter& meter = evaluator.GetMeter();
  const Member member(given.At(0), evaluator);
  std::vector<std::pair<Value, Value>> keyed;
  for (const Value& item : ItemsOf(value, evaluator))
    keyed.emplace_back(IgnoreCase(member(item, given.Or(1, {})), given.Bool(2, false)), item);
  keyed = SortedByKey(std::move(keyed), false, meter);
  std::vector<Value> groups;
  for (size_t i = 0; i < keyed.size();) {
    size_t end = i;
    std::vector<Value> items;
    for (; end < keyed.size() && Equal(keyed[end].first, keyed[i].first, meter); ++end)
      items.push_back(keyed[end].second);
    if (end == i) items.push_back(keyed[end++].second);  // a NaN
    const Value name = member(items[0], given.Or(1, {}));
    groups.push_back(MakeSequence({name, MakeList(std::move(items), meter)}, Sequence::Form::kGroup, meter));
    i = end;
  }
  return MakeList(std::move(groups), meter);
}

template <bool kMax>
Value Extreme(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given(kMax ? "max" : "min", arguments, {"case_sensitive", "attribute"});
  const Member member(given.Or(1, {}), evaluator);
  std::optional<std::pair<Value, Value>> best;
  for (const Value& item : ItemsOf(value, evaluator)) {
    Value key = IgnoreCase(member(item), given.Bool(0, false));
    Meter& meter = evaluator.GetMeter();
    if (!best || (kMax ? Less(best->first, key, ">", meter) : Less(key, best->first, "<", meter)))
      best.emplace(std::move(key), item);
  }
  return best ? best->second : Value::MakeUndefined("the sequence is empty");
}

Value Sum(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("sum", arguments, {"attribute", "start"});
  const Member member(given.Or(0, {}), evaluator);
  Value sum = given.Or(1, int64_t{0});
  if (sum.AsText() != nullptr) Fail("sum: texts are put together with `join`");
  for (const Value& item : ItemsOf(value, evaluator)) sum = evaluator.Arithmetic("+", sum, member(item));
  return sum;
}

Value Abs(const Value& value, Given arguments, Evaluator&) {
  const Parameters none("abs", arguments, {});
  RequireDefined(value);
  if (const std::optional<int64_t> integer = value.Integer()) {
    if (*integer == INT64_MIN) Fail("abs: the result does not fit in 64 bits");
    return std::abs(*integer);
  }
  if (value.AsFloat() == nullptr) Fail("abs of a value of type {}", value.TypeName());
  return std::abs(*value.AsFloat());
}

Value Round(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("round", arguments, {"precision", "method"});
  RequireDefined(value);
  const int64_t precision = given.Int(0, 0);
  const std::string method = given.Has(1) ? given.String(1) : "common";
  if (!value.Number()) Fail("round of a value of type {}", value.TypeName());
  if (std::abs(precision) > 300) Fail("round: a precision of {}", precision);
  const double number = *value.Number();
  if (method == "ceil" || method == "floor") {
    const Value scale = evaluator.Arithmetic("**", int64_t{10}, precision);
    const double scaled = *evaluator.Arithmetic("*", value, scale).Number();
    return (method == "ceil" ? std::ceil(scaled) : std::floor(scaled)) / *scale.Number();
  }
  if (method != "common") Fail("round: method: expected \"common\", \"ceil\" or \"floor\", found \"{}\"", method);
  if (precision < 0) Fail("round: a negative precision is not supported");
  if (value.Integer()) return *value.Integer();
  if (!std::isfinite(number)) return number;
  // The C library rounds the exact decimal value, halves to even, as Python does.
  char digits[800];
  std::snprintf(digits, sizeof digits, "%.*f", static_cast<int>(precision), number);
  return std::strtod(digits, nullptr);
}

// A number as Python reads it: white space around it, single underscores between digits.
std::optional<std::string> Digits(std::string_view text) {
  std::string out;
  text = Strip(text, true, true);
  for (size_t i = 0; i < text.size(); ++i) {
    const auto digit = [&](size_t at) {
      return at < text.size() && std::isalnum(static_cast<unsigned char>(text[at]));
    };
    if (text[i] != '_')
      out += text[i];
    else if (i == 0 || !digit(i - 1) || !digit(i + 1))
      return std::nullopt;
  }
  if (out.starts_with('+')) out.erase(0, 1);
  if (out.empty() || out.starts_with('+')) return std::nullopt;
  return out;
}

std::optional<double> ReadFloat(std::string_view text) {
  const std::optional<std::string> digits = Digits(text);
  if (!digits) return std::nullopt;
  const std::string lower = Lower(*digits);
  const std::string_view bare = std::string_view(lower).substr(lower.starts_with('-') ? 1 : 0);
  if (bare.empty() || bare.starts_with('+') || bare.starts_with('-') || bare.find("0x") != bare.npos ||
      bare.find("nan(") != bare.npos)
    return std::nullopt;
  double value = 0;
  const auto [end, error] = std::from_chars(lower.data(), lower.data() + lower.size(), value);
  if (end != lower.data() + lower.size()) return std::nullopt;
  if (error == std::errc::result_out_of_range) return std::strtod(lower.c_str(), nullptr);
  return error == std::errc() ? std::optional(value) : std::nullopt;
}

Value ToInt(const Value& value, Given arguments, Evaluator&) {
  const Parameters given("int", arguments, {"default", "base"});
  RequireDefined(value);
  const Value fallback = given.Or(0, int64_t{0});
  if (const std::optional<int64_t> integer = value.Integer()) return *integer;
  std::optional<double> number = value.Number();
  if (const std::string* text = value.AsText()) {
    const int64_t base = given.Int(1, 10);
    if (base < 2 || base > 36) Fail("int: base: {} is not supported", base);
    if (const std::optional<std::string> digits = Digits(*text)) {
      std::string_view bare = *digits;
      const bool negative = bare.starts_with('-');
      if (negative) bare.remove_prefix(1);
      const std::string_view prefix = base == 16 ? "0x" : base == 8 ? "0o" : base == 2 ? "0b" : "";
      if (!prefix.empty() && Lower(bare.substr(0, 2)) == prefix) bare.remove_prefix(2);
      int64_t integer = 0;
      const auto [end, error] =
          std::from_chars(bare.data(), bare.data() + bare.size(), integer, static_cast<int>(base));
      if (!bare.starts_with('-') && end == bare.data() + bare.size() && !bare.empty()) {
        if (error == std::errc::result_out_of_range) Fail("int: {} does not fit in 64 bits", *text);
        if (error == std::errc()) return negative ? -integer : integer;
      }
    }
    number = ReadFloat(*text);
  }
  if (!number || !std::isfinite(*number)) return fallback;
  if (std::abs(*number) >= 9.2e18) Fail("int: {} does not fit in 64 bits", *number);
  return static_cast<int64_t>(*number);
}

Value ToFloat(const Value& value, Given arguments, Evaluator&) {
  const Parameters given("float", arguments, {"default"});
  RequireDefined(value);
  if (const std::optional<double> number = value.Number()) return *number;
  const std::optional<double> number = value.AsText() != nullptr ? ReadFloat(*value.AsText()) : std::nullopt;
  return number ? Value(*number) : given.Or(0, 0.0);
}

Value Batch(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("batch", arguments, {"linecount", "fill_with"});
  const int64_t size = given.Int(0);
  Meter& meter = evaluator.GetMeter();
  std::vector<Value> lines, line;
  for (const Value& item : ItemsOf(value, evaluator)) {
    if (static_cast<int64_t>(line.size()) == size) lines.push_back(MakeList(std::exchange(line, {}), meter));
    line.push_back(item);
  }
  if (!line.empty()) {
    const int64_t missing = size - static_cast<int64_t>(line.size());
    if (given.HasValue(1) && missing > 0) {
      meter.Bytes(missing, sizeof(Value));
      line.insert(line.end(), static_cast<size_t>(missing), given.At(1));
    }
    lines.push_back(MakeList(std::move(line), meter));
  }
  return MakeGenerator(std::move(lines), meter);
}

Value SliceFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("slice", arguments, {"slices", "fill_with"});
  Meter& meter = evaluator.GetMeter();
  const std::vector<Value> items = ItemsOf(value, evaluator);
  const int64_t slices = given.Int(0), length = static_cast<int64_t>(items.size());
  if (slices < 1) Fail("slice: {} slices", slices);
  meter.Bytes(slices, 2 * sizeof(Value));
  std::vector<Value> parts;
  auto at = items.begin();
  for (int64_t i = 0; i < slices; ++i) {
    const int64_t count = length / slices + (i < length % slices);
    std::vector<Value> part(at, at + count);
    at += count;
    if (given.HasValue(1) && i >= length % slices) part.push_back(given.At(1));
    parts.push_back(MakeList(std::move(part), meter));
  }
  return MakeGenerator(std::move(parts), meter);
}

Value AttributeFilter(const Value& value, Given arguments, Evaluator& evaluator) {
  const Parameters given("attr", arguments, {"name"});
  if (value.AsDict() != nullptr) {
    if (std::optional<Value> method = FindMethod(value, given.String(0), evaluator.GetMeter())) return *method;
    return Value::MakeUndefined(fmt::format("a dict has no attribute \"{}\"", given.String(0)));
  }
  return evaluator.Attribute(value, given.String(0));
}

Value Map(const Value& value, Given arguments, Evaluator& evaluator) {
  Meter& meter = evaluator.GetMeter();
  std::vector<Value> items;
  if (!Truth(value)) return MakeGenerator({}, meter);
  if (arguments.positional.empty()) {
    const Parameters given("map", arguments, {"attribute", "default"});
    const Member member(given.At(0), evaluator);
    for (const Value& item : ItemsOf(value, evaluator)) items.push_back(member(item, given.Or(1, {})));
  } else {
    if (arguments.positional[0].AsText() == nullptr) Fail("map: expected the name of a filter");
    CallArguments rest{.positional = {arguments.positional.begin() + 1, arguments.positional.end()},
                       .named = arguments.named};
    for (const Value& item : ItemsOf(value, evaluator))
      items.push_back(evaluator.Filter(*arguments.positional[0].AsText(), item, rest));
  }
  return MakeGenerator(std::move(items), meter);
}

// select, reject, selectattr, rejectattr.
template <bool kWanted, bool kByMember>
Value Select(const Value& value, Given arguments, Evaluator& evaluator) {
  const std::string_view who = kByMember ? (kWanted ? "selectattr" : "rejectattr") : (kWanted ? "select" : "reject");
  Meter& meter = evaluator.GetMeter();
  std::vector<Value> items;
  if (!Truth(value)) return MakeGenerator({}, meter);
  std::vector<Value> rest = arguments.positional;
  Value attribute;
  if (kByMember) {
    if (rest.empty()) Fail("{}: expected the name of a member", who);
    attribute = rest[0];
    rest.erase(rest.begin());
  }
  const Member member(attribute, evaluator);
  std::string test;
  if (!rest.empty()) {
    if (rest[0].AsText() == nullptr) Fail("{}: expected the name of a test", who);
    test = *rest[0].AsText();
    rest.erase(rest.begin());
  }
  const CallArguments more{.positional = rest, .named = arguments.named};
  for (const Value& item : ItemsOf(value, evaluator)) {
    const Value tested = member(item);
    if ((test.empty() ? Truth(tested) : evaluator.Test(test, tested, more)) == kWanted) items.push_back(item);
  }
  return MakeGenerator(std::move(items), meter);
}

using FilterFunction = Value (*)(const Value&, Given, Evaluator&);
using Filters = std::map<std::string_view, FilterFunction>;

const Filters& AllFilters() {
  static const Filters filters{
      {"abs", Abs},
      {"attr", AttributeFilter},
      {"batch", Batch},
      {"capitalize", CapitalizeFilter},
      {"center", Center},
      {"count", LengthFilter},
      {"d", Default},
      {"default", Default},
      {"dictsort", DictSort},
      {"e", EscapeFilter},
      {"escape", EscapeFilter},
      {"first", First},
      {"float", ToFloat},
      {"forceescape", ForceEscape},
      {"format", FormatFilter},
      {"groupby", GroupBy},
      {"indent", Indent},
      {"int", ToInt},
      {"items", ItemsFilter},
      {"join", Join},
      {"last", Last},
      {"length", LengthFilter},
      {"list", List},
      {"lower", LowerFilter},
      {"map", Map},
      {"max", Extreme<true>},
      {"min", Extreme<false>},
      {"reject", Select<false, false>},
      {"rejectattr", Select<false, true>},
      {"replace", Replace},
      {"reverse", Reverse},
      {"round", Round},
      {"safe", Safe},
      {"select", Select<true, false>},
      {"selectattr", Select<true, true>},
      {"slice", SliceFilter},
      {"sort", Sort},
      {"string", ToString},
      {"sum", Sum},
      {"title", TitleCase},
      {"tojson", ToJsonFilter},
      {"trim", Trim},
      {"truncate", Truncate},
      {"unique", Unique},
      {"upper", UpperFilter},
      {"wordcount", WordCount},
  };
  return filters;
}

// jinja2 has them too.
constexpr std::string_view kOtherFilters[] = {"filesizeformat", "pprint", "random",   "striptags",
                                              "urlencode",      "urlize", "wordwrap", "xmlattr"};

bool HasIndex(const Value& value) {
  const Sequence* sequence = value.AsSequence();
  return value.AsText() != nullptr || value.AsDict() != nullptr || value.AsUndefined() != nullptr ||
         (sequence != nullptr && sequence->HasIndex());
}

bool IsBoolean(const Value& value, bool wanted) { return value.AsBool() != nullptr && *value.AsBool() == wanted; }

using TestFunction = bool (*)(const Value&);
using Tests = std::map<std::string_view, TestFunction>;

// Tests without an argument.
const Tests& PlainTests() {
  static const Tests tests{
      {"boolean", [](const Value& v) { return v.AsBool() != nullptr; }},
      {"callable", [](const Value& v) { return v.AsCallable() != nullptr || v.AsLoop() != nullptr; }},
      {"defined", [](const Value& v) { return v.AsUndefined() == nullptr; }},
      {"escaped", [](const Value& v) { return v.IsSafe(); }},
      {"false", [](const Value& v) { return IsBoolean(v, false); }},
      {"float", [](const Value& v) { return v.AsFloat() != nullptr; }},
      {"integer", [](const Value& v) { return v.AsInt() != nullptr; }},
      {"iterable", [](const Value& v) { return HasIndex(v) || v.AsSequence() != nullptr || v.AsLoop() != nullptr; }},
      {"mapping", [](const Value& v) { return v.AsDict() != nullptr; }},
      {"none", [](const Value& v) { return v.IsNone(); }},
      {"number", [](const Value& v) { return v.Number().has_value(); }},
      {"sequence", HasIndex},
      {"string", [](const Value& v) { return v.AsText() != nullptr; }},
      {"true", [](const Value& v) { return IsBoolean(v, true); }},
      {"undefined", [](const Value& v) { return v.AsUndefined() != nullptr; }},
  };
  return tests;
}

// Tests that compare, and the operator that they are.
const std::map<std::string_view, std::string_view>& Comparisons() {
  static const std::map<std::string_view, std::string_view> comparisons{
      {"==", "=="},      {"eq", "=="},         {"equalto", "=="}, {"!=", "!="}, {"ne", "!="}, {">", ">"},
      {"gt", ">"},       {"greaterthan", ">"}, {">=", ">="},      {"ge", ">="}, {"<", "<"},   {"lt", "<"},
      {"lessthan", "<"}, {"<=", "<="},         {"le", "<="},      {"in", "in"}};
  return comparisons;
}
constexpr std::string_view kOtherTests[] = {"divisibleby", "even", "filter", "lower", "odd", "sameas", "test", "upper"};

bool IsTest(std::string_view name) {
  return PlainTests().contains(name) || Comparisons().contains(name) ||
         std::ranges::find(kOtherTests, name) != std::end(kOtherTests);
}

}  // namespace

Value Evaluator::Filter(std::string_view name, const Value& value, const CallArguments& arguments) {
  meter_.Step();
  const auto found = AllFilters().find(name);
  if (found != AllFilters().end()) return found->second(value, arguments, *this);
  if (std::ranges::find(kOtherFilters, name) != std::end(kOtherFilters))
    Fail("the filter \"{}\" is not supported", name);
  Fail("no filter is called \"{}\"", name);
}

bool Evaluator::Test(std::string_view name, const Value& value, const CallArguments& arguments) {
  meter_.Step();
  if (const auto plain = PlainTests().find(name); plain != PlainTests().end()) {
    const Parameters none(name, arguments, {});
    return plain->second(value);
  }
  if (const auto comparison = Comparisons().find(name); comparison != Comparisons().end()) {
    const Parameters given(name, arguments, {"other"});
    return Compare(comparison->second, value, given.At(0));
  }
  if (name == "odd" || name == "even" || name == "divisibleby") {
    const Parameters given(name, arguments, {"num"});
    const Value divisor = name == "divisibleby" ? given.At(0) : Value(int64_t{2});
    return Equal(Arithmetic("%", value, divisor), int64_t{name == "odd"}, meter_);
  }
  if (name == "lower" || name == "upper") {
    const Value text(Str(value, meter_));
    return Truth(CallMethod(text, name == "lower" ? "islower" : "isupper", arguments, *this));
  }
  if (name == "sameas") {
    const Parameters given(name, arguments, {"other"});
    return value.Is(given.At(0));
  }
  if (name == "filter" || name == "test") {
    const Parameters none(name, arguments, {});
    const std::string* text = value.AsText();
    if (text == nullptr) return false;
    return name == "test"
               ? IsTest(*text)
               : AllFilters().contains(*text) || std::ranges::find(kOtherFilters, *text) != std::end(kOtherFilters);
  }
  Fail("no test is called \"{}\"", name);
}

}  // namespace circlet::jinja
