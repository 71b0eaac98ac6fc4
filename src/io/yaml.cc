#include "circlet/io/yaml.h"

#include <yaml-cpp/eventhandler.h>
#include <yaml-cpp/exceptions.h>
#include <yaml-cpp/parser.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <map>
#include <nlohmann/json.hpp>
#include <optional>
#include <sstream>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"

namespace circlet {
namespace {

using Kind = YamlNode::Kind;

constexpr int64_t kLimitBytes = int64_t{1} << 20;
constexpr size_t kNodeLimit = 100'000;

template <typename T>
std::optional<T> ParseWhole(std::string_view text, int base_or_none = 0) {
  T value{};
  std::from_chars_result result{};
  if constexpr (std::is_integral_v<T>) {
    result = std::from_chars(text.data(), text.data() + text.size(), value, base_or_none);
  } else {
    result = std::from_chars(text.data(), text.data() + text.size(), value);
  }
  return result.ec == std::errc() && result.ptr == text.data() + text.size() ? std::optional(value) : std::nullopt;
}

bool OneOf(std::string_view text, std::initializer_list<std::string_view> words) {
  return std::ranges::find(words, text) != words.end();
}

// A plain scalar by the core schema (YAML 1.2, 10.3.2).
YamlNode Resolve(std::string_view text) {
  YamlNode node;
  if (OneOf(text, {"", "~", "null", "Null", "NULL"})) return node;
  if (OneOf(text, {"true", "True", "TRUE", "false", "False", "FALSE"})) {
    node.kind = Kind::kBool;
    node.boolean = text[0] == 't' || text[0] == 'T';
    return node;
  }
  const bool negative = text.starts_with('-');
  const std::string_view unsigned_text = text.substr(negative || text.starts_with('+') ? 1 : 0);
  const auto number = [&](double value) {
    node.kind = Kind::kFloat;
    node.number = negative ? -value : value;
  };
  std::optional<int64_t> integer;
  if (unsigned_text.find_first_not_of("0123456789") == unsigned_text.npos) {
    // With its sign, so that the smallest integer is read too.
    integer = ParseWhole<int64_t>(text.substr(text.starts_with('+') ? 1 : 0), 10);
  } else if (text.starts_with("0x") || text.starts_with("0o")) {
    const std::string_view digits = text.substr(2);
    if (!digits.starts_with('-')) integer = ParseWhole<int64_t>(digits, text[1] == 'x' ? 16 : 8);
  }
  if (integer) {
    node.kind = Kind::kInt;
    node.integer = *integer;
  } else if (OneOf(unsigned_text, {".inf", ".Inf", ".INF"})) {
    number(std::numeric_limits<double>::infinity());
  } else if (OneOf(text, {".nan", ".NaN", ".NAN"})) {
    number(std::numeric_limits<double>::quiet_NaN());
  } else if (unsigned_text.find_first_not_of("0123456789.eE+-") == unsigned_text.npos &&
             !unsigned_text.starts_with('-') && ParseWhole<double>(unsigned_text)) {
    number(*ParseWhole<double>(unsigned_text));
  } else {
    node.kind = Kind::kString;
    node.text = text;
  }
  return node;
}

// yaml-cpp guesses other encodings and replaces what it cannot read; both would change names silently.
void CheckText(std::string_view text, std::string_view file) {
  for (int line = 1; !text.empty(); ++line) {
    const std::string_view content = text.substr(0, text.find('\n'));
    text.remove_prefix(std::min(content.size() + 1, text.size()));
    for (const char c : content) {
      if ((c >= 0 && c < ' ' && c != '\t' && c != '\r') || c == '\x7f') {
        Fail("{}:{}: the control character 0x{:02x} is no text; is it the right file?", file, line, c);
      }
    }
    try {
      nlohmann::json(content).dump();  // refuses what is not UTF-8
    } catch (const nlohmann::json::type_error&) {
      Fail("{}:{}: is not UTF-8; save the file as UTF-8 text", file, line);
    }
  }
}

size_t CountNodes(const YamlNode& node) {
  size_t count = 1;
  for (const YamlNode& item : node.items) count += CountNodes(item);
  for (const YamlMember& member : node.members) count += CountNodes(member.value);
  return count;
}

// Builds the tree from the parser's events; anchored nodes are copied where an alias names them.
class TreeBuilder : public YAML::EventHandler {
 public:
  explicit TreeBuilder(std::string_view file) : file_(file) {}

