#include <fmt/core.h>

#include <memory>

#include "circlet/base/error.h"
#include "circlet/circle/model.h"
#include "circlet/io/safetensors.h"
#include "circlet/pipeline/verify.h"
#include "cli/commands.h"

namespace circlet {

void AddVerify(CLI::App& app, std::function<int()>& command) {
  auto options = std::make_shared<VerifyOptions>();
  CLI::App* verify = app.add_subcommand("verify", "Run every exported file and compare it with the simulation");
  verify->footer("Example:\n  circlet verify out/");
  verify->add_option("DIR", options->directory, "Output directory of quantize")->required();
  verify->add_option("--samples", options->codes, "Other inputs and codes, keys as in verify.safetensors");
  verify->callback([options, &command] {
    command = [options] {
      options->progress = stderr;
      const VerifyResult result = Verify(*options);
      fmt::print("{}", VerifyText(result));
      return result.within_bounds ? 0 : 1;
    };
  });
}

void AddShow(CLI::App& app, std::function<int()>& command) {
  auto file = std::make_shared<std::string>();
  CLI::App* show = app.add_subcommand("show", "List a Circle file: tensors, grids, operators");
  show->footer("Example:\n  circlet show out/lm_head.q.circle");
  show->add_option("FILE", *file, "Circle file")->required();
  show->callback([file, &command] {
    command = [file] {
      fmt::print("{}{}", circle::Describe(*file), circle::Dump(circle::Read(*file)));
      return 0;
    };
  });
}

void AddRun(CLI::App& app, std::function<int()>& command) {
  struct Options {
    std::string file, inputs, outputs;
  };
  auto options = std::make_shared<Options>();
  CLI::App* run = app.add_subcommand("run", "Run a Circle file on tensors of a safetensors file");
  run->footer("Example:\n  circlet run out/lm_head.q.circle --inputs in.safetensors --outputs out.safetensors");
  run->add_option("FILE", options->file, "Circle file")->required();
  run->add_option("--inputs", options->inputs, "By tensor name or in.0, in.1, ...; codes or float values")->required();
  run->add_option("--outputs", options->outputs, "out.0, out.1, ... as float32")->required();
  run->callback([options, &command] {
    command = [options] {
      const SafetensorsFile inputs = SafetensorsFile::Open(options->inputs);
      const auto outputs = RunFile(options->file, inputs.Tensors());
      WriteSafetensors(options->outputs, outputs);
      for (const auto& [name, tensor] : outputs) fmt::print("{}: {}\n", name, tensor.Type().ToString());
      fmt::print("written to {}\n", options->outputs);
      return 0;
    };
  });
}

}  // namespace circlet
