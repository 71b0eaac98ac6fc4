#include "circlet/circle/export.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "circle/schema.h"
#include "ops/codes.h"

namespace circlet::circle {
namespace {

constexpr int32_t kQuantizeCode = Requantize::kCircleCode;

class Exporter {
 public:
  Exporter(const Graph& graph, const GridSource& grids, const ExportOptions& options)
      : graph_(graph), source_(grids), options_(options), tensor_of_(graph.Values().size(), -1) {}

  Model Run() {
    for (const ValueId id : graph_.Inputs()) {
      tensor_of_[id] = NewTensor(graph_.At(id).name, graph_.TypeOf(id), /*computed=*/true);
      model_.inputs.push_back(tensor_of_[id]);
    }
    for (const Node& node : graph_.Nodes()) {
      if (std::holds_alternative<QuantPoint>(node.op.kind)) {
        EmitPoint(node);
      } else {
        EmitOperator(node);
      }
    }
    for (const Graph::Output& output : graph_.Outputs()) model_.outputs.push_back(TensorOf(output.value));
    SettleClamps();
    FillHoles();
    QuantizeConstants();
    QuantizeBiases();
    return std::move(model_);
  }

 private:
  // What is known of a tensor beside what the file stores.
  struct Origin {
    int producer = -1;      // index of the operator
    bool keeps = false;     // the producer only moves values
    std::string name;       // for errors
    bool pointed = false;   // `name` is that of a point
    ValueId constant = -1;  // a float constant or parameter that may still get a grid
  };

  int32_t NewTensor(std::string name, const TensorType& type, bool computed) {
    Tensor tensor{.name = name, .type = type};
    if (computed && options_.dynamic_length && type.shape.Rank() >= 2) {
      for (const int64_t size : type.shape.Sizes()) tensor.signature.push_back(static_cast<int32_t>(size));
      tensor.signature[1] = -1;
    }
    model_.tensors.push_back(std::move(tensor));
    origins_.push_back({.name = std::move(name)});
    return static_cast<int32_t>(model_.tensors.size()) - 1;
  }

  // Inputs and computed values have their tensor already; parameters and constants get theirs when first read.
  int32_t TensorOf(ValueId id) {
    if (tensor_of_[id] >= 0) return tensor_of_[id];
    const Value& value = graph_.At(id);
    CIRCLET_CHECK(value.kind != ValueKind::kNode, "%{} is read before it is computed", id);
    const int32_t index = NewTensor(value.name.empty() ? "constant" : value.name, value.type, /*computed=*/false);
    tensor_of_[id] = index;
    const QParams* grid = value.weight_point.name.empty() ? nullptr : GridOf(value.weight_point);
    if (grid != nullptr) {
      Assign(index, *grid);
      Tensor& tensor = model_.tensors[index];
      Within(value.weight_point.name, [&] {
        tensor.lazy = source_.LazyWeightCodes(value.name, *grid);
        if (tensor.lazy == nullptr) tensor.data = source_.WeightCodes(value.name, *grid);
      });
    } else {
      model_.tensors[index].data =
          value.kind == ValueKind::kConstant ? value.constant : source_.WeightFloat(value.name);
      origins_[index].constant = id;
    }
    return index;
  }

  const QParams* GridOf(const Point& point) const {
    const QParams* grid = source_.Find(point);
    if (grid != nullptr) RequireStorable(point.name, *grid);
    return grid;
  }

  static void RequireStorable(const std::string& name, const QParams& grid) {
    if (const std::optional<std::string> fault = FaultOf(grid); fault.has_value())
      Fail("{}: a Circle file cannot hold its grid: {}; calibrate again, or choose another type in the recipe", name,
           *fault);
  }

  void Assign(int32_t index, const QParams& grid) {
    model_.tensors[index].qparams = grid;
    model_.tensors[index].type.dtype = grid.dtype;
  }

