#pragma once

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <string_view>

namespace circlet {

// ParseJson of a part of a file that begins on its line `first_line`: an Error is "FILE:LINE: column C: what".
nlohmann::json ParseJsonLine(std::string_view text, std::string_view file, int64_t first_line);

}  // namespace circlet
