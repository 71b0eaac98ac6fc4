#pragma once

#include <deque>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "preprocess/jinja/value.h"

namespace circlet::jinja {

enum class TokenKind : uint8_t {
  kData,  // text between tags
  kOutputBegin,
  kOutputEnd,
  kTagBegin,
  kTagEnd,
  kName,
  kString,  // unescaped
  kInteger,
  kFloat,
  kOperator,
  kEnd,
};

struct Token {
  TokenKind kind;
  std::string text;
  int line;
};

// Tokens of a template as jinja2 reads it with trim_blocks and lstrip_blocks, kEnd last. Throws Error "`file`:LINE:
// ...".
std::vector<Token> Tokenize(std::string_view text, std::string_view file);

struct Expression;

struct Arguments {
  std::vector<const Expression*> positional;
  std::vector<std::pair<std::string, const Expression*>> named;
  const Expression* rest = nullptr;        // *rest
  const Expression* rest_named = nullptr;  // **rest_named
};

struct Expression {
  enum class Kind : uint8_t {
    kConstant,     // constant
    kName,         // name
    kTuple,        // parts
    kList,         // parts
    kDict,         // parts: key, value, key, value ...
    kAttribute,    // parts[0].name
    kItem,         // parts[0][parts[1]]
    kSlice,        // parts: start, stop, step; null = not given
    kCall,         // parts[0](arguments)
    kFilter,       // parts[0] | name(arguments); parts[0] is null for the text of a block
    kTest,         // parts[0] is name(arguments)
    kNot,          // parts[0]
    kSign,         // name parts[0]
    kArithmetic,   // parts[0] name parts[1]
    kConcat,       // parts joined by ~
    kCompare,      // parts[0] operators[0] parts[1] operators[1] parts[2] ...
    kAnd,          // parts[0], parts[1]
    kOr,           // parts[0], parts[1]
    kConditional,  // parts[0] if parts[1] else parts[2]; parts[2] may be null
  };
  Kind kind;
  int line;
  std::string name;
  Value constant;
  std::vector<const Expression*> parts;
  std::vector<std::string> operators;
  Arguments arguments;
};

struct Statement;
using Body = std::vector<const Statement*>;

struct Branch {
  const Expression* test;
  Body body;
};

struct Parameter {
  std::string name;
  const Expression* fallback;  // null = none
};

struct Statement {
  enum class Kind : uint8_t {
    kText,         // text
    kOutput,       // value
    kIf,           // branches, other
    kFor,          // for target in value if test: body, else other
    kSet,          // target = value
    kSetBlock,     // target = text of body, through the filters `value`
    kMacro,        // name(parameters): body
    kCall,         // call(parameters) value: body
    kFilterBlock,  // text of body through the filters `value`
    kWith,         // targets = values: body
    kGeneration,   // body
    kBreak,
    kContinue,
  };
  Kind kind;
  int line;
  std::string name, text;
  const Expression* target = nullptr;  // kName, kTuple of targets, or kAttribute of a kName (a namespace's member)
  const Expression* value = nullptr;
  const Expression* test = nullptr;
  bool recursive = false;
  std::vector<Branch> branches;
  std::vector<std::pair<const Expression*, const Expression*>> assignments;  // kWith
  std::vector<Parameter> parameters;
  bool uses_caller = false, uses_varargs = false, uses_kwargs = false;  // in the body of a macro or call
  Body body, other;
};

// The nodes of a template; they point at each other.
struct Syntax {
  std::deque<Expression> expressions;
  std::deque<Statement> statements;
  Body body;
};

// Throws Error "`file`:LINE: ..." for what is no template, and for a tag that circlet does not know.
Syntax Parse(std::string_view text, std::string_view file);

}  // namespace circlet::jinja