  // Gives a tensor its grid; the operators behind which it only moved share it.
  void AssignBack(int32_t index, const QParams& grid) {
    const Tensor& tensor = model_.tensors[index];
    if (tensor.qparams.has_value() && *tensor.qparams != grid) return Resplit(index, grid);
    if (tensor.qparams.has_value() || tensor.type.dtype != DType::kF32) return;
    Assign(index, grid);
    const Origin& origin = origins_[index];
    if (origin.producer < 0 || !origin.keeps) return;
    for (const int32_t input : model_.operators[origin.producer].inputs)
      if (input >= 0 && origins_[input].constant < 0) AssignBack(input, grid);
    for (const int32_t output : model_.operators[origin.producer].outputs) AssignBack(output, grid);
  }

  // The reference writes a SPLIT whose first half has another grid than its input as SPLIT_V (findings B3).
  void Resplit(int32_t index, const QParams& grid) {
    const int producer = origins_[index].producer;
    if (producer < 0) return;
    Operator& op = model_.operators[producer];
    if (op.code != Split::kCircleCode || op.outputs[0] != index) return;
    Assign(index, grid);
    const std::vector<int32_t> sizes(op.outputs.size(), static_cast<int32_t>(model_.tensors[index].type.shape[-1]));
    const int32_t axis = op.inputs[0], x = op.inputs[1];
    op.code = SplitV::kCircleCode;
    op.inputs = {x, IntConstant(CircleArg::Ints(sizes)), axis};
  }

  void EmitPoint(const Node& node) {
    const Point& point = node.points[0];
    int32_t index = TensorOf(node.in[0]);
    const QParams* grid = GridOf(point);
    if (grid != nullptr && point.use != PointUse::kSimulationOnly) {
      Tensor& tensor = model_.tensors[index];
      if (!tensor.qparams.has_value()) {
        if (origins_[index].producer >= 0) {
          tensor.name = origins_[index].name = point.name;
          origins_[index].pointed = true;
        }
        AssignBack(index, *grid);
      } else if (*tensor.qparams != *grid) {
        const int32_t requantized = NewTensor(point.name, graph_.TypeOf(node.in[0]), /*computed=*/true);
        Assign(requantized, *grid);
        origins_[requantized].producer = static_cast<int>(model_.operators.size());
        model_.operators.push_back({.code = kQuantizeCode, .inputs = {index}, .outputs = {requantized}});
        index = requantized;
      }
    }
    tensor_of_[node.out[0]] = index;
  }

  int32_t IntConstant(const CircleArg& arg) {
    const bool scalar = arg.kind == CircleArg::Kind::kInt;
    const Shape shape = scalar ? Shape{} : Shape{static_cast<int64_t>(arg.ints.size())};
    const int32_t index = NewTensor("shape", {DType::kI32, shape}, /*computed=*/false);
    model_.tensors[index].data = circlet::Tensor::Of<int32_t>(shape, arg.ints);
    return index;
  }

  // A value against a constant bound.
  bool IsClamp(const Operator& op) const {
    return (op.code == Minimum::kCircleCode || op.code == Maximum::kCircleCode) && origins_[op.inputs[1]].constant >= 0;
  }

  // A constant under another shape is a constant, one for all that ask.
  bool FoldReshape(const Node& node) {
    const auto* reshape = std::get_if<Reshape>(&node.op.kind);
    if (reshape == nullptr) return false;
    const int32_t index = TensorOf(node.in[0]);
    if (origins_[index].constant < 0) return false;
    auto [it, inserted] = reshaped_.try_emplace({index, reshape->shape.ToString()});
    if (inserted) {
      it->second = NewTensor(model_.tensors[index].name, {DType::kF32, reshape->shape}, /*computed=*/false);
      model_.tensors[it->second].data = model_.tensors[index].data.Reshaped(reshape->shape);
      if (model_.tensors[index].qparams) Assign(it->second, *model_.tensors[index].qparams);
      origins_[it->second].constant = origins_[index].constant;
    }
    tensor_of_[node.out[0]] = it->second;
    return true;
  }

