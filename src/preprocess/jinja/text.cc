#include "preprocess/jinja/text.h"

#include <algorithm>
#include <array>

#include "circlet/base/error.h"
#include "preprocess/jinja/case_tables.h"
#include "preprocess/utf8.h"

namespace circlet::jinja {
namespace {

bool IsAsciiLower(char c) { return c >= 'a' && c <= 'z'; }
bool IsAsciiUpper(char c) { return c >= 'A' && c <= 'Z'; }
bool IsAscii(std::string_view text) {
  return std::ranges::all_of(text, [](char c) { return static_cast<uint8_t>(c) < 0x80; });
}

template <size_t N, size_t M>
void AppendChanged(uint32_t c, const CaseRange (&ranges)[N], const CaseSpecial (&specials)[M], std::string& out) {
  for (const CaseSpecial& special : specials) {
    if (special.from != c) continue;
    for (const uint32_t to : special.to)
      if (to != 0) out += FromCodePoint(to);
    return;
  }
  const auto after = std::ranges::upper_bound(ranges, c, {}, &CaseRange::first);
  // Ranges with a stride of 2 may interleave with another one.
  for (auto range = after; range != std::begin(ranges) && after - range < 3;) {
    --range;
    if (c <= range->last && (c - range->first) % range->stride == 0) {
      out += FromCodePoint(c + range->delta);
      return;
    }
  }
  out += FromCodePoint(c);
}

// The first character in capitals, the others small.
void AppendWord(std::string_view word, std::string& out) {
  if (word.empty()) return;
  const std::string_view first = FirstCharacter(word);
  out += Upper(first);
  out += Lower(word.substr(first.size()));
}

size_t LastLength(std::string_view text) {
  size_t begin = text.size() - 1;
  while (begin > 0 && (static_cast<uint8_t>(text[begin]) & 0xc0) == 0x80) --begin;
  return text.size() - begin;
}

}  // namespace

bool IsSpace(uint32_t c) {
  return (c >= 0x09 && c <= 0x0d) || (c >= 0x1c && c <= 0x20) || c == 0x85 || c == 0xa0 || c == 0x1680 ||
         (c >= 0x2000 && c <= 0x200a) || c == 0x2028 || c == 0x2029 || c == 0x202f || c == 0x205f || c == 0x3000;
}

int64_t CharacterCount(std::string_view text) {
  return std::ranges::count_if(text, [](char c) { return (static_cast<uint8_t>(c) & 0xc0) != 0x80; });
}

std::string_view FirstCharacter(std::string_view text) { return text.substr(0, std::max<size_t>(1, Utf8Length(text))); }

std::vector<std::string_view> Characters(std::string_view text) {
  std::vector<std::string_view> characters;
  for (; !text.empty(); text.remove_prefix(characters.back().size())) characters.push_back(FirstCharacter(text));
  return characters;
}

std::string FromCodePoint(uint32_t c) {
  const auto byte = [](uint32_t value) { return static_cast<char>(value); };
  if (c < 0x80) return {byte(c)};
  if (c < 0x800) return {byte(0xc0 | c >> 6), byte(0x80 | (c & 0x3f))};
  if (c < 0x10000) return {byte(0xe0 | c >> 12), byte(0x80 | (c >> 6 & 0x3f)), byte(0x80 | (c & 0x3f))};
  return {byte(0xf0 | c >> 18), byte(0x80 | (c >> 12 & 0x3f)), byte(0x80 | (c >> 6 & 0x3f)), byte(0x80 | (c & 0x3f))};
}

std::string_view Strip(std::string_view text, bool left, bool right, const std::optional<std::string>& characters) {
  std::vector<std::string_view> listed;
  if (characters) listed = Characters(*characters);
  const auto taken = [&](std::string_view character) {
    if (!characters) return IsSpace(CodePoint(character));
    return std::ranges::find(listed, character) != listed.end();
  };
  while (left && !text.empty()) {
    const std::string_view first = FirstCharacter(text);
    if (!taken(first)) break;
    text.remove_prefix(first.size());
  }
  while (right && !text.empty()) {
    const size_t length = LastLength(text);
    if (!taken(text.substr(text.size() - length))) break;
    text.remove_suffix(length);
  }
  return text;
}

std::string Upper(std::string_view text) {
  std::string out;
  for (std::string_view c; !text.empty(); text.remove_prefix(c.size())) {
    c = FirstCharacter(text);
    if (c.size() == 1)
      out += IsAsciiLower(c[0]) ? static_cast<char>(c[0] - 32) : c[0];
    else
      AppendChanged(CodePoint(c), kUpper, kUpperSpecial, out);
  }
  return out;
}

std::string Lower(std::string_view text) {
  std::string out;
  for (std::string_view c; !text.empty(); text.remove_prefix(c.size())) {
    c = FirstCharacter(text);
    if (c.size() == 1) {
      out += IsAsciiUpper(c[0]) ? static_cast<char>(c[0] + 32) : c[0];
      continue;
    }
    // Its small form depends on the letters around it.
    if (c == "\u03a3") Fail("the small letters of a text with a Greek capital sigma are not supported");
    AppendChanged(CodePoint(c), kLower, kLowerSpecial, out);
  }
  return out;
}

std::string Capitalize(std::string_view text) {
  std::string out;
  AppendWord(text, out);
  return out;
}

std::string TitleMethod(std::string_view text) {
  if (!IsAscii(text)) Fail("title() of a text outside ASCII is not supported");
  std::string out;
  bool in_word = false;
  for (const char c : text) {
    const bool letter = IsAsciiLower(c) || IsAsciiUpper(c);
    out += in_word ? Lower({&c, 1}) : Upper({&c, 1});
    in_word = letter;
  }
  return out;
}

std::string TitleFilter(std::string_view text) {
  const auto between = [](std::string_view c) {
    return std::string_view("-({[<").find(c[0]) != std::string_view::npos || IsSpace(CodePoint(c));
  };
  std::string out;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const std::string_view c = FirstCharacter(text.substr(at));
    if (between(c)) {
      AppendWord(text.substr(begin, at - begin), out);
      out += c;
      begin = at + c.size();
    }
    at += c.size();
  }
  AppendWord(text.substr(begin), out);
  return out;
}

