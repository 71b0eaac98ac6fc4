#include <algorithm>

#include "circlet/circle/export.h"
#include "ops/codes.h"
#include "ops/simd.h"

namespace circlet::circle {
namespace {

// One operator of the list by its Circle code.
std::optional<Parsed<Op>> ParseOperator(const CircleNode& node) {
  std::optional<Parsed<Op>> found;
  const auto attempt = [&]<typename T>(std::type_identity<T>) {
    if constexpr (CircleOpDef<T>) {
      if (found.has_value() || T::kCircleCode != node.code) return;
      Parsed<T> parsed = T::Parse(node);
      found = Parsed<Op>{std::move(parsed.op), std::move(parsed.inputs)};
    }
  };
  [&]<size_t... I>(std::index_sequence<I...>) {
    (attempt(std::type_identity<std::variant_alternative_t<I, Op::List>>{}), ...);
  }(std::make_index_sequence<std::variant_size_v<Op::List>>{});
  return found;
}

class Importer {
 public:
  Importer(const Model& model, std::optional<int64_t> length) : model_(model), length_(length) {}

  FileGraph Run() {
    value_of_.assign(model_.tensors.size(), -1);
    names_ = UniqueNames();
    for (const int32_t index : model_.inputs) {
      const Tensor& tensor = model_.tensors[index];
      const DType dtype = tensor.qparams ? DType::kF32 : tensor.type.dtype;
      value_of_[index] = Snapped(index, result_.graph.AddInput(names_[index], {dtype, ShapeOf(tensor)}));
    }
    for (size_t i = 0; i < model_.operators.size(); ++i)
      Within(fmt::format("operator {} {}", i, OperatorName(model_.operators[i].code)),
             [&] { AddOperator(model_.operators[i]); });
    for (const int32_t index : model_.outputs) result_.graph.AddOutput(names_[index], ValueOf(index));
    return std::move(result_);
  }

 private:
  std::vector<std::string> UniqueNames() const {
    std::vector<std::string> names;
    std::map<std::string, int> uses;
    for (const Tensor& tensor : model_.tensors) {
      const int use = uses[tensor.name]++;
      names.push_back(use == 0 ? tensor.name : fmt::format("{}#{}", tensor.name, use));
    }
    return names;
  }

  Shape ShapeOf(const Tensor& tensor) const {
    Shape shape = tensor.type.shape;
    for (size_t axis = 0; axis < tensor.signature.size(); ++axis) {
      if (tensor.signature[axis] >= 0) continue;
      if (!length_.has_value()) Fail("\"{}\" has an open size; say which", tensor.name);
      shape[static_cast<int>(axis)] = *length_;
    }
    return shape;
  }

  ValueId Snapped(int32_t index, ValueId value) {
    const Tensor& tensor = model_.tensors[index];
    if (!tensor.qparams.has_value()) return value;
    if (tensor.qparams->PerChannel()) return value;  // rows of a table: no grid of their own
    result_.grids[names_[index]] = *tensor.qparams;
    return result_.graph.AddPoint({.name = names_[index]}, value);
  }

  // Values of inputs and operators exist already; constants come in when read.
  ValueId ValueOf(int32_t index) {
    if (value_of_[index] >= 0) return value_of_[index];
    const Tensor& tensor = model_.tensors[index];
    CIRCLET_CHECK(tensor.lazy == nullptr, "\"{}\" is made only when the file is written", tensor.name);
    if (tensor.data.Empty()) Fail("tensor {} \"{}\" is read before anything computes it", index, tensor.name);
    if (tensor.qparams.has_value()) {
      result_.constants[names_[index]] = index;
      value_of_[index] = result_.graph.AddWeight(names_[index], tensor.type.shape, {}, -1);
    } else {
      value_of_[index] = result_.graph.AddConstant(tensor.data);
    }
    return value_of_[index];
  }

