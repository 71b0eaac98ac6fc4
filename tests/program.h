#pragma once

// The program as a user runs it.

#include <sys/wait.h>

#include <cstdlib>
#include <filesystem>
#include <string>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "paths.h"
#include "temp_directory.h"

namespace circlet {

struct ProgramResult {
  int exit_code = -1;  // 128 + N when signal N ended it
  std::string out, err;
};

// `shell` runs in front of the program in the same process, e.g. "ulimit -f 8; ".
inline ProgramResult RunProgram(const std::vector<std::string>& arguments, const std::string& shell = "",
                                const std::string& program = kCircletBinary) {
  const TempDirectory directory;
  std::string command = fmt::format("{}exec '{}'", shell, program);
  for (const std::string& argument : arguments) {
    CIRCLET_CHECK(argument.find('\'') == argument.npos, "argument {} needs quoting", argument);
    command += " '" + argument + "'";
  }
  const std::filesystem::path out = directory.Path() / "out", err = directory.Path() / "err";
  const int status = std::system(fmt::format("({}) > '{}' 2> '{}'", command, out.string(), err.string()).c_str());
  return {WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status), ReadFile(out), ReadFile(err)};
}

}  // namespace circlet
