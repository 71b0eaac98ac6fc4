#include <fmt/core.h>
#include <fmt/ranges.h>

#include <limits>
#include <memory>

#include "circlet/smoke/smoke.h"
#include "cli/commands.h"
#include "cli/print.h"
#include "cli/flags.h"

namespace circlet {

void AddExample(CLI::App& app, std::function<int()>& command) {
  struct Options {
    std::string name, output_dir = ".";
    uint64_t seed = 123;
  };
  auto options = std::make_shared<Options>();
  CLI::App* example = app.add_subcommand("example", "A tiny random model from calibration to a Circle file");
  example->footer("Example:\n  circlet example gemma4_model");
  example->add_option("NAME", options->name, fmt::format("{}", fmt::join(ExampleNames(), ", ")))->required();
  example->add_option("--output-dir", options->output_dir, "Where the file goes")
      ->type_name("DIR")
      ->capture_default_str();
  example->add_option("--seed", options->seed, "Seed of parameters and samples")
      ->check(WholeNumber(0, std::numeric_limits<int64_t>::max()))
      ->capture_default_str();
  example->callback([options, &command] {
    command = [options] {
      Print(RunExample(options->name, options->output_dir, options->seed));
      return 0;
    };
  });
}

}  // namespace circlet
