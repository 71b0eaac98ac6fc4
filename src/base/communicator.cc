#include "circlet/base/communicator.h"

#include <dlfcn.h>

#include <charconv>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <optional>
#include <string_view>

#include "base/mpi.h"
#include "circlet/base/error.h"

namespace circlet {
namespace {

class Alone final : public Communicator {
 public:
  int Rank() const override { return 0; }
  int Size() const override { return 1; }
  std::vector<std::string> AllGather(const std::string& mine) override { return {mine}; }
  void Barrier() override {}
  [[noreturn]] void Abort(int exit_code) override { std::exit(exit_code); }
};

std::optional<int> EnvironmentNumber(const char* name) {
  const char* text = std::getenv(name);
  if (text == nullptr) return std::nullopt;
  const std::string_view digits = text;
  int number = 0;
  const auto [end, error] = std::from_chars(digits.data(), digits.data() + digits.size(), number);
  if (error != std::errc() || end != digits.data() + digits.size()) return std::nullopt;
  return number;
}

std::unique_ptr<Communicator> Connect() {
  const int launched = Launched().size;
  if (launched <= 1) return std::make_unique<Alone>();
  const std::string module = std::filesystem::read_symlink("/proc/self/exe").parent_path() / kMpiModule;
  // MPI opens plugins that use its libraries' symbols.
  void* library = dlopen(module.c_str(), RTLD_NOW | RTLD_GLOBAL);
  if (library == nullptr) {
    Fail(
        "{} processes were started together, but MPI is not there to connect them: {}; install MPI (Debian: "
        "libopenmpi-dev and openmpi-bin) and build circlet with -DCIRCLET_MPI=ON, or start one process",
        launched, dlerror());
  }
  auto* const connect = reinterpret_cast<ConnectMpi*>(dlsym(library, kConnectMpi));
  if (connect == nullptr) Fail("{}: is of another circlet ({}); install both together", module, dlerror());
  std::unique_ptr<Communicator> world(connect());
  if (world->Size() != launched) {
    Fail(
        "{} processes were started together, but MPI connects {}; start them with the mpirun of the MPI that "
        "circlet was built with",
        launched, world->Size());
  }
  return world;
}

}  // namespace

LaunchPlace Launched() {
  // Open MPI; MPICH and its relatives; srun with whatever MPI.
  constexpr const char* kVariables[][2] = {{"OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"},
                                           {"PMI_RANK", "PMI_SIZE"},
                                           {"SLURM_PROCID", "SLURM_STEP_NUM_TASKS"}};
  for (const auto& [rank_name, size_name] : kVariables) {
    const std::optional<int> rank = EnvironmentNumber(rank_name), size = EnvironmentNumber(size_name);
    if (rank && size && *rank >= 0 && *rank < *size) return {*rank, *size};
  }
  return {};
}

Communicator& World() {
  static const std::unique_ptr<Communicator> world = Connect();
  return *world;
}

}  // namespace circlet
