#pragma once

// Methods of Python's str on UTF-8 text. Positions and lengths count characters.

#include <cstdint>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

namespace circlet::jinja {

bool IsSpace(uint32_t c);
int64_t CharacterCount(std::string_view text);
std::vector<std::string_view> Characters(std::string_view text);
// The first character of a text that is not empty.
std::string_view FirstCharacter(std::string_view text);
std::string FromCodePoint(uint32_t c);

// `characters`: those to take away; none = white space.
std::string_view Strip(std::string_view text, bool left, bool right,
                       const std::optional<std::string>& characters = std::nullopt);
std::string Upper(std::string_view text);
std::string Lower(std::string_view text);
std::string Capitalize(std::string_view text);
// The method title() of str, and the filter `title`, which differ in what begins a word.
std::string TitleMethod(std::string_view text);
std::string TitleFilter(std::string_view text);
// At most `limit` cuts from the left, or from the right; negative = any number. No separator: at white space.
std::vector<std::string_view> Split(std::string_view text, const std::optional<std::string>& separator, int64_t limit);
std::vector<std::string_view> SplitRight(std::string_view text, const std::optional<std::string>& separator,
                                         int64_t limit);
std::vector<std::string_view> SplitLines(std::string_view text, bool keep_ends = false);
std::string Escape(std::string_view text);  // for HTML

}  // namespace circlet::jinja
