#include <algorithm>
#include <charconv>
#include <initializer_list>

#include "circlet/base/error.h"
#include "preprocess/jinja/syntax.h"

namespace circlet::jinja {
namespace {

// Deepest nesting of brackets, conditions and blocks in a template.
constexpr int kNestingLimit = 150;

std::string Describe(const Token& token) {
  switch (token.kind) {
    case TokenKind::kEnd:
      return "the end of the template";
    case TokenKind::kData:
      return "text";
    case TokenKind::kOutputBegin:
      return "\"{{\"";
    case TokenKind::kOutputEnd:
      return "\"}}\"";
    case TokenKind::kTagBegin:
      return "\"{%\"";
    case TokenKind::kTagEnd:
      return "\"%}\"";
    default:
      return fmt::format("\"{}\"", token.text);
  }
}

class Parser {
 public:
  Parser(std::string_view text, std::string_view file) : file_(file), tokens_(Tokenize(text, file)) {}

  Syntax Run() {
    syntax_.body = Block({}, 1);
    return std::move(syntax_);
  }

 private:
  using Kind = Expression::Kind;
  using Tag = Statement::Kind;

  // Counts how deep brackets and blocks nest.
  class Nested {
   public:
    explicit Nested(Parser& parser) : parser_(parser) {
      if (++parser_.nesting_ > kNestingLimit) parser_.FailHere(fmt::format("nested more than {} deep", kNestingLimit));
    }
    ~Nested() { --parser_.nesting_; }

   private:
    Parser& parser_;
  };

  [[noreturn]] void FailAt(int line, std::string_view what) const { Fail("{}:{}: {}", file_, line, what); }
  [[noreturn]] void FailHere(std::string_view what) const { FailAt(Here().line, what); }

  const Token& Here(size_t ahead = 0) const { return tokens_[std::min(at_ + ahead, tokens_.size() - 1)]; }
  const Token& Take() {
    const Token& token = Here();
    if (at_ + 1 < tokens_.size()) ++at_;
    return token;
  }
  bool IsOperator(std::string_view text, size_t ahead = 0) const {
    return Here(ahead).kind == TokenKind::kOperator && Here(ahead).text == text;
  }
  bool IsName(std::string_view text, size_t ahead = 0) const {
    return Here(ahead).kind == TokenKind::kName && Here(ahead).text == text;
  }
  bool TakeOperator(std::string_view text) { return IsOperator(text) && (Take(), true); }
  bool TakeName(std::string_view text) { return IsName(text) && (Take(), true); }
  void Expect(TokenKind kind, std::string_view what) {
    if (Here().kind != kind) FailHere(fmt::format("expected {}, found {}", what, Describe(Here())));
    Take();
  }
  void ExpectOperator(std::string_view text) {
    if (!TakeOperator(text)) FailHere(fmt::format("expected \"{}\", found {}", text, Describe(Here())));
  }
  std::string ExpectName() {
    if (Here().kind != TokenKind::kName) FailHere(fmt::format("expected a name, found {}", Describe(Here())));
    return Take().text;
  }

  Expression* New(Kind kind, int line, std::vector<const Expression*> parts = {}, std::string name = {}) {
    syntax_.expressions.push_back({.kind = kind, .line = line, .name = std::move(name), .parts = std::move(parts)});
    return &syntax_.expressions.back();
  }
  Statement* New(Tag kind, int line) {
    syntax_.statements.push_back({.kind = kind, .line = line});
    return &syntax_.statements.back();
  }
  const Expression* Constant(Value value, int line) {
    Expression* node = New(Kind::kConstant, line);
    node->constant = std::move(value);
    return node;
  }

