#include "pipeline/manifest.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "ops/integer_product.h"
#include "pipeline/run_state.h"
#include "pipeline/stored_codes.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

// `hash`: where it is known; "" takes it from the file.
nlohmann::json FileEntry(const fs::path& path, const std::string& name, const std::string& hash = "") {
  return {{"file", name}, {"bytes", fs::file_size(path)}, {"sha256", hash.empty() ? Sha256File(path) : hash}};
}

// Checkpoint files by content, so that a manifest tells what it was made from.
nlohmann::json InputEntries(const QuantizeOptions& options, std::span<const DataFile> data) {
  std::map<fs::path, nlohmann::json> entries;  // in the order of the paths
  std::vector<fs::path> files;
  // Of the tensor files those that are read: another one may be of any size.
  for (const std::string& name : Checkpoint::FilesOf(options.model)) files.push_back(options.model / name);
  for (const auto& entry : fs::directory_iterator(options.model)) {
    const std::string extension = entry.path().extension();
    if (entry.is_regular_file() && (extension == ".json" || extension == ".jinja")) files.push_back(entry.path());
  }
  for (const fs::path& path : {options.samples, options.qparams, options.eval_text})
    if (!path.empty()) files.push_back(path);
  for (const fs::path& path : files) entries.emplace(path, FileEntry(path, path.filename()));
  // What was read, since a pipe cannot be read again.
  for (const DataFile& file : data)
    entries.emplace(file.place, nlohmann::json{{"file", file.name}, {"bytes", file.bytes}, {"sha256", file.sha256}});
  nlohmann::json inputs = nlohmann::json::array();
  for (auto& [path, entry] : entries) inputs.push_back(std::move(entry));
  return inputs;
}

}  // namespace

OutputDirectory::Mode ModeOf(const QuantizeOptions& options) {
  using Mode = OutputDirectory::Mode;
  return options.force ? Mode::kForce : options.resume ? Mode::kResume : Mode::kNew;
}

nlohmann::json ToJson(const FrozenGrids& grids) { return {{"file", grids.file}, {"recipe", grids.recipe}}; }

OutputRun::OutputRun(const QuantizeOptions& options, std::span<const DataFile> data, Communicator& world)
    : options_(options),
      world_(world),
      directory_(options.output, ModeOf(options), world.Rank() == 0),
      inputs_(InputEntries(options, data)) {}

bool OutputRun::Begin(const nlohmann::json& identity) {
  // How many processes shared the work changes nothing in the files.
  nlohmann::json run = identity;
  run.erase("number of processes");
  samples_hash_ = identity.at(kSamplesIdentity);
  const std::string text = run.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);  // names of files
  run_ = Sha256(std::as_bytes(std::span(text)));
  const bool done = world_.Rank() == 0 && options_.resume && !directory_.GoesOn() && directory_.Taken() && IsDone();
  if (world_.Rank() == 0 && !done) directory_.Begin();
  return world_.AllGather(done ? "done" : "").front().empty();
}

bool OutputRun::IsDone() const {
  const fs::path manifest = directory_.Final() / kManifestFile;
  if (!fs::is_regular_file(fs::symlink_status(manifest))) PrepareOutputDirectory(options_.output);
  const nlohmann::json json = ReadJson(manifest);
  if (!json.is_object() || json.value("run", nlohmann::json()) != run_)
    Fail("{}: holds the result of another run, none to go on with; --force replaces it, or choose another directory",
         options_.output.string());
  if (const std::string damaged = FirstDamaged(directory_.Final(), directory_.Final()); !damaged.empty())
    Fail("{}: is not the file that the finished run wrote (SHA-256 in {}); --force makes all of them again", damaged,
         kManifestFile);
  return true;
}

int64_t OutputRun::Bytes() const {
  int64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(Directory()))
    if (entry.is_regular_file()) bytes += static_cast<int64_t>(entry.file_size());
  return bytes;
}

fs::path OutputRun::StateDirectory() const { return directory_.State() / fmt::format("rank.{}", world_.Rank()); }

void OutputRun::Finish(const Settings& settings, const Calibration& calibration, nlohmann::json pipeline,
                       const UnitWriter& units, const QuantizeResult& result) {
  nlohmann::json grids = {{"model", result.model}, {"recipe", result.recipe}, {"dialect", result.dialect}};
  if (result.grids) grids["grids"] = ToJson(*result.grids);
  const bool widened = result.widening && !result.widening->Empty();
  if (widened) pipeline["widening"] = grids["widening"] = ToJson(*result.widening);
  if (const float fold = calibration.GetRecipe().fold; fold > 0) grids["fold"] = fold;
  WriteJson(Directory() / kPipelineFile, pipeline);
  calibration.Params().Save(Directory() / "qparams.json", grids);
  WriteFile(Directory() / "report.json", ReportJson(result));
  WriteFile(Directory() / "effective_config.yaml", calibration.GetRecipe().EffectiveYaml());

  nlohmann::json outputs = nlohmann::json::array();
  for (const fs::path& path : EntriesOf(Directory()))
    if (const std::string name = path.filename(); fs::is_regular_file(path) && name != kTimingsFile)
      outputs.push_back(FileEntry(path, name, units.HashOf(name)));
  WriteJson(Directory() / kTimingsFile, {{"seconds", result.seconds}});
  nlohmann::json manifest = {{"schema_version", 1},
                             {"circlet_version", CIRCLET_VERSION},
                             {"instruction_set", InstructionSets()},
                             {"run", run_},
                             {"model", result.model},
                             {"recipe", result.recipe},
                             {"dialect", result.dialect},
                             {"seed", settings.runtime.seed},
                             {"max_seq_len", result.max_seq_len},
                             {"random_data", result.random_data},
                             {"inputs", inputs_},
                             {"samples_sha256", samples_hash_},
                             {"outputs", outputs}};
  if (!options_.command.empty()) manifest["command"] = options_.command;
  for (const CodesChecksum& codes : result.stored_codes)
    manifest[kStoredCodes][codes.parameter] = {{"bits", codes.bits},
                                               {"codes", codes.codes},
                                               {"codes_sha256", codes.codes_sha256},
                                               {"scales_sha256", codes.scales_sha256}};
  if (result.grids) manifest["grids"] = ToJson(*result.grids);
  if (widened) manifest["widening"] = ToJson(*result.widening);
  WriteJson(Directory() / kManifestFile, manifest);
  directory_.TakeName();
}

}  // namespace circlet
