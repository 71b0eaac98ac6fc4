// Text of values by a format: `"%s" % x` and "{}".format(x).

#include <algorithm>
#include <charconv>
#include <cmath>
#include <cstdio>

#include "circlet/base/error.h"
#include "preprocess/jinja/evaluator.h"
#include "preprocess/jinja/text.h"

namespace circlet::jinja {
namespace {

constexpr int64_t kWidthLimit = 10'000;

// [[fill]align][sign][#][0][width][,][.precision][type]
struct Spec {
  std::string fill = " ";
  char align = '\0', sign = '-', type = '\0', grouping = '\0';
  bool alternate = false, zero = false;
  int64_t width = 0;
  std::optional<int64_t> precision;
};

bool IsOneOf(char c, std::string_view set) { return c != '\0' && set.find(c) != set.npos; }

int64_t TakeNumber(std::string_view text, size_t& at) {
  int64_t value = 0;
  for (; at < text.size() && text[at] >= '0' && text[at] <= '9'; ++at) {
    value = value * 10 + (text[at] - '0');
    if (value > kWidthLimit) Fail("format: a width or precision above {}", kWidthLimit);
  }
  return value;
}

std::string Pad(std::string text, const Spec& spec, char natural) {
  const int64_t missing = spec.width - CharacterCount(text);
  if (missing <= 0) return text;
  const char align = spec.align != '\0' ? spec.align : natural;
  const auto fill = [&](int64_t count) {
    std::string out;
    for (int64_t i = 0; i < count; ++i) out += spec.fill;
    return out;
  };
  if (align == '<') return text + fill(missing);
  if (align == '^') return fill(missing / 2) + text + fill(missing - missing / 2);
  if (align == '=') {
    const size_t sign = !text.empty() && IsOneOf(text[0], "+- ") ? 1 : 0;
    return text.substr(0, sign) + fill(missing) + text.substr(sign);
  }
  return fill(missing) + text;
}

std::string Grouped(const std::string& digits, char separator) {
  const size_t end = std::min(digits.find_first_not_of("0123456789"), digits.size());
  std::string out;
  for (size_t i = 0; i < end; ++i) {
    if (i > 0 && (end - i) % 3 == 0) out += separator;
    out += digits[i];
  }
  return out + digits.substr(end);
}

std::string Signed(bool negative, const std::string& digits, const Spec& spec) {
  const std::string sign = negative ? "-" : spec.sign == '+' ? "+" : spec.sign == ' ' ? " " : "";
  return sign + (spec.grouping != '\0' ? Grouped(digits, spec.grouping) : digits);
}

std::string IntegerText(int64_t value, const Spec& spec) {
  const uint64_t magnitude = value < 0 ? 0 - static_cast<uint64_t>(value) : static_cast<uint64_t>(value);
  std::string digits;
  switch (spec.type) {
    case 'x':
      digits = fmt::format("{}{:x}", spec.alternate ? "0x" : "", magnitude);
      break;
    case 'X':
      digits = fmt::format("{}{:X}", spec.alternate ? "0X" : "", magnitude);
      break;
    case 'o':
      digits = fmt::format("{}{:o}", spec.alternate ? "0o" : "", magnitude);
      break;
    case 'b':
      digits = fmt::format("{}{:b}", spec.alternate ? "0b" : "", magnitude);
      break;
    default:
      digits = fmt::format("{}", magnitude);
  }
  return Signed(value < 0, digits, spec);
}

// `type`: one of "eEfFgG%".
std::string FloatDigits(double value, char type, int64_t precision, const Spec& spec) {
  if (std::isnan(value) || std::isinf(value)) {
    const std::string text = std::isnan(value) ? "nan" : "inf";
    return Signed(std::signbit(value) && !std::isnan(value), IsOneOf(type, "EFG") ? Upper(text) : text, spec);
  }
  const double shown = type == '%' ? value * 100 : value;
  const char format[] = {'%', '.', '*', type == '%' ? 'f' : type, '\0'};
  std::string digits(static_cast<size_t>(precision) + 400, '\0');
  digits.resize(static_cast<size_t>(
      std::snprintf(digits.data(), digits.size(), format, static_cast<int>(precision), std::abs(shown))));
  if (type == '%') digits += '%';
  return Signed(std::signbit(value), digits, spec);
}

std::string FloatText(double value, const Spec& spec) {
  if (spec.type != '\0') return FloatDigits(value, spec.type, spec.precision.value_or(6), spec);
  if (spec.precision) Fail("format: a precision without a type is not supported");
  return Signed(std::signbit(value) && !std::isnan(value), jinja::FloatText(std::abs(value)), spec);
}

Spec ParseSpec(std::string_view text) {
  Spec spec;
  size_t at = 0;
  if (!text.empty()) {
    const std::string_view first = FirstCharacter(text);
    if (first.size() < text.size() && IsOneOf(text[first.size()], "<>^=")) {
      spec.fill = first;
      spec.align = text[first.size()];
      at = first.size() + 1;
    } else if (IsOneOf(text[0], "<>^=")) {
      spec.align = text[at++];
    }
  }
  const auto take = [&](std::string_view set) {
    return at < text.size() && IsOneOf(text[at], set) ? text[at++] : '\0';
  };
  if (const char sign = take("+- ")) spec.sign = sign;
  spec.alternate = take("#") != '\0';
  if (take("0") != '\0') {
    spec.zero = true;
    if (spec.align == '\0') {
      spec.fill = "0";
      spec.align = '=';
    }
  }
  spec.width = TakeNumber(text, at);
  spec.grouping = take(",_");
  if (take(".") != '\0') spec.precision = TakeNumber(text, at);
  spec.type = take("sdnboxXeEfFgG%c");
  if (at != text.size() || IsOneOf(spec.type, "nc")) Fail("format: the specification \"{}\" is not supported", text);
  return spec;
}

std::string FormatValue(const Value& value, std::string_view text, Meter& meter) {
  if (text.empty()) return Str(value, meter);
  const Spec spec = ParseSpec(text);
  const bool is_bool = value.AsBool() != nullptr && spec.type == '\0';
  if (const std::optional<int64_t> integer = value.Integer(); integer && !is_bool) {
    if (IsOneOf(spec.type, "eEfFgG%")) return Pad(FloatText(static_cast<double>(*integer), spec), spec, '>');
    if (spec.type == 's' || spec.precision) Fail("format: \"{}\" does not go with an int", text);
    return Pad(IntegerText(*integer, spec), spec, '>');
  }
  if (const double* number = value.AsFloat()) {
    if (spec.type != '\0' && !IsOneOf(spec.type, "eEfFgG%")) Fail("format: \"{}\" does not go with a float", text);
    return Pad(FloatText(*number, spec), spec, '>');
  }
  if (value.AsText() == nullptr && !is_bool)
    Fail("format: \"{}\" does not go with a value of type {}", text, value.TypeName());
  if (spec.type != '\0' && spec.type != 's') Fail("format: \"{}\" does not go with a {}", text, value.TypeName());
  if (spec.align == '=') Fail("format: \"{}\" does not go with a text", text);
  std::string shown = Str(value, meter);
  if (spec.precision) {
    std::string_view rest = shown;
    for (int64_t i = 0; i < *spec.precision && !rest.empty(); ++i) rest.remove_prefix(FirstCharacter(rest).size());
    shown.resize(shown.size() - rest.size());
  }
  return Pad(std::move(shown), spec, '<');
}

// One "%..." of a format; `at` stands behind the "%".
class PercentField {
 public:
  PercentField(const std::string& format, size_t& at) {
    if (at < format.size() && format[at] == '(') {
      const size_t end = format.find(')', at);
      if (end == format.npos) Fail("%: the name of a value has no \")\"");
      name = format.substr(at + 1, end - at - 1);
      at = end + 1;
    }
    for (; at < format.size() && IsOneOf(format[at], "#0- +"); ++at) {
      const char flag = format[at];
      if (flag == '#') spec.alternate = true;
      if (flag == '0') spec.zero = true;
      if (flag == '-') spec.align = '<';
      if (flag == '+' || (flag == ' ' && spec.sign != '+')) spec.sign = flag;
    }
    spec.width = TakeNumber(format, at);
    if (at < format.size() && format[at] == '.') spec.precision = TakeNumber(format, ++at);
    if (at == format.size()) Fail("%: the format ends inside a field");
    spec.type = format[at++];
  }