  // Statements up to one of the tags `ends`, whose name is the next token; without `ends` up to the end. `first_line`:
  // of the tag that begins the block.
  Body Block(std::initializer_list<std::string_view> ends, int first_line) {
    const Nested nested(*this);
    Body body;
    while (true) {
      const Token& token = Here();
      if (token.kind == TokenKind::kData) {
        Statement* text = New(Tag::kText, token.line);
        text->text = Take().text;
        body.push_back(text);
      } else if (token.kind == TokenKind::kOutputBegin) {
        Take();
        Statement* output = New(Tag::kOutput, token.line);
        output->value = Tuple(true, {});
        Expect(TokenKind::kOutputEnd, "\"}}\"");
        body.push_back(output);
      } else if (token.kind == TokenKind::kTagBegin) {
        Take();
        if (Here().kind != TokenKind::kName)
          FailHere(fmt::format("expected the name of a tag, found {}", Describe(Here())));
        if (std::ranges::find(ends, Here().text) != ends.end()) return body;
        Tags(body, ends);
        Expect(TokenKind::kTagEnd, "\"%}\"");
      } else {
        if (ends.size() == 0) return body;
        FailAt(first_line, fmt::format("the block that begins here has no \"{}\"", *(ends.end() - 1)));
      }
    }
  }
  // The rest of a block's first tag, and what is in the block.
  Body TagBlock(std::initializer_list<std::string_view> ends) {
    TakeOperator(":");
    const int line = Here().line;
    Expect(TokenKind::kTagEnd, "\"%}\"");
    return Block(ends, line);
  }
  Body WholeBlock(std::string_view end) {
    Body body = TagBlock({end});
    Take();
    return body;
  }

  void Tags(Body& body, std::initializer_list<std::string_view> ends) {
    const Token& token = Take();
    const std::string& tag = token.text;
    const int line = token.line;
    if (tag == "print") return Print(body, line);
    if (tag == "set") return body.push_back(Set(line));
    if (tag == "for") return body.push_back(For(line));
    if (tag == "if") return body.push_back(If(line));
    if (tag == "macro") return body.push_back(Macro(line));
    if (tag == "call") return body.push_back(Call(line));
    if (tag == "filter") return body.push_back(FilterBlock(line));
    if (tag == "with") return body.push_back(With(line));
    if (tag == "generation") return body.push_back(Generation(line));
    if (tag == "break" || tag == "continue") {
      if (loops_ == 0) FailAt(line, fmt::format("\"{}\" outside of a loop", tag));
      return body.push_back(New(tag == "break" ? Tag::kBreak : Tag::kContinue, line));
    }
    for (const std::string_view known : {"block", "extends", "include", "import", "from", "autoescape"})
      if (tag == known) FailAt(line, fmt::format("the tag \"{}\" is not supported; a chat template is one file", tag));
    if (ends.size() == 0) FailAt(line, fmt::format("no tag is called \"{}\"", tag));
    FailAt(line,
           fmt::format("no tag is called \"{}\" here; the block waits for \"{}\"", tag, fmt::join(ends, "\" or \"")));
  }

  void Print(Body& body, int line) {
    bool first = true;
    while (Here().kind != TokenKind::kTagEnd) {
      if (!first) ExpectOperator(",");
      first = false;
      Statement* output = New(Tag::kOutput, line);
      output->value = Condition();
      body.push_back(output);
    }
  }

  Statement* Set(int line) {
    const Expression* target = Target({}, true);
    if (TakeOperator("=")) {
      Statement* set = New(Tag::kSet, line);
      set->target = target;
      set->value = Tuple(true, {});
      return set;
    }
    Statement* set = New(Tag::kSetBlock, line);
    set->target = target;
    set->value = Filters(nullptr);
    set->body = WholeBlock("endset");
    return set;
  }

  Statement* For(int line) {
    Statement* loop = New(Tag::kFor, line);
    loop->target = Target({"in"}, false);
    if (!TakeName("in")) FailHere(fmt::format("expected \"in\", found {}", Describe(Here())));
    loop->value = Tuple(false, {"recursive"});
    if (TakeName("if")) loop->test = Condition();
    loop->recursive = TakeName("recursive");
    ++loops_;
    loop->body = TagBlock({"else", "endfor"});
    --loops_;
    if (Take().text == "else") loop->other = WholeBlock("endfor");
    return loop;
  }

