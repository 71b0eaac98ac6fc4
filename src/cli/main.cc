#include <fmt/core.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <system_error>
#include <thread>

#include "base/mpi.h"
#include "base/processors.h"
#include "circlet/base/communicator.h"
#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/names.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "cli/help.h"
#include "cli/process.h"
#include "ops/integer_product.h"

namespace {

int Tell(const std::string& text) {
  constexpr size_t kShown = 8000;  // names and values of a damaged file may be megabytes long
  const char* const end = text.size() > kShown ? "..." : "";
  std::fputs(fmt::format("circlet: {}{}\n", text.substr(0, kShown), end).c_str(),
             stderr);  // may be full or closed: the exit code still tells
  std::fflush(nullptr);
  return 2;
}

// The command's first example, which shows where its words go.
std::string ExampleHint(const CLI::App& command) {
  constexpr std::string_view kBegin = "Example:\n  ";
  const std::string footer = command.get_footer();
  if (!footer.starts_with(kBegin)) return "";
  return fmt::format("; for example `{}`",
                     footer.substr(kBegin.size(), footer.find('\n', kBegin.size()) - kBegin.size()));
}

// A flag that there is not names the nearest that there is, a word too many where words go.
std::string UnknownText(const CLI::App& app, const CLI::App& command, const std::string& word) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options())
    for (const std::string& name : option->get_lnames()) names.push_back("--" + name);
  for (const CLI::App* verb : command.get_subcommands({})) names.push_back(verb->get_name());
  std::string hint = circlet::NearestHint(word, names);
  if (hint.empty() && !word.starts_with('-')) hint = ExampleHint(command);
  return fmt::format("{}: not expected here{}; `circlet {}--help` lists what is", word, hint,
                     &command == &app ? "" : command.get_name() + " ");
}

// --help and --version are CLI11's "errors" too.
int Refuse(const CLI::App& app, const CLI::ParseError& error) {
  if (error.get_exit_code() == 0) {
    app.exit(error);
    circlet::FlushOutput();
    return 0;
  }
  const std::vector<CLI::App*> chosen = app.get_subcommands();
  const CLI::App& command = chosen.empty() ? app : *chosen.front();
  if (const std::vector<std::string> unknown = app.remaining(/*recurse=*/true); !unknown.empty())
    return Tell(UnknownText(app, command, unknown.front()));
  if (chosen.empty() && error.get_name() == "RequiredError")
    return Tell(
        "give a command, such as `circlet quantize MODEL_DIR --data FILE --output DIR`; `circlet help` lists all");
  return Tell(
      fmt::format("{}; `circlet {}--help` tells more", error.what(), chosen.empty() ? "" : command.get_name() + " "));
}

// `help` and `help VERB` as others have them, put into CLI11's terms; a word that is no verb is left to stand alone.
std::vector<std::string> Arguments(const CLI::App& app, int argc, char** argv) {
  std::vector<std::string> words(argv + std::min(argc, 1), argv + argc);
  if (!words.empty() && words[0] == "help") {
    words.erase(words.begin());
    const auto is_it = [&](const CLI::App* verb) { return verb->get_name() == words[0]; };
    if (words.empty() || std::ranges::any_of(app.get_subcommands({}), is_it)) words.emplace_back("--help");
  }
  std::ranges::reverse(words);  // CLI11 takes them from the back
  return words;
}

std::string VersionText() {
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  const bool mpi = std::filesystem::exists(program.parent_path() / circlet::kMpiModule, error);
  return fmt::format("circlet {} ({}, MPI {})", CIRCLET_VERSION, circlet::InstructionSets(), mpi ? "yes" : "no");
}

// The processes of one run mostly fail alike, and one message is enough: the first tells its failure at once and ends
// the others, which wait for that, each longer than the one before it. `world` is null before the processes are
// connected; then they end when the launcher sees that this one did, after a second with Open MPI.
int TellFailure(bool shared, circlet::Communicator* world, int exit_code, const std::string& text) {
  if (shared)
    std::this_thread::sleep_for(std::chrono::milliseconds(world != nullptr ? 500 : 2000) * circlet::Launched().rank);
  Tell(text);
  if (world != nullptr) world->Abort(exit_code);
  return exit_code;
}

