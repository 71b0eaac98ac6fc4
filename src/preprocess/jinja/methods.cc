#include <algorithm>
#include <array>
#include <map>

#include "circlet/base/error.h"
#include "preprocess/jinja/evaluator.h"
#include "preprocess/jinja/text.h"

namespace circlet::jinja {
namespace {

constexpr std::string_view kTextMethods[] = {
    "capitalize",   "center",       "count",   "endswith",   "find",    "format",  "index",
    "isalnum",      "isalpha",      "isdigit", "islower",    "isspace", "isupper", "join",
    "ljust",        "lower",        "lstrip",  "partition",  "replace", "rfind",   "rindex",
    "removeprefix", "removesuffix", "rjust",   "rpartition", "rsplit",  "rstrip",  "split",
    "splitlines",   "startswith",   "strip",   "title",      "upper",   "zfill"};
constexpr std::string_view kOtherTextMethods[] = {"casefold",  "encode",       "expandtabs", "format_map",  "isascii",
                                                  "isdecimal", "isidentifier", "isnumeric",  "isprintable", "istitle",
                                                  "maketrans", "swapcase",     "translate"};
constexpr std::string_view kDictMethods[] = {"copy", "get", "items", "keys", "values"};
constexpr std::string_view kOtherDictMethods[] = {"fromkeys"};
constexpr std::string_view kChangingDictMethods[] = {"clear", "pop", "popitem", "setdefault", "update"};
constexpr std::string_view kListMethods[] = {"copy", "count", "index"};
constexpr std::string_view kChangingListMethods[] = {"append", "clear",  "extend",  "insert",
                                                     "pop",    "remove", "reverse", "sort"};
constexpr std::string_view kTupleMethods[] = {"count", "index"};
constexpr std::string_view kOtherNumberMembers[] = {
    "as_integer_ratio", "bit_count", "bit_length", "conjugate", "denominator", "fromhex", "from_bytes", "hex", "imag",
    "is_integer",       "numerator", "real",       "to_bytes"};

template <size_t N>
bool In(const std::string_view (&names)[N], std::string_view name) {
  return std::ranges::find(names, name) != std::end(names);
}

bool Holds(std::string_view text, bool (*test)(char)) {
  for (const char c : text) {
    if (static_cast<uint8_t>(c) >= 0x80) Fail("this question about a text outside ASCII is not supported");
    if (!test(c)) return false;
  }
  return !text.empty();
}
bool IsLower(char c) { return c >= 'a' && c <= 'z'; }
bool IsUpper(char c) { return c >= 'A' && c <= 'Z'; }
bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsAlpha(char c) { return IsLower(c) || IsUpper(c); }
bool IsAlnum(char c) { return IsAlpha(c) || IsDigit(c); }

Value TextParts(const std::vector<std::string_view>& parts, Evaluator& evaluator) {
  std::vector<Value> values;
  for (const std::string_view part : parts) values.push_back(evaluator.String(std::string(part)));
  return MakeList(std::move(values), evaluator.GetMeter());
}

// The part of the text that `start` and `end` ask for, as byte positions.
std::pair<size_t, size_t> Window(std::string_view text, const Parameters& given) {
  if (!given.HasValue(1) && !given.HasValue(2)) return {0, text.size()};
  const int64_t length = CharacterCount(text);
  const auto byte = [&](std::optional<int64_t> position, int64_t fallback) {
    int64_t count = position.value_or(fallback);
    if (count < 0) count = std::max<int64_t>(0, count + length);
    size_t at = 0;
    for (; count > 0 && at < text.size(); --count) at += FirstCharacter(text.substr(at)).size();
    return count > 0 ? text.size() + 1 : at;
  };
  return {byte(given.OptionalInt(1), 0), std::min(byte(given.OptionalInt(2), length), text.size())};
}

bool MatchesEnd(const std::string& text, const Parameters& given, bool at_start) {
  const auto [begin, end] = Window(text, given);
  if (begin > end) return false;
  const std::string_view part = std::string_view(text).substr(begin, end - begin);
  const auto matches = [&](const Value& value) {
    const std::string* affix = value.AsText();
    if (affix == nullptr) {
      RequireDefined(value);
      Fail("{}: expected a text, found a value of type {}", at_start ? "startswith" : "endswith", value.TypeName());
    }
    return at_start ? part.starts_with(*affix) : part.ends_with(*affix);
  };
  const Sequence* several = given.At(0).AsSequence();
  if (several != nullptr && several->IsTuple()) return std::ranges::any_of(several->items, matches);
  return matches(given.At(0));
}

Value Search(const std::string& text, std::string_view name, const CallArguments& arguments) {
  const Parameters given(name, arguments, {"sub", "start", "end"});
  const std::string& part = given.String(0);
  const auto [begin, end] = Window(text, given);
  const std::string_view window = begin > end ? std::string_view() : std::string_view(text).substr(begin, end - begin);
  if (name == "count") {
    if (begin > end) return int64_t{0};
    if (part.empty()) return CharacterCount(window) + 1;
    int64_t count = 0;
    for (size_t at = window.find(part); at != window.npos; at = window.find(part, at + part.size())) ++count;
    return count;
  }
  const bool last = name.starts_with('r');
  const size_t at = begin > end ? window.npos : last ? window.rfind(part) : window.find(part);
  if (at != window.npos) return CharacterCount(std::string_view(text).substr(0, begin + at));
  if (name.ends_with("index")) Fail("{}: the text does not hold \"{}\"", name, part);
  return int64_t{-1};
}

Value Justify(const std::string& text, std::string_view name, const CallArguments& arguments, Evaluator& evaluator) {
  const Parameters given(name, arguments, {"width", "fillchar"});
  const std::string fill = given.Has(1) ? given.String(1) : " ";
  if (CharacterCount(fill) != 1) Fail("{}: \"{}\" is not one character", name, fill);
  const int64_t missing = std::max<int64_t>(0, given.Int(0) - CharacterCount(text));
  evaluator.GetMeter().Bytes(missing, static_cast<int64_t>(fill.size()));
  int64_t left = name == "rjust" ? missing : 0;
  if (name == "center") left = missing / 2 + (missing & given.Int(0) & 1);
  std::string out;
  for (int64_t i = 0; i < left; ++i) out += fill;
  out += text;
  for (int64_t i = left; i < missing; ++i) out += fill;
  return evaluator.String(std::move(out));
}

Value ZeroFill(const std::string& text, const CallArguments& arguments, Evaluator& evaluator) {
  const Parameters given("zfill", arguments, {"width"});
  const int64_t missing = std::max<int64_t>(0, given.Int(0) - CharacterCount(text));
  evaluator.GetMeter().Bytes(missing, 1);
  const size_t sign = text.starts_with('-') || text.starts_with('+') ? 1 : 0;
  return evaluator.String(text.substr(0, sign) + std::string(static_cast<size_t>(missing), '0') + text.substr(sign));
}

Value Partition(const std::string& text, std::string_view name, const CallArguments& arguments, Evaluator& evaluator) {
  const Parameters given(name, arguments, {"sep"});
  const std::string& separator = given.String(0);
  if (separator.empty()) Fail("{}: an empty separator", name);
  const bool last = name == "rpartition";
  const size_t at = last ? text.rfind(separator) : text.find(separator);
  std::array<std::string, 3> parts{last ? "" : text, "", last ? text : ""};
  if (at != text.npos) parts = {text.substr(0, at), separator, text.substr(at + separator.size())};
  std::vector<Value> values;
  for (std::string& part : parts) values.push_back(evaluator.String(std::move(part)));
  return MakeTuple(std::move(values), evaluator.GetMeter());
}

Value Splitting(const std::string& text, std::string_view name, const CallArguments& arguments, Evaluator& evaluator) {
  evaluator.GetMeter().Bytes(static_cast<int64_t>(text.size()), 2);
  if (name == "splitlines") {
    const Parameters given(name, arguments, {"keepends"});
    return TextParts(SplitLines(text, given.Bool(0, false)), evaluator);
  }
  const Parameters given(name, arguments, {"sep", "maxsplit"});
  const auto split = name == "split" ? Split : SplitRight;
  return TextParts(split(text, given.OptionalString(0), given.Int(1, -1)), evaluator);
}

bool Asked(const std::string& text, std::string_view name) {
  if (name == "isalnum") return Holds(text, IsAlnum);
  if (name == "isalpha") return Holds(text, IsAlpha);
  if (name == "isdigit") return Holds(text, IsDigit);
  if (name == "isspace") return !text.empty() && Strip(text, true, false).empty();
  const bool any = !text.empty() && (Holds(text, [](char) { return true; }), std::ranges::any_of(text, IsAlpha));
  return any && std::ranges::none_of(text, name == "islower" ? IsUpper : IsLower);
}

Value JoinItems(const std::string& separator, const CallArguments& arguments, Evaluator& evaluator) {
  const Parameters given("join", arguments, {"iterable"});
  RequireDefined(given.At(0));
  std::string out;
  bool first = true;
  for (const Value& item : Items(given.At(0), evaluator.GetMeter())) {
    const std::string* part = item.AsText();
    if (part == nullptr) Fail("join: expected texts, found a value of type {}", item.TypeName());
    evaluator.GetMeter().Bytes(static_cast<int64_t>(part->size() + separator.size()));
    if (!first) out += separator;
    out += *part;
    first = false;
  }
  return evaluator.String(std::move(out));
}

Value CallTextMethod(const Value& self, std::string_view name, const CallArguments& arguments, Evaluator& evaluator) {
  if (self.IsSafe()) Fail("methods of a text that is marked safe are not supported (\"{}\")", name);
  const std::string& text = *self.AsText();
  evaluator.GetMeter().Step(1 + static_cast<int64_t>(text.size() / 64));
  const auto plain = [&](auto change) {
    const Parameters none(name, arguments, {});
    return evaluator.String(std::string(change(text)));
  };
  if (name == "upper") return plain(Upper);
  if (name == "lower") return plain(Lower);
  if (name == "capitalize") return plain(Capitalize);
  if (name == "title") return plain(TitleMethod);
  if (name.ends_with("strip")) {
    const Parameters given(name, arguments, {"chars"});
    return evaluator.String(std::string(Strip(text, name != "rstrip", name != "lstrip", given.OptionalString(0))));
  }
  if (name == "split" || name == "rsplit" || name == "splitlines") return Splitting(text, name, arguments, evaluator);
  if (name == "startswith" || name == "endswith")
    return MatchesEnd(text, Parameters(name, arguments, {"affix", "start", "end"}), name == "startswith");
  if (name == "removeprefix" || name == "removesuffix") {
    const Parameters given(name, arguments, {"affix"});
    const std::string& affix = given.String(0);
    if (name == "removeprefix" ? !text.starts_with(affix) : !text.ends_with(affix)) return self;
    return evaluator.String(text.substr(name == "removeprefix" ? affix.size() : 0, text.size() - affix.size()));
  }
  if (name == "find" || name == "rfind" || name == "index" || name == "rindex" || name == "count")
    return Search(text, name, arguments);
  if (name == "replace") {
    const Parameters given(name, arguments, {"old", "new", "count"});
    given.String(0);
    given.String(1);
    return evaluator.Filter("replace", self, arguments);
  }
  if (name == "join") return JoinItems(text, arguments, evaluator);
  if (name == "format") return evaluator.String(BraceFormat(text, arguments, evaluator));
  if (name == "center" || name == "ljust" || name == "rjust") return Justify(text, name, arguments, evaluator);
  if (name == "zfill") return ZeroFill(text, arguments, evaluator);
  if (name == "partition" || name == "rpartition") return Partition(text, name, arguments, evaluator);
  const Parameters none(name, arguments, {});
  return Asked(text, name);
}

Value CallDictMethod(const Value& self, std::string_view name, const CallArguments& arguments, Evaluator& evaluator) {
  const Dict& dict = *self.AsDict();
  Meter& meter = evaluator.GetMeter();
  if (name == "get") {
    const Parameters given(name, arguments, {"key", "default"});
    const Value* value = given.At(0).AsUndefined() == nullptr ? dict.Find(given.At(0)) : nullptr;
    return value != nullptr ? *value : given.Or(1, {});
  }
  const Parameters none(name, arguments, {});
  if (name == "copy") return self;
  std::vector<Value> items;
  for (const auto& [key, value] : dict.Entries())
    items.push_back(name == "keys" ? key : name == "values" ? value : MakeTuple({key, value}, meter));
  const std::string_view type = name == "keys" ? "dict_keys" : name == "values" ? "dict_values" : "dict_items";
  return MakeSequence(std::move(items), Sequence::Form::kView, meter, type);
}

Value CallListMethod(const Value& self, std::string_view name, const CallArguments& arguments, Evaluator& evaluator) {
  const std::vector<Value>& items = self.AsSequence()->items;
  if (name == "copy") return self;
  const Parameters given(name, arguments, {"value"});
  int64_t count = 0;
  for (size_t i = 0; i < items.size(); ++i) {
    if (!Equal(items[i], given.At(0), evaluator.GetMeter())) continue;
    if (name == "index") return static_cast<int64_t>(i);
    ++count;
  }
  if (name == "index") Fail("index: the list does not hold the value");
  return count;
}

}  // namespace

std::optional<Value> FindMethod(const Value& self, std::string_view name, Meter& meter) {
  bool found = false, other = false, changes = false;
  const Sequence* sequence = self.AsSequence();
  if (self.AsText() != nullptr) {
    found = In(kTextMethods, name);
    other = In(kOtherTextMethods, name);
  } else if (self.AsDict() != nullptr) {
    found = In(kDictMethods, name);
    other = In(kOtherDictMethods, name);
    changes = In(kChangingDictMethods, name);
  } else if (sequence != nullptr && sequence->form == Sequence::Form::kList) {
    found = In(kListMethods, name);
    changes = In(kChangingListMethods, name);
  } else if (sequence != nullptr && sequence->HasIndex()) {
    found = In(kTupleMethods, name);
  } else if (self.Number()) {
    other = In(kOtherNumberMembers, name);
  }
  if (other) Fail("the member \"{}\" of {} is not supported", name, self.TypeName());
  if (changes) {
    return Value::MakeUndefined(
        fmt::format("\"{}\" would change a {}, which a chat template must not", name, self.TypeName()));
  }
  if (!found) return std::nullopt;
  meter.Bytes(128);
  return Value(std::make_shared<const Callable>(
      Callable{.kind = Callable::Kind::kMethod, .name = std::string(name), .self = self, .depth = self.Depth() + 1}));
}

Value CallMethod(const Value& self, std::string_view name, const CallArguments& arguments, Evaluator& evaluator) {
  if (Loop* loop = self.AsLoop()) {
    if (!arguments.named.empty()) Fail("loop.{}: no argument is called \"{}\"", name, arguments.named[0].first);
    if (name == "cycle") {
      if (arguments.positional.empty()) Fail("loop.cycle: no values");
      return arguments.positional[static_cast<size_t>(loop->index0) % arguments.positional.size()];
    }
    if (!loop->runs) Fail("loop.changed: the loop has ended");
    const auto equal = [&](const Value& a, const Value& b) { return Equal(a, b, evaluator.GetMeter()); };
    if (loop->changed && std::ranges::equal(*loop->changed, arguments.positional, equal)) return false;
    loop->changed = arguments.positional;
    return true;
  }
  if (self.AsText() != nullptr) return CallTextMethod(self, name, arguments, evaluator);
  if (self.AsDict() != nullptr) return CallDictMethod(self, name, arguments, evaluator);
  return CallListMethod(self, name, arguments, evaluator);
}

}  // namespace circlet::jinja
