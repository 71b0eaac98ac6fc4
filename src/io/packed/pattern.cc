#include "io/packed/pattern.h"

#include <bitset>
#include <cctype>
#include <charconv>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/io/names.h"

namespace circlet {

namespace {

constexpr size_t kLongestPattern = 1000;
constexpr size_t kLongestName = 512;
constexpr int kDeepest = 32;       // groups within groups
constexpr int kMostRepeats = 200;  // of a counted repetition
constexpr int kMostSteps = 200'000;

using Bytes = std::bitset<256>;
using Positions = std::bitset<kLongestName + 1>;

}  // namespace

struct Pattern::Node {
  enum class Kind : uint8_t { kByte, kSequence, kAlternatives, kRepeat, kStart, kEnd, kWordEdge, kLookahead };
  Kind kind = Kind::kSequence;
  Bytes bytes;                 // kByte
  std::vector<Node> children;  // one of kRepeat and kLookahead
  int least = 0, most = -1;    // kRepeat; -1: without end
  bool negated = false;        // kWordEdge, kLookahead
};

namespace {

using Node = Pattern::Node;
using Kind = Node::Kind;

bool IsWord(unsigned char c) { return std::isalnum(c) != 0 || c == '_'; }

Bytes Where(bool (*is)(unsigned char)) {
  Bytes bytes;
  for (int c = 0; c < 256; ++c) bytes[static_cast<size_t>(c)] = is(static_cast<unsigned char>(c));
  return bytes;
}

class Parser {
 public:
  Parser(std::string_view text, const std::string& where) : text_(text), where_(where) {
    if (text.size() > kLongestPattern)
      Fail("{}: a pattern of {} characters; circlet reads up to {}", where, text.size(), kLongestPattern);
  }

  Node Parse() {
    Node node = Alternatives(0);
    if (at_ < text_.size()) Bad("\")\" closes nothing");
    return node;
  }

 private:
  [[noreturn]] void Bad(std::string_view what) const {
    Fail("{}: pattern \"{}\", character {}: {}; patterns are Python's regular expressions", where_, Shortened(text_),
         at_ + 1, what);
  }
  bool Next(std::string_view text) {
    if (!text_.substr(at_).starts_with(text)) return false;
    at_ += text.size();
    return true;
  }
  bool AtEnd() const { return at_ >= text_.size(); }

  Node Alternatives(int depth) {
    if (depth > kDeepest) Bad("groups are nested too deeply");
    Node node{.kind = Kind::kAlternatives};
    do node.children.push_back(Sequence(depth));
    while (Next("|"));
    return node;
  }

  Node Sequence(int depth) {
    Node node{.kind = Kind::kSequence};
    while (!AtEnd() && text_[at_] != '|' && text_[at_] != ')') {
      Node atom = Atom(depth);
      Repeat(atom);
      node.children.push_back(std::move(atom));
    }
    return node;
  }

  void Repeat(Node& atom) {
    int least = 0, most = -1;
    if (Next("*")) {
    } else if (Next("+")) {
      least = 1;
    } else if (Next("?")) {
      most = 1;
    } else if (!Counts(least, most)) {
      return;
    }
    // A lazy repetition begins where a greedy one does.
    if (!Next("?") && Next("+")) Bad("a possessive repetition is not supported");
    if (!AtEnd() && (text_[at_] == '*' || text_[at_] == '+' || text_[at_] == '?')) Bad("repeats a repetition");
    if (atom.kind == Kind::kStart || atom.kind == Kind::kEnd || atom.kind == Kind::kWordEdge) Bad("repeats an edge");
    Node repeat{.kind = Kind::kRepeat, .least = least, .most = most};
    repeat.children.push_back(std::move(atom));
    atom = std::move(repeat);
  }

