#pragma once

// Keys of the reference's recipe files: which values of them circlet takes, and how it refuses the others.

#include <algorithm>
#include <cctype>
#include <initializer_list>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "circlet/io/json.h"

namespace circlet {

inline constexpr std::string_view kUnsupported = "is not supported yet; remove it";

// Accepts a key of the reference only where it asks for nothing: absent, null, false, empty, or `harmless`.
inline void Refuse(const JsonObject& object, std::string_view key, const nlohmann::json& harmless = nullptr) {
  const nlohmann::json& value = object.Raw(key);
  if (value.is_null() || value == false || value.empty() || value == harmless) return;
  object.Complain(key, kUnsupported);
}

// The same for a key that has an `enabled` of its own.
inline void RefuseTask(const JsonObject& object, std::string_view key) {
  const nlohmann::json& value = object.Raw(key);
  if (value.is_object() && !object.Object(key).Optional<bool>("enabled", false)) return;
  Refuse(object, key);
}

inline std::string LowerString(const JsonObject& object, std::string_view key, std::string_view otherwise) {
  std::string text = object.Optional<std::string>(key, std::string(otherwise));
  for (char& c : text) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  return text;
}

// One of `known`; others that the reference has are in `unsupported`.
inline std::string Choice(const JsonObject& object, std::string_view key, std::string_view otherwise,
                          std::initializer_list<std::string_view> known,
                          std::initializer_list<std::string_view> unsupported) {
  std::string text = LowerString(object, key, otherwise);
  if (std::ranges::find(known, text) != known.end()) return text;
  const std::string_view because =
      std::ranges::find(unsupported, text) != unsupported.end() ? "is not supported yet" : "is no known value";
  std::string names;
  for (const std::string_view name : known) names += (names.empty() ? "" : ", ") + std::string(name);
  object.Complain(key, fmt::format("\"{}\" {}; use {}", text, because, names));
  return std::string(otherwise);
}

template <typename T>
void RequireAtLeast(const JsonObject& object, std::string_view key, const std::optional<T>& value, T least) {
  if (value && *value < least) object.Complain(key, fmt::format("{} is too small; use {} or more", *value, least));
}

inline std::optional<int> OptionalCount(const JsonObject& object, std::string_view key, int least = 1) {
  const std::optional<int> value = object.Optional<int>(key);
  RequireAtLeast(object, key, value, least);
  return value;
}

}  // namespace circlet
