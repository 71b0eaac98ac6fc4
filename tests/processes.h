#pragma once

// The program as several processes of one run (builds with MPI).

#include "paths.h"
#include "program.h"

namespace circlet {

// Under mpirun, also as root and on few cores; with -q for mpirun to be silent. `before` stands in front of mpirun, e.g.
// {"timeout", "5"}.
inline ProgramResult RunProcesses(int count, const std::vector<std::string>& program, std::vector<std::string> before = {}) {
  std::vector<std::string> command = std::move(before);
  for (const std::string& word : {std::string(CIRCLET_MPIEXEC), std::string("-q"), std::string("--bind-to"),
                                  std::string("none"), std::string("-n"), std::to_string(count)})
    command.push_back(word);
  command.insert(command.end(), program.begin(), program.end());
  return RunProgram({command.begin() + 1, command.end()},
                    "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 "
                    "OMPI_MCA_rmaps_base_oversubscribe=1; ",
                    command[0]);
}

// The same of circlet with `arguments`.
inline ProgramResult RunCirclet(int processes, std::vector<std::string> arguments, std::vector<std::string> before = {}) {
  arguments.insert(arguments.begin(), kCircletBinary);
  return RunProcesses(processes, arguments, std::move(before));
}

}  // namespace circlet