  // {3}, {3,}, {,3}, {3,5}; any other brace is a character.
  bool Counts(int& least, int& most) {
    const size_t begin = at_;
    const auto number = [&](int& value) {
      const char* const first = text_.data() + at_;
      const auto [end, error] = std::from_chars(first, text_.data() + text_.size(), value);
      if (error == std::errc::result_out_of_range || value > kMostRepeats) Bad("repeats too often");
      at_ += static_cast<size_t>(end - first);
      return end != first;
    };
    if (!Next("{")) return false;
    int low = 0, high = -1;
    const bool has_low = !AtEnd() && std::isdigit(static_cast<unsigned char>(text_[at_])) != 0 && number(low);
    const bool comma = Next(",");
    const bool has_high =
        comma && !AtEnd() && std::isdigit(static_cast<unsigned char>(text_[at_])) != 0 && number(high);
    if (!Next("}") || (!has_low && !has_high)) {
      at_ = begin;
      return false;
    }
    least = low;
    most = comma ? high : low;
    if (most >= 0 && most < least) Bad("the second count is smaller than the first");
    return true;
  }

  Node Atom(int depth) {
    if (Next("(")) return Group(depth);
    if (Next("[")) return {.kind = Kind::kByte, .bytes = Class()};
    if (Next("^")) return {.kind = Kind::kStart};
    if (Next("$")) return {.kind = Kind::kEnd};
    if (Next(".")) return {.kind = Kind::kByte, .bytes = ~Bytes().set('\n')};
    if (Next("\\")) return Escape();
    if (text_[at_] == '*' || text_[at_] == '+' || text_[at_] == '?') Bad("nothing to repeat");
    return {.kind = Kind::kByte, .bytes = Bytes().set(static_cast<unsigned char>(text_[at_++]))};
  }

  Node Group(int depth) {
    Node node;
    const bool ahead = Next("?="), not_ahead = !ahead && Next("?!");
    if (ahead || not_ahead) {
      if (in_lookahead_) Bad("a lookahead within a lookahead is not supported");
      in_lookahead_ = true;
      node = {.kind = Kind::kLookahead, .negated = not_ahead};
      node.children.push_back(Alternatives(depth + 1));
      in_lookahead_ = false;
    } else {
      if (!Next("?:") && !AtEnd() && text_[at_] == '?') Bad("of groups with \"(?\" only (?: (?= and (?! are supported");
      node = Alternatives(depth + 1);
    }
    if (!Next(")")) Bad("a group is not closed");
    return node;
  }

  // What a letter behind a backslash stands for in and out of classes; nothing: no class of characters.
  std::optional<Bytes> Shorthand(char letter) const {
    const auto digit = Where([](unsigned char c) { return std::isdigit(c) != 0; });
    const auto space = Where([](unsigned char c) { return std::isspace(c) != 0; });
    const auto word = Where(IsWord);
    switch (letter) {
      case 'd':
        return digit;
      case 'D':
        return ~digit;
      case 's':
        return space;
      case 'S':
        return ~space;
      case 'w':
        return word;
      case 'W':
        return ~word;
      case 'n':
        return Bytes().set('\n');
      case 't':
        return Bytes().set('\t');
      default:
        break;
    }
    if (std::isalnum(static_cast<unsigned char>(letter)) != 0) return std::nullopt;
    return Bytes().set(static_cast<unsigned char>(letter));
  }

  Node Escape() {
    if (AtEnd()) Bad("a backslash stands at the end");
    const char letter = text_[at_++];
    if (letter == 'A') return {.kind = Kind::kStart};
    if (letter == 'Z') return {.kind = Kind::kEnd};
    if (letter == 'b' || letter == 'B') return {.kind = Kind::kWordEdge, .negated = letter == 'B'};
    if (const std::optional<Bytes> bytes = Shorthand(letter)) return {.kind = Kind::kByte, .bytes = *bytes};
    Bad(fmt::format("\\{} is not supported", letter));
  }

  Bytes Class() {
    const bool negated = Next("^");
    Bytes bytes;
    for (bool first = true; AtEnd() || text_[at_] != ']' || first; first = false) {
      const auto one = [&] {
        if (AtEnd()) Bad("a class is not closed");
        const char c = text_[at_++];
        if (c != '\\') return Bytes().set(static_cast<unsigned char>(c));
        if (AtEnd()) Bad("a backslash stands at the end");
        const std::optional<Bytes> of_letter = Shorthand(text_[at_++]);
        if (!of_letter) Bad("this escape is not supported in a class");
        return *of_letter;
      };
      const Bytes low = one();
      if (at_ + 1 >= text_.size() || text_[at_] != '-' || text_[at_ + 1] == ']') {
        bytes |= low;
        continue;
      }
      ++at_;
      const Bytes high = one();
      if (low.count() != 1 || high.count() != 1 || low._Find_first() > high._Find_first())
        Bad("a range of no characters");
      for (size_t c = low._Find_first(); c <= high._Find_first(); ++c) bytes.set(c);
    }
    ++at_;
    return negated ? ~bytes : bytes;
  }

