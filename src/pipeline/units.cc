#include "pipeline/units.h"

#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/quant/affine.h"

namespace circlet {
namespace {

UnitEnd EndOf(const circle::Tensor& tensor, const std::string& name, const std::map<std::string, std::string>& keys) {
  const auto key = keys.find(name);
  return {name, key == keys.end() ? "" : key->second, tensor.type, tensor.signature, tensor.qparams};
}

}  // namespace

void UnitWriter::Remember(const std::string& name, const circle::Tensor& tensor, const Tensor& values) {
  Tensor codes = tensor.qparams ? QuantizeWeight(values, *tensor.qparams, Rounding::kHalfAwayDivide).codes : values;
  const std::string text = codes.Type().ToString();
  const std::string hash =
      text + Sha256({codes.Raw(), static_cast<size_t>(codes.Bytes())});
  const auto [it, is_new] = first_with_.try_emplace(hash, name);
  if (is_new) {
    codes_[name] = codes;
  } else {
    same_as_[name] = it->second;
  }
}

void UnitWriter::Write(UnitSpec spec, const CalibratedGrids& grids) {
  const circle::Model model = Within(
      spec.name, [&] { return circle::ToCircle(spec.graph, grids, {.dynamic_length = spec.dynamic_length}); });
  Unit unit{.file = {.name = spec.name, .file = spec.name + kUnitSuffix}};
  unit.file.operators = static_cast<int64_t>(model.operators.size());
  unit.file.bytes = circle::Write(model, directory_ / unit.file.file);

  for (size_t i = 0; i < model.inputs.size(); ++i) {
    const std::string& name = spec.graph.At(spec.graph.Inputs()[i]).name;
    const circle::Tensor& tensor = model.tensors[model.inputs[i]];
    unit.inputs.push_back(EndOf(tensor, name, spec.keys));
    if (!spec.inputs.empty()) Remember(fmt::format("{}.in.{}", spec.name, i), tensor, spec.inputs.at(name));
  }
  for (size_t i = 0; i < model.outputs.size(); ++i) {
    const std::string& name = spec.graph.Outputs()[i].name;
    const circle::Tensor& tensor = model.tensors[model.outputs[i]];
    unit.outputs.push_back(EndOf(tensor, name, spec.output_keys.contains(name) ? spec.output_keys : spec.keys));
    if (!spec.outputs.empty()) Remember(fmt::format("{}.out.{}", spec.name, i), tensor, spec.outputs.at(name));
  }
  units_.push_back(std::move(unit));
}

void UnitWriter::WriteTensors(const std::string& file, const std::map<std::string, Tensor>& tensors) const {
  WriteSafetensors(directory_ / file, tensors);
}

void UnitWriter::WriteCodes() const { WriteSafetensors(directory_ / kCodesFile, codes_, same_as_); }

nlohmann::json ToJson(const UnitEnd& end) {
  nlohmann::json json{{"name", end.name}, {"key", end.key}, {"dtype", Name(end.type.dtype)}};
  json["shape"] = nlohmann::json::array();
  for (int axis = 0; axis < end.type.shape.Rank(); ++axis) {
    const bool open = !end.signature.empty() && end.signature[axis] < 0;
    json["shape"].push_back(open ? nlohmann::json("S") : nlohmann::json(end.type.shape[axis]));
  }
  if (end.grid) {
    json["scale"] = F32(end.grid->scale[0]);
    json["zero_point"] = end.grid->zero_point[0];
  }
  return json;
}

nlohmann::json UnitWriter::Pipeline() const {
  nlohmann::json units = nlohmann::json::array(), boundaries = nlohmann::json::array();
  std::map<std::string, std::vector<std::string>> producers;
  for (const Unit& unit : units_) {
    nlohmann::json inputs = nlohmann::json::array(), outputs = nlohmann::json::array();
    for (const UnitEnd& end : unit.inputs) inputs.push_back(ToJson(end));
    for (const UnitEnd& end : unit.outputs) outputs.push_back(ToJson(end));
    units.push_back({{"name", unit.file.name}, {"file", unit.file.file}, {"inputs", inputs}, {"outputs", outputs}});
    for (size_t k = 0; k < unit.outputs.size(); ++k)
      if (!unit.outputs[k].key.empty())
        producers[unit.outputs[k].key].push_back(fmt::format("{}.out.{}", unit.file.name, k));
  }
  for (const Unit& unit : units_)
    for (size_t k = 0; k < unit.inputs.size(); ++k)
      for (const std::string& producer : producers[unit.inputs[k].key])
        boundaries.push_back({{"key", unit.inputs[k].key},
                              {"producer", producer},
                              {"consumer", fmt::format("{}.in.{}", unit.file.name, k)}});
  return {{"schema_version", 1}, {"units", units}, {"boundaries", boundaries}};
}

}  // namespace circlet
