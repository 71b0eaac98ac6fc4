#include <algorithm>
#include <optional>

#include "circle/schema.h"
#include "circlet/base/error.h"
#include "circlet/circle/model.h"

namespace circlet::circle {
namespace {

// The rules of format.md 5: what every independent checker and runtime asks, and a little more.
class Verifier {
 public:
  explicit Verifier(const Model& model) : model_(model) {}

  std::vector<std::string> Run() {
    for (size_t i = 0; i < model_.tensors.size(); ++i) CheckTensor(model_.tensors[i], TensorPlace(i));
    CheckInputs();
    for (size_t i = 0; i < model_.operators.size(); ++i) CheckOperator(i);
    CheckOutputs();
    return std::move(faults_);
  }

 private:
  template <typename... Args>
  void Fault(const std::string& place, fmt::format_string<Args...> format, Args&&... args) {
    faults_.push_back(fmt::format("{}: {}", place, fmt::format(format, std::forward<Args>(args)...)));
  }

  std::string TensorPlace(int64_t index) const {
    return fmt::format("tensor {} \"{}\"", index, model_.tensors[static_cast<size_t>(index)].name);
  }
  std::string OperatorPlace(size_t index) const {
    return fmt::format("operator {} {}", index, OperatorName(model_.operators[index].code));
  }
  bool Exists(int32_t tensor) const { return tensor >= 0 && static_cast<size_t>(tensor) < model_.tensors.size(); }

  // ---- Tensors
  // -------------------------------------------------------------------------------------------------------

  void CheckTensor(const Tensor& tensor, const std::string& place) {
    const TensorType& type = tensor.type;
    if (!TensorTypeOf(type.dtype).has_value()) Fault(place, "Circle has no {}; store it as float32", Name(type.dtype));
    for (const int64_t size : type.shape.Sizes()) {
      if (size < 0 || size > INT32_MAX)
        Fault(place, "shape {} has the size {}, which is not in 0..2147483647", type.shape.ToString(), size);
    }
    try {
      type.Bytes();
    } catch (const Error& error) {
      Fault(place, "{}", error.what());
    }
    CheckSignature(tensor, place);
    if (!tensor.data.Empty() && tensor.data.Type() != type)
      Fault(place, "is declared {}, but its data is {}", type.ToString(), tensor.data.Type().ToString());
    if (tensor.qparams.has_value())
      CheckGrid(tensor, *tensor.qparams, place);
    else if (BitWidth(type.dtype) == 4)
      Fault(place, "{} without scale and zero point has no meaning", type.ToString());
  }

  void CheckSignature(const Tensor& tensor, const std::string& place) {
    if (tensor.signature.empty()) return;
    const Shape& shape = tensor.type.shape;
    const std::string text = SignatureText(tensor);
    if (static_cast<int>(tensor.signature.size()) != shape.Rank())
      return Fault(place, "shape_signature {} has {} axes, shape {} has {}", text, tensor.signature.size(),
                   shape.ToString(), shape.Rank());
    for (int axis = 0; axis < shape.Rank(); ++axis) {
      const int32_t size = tensor.signature[static_cast<size_t>(axis)];
      if (size != -1 && size != shape[axis])
        return Fault(place, "shape_signature {} and shape {} differ on axis {}; only -1 may differ", text,
                     shape.ToString(), axis);
    }
    if (tensor.IsConstant() && std::ranges::count(tensor.signature, -1) > 0)
      Fault(place, "a constant with the unknown size in shape_signature {}", text);
  }

  static std::string SignatureText(const Tensor& tensor) {
    return Shape(std::vector<int64_t>(tensor.signature.begin(), tensor.signature.end())).ToString();
  }

  void CheckGrid(const Tensor& tensor, const QParams& grid, const std::string& place) {
    const TensorType& type = tensor.type;
    if (!HoldsCodes(type.dtype))
      return Fault(place, "scale and zero point on {}; only int4 to int64 and uint4 to uint16 are quantized",
                   type.ToString());
    if (type.dtype == DType::kI64 && !tensor.IsConstant())
      return Fault(place, "scale and zero point on computed {}; int64 codes are those of constants", type.ToString());
    if (grid.dtype != type.dtype) Fault(place, "is {}, its grid is for {}", type.ToString(), Name(grid.dtype));
    if (const std::optional<std::string> fault = FaultOf(grid); fault.has_value()) return Fault(place, "{}", *fault);
    CheckAxis(tensor, grid, place);
  }