  Statement* If(int line) {
    Statement* node = New(Tag::kIf, line);
    while (true) {
      const Expression* test = Tuple(false, {});
      Body body = TagBlock({"elif", "else", "endif"});
      node->branches.push_back({test, std::move(body)});
      const std::string& tag = Take().text;
      if (tag == "elif") continue;
      if (tag == "else") node->other = WholeBlock("endif");
      return node;
    }
  }

  // The parameters of a macro or of the block of a call.
  void Signature(Statement& node) {
    ExpectOperator("(");
    while (!IsOperator(")")) {
      if (!node.parameters.empty()) ExpectOperator(",");
      Parameter parameter{ExpectName(), nullptr};
      if (TakeOperator("="))
        parameter.fallback = Condition();
      else if (!node.parameters.empty() && node.parameters.back().fallback != nullptr)
        FailHere("a parameter without a default stands after one with a default");
      node.parameters.push_back(std::move(parameter));
    }
    Take();
  }
  // What a macro's body asks for decides what it takes.
  void MacroBody(Statement& node, std::string_view end) {
    const int loops = std::exchange(loops_, 0);
    macros_.push_back(&node);
    node.body = WholeBlock(end);
    macros_.pop_back();
    loops_ = loops;
  }

  Statement* Macro(int line) {
    Statement* node = New(Tag::kMacro, line);
    node->name = ExpectName();
    Signature(*node);
    MacroBody(*node, "endmacro");
    return node;
  }

  Statement* Call(int line) {
    Statement* node = New(Tag::kCall, line);
    if (IsOperator("(")) Signature(*node);
    node->value = Condition();
    if (node->value->kind != Kind::kCall) FailAt(line, "the tag \"call\" needs a call of a macro");
    MacroBody(*node, "endcall");
    return node;
  }

  Statement* FilterBlock(int line) {
    Statement* node = New(Tag::kFilterBlock, line);
    node->value = Filters(OneFilter(nullptr));
    node->body = WholeBlock("endfilter");
    return node;
  }

  Statement* With(int line) {
    Statement* node = New(Tag::kWith, line);
    while (Here().kind != TokenKind::kTagEnd) {
      if (!node->assignments.empty()) ExpectOperator(",");
      const Expression* target = Target({}, false);
      ExpectOperator("=");
      node->assignments.emplace_back(target, Condition());
    }
    node->body = WholeBlock("endwith");
    return node;
  }

  Statement* Generation(int line) {
    Statement* node = New(Tag::kGeneration, line);
    const int loops = std::exchange(loops_, 0);
    node->body = WholeBlock("endgeneration");
    loops_ = loops;
    return node;
  }

  // A name, names in a tuple, or, with `member`, members of a namespace.
  const Expression* Target(std::initializer_list<std::string_view> ends, bool member) {
    const int line = Here().line;
    std::vector<const Expression*> parts;
    bool is_tuple = false;
    while (!(IsTupleEnd(ends) || (is_tuple && IsOperator("=")))) {
      const Nested nested(*this);
      if (TakeOperator("(")) {
        parts.push_back(Target({}, member));
        ExpectOperator(")");
      } else {
        const int name_line = Here().line;
        const std::string name = ExpectName();
        for (const std::string_view word : {"true", "false", "none", "True", "False", "None"})
          if (name == word) FailAt(name_line, fmt::format("\"{}\" cannot be set", name));
        const Expression* target = New(Kind::kName, name_line, {}, name);
        if (member && TakeOperator(".")) target = New(Kind::kAttribute, name_line, {target}, ExpectName());
        parts.push_back(target);
      }
      if (!TakeOperator(",")) break;
      is_tuple = true;
    }
    if (parts.empty()) FailHere(fmt::format("expected a name to set, found {}", Describe(Here())));
    return is_tuple ? New(Kind::kTuple, line, std::move(parts)) : parts[0];
  }

