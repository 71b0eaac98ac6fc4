#include "circlet/io/json.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <utility>

#include "circlet/base/error.h"
#include "circlet/io/names.h"
#include "circlet/io/yaml.h"
#include "io/json_line.h"

namespace circlet {
namespace {

using Json = nlohmann::json;

// Walks over the text and tells how far the parser has come, which its events do not.
class TrackingIterator {
 public:
  using iterator_category = std::input_iterator_tag;
  using value_type = char;
  using difference_type = std::ptrdiff_t;
  using pointer = const char*;
  using reference = const char&;

  TrackingIterator(const char* at, size_t* consumed) : at_(at), consumed_(consumed) {}
  reference operator*() const { return *at_; }
  TrackingIterator& operator++() {
    ++at_;
    ++*consumed_;
    return *this;
  }
  bool operator==(const TrackingIterator& other) const { return at_ == other.at_; }
  bool operator!=(const TrackingIterator& other) const { return at_ != other.at_; }

 private:
  const char* at_;
  size_t* consumed_;
};

// Builds the tree; the library's own builder accepts any depth and keeps the last of two equal keys.
class TreeBuilder : public nlohmann::json_sax<Json> {
 public:
  // `first_line`: the number of the text's first line in the file; 0 = the text is the whole file.
  TreeBuilder(std::string_view text, std::string_view file, const size_t* consumed, int64_t first_line)
      : text_(text), file_(file), consumed_(consumed), first_line_(first_line) {}

  Json Take() { return std::move(root_); }

  bool null() override { return Put(nullptr); }
  bool boolean(bool value) override { return Put(value); }
  bool number_integer(number_integer_t value) override { return Put(value); }
  bool number_unsigned(number_unsigned_t value) override { return Put(value); }
  bool number_float(number_float_t value, const string_t&) override { return Put(value); }
  bool string(string_t& value) override {
    Account(static_cast<int64_t>(value.size() + sizeof value));
    return Put(std::move(value));
  }
  bool binary(binary_t&) override { return false; }
  bool start_object(std::size_t) override { return Open(Json::object()); }
  bool start_array(std::size_t) override { return Open(Json::array()); }
  bool end_object() override { return Close(); }
  bool end_array() override { return Close(); }
  bool key(string_t& value) override {
    Account(static_cast<int64_t>(value.size() + sizeof value) + kNodeBytes);
    const auto [place, inserted] = open_.back()->get_ref<Json::object_t&>().emplace(std::move(value), nullptr);
    if (!inserted)
      FailAt(*consumed_, fmt::format("the key \"{}\" stands twice in one object; remove one", Shortened(place->first)));
    slot_ = &place->second;
    return true;
  }
  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception& exception) override {
    // "[json.exception.parse_error.101] parse error at line 1, column 3: what": the place is ours.
    const std::string_view text = exception.what();
    const size_t colon = text.find(": ");
    FailAt(position, Shortened(colon == text.npos ? text : text.substr(colon + 2)));
  }

 private:
  Json* Place(Json value) {
    if (open_.empty()) return &(root_ = std::move(value));
    if (open_.back()->is_array()) return &open_.back()->get_ref<Json::array_t&>().emplace_back(std::move(value));
    return &(*slot_ = std::move(value));
  }
  // A tree's memory, as counted: the value itself, which an array that grows holds twice for a moment, and the block of
  // an object's entry or of a container.
  static constexpr int64_t kValueBytes = 2 * sizeof(Json), kNodeBytes = 64;
  void Account(int64_t bytes) {
    taken_ += bytes;
    if (taken_ > kJsonTreeLimitBytes)
      FailAt(*consumed_, fmt::format("takes more than {} MiB of memory as a tree; is it the right file?",
                                     kJsonTreeLimitBytes >> 20));
  }
  bool Put(Json value) {
    Account(kValueBytes);
    Place(std::move(value));
    return true;
  }
  bool Open(Json value) {
    if (open_.size() == kJsonDepthLimit) {
      FailAt(*consumed_, fmt::format("nested more than {} deep; is it the right file?", kJsonDepthLimit));
    }
    Account(kValueBytes + kNodeBytes);
    open_.push_back(Place(std::move(value)));
    return true;
  }
  bool Close() {
    open_.pop_back();
    return true;
  }
  // `position` bytes were read when the fault was seen.
  [[noreturn]] void FailAt(size_t position, std::string_view what) const {
    const std::string_view before = text_.substr(0, std::min(position == 0 ? 0 : position - 1, text_.size()));
    const auto line = 1 + std::ranges::count(before, '\n');
    const size_t column = before.size() - (before.rfind('\n') == before.npos ? 0 : before.rfind('\n') + 1) + 1;
    if (first_line_ > 0) Fail("{}:{}: column {}: {}", file_, first_line_ + line - 1, column, what);
    Fail("{}: line {}, column {}: {}", file_, line, column, what);
  }

