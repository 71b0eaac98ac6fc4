// Nodes become operators, values become tensors, a point becomes the grid of the tensor that it stands on; a second
// point with another grid becomes a QUANTIZE.

#include <map>
#include <utility>

#include "circle/passes/lowered.h"
#include "circle/schema.h"

namespace circlet::circle {

void RequireStorable(const std::string& name, const QParams& grid) {
  if (const std::optional<std::string> fault = FaultOf(grid); fault.has_value())
    Fail("{}: a Circle file cannot hold its grid: {}; calibrate again, or choose another type in the recipe", name,
         *fault);
}

int32_t Lowered::NewTensor(std::string name, const TensorType& type, bool computed) {
  Tensor tensor{.name = name, .type = type};
  if (computed && options.dynamic_length && type.shape.Rank() >= 2) {
    for (const int64_t size : type.shape.Sizes()) tensor.signature.push_back(static_cast<int32_t>(size));
    tensor.signature[1] = -1;
  }
  model.tensors.push_back(std::move(tensor));
  origins.push_back({.name = std::move(name)});
  return static_cast<int32_t>(model.tensors.size()) - 1;
}

int32_t Lowered::NewInts(const CircleArg& arg) {
  const bool scalar = arg.kind == CircleArg::Kind::kInt;
  const Shape shape = scalar ? Shape{} : Shape{static_cast<int64_t>(arg.ints.size())};
  const int32_t index = NewTensor("shape", {DType::kI32, shape}, /*computed=*/false);
  model.tensors[index].data = circlet::Tensor::Of<int32_t>(shape, arg.ints);
  return index;
}

void Lowered::Assign(int32_t tensor, const QParams& grid) {
  model.tensors[tensor].qparams = grid;
  model.tensors[tensor].type.dtype = grid.dtype;
}

void Lowered::AssignBack(int32_t index, const QParams& grid) {
  const Tensor& tensor = model.tensors[index];
  if (tensor.qparams.has_value() && *tensor.qparams != grid) return Resplit(index, grid);
  if (tensor.qparams.has_value() || tensor.type.dtype != DType::kF32) return;
  Assign(index, grid);
  const Origin& origin = origins[index];
  if (origin.producer < 0 || !origin.keeps) return;
  for (const int32_t input : model.operators[origin.producer].inputs)
    if (input >= 0 && origins[input].constant < 0) AssignBack(input, grid);
  for (const int32_t output : model.operators[origin.producer].outputs) AssignBack(output, grid);
}

// The reference writes a SPLIT whose first half has another grid than its input as SPLIT_V.
void Lowered::Resplit(int32_t index, const QParams& grid) {
  const int producer = origins[index].producer;
  if (producer < 0) return;
  Operator& op = model.operators[producer];
  if (op.code != Split::kCircleCode || op.outputs[0] != index) return;
  Assign(index, grid);
  const std::vector<int32_t> sizes(op.outputs.size(), static_cast<int32_t>(model.tensors[index].type.shape[-1]));
  const int32_t axis = op.inputs[0], x = op.inputs[1];
  op.code = SplitV::kCircleCode;
  op.inputs = {x, NewInts(CircleArg::Ints(sizes)), axis};
}

Operator Lowered::Requantized(int32_t tensor, const std::string& name, const QParams& grid) {
  const int32_t output = NewTensor(name, {DType::kF32, model.tensors[tensor].type.shape}, /*computed=*/true);
  Assign(output, grid);
  return {.code = Requantize::kCircleCode, .inputs = {tensor}, .outputs = {output}};
}

namespace {

class Lowering {
 public:
  Lowering(const Graph& graph, const GridSource& source, const ExportOptions& options)
      : graph_(graph), l_{.source = source, .options = options}, tensor_of_(graph.Values().size(), -1) {}

  Lowered Run() {
    for (const ValueId id : graph_.Inputs()) {
      tensor_of_[id] = l_.NewTensor(graph_.At(id).name, graph_.TypeOf(id), /*computed=*/true);
      l_.model.inputs.push_back(tensor_of_[id]);
    }
    for (const Node& node : graph_.Nodes()) {
      if (std::holds_alternative<QuantPoint>(node.op.kind)) {
        EmitPoint(node);
      } else if (!FoldReshape(node)) {
        EmitOperator(node);
      }
    }
    for (const Graph::Output& output : graph_.Outputs()) l_.model.outputs.push_back(TensorOf(output.value));
    return std::move(l_);
  }

 private:
  Tensor& At(int32_t index) { return l_.model.tensors[index]; }
  Origin& OriginOf(int32_t index) { return l_.origins[index]; }

  const QParams* GridOf(const Point& point) const {
    const QParams* grid = l_.source.Find(point);
    if (grid != nullptr) RequireStorable(point.name, *grid);
    return grid;
  }

  // Inputs and computed values have their tensor already; parameters and constants get theirs when first read.
  int32_t TensorOf(ValueId id) {
    if (tensor_of_[id] >= 0) return tensor_of_[id];
    const Value& value = graph_.At(id);
    CIRCLET_CHECK(value.kind != ValueKind::kNode, "%{} is read before it is computed", id);
    const int32_t index = l_.NewTensor(value.name.empty() ? "constant" : value.name, value.type, /*computed=*/false);
    tensor_of_[id] = index;
    const QParams* grid = value.weight_point.name.empty() ? nullptr : GridOf(value.weight_point);
    if (grid != nullptr) {
      l_.Assign(index, *grid);
      Within(value.weight_point.name, [&] {
        At(index).lazy = l_.source.LazyWeightCodes(value.name, *grid);
        if (At(index).lazy == nullptr) At(index).data = l_.source.WeightCodes(value.name, *grid);
      });
    } else {
      At(index).data = value.kind == ValueKind::kConstant ? value.constant : l_.source.WeightFloat(value.name);
      OriginOf(index).constant = id;
    }
    return index;
  }

