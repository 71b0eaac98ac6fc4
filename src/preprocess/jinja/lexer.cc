#include <algorithm>
#include <array>
#include <optional>

#include "circlet/base/error.h"
#include "preprocess/jinja/syntax.h"
#include "preprocess/jinja/text.h"
#include "preprocess/utf8.h"

namespace circlet::jinja {
namespace {

bool IsDigit(char c) { return c >= '0' && c <= '9'; }
bool IsNameCharacter(char c) { return IsDigit(c) || (c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || c == '_'; }

// "\r\n" and "\r" become "\n"; one newline at the end of the file goes.
std::string WithUnixNewlines(std::string_view text) {
  std::string out;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] != '\r')
      out += text[i];
    else if (i + 1 == text.size() || text[i + 1] != '\n')
      out += '\n';
  }
  if (out.ends_with('\n')) out.pop_back();
  return out;
}

class Lexer {
 public:
  Lexer(std::string_view text, std::string_view file) : source_(WithUnixNewlines(text)), file_(file) {}

  std::vector<Token> Run() {
    if (FirstNonUtf8(source_) != source_.npos) Fail("{}: the template is not UTF-8", file_);
    while (at_ < source_.size()) Data();
    Add(TokenKind::kEnd, {});
    return std::move(tokens_);
  }

 private:
  [[noreturn]] void FailHere(std::string_view what) const { Fail("{}:{}: {}", file_, line_, what); }
  std::string_view Rest() const { return std::string_view(source_).substr(at_); }
  char Next(size_t ahead = 0) const { return at_ + ahead < source_.size() ? source_[at_ + ahead] : '\0'; }
  void Add(TokenKind kind, std::string text) { tokens_.push_back({kind, std::move(text), line_}); }
  void Advance(size_t count) {
    line_ += static_cast<int>(std::ranges::count(Rest().substr(0, count), '\n'));
    at_ += count;
  }
  bool Take(std::string_view text) {
    if (!Rest().starts_with(text)) return false;
    Advance(text.size());
    return true;
  }
  void SkipSpace() { Advance(Rest().size() - Strip(Rest(), true, false).size()); }
  char TakeSign() {
    const char sign = Next();
    if (sign != '-' && sign != '+') return '\0';
    Advance(1);
    return sign;
  }
  // Behind the end of a tag, whose sign it is: "-" takes all white space away, "+" none, else a newline goes if `trim`.
  void EndTag(char sign, bool trim) {
    const size_t before = at_;
    if (sign == '-')
      SkipSpace();
    else if (sign != '+' && trim)
      Take("\n");
    line_starts_ = at_ > before && source_[at_ - 1] == '\n';
  }

  // Text up to a tag, and the tag.
  void Data() {
    size_t end = source_.find('{', at_);
    while (end != source_.npos &&
           (end + 1 == source_.size() || std::string_view("{%#").find(source_[end + 1]) == std::string_view::npos))
      end = source_.find('{', end + 1);
    if (end == source_.npos) {
      AddData(Rest());
      at_ = source_.size();
      return;
    }
    const std::string_view text = Rest().substr(0, end - at_);
    const char opener = source_[end + 1];
    const char sign = end + 2 < source_.size() ? source_[end + 2] : '\0';
    AddData(Stripped(text, sign, opener != '{'));
    Advance(text.size() + 2);
    TakeSign();
    if (opener == '#')
      Comment();
    else if (opener == '{')
      Inside(TokenKind::kOutputBegin, TokenKind::kOutputEnd, "}}");
    else if (!Raw())
      Inside(TokenKind::kTagBegin, TokenKind::kTagEnd, "%}");
  }
  void AddData(std::string_view text) {
    if (!text.empty()) Add(TokenKind::kData, std::string(text));
  }
  // The text before a tag with this sign. `is_block`: white space between the start of the line and the tag goes.
  std::string_view Stripped(std::string_view text, char sign, bool is_block) const {
    if (sign == '-') return Strip(text, false, true);
    if (sign == '+' || !is_block) return text;
    const size_t newline = text.rfind('\n');
    const size_t line = newline == text.npos ? 0 : newline + 1;
    if ((line > 0 || line_starts_) && Strip(text.substr(line), true, false).empty()) return text.substr(0, line);
    return text;
  }