  bool IsTupleEnd(std::initializer_list<std::string_view> ends) const {
    return Here().kind == TokenKind::kOutputEnd || Here().kind == TokenKind::kTagEnd || IsOperator(")") ||
           std::ranges::any_of(ends, [&](std::string_view end) { return IsName(end); });
  }
  // One expression, or several with commas. Names in `ends` are no expression.
  const Expression* Tuple(bool with_condition, std::initializer_list<std::string_view> ends, bool in_brackets = false) {
    const Nested nested(*this);
    const int line = Here().line;
    std::vector<const Expression*> parts;
    bool is_tuple = false;
    while (!IsTupleEnd(ends)) {
      parts.push_back(with_condition ? Condition() : Or());
      if (!TakeOperator(",")) break;
      is_tuple = true;
    }
    if (!is_tuple && !parts.empty()) return parts[0];
    if (!is_tuple && !in_brackets) FailHere(fmt::format("expected an expression, found {}", Describe(Here())));
    return New(Kind::kTuple, line, std::move(parts));
  }

  const Expression* Condition() {
    const Nested nested(*this);
    const int line = Here().line;
    const Expression* node = Or();
    while (TakeName("if")) {
      const Expression* test = Or();
      const Expression* other = TakeName("else") ? Condition() : nullptr;
      node = New(Kind::kConditional, line, {node, test, other});
    }
    return node;
  }
  const Expression* Or() {
    const Expression* node = And();
    for (int line = Here().line; TakeName("or"); line = Here().line) node = New(Kind::kOr, line, {node, And()});
    return node;
  }
  const Expression* And() {
    const Expression* node = Not();
    for (int line = Here().line; TakeName("and"); line = Here().line) node = New(Kind::kAnd, line, {node, Not()});
    return node;
  }
  const Expression* Not() {
    const Nested nested(*this);
    const int line = Here().line;
    return TakeName("not") ? New(Kind::kNot, line, {Not()}) : Compare();
  }
  const Expression* Compare() {
    const int line = Here().line;
    std::vector<const Expression*> parts{Sum()};
    std::vector<std::string> operators;
    while (true) {
      const bool compares =
          std::ranges::any_of(std::initializer_list<std::string_view>{"==", "!=", "<", "<=", ">", ">="},
                              [&](std::string_view text) { return IsOperator(text); });
      if (compares || IsName("in")) {
        operators.push_back(Take().text);
      } else if (IsName("not") && IsName("in", 1)) {
        Take();
        Take();
        operators.emplace_back("not in");
      } else {
        break;
      }
      parts.push_back(Sum());
    }
    if (operators.empty()) return parts[0];
    Expression* node = New(Kind::kCompare, line, std::move(parts));
    node->operators = std::move(operators);
    return node;
  }
  const Expression* Sum() {
    const Expression* node = Concat();
    while (IsOperator("+") || IsOperator("-")) {
      const Token& sign = Take();
      node = New(Kind::kArithmetic, sign.line, {node, Concat()}, sign.text);
    }
    return node;
  }
  const Expression* Concat() {
    const int line = Here().line;
    std::vector<const Expression*> parts{Product()};
    while (TakeOperator("~")) parts.push_back(Product());
    return parts.size() == 1 ? parts[0] : New(Kind::kConcat, line, std::move(parts));
  }
  const Expression* Product() {
    const Expression* node = Power();
    while (IsOperator("*") || IsOperator("/") || IsOperator("//") || IsOperator("%")) {
      const Token& sign = Take();
      node = New(Kind::kArithmetic, sign.line, {node, Power()}, sign.text);
    }
    return node;
  }
  const Expression* Power() {
    const Expression* node = Unary(true);
    while (IsOperator("**")) {
      const Token& sign = Take();
      node = New(Kind::kArithmetic, sign.line, {node, Unary(true)}, sign.text);
    }
    return node;
  }
  const Expression* Unary(bool with_filters) {
    const Nested nested(*this);
    const Expression* node;
    if (IsOperator("-") || IsOperator("+")) {
      const Token& sign = Take();
      node = New(Kind::kSign, sign.line, {Unary(false)}, sign.text);
    } else {
      node = Primary();
    }
    node = Postfix(node);
    return with_filters ? FiltersAndTests(node) : node;
  }