  std::string_view text_;
  std::string_view file_;
  const size_t* consumed_;
  int64_t first_line_;
  Json root_;
  int64_t taken_ = 0;
  std::vector<Json*> open_;  // stable: a container is only grown while it is the last one
  Json* slot_ = nullptr;     // where the value of the key just read goes
};

}  // namespace

Json ParseJsonLine(std::string_view text, std::string_view file, int64_t first_line) {
  size_t consumed = 0;
  TreeBuilder builder(text, file, &consumed, first_line);
  const TrackingIterator begin(text.data(), &consumed), end(text.data() + text.size(), &consumed);
  Json::sax_parse(begin, end, &builder);
  return builder.Take();
}

Json ParseJson(std::string_view text, std::string_view file) { return ParseJsonLine(text, file, 0); }

Json ReadJson(const std::filesystem::path& path, int64_t limit_bytes) {
  return ParseJson(ReadFile(path, limit_bytes), path.string());
}

std::string DumpJson(const Json& value) { return value.dump(2, ' ', false, Json::error_handler_t::replace) + "\n"; }

void WriteJson(const std::filesystem::path& path, const Json& value) { WriteFile(path, DumpJson(value)); }

namespace {

// The start of a value's JSON in `text`, past `limit` not all of it: a big tree is not written out to show 200 bytes.
void DumpStart(const Json& value, size_t limit, std::string& text) {
  if (text.size() > limit) return;
  if (!value.is_structured()) {
    const auto* string = value.get_ptr<const Json::string_t*>();
    text += (string == nullptr || string->size() <= limit ? value : Json(string->substr(0, limit)))
                .dump(-1, ' ', false, Json::error_handler_t::replace);
    return;
  }
  text += value.is_object() ? '{' : '[';
  bool first = true;
  for (const auto& item : value.items()) {
    if (!std::exchange(first, false)) text += ',';
    if (value.is_object()) (DumpStart(item.key(), limit, text), text += ':');
    DumpStart(item.value(), limit, text);
    if (text.size() > limit) return;
  }
  text += value.is_object() ? '}' : ']';
}

}  // namespace

std::string Shown(const Json& value) {
  constexpr size_t kEnough = 1000;
  std::string text;
  DumpStart(value, kEnough, text);
  return Shortened(text);
}

Json F32(float value) {
  if (std::isnan(value)) return "nan";
  if (std::isinf(value)) return value > 0 ? "inf" : "-inf";
  // The shortest decimal of the float32, as the double that prints the same digits.
  char digits[32];
  const auto written = std::to_chars(digits, digits + sizeof digits, value);
  double same = 0;
  std::from_chars(digits, written.ptr, same);
  return same;
}

float F32(const Json& value, std::string_view where) {
  if (value.is_number()) {
    const double number = value.get<double>();
    if (std::abs(number) <= std::numeric_limits<float>::max()) return static_cast<float>(number);
  }
  if (value == "nan") return std::numeric_limits<float>::quiet_NaN();
  if (value == "inf") return std::numeric_limits<float>::infinity();
  if (value == "-inf") return -std::numeric_limits<float>::infinity();
  Fail("{}: expected a float32 number, \"inf\", \"-inf\" or \"nan\", found {}", where, Shown(value));
}

// --- JsonObject ---

