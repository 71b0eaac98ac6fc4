#pragma once

#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

namespace circlet {

// Checks of a flag's text. Each tells a fault in the program's own words, behind the flag: "--compute: "fp16" is none
// of float32, bf16".

CLI::Validator OneOf(std::vector<std::string> words);

// A whole number in [least, most].
CLI::Validator WholeNumber(int64_t least, int64_t most);

// A number in [least, most], fractions too.
CLI::Validator Number(double least, double most);

// Anything but nothing, as of a variable of the shell that has no value.
CLI::Validator NotEmpty();

// A path that a file can be written to: told before the work whose result goes there.
CLI::Validator WritableFile();

// "3GB", "20.5MiB", "4096": bytes; the text becomes their number.
CLI::Validator Size();

// Words that stand for an enum's values; the text becomes the value's number, which CLI11 reads.
template <typename Enum>
CLI::Validator Choice(const std::vector<std::pair<std::string, Enum>>& values) {
  std::vector<std::string> words;
  for (const auto& [word, value] : values) words.push_back(word);
  CLI::Validator known = OneOf(words);
  return CLI::Validator(
      [known, values](std::string& text) {
        std::string fault = known(text);
        for (const auto& [word, value] : values)
          if (fault.empty() && text == word) {
            text = std::to_string(static_cast<int64_t>(value));
            break;
          }
        return fault;
      },
      known.get_description());
}

}  // namespace circlet
