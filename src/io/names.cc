#include "circlet/io/names.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <vector>

namespace circlet {
namespace {

// Optimal string alignment distance by rows: insert, delete, replace, or swap two neighbours, each 1.
size_t Distance(std::string_view a, std::string_view b) {
  std::vector<size_t> before(b.size() + 1), above(b.size() + 1), row(b.size() + 1);
  for (size_t j = 0; j <= b.size(); ++j) above[j] = j;
  for (size_t i = 1; i <= a.size(); ++i) {
    row[0] = i;
    for (size_t j = 1; j <= b.size(); ++j) {
      row[j] = std::min({above[j] + 1, row[j - 1] + 1, above[j - 1] + (a[i - 1] != b[j - 1])});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) row[j] = std::min(row[j], before[j - 2] + 1);
    }
    std::swap(before, above);
    std::swap(above, row);
  }
  return above[b.size()];
}

}  // namespace

std::string Shortened(std::string_view text) {
  constexpr size_t kQuotedBytes = 200;
  if (text.size() <= kQuotedBytes) return std::string(text);
  size_t cut = kQuotedBytes;
  while (cut > 0 && (static_cast<unsigned char>(text[cut]) & 0xc0) == 0x80) --cut;
  return std::string(text.substr(0, cut)) + "...";
}

std::string Nearest(std::string_view name, std::span<const std::string> candidates) {
  constexpr size_t kLongestName = 1000;  // the comparison takes time by the square
  if (name.size() > kLongestName) return {};
  // A beginning that only one of them has, as long as it says something.
  constexpr size_t kShortestBeginning = 4;
  const auto begins = [&](const std::string& candidate) { return candidate.starts_with(name); };
  if (name.size() >= kShortestBeginning && std::ranges::count_if(candidates, begins) == 1)
    return *std::ranges::find_if(candidates, begins);
  size_t best = std::numeric_limits<size_t>::max();
  std::string nearest;
  for (const std::string& candidate : candidates) {
    const auto [shorter, longer] = std::minmax({name.size(), candidate.size()});
    const size_t limit = std::min(best, longer / 2 + 1);  // exclusive
    if (longer - shorter >= limit) continue;
    if (const size_t distance = Distance(name, candidate); distance < limit) {
      best = distance;
      nearest = candidate;
    }
  }
  return nearest;
}

std::string NearestHint(std::string_view name, std::span<const std::string> candidates) {
  const std::string nearest = Nearest(name, candidates);
  return nearest.empty() ? "" : fmt::format("; nearest: \"{}\"", Shortened(nearest));
}

}  // namespace circlet
