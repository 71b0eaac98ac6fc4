// Run by processes_test.cc under mpirun: what the processes of one run do together. Exit code 0 is right.

#include <fmt/core.h>

#include <chrono>
#include <fstream>
#include <string_view>
#include <thread>

#include "circlet/base/communicator.h"
#include "circlet/base/error.h"

namespace circlet {
namespace {

// Bytes of every value, of another length for every process; the longest takes more than one piece.
std::string MessageOf(int rank) {
  constexpr size_t kBytes[] = {(size_t{5} << 20) + 3, 0, size_t{1} << 20};
  std::string message(kBytes[rank % 3], '\0');
  for (size_t i = 0; i < message.size(); ++i) message[i] = static_cast<char>(i * 31 + i / 251 + rank);
  return message;
}

void GathersMessagesOfAnyLength(Communicator& world) {
  for (int round = 0; round < 3; ++round) {
    const std::vector<std::string> all = world.AllGather(MessageOf(world.Rank() + round));
    CIRCLET_CHECK(std::ssize(all) == world.Size(), "{} messages", all.size());
    for (int rank = 0; rank < world.Size(); ++rank)
      CIRCLET_CHECK(all[rank] == MessageOf(rank + round), "message of {} in round {}", rank, round);
  }
}

// Everybody signs a file before the barrier; behind it all signatures are there.
void BarrierWaitsForAll(Communicator& world, const std::string& directory) {
  const auto path = [&](int rank) { return fmt::format("{}/{}", directory, rank); };
  std::this_thread::sleep_for(std::chrono::milliseconds(50 * world.Rank()));
  std::ofstream(path(world.Rank())).put('x');
  world.Barrier();
  for (int rank = 0; rank < world.Size(); ++rank)
    CIRCLET_CHECK(std::ifstream(path(rank)).good(), "{} misses {}", world.Rank(), rank);
}

// The last process ends all of them while the others wait for it.
void AbortReachesWaitingProcesses(Communicator& world) {
  if (world.Rank() == world.Size() - 1) world.Abort(2);
  world.Barrier();
}

}  // namespace
}  // namespace circlet

int main(int, char** argv) {
  const std::string_view what = argv[1];
  circlet::Communicator& world = circlet::World();
  CIRCLET_CHECK(world.Size() == std::stoi(argv[2]), "{} processes", world.Size());
  if (what == "gather") circlet::GathersMessagesOfAnyLength(world);
  if (what == "barrier") circlet::BarrierWaitsForAll(world, argv[3]);
  if (what == "abort") circlet::AbortReachesWaitingProcesses(world);
  return 0;
}