std::vector<std::string_view> Split(std::string_view text, const std::optional<std::string>& separator, int64_t limit) {
  std::vector<std::string_view> parts;
  if (separator) {
    if (separator->empty()) Fail("split: an empty separator");
    for (; limit != 0; --limit) {
      const size_t at = text.find(*separator);
      if (at == text.npos) break;
      parts.push_back(text.substr(0, at));
      text.remove_prefix(at + separator->size());
    }
    parts.push_back(text);
    return parts;
  }
  for (text = Strip(text, true, false); !text.empty(); --limit) {
    size_t end = 0;
    while (limit != 0 && end < text.size()) {
      const std::string_view c = FirstCharacter(text.substr(end));
      if (IsSpace(CodePoint(c))) break;
      end += c.size();
    }
    if (limit == 0) {
      parts.push_back(text);
      break;
    }
    parts.push_back(text.substr(0, end));
    text = Strip(text.substr(end), true, false);
  }
  return parts;
}

std::vector<std::string_view> SplitRight(std::string_view text, const std::optional<std::string>& separator,
                                         int64_t limit) {
  std::vector<std::string_view> parts;
  if (separator) {
    if (separator->empty()) Fail("rsplit: an empty separator");
    for (; limit != 0; --limit) {
      const size_t at = text.rfind(*separator);
      if (at == text.npos) break;
      parts.push_back(text.substr(at + separator->size()));
      text = text.substr(0, at);
    }
    parts.push_back(text);
  } else {
    for (text = Strip(text, false, true); !text.empty(); --limit) {
      size_t begin = text.size();
      while (limit != 0 && begin > 0) {
        const size_t length = LastLength(text.substr(0, begin));
        if (IsSpace(CodePoint(text.substr(begin - length, length)))) break;
        begin -= length;
      }
      if (limit == 0) begin = 0;
      parts.push_back(text.substr(begin));
      if (limit == 0) break;
      text = Strip(text.substr(0, begin), false, true);
    }
  }
  std::ranges::reverse(parts);
  return parts;
}

std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends) {
  std::vector<std::string_view> lines;
  size_t begin = 0;
  for (size_t at = 0; at < text.size();) {
    const std::string_view character = FirstCharacter(text.substr(at));
    const uint32_t c = CodePoint(character);
    size_t end = at + character.size();
    if ((c >= 0x0a && c <= 0x0d) || (c >= 0x1c && c <= 0x1e) || c == 0x85 || c == 0x2028 || c == 0x2029) {
      if (c == '\r' && end < text.size() && text[end] == '\n') ++end;
      lines.push_back(text.substr(begin, (keep_ends ? end : at) - begin));
      begin = end;
    }
    at = end;
  }
  if (begin < text.size()) lines.push_back(text.substr(begin));
  return lines;
}

std::string Escape(std::string_view text) {
  std::string out;
  for (const char c : text) {
    switch (c) {
      case '&':
        out += "&amp;";
        break;
      case '<':
        out += "&lt;";
        break;
      case '>':
        out += "&gt;";
        break;
      case '\'':
        out += "&#39;";
        break;
      case '"':
        out += "&#34;";
        break;
      default:
        out += c;
    }
  }
  return out;
}

}  // namespace circlet::jinja
