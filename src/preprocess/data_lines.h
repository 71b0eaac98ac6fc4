#pragma once

#include <functional>
#include <string>
#include <string_view>

#include "circlet/io/json.h"
#include "circlet/preprocess/data_file.h"

namespace circlet {

struct DataLine {
  std::string place;      // "/data/calib.jsonl:7", for errors
  std::string source;     // "calib.jsonl:7"
  std::string_view text;  // the object's JSON, in whose order its keys are
};

inline constexpr std::string_view kSampleLine = R"({"type": "text", "text": "..."})";

// Calls `body` with the object of each line that is not blank, or with each object of a JSON array. Throws Error
// "FILE:LINE: ..." for anything that is no object and for a file without any, with an example of what is expected.
void ForEachLine(const DataFile& data, const std::function<void(const JsonObject& object, const DataLine& line)>& body,
                 std::string_view example = kSampleLine);

}  // namespace circlet
