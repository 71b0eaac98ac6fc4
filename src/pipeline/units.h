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

namespace circlet {

// One end of a unit: where its values come from or go to. Ends with the same key lie on the same grid.
struct UnitEnd {
  std::string name;  // "hidden"
  std::string key;   // "hidden.3"
  TensorType type;   // storage type and shape, 1 for an open size
  std::vector<int32_t> signature;
  std::optional<QParams> grid;
};

struct Unit {
  UnitFile file;
  std::vector<UnitEnd> inputs, outputs;
};

// What a unit is made of. Keys by graph input and output name; values of the verification sample likewise, float32 (ids
// int64); no values = the unit is written without codes.
struct UnitSpec {
  std::string name;
  Graph graph;
  bool dynamic_length = false;
  std::map<std::string, std::string> keys;
  std::map<std::string, std::string> output_keys;  // where an output's key is not that of an input with its name
  std::map<std::string, Tensor> inputs, outputs;
};

class UnitWriter {
 public:
  // Codes wait in `store` until WriteCodes.
  UnitWriter(std::filesystem::path directory, const Calibration& calibration, ActivationStore& store)
      : directory_(std::move(directory)), calibration_(calibration), store_(store) {}

  // Writes NAME.q.circle and remembers the unit's codes. `stored` gives parameters in any float type; units that share
  // parameters are written from the same grids.
  void Write(UnitSpec spec, const WeightSource& stored) { Write(std::move(spec), CalibratedGrids(calibration_, stored)); }
  void Write(UnitSpec spec, const CalibratedGrids& grids);

  // A file of tensors that units share.
  void WriteTensors(const std::string& file, const std::map<std::string, Tensor>& tensors);
  void WriteSettings(const std::string& file, const nlohmann::json& settings);
  // SHA-256 of a file as it was written; "" for one that is not this writer's.
  std::string HashOf(const std::string& file) const;

  const std::vector<Unit>& Units() const { return units_; }
  const std::filesystem::path& Directory() const { return directory_; }
  // verify.safetensors: UNIT.in.K and UNIT.out.K as codes of the tensor's type; one that equals an earlier one is named in
  // the metadata instead ("UNIT.in.K": "OTHER.out.K").
  void WriteCodes() const;
  // pipeline.json: the units, their ends, and the boundaries between them.
  nlohmann::json Pipeline() const;

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
  void Remember(const std::string& unit, bool input, size_t index, const circle::Tensor& tensor, const Tensor& values);
  void Written(const std::string& file) { hashes_[file] = Sha256File(directory_ / file); }

  std::filesystem::path directory_;
  const Calibration& calibration_;
  ActivationStore& store_;
  std::vector<Unit> units_;
  std::map<std::string, std::string> hashes_;  // by file
  std::map<std::string, CodesPlace> codes_;
  std::map<std::string, std::string> same_as_;
  std::map<std::string, std::string> first_with_;  // hash of codes -> name
};

inline constexpr char kUnitSuffix[] = ".q.circle";
inline constexpr char kCodesFile[] = "verify.safetensors";
inline constexpr char kPipelineFile[] = "pipeline.json";

nlohmann::json ToJson(const UnitEnd& end);

}  // namespace circlet
