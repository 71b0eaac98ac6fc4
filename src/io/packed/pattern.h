#pragma once

#include <memory>
#include <optional>
#include <string>
#include <string_view>

namespace circlet {

// A regular expression in Python's spelling, as configs name modules by: characters, classes, groups, alternatives,
// repetitions, ^ $ \b and lookaheads. It walks all positions that a match may have reached at a time, so that the work
// grows with pattern times name and no pattern makes it explode; only whether and where a match begins is told.
class Pattern {
 public:
  // Throws Error beginning with `where`: bad syntax, and what is not supported (back references, looking behind,
  // flags).
  Pattern(const std::string& text, const std::string& where);

  // re.search: where the match begins that starts furthest left.
  std::optional<size_t> Search(std::string_view name) const;
  // re.match: whether a match begins at the front.
  bool MatchesFront(std::string_view name) const;
  // Whether it matches a prefix of `name` that ends at a dot or at the end.
  bool MatchesModule(std::string_view name) const;

  struct Node;

 private:
  std::shared_ptr<const Node> root_;
  std::string where_;
};

}  // namespace circlet
