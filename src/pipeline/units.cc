#include "pipeline/units.h"

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circle/writer.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/quant/affine.h"
#include "ops/codes.h"
#include "pipeline/stage.h"

namespace circlet {
namespace {

// 4-bit codes one to a byte: safetensors has no smaller type.
Tensor InBytes(const Tensor& codes) {
  if (BitWidth(codes.GetDType()) != 4) return codes;
  const bool is_signed = codes.GetDType() == DType::kI4;
  const Tensor bytes = Tensor::Uninitialized({is_signed ? DType::kI8 : DType::kU8, codes.GetShape()});
  for (int64_t i = 0; i < codes.Elements(); ++i) bytes.Raw()[i] = static_cast<std::byte>(CodeAt(codes, i));
  return bytes;
}

// `in_file`: what the tensor is called there.
UnitEnd EndOf(const circle::Tensor& tensor, const std::string& in_file, const std::string& name,
              const std::map<std::string, std::string>& keys) {
  const auto key = keys.find(name);
  return {name, key == keys.end() ? "" : key->second, in_file, tensor.type, tensor.signature, tensor.qparams};
}

}  // namespace

void UnitWriter::Remember(const std::string& unit, bool input, size_t index, const UnitEnd& end, const Tensor& values) {
  const std::string name = fmt::format("{}.{}.{}", unit, input ? "in" : "out", index);
  const Tensor codes = end.grid ? InBytes(QuantizeWeight(values, *end.grid, Rounding::kHalfAwayDivide).codes) : values;
  const std::string hash = codes.Type().ToString() + Sha256({codes.Raw(), static_cast<size_t>(codes.Bytes())});
  const auto [it, is_new] = first_with_.try_emplace(hash, name);
  if (!is_new) {
    same_as_[name] = it->second;
    return;
  }
  const CodesPlace place{"codes." + unit, static_cast<int>(2 * index + (input ? 0 : 1))};
  store_.Put(place.item, Chain::kQuant, place.key, codes, ActivationStore::Read::kLate);
  codes_[name] = place;
}

Tensor UnitWriter::ValueOf(const UnitSpec& spec, const UnitValue& value) const {
  std::vector<Tensor> read;
  for (const Read& each : value.reads)
    std::ranges::move(Fetch(store_, each, *spec.item, Chain::kQuant), std::back_inserter(read));
  return value.make ? value.make(read) : read.at(0);
}

UnitWriter::Values UnitWriter::Inputs(const UnitSpec& spec) const {
  Values inputs;
  if (spec.item == nullptr) return inputs;
  for (const auto& [name, value] : spec.inputs) inputs[name] = ValueOf(spec, value);
  return inputs;
}

UnitWriter::Values UnitWriter::Outputs(const UnitSpec& spec, const Graph& graph, const Values& inputs,
                                       const RoundedWeights& weights) const {
  Values outputs;
  if (spec.item == nullptr) return outputs;
  for (const auto& [name, value] : spec.outputs) outputs[name] = ValueOf(spec, value);
  if (std::ranges::all_of(graph.Outputs(), [&](const Graph::Output& output) { return outputs.contains(output.name); }))
    return outputs;
  FakeQuantReading reading(calibration_);
  Values computed = Executor(graph, &reading).Run(inputs, [&](const std::string& name) {
    const Tensor own = spec.own ? spec.own(name) : Tensor();
    return own.Empty() ? weights(name) : own;
  });
  outputs.merge(computed);
  return outputs;
}

void UnitWriter::Write(const UnitSpec& spec, const RoundedWeights& weights) {
  const Graph graph = spec.build();
  const CalibratedGrids grids(calibration_, weights, spec.own);
  const circle::Model model =
      Within(spec.name, [&] { return circle::ToCircle(graph, grids, {.dynamic_length = spec.dynamic_length}); });
  Unit unit{.file = {.name = spec.name, .file = spec.name + kUnitSuffix}, .whole_graph = spec.whole_graph};
  unit.file.operators = static_cast<int64_t>(model.operators.size());
  unit.file.bytes = circle::Write(model, directory_ / unit.file.file);
  for (const Value& value : graph.Values()) {
    // Position embeddings are made for a file's patches, of a table that no file holds.
    if (value.kind != ValueKind::kWeight || (spec.own && !spec.own(value.name).Empty())) continue;
    const QParams* const grid = value.weight_point.name.empty() ? nullptr : grids.Find(value.weight_point);
    const int64_t bits = BitWidth(grid == nullptr ? DType::kF32 : grid->dtype);
    unit.file.parameters += value.type.shape.Elements();
    unit.file.parameter_bytes += (value.type.shape.Elements() * bits + 7) / 8;
  }
  Written(unit.file.file);

  const std::vector<std::string> names = circle::WrittenNames(model.tensors);
  for (size_t i = 0; i < model.inputs.size(); ++i) {
    const std::string& name = graph.At(graph.Inputs()[i]).name;
    unit.inputs.push_back(EndOf(model.tensors[model.inputs[i]], names[model.inputs[i]], name, spec.keys));
  }
  for (size_t i = 0; i < model.outputs.size(); ++i) {
    const std::string& name = graph.Outputs()[i].name;
    const auto& keys = spec.output_keys.contains(name) ? spec.output_keys : spec.keys;
    unit.outputs.push_back(EndOf(model.tensors[model.outputs[i]], names[model.outputs[i]], name, keys));
  }
  if (spec.written_first)
    for (const Value& value : graph.Values())
      if (value.kind == ValueKind::kWeight && grids.Find(value.weight_point) != nullptr)
        tables_[value.name] = unit.file.file;
  units_.push_back(std::move(unit));
}

void UnitWriter::Remember(const UnitSpec& spec, const RoundedWeights& weights) {
  if (spec.item == nullptr) return;
  const Graph graph = spec.build();
  const Values inputs = Inputs(spec), outputs = Outputs(spec, graph, inputs, weights);
  for (const UnitSpec::Keep& keep : spec.keeps)
    store_.Put(spec.item->id, Chain::kQuant, keep.key, keep.make(inputs, outputs));
  const auto unit = std::ranges::find(units_, spec.name, [](const Unit& each) { return each.file.name; });
  CIRCLET_CHECK(unit != units_.end(), "{} is not written", spec.name);
  for (size_t i = 0; i < unit->inputs.size(); ++i)
    Remember(spec.name, /*input=*/true, i, unit->inputs[i], inputs.at(unit->inputs[i].name));
  for (size_t i = 0; i < unit->outputs.size(); ++i)
    Remember(spec.name, /*input=*/false, i, unit->outputs[i], outputs.at(unit->outputs[i].name));
}

Tensor UnitWriter::WrittenCodes(const std::string& parameter) const {
  const auto file = tables_.find(parameter);
  if (file == tables_.end()) return {};
  for (const circle::Tensor& tensor : circle::Read(directory_ / file->second).tensors)
    if (tensor.name == parameter && tensor.qparams) return tensor.data;
  Fail("{}: holds no {}; start again with --force", (directory_ / file->second).string(), parameter);
}

void UnitWriter::WriteFile(const std::string& name, const std::function<void(const std::filesystem::path&)>& write) {
  write(directory_ / name);
  Written(name);
}

std::string UnitWriter::HashOf(const std::string& file) const {
  const auto it = hashes_.find(file);
  return it == hashes_.end() ? "" : it->second;
}

void UnitWriter::WriteCodes() const {
  SafetensorsWriter writer(directory_ / kCodesFile, same_as_);
  const auto get = [&](const CodesPlace& place) { return store_.Get(place.item, Chain::kQuant, place.key); };
  for (const auto& [name, place] : codes_) writer.Declare(name, store_.TypeOf(place.item, Chain::kQuant, place.key));
  for (const auto& [name, place] : codes_) writer.Write(get(place));
  writer.Finish();
}

nlohmann::json ToJson(const UnitEnd& end) {
  nlohmann::json json{{"name", end.name}, {"key", end.key}, {"tensor", end.tensor}, {"dtype", Name(end.type.dtype)}};
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

namespace {

nlohmann::json SaveEnd(const UnitEnd& end) {
  nlohmann::json json{{"name", end.name},
                      {"key", end.key},
                      {"tensor", end.tensor},
                      {"dtype", Name(end.type.dtype)},
                      {"shape", end.type.shape.Sizes()},
                      {"signature", end.signature}};
  if (!end.grid) return json;
  nlohmann::json scales = nlohmann::json::array();
  for (const float scale : end.grid->scale) scales.push_back(F32(scale));
  json["grid"] = {{"axis", end.grid->axis}, {"scale", scales}, {"zero_point", end.grid->zero_point}};
  return json;
}

UnitEnd RestoreEnd(const nlohmann::json& json) {
  UnitEnd end{.name = json.at("name"), .key = json.at("key"), .tensor = json.at("tensor")};
  end.type = {DTypeFromName(json.at("dtype").get<std::string>()), Shape(json.at("shape").get<std::vector<int64_t>>())};
  end.signature = json.at("signature").get<std::vector<int32_t>>();
  if (!json.contains("grid")) return end;
  const nlohmann::json& grid = json.at("grid");
  QParams qparams{.dtype = end.type.dtype, .axis = grid.at("axis")};
  for (const nlohmann::json& scale : grid.at("scale")) qparams.scale.push_back(F32(scale, end.name));
  qparams.zero_point = grid.at("zero_point").get<std::vector<int32_t>>();
  end.grid = qparams;
  return end;
}

}  // namespace

nlohmann::json UnitWriter::Save() const {
  nlohmann::json units = nlohmann::json::array(), codes = nlohmann::json::object();
  for (const Unit& unit : units_) {
    nlohmann::json json{{"name", unit.file.name},
                        {"bytes", unit.file.bytes},
                        {"operators", unit.file.operators},
                        {"parameters", unit.file.parameters},
                        {"parameter_bytes", unit.file.parameter_bytes},
                        {"whole_graph", unit.whole_graph}};
    for (const auto& [side, ends] : {std::pair{"inputs", &unit.inputs}, std::pair{"outputs", &unit.outputs}}) {
      json[side] = nlohmann::json::array();
      for (const UnitEnd& end : *ends) json[side].push_back(SaveEnd(end));
    }
    units.push_back(std::move(json));
  }
  for (const auto& [name, place] : codes_) codes[name] = {place.key, place.item};
  return {{"units", units}, {"files", hashes_},    {"tables", tables_},
          {"codes", codes}, {"same_as", same_as_}, {"first_with", first_with_}};
}

void UnitWriter::Restore(const nlohmann::json& state) {
  hashes_ = state.at("files").get<std::map<std::string, std::string>>();
  for (const auto& [file, hash] : hashes_) {
    const std::filesystem::path path = directory_ / std::filesystem::path(file).filename();
    std::error_code missing;
    if (!std::filesystem::is_regular_file(path, missing) || Sha256File(path) != hash)
      Fail("{}: is not the file that the unfinished run wrote (SHA-256); start again with --force", path.string());
  }
  for (const nlohmann::json& json : state.at("units")) {
    const std::string name = json.at("name");
    Unit unit{.file = {.name = name,
                       .file = name + kUnitSuffix,
                       .bytes = json.at("bytes"),
                       .operators = json.at("operators"),
                       .parameters = json.at("parameters"),
                       .parameter_bytes = json.at("parameter_bytes")},
              .whole_graph = json.at("whole_graph")};
    if (!hashes_.contains(unit.file.file)) Fail("unit {} has no file; start again with --force", name);
    for (const nlohmann::json& end : json.at("inputs")) unit.inputs.push_back(RestoreEnd(end));
    for (const nlohmann::json& end : json.at("outputs")) unit.outputs.push_back(RestoreEnd(end));
    units_.push_back(std::move(unit));
  }
  tables_ = state.at("tables").get<std::map<std::string, std::string>>();
  for (const auto& [name, file] : tables_)
    if (!hashes_.contains(file)) Fail("{}: its file {} is not there; start again with --force", name, file);
  for (const auto& [name, place] : state.at("codes").items()) codes_[name] = {place.at(0), place.at(1)};
  same_as_ = state.at("same_as").get<std::map<std::string, std::string>>();
  first_with_ = state.at("first_with").get<std::map<std::string, std::string>>();
}

nlohmann::json UnitWriter::Pipeline(const nlohmann::json& contract) const {
  nlohmann::json units = nlohmann::json::array(), boundaries = nlohmann::json::array();
  std::map<std::string, std::vector<std::string>> producers;
  for (const Unit& unit : units_) {
    nlohmann::json inputs = nlohmann::json::array(), outputs = nlohmann::json::array();
    for (const UnitEnd& end : unit.inputs) inputs.push_back(ToJson(end));
    for (const UnitEnd& end : unit.outputs) outputs.push_back(ToJson(end));
    units.push_back({{"name", unit.file.name},
                     {"file", unit.file.file},
                     {"kind", unit.whole_graph ? kWholeGraph : "part"},
                     {"inputs", inputs},
                     {"outputs", outputs}});
    const nlohmann::json& of_units = contract.at("units");
    if (const auto more = of_units.find(unit.file.name); more != of_units.end()) units.back().update(*more);
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
  nlohmann::json pipeline = contract;
  pipeline.update({{"schema_version", kPipelineVersion}, {"units", units}, {"boundaries", boundaries}});
  return pipeline;
}

}  // namespace circlet
