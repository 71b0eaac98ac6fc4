#include "circlet/circle/listing.h"

#include <fmt/ranges.h>

#include <algorithm>
#include <map>
#include <nlohmann/json.hpp>
#include <vector>

#include "circle/reader.h"
#include "circle/schema.h"
#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"

namespace circlet::circle {
namespace {

namespace fs = std::filesystem;
using json = nlohmann::json;

int64_t ConstantBytes(const Model& model) {
  std::map<const std::byte*, int64_t> constants;  // shared ones count once
  for (const Tensor& tensor : model.tensors)
    if (tensor.IsConstant()) constants[tensor.data.Raw()] = tensor.data.Bytes();
  int64_t bytes = 0;
  for (const auto& [data, size] : constants) bytes += size;
  return bytes;
}

std::vector<std::string> ShapeOf(const Tensor& tensor) {
  std::vector<std::string> sizes;
  for (int axis = 0; axis < tensor.type.shape.Rank(); ++axis) {
    const bool open = !tensor.signature.empty() && tensor.signature[axis] < 0;
    sizes.push_back(open ? "S" : std::to_string(tensor.type.shape[axis]));
  }
  return sizes;
}

std::string GridText(const QParams& grid) {
  if (grid.scale.empty() || grid.zero_point.empty()) return "";
  if (grid.scale.size() == 1) return fmt::format(", scale {}, zero point {}", grid.scale[0], grid.zero_point[0]);
  const auto [least, greatest] = std::ranges::minmax(grid.scale);
  return fmt::format(", {} scales {} to {} along axis {}", grid.scale.size(), least, greatest, grid.axis);
}

// "hidden  int16[1,288,128], 72.0 KiB, scale 0.00019, zero point 0"
std::string TensorText(const Tensor& tensor) {
  return fmt::format("{}  {}[{}]{}, {}{}", tensor.name, Name(tensor.type.dtype), fmt::join(ShapeOf(tensor), ","),
                     tensor.IsConstant() ? " constant" : "", HumanBytes(tensor.type.Bytes()),
                     tensor.qparams ? GridText(*tensor.qparams) : "");
}

json OptionsOf(const Operator& op) {
  json options = json::object();
  for (const CircleOption& option : op.options)
    std::visit([&](const auto& value) { options[std::string(option.name)] = value; }, option.value);
  return options;
}

json NamesOf(const Model& model, const std::vector<int32_t>& indices) {
  json names = json::array();
  for (const int32_t index : indices) names.push_back(model.tensors[index].name);
  return names;
}

std::vector<fs::path> FilesOf(const fs::path& directory) {
  std::vector<fs::path> files;
  for (const fs::path& path : EntriesOf(directory))
    if (path.extension() == ".circle" && fs::is_regular_file(path)) files.push_back(path);
  if (files.empty())
    Fail("{}: holds no .circle file; give a directory that quantize wrote, or a file", directory.string());
  std::ranges::sort(files);
  return files;
}

}  // namespace

std::string ListingText(const fs::path& path) {
  const FileView file = OpenFile(path);
  const Model& model = file.model;
  std::map<std::string, int> counts;
  for (const Operator& op : model.operators) ++counts[OperatorName(op.code)];
  std::string text = fmt::format("{}: {} bytes, of them {} in constants\noperators: {}", path.string(), file.file_bytes,
                                 ConstantBytes(model), model.operators.size());
  for (const auto& [name, count] : counts) text += fmt::format(", {} {}", count, name);
  text += "\n";
  for (size_t i = 0; i < model.inputs.size(); ++i)
    text += fmt::format("input {}: {}\n", i, TensorText(model.tensors[model.inputs[i]]));
  for (size_t i = 0; i < model.outputs.size(); ++i)
    text += fmt::format("output {}: {}\n", i, TensorText(model.tensors[model.outputs[i]]));
  for (size_t i = 0; i < model.operators.size(); ++i) {
    const Operator& op = model.operators[i];
    const json options = OptionsOf(op);
    text += fmt::format("\n{} {}{}\n", i, OperatorName(op.code), options.empty() ? "" : " " + options.dump());
    // What is computed has its type where it is made.
    for (const int32_t input : op.inputs) {
      if (input < 0) continue;
      const Tensor& tensor = model.tensors[input];
      text += fmt::format("     {}\n", tensor.IsConstant() ? TensorText(tensor) : tensor.name);
    }
    for (const int32_t output : op.outputs) text += fmt::format("  -> {}\n", TensorText(model.tensors[output]));
  }
  return text;
}

std::string ListingJson(const fs::path& path) {
  const FileView file = OpenFile(path);
  const Model& model = file.model;
  json tensors = json::array(), operators = json::array();
  for (const Tensor& tensor : model.tensors) {
    json entry{{"name", tensor.name},
               {"dtype", Name(tensor.type.dtype)},
               {"shape", json::array()},
               {"bytes", tensor.type.Bytes()},
               {"constant", tensor.IsConstant()}};
    for (int axis = 0; axis < tensor.type.shape.Rank(); ++axis)
      entry["shape"].push_back(!tensor.signature.empty() && tensor.signature[axis] < 0 ? json("S")
                                                                                       : json(tensor.type.shape[axis]));
    if (tensor.qparams) {
      entry["axis"] = tensor.qparams->axis;
      entry["scale"] = json::array();
      for (const float scale : tensor.qparams->scale) entry["scale"].push_back(F32(scale));
      entry["zero_point"] = tensor.qparams->zero_point;
    }
    tensors.push_back(std::move(entry));
  }
  for (const Operator& op : model.operators)
    operators.push_back(
        {{"name", OperatorName(op.code)}, {"options", OptionsOf(op)}, {"inputs", op.inputs}, {"outputs", op.outputs}});
  return json{{"file", path.filename().string()},
              {"bytes", file.file_bytes},
              {"constant_bytes", ConstantBytes(model)},
              {"description", model.description},
              {"inputs", model.inputs},
              {"outputs", model.outputs},
              {"tensors", tensors},
              {"operators", operators}}
             .dump(2) +
         "\n";
}

std::string DirectoryJson(const fs::path& directory) {
  json files = json::array();
  for (const fs::path& path : FilesOf(directory)) {
    const FileView file = OpenFile(path);
    files.push_back({{"file", path.filename().string()},
                     {"bytes", file.file_bytes},
                     {"constant_bytes", ConstantBytes(file.model)},
                     {"operators", file.model.operators.size()},
                     {"inputs", NamesOf(file.model, file.model.inputs)},
                     {"outputs", NamesOf(file.model, file.model.outputs)}});
  }
  return files.dump(2) + "\n";
}

std::string DirectoryText(const fs::path& directory) {
  std::string text;
  int64_t bytes = 0;
  const std::vector<fs::path> files = FilesOf(directory);
  size_t width = 0;
  for (const fs::path& path : files) width = std::max(width, path.filename().string().size());
  for (const fs::path& path : files) {
    const FileView file = OpenFile(path);
    bytes += file.file_bytes;
    const auto types = [&](const std::vector<int32_t>& ends) {
      std::vector<std::string> texts;
      for (const int32_t end : ends)
        texts.push_back(fmt::format("{}[{}]", Name(file.model.tensors[end].type.dtype),
                                    fmt::join(ShapeOf(file.model.tensors[end]), ",")));
      return fmt::format("{}", fmt::join(texts, " "));
    };
    text += fmt::format("{:{}}  {:>9}  {:4} operators  {} -> {}\n", path.filename().string(), width,
                        HumanBytes(file.file_bytes), file.model.operators.size(), types(file.model.inputs),
                        types(file.model.outputs));
  }
  return text + fmt::format("{} files, {}\n", files.size(), HumanBytes(bytes));
}

}  // namespace circlet::circle