  void EmitPoint(const Node& node) {
    const Point& point = node.points[0];
    int32_t index = TensorOf(node.in[0]);
    const QParams* grid = GridOf(point);
    if (grid != nullptr && point.use != PointUse::kSimulationOnly) {
      Tensor& tensor = At(index);
      if (!tensor.qparams.has_value()) {
        if (OriginOf(index).producer >= 0) {
          tensor.name = OriginOf(index).name = point.name;
          OriginOf(index).pointed = true;
        }
        l_.AssignBack(index, *grid);
      } else if (*tensor.qparams != *grid) {
        Operator quantize = l_.Requantized(index, point.name, *grid);
        index = quantize.outputs[0];
        OriginOf(index).producer = static_cast<int>(l_.model.operators.size());
        l_.model.operators.push_back(std::move(quantize));
      }
    }
    tensor_of_[node.out[0]] = index;
  }

  // A constant under another shape is a constant, one for all that ask.
  bool FoldReshape(const Node& node) {
    const auto* reshape = std::get_if<Reshape>(&node.op.kind);
    if (reshape == nullptr) return false;
    const int32_t index = TensorOf(node.in[0]);
    if (OriginOf(index).constant < 0) return false;
    auto [it, inserted] = reshaped_.try_emplace({index, reshape->shape.ToString()});
    if (inserted) {
      it->second = l_.NewTensor(At(index).name, {DType::kF32, reshape->shape}, /*computed=*/false);
      At(it->second).data = At(index).data.Reshaped(reshape->shape);
      if (At(index).qparams) l_.Assign(it->second, *At(index).qparams);
      OriginOf(it->second).constant = OriginOf(index).constant;
    }
    tensor_of_[node.out[0]] = it->second;
    return true;
  }

  void EmitOperator(const Node& node) {
    std::vector<TensorType> in, out;
    for (const ValueId id : node.in) in.push_back(graph_.TypeOf(id));
    for (const ValueId id : node.out) out.push_back(graph_.TypeOf(id));
    CircleOp op = std::visit(
        [&](const auto& kind) -> CircleOp {
          if constexpr (CircleOpDef<std::decay_t<decltype(kind)>>) return kind.Emit(in, out);
          throw Bug(fmt::format("{} has no Circle form", kind.kName));
        },
        node.op.kind);
    if (l_.options.dynamic_length) OpenLength(op, out);

    Operator emitted{.code = op.code, .options = std::move(op.options)};
    for (const CircleArg& arg : op.inputs) {
      switch (arg.kind) {
        case CircleArg::Kind::kInput:
          emitted.inputs.push_back(TensorOf(node.in[arg.input]));
          break;
        case CircleArg::Kind::kAbsent:
          emitted.inputs.push_back(-1);
          break;
        default:
          emitted.inputs.push_back(l_.NewInts(arg));
      }
    }
    const bool clamps = node.op.Clamps() && OriginOf(emitted.inputs[1]).constant >= 0;
    for (size_t i = 0; i < node.out.size(); ++i) {
      const int32_t index = l_.NewTensor(std::string(node.op.Name()), out[i], /*computed=*/true);
      Origin& origin = OriginOf(index);
      origin.producer = static_cast<int>(l_.model.operators.size());
      origin.clamps = clamps;
      origin.keeps = node.op.KeepsValues() || node.op.IsView() || clamps;
      emitted.outputs.push_back(tensor_of_[node.out[i]] = index);
    }
    const int32_t source = emitted.inputs.empty() ? -1 : emitted.inputs[node.op.GridInput()];
    const std::vector<int32_t> outputs = emitted.outputs;
    l_.model.operators.push_back(std::move(emitted));
    if (node.op.KeepsValues()) InheritGrid(source, outputs);
  }

  // A per-channel grid belongs to the table, not to the rows that leave it.
  void InheritGrid(int32_t input, const std::vector<int32_t>& outputs) {
    const std::optional<QParams> grid = At(input).qparams;
    if (!grid.has_value() || grid->PerChannel()) return;
    for (const int32_t output : outputs) l_.Assign(output, *grid);
  }

  // RESHAPE targets of dynamic units carry the length as -1.
  static void OpenLength(CircleOp& op, const std::vector<TensorType>& out) {
    if (op.code != Reshape::kCircleCode || out[0].shape.Rank() < 2) return;
    for (CircleArg& arg : op.inputs)
      if (arg.kind == CircleArg::Kind::kInts) arg.ints[1] = -1;
    for (CircleOption& option : op.options)
      if (auto* sizes = std::get_if<std::vector<int32_t>>(&option.value)) (*sizes)[1] = -1;
  }

  const Graph& graph_;
  Lowered l_;
  std::vector<int32_t> tensor_of_;                               // by value
  std::map<std::pair<int32_t, std::string>, int32_t> reshaped_;  // constants under other shapes
};

}  // namespace

Lowered Lower(const Graph& graph, const GridSource& source, const ExportOptions& options) {
  return Lowering(graph, source, options).Run();
}

}  // namespace circlet::circle