  void Comment() {
    const size_t end = source_.find("#}", at_);
    if (end == source_.npos) FailHere("the comment has no end \"#}\"");
    const char sign = end > at_ ? source_[end - 1] : '\0';
    Advance(end - at_ + 2);
    EndTag(sign, true);
  }

  // {% raw %}...{% endraw %}, when that is what the tag begins.
  bool Raw() {
    const size_t at = at_;
    const int line = line_;
    SkipSpace();
    if (Take("raw") && (SkipSpace(), true) && (Rest().starts_with("%}") || Rest().starts_with("-%}"))) {
      const char sign = TakeSign();
      Advance(2);
      if (sign == '-') SkipSpace();
      for (size_t begin = at_, end = source_.find("{%", begin); end != source_.npos;
           end = source_.find("{%", end + 1)) {
        const std::string_view text = std::string_view(source_).substr(begin, end - begin);
        const int first_line = line_;
        Advance(text.size() + 2);
        const char open = TakeSign();
        SkipSpace();
        if (Take("endraw")) {
          SkipSpace();
          const char close = TakeSign();
          if (Take("%}")) {
            if (const std::string_view kept = Stripped(text, open, true); !kept.empty())
              tokens_.push_back({TokenKind::kData, std::string(kept), first_line});
            EndTag(close, true);
            return true;
          }
        }
        at_ = begin;
        line_ = first_line;
      }
      FailHere("the tag \"raw\" has no \"endraw\"");
    }
    at_ = at;
    line_ = line;
    return false;
  }

  // The expression or statement between two delimiters.
  void Inside(TokenKind begin, TokenKind end, std::string_view closer) {
    Add(begin, {});
    std::string open;  // brackets that wait for their end
    while (true) {
      if (at_ == source_.size()) FailHere(fmt::format("the tag has no end \"{}\"", closer));
      if (open.empty() && TakeCloser(end, closer)) return;
      const char c = Next();
      if (IsSpace(CodePoint(FirstCharacter(Rest())))) {
        SkipSpace();
      } else if (IsDigit(c)) {
        Number();
      } else if (IsNameCharacter(c)) {
        size_t length = 1;
        while (IsNameCharacter(Next(length))) ++length;
        Add(TokenKind::kName, std::string(Rest().substr(0, length)));
        Advance(length);
      } else if (c == '\'' || c == '"') {
        String(c);
      } else {
        Operator(open);
      }
    }
  }
  bool TakeCloser(TokenKind end, std::string_view closer) {
    const bool is_block = closer == "%}";
    const char sign = Next() == '-' || (Next() == '+' && is_block) ? Next() : '\0';
    if (Rest().substr(std::min<size_t>(sign != '\0', Rest().size())).substr(0, 2) != closer) return false;
    Add(end, {});
    Advance(closer.size() + (sign != '\0'));
    EndTag(sign, is_block);
    return true;
  }

  void Number() {
    const std::string_view rest = Rest();
    const auto digits = [&](size_t at) {  // digits with single underscores between them
      size_t end = at;
      while (end < rest.size() && (IsDigit(rest[end]) || (rest[end] == '_' && end > at && rest[end - 1] != '_' &&
                                                          end + 1 < rest.size() && IsDigit(rest[end + 1]))))
        ++end;
      return end;
    };
    if (rest[0] == '0' && rest.size() > 1 && std::string_view("xXoObB").find(rest[1]) != std::string_view::npos)
      FailHere("numbers in other bases than ten are not supported");
    size_t end = digits(0);
    bool is_float = false;
    if (const bool member = at_ > 0 && source_[at_ - 1] == '.'; !member) {
      if (end + 1 < rest.size() && rest[end] == '.' && IsDigit(rest[end + 1])) {
        end = digits(end + 1);
        is_float = true;
      }
      if (end < rest.size() && (rest[end] == 'e' || rest[end] == 'E')) {
        const size_t sign = end + 1 < rest.size() && (rest[end + 1] == '+' || rest[end + 1] == '-');
        if (const size_t exponent = digits(end + 1 + sign); exponent > end + 1 + sign) {
          end = exponent;
          is_float = true;
        }
      }
    }
    std::string text;
    for (const char c : rest.substr(0, end))
      if (c != '_') text += c;
    Add(is_float ? TokenKind::kFloat : TokenKind::kInteger, std::move(text));
    Advance(end);
  }