  void EmitOperator(const Node& node) {
    if (FoldReshape(node)) return;
    std::vector<TensorType> in, out;
    for (const ValueId id : node.in) in.push_back(graph_.TypeOf(id));
    for (const ValueId id : node.out) out.push_back(graph_.TypeOf(id));
    CircleOp op = std::visit(
        [&](const auto& kind) -> CircleOp {
          if constexpr (CircleOpDef<std::decay_t<decltype(kind)>>) return kind.Emit(in, out);
          throw Bug(fmt::format("{} has no Circle form", kind.kName));
        },
        node.op.kind);
    if (options_.dynamic_length) OpenLength(op, out);

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
          emitted.inputs.push_back(IntConstant(arg));
      }
    }
    const bool keeps = node.op.KeepsValues() || std::holds_alternative<Requantize>(node.op.kind) || IsClamp(emitted);
    for (size_t i = 0; i < node.out.size(); ++i) {
      const int32_t index = NewTensor(std::string(node.op.Name()), out[i], /*computed=*/true);
      origins_[index].producer = static_cast<int>(model_.operators.size());
      origins_[index].keeps = keeps;
      emitted.outputs.push_back(tensor_of_[node.out[i]] = index);
    }
    const std::vector<int32_t> inputs = emitted.inputs, outputs = emitted.outputs;
    model_.operators.push_back(std::move(emitted));
    if (node.op.KeepsValues()) InheritGrid(inputs[node.op.kind.index() == Op(Split{}).kind.index() ? 1 : 0], outputs);
  }

  // A per-channel grid belongs to the table, not to the rows that leave it.
  void InheritGrid(int32_t input, const std::vector<int32_t>& outputs) {
    const std::optional<QParams> grid = model_.tensors[input].qparams;
    if (!grid.has_value() || grid->PerChannel()) return;
    for (const int32_t output : outputs) Assign(output, *grid);
  }

  // RESHAPE targets of dynamic units carry the length as -1.
  static void OpenLength(CircleOp& op, const std::vector<TensorType>& out) {
    if (op.code != Reshape::kCircleCode || out[0].shape.Rank() < 2) return;
    for (CircleArg& arg : op.inputs)
      if (arg.kind == CircleArg::Kind::kInts) arg.ints[1] = -1;
    for (CircleOption& option : op.options)
      if (auto* sizes = std::get_if<std::vector<int32_t>>(&option.value)) (*sizes)[1] = -1;
  }

  // A clamp computes on the grid of its output: an input with another grid is requantized first, and a bound that no
  // code can pass is left out (circle_execution.md 7, "quantized clamp").
  void SettleClamps() {
    std::vector<Operator> settled;
    std::map<int32_t, int32_t> standin;  // for the output of a clamp that is left out
    const auto current = [&](int32_t index) {
      const auto it = standin.find(index);
      return it == standin.end() ? index : it->second;
    };
    std::vector<int> readers(model_.tensors.size(), 0);
    for (const Operator& op : model_.operators)
      for (const int32_t input : op.inputs)
        if (input >= 0) ++readers[input];
    for (Operator& op : model_.operators) {
      for (int32_t& input : op.inputs) input = current(input);
      const bool clamp = IsClamp(op);
      if (clamp && !SettleClamp(op, settled)) {
        standin[op.outputs[0]] = op.inputs[0];
        continue;
      }
      const bool shaped = clamp && !settled.empty() && settled.back().code == Reshape::kCircleCode &&
                          settled.back().outputs[0] == op.inputs[0] && readers[op.inputs[0]] == 1;
      settled.push_back(std::move(op));
      if (shaped) MoveReshapeBehind(settled);
    }
    model_.operators = std::move(settled);
    for (int32_t& output : model_.outputs) output = current(output);
    for (size_t i = 0; i < model_.operators.size(); ++i)
      for (const int32_t output : model_.operators[i].outputs) origins_[output].producer = static_cast<int>(i);
  }

