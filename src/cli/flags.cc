#include "cli/flags.h"

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string_view>

#include "circlet/base/error.h"
#include "circlet/io/file.h"

namespace circlet {
namespace {

// All of `text` as a number.
template <typename Number>
bool Reads(std::string_view text, Number& number) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  return error == std::errc() && end == text.data() + text.size();
}

// Bytes of a unit, 0 when it is none.
double BytesOf(std::string unit) {
  std::ranges::transform(unit, unit.begin(), [](unsigned char c) { return std::tolower(c); });
  if (unit.empty() || unit == "b") return 1;
  const size_t power = std::string_view("kmgt").find(unit[0]);
  const std::string_view rest = std::string_view(unit).substr(1);
  if (power == std::string_view::npos) return 0;
  if (rest.empty() || rest == "b") return std::pow(1000.0, power + 1);
  return rest == "i" || rest == "ib" ? std::pow(1024.0, power + 1) : 0;
}

template <typename Type>
CLI::Validator InRange(Type least, Type most, const char* kind) {
  return CLI::Validator(
      [least, most, kind](std::string& text) {
        Type number = 0;
        return Reads(text, number) && number >= least && number <= most
                   ? std::string()
                   : fmt::format("\"{}\" is no {} from {} to {}", text, kind, least, most);
      },
      "N");
}

}  // namespace

CLI::Validator OneOf(std::vector<std::string> words) {
  const std::string description = fmt::format("{{{}}}", fmt::join(words, ","));
  return CLI::Validator(
      [words = std::move(words)](std::string& text) {
        return std::ranges::find(words, text) != words.end()
                   ? std::string()
                   : fmt::format("\"{}\" is none of {}", text, fmt::join(words, ", "));
      },
      description);
}

CLI::Validator WholeNumber(int64_t least, int64_t most) { return InRange(least, most, "whole number"); }
CLI::Validator Number(double least, double most) { return InRange(least, most, "number"); }

CLI::Validator NotEmpty() {
  return CLI::Validator(
      [](std::string& text) { return std::string(text.empty() ? "is empty; give a value, or leave it out" : ""); }, "");
}

CLI::Validator WritableFile() {
  return CLI::Validator(
      [](std::string& text) {
        try {
          RequireWritable(text);
        } catch (const Error& error) {
          return std::string(error.what());
        }
        return std::string();
      },
      "");
}

CLI::Validator Size() {
  return CLI::Validator(
      [](std::string& text) {
        const size_t digits = std::min(text.find_first_not_of("0123456789."), text.size());
        const size_t unit = std::min(text.find_first_not_of(' ', digits), text.size());
        double amount = 0;
        const double bytes =
            Reads(std::string_view(text).substr(0, digits), amount) ? amount * BytesOf(text.substr(unit)) : 0;
        if (!(bytes >= 1 && bytes < 0x1p62))
          return fmt::format("\"{}\" is no size; write a number and its unit: 3GB (10^9 bytes each), 512MiB (2^20)",
                             text);
        text = std::to_string(static_cast<int64_t>(bytes));
        return std::string();
      },
      "SIZE");
}

}  // namespace circlet
