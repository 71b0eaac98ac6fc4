#pragma once

#include <span>
#include <string>
#include <string_view>

namespace circlet {

// `text` as an error quotes it: at most 200 bytes, then "..."; not cut within a letter of UTF-8. Bytes come from files,
// which may hold a name of megabytes.
std::string Shortened(std::string_view text);

// The candidate that `name` most likely meant: smallest number of inserted, deleted, replaced or swapped letters, the
// first of equals. Empty when none comes within half of the longer name's length.
std::string Nearest(std::string_view name, std::span<const std::string> candidates);

// The end of an error text: `; nearest: "candidate"`, or nothing when Nearest has no answer.
std::string NearestHint(std::string_view name, std::span<const std::string> candidates);

}  // namespace circlet
