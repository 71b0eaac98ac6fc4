#pragma once

// Export units: one graph, one Circle file, and the codes that it must reproduce.

#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <vector>

#include "circlet/circle/export.h"
#include "circlet/io/file.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/quant/calibration.h"
#include "pipeline/activations.h"
#include "pipeline/output_directory.h"
#include "pipeline/phase.h"

namespace circlet {

// One end of a unit: where its values come from or go to. Ends with the same key lie on the same grid.
struct UnitEnd {
  std::string name;  // "hidden"
  std::string key;   // "hidden.3"
  std::string tensor;  // its name in the file
  TensorType type;   // storage type and shape, 1 for an open size
  std::vector<int32_t> signature;
  std::optional<QParams> grid;
};

struct Unit {
  UnitFile file;
  bool whole_graph = false;  // of many layers, beside the files of its parts
  std::vector<UnitEnd> inputs, outputs;
};

class UnitWriter {
 public:
  // Codes wait in `store` until WriteCodes.
  UnitWriter(std::filesystem::path directory, const Calibration& calibration, ActivationStore& store)
      : directory_(std::move(directory)), calibration_(calibration), store_(store) {}

  // Writes NAME.q.circle.
  void Write(const UnitSpec& spec, const RoundedWeights& weights);
  // Remembers the codes at the unit's ends and puts what later units read into the store. Behind Write.
  void Remember(const UnitSpec& spec, const RoundedWeights& weights);
  // A parameter's codes, mapped from the file of a unit that was written first; empty when there is none.
  Tensor WrittenCodes(const std::string& parameter) const;

  // A file of another kind: `write` is called with its path.
  void WriteFile(const std::string& name, const std::function<void(const std::filesystem::path&)>& write);
  // SHA-256 of a file as it was written; "" for one that is not this writer's.
  std::string HashOf(const std::string& file) const;

  const std::vector<Unit>& Units() const { return units_; }
  const std::filesystem::path& Directory() const { return directory_; }
  // verify.safetensors: UNIT.in.K and UNIT.out.K as codes of the tensor's type; one that equals an earlier one is named
  // in the metadata instead ("UNIT.in.K": "OTHER.out.K").
  void WriteCodes() const;
  // pipeline.json: the units, their ends, the boundaries between them, and what the family adds (ModelJob::Contract).
  nlohmann::json Pipeline(const nlohmann::json& contract) const;

  // What was written, for another process that goes on with the same directory and store. Restore throws Error for a
  // file that is not what was written.
  nlohmann::json Save() const;
  void Restore(const nlohmann::json& state);

 private:
  // An end of a unit, "decoder_layer_decode_0.in.3", and where its codes lie in the store.
  struct CodesPlace {
    std::string key;
    int item = 0;
  };
  // What the verification sample's values at the unit's ends are, by name; nothing without one.
  using Values = std::map<std::string, Tensor>;
  Values Inputs(const UnitSpec& spec) const;
  Values Outputs(const UnitSpec& spec, const Graph& graph, const Values& inputs, const RoundedWeights& weights) const;
  Tensor ValueOf(const UnitSpec& spec, const UnitValue& value) const;
  void Remember(const std::string& unit, bool input, size_t index, const UnitEnd& end, const Tensor& values);
  void Written(const std::string& file) { hashes_[file] = Sha256File(directory_ / file); }

  std::filesystem::path directory_;
  const Calibration& calibration_;
  ActivationStore& store_;
  std::vector<Unit> units_;
  std::map<std::string, std::string> hashes_;  // by file
  std::map<std::string, std::string> tables_;  // by parameter: the file that holds its codes
  std::map<std::string, CodesPlace> codes_;
  std::map<std::string, std::string> same_as_;
  std::map<std::string, std::string> first_with_;  // hash of codes -> name
};

inline constexpr char kUnitSuffix[] = ".q.circle";
inline constexpr char kCodesFile[] = "verify.safetensors";
inline constexpr char kPipelineFile[] = "pipeline.json";
inline constexpr int kPipelineVersion = 2;  // written; 1, which does not say how units are run, is read too
// "kind" of a unit in it: one graph of many layers, or "part".
inline constexpr char kWholeGraph[] = "whole_graph";

nlohmann::json ToJson(const UnitEnd& end);

}  // namespace circlet
