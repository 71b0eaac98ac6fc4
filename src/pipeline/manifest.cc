#include "pipeline/manifest.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "ops/simd.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

fs::path WithoutSlash(const fs::path& path) { return path.filename().empty() ? path.parent_path() : path; }

nlohmann::json FileEntry(const fs::path& path, const std::string& name) {
  return {{"file", name}, {"bytes", fs::file_size(path)}, {"sha256", Sha256File(path)}};
}

// Checkpoint files by content, so that a manifest tells what it was made from.
nlohmann::json InputEntries(const QuantizeOptions& options) {
  nlohmann::json inputs = nlohmann::json::array();
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(options.model)) {
    const std::string extension = entry.path().extension();
    if (entry.is_regular_file() && (extension == ".json" || extension == ".safetensors" || extension == ".jinja"))
      files.push_back(entry.path());
  }
  for (const fs::path& path : {options.data, options.samples, options.qparams, options.eval_text, options.eval_captions})
    if (!path.empty()) files.push_back(path);
  std::sort(files.begin(), files.end());
  for (const fs::path& path : files) inputs.push_back(FileEntry(path, path.filename()));
  return inputs;
}

}  // namespace

OutputRun::OutputRun(fs::path final_path, bool force)
    : final_(WithoutSlash(final_path)), partial_(final_.string() + ".partial"), force_(force) {
  // With `force` an earlier result stays until this run has succeeded.
  if (fs::exists(final_) && !(force && fs::is_directory(final_))) PrepareOutputDirectory(final_, false);
  std::error_code ignored;
  fs::remove_all(partial_, ignored);
  PrepareOutputDirectory(partial_, false);
}

OutputRun::~OutputRun() {
  std::error_code ignored;
  if (!finished_) fs::remove_all(partial_, ignored);
}

void OutputRun::Finish(const QuantizeOptions& options, const Calibration& calibration, const UnitWriter& units,
                       const QuantizeResult& result) {
  WriteJson(partial_ / kPipelineFile, units.Pipeline());
  calibration.Params().Save(partial_ / "qparams.json", {{"model", result.model},
                                                        {"recipe", result.recipe},
                                                        {"dialect", result.dialect}});
  WriteFile(partial_ / "report.json", ReportJson(result));
  WriteFile(partial_ / "effective_config.yaml", calibration.GetRecipe().EffectiveYaml());

  nlohmann::json outputs = nlohmann::json::array();
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(partial_)) files.push_back(entry.path());
  std::sort(files.begin(), files.end());
  for (const fs::path& path : files) outputs.push_back(FileEntry(path, path.filename()));
  WriteJson(partial_ / kManifestFile, {{"schema_version", 1},
                                       {"circlet_version", CIRCLET_VERSION},
                                       {"instruction_set", simd::InstructionSet()},
                                       {"model", result.model},
                                       {"recipe", result.recipe},
                                       {"dialect", result.dialect},
                                       {"seed", calibration.GetRecipe().runtime.seed},
                                       {"max_seq_len", result.max_seq_len},
                                       {"random_data", result.random_data},
                                       {"inputs", InputEntries(options)},
                                       {"outputs", outputs}});
  WriteJson(partial_ / "timings.json", {{"seconds", result.seconds}});

  if (fs::exists(final_)) PrepareOutputDirectory(final_, force_);
  std::error_code error;
  if (fs::exists(final_)) {
    // What is not ours stays; our files move in one by one, the manifest last.
    files.push_back(partial_ / "timings.json");
    files.push_back(partial_ / kManifestFile);
    for (const fs::path& path : files) fs::rename(path, final_ / path.filename());
    fs::remove(partial_, error);
  } else {
    fs::rename(partial_, final_, error);
    if (error) Fail("{}: cannot take its final name: {}", final_.string(), error.message());
  }
  finished_ = true;
}

}  // namespace circlet
