#pragma once

// What a run saves after its phases, so that a killed one goes on where it was (`--resume`).

#include <chrono>
#include <filesystem>
#include <functional>
#include <nlohmann/json.hpp>
#include <optional>
#include <string>
#include <vector>

#include "circlet/base/communicator.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/quant/calibration.h"
#include "pipeline/activations.h"
#include "pipeline/measures.h"
#include "pipeline/units.h"

namespace circlet {

inline constexpr char kSamplesIdentity[] = "samples or the pictures that they name";
// What must be the same for a run to go on: the program, what it reads, and everything that its outputs depend on.
// `inputs` are files by content; samples are taken as they were read, so that what their files name counts too.
nlohmann::json IdentityOf(const QuantizeOptions& options, const Recipe& recipe, int processes,
                          const std::string& samples_hash, const nlohmann::json& inputs);

// Everything that a phase changes.
struct RunParts {
  Calibration& calibration;
  ActivationStore& store;
  UnitWriter& units;
  std::vector<StageError>& errors;
  std::vector<RoundedLinear>& linears;
  std::vector<SecondRounding>& second_roundings;
  std::optional<HeadResult>& head;
  std::optional<ComputeChange>& change;
  std::map<std::string, double>& seconds;
};

// For other processes too.
nlohmann::json SaveChange(const ComputeChange& change);
ComputeChange RestoreChange(const nlohmann::json& json);

class RunState {
 public:
  // `directory` is this process's own. Saves at least `save_seconds` apart; 0: after every phase.
  RunState(std::filesystem::path directory, nlohmann::json identity, double save_seconds, Communicator& world);

  // Where activations go.
  std::filesystem::path ValuesDirectory() const { return directory_ / "values"; }

  // The number of finished phases of `phases`, and `parts` as they were then; 0 when nothing was saved. Throws Error
  // naming what has changed since, and for a state, a unit's file or a value that is not what was saved. `specs` gives the
  // specification of each point.
  int Load(RunParts& parts, const std::function<PointSpec(const std::string& point)>& specs, int phases);

  // What the run had computed before its phases, the first process's for all; null when nothing was saved. Throws Error
  // naming what has changed since. Collective, as is SavePreparation.
  nlohmann::json LoadPreparation() const;
  void SavePreparation(const nlohmann::json& made) const;

  // Behind phase number `done`; false when the last one is too fresh. All processes call it.
  bool Save(int done, RunParts& parts);

 private:
  std::vector<int> Numbers() const;
  void RemoveOthers(int kept) const;
  nlohmann::json ReadHashed(const std::filesystem::path& path) const;
  nlohmann::json Read(int number, int phases) const;
  void RequireSameRun(const nlohmann::json& state) const;
  void RestoreParams(Calibration& calibration, const std::function<PointSpec(const std::string&)>& specs);
  void Restore(const nlohmann::json& state, RunParts& parts, const std::function<PointSpec(const std::string&)>& specs);
  std::filesystem::path PreparationPath() const { return directory_ / "prepared.json"; }
  std::filesystem::path StatePath(int number) const { return directory_ / fmt::format("state.{}.json", number); }
  void SaveNewParams(int done, const ParameterStore& params);

  std::filesystem::path directory_;
  nlohmann::json identity_;
  std::chrono::duration<double> interval_;
  std::chrono::steady_clock::time_point last_save_ = std::chrono::steady_clock::now();
  Communicator& world_;
  std::vector<std::pair<std::string, std::string>> params_files_;  // name and SHA-256
  size_t params_saved_ = 0;
};

}  // namespace circlet
