#pragma once

#include <string>
#include <string_view>

#include "circlet/report/terminal.h"

namespace circlet {

enum class Align { kLeft, kRight };

// `text` with spaces up to `width` columns; a wider text stays as it is.
inline std::string Padded(std::string_view text, int width, Align align = Align::kLeft) {
  const std::string spaces(static_cast<size_t>(std::max(0, width - DisplayWidth(text))), ' ');
  return align == Align::kLeft ? std::string(text) + spaces : spaces + std::string(text);
}

inline std::string Repeated(std::string_view text, int times) {
  std::string result;
  for (int i = 0; i < times; ++i) result += text;
  return result;
}

}  // namespace circlet
