#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <variant>
#include <vector>

#include "preprocess/jinja/meter.h"

namespace circlet::jinja {

struct Text;
struct Sequence;
class Dict;
struct Namespace;
struct Loop;
struct Callable;

// What a name without a value or a missing attribute gives: prints as nothing, is false and empty; anything else that
// is done with it is an error with this text.
struct Undefined {
  std::shared_ptr<const std::string> why;
};
struct None {};

// A value of the template language, which has Python's values: cheap to copy, and never changed but for a Namespace.
class Value {
 public:
  Value() : data_(None{}) {}
  template <std::same_as<bool> T>  // nothing else becomes a bool on the way
  Value(T value) : data_(value) {}
  Value(int64_t value) : data_(value) {}
  Value(double value) : data_(value) {}
  // `safe`: marked as needing no escapes, as the filters `safe` and `escape` do.
  explicit Value(std::string text, bool safe = false);
  Value(std::shared_ptr<const Sequence> value) : data_(std::move(value)) {}
  Value(std::shared_ptr<const Dict> value) : data_(std::move(value)) {}
  Value(std::shared_ptr<Namespace> value) : data_(std::move(value)) {}
  Value(std::shared_ptr<Loop> value) : data_(std::move(value)) {}
  Value(std::shared_ptr<const Callable> value) : data_(std::move(value)) {}
  static Value MakeUndefined(std::string why);

  template <typename T>
  const T* If() const {
    return std::get_if<T>(&data_);
  }
  const Undefined* AsUndefined() const { return If<Undefined>(); }
  bool IsNone() const { return If<None>() != nullptr; }
  const bool* AsBool() const { return If<bool>(); }
  const int64_t* AsInt() const { return If<int64_t>(); }
  const double* AsFloat() const { return If<double>(); }
  const std::string* AsText() const;
  bool IsSafe() const;
  const Sequence* AsSequence() const { return Get<const Sequence>(); }
  const Dict* AsDict() const { return Get<const Dict>(); }
  Namespace* AsNamespace() const { return Get<Namespace>(); }
  Loop* AsLoop() const { return Get<Loop>(); }
  const Callable* AsCallable() const { return Get<const Callable>(); }

  // A bool or an int; Python's bool is one.
  std::optional<int64_t> Integer() const;
  // A bool, an int or a float.
  std::optional<double> Number() const;
  // How deep containers nest below this value; 0 = none. Bounded, so that walking over values is.
  int Depth() const;
  // Python's name of the type: "str", "NoneType".
  std::string_view TypeName() const;
  // Whether both are one object.
  bool Is(const Value& other) const;

 private:
  template <typename T>
  T* Get() const {
    const auto* pointer = std::get_if<std::shared_ptr<T>>(&data_);
    return pointer != nullptr ? pointer->get() : nullptr;
  }

  std::variant<None, Undefined, bool, int64_t, double, std::shared_ptr<const Text>, std::shared_ptr<const Sequence>,
               std::shared_ptr<const Dict>, std::shared_ptr<Namespace>, std::shared_ptr<Loop>,
               std::shared_ptr<const Callable>>
      data_;
};

struct Text {
  std::string text;
  bool safe = false;
};

// A list, a tuple, or what Python has for one that is made on the way.
struct Sequence {
  enum class Form : uint8_t {
    kList,
    kTuple,
    kGroup,  // a tuple (grouper, list) of `groupby`
    kRange,
    kView,       // keys, values or items of a dict: has a length, no index
    kGenerator,  // what most filters give: can be walked over once
  };
  Form form = Form::kList;
  std::vector<Value> items;
  std::string_view name;        // kView: "dict_keys"; kGenerator: "generator"
  int64_t range[3] = {};        // kRange: start, stop, step
  mutable size_t consumed = 0;  // kGenerator
  int depth = 1;

  bool IsTuple() const { return form == Form::kTuple || form == Form::kGroup; }
  bool HasIndex() const { return IsTuple() || form == Form::kList || form == Form::kRange; }
};

// In the order of insertion. Keys are strings, numbers, None, or tuples of those.
class Dict {
 public:
  const std::vector<std::pair<Value, Value>>& Entries() const { return entries_; }
  // Throws Error for a key that cannot be one.
  const Value* Find(const Value& key) const;
  const Value* Find(std::string_view key) const;
  // Replaces the value of a key that is there.
  void Set(const Value& key, Value value);
  void Set(std::string_view key, Value value) { Set(Value(std::string(key)), std::move(value)); }
  int depth = 1;

 private:
  std::vector<std::pair<Value, Value>> entries_;
  std::unordered_map<std::string, size_t> index_;
};

struct Namespace {
  std::vector<std::pair<std::string, Value>> members;
};

// Throws Error for values nested too deep; JSON ends at kJsonDepthLimit.
void CheckDepth(int depth);
Value MakeSequence(std::vector<Value> items, Sequence::Form form, Meter& meter, std::string_view name = {});
inline Value MakeList(std::vector<Value> items, Meter& meter) {
  return MakeSequence(std::move(items), Sequence::Form::kList, meter);
}
inline Value MakeTuple(std::vector<Value> items, Meter& meter) {
  return MakeSequence(std::move(items), Sequence::Form::kTuple, meter);
}
inline Value MakeGenerator(std::vector<Value> items, Meter& meter, std::string_view name = "generator") {
  return MakeSequence(std::move(items), Sequence::Form::kGenerator, meter, name);
}
Value MakeDict(Dict dict, Meter& meter);
Value MakeText(std::string text, Meter& meter, bool safe = false);

// JSON text as a value, keys in the order of the text. Throws Error for what ParseJson refuses and for an integer past
// 64 bits.
Value FromJson(std::string_view text, Meter& meter);

// Python's rules for values of any kind. Each throws Error where Python raises an exception.
bool Truth(const Value& value);
bool Equal(const Value& a, const Value& b, Meter& meter);
// Negative, 0 or positive; `sign` is the operator for the error text.
bool Less(const Value& a, const Value& b, std::string_view sign, Meter& meter);
bool Contains(const Value& container, const Value& item, Meter& meter);
int64_t Length(const Value& value);
// The items that a loop over the value meets; takes what is left of a generator.
std::vector<Value> Items(const Value& value, Meter& meter);
std::string Str(const Value& value, Meter& meter);   // str(): what is printed
std::string Repr(const Value& value, Meter& meter);  // repr()
std::string FloatText(double value);                 // the shortest digits that read back, in Python's notation
// The error of an undefined value that is used.
[[noreturn]] void FailUndefined(const Undefined& undefined);
void RequireDefined(const Value& value);

struct JsonStyle {
  bool ensure_ascii = false, sort_keys = false;
  std::optional<std::string> indent;
  std::string item_separator = ", ", key_separator = ": ";
};
// json.dumps() of Python.
std::string ToJson(const Value& value, const JsonStyle& style, Meter& meter);

}  // namespace circlet::jinja