  YamlNode Take() { return std::move(root_); }

  void OnDocumentStart(const YAML::Mark&) override {}
  void OnDocumentEnd() override {}
  void OnNull(const YAML::Mark& mark, YAML::anchor_t anchor) override { Scalar(mark, "?", anchor, ""); }
  void OnAlias(const YAML::Mark& mark, YAML::anchor_t anchor) override {
    if (WantsKey()) FailAt(mark, "an alias stands where a key should; write the key out");
    const auto place = anchored_.find(anchor);
    if (place == anchored_.end()) FailAt(mark, "an alias inside the node that it names; write the value out");
    Count(mark, CountNodes(place->second));
    if (open_.size() + Depth(place->second) > kJsonDepthLimit) FailDepth(mark);
    Finish(place->second, 0);
  }
  void OnScalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                const std::string& value) override {
    Scalar(mark, tag, anchor, value);
  }
  void OnSequenceStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                       YAML::EmitterStyle::value) override {
    Open(mark, tag, anchor, Kind::kList);
  }
  void OnSequenceEnd() override { Close(); }
  void OnMapStart(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor,
                  YAML::EmitterStyle::value) override {
    Open(mark, tag, anchor, Kind::kMap);
  }
  void OnMapEnd() override { Close(); }

  [[noreturn]] void FailAt(const YAML::Mark& mark, std::string_view what) const {
    Fail("{}:{}: {}", file_, mark.line + 1, what);
  }

 private:
  struct OpenNode {
    YamlNode node;
    YAML::anchor_t anchor;
    std::optional<std::string> key;  // of the member whose value comes next
    std::map<std::string, int> key_lines;
  };

  static size_t Depth(const YamlNode& node) {
    if (node.kind != Kind::kList && node.kind != Kind::kMap) return 0;
    size_t deepest = 0;
    for (const YamlNode& item : node.items) deepest = std::max(deepest, Depth(item));
    for (const YamlMember& member : node.members) deepest = std::max(deepest, Depth(member.value));
    return deepest + 1;
  }
  [[noreturn]] void FailDepth(const YAML::Mark& mark) const {
    FailAt(mark, fmt::format("nested more than {} deep; is it the right file?", kJsonDepthLimit));
  }
  bool WantsKey() const { return !open_.empty() && open_.back().node.kind == Kind::kMap && !open_.back().key; }
  void Count(const YAML::Mark& mark, size_t count) {
    nodes_ += count;
    if (nodes_ > kNodeLimit) FailAt(mark, fmt::format("more than {} values; is it the right file?", kNodeLimit));
  }
  void CheckTag(const YAML::Mark& mark, const std::string& tag) const {
    if (tag != "?" && tag != "!" && !tag.empty())
      FailAt(mark, fmt::format("the tag \"{}\" is not supported; remove it", tag));
  }

  void Scalar(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, const std::string& value) {
    CheckTag(mark, tag);
    Count(mark, 1);
    if (WantsKey()) {
      OpenNode& map = open_.back();
      if (value == "<<") FailAt(mark, "merge keys (<<) are not supported; write the keys out");
      const auto [place, is_new] = map.key_lines.emplace(value, mark.line + 1);
      if (!is_new) {
        FailAt(mark, fmt::format("the key \"{}\" stands twice in one mapping (also in line {}); remove one", value,
                                 place->second));
      }
      map.key = value;
      return;
    }
    YamlNode node;
    if (tag == "!") {  // in quotes
      node.kind = Kind::kString;
      node.text = value;
    } else {
      node = Resolve(value);
    }
    node.line = mark.line + 1;
    Finish(std::move(node), anchor);
  }
  void Open(const YAML::Mark& mark, const std::string& tag, YAML::anchor_t anchor, Kind kind) {
    CheckTag(mark, tag);
    Count(mark, 1);
    if (WantsKey()) FailAt(mark, "a key must be a plain word, found a list or a mapping; put it in quotes");
    if (open_.size() == kJsonDepthLimit) FailDepth(mark);
    OpenNode& opened = open_.emplace_back();
    opened.node.kind = kind;
    opened.node.line = mark.line + 1;
    opened.anchor = anchor;
  }
  void Close() {
    OpenNode closed = std::move(open_.back());
    open_.pop_back();
    Finish(std::move(closed.node), closed.anchor);
  }
  void Finish(YamlNode node, YAML::anchor_t anchor) {
    if (anchor != 0) anchored_[anchor] = node;
    if (open_.empty()) {
      root_ = std::move(node);
    } else if (open_.back().node.kind == Kind::kList) {
      open_.back().node.items.push_back(std::move(node));
    } else {
      open_.back().node.members.push_back({*std::exchange(open_.back().key, std::nullopt), std::move(node)});
    }
  }

