#include "cli/print.h"

#include <fmt/core.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <cctype>
#include <charconv>
#include <cstdlib>
#include <utility>

namespace circlet {
namespace {

bool ShowsUtf8() {
  for (const char* name : {"LC_ALL", "LC_CTYPE", "LANG"}) {
    const char* const set = std::getenv(name);
    if (set == nullptr || *set == '\0') continue;
    std::string locale = set;
    std::ranges::transform(locale, locale.begin(), [](unsigned char c) { return std::tolower(c); });
    return locale.find("utf-8") != locale.npos || locale.find("utf8") != locale.npos;
  }
  return true;
}

// What reports are drawn with; everything else, such as names and answers, passes.
std::string InAscii(std::string_view text) {
  constexpr std::pair<std::string_view, std::string_view> kSigns[] = {
      {"─", "-"}, {"│", "|"}, {"┌", "+"}, {"┐", "+"}, {"└", "+"}, {"┘", "+"}, {"┤", "+"}, {"┬", "+"}, {"•", "*"},
      {"█", "#"}, {"▉", "#"}, {"▊", "#"}, {"▋", "#"}, {"▌", "#"}, {"▍", "|"}, {"▎", "|"}, {"▏", "|"}, {"±", "+-"}};
  std::string ascii;
  while (!text.empty()) {
    const auto* const sign =
        std::ranges::find_if(kSigns, [&](const auto& entry) { return text.starts_with(entry.first); });
    const bool known = sign != std::end(kSigns);
    ascii += known ? sign->second : text.substr(0, 1);
    text.remove_prefix(known ? sign->first.size() : 1);
  }
  return ascii;
}

}  // namespace

int Columns() {
  int columns = 0;
  if (const char* const set = std::getenv("COLUMNS"); set != nullptr)
    std::from_chars(set, set + std::string_view(set).size(), columns);
  winsize size{};
  if (columns <= 0 && ioctl(STDOUT_FILENO, TIOCGWINSZ, &size) == 0) columns = size.ws_col;
  return std::max(columns, 0);
}

void Print(std::string_view text) {
  if (ShowsUtf8())
    fmt::print("{}", text);
  else
    fmt::print("{}", InAscii(text));
}

}  // namespace circlet
