#include "preprocess/jinja/evaluator.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <ctime>

#include "circlet/base/error.h"
#include "preprocess/jinja/text.h"

namespace circlet::jinja {
namespace {

using Kind = Expression::Kind;
using Tag = Statement::Kind;

constexpr std::array<std::string_view, 6> kFunctions{"range",           "dict",         "namespace",
                                                     "raise_exception", "strftime_now", "joiner"};
constexpr int64_t kRangeLimit = 100'000;  // as in jinja2's sandbox

std::vector<Value> Rest(const std::vector<Value>& values, size_t from) {
  return {values.begin() + static_cast<std::ptrdiff_t>(std::min(from, values.size())), values.end()};
}

// The items `start`, `start` + step ... that Python's slice of `length` items takes.
std::vector<size_t> SliceIndices(int64_t length, std::optional<int64_t> start, std::optional<int64_t> stop,
                                 int64_t step) {
  if (step == 0) Fail("a slice with step 0");
  const auto clamp = [&](int64_t index) {
    if (index < 0) index = std::max<int64_t>(index + length, step < 0 ? -1 : 0);
    return std::min(index, step < 0 ? length - 1 : length);
  };
  int64_t at = start ? clamp(std::max(*start, -length - 1)) : step < 0 ? length - 1 : 0;
  const int64_t end = stop ? clamp(std::max(*stop, -length - 1)) : step < 0 ? -1 : length;
  step = std::clamp(step, -length - 1, length + 1);
  std::vector<size_t> indices;
  for (; step < 0 ? at > end : at < end; at += step) indices.push_back(static_cast<size_t>(at));
  return indices;
}

}  // namespace

const Value* Scope::Find(std::string_view name) const {
  for (const Scope* scope = this; scope != nullptr; scope = scope->parent.get())
    for (const auto& [key, value] : scope->names)
      if (key == name) return &value;
  return nullptr;
}

void Scope::Set(std::string_view name, Value value) {
  for (auto& [key, old] : names) {
    if (key != name) continue;
    old = std::move(value);
    return;
  }
  names.emplace_back(name, std::move(value));
}

std::optional<Value> Loop::Fetch() {
  while (at < items.size()) {
    const Value item = items[at++];
    if (!filter || filter(item)) return item;
  }
  return std::nullopt;
}

bool Loop::Next() {
  std::optional<Value> item = after ? std::exchange(after, std::nullopt) : Fetch();
  if (!item) return false;
  ++index0;
  before = std::move(current);
  current = std::move(item);
  return true;
}

const std::optional<Value>& Loop::Peek() {
  if (!after) after = Fetch();
  return after;
}

int64_t Loop::Length() {
  if (length) return *length;
  std::vector<Value> left;
  while (std::optional<Value> item = Fetch()) left.push_back(std::move(*item));
  length = static_cast<int64_t>(left.size()) + index0 + 1 + (after ? 1 : 0);
  items = std::move(left);
  at = 0;
  filter = nullptr;
  return *length;
}

Parameters::Parameters(std::string_view who, const CallArguments& arguments,
                       std::initializer_list<std::string_view> names)
    : who_(who), names_(names.begin(), names.end()), values_(names.size()) {
  if (arguments.positional.size() > names_.size())
    Fail("{}: {} arguments are too many; it takes {}", who, arguments.positional.size(), names_.size());
  for (size_t i = 0; i < arguments.positional.size(); ++i) values_[i] = arguments.positional[i];
  for (const auto& [name, value] : arguments.named) {
    const auto found = std::ranges::find(names_, name);
    if (found == names_.end()) Fail("{}: no argument is called \"{}\"", who, name);
    std::optional<Value>& slot = values_[static_cast<size_t>(found - names_.begin())];
    if (slot) Fail("{}: the argument \"{}\" is given twice", who, name);
    slot = value;
  }
}

const Value& Parameters::At(size_t i) const {
  if (!values_[i]) Fail("{}: the argument \"{}\" is missing", who_, names_[i]);
  return *values_[i];
}

int64_t Parameters::Int(size_t i, std::optional<int64_t> fallback) const {
  if (!Has(i) && fallback) return *fallback;
  RequireDefined(At(i));
  const std::optional<int64_t> integer = At(i).Integer();
  if (!integer) Fail("{}: {}: expected an integer, found a value of type {}", who_, names_[i], At(i).TypeName());
  return *integer;
}

std::optional<int64_t> Parameters::OptionalInt(size_t i) const {
  return HasValue(i) ? std::optional(Int(i)) : std::nullopt;
}

const std::string& Parameters::String(size_t i) const {
  RequireDefined(At(i));
  const std::string* text = At(i).AsText();
  if (text == nullptr) Fail("{}: {}: expected a text, found a value of type {}", who_, names_[i], At(i).TypeName());
  return *text;
}

std::optional<std::string> Parameters::OptionalString(size_t i) const {
  return HasValue(i) ? std::optional(String(i)) : std::nullopt;
}

Evaluator::Evaluator(const Syntax& syntax, const Limits& limits, int64_t now)
    : syntax_(syntax), meter_(limits), now_(now) {}

Evaluator::~Evaluator() {
  for (const auto& each : namespaces_) each->members.clear();
  for (const auto& scope : kept_scopes_) scope->names.clear();
}

std::string Evaluator::Run(std::vector<std::pair<std::string, Value>> variables) {
  const auto root = std::make_shared<Scope>();
  kept_scopes_.push_back(root);
  root->names = std::move(variables);
  std::string text;
  out_ = &text;
  Execute(syntax_.body, root);
  return text;
}

Evaluator::ScopePointer Evaluator::Inner(const ScopePointer& scope) {
  meter_.Bytes(128);
  auto inner = std::make_shared<Scope>();
  inner->parent = scope;
  return inner;
}

void Evaluator::Write(std::string_view text) {
  meter_.Bytes(static_cast<int64_t>(text.size()));
  *out_ += text;
}

void Evaluator::Write(const Value& value) {
  if (const std::string* text = value.AsText()) return Write(*text);
  if (value.AsUndefined() == nullptr) Write(Str(value, meter_));
}

Evaluator::Flow Evaluator::Execute(const Body& body, const ScopePointer& scope) {
  for (const Statement* statement : body)
    if (const Flow flow = Execute(*statement, scope); flow != Flow::kNext) return flow;
  return Flow::kNext;
}

Evaluator::Flow Evaluator::Execute(const Statement& statement, const ScopePointer& scope) {
  line_ = statement.line;
  meter_.Step();
  meter_.Enter();
  Flow flow = Flow::kNext;
  switch (statement.kind) {
    case Tag::kText:
      Write(statement.text);
      break;
    case Tag::kOutput:
      Write(Evaluate(*statement.value, scope));
      break;
    case Tag::kIf: {
      const auto branch = std::ranges::find_if(statement.branches,
                                               [&](const Branch& each) { return Truth(Evaluate(*each.test, scope)); });
      flow = Execute(branch == statement.branches.end() ? statement.other : branch->body, scope);
      break;
    }
    case Tag::kFor:
      flow = RunLoop(statement, Evaluate(*statement.value, scope), scope, 0);
      break;
    case Tag::kSet:
      Assign(*statement.target, Evaluate(*statement.value, scope), scope);
      break;
    case Tag::kSetBlock:
      if (std::optional<std::string> text = Captured(statement.body, Inner(scope), flow)) {
        Value value = String(std::move(*text));
        if (statement.value != nullptr) value = Filtered(*statement.value, value, scope);
        Assign(*statement.target, value, scope);
      }
      break;
    case Tag::kFilterBlock:
      if (std::optional<std::string> text = Captured(statement.body, Inner(scope), flow))
        Write(Filtered(*statement.value, String(std::move(*text)), scope));
      break;
    case Tag::kMacro:
      scope->Set(statement.name, MakeMacro(statement, scope));
      break;
    case Tag::kCall: {
      const Value function = Evaluate(*statement.value->parts[0], scope);
      CallArguments arguments = EvaluateArguments(statement.value->arguments, scope);
      arguments.named.emplace_back("caller", MakeMacro(statement, scope));
      Write(Call(function, arguments));
      break;
    }
    case Tag::kWith: {
      const ScopePointer inner = Inner(scope);
      for (const auto& [target, value] : statement.assignments) Assign(*target, Evaluate(*value, scope), inner);
      flow = Execute(statement.body, inner);
      break;
    }
    case Tag::kGeneration:
      flow = Execute(statement.body, Inner(scope));
      break;
    case Tag::kBreak:
      flow = Flow::kBreak;
      break;
    case Tag::kContinue:
      flow = Flow::kContinue;
      break;
  }
  meter_.Leave();
  return flow;
}

std::optional<std::string> Evaluator::Captured(const Body& body, const ScopePointer& scope, Flow& flow) {
  std::string text;
  std::string* const outer = std::exchange(out_, &text);
  flow = Execute(body, scope);
  out_ = outer;
  if (flow != Flow::kNext) return std::nullopt;
  return text;
}

Evaluator::Flow Evaluator::RunLoop(const Statement& statement, const Value& items, const ScopePointer& scope,
                                   int64_t depth0) {
  const auto loop = std::make_shared<Loop>();
  loop->items = Items(items, meter_);
  loop->depth = std::max(1, items.Depth() + 1);
  CheckDepth(loop->depth);
  loop->depth0 = depth0;
  if (statement.recursive) {
    loop->recursive = &statement;
    loop->scope = scope;
    kept_scopes_.push_back(scope);
  }
  if (statement.test != nullptr) {
    loop->filter = [&](const Value& item) {
      const ScopePointer inner = Inner(scope);
      Assign(*statement.target, item, inner);
      return Truth(Evaluate(*statement.test, inner));
    };
  } else {
    loop->length = static_cast<int64_t>(loop->items.size());
  }
  struct End {  // the filter's captures end here, and what loop.changed() keeps might be the loop itself
    Loop& loop;
    ~End() {
      if (loop.filter) loop.items.clear();
      loop.filter = nullptr;
      loop.changed.reset();
      loop.runs = false;
    }
  } const end{*loop};
  bool completed = false;  // jinja2 takes the "else" also when every round was left by break or continue
  while (loop->Next()) {
    meter_.Step();
    const ScopePointer inner = Inner(scope);
    inner->Set("loop", Value(loop));
    Assign(*statement.target, *loop->current, inner);
    const Flow flow = Execute(statement.body, inner);
    completed |= flow == Flow::kNext;
    if (flow == Flow::kBreak) break;
  }
  return completed ? Flow::kNext : Execute(statement.other, Inner(scope));
}

void Evaluator::Assign(const Expression& target, const Value& value, const ScopePointer& scope) {
  if (target.kind == Kind::kName) return scope->Set(target.name, value);
  if (target.kind == Kind::kTuple) {
    const std::vector<Value> items = (RequireDefined(value), Items(value, meter_));
    if (items.size() != target.parts.size()) Fail("{} values for {} names", items.size(), target.parts.size());
    for (size_t i = 0; i < items.size(); ++i) Assign(*target.parts[i], items[i], scope);
    return;
  }
  const std::string& name = target.parts[0]->name;
  const Value* holder = scope->Find(name);
  Namespace* space = holder != nullptr ? holder->AsNamespace() : nullptr;
  if (space == nullptr) Fail("\"{}.{}\" cannot be set: \"{}\" is no namespace", name, target.name, name);
  if (target.name.starts_with('_'))
    Fail("a namespace takes no name that begins with an underscore (\"{}\")", target.name);
  meter_.Step();
  for (auto& [key, old] : space->members) {
    if (key != target.name) continue;
    old = value;
    return;
  }
  space->members.emplace_back(target.name, value);
}

Value Evaluator::MakeMacro(const Statement& statement, const ScopePointer& scope) {
  meter_.Bytes(256);
  kept_scopes_.push_back(scope);
  return Value(std::make_shared<const Callable>(
      Callable{.kind = Callable::Kind::kMacro, .name = statement.name, .macro = &statement, .scope = scope}));
}

Value Evaluator::Evaluate(const Expression& expression, const ScopePointer& scope) {
  const int outer = std::exchange(line_, expression.line);
  meter_.Step();
  meter_.Enter();
  Value value = EvaluateKind(expression, scope);
  meter_.Leave();
  line_ = outer;
  return value;
}

std::vector<Value> Evaluator::EvaluateAll(const std::vector<const Expression*>& parts, const ScopePointer& scope) {
  std::vector<Value> values;
  for (const Expression* part : parts) values.push_back(Evaluate(*part, scope));
  return values;
}

Value Evaluator::EvaluateKind(const Expression& expression, const ScopePointer& scope) {
  const auto part = [&](size_t i) { return Evaluate(*expression.parts[i], scope); };
  switch (expression.kind) {
    case Kind::kConstant:
      return expression.constant;
    case Kind::kName:
      return Name(expression, scope);
    case Kind::kTuple:
      return MakeTuple(EvaluateAll(expression.parts, scope), meter_);
    case Kind::kList:
      return MakeList(EvaluateAll(expression.parts, scope), meter_);
    case Kind::kDict:
      return MakeDictOf(expression, scope);
    case Kind::kAttribute:
      return Attribute(part(0), expression.name);
    case Kind::kItem: {
      const Value object = part(0);
      const Expression& key = *expression.parts[1];
      return key.kind == Kind::kSlice ? Slice(object, key, scope) : Item(object, Evaluate(key, scope));
    }
    case Kind::kSlice:
      Fail("a slice beside another index is not supported");
    case Kind::kCall: {
      const Value function = part(0);
      return Call(function, EvaluateArguments(expression.arguments, scope));
    }
    case Kind::kFilter:
      return Filtered(expression, std::nullopt, scope);
    case Kind::kTest: {
      const Value value = part(0);
      return Test(expression.name, value, EvaluateArguments(expression.arguments, scope));
    }
    case Kind::kNot:
      return !Truth(part(0));
    case Kind::kSign:
      return Sign(expression, scope);
    case Kind::kArithmetic: {
      const Value a = part(0);
      return Arithmetic(expression.name, a, part(1));
    }
    case Kind::kConcat: {
      std::string text;
      for (const Value& value : EvaluateAll(expression.parts, scope)) text += Str(value, meter_);
      return String(std::move(text));
    }
    case Kind::kCompare: {
      Value a = part(0);
      for (size_t i = 0; i < expression.operators.size(); ++i) {
        const Value b = part(i + 1);
        if (!Compare(expression.operators[i], a, b)) return false;
        a = b;
      }
      return true;
    }
    case Kind::kAnd: {
      const Value a = part(0);
      return Truth(a) ? part(1) : a;
    }
    case Kind::kOr: {
      const Value a = part(0);
      return Truth(a) ? a : part(1);
    }
    case Kind::kConditional:
      if (Truth(part(1))) return part(0);
      if (expression.parts[2] != nullptr) return part(2);
      return Value::MakeUndefined("the condition does not hold, and there is no \"else\"");
  }
  return {};
}

Value Evaluator::Name(const Expression& expression, const ScopePointer& scope) {
  if (const Value* value = scope->Find(expression.name)) return *value;
  if (std::ranges::find(kFunctions, expression.name) != kFunctions.end())
    return Value(
        std::make_shared<const Callable>(Callable{.kind = Callable::Kind::kFunction, .name = expression.name}));
  if (expression.name == "cycler" || expression.name == "lipsum" || expression.name == "self")
    Fail("\"{}\" is not supported", expression.name);
  return Value::MakeUndefined(fmt::format("\"{}\" is undefined", expression.name));
}

Value Evaluator::MakeDictOf(const Expression& expression, const ScopePointer& scope) {
  Dict dict;
  for (size_t i = 0; i < expression.parts.size(); i += 2) {
    const Value key = Evaluate(*expression.parts[i], scope);
    dict.Set(key, Evaluate(*expression.parts[i + 1], scope));
  }
  return MakeDict(std::move(dict), meter_);
}

Value Evaluator::Slice(const Value& object, const Expression& slice, const ScopePointer& scope) {
  std::optional<int64_t> bounds[3];
  for (size_t i = 0; i < 3; ++i) {
    if (slice.parts[i] == nullptr) continue;
    const Value bound = Evaluate(*slice.parts[i], scope);
    RequireDefined(bound);
    if (bound.IsNone()) continue;
    bounds[i] = bound.Integer();
    if (!bounds[i]) Fail("a slice from or to a value of type {}", bound.TypeName());
  }
  RequireDefined(object);
  const Sequence* sequence = object.AsSequence();
  const std::string* text = object.AsText();
  if (text == nullptr && (sequence == nullptr || !sequence->HasIndex()))
    Fail("a value of type {} has no slices", object.TypeName());
  const auto indices = [&](size_t length) {
    return SliceIndices(static_cast<int64_t>(length), bounds[0], bounds[1], bounds[2].value_or(1));
  };
  if (text != nullptr) {
    meter_.Bytes(static_cast<int64_t>(text->size()), 16);
    const std::vector<std::string_view> characters = Characters(*text);
    std::string part;
    for (const size_t i : indices(characters.size())) part += characters[i];
    return String(std::move(part), object.IsSafe());
  }
  std::vector<Value> items;
  for (const size_t i : indices(sequence->items.size())) items.push_back(sequence->items[i]);
  return MakeSequence(std::move(items), sequence->IsTuple() ? Sequence::Form::kTuple : Sequence::Form::kList, meter_);
}

Value Evaluator::Sign(const Expression& expression, const ScopePointer& scope) {
  const Value value = Evaluate(*expression.parts[0], scope);
  RequireDefined(value);
  if (const std::optional<int64_t> integer = value.Integer()) {
    if (*integer == INT64_MIN) Fail("the result does not fit in 64 bits");
    return expression.name == "-" ? -*integer : *integer;
  }
  if (const double* number = value.AsFloat()) return expression.name == "-" ? -*number : *number;
  Fail("{} before a value of type {}", expression.name, value.TypeName());
}

bool Evaluator::Compare(std::string_view sign, const Value& a, const Value& b) {
  if (sign == "==") return Equal(a, b, meter_);
  if (sign == "!=") return !Equal(a, b, meter_);
  if (sign == "in") return Contains(b, a, meter_);
  if (sign == "not in") return !Contains(b, a, meter_);
  const std::optional<double> x = a.Number(), y = b.Number();
  if (x && y && (std::isnan(*x) || std::isnan(*y))) return false;
  if (sign == "<") return Less(a, b, sign, meter_);
  if (sign == ">") return Less(b, a, sign, meter_);
  return sign == "<=" ? !Less(b, a, sign, meter_) : !Less(a, b, sign, meter_);
}

CallArguments Evaluator::EvaluateArguments(const Arguments& arguments, const ScopePointer& scope) {
  CallArguments values{.positional = EvaluateAll(arguments.positional, scope)};
  if (arguments.rest != nullptr) {
    for (Value& item : Items(Evaluate(*arguments.rest, scope), meter_)) values.positional.push_back(std::move(item));
  }
  for (const auto& [name, value] : arguments.named) values.named.emplace_back(name, Evaluate(*value, scope));
  if (arguments.rest_named != nullptr) {
    const Value more = Evaluate(*arguments.rest_named, scope);
    const Dict* dict = more.AsDict();
    if (dict == nullptr) Fail("** needs a dict, found a value of type {}", more.TypeName());
    for (const auto& [key, value] : dict->Entries()) {
      if (key.AsText() == nullptr) Fail("** of a dict with a key that is no text");
      values.named.emplace_back(*key.AsText(), value);
    }
  }
  for (size_t i = 0; i < values.named.size(); ++i)
    for (size_t k = 0; k < i; ++k)
      if (values.named[i].first == values.named[k].first)
        Fail("the argument \"{}\" is given twice", values.named[i].first);
  return values;
}

Value Evaluator::Filtered(const Expression& expression, const std::optional<Value>& block, const ScopePointer& scope) {
  const Expression* operand = expression.parts[0];
  const Value value = operand == nullptr                        ? *block
                      : operand->kind == Kind::kFilter && block ? Filtered(*operand, block, scope)
                                                                : Evaluate(*operand, scope);
  const int outer = std::exchange(line_, expression.line);
  const CallArguments arguments = EvaluateArguments(expression.arguments, scope);
  Value result = Filter(expression.name, value, arguments);
  line_ = outer;
  return result;
}

Value Evaluator::Item(const Value& object, const Value& key) {
  RequireDefined(object);
  const std::optional<int64_t> index = key.Integer();
  if (const Dict* dict = object.AsDict()) {
    const bool hashable = key.AsUndefined() == nullptr && key.AsDict() == nullptr &&
                          (key.AsSequence() == nullptr || key.AsSequence()->IsTuple());
    if (const Value* value = hashable ? dict->Find(key) : nullptr) return *value;
  } else if (const std::string* text = object.AsText(); text != nullptr && index) {
    meter_.Step(1 + static_cast<int64_t>(text->size() / 16));
    int64_t left = *index < 0 ? *index + CharacterCount(*text) : *index;
    std::string_view rest = *text;
    for (; left > 0 && !rest.empty(); --left) rest.remove_prefix(FirstCharacter(rest).size());
    if (left == 0 && !rest.empty()) return String(std::string(FirstCharacter(rest)));
  } else if (const Sequence* sequence = object.AsSequence(); sequence != nullptr && sequence->HasIndex() && index) {
    const int64_t size = static_cast<int64_t>(sequence->items.size());
    const int64_t at = *index < 0 ? *index + size : *index;
    if (at >= 0 && at < size) return sequence->items[static_cast<size_t>(at)];
  }
  if (const std::string* name = key.AsText()) {
    if (object.AsDict() == nullptr) return Attribute(object, *name);
    if (std::optional<Value> method = FindMethod(object, *name, meter_)) return *method;
    return Value::MakeUndefined(fmt::format("the dict has no key \"{}\"", *name));
  }
  return Value::MakeUndefined(fmt::format("a value of type {} has no element {}", object.TypeName(),
                                          index ? std::to_string(*index) : std::string(key.TypeName())));
}

Value Evaluator::Attribute(const Value& object, std::string_view name) {
  RequireDefined(object);
  const auto none = [&](std::string_view what) {
    return Value::MakeUndefined(fmt::format("a value of type {} {} \"{}\"", object.TypeName(), what, name));
  };
  if (const Namespace* space = object.AsNamespace()) {
    for (const auto& [key, value] : space->members)
      if (key == name) return value;
    return none("has no member");
  }
  if (object.AsLoop() != nullptr) return LoopAttribute(object, name);
  if (object.AsCallable() != nullptr) Fail("members of functions are not supported (\"{}\")", name);
  if (name.starts_with("__") && name.ends_with("__")) return none("does not show");
  if (const Sequence* sequence = object.AsSequence(); sequence != nullptr && sequence->form == Sequence::Form::kGroup) {
    if (name == "grouper") return sequence->items[0];
    if (name == "list") return sequence->items[1];
  }
  if (std::optional<Value> method = FindMethod(object, name, meter_)) return *method;
  if (const Dict* dict = object.AsDict())
    if (const Value* value = dict->Find(name)) return *value;
  return none("has no member");
}

Value Evaluator::LoopAttribute(const Value& value, std::string_view name) {
  Loop& loop = *value.AsLoop();
  if (name == "index") return loop.index0 + 1;
  if (name == "index0") return loop.index0;
  if (name == "revindex") return loop.Length() - loop.index0;
  if (name == "revindex0") return loop.Length() - loop.index0 - 1;
  if (name == "first") return loop.index0 == 0;
  if (name == "last") return !loop.Peek().has_value();
  if (name == "length") return loop.Length();
  if (name == "depth") return loop.depth0 + 1;
  if (name == "depth0") return loop.depth0;
  if (name == "previtem") return loop.before ? *loop.before : Value::MakeUndefined("there is no previous item");
  if (name == "nextitem") return loop.Peek() ? *loop.Peek() : Value::MakeUndefined("there is no next item");
  if (name == "cycle" || name == "changed") {
    return Value(std::make_shared<const Callable>(Callable{
        .kind = Callable::Kind::kMethod, .name = std::string(name), .self = value, .depth = value.Depth() + 1}));
  }
  return Value::MakeUndefined(fmt::format("a loop has no member \"{}\"", name));
}

Value Evaluator::Call(const Value& function, const CallArguments& arguments) {
  RequireDefined(function);
  if (Loop* loop = function.AsLoop()) return CallRecursive(*loop, arguments);
  const Callable* callable = function.AsCallable();
  if (callable == nullptr) Fail("a value of type {} cannot be called", function.TypeName());
  switch (callable->kind) {
    case Callable::Kind::kMacro:
      return CallMacro(*callable, arguments);
    case Callable::Kind::kMethod:
      return CallMethod(callable->self, callable->name, arguments, *this);
    case Callable::Kind::kJoiner:
      if (callable->called) return callable->self;
      callable->called = true;
      return String({});
    case Callable::Kind::kFunction:
      break;
  }
  return CallFunction(callable->name, arguments);
}

Value Evaluator::CallMacro(const Callable& callable, const CallArguments& arguments) {
  const Statement& macro = *callable.macro;
  const ScopePointer scope = Inner(callable.scope);
  std::vector<std::pair<std::string, Value>> named = arguments.named;
  const auto take = [&](std::string_view name) -> std::optional<Value> {
    const auto found = std::ranges::find(named, name, &std::pair<std::string, Value>::first);
    if (found == named.end()) return std::nullopt;
    Value value = found->second;
    named.erase(found);
    return value;
  };
  const size_t given = std::min(arguments.positional.size(), macro.parameters.size());
  for (size_t i = 0; i < macro.parameters.size(); ++i) {
    const Parameter& parameter = macro.parameters[i];
    std::optional<Value> value = i < given ? std::optional(arguments.positional[i]) : take(parameter.name);
    if (!value && parameter.fallback != nullptr) value = Evaluate(*parameter.fallback, scope);
    if (!value) value = Value::MakeUndefined(fmt::format("the parameter \"{}\" was not given", parameter.name));
    scope->Set(parameter.name, *value);
  }
  if (macro.uses_caller && std::ranges::find(macro.parameters, "caller", &Parameter::name) == macro.parameters.end())
    scope->Set("caller", take("caller").value_or(Value::MakeUndefined("the macro was not called by a \"call\" block")));
  if (macro.uses_kwargs) {
    Dict rest;
    for (auto& [name, value] : named) rest.Set(name, value);
    scope->Set("kwargs", MakeDict(std::move(rest), meter_));
  } else if (!named.empty()) {
    Fail("the macro \"{}\" has no parameter \"{}\"", callable.name, named[0].first);
  }
  if (macro.uses_varargs)
    scope->Set("varargs", MakeTuple(Rest(arguments.positional, macro.parameters.size()), meter_));
  else if (arguments.positional.size() > macro.parameters.size())
    Fail("the macro \"{}\" takes {} arguments, found {}", callable.name, macro.parameters.size(),
         arguments.positional.size());
  Flow flow = Flow::kNext;
  const int outer = line_;
  std::string text = Captured(macro.body, scope, flow).value_or("");
  line_ = outer;
  return String(std::move(text));
}

Value Evaluator::CallRecursive(Loop& loop, const CallArguments& arguments) {
  if (loop.recursive == nullptr) Fail("a loop that calls itself needs the word \"recursive\"");
  const Parameters given("loop", arguments, {"items"});
  std::string text;
  std::string* const outer = std::exchange(out_, &text);
  const int line = line_;
  meter_.Enter();
  RunLoop(*loop.recursive, given.At(0), loop.scope, loop.depth0 + 1);
  meter_.Leave();
  line_ = line;
  out_ = outer;
  return String(std::move(text));
}

Value Evaluator::CallFunction(std::string_view name, const CallArguments& arguments) {
  if (name == "range") return Range(arguments);
  if (name == "namespace") return MakeNamespace(arguments);
  if (name == "strftime_now") return Now(arguments);
  if (name == "raise_exception") {
    const Parameters given(name, arguments, {"message"});
    Fail("the template refuses the conversation: {}", Str(given.At(0), meter_));
  }
  if (name == "joiner") {
    const Parameters given(name, arguments, {"sep"});
    const Value separator = given.Or(0, String(", "));
    CheckDepth(separator.Depth() + 1);
    return Value(std::make_shared<const Callable>(Callable{
        .kind = Callable::Kind::kJoiner, .name = "joiner", .self = separator, .depth = separator.Depth() + 1}));
  }
  Dict dict;  // dict(...)
  if (arguments.positional.size() > 1) Fail("dict: {} arguments are too many", arguments.positional.size());
  if (!arguments.positional.empty()) {
    if (const Dict* base = arguments.positional[0].AsDict()) {
      dict = *base;
    } else {
      for (const Value& pair : Items(arguments.positional[0], meter_)) {
        const std::vector<Value> parts = Items(pair, meter_);
        if (parts.size() != 2) Fail("dict: an entry with {} parts; it needs a key and a value", parts.size());
        dict.Set(parts[0], parts[1]);
      }
    }
  }
  for (const auto& [key, value] : arguments.named) dict.Set(key, value);
  return MakeDict(std::move(dict), meter_);
}

Value Evaluator::MakeNamespace(const CallArguments& arguments) {
  const Value values = CallFunction("dict", arguments);
  meter_.Bytes(256);
  const auto space = std::make_shared<Namespace>();
  for (const auto& [key, value] : values.AsDict()->Entries()) {
    if (key.AsText() == nullptr) Fail("namespace: a name of type {}", key.TypeName());
    if (key.AsText()->starts_with('_'))
      Fail("a namespace takes no name that begins with an underscore (\"{}\")", *key.AsText());
    space->members.emplace_back(*key.AsText(), value);
  }
  namespaces_.push_back(space);
  return Value(space);
}

Value Evaluator::Range(const CallArguments& arguments) {
  const Parameters given("range", arguments, {"start", "stop", "step"});
  const int64_t start = given.Has(1) ? given.Int(0) : 0;
  const int64_t stop = given.Has(1) ? given.Int(1) : given.Int(0);
  const int64_t step = given.Int(2, 1);
  if (step == 0) Fail("range: step 0");
  std::vector<Value> items;
  for (__int128 at = start; step > 0 ? at < stop : at > stop; at += step) {
    if (items.size() == kRangeLimit) Fail("range: more than {} numbers", kRangeLimit);
    items.emplace_back(static_cast<int64_t>(at));
  }
  meter_.Bytes(static_cast<int64_t>(items.size()), sizeof(Value));
  Sequence range{.form = Sequence::Form::kRange, .range = {start, stop, step}};
  range.items = std::move(items);
  return Value(std::make_shared<const Sequence>(std::move(range)));
}

Value Evaluator::Now(const CallArguments& arguments) {
  const Parameters given("strftime_now", arguments, {"format"});
  if (!date_line_) date_line_ = line_;
  const std::string& format = given.String(0);
  if (format.empty()) return String({});
  if (format.size() > 256) Fail("strftime_now: a format of {} bytes", format.size());
  const std::time_t now = now_;
  std::tm parts{};
  gmtime_r(&now, &parts);
  char text[8192];
  return String(std::string(text, std::strftime(text, sizeof text, format.c_str(), &parts)));
}

Value Evaluator::Repeat(const Value& value, int64_t count) {
  count = std::max<int64_t>(count, 0);
  if (const std::string* text = value.AsText()) {
    meter_.Bytes(count, static_cast<int64_t>(text->size()));
    std::string out;
    for (int64_t i = 0; i < count && !text->empty(); ++i) out += *text;
    return Value(std::move(out), value.IsSafe());
  }
  const Sequence& sequence = *value.AsSequence();
  meter_.Bytes(count, static_cast<int64_t>(sequence.items.size() * sizeof(Value)));
  std::vector<Value> items;
  for (int64_t i = 0; i < count && !sequence.items.empty(); ++i)
    items.insert(items.end(), sequence.items.begin(), sequence.items.end());
  return MakeSequence(std::move(items), sequence.IsTuple() ? Sequence::Form::kTuple : Sequence::Form::kList, meter_);
}

}  // namespace circlet::jinja