namespace {

template <typename T>
struct Reader;  // kExpected: what an error asks for; Read: the value, or nothing when it is no T

template <>
struct Reader<bool> {
  static constexpr std::string_view kExpected = "true or false";
  static std::optional<bool> Read(const Json& value) {
    return value.is_boolean() ? std::optional(value.get<bool>()) : std::nullopt;
  }
};

template <>
struct Reader<std::string> {
  static constexpr std::string_view kExpected = "a string";
  static std::optional<std::string> Read(const Json& value) {
    return value.is_string() ? std::optional(value.get<std::string>()) : std::nullopt;
  }
};

template <std::integral T>
struct Reader<T> {
  static constexpr std::string_view kExpected = sizeof(T) == 4 ? "an integer of 32 bits" : "an integer";
  static std::optional<T> Read(const Json& value) {
    if (value.is_number_float()) {
      const double number = value.get<double>();
      // Both limits are exact powers of two in double.
      constexpr double kEnd = sizeof(T) == 4 ? 0x1p31 : 0x1p63;
      if (std::trunc(number) != number || number < -kEnd || number >= kEnd) return std::nullopt;
      return static_cast<T>(number);
    }
    if (!value.is_number_integer()) return std::nullopt;
    if (value.is_number_unsigned()) {
      const auto number = value.get<uint64_t>();
      return std::in_range<T>(number) ? std::optional(static_cast<T>(number)) : std::nullopt;
    }
    const auto number = value.get<int64_t>();
    return std::in_range<T>(number) ? std::optional(static_cast<T>(number)) : std::nullopt;
  }
};

template <std::floating_point T>
struct Reader<T> {
  static constexpr std::string_view kExpected = "a number";
  static std::optional<T> Read(const Json& value) {
    if (!value.is_number()) return std::nullopt;
    const double number = value.get<double>();
    // YAML knows infinities; a finite number that float32 cannot hold is a mistake.
    if (std::isfinite(number) && std::abs(number) > std::numeric_limits<T>::max()) return std::nullopt;
    return static_cast<T>(number);
  }
};

template <typename T>
struct Reader<std::vector<T>> {
  static inline const std::string kExpected = fmt::format("a list, each item {}", Reader<T>::kExpected);
  static std::optional<std::vector<T>> Read(const Json& value) {
    if (!value.is_array()) return std::nullopt;
    std::vector<T> items;
    for (const Json& item : value) {
      std::optional<T> read = Reader<T>::Read(item);
      if (!read) return std::nullopt;
      items.push_back(std::move(*read));
    }
    return items;
  }
};

const Json kNull;

}  // namespace

JsonObject::JsonObject(const Json& value, std::string file, const YamlNode* lines, std::vector<std::string>* complaints)
    : value_(&value), file_(std::move(file)), lines_(lines), complaints_(complaints) {
  if (!value.is_object()) FailAt("", fmt::format("expected an object, found {}", Shown(value)));
}

const Json* JsonObject::Find(std::string_view key) const {
  asked_.emplace(key);
  const auto place = value_->find(key);
  return place == value_->end() || place->is_null() ? nullptr : &*place;
}

template <typename T>
std::optional<T> JsonObject::Optional(std::string_view key) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::nullopt;
  std::optional<T> read = Reader<T>::Read(*value);
  if (!read) FailAt(key, fmt::format("expected {}, found {}", Reader<T>::kExpected, Shown(*value)));
  return read;
}

template <typename T>
T JsonObject::Optional(std::string_view key, T fallback) const {
  return Optional<T>(key).value_or(std::move(fallback));
}

template <typename T>
T JsonObject::Required(std::string_view key) const {
  std::optional<T> value = Optional<T>(key);
  if (!value) FailAt(key, fmt::format("is missing; expected {}", Reader<T>::kExpected));
  return *std::move(value);
}

#define CIRCLET_INSTANTIATE(T)                                \
  template T JsonObject::Required(std::string_view) const;    \
  template T JsonObject::Optional(std::string_view, T) const; \
  template std::optional<T> JsonObject::Optional<T>(std::string_view) const;