  // RESHAPE, clamp -> clamp, RESHAPE, as the reference orders them.
  void MoveReshapeBehind(std::vector<Operator>& operators) {
    Operator &reshape = operators[operators.size() - 2], &clamp = operators.back();
    const int32_t source = reshape.inputs[0];
    const int32_t clamped = NewTensor(origins_[source].name, model_.tensors[source].type, /*computed=*/true);
    model_.tensors[clamped].qparams = model_.tensors[source].qparams;
    clamp.inputs[0] = source;
    reshape.inputs[0] = clamped;
    reshape.outputs[0] = std::exchange(clamp.outputs[0], clamped);
    std::swap(reshape, clamp);
  }

  // Gives one clamp its grid; false when it cannot bind.
  bool SettleClamp(Operator& op, std::vector<Operator>& settled) {
    int32_t& input = op.inputs[0];
    const int32_t bound = op.inputs[1], output = op.outputs[0];
    const std::optional<QParams> given = model_.tensors[input].qparams;
    if (!model_.tensors[output].qparams && given) Assign(output, *given);
    const std::optional<QParams> grid = model_.tensors[output].qparams;
    if (!grid || !given) return true;
    if (*grid != *given) {
      const int32_t requantized =
          NewTensor(model_.tensors[output].name, {DType::kF32, model_.tensors[output].type.shape}, /*computed=*/true);
      Assign(requantized, *grid);
      settled.push_back({.code = kQuantizeCode, .inputs = {input}, .outputs = {requantized}});
      input = requantized;
    }
    if (Binds(op.code, bound, *grid)) {
      Assign(bound, *grid);
      return true;
    }
    if (origins_[output].pointed && !origins_[input].pointed) {
      model_.tensors[input].name = origins_[input].name = origins_[output].name;
      origins_[input].pointed = true;
    }
    return false;
  }

  bool Binds(int32_t code, int32_t bound, const QParams& grid) const {
    const float value = model_.tensors[bound].data.F32()[0];
    if (!std::isfinite(value)) return false;
    const CodeRange codes = CodesOf(grid.dtype);
    const int64_t at = CodeAt(source_.Quantize(model_.tensors[bound].data, grid), 0);
    return code == Minimum::kCircleCode ? at < codes.max : at > codes.min;
  }

  // b / (s_in s_w[c]) as whole numbers; a per-tensor weight scale serves every channel (ptq.md 2.6, findings A1).
  void QuantizeBiases() {
    for (const Operator& op : model_.operators) {
      if (op.code != FullyConnected::kCircleCode || op.inputs.size() < 3 || op.inputs[2] < 0) continue;
      const std::optional<QParams>&x = model_.tensors[op.inputs[0]].qparams, &w = model_.tensors[op.inputs[1]].qparams;
      Tensor& bias = model_.tensors[op.inputs[2]];
      if (!x || !w || bias.qparams) continue;
      const std::span<const float> values = bias.data.F32();
      QParams grid{.dtype = x->dtype == DType::kI16 ? DType::kI64 : DType::kI32, .axis = 0};
      circlet::Tensor codes(TensorType{grid.dtype, bias.type.shape});
      for (size_t c = 0; c < values.size(); ++c) {
        const float scale = x->scale[0] * w->scale[w->PerChannel() ? c : 0];
        grid.scale.push_back(scale);
        grid.zero_point.push_back(0);
        const int64_t code = std::llrint(values[c] / scale);
        if (grid.dtype == DType::kI64)
          codes.I64()[c] = code;
        else
          codes.As<int32_t>()[c] = static_cast<int32_t>(std::clamp<int64_t>(code, INT32_MIN, INT32_MAX));
      }
      RequireStorable(bias.name, grid);
      bias.data = std::move(codes);
      bias.type.dtype = grid.dtype;
      bias.qparams = std::move(grid);
    }
  }