  std::string_view file_;
  YamlNode root_;
  std::vector<OpenNode> open_;
  std::map<YAML::anchor_t, YamlNode> anchored_;
  size_t nodes_ = 0;
};

// Line `number`, from 0.
std::string LineOf(std::string_view text, int number) {
  for (; number > 0 && !text.empty(); --number) text.remove_prefix(std::min(text.find('\n'), text.size() - 1) + 1);
  return std::string(text.substr(0, text.find('\n')));
}

}  // namespace

const YamlNode* YamlNode::Find(std::string_view key) const {
  for (const YamlMember& member : members) {
    if (member.key == key) return &member.value;
  }
  return nullptr;
}

YamlNode* YamlNode::Find(std::string_view key) { return const_cast<YamlNode*>(std::as_const(*this).Find(key)); }

YamlNode ParseYaml(std::string_view text, std::string_view file) {
  if (static_cast<int64_t>(text.size()) > kLimitBytes) {
    Fail("{}: has {}, at most {} are read; is it the right file?", file, HumanBytes(static_cast<int64_t>(text.size())),
         HumanBytes(kLimitBytes));
  }
  CheckText(text, file);
  std::istringstream stream{std::string(text)};
  TreeBuilder builder(file);
  try {
    YAML::Parser parser(stream);
    parser.HandleNextDocument(builder);
    YamlNode tree = builder.Take();
    TreeBuilder second(file);
    if (parser.HandleNextDocument(second)) {
      Fail("{}:{}: a second document begins here; keep one", file, second.Take().line);
    }
    return tree;
  } catch (const YAML::Exception& error) {
    if (error.mark.is_null()) Fail("{}: {}", file, error.msg);
    if (const std::string line = LineOf(text, error.mark.line);
        line.substr(0, line.find_first_not_of(" \t")).find('\t') != std::string::npos)
      builder.FailAt(error.mark, "a tab in front of the text; YAML is indented with blanks");
    builder.FailAt(error.mark, error.msg);
  }
}

YamlNode ReadYaml(const std::filesystem::path& path) { return ParseYaml(ReadFile(path, kLimitBytes), path.string()); }

nlohmann::json ToJson(const YamlNode& tree) {
  switch (tree.kind) {
    case Kind::kNull:
      return nullptr;
    case Kind::kBool:
      return tree.boolean;
    case Kind::kInt:
      return tree.integer;
    case Kind::kFloat:
      return tree.number;
    case Kind::kString:
      return tree.text;
    case Kind::kList: {
      nlohmann::json list = nlohmann::json::array();
      for (const YamlNode& item : tree.items) list.push_back(ToJson(item));
      return list;
    }
    case Kind::kMap: {
      nlohmann::json map = nlohmann::json::object();
      for (const YamlMember& member : tree.members) map[member.key] = ToJson(member.value);
      return map;
    }
  }
  CIRCLET_CHECK(false, "kind {}", static_cast<int>(tree.kind));
}

// --- Writing ---