  const Expression* Primary() {
    const Token& token = Take();
    switch (token.kind) {
      case TokenKind::kName:
        return Name(token);
      case TokenKind::kString: {
        std::string text = token.text;
        while (Here().kind == TokenKind::kString) text += Take().text;
        return Constant(Value(std::move(text)), token.line);
      }
      case TokenKind::kInteger: {
        int64_t value = 0;
        if (std::from_chars(token.text.data(), token.text.data() + token.text.size(), value).ec != std::errc())
          FailAt(token.line, fmt::format("{} does not fit in 64 bits", token.text));
        return Constant(value, token.line);
      }
      case TokenKind::kFloat: {
        double value = 0;
        if (std::from_chars(token.text.data(), token.text.data() + token.text.size(), value).ec != std::errc())
          FailAt(token.line, fmt::format("{} is no float64", token.text));
        return Constant(value, token.line);
      }
      case TokenKind::kOperator:
        if (token.text == "(") {
          const Expression* node = Tuple(true, {}, true);
          ExpectOperator(")");
          return node;
        }
        if (token.text == "[") return New(Kind::kList, token.line, Elements("]", false));
        if (token.text == "{") return New(Kind::kDict, token.line, Elements("}", true));
        [[fallthrough]];
      default:
        FailAt(token.line, fmt::format("expected an expression, found {}", Describe(token)));
    }
  }
  const Expression* Name(const Token& token) {
    const std::string& name = token.text;
    if (name == "true" || name == "True" || name == "false" || name == "False")
      return Constant(name == "true" || name == "True", token.line);
    if (name == "none" || name == "None") return Constant({}, token.line);
    for (Statement* macro : macros_) {
      macro->uses_caller |= name == "caller";
      macro->uses_varargs |= name == "varargs";
      macro->uses_kwargs |= name == "kwargs";
    }
    return New(Kind::kName, token.line, {}, name);
  }
  std::vector<const Expression*> Elements(std::string_view end, bool pairs) {
    std::vector<const Expression*> parts;
    while (!IsOperator(end)) {
      if (!parts.empty()) ExpectOperator(",");
      if (IsOperator(end)) break;
      parts.push_back(Condition());
      if (!pairs) continue;
      ExpectOperator(":");
      parts.push_back(Condition());
    }
    Take();
    return parts;
  }

