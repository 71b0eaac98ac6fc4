#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "preprocess/jinja/syntax.h"

namespace circlet::jinja {

// Names of a block; those around it are visible and never changed from inside.
struct Scope {
  std::shared_ptr<Scope> parent;
  std::vector<std::pair<std::string, Value>> names;

  const Value* Find(std::string_view name) const;
  void Set(std::string_view name, Value value);
};

// The variable `loop`, and the walk over the items.
struct Loop {
  std::vector<Value> items;                  // all, or those that follow `at`
  std::function<bool(const Value&)> filter;  // the loop's "if"; asked for one item at a time
  size_t at = 0;
  int64_t index0 = -1;
  std::optional<Value> after;  // the next item, when it was asked for
  std::optional<Value> current, before;
  std::optional<std::vector<Value>> changed;
  std::optional<int64_t> length;
  int64_t depth0 = 0;
  bool runs = true;                      // its body is being run
  int depth = 1;                         // Value::Depth
  const Statement* recursive = nullptr;  // what loop(items) runs again
  std::shared_ptr<Scope> scope;          // around it

  bool Next();
  const std::optional<Value>& Peek();
  int64_t Length();

 private:
  std::optional<Value> Fetch();
};

struct CallArguments {
  std::vector<Value> positional;
  std::vector<std::pair<std::string, Value>> named;
};

// Something that can be called.
struct Callable {
  enum class Kind : uint8_t {
    kFunction,  // of the language, `name`
    kMethod,    // `name` of `self`
    kMacro,
    kJoiner,  // gives nothing the first time, then `self`
  };
  Kind kind;
  std::string name;
  Value self;
  const Statement* macro = nullptr;
  std::shared_ptr<Scope> scope;
  mutable bool called = false;
  int depth = 1;
};

// The arguments of a filter, test, function or method, by position or name.
class Parameters {
 public:
  // Throws Error "`who`: ..." for one too many or with another name.
  Parameters(std::string_view who, const CallArguments& arguments, std::initializer_list<std::string_view> names);

  bool Has(size_t i) const { return values_[i].has_value(); }
  // None and what is not given are the same.
  bool HasValue(size_t i) const { return Has(i) && !values_[i]->IsNone(); }
  const Value& At(size_t i) const;  // required
  Value Or(size_t i, Value fallback) const { return Has(i) ? *values_[i] : std::move(fallback); }
  int64_t Int(size_t i, std::optional<int64_t> fallback = std::nullopt) const;
  std::optional<int64_t> OptionalInt(size_t i) const;
  bool Bool(size_t i, bool fallback) const { return Has(i) ? Truth(*values_[i]) : fallback; }
  const std::string& String(size_t i) const;
  std::optional<std::string> OptionalString(size_t i) const;

 private:
  std::string who_;
  std::vector<std::string> names_;
  std::vector<std::optional<Value>> values_;
};

class Evaluator {
 public:
  Evaluator(const Syntax& syntax, const Limits& limits, int64_t now);
  ~Evaluator();
  Evaluator(const Evaluator&) = delete;

  std::string Run(std::vector<std::pair<std::string, Value>> variables);
  int Line() const { return line_; }                          // of what is evaluated
  std::optional<int> DateLine() const { return date_line_; }  // where the date was asked for

  // For filters, tests and methods.
  Meter& GetMeter() { return meter_; }
  Value Item(const Value& object, const Value& key);
  Value Attribute(const Value& object, std::string_view name);
  Value Filter(std::string_view name, const Value& value, const CallArguments& arguments);
  bool Test(std::string_view name, const Value& value, const CallArguments& arguments);
  Value String(std::string text, bool safe = false) { return MakeText(std::move(text), meter_, safe); }
  Value Arithmetic(std::string_view sign, const Value& a, const Value& b);

 private:
  enum class Flow : uint8_t { kNext, kBreak, kContinue };
  using ScopePointer = std::shared_ptr<Scope>;

  ScopePointer Inner(const ScopePointer& scope);
  Flow Execute(const Body& body, const ScopePointer& scope);
  Flow Execute(const Statement& statement, const ScopePointer& scope);
  // What the body writes; without a value when a loop is left on the way.
  std::optional<std::string> Captured(const Body& body, const ScopePointer& scope, Flow& flow);
  Flow RunLoop(const Statement& statement, const Value& items, const ScopePointer& scope, int64_t depth0);
  void Assign(const Expression& target, const Value& value, const ScopePointer& scope);
  Value MakeMacro(const Statement& statement, const ScopePointer& scope);
  void Write(const Value& value);
  void Write(std::string_view text);

  Value Evaluate(const Expression& expression, const ScopePointer& scope);
  Value EvaluateKind(const Expression& expression, const ScopePointer& scope);
  Value Name(const Expression& expression, const ScopePointer& scope);
  Value MakeDictOf(const Expression& expression, const ScopePointer& scope);
  Value Slice(const Value& object, const Expression& slice, const ScopePointer& scope);
  Value Sign(const Expression& expression, const ScopePointer& scope);
  bool Compare(std::string_view sign, const Value& a, const Value& b);
  CallArguments EvaluateArguments(const Arguments& arguments, const ScopePointer& scope);
  std::vector<Value> EvaluateAll(const std::vector<const Expression*>& parts, const ScopePointer& scope);
  // `block`: the text that a filter without an operand works on.
  Value Filtered(const Expression& expression, const std::optional<Value>& block, const ScopePointer& scope);

  Value Call(const Value& function, const CallArguments& arguments);
  Value CallMacro(const Callable& macro, const CallArguments& arguments);
  Value CallFunction(std::string_view name, const CallArguments& arguments);
  Value CallRecursive(Loop& loop, const CallArguments& arguments);
  Value LoopAttribute(const Value& value, std::string_view name);
  Value MakeNamespace(const CallArguments& arguments);
  Value Range(const CallArguments& arguments);
  Value Now(const CallArguments& arguments);
  Value Repeat(const Value& value, int64_t count);

  const Syntax& syntax_;
  Meter meter_;
  int64_t now_;
  int line_ = 1;
  std::optional<int> date_line_;
  std::string* out_ = nullptr;
  // What may hold itself is emptied at the end: namespaces, and scopes that a macro or a loop refers to.
  std::vector<std::shared_ptr<Namespace>> namespaces_;
  std::vector<ScopePointer> kept_scopes_;
};

// A method of str, dict, list or tuple. Unsafe or unknown names give no value; a method of Python that circlet does not
// have is an Error.
std::optional<Value> FindMethod(const Value& self, std::string_view name, Meter& meter);
Value CallMethod(const Value& self, std::string_view name, const CallArguments& arguments, Evaluator& evaluator);

// Python's `format % values` and format.format(...).
std::string PercentFormat(const std::string& format, const Value& values, Meter& meter);
std::string BraceFormat(const std::string& format, const CallArguments& arguments, Evaluator& evaluator);

}  // namespace circlet::jinja