namespace {

// As it stands when a reader takes it for the same string, in JSON's quotes (which are YAML's too) otherwise.
std::string QuotedIfNeeded(const std::string& text) {
  constexpr std::string_view kPlain = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_./";
  const bool plain = text.find_first_not_of(std::string(kPlain) + "-") == text.npos && !text.starts_with('-');
  if (plain && Resolve(text).kind == Kind::kString) return text;
  return nlohmann::json(text).dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
}

std::string ScalarText(const YamlNode& node) {
  switch (node.kind) {
    case Kind::kNull:
      return "null";
    case Kind::kBool:
      return node.boolean ? "true" : "false";
    case Kind::kInt:
      return fmt::format("{}", node.integer);
    case Kind::kFloat: {
      if (std::isnan(node.number)) return ".nan";
      if (std::isinf(node.number)) return node.number > 0 ? ".inf" : "-.inf";
      const std::string digits = fmt::format("{}", node.number);
      return digits.find_first_of(".e") == digits.npos ? digits + ".0" : digits;  // no integer
    }
    case Kind::kString:
      return QuotedIfNeeded(node.text);
    case Kind::kList:
      return "[]";
    case Kind::kMap:
      return "{}";
  }
  CIRCLET_CHECK(false, "kind {}", static_cast<int>(node.kind));
}

// Writes behind "key:" or "-": a scalar on the same line, or the lines of a block. `behind_dash`: the first line of the
// block stands behind the dash.
void Emit(const YamlNode& node, int indent, bool behind_dash, std::string& out) {
  if (node.items.empty() && node.members.empty()) {
    out += fmt::format("{}{}\n", out.empty() ? "" : " ", ScalarText(node));
    return;
  }
  bool first = true;
  const auto start_line = [&] {
    const bool same_line = first && behind_dash;
    if (first && !behind_dash && !out.empty()) out += '\n';
    first = false;
    out += same_line ? " " : std::string(static_cast<size_t>(indent), ' ');
  };
  for (const YamlNode& item : node.items) {
    start_line();
    out += '-';
    Emit(item, indent + 2, true, out);
  }
  for (const YamlMember& member : node.members) {
    start_line();
    out += QuotedIfNeeded(member.key) + ":";
    Emit(member.value, indent + 2, false, out);
  }
}

}  // namespace

std::string DumpYaml(const YamlNode& tree) {
  std::string out;
  Emit(tree, 0, false, out);
  return out;
}

// --- Overrides ---

namespace {

// The item of a list that a part of an override means; `at` stands in front of errors.
YamlNode& ListItem(YamlNode& list, std::string_view part, const std::string& at) {
  if (part.find_first_not_of("0123456789") == part.npos) {
    const std::optional<size_t> index = ParseWhole<size_t>(part, 10);
    if (!index || *index > list.items.size()) {
      Fail("{}: the list has {} items; use 0 to {} ({} appends)", at, list.items.size(), list.items.size(),
           list.items.size());
    }
    return *index == list.items.size() ? list.items.emplace_back() : list.items[*index];
  }
  std::vector<std::string> names;
  YamlNode* found = nullptr;
  int matches = 0;
  for (YamlNode& item : list.items) {
    const YamlNode* name = item.Find("name");
    if (name == nullptr || name->kind != Kind::kString) continue;
    names.push_back(name->text);
    if (name->text != part) continue;
    found = &item;
    ++matches;
  }
  if (matches == 1) return *found;
  std::string known;
  for (const std::string& name : names) known += (known.empty() ? "" : ", ") + name;
  if (matches > 1) Fail("{}: {} items of the list have this name; use an index", at, matches);
  Fail("{}: no item of the list has this name{}; there are: {}", at, NearestHint(part, names),
       known.empty() ? "none with a name" : known);
}

}  // namespace

void ApplyOverride(YamlNode& tree, std::string_view assignment) {
  const size_t equals = assignment.find('=');
  if (equals == assignment.npos || equals == 0) {
    Fail("--set {}: expected KEY=VALUE, as in --set pipeline.ptq.activation=int16", assignment);
  }
  const std::string_view path = assignment.substr(0, equals);
  YamlNode value = ParseYaml(assignment.substr(equals + 1), fmt::format("--set {}", assignment));
  // Lines inside the argument mean nothing; 0 says "from the command line".
  const auto clear_lines = [](const auto& self, YamlNode& node) -> void {
    node.line = 0;
    for (YamlNode& item : node.items) self(self, item);
    for (YamlMember& member : node.members) self(self, member.value);
  };
  clear_lines(clear_lines, value);

  YamlNode* node = &tree;
  for (size_t begin = 0; begin <= path.size();) {
    const size_t end = std::min(path.find('.', begin), path.size());
    const std::string_view part = path.substr(begin, end - begin);
    const std::string at = fmt::format("--set {}: {}", assignment, path.substr(0, end));
    if (part.empty()) Fail("{}: an empty part in the key; write a.b.c=value", at);
    if (node->kind == Kind::kNull) node->kind = Kind::kMap;
    if (node->kind == Kind::kList) {
      node = &ListItem(*node, part, at);
    } else if (node->kind == Kind::kMap) {
      YamlNode* member = node->Find(part);
      node = member != nullptr ? member : &node->members.emplace_back(YamlMember{std::string(part), {}}).value;
    } else {
      Fail("{}: the value before this part is {}, not a mapping or a list; set that one, or correct the key", at,
           ScalarText(*node));
    }
    begin = end + 1;
  }
  *node = std::move(value);
}

}  // namespace circlet
