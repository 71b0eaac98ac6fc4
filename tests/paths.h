#pragma once

#include <string>

namespace circlet {

// The root of the sources and the program under test. They stand in paths.cc alone: every other object of the tests is
// the same wherever the tree lies, so that a compiler cache serves them.
extern const char kSourceDirectory[];
extern const char kCircletBinary[];

inline std::string SourcePath(const std::string& relative) { return kSourceDirectory + ("/" + relative); }

}  // namespace circlet