// What the system refused, in plain words.
std::string TextOf(const std::system_error& error) {
  if (const auto* const of_file = dynamic_cast<const std::filesystem::filesystem_error*>(&error))
    return fmt::format("{}: {}", of_file->path1().empty() ? "the working directory" : of_file->path1().string(),
                       error.code().message());
  if (std::ferror(stdout) != 0) return fmt::format("standard output: cannot be written: {}", error.code().message());
  return error.what();
}

// Exit codes: 0 done, 1 a result below the wanted bound, 2 an error that the user can mend, 3 a bug.
int Run(int argc, char** argv) {
  CLI::App app{"From a Gemma 4 checkpoint to calibrated, verified Circle files", "circlet"};
  app.set_version_flag("--version", VersionText);
  app.require_subcommand(1);
  app.formatter(std::make_shared<circlet::HelpFormatter>());
  std::function<int()> command;
  circlet::AddQuantize(app, command);
  circlet::AddEvaluate(app, command);
  circlet::AddVerify(app, command);
  circlet::AddMakeCheckpoint(app, command);
  circlet::AddShow(app, command);
  circlet::AddRun(app, command);
  circlet::AddGenerate(app, command);
  circlet::AddChat(app, command);
  circlet::AddTokenize(app, command);
  circlet::AddPreprocess(app, command);
  circlet::AddExample(app, command);
  circlet::AddInspect(app, command);
  circlet::AddMadeOfParser(app, command);
  int threads = 0;
  const auto add_threads = [&threads](CLI::App& place) {
    place
        .add_option("--threads", threads,
                    "Threads to use (default: the processors that the process is granted); results do not depend on it")
        ->check(circlet::WholeNumber(1, 1024))
        ->group(circlet::kGeneralGroup);
    place.get_help_ptr()->group(circlet::kGeneralGroup)->description("This text");
  };
  add_threads(app);
  app.get_version_ptr()->group(circlet::kGeneralGroup)->description("Version, instruction set, MPI");
  for (CLI::App* verb : app.get_subcommands({})) {
    add_threads(*verb);
    // What is said to a model may be empty (CLI11's own type of a text); names of files and words may not.
    for (CLI::Option* option : verb->get_options())
      if (option->get_items_expected_max() > 0 && option->get_type_name() != "TEXT") option->check(circlet::NotEmpty());
  }

  circlet::Communicator* world = nullptr;
  bool shared = false;  // whether the processes that were started together share one run; else each does the whole
  const auto fail = [&](int exit_code, const std::string& text) { return TellFailure(shared, world, exit_code, text); };
  try {
    try {
      app.parse(Arguments(app, argc, argv));
    } catch (const CLI::ParseError& error) {
      shared = app.got_subcommand("quantize") || app.got_subcommand("evaluate");
      // All have the same command line.
      return shared && circlet::Launched().rank > 0 ? (error.get_exit_code() == 0 ? 0 : 2) : Refuse(app, error);
    }
    shared = app.got_subcommand("quantize") || app.got_subcommand("evaluate");
    if (threads > 0 || std::getenv("OMP_NUM_THREADS") == nullptr)
      circlet::SetThreads(threads > 0 ? threads : circlet::ProcessorsGranted());
    if (const int given = circlet::Threads(); given < threads)
      Tell(fmt::format("--threads {}: OpenMP gives {} (OMP_THREAD_LIMIT and OMP_MAX_ACTIVE_LEVELS bound it)", threads,
                       given));
    if (shared) world = &circlet::World();
    const int exit_code = command();
    circlet::FlushOutput();
    return exit_code;
  } catch (const circlet::Bug& bug) {
    return fail(3, fmt::format("this is a bug: {}", bug.what()));
  } catch (const circlet::Error& error) {
    return fail(2, error.what());
  } catch (const std::system_error& error) {
    return fail(2, TextOf(error));
  } catch (const std::bad_alloc&) {
    return fail(2, "out of memory");
  } catch (const std::exception& error) {
    return fail(3, fmt::format("this is a bug: {}", error.what()));
  }
}

}  // namespace

int main(int argc, char** argv) {
  circlet::PrepareProcess(argv);
  try {
    return Run(argc, argv);
  } catch (const std::bad_alloc&) {  // not even the options fit
    std::fputs("circlet: out of memory\n", stderr);
    return 2;
  }
}