  const Expression* Postfix(const Expression* node) {
    while (true) {
      if (IsOperator("."))
        node = Member(node);
      else if (IsOperator("["))
        node = Subscript(node);
      else if (IsOperator("("))
        node = CallOf(node);
      else
        return node;
    }
  }
  const Expression* Member(const Expression* node) {
    const int line = Take().line;
    const Token& token = Take();
    if (token.kind == TokenKind::kName) return New(Kind::kAttribute, line, {node}, token.text);
    int64_t index = 0;
    if (token.kind != TokenKind::kInteger ||
        std::from_chars(token.text.data(), token.text.data() + token.text.size(), index).ec != std::errc())
      FailAt(token.line, fmt::format("expected a name or a number after \".\", found {}", Describe(token)));
    return New(Kind::kItem, line, {node, Constant(index, line)});
  }
  const Expression* Subscript(const Expression* node) {
    const int line = Take().line;
    std::vector<const Expression*> parts;
    while (!IsOperator("]")) {
      if (!parts.empty()) ExpectOperator(",");
      parts.push_back(Subscribed());
    }
    Take();
    return New(Kind::kItem, line, {node, parts.size() == 1 ? parts[0] : New(Kind::kTuple, line, std::move(parts))});
  }
  const Expression* Subscribed() {
    const int line = Here().line;
    const auto bound = [&]() -> const Expression* {
      return IsOperator(":") || IsOperator("]") || IsOperator(",") ? nullptr : Condition();
    };
    const Expression* start = bound();
    if (!TakeOperator(":")) {
      if (start == nullptr) FailHere(fmt::format("expected an index, found {}", Describe(Here())));
      return start;
    }
    const Expression* stop = bound();
    const Expression* step = TakeOperator(":") ? bound() : nullptr;
    return New(Kind::kSlice, line, {start, stop, step});
  }
  const Expression* CallOf(const Expression* node) {
    const int line = Here().line;
    Arguments arguments = CallArguments();
    Expression* call = New(Kind::kCall, line, {node});
    call->arguments = std::move(arguments);
    return call;
  }
  Arguments CallArguments() {
    const int line = Take().line;
    Arguments arguments;
    bool first = true;
    while (!IsOperator(")")) {
      if (!first) ExpectOperator(",");
      if (IsOperator(")")) break;
      first = false;
      const bool starred = arguments.rest != nullptr || arguments.rest_named != nullptr;
      if (IsOperator("*") && !starred) {
        Take();
        arguments.rest = Condition();
      } else if (IsOperator("**") && arguments.rest_named == nullptr) {
        Take();
        arguments.rest_named = Condition();
      } else if (Here().kind == TokenKind::kName && IsOperator("=", 1) && arguments.rest_named == nullptr) {
        std::string name = Take().text;
        Take();
        arguments.named.emplace_back(std::move(name), Condition());
      } else {
        if (starred || !arguments.named.empty())
          FailAt(line, "an argument without a name stands after one with a name");
        arguments.positional.push_back(Condition());
      }
    }
    Take();
    return arguments;
  }

  std::string DottedName() {
    std::string name = ExpectName();
    while (TakeOperator(".")) name += "." + ExpectName();
    return name;
  }
  const Expression* OneFilter(const Expression* node) {
    Expression* filter = New(Kind::kFilter, Here().line, {node});
    filter->name = DottedName();
    if (IsOperator("(")) filter->arguments = CallArguments();
    return filter;
  }
  const Expression* Filters(const Expression* node) {
    while (TakeOperator("|")) node = OneFilter(node);
    return node;
  }
  const Expression* FiltersAndTests(const Expression* node) {
    while (true) {
      if (IsOperator("|"))
        node = Filters(node);
      else if (IsName("is"))
        node = Test(node);
      else if (IsOperator("("))
        node = CallOf(node);
      else
        return node;
    }
  }
  const Expression* Test(const Expression* node) {
    const int line = Take().line;
    const bool negated = TakeName("not");
    Expression* test = New(Kind::kTest, line, {node});
    test->name = DottedName();
    const TokenKind kind = Here().kind;
    if (IsOperator("(")) {
      test->arguments = CallArguments();
    } else if (kind == TokenKind::kString || kind == TokenKind::kInteger || kind == TokenKind::kFloat ||
               IsOperator("[") || IsOperator("{") ||
               (kind == TokenKind::kName && !IsName("else") && !IsName("or") && !IsName("and"))) {
      if (IsName("is")) FailHere("two tests with \"is\" in a row; put the first in brackets");
      test->arguments.positional.push_back(Postfix(Primary()));
    }
    return negated ? New(Kind::kNot, line, {test}) : test;
  }

  std::string_view file_;
  std::vector<Token> tokens_;
  Syntax syntax_;
  size_t at_ = 0;
  int nesting_ = 0;
  int loops_ = 0;                   // loops around, inside the innermost macro
  std::vector<Statement*> macros_;  // those around
};

}  // namespace

Syntax Parse(std::string_view text, std::string_view file) { return Parser(text, file).Run(); }

}  // namespace circlet::jinja
