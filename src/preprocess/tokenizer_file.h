#pragma once

// tokenizer.json in memory: the two big tables as views into one block, everything else as a JSON tree. A 33 MB file
// with 1.3 million strings is read in one pass without a tree node for each of them.

#include <cstdint>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace circlet {

struct TokenizerFile {
  // Ids are small integers; a larger one would only make a table that memory cannot hold.
  static constexpr int64_t kIdLimit = int64_t{1} << 22;

  std::string pool;                                                   // the bytes of all strings below
  std::vector<std::pair<std::string_view, int32_t>> vocab;            // in file order
  std::vector<std::pair<std::string_view, std::string_view>> merges;  // by rank
  nlohmann::json settings;                                            // the file without model.vocab and model.merges
};

// Throws Error naming `file` and the place for bad syntax, a value of the wrong type in the two tables, a key that
// stands twice outside them, nesting that is too deep. Whether the tables fit together is for the caller to judge.
TokenizerFile ParseTokenizerFile(std::string_view json, std::string_view file);

}  // namespace circlet
