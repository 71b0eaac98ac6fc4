#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/io/file.h"

namespace circlet {

struct YamlNode;

// Deepest nesting of arrays and objects that is read.
inline constexpr int kJsonDepthLimit = 64;

// Most memory that a tree takes: values, keys and strings, whatever the file's size. A file of empty objects takes 30
// times its size.
inline constexpr int64_t kJsonTreeLimitBytes = int64_t{256} << 20;

// JSON text as a tree. A tree past kJsonTreeLimitBytes, bad syntax, bytes that are not UTF-8, a key that stands twice
// in one object, nesting past kJsonDepthLimit: an Error "`file`: line L, column C: what".
nlohmann::json ParseJson(std::string_view text, std::string_view file);
nlohmann::json ReadJson(const std::filesystem::path& path, int64_t limit_bytes = kTextLimitBytes);

// Sorted keys, indent 2, a newline at the end: the form of every JSON file that circlet writes.
std::string DumpJson(const nlohmann::json& value);
// Written whole or not at all.
void WriteJson(const std::filesystem::path& path, const nlohmann::json& value);

// `value` as an error quotes it: its JSON, shortened (names.h).
std::string Shown(const nlohmann::json& value);

// A float32 as the shortest decimal that reads back as the same float32; "inf", "-inf", "nan" as strings, since JSON
// has no such numbers.
nlohmann::json F32(float value);
// The way back; `where` stands in front of the Error for anything else.
float F32(const nlohmann::json& value, std::string_view where);

// Reads the fields of a JSON object (or of a YAML mapping) with errors that name the place:
//   config.json: text_config.num_hidden_layers: expected an integer, found "x"
//   quant.yaml:14: pipeline.0.activation: expected a string, found 3
// It remembers which keys were asked for. Refers to the tree, which must outlive it.
class JsonObject {
 public:
  // `file` is how errors call the file. `lines`, when given, is the tree that `value` was made from and gives line
  // numbers. `complaints`, when given, gathers the texts of Complain and Try, also those of the objects in this one.
  // Throws Error unless `value` is an object.
  JsonObject(const nlohmann::json& value, std::string file, const YamlNode* lines = nullptr,
             std::vector<std::string>* complaints = nullptr);

  // T: bool, int, int64_t, float, double, std::string, and std::vector of these (not bool). Integers are accepted as
  // float and double, and floats without a fraction as integers; a value outside T is an Error.
  template <typename T>
  T Required(std::string_view key) const;
  // `fallback` when the key is absent or null.
  template <typename T>
  T Optional(std::string_view key, T fallback) const;
  // Empty when the key is absent or null.
  template <typename T>
  std::optional<T> Optional(std::string_view key) const;

  bool Has(std::string_view key) const;  // present and not null
  JsonObject Object(std::string_view key) const;
  std::optional<JsonObject> OptionalObject(std::string_view key) const;
  // The objects of an array of objects; absent or null = none.
  std::vector<JsonObject> Objects(std::string_view key) const;
  // The value itself, null when absent.
  const nlohmann::json& Raw(std::string_view key) const;
  std::vector<std::string> Keys() const;  // sorted

  // Keys that nobody asked for, sorted: listed in the report for config.json (whose unknown keys are harmless) ...
  std::vector<std::string> UnknownKeys() const;
  // ... and complained of, with the nearest known key, for files that people write.
  void RejectUnknownKeys() const;

  // "config.json: text_config.head_dim": what stands in front of an error about `key`; empty key = the object itself.
  std::string Where(std::string_view key) const;
  [[noreturn]] void FailAt(std::string_view key, std::string_view what) const;  // Where(key) + ": " + what
  // A fault that leaves the rest of the file readable: FailAt, unless complaints are gathered.
  void Complain(std::string_view key, std::string_view what) const;
  // Reads a part of the file. Its Error is thrown on, unless complaints are gathered.
  void Try(const std::function<void()>& read) const;

 private:
  const nlohmann::json* Find(std::string_view key) const;  // null when absent or null; counts as asked

  const nlohmann::json* value_;
  std::string file_;
  std::string path_;  // "text_config", empty at the root
  const YamlNode* lines_;
  std::vector<std::string>* complaints_;
  mutable std::set<std::string, std::less<>> asked_;
};

}  // namespace circlet
