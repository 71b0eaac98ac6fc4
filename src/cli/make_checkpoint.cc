#include "circlet/model/gemma4/make_checkpoint.h"

#include <fmt/core.h>
#include <fmt/ranges.h>

#include <limits>
#include <memory>

#include "circlet/io/file.h"
#include "cli/commands.h"
#include "cli/flags.h"

namespace circlet {

void AddMakeCheckpoint(CLI::App& app, std::function<int()>& command) {
  struct Options {
    std::string preset = "tiny", directory;
    uint64_t seed = 1;
  };
  auto options = std::make_shared<Options>();
  CLI::App* make = app.add_subcommand("make-checkpoint", "Write a random checkpoint of a released model's shape");
  make->footer("Example:\n  circlet make-checkpoint --preset e2b-short --seed 1 random-e2b-short");
  make->add_option("DIR", options->directory, "New directory")->required();
  make->add_option("--preset", options->preset, fmt::format("{}", fmt::join(CheckpointPresets(), ", ")))
      ->type_name("NAME")
      ->capture_default_str();
  make->add_option("--seed", options->seed, "The same seed gives the same bytes")
      ->check(WholeNumber(0, std::numeric_limits<int64_t>::max()))
      ->capture_default_str();
  make->callback([options, &command] {
    command = [options] {
      MakeCheckpoint(options->preset, options->seed, options->directory, {});
      fmt::print("written to {}; next: circlet quantize {} --random-samples 2x64 --output out\n", options->directory,
                 options->directory);
      return 0;
    };
  });
}

}  // namespace circlet
