#include "pipeline/manifest.h"

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "ops/integer_product.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

constexpr char kStateFolder[] = "unfinished";
constexpr char kTimingsFile[] = "timings.json";

// Whether a run saved something there that another can go on from.
bool HoldsState(const fs::path& partial) {
  if (!fs::is_directory(partial / kStateFolder)) return false;
  for (const auto& entry : fs::recursive_directory_iterator(partial / kStateFolder))
    if (entry.path().filename().string().starts_with("state.")) return true;
  return false;
}

fs::path WithoutSlash(const fs::path& path) { return path.filename().empty() ? path.parent_path() : path; }

nlohmann::json FileEntry(const fs::path& path, const std::string& name) {
  return {{"file", name}, {"bytes", fs::file_size(path)}, {"sha256", Sha256File(path)}};
}

// Checkpoint files by content, so that a manifest tells what it was made from.
nlohmann::json InputEntries(const QuantizeOptions& options, std::span<const DataFile> data) {
  std::map<fs::path, nlohmann::json> entries;  // in the order of the paths
  std::vector<fs::path> files;
  // Of the tensor files those that are read: another one may be of any size.
  for (const std::string& name : Checkpoint::FilesOf(options.model)) files.push_back(options.model / name);
  for (const auto& entry : fs::directory_iterator(options.model)) {
    const std::string extension = entry.path().extension();
    if (entry.is_regular_file() && (extension == ".json" || extension == ".jinja"))
      files.push_back(entry.path());
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

// A folder with nothing in it but processes' folders.
bool IsStateFolder(const fs::path& path) {
  if (!fs::is_directory(path)) return false;
  const fs::directory_iterator entries(path);
  return std::all_of(begin(entries), end(entries), [](const fs::directory_entry& entry) {
    return entry.is_directory() && entry.path().filename().string().starts_with("rank.");
  });
}

// Whether `partial` is a run's, at whatever moment that was killed: empty before its first step and behind the last of
// RemoveRun, else with its state.
bool IsRun(const fs::path& partial) {
  return fs::is_directory(partial) && (fs::is_empty(partial) || IsStateFolder(partial / kStateFolder));
}

// The state folder goes last: until then the rest is known as a run's.
void RemoveRun(const fs::path& partial) {
  std::error_code ignored;
  if (fs::is_directory(partial, ignored))
    for (const fs::directory_entry& entry : fs::directory_iterator(partial, ignored))
      if (entry.path().filename() != kStateFolder) fs::remove_all(entry.path(), ignored);
  fs::remove_all(partial, ignored);
}

}  // namespace

OutputRun::OutputRun(const QuantizeOptions& options, std::span<const DataFile> data, Communicator& world)
    : final_(WithoutSlash(options.output)),
      partial_(final_.string() + ".partial"),
      aside_(final_.string() + ".unfinished"),
      world_(world),
      force_(options.force) {
  inputs_ = InputEntries(options, data);
  if (world_.Rank() == 0) {
    SettleAside();
    // With `force` an earlier result stays until this run has succeeded.
    if (fs::exists(final_) && !(force_ && fs::is_directory(final_))) PrepareOutputDirectory(final_, false);
    if (fs::exists(partial_) && !IsRun(partial_))
      Fail("{}: is in the way and no unfinished run of circlet; move it away, or choose another output",
           partial_.string());
    kept_ = options.resume && HoldsState(partial_);
    if (!kept_ && !force_ && HoldsState(partial_))
      Fail("{}: holds an unfinished run; --resume goes on with it, --force starts again", partial_.string());
    if (kept_) {
      RemoveLeftovers(partial_);
    } else {
      RemoveRun(partial_);
      PrepareOutputDirectory(partial_, false);
    }
    CreateDirectories(StateDirectory());
  }
  world_.Barrier();
}

// A run that was killed while it took its final name left its state beside it.
void OutputRun::SettleAside() const {
  if (!fs::exists(aside_)) return;
  if (!IsStateFolder(aside_)) Fail("{}: is in the way; move it away, or choose another output", aside_.string());
  std::error_code error;
  if (fs::is_directory(partial_)) {
    fs::rename(aside_, partial_ / kStateFolder, error);
  } else {
    fs::remove_all(aside_, error);
  }
  if (error) Fail("{}: cannot be put back: {}", aside_.string(), error.message());
}

OutputRun::~OutputRun() {
  if (!kept_ && world_.Rank() == 0) RemoveRun(partial_);
}

int64_t OutputRun::Bytes() const {
  int64_t bytes = 0;
  for (const auto& entry : fs::recursive_directory_iterator(partial_))
    if (entry.is_regular_file()) bytes += static_cast<int64_t>(entry.file_size());
  return bytes;
}

fs::path OutputRun::StateDirectory() const { return partial_ / kStateFolder / fmt::format("rank.{}", world_.Rank()); }

void OutputRun::Finish(const Calibration& calibration, const UnitWriter& units, const QuantizeResult& result) {
  WriteJson(partial_ / kPipelineFile, units.Pipeline());
  calibration.Params().Save(partial_ / "qparams.json", {{"model", result.model},
                                                        {"recipe", result.recipe},
                                                        {"dialect", result.dialect}});
  WriteFile(partial_ / "report.json", ReportJson(result));
  WriteFile(partial_ / "effective_config.yaml", calibration.GetRecipe().EffectiveYaml());

  nlohmann::json outputs = nlohmann::json::array();
  std::vector<fs::path> files;
  for (const auto& entry : fs::directory_iterator(partial_))
    if (entry.is_regular_file()) files.push_back(entry.path());
  // A run that was killed in here has written these two, which the list leaves out.
  std::erase_if(files, [](const fs::path& path) {
    return path.filename() == kManifestFile || path.filename() == kTimingsFile;
  });
  std::sort(files.begin(), files.end());
  for (const fs::path& path : files) outputs.push_back(FileEntry(path, path.filename()));
  WriteJson(partial_ / kManifestFile, {{"schema_version", 1},
                                       {"circlet_version", CIRCLET_VERSION},
                                       {"instruction_set", InstructionSets()},
                                       {"model", result.model},
                                       {"recipe", result.recipe},
                                       {"dialect", result.dialect},
                                       {"seed", calibration.GetRecipe().runtime.seed},
                                       {"max_seq_len", result.max_seq_len},
                                       {"random_data", result.random_data},
                                       {"inputs", inputs_},
                                       {"outputs", outputs}});
  WriteJson(partial_ / kTimingsFile, {{"seconds", result.seconds}});

  if (fs::exists(final_)) PrepareOutputDirectory(final_, force_);
  std::error_code error;
  if (fs::exists(final_)) {
    // What is not ours stays; our files move in one by one, the manifest last.
    files.push_back(partial_ / kTimingsFile);
    files.push_back(partial_ / kManifestFile);
    for (const fs::path& path : files) fs::rename(path, final_ / path.filename());
    fs::remove_all(partial_, error);
  } else {
    // The state goes last: until the rename a killed run can go on.
    fs::rename(partial_ / kStateFolder, aside_, error);
    if (!error) fs::rename(partial_, final_, error);
    if (error) Fail("{}: cannot take its final name: {}", final_.string(), error.message());
    fs::remove_all(aside_, error);
  }
  kept_ = true;
}

}  // namespace circlet