  void String(char quote) {
    const int first_line = line_;
    std::string text;
    Advance(1);
    while (Next() != quote) {
      if (at_ == source_.size()) {
        line_ = first_line;
        FailHere("the text in quotes has no end");
      }
      if (Next() == '\\')
        Escape(text);
      else {
        text += Next();
        Advance(1);
      }
    }
    Advance(1);
    tokens_.push_back({TokenKind::kString, std::move(text), first_line});
  }
  void Escape(std::string& out) {
    constexpr std::string_view kLetters = "\\'\"abfnrtv", kValues = "\\'\"\a\b\f\n\r\t\v";
    const char c = Next(1);
    if (const size_t at = kLetters.find(c); at != kLetters.npos && c != '\0') {
      out += kValues[at];
      return Advance(2);
    }
    if (c == '\n') return Advance(2);
    if (c == 'x' || c == 'u' || c == 'U') {
      const size_t digits = c == 'x' ? 2 : c == 'u' ? 4 : 8;
      return CodePointEscape(out, 2, digits, 16);
    }
    if (c >= '0' && c <= '7') {
      size_t digits = 1;
      while (digits < 3 && Next(1 + digits) >= '0' && Next(1 + digits) <= '7') ++digits;
      return CodePointEscape(out, 1, digits, 8);
    }
    if (c == 'N' || static_cast<uint8_t>(c) >= 0x80) FailHere("this character after a backslash is not supported");
    out += '\\';  // stands for itself
    Advance(1);
  }
  void CodePointEscape(std::string& out, size_t skip, size_t digits, int base) {
    uint32_t value = 0;
    for (size_t i = 0; i < digits; ++i) {
      const char c = Next(skip + i);
      const int digit = IsDigit(c)             ? c - '0'
                        : c >= 'a' && c <= 'f' ? c - 'a' + 10
                        : c >= 'A' && c <= 'F' ? c - 'A' + 10
                                               : 99;
      if (digit >= base) FailHere("the text in quotes has a damaged escape");
      value = value * static_cast<uint32_t>(base) + static_cast<uint32_t>(digit);
    }
    if (value > 0x10ffff || (value >= 0xd800 && value < 0xe000)) FailHere("the escape is no character");
    out += FromCodePoint(value);
    Advance(skip + digits);
  }

  void Operator(std::string& open) {
    constexpr std::array<std::string_view, 26> kOperators{"//", "**", "==", "!=", ">=", "<=", "+", "-", "/",
                                                          "*",  "%",  "~",  "[",  "]",  "(",  ")", "{", "}",
                                                          ">",  "<",  "=",  ".",  ":",  "|",  ",", ";"};
    const auto found =
        std::ranges::find_if(kOperators, [&](std::string_view text) { return Rest().starts_with(text); });
    if (found == kOperators.end()) FailHere(fmt::format("unexpected character \"{}\"", FirstCharacter(Rest())));
    const char c = (*found)[0];
    if (c == '(' || c == '[' || c == '{') {
      open += c == '(' ? ')' : c == '[' ? ']' : '}';
    } else if (c == ')' || c == ']' || c == '}') {
      if (open.empty() || open.back() != c) FailHere(fmt::format("unexpected \"{}\"", c));
      open.pop_back();
    }
    Add(TokenKind::kOperator, std::string(*found));
    Advance(found->size());
  }

  std::string source_;
  std::string_view file_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  int line_ = 1;
  bool line_starts_ = true;
};

}  // namespace

std::vector<Token> Tokenize(std::string_view text, std::string_view file) { return Lexer(text, file).Run(); }

}  // namespace circlet::jinja