  // A product with a bare constant whose result has a grid: the constant gets the grid that holds it exactly, and a
  // factor without a grid the result's grid divided by the constant (the reference leaves both in float, findings B4).
  void FillHoles() {
    for (auto op = model_.operators.rbegin(); op != model_.operators.rend(); ++op) {
      if (op->code != Mul::kCircleCode) continue;
      const int32_t constant = op->inputs[1];
      const auto& result = model_.tensors[op->outputs[0]].qparams;
      if (origins_[constant].constant < 0 || model_.tensors[constant].qparams || !result) continue;
      const float value = model_.tensors[constant].data.F32()[0];
      const QParams exact{.dtype = result->dtype, .scale = {std::abs(value) / Top(result->dtype)}, .zero_point = {0}};
      QParams factor = *result;
      factor.scale[0] /= std::abs(value);
      for (const QParams& grid : {exact, factor}) RequireStorable(origins_[constant].name, grid);
      Assign(constant, exact);
      AssignBack(op->inputs[0], factor);
    }
    const bool quantized = std::any_of(model_.tensors.begin(), model_.tensors.end(),
                                       [](const Tensor& t) { return t.qparams.has_value(); });
    for (size_t i = 0; quantized && i < model_.tensors.size(); ++i) {
      const Tensor& tensor = model_.tensors[i];
      if (tensor.type.dtype == DType::kF32 && !tensor.qparams && origins_[i].producer >= 0)
        Fail("{}: this {} output has no quantization point; give it one, or set the whole unit to float",
             origins_[i].name, OperatorName(model_.operators[origins_[i].producer].code));
    }
  }

  static float Top(DType dtype) { return static_cast<float>(CodesOf(dtype).max); }

  void QuantizeConstants() {
    for (size_t i = 0; i < model_.tensors.size(); ++i) {
      Tensor& tensor = model_.tensors[i];
      if (origins_[i].constant >= 0 && tensor.qparams) tensor.data = source_.Quantize(tensor.data, *tensor.qparams);
    }
  }

  Graph graph_;
  const GridSource& source_;
  ExportOptions options_;
  std::vector<int32_t> tensor_of_;  // by value
  Model model_;
  std::vector<Origin> origins_;                                  // by tensor
  std::map<std::pair<int32_t, std::string>, int32_t> reshaped_;  // constants under other shapes
};

// A RESHAPE of a RESHAPE reads the first one's input; what nothing reads then goes.
void Simplify(Model& model) {
  std::vector<int> readers(model.tensors.size(), 0), producer(model.tensors.size(), -1);
  for (size_t i = 0; i < model.operators.size(); ++i) {
    for (const int32_t input : model.operators[i].inputs)
      if (input >= 0) ++readers[input];
    for (const int32_t output : model.operators[i].outputs) producer[output] = static_cast<int>(i);
  }
  for (const int32_t output : model.outputs) ++readers[output];
  const auto is_reshape = [&](int index) { return index >= 0 && model.operators[index].code == Reshape::kCircleCode; };
  for (Operator& op : model.operators) {
    if (op.code != Reshape::kCircleCode) continue;
    for (int first = producer[op.inputs[0]]; is_reshape(first); first = producer[op.inputs[0]]) {
      --readers[op.inputs[0]];
      op.inputs[0] = model.operators[first].inputs[0];
      ++readers[op.inputs[0]];
    }
  }
  std::vector<Operator> kept;
  for (Operator& op : model.operators)
    if (op.code != Reshape::kCircleCode || readers[op.outputs[0]] > 0) kept.push_back(std::move(op));
  model.operators = std::move(kept);

  std::vector<int32_t> renumbered(model.tensors.size(), -1);
  std::vector<Tensor> tensors;
  const auto visit = [&](std::vector<int32_t>& list) {
    for (int32_t& index : list) {
      if (index < 0) continue;
      if (renumbered[index] < 0) {
        renumbered[index] = static_cast<int32_t>(tensors.size());
        tensors.push_back(std::move(model.tensors[index]));
      }
      index = renumbered[index];
    }
  };
  visit(model.inputs);
  for (Operator& op : model.operators) {
    visit(op.inputs);
    visit(op.outputs);
  }
  visit(model.outputs);
  model.tensors = std::move(tensors);
}

}  // namespace

Model ToCircle(const Graph& graph, const GridSource& grids, const ExportOptions& options) {
  Model model = Exporter(Expanded(graph), grids, options).Run();
  Simplify(model);
  return model;
}

}  // namespace circlet::circle