CIRCLET_INSTANTIATE(bool)
CIRCLET_INSTANTIATE(int)
CIRCLET_INSTANTIATE(int64_t)
CIRCLET_INSTANTIATE(float)
CIRCLET_INSTANTIATE(double)
CIRCLET_INSTANTIATE(std::string)
CIRCLET_INSTANTIATE(std::vector<int>)
CIRCLET_INSTANTIATE(std::vector<int64_t>)
CIRCLET_INSTANTIATE(std::vector<float>)
CIRCLET_INSTANTIATE(std::vector<double>)
CIRCLET_INSTANTIATE(std::vector<std::string>)
#undef CIRCLET_INSTANTIATE

bool JsonObject::Has(std::string_view key) const { return Find(key) != nullptr; }

std::optional<JsonObject> JsonObject::OptionalObject(std::string_view key) const {
  const Json* value = Find(key);
  if (value == nullptr) return std::nullopt;
  if (!value->is_object()) FailAt(key, fmt::format("expected an object, found {}", Shown(*value)));
  JsonObject object(*value, file_, lines_ == nullptr ? nullptr : lines_->Find(key), complaints_);
  object.path_ = path_.empty() ? std::string(key) : fmt::format("{}.{}", path_, key);
  return object;
}

JsonObject JsonObject::Object(std::string_view key) const {
  std::optional<JsonObject> object = OptionalObject(key);
  if (!object) FailAt(key, "is missing; expected an object");
  return *std::move(object);
}

std::vector<JsonObject> JsonObject::Objects(std::string_view key) const {
  const Json* value = Find(key);
  if (value == nullptr) return {};
  if (!value->is_array()) FailAt(key, fmt::format("expected a list of objects, found {}", Shown(*value)));
  const YamlNode* lines = lines_ == nullptr ? nullptr : lines_->Find(key);
  std::vector<JsonObject> objects;
  for (size_t i = 0; i < value->size(); ++i) {
    const Json& item = (*value)[i];
    if (!item.is_object())
      FailAt(fmt::format("{}.{}", key, i), fmt::format("expected an object, found {}", Shown(item)));
    JsonObject& object = objects.emplace_back(item, file_, lines != nullptr ? &lines->items[i] : nullptr, complaints_);
    object.path_ = fmt::format("{}{}{}.{}", path_, path_.empty() ? "" : ".", key, i);
  }
  return objects;
}

const Json& JsonObject::Raw(std::string_view key) const {
  const Json* value = Find(key);
  return value == nullptr ? kNull : *value;
}

std::vector<std::string> JsonObject::Keys() const {
  std::vector<std::string> keys;
  for (const auto& [key, unused] : value_->items()) keys.push_back(key);
  return keys;
}

std::vector<std::string> JsonObject::UnknownKeys() const {
  std::vector<std::string> unknown = Keys();
  std::erase_if(unknown, [&](const std::string& key) { return asked_.contains(key); });
  return unknown;
}

void JsonObject::RejectUnknownKeys() const {
  const std::vector<std::string> known(asked_.begin(), asked_.end());
  for (const std::string& key : UnknownKeys()) {
    std::string hint = NearestHint(key, known);
    if (hint.empty() && !known.empty()) hint = fmt::format("; known: {}", fmt::join(known, ", "));
    Complain(key, fmt::format("is no known key{}", hint));
  }
}

std::string JsonObject::Where(std::string_view key) const {
  std::string where = file_;
  if (lines_ != nullptr) {
    const YamlNode* node = lines_->Find(key);
    const int line = node != nullptr ? node->line : lines_->line;
    where += line > 0 ? fmt::format(":{}", line) : " (--set)";
  }
  const std::string path = Shortened(fmt::format("{}{}{}", path_, path_.empty() || key.empty() ? "" : ".", key));
  return path.empty() ? where : fmt::format("{}: {}", where, path);
}

void JsonObject::Complain(std::string_view key, std::string_view what) const {
  Try([&] { FailAt(key, what); });
}

void JsonObject::Try(const std::function<void()>& read) const {
  if (complaints_ == nullptr) return read();
  try {
    read();
  } catch (const Error& error) {
    complaints_->emplace_back(error.what());
  }
}

void JsonObject::FailAt(std::string_view key, std::string_view what) const { Fail("{}: {}", Where(key), what); }

}  // namespace circlet
