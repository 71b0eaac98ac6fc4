#include <fmt/core.h>
#include <malloc.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <chrono>
#include <cstdlib>
#include <thread>

#include "circlet/base/communicator.h"
#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/names.h"
#include "cli/commands.h"

namespace {

// OpenMP's threads wait busily between parallel loops unless the environment says otherwise before the process starts; beside
// any other load that slows a run down eightfold (133 s against 16 s measured). They spin for some 10 us, the length of a
// short loop's gap, and then sleep: 6.5 s where sleeping at once took 11.4 s.
void WaitPassively(char** argv) {
  if (getenv("OMP_WAIT_POLICY") != nullptr) return;
  setenv("OMP_WAIT_POLICY", "passive", 1);
  setenv("GOMP_SPINCOUNT", "10000", 0);
  execv("/proc/self/exe", argv);  // on failure the run goes on as it is
}

// Left alone, glibc takes ever larger blocks from its heaps, whose holes a streaming run never gives back.
void ReturnLargeBlocks() {
  constexpr int kLargeBytes = 256 << 10;
  mallopt(M_MMAP_THRESHOLD, kLargeBytes);
  mallopt(M_TRIM_THRESHOLD, kLargeBytes);
}

// A word that no option or command has names the nearest that there is; other faults are told as CLI11 tells them.
int Refuse(const CLI::App& app, const CLI::ParseError& error) {
  const std::vector<std::string> unknown = app.remaining(/*recurse=*/true);
  if (error.get_exit_code() == 0 || unknown.empty()) return app.exit(error) == 0 ? 0 : 2;
  const std::vector<CLI::App*> chosen = app.get_subcommands();
  const CLI::App& command = chosen.empty() ? app : *chosen.front();
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  for (const CLI::App* verb : command.get_subcommands({})) names.push_back(verb->get_name());
  fmt::print(stderr, "circlet: {}: not expected here{}; `circlet {}--help` lists what is\n", unknown.front(),
             circlet::NearestHint(unknown.front(), names), chosen.empty() ? "" : command.get_name() + " ");
  return 2;
}

// The processes of one run mostly fail alike, and one message is enough: the first tells its failure at once and ends
// the others, which wait for that, each longer than the one before it. `world` is null before the processes are
// connected; then they end when the launcher sees that this one did, after a second with Open MPI.
int TellFailure(circlet::Communicator* world, int exit_code, std::string_view text) {
  std::this_thread::sleep_for(std::chrono::milliseconds(world != nullptr ? 500 : 2000) * circlet::Launched().rank);
  fmt::print(stderr, "circlet: {}\n", text);
  std::fflush(nullptr);
  if (world != nullptr) world->Abort(exit_code);
  return exit_code;
}

}  // namespace

// Exit codes: 0 done, 1 a result below the wanted bound, 2 an error that the user can mend, 3 a bug.
int main(int argc, char** argv) {
  WaitPassively(argv);
  ReturnLargeBlocks();
  CLI::App app{"circlet: from a Gemma 4 checkpoint to calibrated, verified Circle files", "circlet"};
  app.set_version_flag("--version", CIRCLET_VERSION);
  app.require_subcommand(1);
  int threads = 0;
  app.add_option("--threads", threads, "Threads to use (default: all cores); results do not depend on it")
      ->check(CLI::Range(1, 1024));
  std::function<int()> command;
  circlet::AddQuantize(app, command);
  circlet::AddEvaluate(app, command);
  circlet::AddVerify(app, command);
  circlet::AddMakeCheckpoint(app, command);
  circlet::AddShow(app, command);
  circlet::AddRun(app, command);
  circlet::AddExample(app, command);
  circlet::AddInspect(app, command);
  const bool first = circlet::Launched().rank == 0;
  circlet::Communicator* world = nullptr;
  try {
    app.parse(argc, argv);
    if (threads > 0) circlet::SetThreads(threads);
    const bool shared = app.got_subcommand("quantize") || app.got_subcommand("evaluate");
    if (!shared && !first) return 0;  // one process does it
    if (shared) world = &circlet::World();
    return command();
  } catch (const CLI::ParseError& error) {
    return first ? Refuse(app, error) : 0;  // all have the same command line
  } catch (const circlet::Bug& bug) {
    return TellFailure(world, 3, fmt::format("this is a bug: {}", bug.what()));
  } catch (const circlet::Error& error) {
    return TellFailure(world, 2, error.what());
  } catch (const std::bad_alloc&) {
    return TellFailure(world, 2, "out of memory");
  } catch (const std::exception& error) {
    return TellFailure(world, 3, fmt::format("this is a bug: {}", error.what()));
  }
}