  std::string Text(const Value& value, Meter& meter) {
    const char type = spec.type;
    if (type == 's' || type == 'r') {
      std::string text = type == 's' ? Str(value, meter) : Repr(value, meter);
      if (spec.precision && CharacterCount(text) > *spec.precision) Fail("%: a precision of texts is not supported");
      return Pad(std::move(text), spec, '>');
    }
    RequireDefined(value);
    if (spec.zero && spec.align == '\0') {
      spec.fill = "0";
      spec.align = '=';
    }
    const std::optional<double> number = value.Number();
    if (IsOneOf(type, "diuxXo") && number) {
      if (value.AsFloat() != nullptr && (!IsOneOf(type, "diu") || !(std::abs(*number) < 9e18)))
        Fail("%{}: {} is no integer", type, *number);
      if (spec.precision) Fail("%: a precision of integers is not supported");
      return Pad(IntegerText(value.Integer().value_or(static_cast<int64_t>(*number)), spec), spec, '>');
    }
    if (IsOneOf(type, "eEfFgG") && number) return Pad(FloatText(*number, spec), spec, '>');
    Fail("\"%{}\" does not go with a value of type {}", type, value.TypeName());
  }

  std::optional<std::string> name;
  Spec spec;
};

}  // namespace

std::string PercentFormat(const std::string& format, const Value& values, Meter& meter) {
  const Sequence* tuple = values.AsSequence();
  if (tuple != nullptr && !tuple->IsTuple()) tuple = nullptr;
  size_t used = 0;
  std::string out;
  const auto next = [&]() -> Value {
    const size_t index = used++;
    if (tuple == nullptr && index == 0) return values;
    if (tuple == nullptr || index >= tuple->items.size()) Fail("%: more fields than values in \"{}\"", format);
    return tuple->items[index];
  };
  for (size_t at = 0; at < format.size();) {
    const size_t percent = std::min(format.find('%', at), format.size());
    out.append(format, at, percent - at);
    if (percent == format.size()) break;
    at = percent + 1;
    PercentField field(format, at);
    meter.Bytes(static_cast<int64_t>(field.spec.width) + 1);
    if (field.spec.type == '%') {
      out += '%';
      continue;
    }
    if (!field.name) {
      out += field.Text(next(), meter);
      continue;
    }
    const Dict* dict = values.AsDict();
    if (dict == nullptr) Fail("%({}): the values are no dict", *field.name);
    const Value* value = dict->Find(*field.name);
    if (value == nullptr) Fail("%({}): the dict has no such key", *field.name);
    out += field.Text(*value, meter);
    used = 1;
  }
  const bool all = tuple != nullptr ? used == tuple->items.size()
                                    : used > 0 || values.AsDict() != nullptr || values.AsSequence() != nullptr;
  if (!all) Fail("%: more values than fields in \"{}\"", format);
  return out;
}

std::string BraceFormat(const std::string& format, const CallArguments& arguments, Evaluator& evaluator) {
  Meter& meter = evaluator.GetMeter();
  std::string out;
  int64_t automatic = 0;
  const auto argument = [&](std::string_view name) -> Value {
    int64_t index = 0;
    const auto [end, error] = std::from_chars(name.data(), name.data() + name.size(), index);
    if (name.empty()) index = automatic++;
    if (name.empty() || (error == std::errc() && end == name.data() + name.size())) {
      if (index < 0 || index >= static_cast<int64_t>(arguments.positional.size()))
        Fail("format: no argument {}", index);
      return arguments.positional[static_cast<size_t>(index)];
    }
    const auto found = std::ranges::find(arguments.named, name, &std::pair<std::string, Value>::first);
    if (found == arguments.named.end()) Fail("format: no argument is called \"{}\"", name);
    return found->second;
  };
  const auto field = [&](std::string_view text) {
    const size_t colon = std::min(text.find(':'), text.size());
    std::string_view name = text.substr(0, colon);
    const std::string_view spec = text.substr(std::min(colon + 1, text.size()));
    if (spec.find('{') != spec.npos) Fail("format: a field inside a field is not supported");
    char conversion = '\0';
    if (const size_t mark = name.find('!'); mark != name.npos) {
      if (mark + 2 != name.size() || !IsOneOf(name[mark + 1], "sr")) Fail("format: \"{}\" is not supported", name);
      conversion = name[mark + 1];
      name = name.substr(0, mark);
    }
    const size_t end = std::min(name.find_first_of(".["), name.size());
    Value value = argument(name.substr(0, end));
    for (std::string_view rest = name.substr(end); !rest.empty();) {
      const bool member = rest[0] == '.';
      const size_t close = member ? std::min(rest.find_first_of(".[", 1), rest.size()) : rest.find(']');
      if (close == rest.npos) Fail("format: \"{}\" has no \"]\"", name);
      const std::string key(rest.substr(1, close - 1));
      int64_t index = 0;
      const auto number = std::from_chars(key.data(), key.data() + key.size(), index);
      if (member)
        value = evaluator.Attribute(value, key);
      else if (number.ec == std::errc() && number.ptr == key.data() + key.size())
        value = evaluator.Item(value, index);
      else
        value = evaluator.Item(value, Value(key));
      rest.remove_prefix(close + (member ? 0 : 1));
    }
    if (conversion != '\0') value = Value(conversion == 's' ? Str(value, meter) : Repr(value, meter));
    return FormatValue(value, spec, meter);
  };
  for (size_t at = 0; at < format.size();) {
    const char c = format[at];
    if (c != '{' && c != '}') {
      out += c;
      ++at;
    } else if (at + 1 < format.size() && format[at + 1] == c) {
      out += c;
      at += 2;
    } else {
      const size_t end = c == '{' ? format.find('}', at) : format.npos;
      if (end == format.npos) Fail("format: a single \"{}\" in \"{}\"", c, format);
      const std::string shown = field(std::string_view(format).substr(at + 1, end - at - 1));
      meter.Bytes(static_cast<int64_t>(shown.size()));
      out += shown;
      at = end + 1;
    }
  }
  return out;
}

}  // namespace circlet::jinja