  std::string_view text_;
  const std::string& where_;
  size_t at_ = 0;
  bool in_lookahead_ = false;
};

class Matcher {
 public:
  Matcher(std::string_view name, const std::string& where) : name_(name), where_(where) {
    CIRCLET_CHECK(name.size() <= kLongestName, "a module's name of {} characters", name.size());
  }

  // The positions behind matches that begin at one of `from`.
  Positions From(const Node& node, const Positions& from) {
    if (++steps_ > kMostSteps) Fail("{}: the pattern takes too long to match; write a simpler one", where_);
    if (from.none()) return {};
    switch (node.kind) {
      case Kind::kByte:
        return Filtered(from, [&](size_t at) { return at < name_.size() && node.bytes[Byte(at)]; }) << 1;
      case Kind::kStart:
        return Filtered(from, [&](size_t at) { return at == 0; });
      case Kind::kEnd:
        return Filtered(from, [&](size_t at) { return at == name_.size(); });
      case Kind::kWordEdge:
        return Filtered(from, [&](size_t at) { return AtWordEdge(at) != node.negated; });
      case Kind::kLookahead:
        return Filtered(from,
                        [&](size_t at) { return From(node.children[0], Positions().set(at)).any() != node.negated; });
      case Kind::kSequence: {
        Positions at = from;
        for (const Node& child : node.children) at = From(child, at);
        return at;
      }
      case Kind::kAlternatives: {
        Positions all;
        for (const Node& child : node.children) all |= From(child, from);
        return all;
      }
      case Kind::kRepeat:
        return Repeated(node, from);
    }
    return {};
  }

 private:
  unsigned char Byte(size_t at) const { return static_cast<unsigned char>(name_[at]); }
  bool AtWordEdge(size_t at) const {
    return (at > 0 && IsWord(Byte(at - 1))) != (at < name_.size() && IsWord(Byte(at)));
  }
  template <typename Keeps>
  static Positions Filtered(Positions from, const Keeps& keeps) {
    for (size_t at = from._Find_first(); at < from.size(); at = from._Find_next(at))
      if (!keeps(at)) from.reset(at);
    return from;
  }

  // Of what more repetitions reach only the new positions go on: fewer ones led to the others.
  Positions Repeated(const Node& node, const Positions& from) {
    Positions at = from;
    for (int i = 0; i < node.least; ++i) at = From(node.children[0], at);
    Positions all = at;
    for (int i = node.least; at.any() && (node.most < 0 || i < node.most); ++i) {
      at = From(node.children[0], at) & ~all;
      all |= at;
    }
    return all;
  }

  std::string_view name_;
  const std::string& where_;
  int steps_ = 0;
};

}  // namespace

Pattern::Pattern(const std::string& text, const std::string& where)
    : root_(std::make_shared<const Node>(Parser(text, where).Parse())), where_(where) {}

std::optional<size_t> Pattern::Search(std::string_view name) const {
  Matcher matcher(name, where_);
  for (size_t at = 0; at <= name.size(); ++at)
    if (matcher.From(*root_, Positions().set(at)).any()) return at;
  return std::nullopt;
}

bool Pattern::MatchesFront(std::string_view name) const {
  return Matcher(name, where_).From(*root_, Positions().set(0)).any();
}

bool Pattern::MatchesModule(std::string_view name) const {
  const Positions ends = Matcher(name, where_).From(*root_, Positions().set(0));
  for (size_t at = ends._Find_first(); at < ends.size(); at = ends._Find_next(at))
    if (at == name.size() || name[at] == '.') return true;
  return false;
}

}  // namespace circlet
