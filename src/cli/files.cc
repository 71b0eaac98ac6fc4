#include <fmt/core.h>

#include <memory>

#include "circlet/base/error.h"
#include "circlet/circle/listing.h"
#include "circlet/io/file.h"
#include "circlet/io/safetensors.h"
#include "circlet/pipeline/verify.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "cli/print.h"

namespace circlet {

void AddVerify(CLI::App& app, std::function<int()>& command) {
  struct Options {
    VerifyOptions verify;
    std::string json;
    bool quiet = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* verify = app.add_subcommand("verify", "Run every exported file and compare it with the simulation");
  verify->footer("Example:\n  circlet verify out/");
  verify->add_option("DIR", options->verify.directory, "Output directory of quantize")->required();
  verify->add_option("--samples", options->verify.codes, "Other inputs and codes, keys as in verify.safetensors")
      ->type_name("FILE");
  verify->add_option("--json", options->json, "Also write the verdict as JSON")
      ->check(WritableFile())
      ->type_name("FILE");
  verify->add_flag("--quiet", options->quiet, "No progress");
  verify->callback([options, &command] {
    command = [options] {
      options->verify.progress = options->quiet ? nullptr : stderr;
      const VerifyResult result = Verify(options->verify);
      if (!options->json.empty()) WriteFile(options->json, VerifyJson(result));
      Print(VerifyText(result, Columns()));
      if (result.within_bounds) return 0;
      return result.verdict == VerifyResult::Verdict::kDifferent ? 1 : 2;
    };
  });
}

void AddShow(CLI::App& app, std::function<int()>& command) {
  struct Options {
    std::string path;
    bool json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* show =
      app.add_subcommand("show", "List a Circle file, or all of a directory: tensors, bytes, grids, operators");
  show->footer("Example:\n  circlet show out/lm_head.q.circle\n  circlet show out/");
  show->add_option("FILE", options->path, "Circle file, or a directory of them")->required();
  show->add_flag("--json", options->json, "As JSON");
  show->callback([options, &command] {
    command = [options] {
      const bool all = std::filesystem::is_directory(options->path);
      const auto text = all ? (options->json ? circle::DirectoryJson : circle::DirectoryText)
                            : (options->json ? circle::ListingJson : circle::ListingText);
      Print(text(options->path));
      return 0;
    };
  });
}

void AddRun(CLI::App& app, std::function<int()>& command) {
  struct Options {
    RunOptions run;
    std::string outputs;
  };
  auto options = std::make_shared<Options>();
  CLI::App* run = app.add_subcommand("run", "Run a Circle file on tensors of a safetensors file");
  run->footer(
      "Example:\n  circlet run out/lm_head.q.circle --unit lm_head --inputs out/verify.safetensors "
      "--outputs result.safetensors");
  run->add_option("FILE", options->run.file, "Circle file")->required();
  run->add_option("--inputs", options->run.inputs, "By tensor name or in.0, in.1, ...; codes or float values")
      ->type_name("FILE")
      ->required();
  run->add_option("--unit", options->run.unit, "Take UNIT.in.0, UNIT.in.1, ... of the inputs, as in verify.safetensors")
      ->type_name("UNIT");
  run->add_option("--outputs", options->outputs, "out.0, out.1, ... as float32")
      ->check(WritableFile())
      ->type_name("FILE")
      ->required();
  run->add_flag("--codes", options->run.codes, "Outputs as codes of their tensors' types");
  run->callback([options, &command] {
    command = [options] {
      const RunResult result = RunFile(options->run);
      WriteSafetensors(options->outputs, result.outputs);
      for (const std::string& outside : result.outside) fmt::print("{}\n", outside);
      for (const auto& [name, tensor] : result.outputs) fmt::print("{}: {}\n", name, tensor.Type().ToString());
      fmt::print("written to {}\n", options->outputs);
      return 0;
    };
  });
}

}  // namespace circlet
