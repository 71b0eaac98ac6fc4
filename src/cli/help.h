#pragma once

#include <CLI/CLI.hpp>
#include <string>

namespace circlet {

inline constexpr char kGeneralGroup[] = "General";  // of options that every command has; shown last

// --help: options by group, wrapped to the terminal.
class HelpFormatter : public CLI::Formatter {
 public:
  std::string make_help(const CLI::App* app, std::string name, CLI::AppFormatMode mode) const override;
};

}  // namespace circlet
