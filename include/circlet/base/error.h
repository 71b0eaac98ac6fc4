#pragma once

#include <fmt/format.h>

#include <stdexcept>
#include <string>
#include <string_view>

namespace circlet {

// A failure that a user can cause and mend: a damaged file, a missing tensor, a misspelled name. The text reads
// "where: what (values); what to do". The library throws it and never prints, aborts or exits; the program prints it
// once and exits with 2.
class Error : public std::runtime_error {
 public:
  explicit Error(const std::string& text) : std::runtime_error(text) {}

  // The same failure seen from further out: "place: text".
  Error Within(std::string_view place) const { return Error(fmt::format("{}: {}", place, what())); }
};

// A failure that only a mistake in circlet can cause; the program exits with 3.
class Bug : public std::logic_error {
 public:
  explicit Bug(const std::string& text) : std::logic_error(text) {}
};

template <typename... Args>
[[noreturn]] void Fail(fmt::format_string<Args...> format, Args&&... args) {
  throw Error(fmt::format(format, std::forward<Args>(args)...));
}

// Runs `body`; an Error that leaves it names `place` in front.
template <typename Body>
decltype(auto) Within(std::string_view place, Body&& body) {
  try {
    return body();
  } catch (const Error& error) {
    throw error.Within(place);
  }
}

#define CIRCLET_CHECK(condition, ...)                                                                       \
  do {                                                                                                      \
    if (!(condition)) [[unlikely]]                                                                          \
      throw ::circlet::Bug(::fmt::format("{}:{}: {}: {}", __FILE__, __LINE__, #condition,                   \
                                         ::fmt::format(__VA_ARGS__)));                                      \
  } while (false)

}  // namespace circlet
