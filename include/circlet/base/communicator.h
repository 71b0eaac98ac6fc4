#pragma once

#include <string>
#include <vector>

namespace circlet {

// How the processes of one run talk to each other. The collective members are called by all processes, in the same
// order; one that does not come leaves the others waiting. A connection that breaks is an Error.
class Communicator {
 public:
  virtual ~Communicator() = default;
  virtual int Rank() const = 0;  // 0 .. Size() - 1
  virtual int Size() const = 0;
  // What every process gave, by rank: any bytes, any length, any process another length. Collective.
  virtual std::vector<std::string> AllGather(const std::string& mine) = 0;
  // Returns when all processes have called it. Collective.
  virtual void Barrier() = 0;
  // Ends all processes of the run with `exit_code`, also those that wait for another.
  [[noreturn]] virtual void Abort(int exit_code) = 0;
};

// This process among those that a launcher (mpirun, srun) started together, by the launcher's environment variables and
// without any connection; rank 0 of 1 without a launcher.
struct LaunchPlace {
  int rank = 0, size = 1;
};
LaunchPlace Launched();

// The processes of this run, connected by the first call, which is collective; this one alone without a launcher. More
// than one process and no way to connect them is an Error: as independent runs they would overwrite each other's files.
Communicator& World();

}  // namespace circlet
