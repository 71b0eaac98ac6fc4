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

// What errors say of a line: an example, and the key whose value a line of plain text could be (empty: none).
struct LineForm {
  std::string_view example, text_key;
};
inline constexpr LineForm kSampleLine{R"({"type": "text", "text": "..."})", "text"};

// Calls `body` with the object of each line that is not blank, or with each object of a JSON array. Throws Error
// "FILE:LINE: ..." for anything that is no object and for a file without any, with the form of what is expected.
void ForEachLine(const DataFile& data, const std::function<void(const JsonObject& object, const DataLine& line)>& body,
                 const LineForm& form = kSampleLine);

}  // namespace circlet