  void AddOperator(const Operator& op) {
    CircleNode node{.code = op.code, .options = op.options};
    for (const int32_t index : op.inputs) {
      const bool given = index >= 0;
      node.types.push_back(given ? std::optional(TypeOf(index)) : std::nullopt);
      const bool constant = given && !model_.tensors[index].qparams.has_value();
      node.constants.push_back(constant ? model_.tensors[index].data : circlet::Tensor());
    }
    for (const int32_t index : op.outputs) node.outputs.push_back(TypeOf(index));
    std::optional<Parsed<Op>> parsed = ParseOperator(node);
    if (!parsed.has_value()) Fail("circlet cannot execute this operator; it runs those of docs/circle_format.md");

    std::vector<ValueId> in;
    for (const int input : parsed->inputs) in.push_back(ValueOf(op.inputs[input]));
    // What only moves keeps its inputs' grid, unless the file says otherwise.
    const bool moves = parsed->op.KeepsValues();
    const auto keeps = [&](int32_t output) {
      return moves && std::ranges::all_of(parsed->inputs, [&](int input) {
               return model_.tensors[op.inputs[input]].qparams == model_.tensors[output].qparams;
             });
    };
    const std::vector<ValueId> out = result_.graph.Add(std::move(parsed->op), std::move(in));
    if (out.size() != op.outputs.size()) Fail("has {} outputs, expected {}", op.outputs.size(), out.size());
    for (size_t i = 0; i < out.size(); ++i) {
      const int32_t index = op.outputs[i];
      const Shape expected = ShapeOf(model_.tensors[index]);
      if (result_.graph.TypeOf(out[i]).shape != expected)
        Fail("tensor {} \"{}\" is declared {}, computed {}", index, model_.tensors[index].name, expected.ToString(),
             result_.graph.TypeOf(out[i]).shape.ToString());
      value_of_[index] = keeps(index) ? out[i] : Snapped(index, out[i]);
    }
  }

  TensorType TypeOf(int32_t index) const {
    const Tensor& tensor = model_.tensors[index];
    return {tensor.qparams ? DType::kF32 : tensor.type.dtype, ShapeOf(tensor)};
  }

  const Model& model_;
  std::optional<int64_t> length_;
  FileGraph result_;
  std::vector<ValueId> value_of_;
  std::vector<std::string> names_;
};

// Rounds a tensor to a file's grid (format.md 4.2).
class Snapper final : public PointVisitor {
 public:
  explicit Snapper(const QParams& grid) {
    const CodeRange codes = CodesOf(grid.dtype);
    grid_ = {grid.scale[0], grid.zero_point[0], static_cast<int32_t>(codes.min), static_cast<int32_t>(codes.max),
             Rounding::kHalfAwayDivide};
  }
  void Visit(std::span<float> values, int64_t) override {
    simd::Snap(values.data(), static_cast<int64_t>(values.size()), grid_);
  }

 private:
  simd::Grid grid_;
};

}  // namespace

FileGraph ToGraph(const Model& model, std::optional<int64_t> length) { return Importer(model, length).Run(); }

circlet::Tensor DequantizedConstant(const Tensor& tensor) {
  const circlet::Tensor result = circlet::Tensor::Uninitialized({DType::kF32, tensor.type.shape});
  Dequantize(tensor.data, *tensor.qparams, 0, result.F32());
  return result;
}

struct FileReading::State {
  std::map<std::string, QParams> grids;
  std::map<std::string, Snapper> snappers;
};

FileReading::FileReading(const std::map<std::string, QParams>& grids) : state_(std::make_unique<State>(State{grids, {}})) {
  for (const auto& [name, grid] : grids) state_->snappers.try_emplace(name, grid);
}
FileReading::~FileReading() = default;

PointVisitor* FileReading::At(const Point& point, const TensorType&) {
  const auto it = state_->snappers.find(point.name);
  return it == state_->snappers.end() ? nullptr : &it->second;
}

const QParams* FileReading::GridAt(const Point& point) {
  const auto it = state_->grids.find(point.name);
  return it == state_->grids.end() ? nullptr : &it->second;
}

std::map<std::string, circlet::Tensor> RunModel(const Model& model, const std::map<std::string, circlet::Tensor>& inputs) {
  std::optional<int64_t> length;
  for (const int32_t index : model.inputs) {
    const Tensor& tensor = model.tensors[index];
    const auto it = inputs.find(tensor.name);
    for (size_t axis = 0; it != inputs.end() && axis < tensor.signature.size(); ++axis)
      if (tensor.signature[axis] < 0 && it->second.GetShape().Rank() == tensor.type.shape.Rank())
        length = it->second.GetShape()[static_cast<int>(axis)];
  }
  const FileGraph file = ToGraph(model, length);
  FileReading reading(file.grids);
  Executor executor(file.graph, &reading);
  return executor.Run(inputs, [&](const std::string& name) {
    const Tensor& tensor = model.tensors[file.constants.at(name)];
    return tensor.data.WithGrid(&*tensor.qparams);
  });
}

}  // namespace circlet::circle