  void CheckAxis(const Tensor& tensor, const QParams& grid, const std::string& place) {
    const Shape& shape = tensor.type.shape;
    const size_t count = grid.scale.size();
    if (!grid.PerChannel()) {
      if (count != 1) Fault(place, "{} scales without an axis", count);
      return;
    }
    if (grid.axis >= shape.Rank())
      return Fault(place, "{} scales on axis {}, but shape {} has axes below {}", count, grid.axis, shape.ToString(),
                   shape.Rank());
    const bool unknown = static_cast<int>(tensor.signature.size()) == shape.Rank() &&
                         tensor.signature[static_cast<size_t>(grid.axis)] == -1;
    if (unknown || static_cast<int64_t>(count) != shape[grid.axis])
      Fault(place, "{} scales on axis {}, which has {}", count, grid.axis,
            unknown ? "an unknown size" : fmt::format("size {} (shape {})", shape[grid.axis], shape.ToString()));
  }

  // ---- Dataflow
  // ------------------------------------------------------------------------------------------------------

  static constexpr int64_t kUndefined = -2;
  static constexpr int64_t kGraphInput = -1;

  void CheckInputs() {
    producer_.assign(model_.tensors.size(), kUndefined);
    for (size_t k = 0; k < model_.inputs.size(); ++k) {
      const int32_t tensor = model_.inputs[k];
      const std::string place = fmt::format("graph input {}", k);
      if (!Exists(tensor)) {
        Fault(place, "tensor {} of {}", tensor, model_.tensors.size());
      } else if (model_.tensors[static_cast<size_t>(tensor)].IsConstant()) {
        Fault(place, "{} is a constant", TensorPlace(tensor));
      } else if (producer_[static_cast<size_t>(tensor)] == kGraphInput) {
        Fault(place, "{} is listed twice", TensorPlace(tensor));
      } else {
        producer_[static_cast<size_t>(tensor)] = kGraphInput;
      }
    }
  }

  void CheckOperator(size_t index) {
    const Operator& op = model_.operators[index];
    const std::string place = OperatorPlace(index);
    if (IsControlFlow(op.code)) Fault(place, "runs another graph; circlet takes straight-line graphs only: inline it");
    CheckOptions(op, place);
    for (size_t k = 0; k < op.inputs.size(); ++k) {
      const int32_t tensor = op.inputs[k];
      if (tensor == -1) continue;
      if (!Exists(tensor))
        Fault(place, "input {} is tensor {} of {}", k, tensor, model_.tensors.size());
      else if (!HasValue(tensor))
        Fault(place, "input {}, {}, is used before it is computed", k, TensorPlace(tensor));
    }
    if (op.outputs.empty()) Fault(place, "has no output");
    for (size_t k = 0; k < op.outputs.size(); ++k) DefineOutput(index, k, op.outputs[k], place);
  }

  bool HasValue(int32_t tensor) const {
    const auto i = static_cast<size_t>(tensor);
    return producer_[i] != kUndefined || model_.tensors[i].IsConstant();
  }

  void DefineOutput(size_t index, size_t k, int32_t tensor, const std::string& place) {
    if (!Exists(tensor)) return Fault(place, "output {} is tensor {} of {}", k, tensor, model_.tensors.size());
    int64_t& producer = producer_[static_cast<size_t>(tensor)];
    if (model_.tensors[static_cast<size_t>(tensor)].IsConstant())
      Fault(place, "output {}, {}, is a constant", k, TensorPlace(tensor));
    else if (producer == kGraphInput)
      Fault(place, "output {}, {}, is a graph input", k, TensorPlace(tensor));
    else if (producer != kUndefined)
      Fault(place, "output {}, {}, is already the output of {}", k, TensorPlace(tensor),
            OperatorPlace(static_cast<size_t>(producer)));
    producer = static_cast<int64_t>(index);
  }

  void CheckOutputs() {
    for (size_t k = 0; k < model_.outputs.size(); ++k) {
      const int32_t tensor = model_.outputs[k];
      if (!Exists(tensor))
        Fault(fmt::format("graph output {}", k), "tensor {} of {}", tensor, model_.tensors.size());
      else if (!HasValue(tensor))
        Fault(fmt::format("graph output {}", k), "{} is never computed", TensorPlace(tensor));
    }
  }

  void CheckOptions(const Operator& op, const std::string& place) {
    const OperatorSchema* schema = FindOperator(op.code);
    if (schema == nullptr || op.code == kCustomCode)
      return Fault(place, "builtin operator {} is not in the schema table", op.code);
    for (const CircleOption& option : op.options) {
      const auto field = std::ranges::find(schema->options.fields, option.name, &FieldSchema::name);
      if (field == schema->options.fields.end())
        Fault(place, "has no option \"{}\"", option.name);
      else if (!Fits(option, *field))
        Fault(place, "option \"{}\" holds a value that its field cannot store", option.name);
    }
  }

  const Model& model_;
  std::vector<std::string> faults_;
  std::vector<int64_t> producer_;  // by tensor: operator index, kGraphInput or kUndefined
};

}  // namespace

std::vector<std::string> Verify(const Model& model) { return Verifier(model).Run(); }

}  // namespace circlet::circle
