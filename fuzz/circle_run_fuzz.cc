// A Circle file that reads runs, or is an Error. Behind the file may stand changes to the model that was read, 8 bytes
// each, which reach what damaged bytes seldom do: "EDIT", then kind, index, place and a value.

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "circlet/base/error.h"
#include "circlet/circle/export.h"

namespace {

using circlet::DType;
using circlet::Shape;
using namespace circlet::circle;

struct Edit {
  uint8_t kind, index, place, unused;
  int32_t value;
};

void Apply(const Edit& edit, Model& model) {
  if (model.tensors.empty() || model.operators.empty()) return;
  Tensor& tensor = model.tensors[edit.index % model.tensors.size()];
  Operator& op = model.operators[edit.index % model.operators.size()];
  const auto in = [&](auto& list, auto value) {
    if (!list.empty()) list[edit.place % list.size()] = value;
  };
  switch (edit.kind % 12) {
    case 0:
      tensor.type.dtype = static_cast<DType>(static_cast<uint32_t>(edit.value) % 15);
      if (tensor.qparams && edit.place % 2 == 0) tensor.qparams->dtype = tensor.type.dtype;
      break;
    case 1:
      if (tensor.type.shape.Rank() > 0) tensor.type.shape[edit.place % tensor.type.shape.Rank()] = edit.value;
      break;
    case 2:
      if (tensor.qparams) in(tensor.qparams->scale, std::bit_cast<float>(edit.value));
      break;
    case 3:
      if (tensor.qparams) in(tensor.qparams->zero_point, edit.value);
      break;
    case 4:
      tensor.qparams.reset();
      break;
    case 5:
      op.code = edit.value;
      break;
    case 6:
      in(op.inputs, edit.value);
      break;
    case 7:
      in(op.outputs, edit.value);
      break;
    case 8:
      if (!op.options.empty()) {
        auto& value = op.options[edit.place % op.options.size()].value;
        if (std::holds_alternative<int64_t>(value)) value = int64_t{edit.value};
        if (std::holds_alternative<double>(value)) value = double{std::bit_cast<float>(edit.value)};
        if (std::holds_alternative<std::vector<int32_t>>(value)) in(std::get<std::vector<int32_t>>(value), edit.value);
      }
      break;
    case 9:
      in(edit.value % 2 == 0 ? model.inputs : model.outputs, edit.value / 2);
      break;
    case 10:
      if (!tensor.data.Empty() && tensor.data.Bytes() > 0) {
        tensor.data = tensor.data.Clone();
        tensor.data.Raw()[static_cast<uint32_t>(edit.value) % tensor.data.Bytes()] = std::byte{edit.place};
      }
      break;
    default:
      in(tensor.signature, edit.value);
  }
}

// Whether all tensors together stay small; others take longer than a fuzzer waits.
bool IsSmall(const Model& model) {
  constexpr double kMost = 1 << 18;
  double elements = 0;
  for (const Tensor& tensor : model.tensors) {
    double own = 1;
    for (const int64_t size : tensor.type.shape.Sizes()) own *= static_cast<double>(std::max<int64_t>(size, 1));
    elements += own;
  }
  return elements < kMost;
}

circlet::Tensor InputFor(const Tensor& tensor, int64_t length) {
  Shape shape = tensor.type.shape;
  for (size_t axis = 0; axis < tensor.signature.size(); ++axis)
    if (tensor.signature[axis] < 0) shape[static_cast<int>(axis)] = length;
  circlet::Tensor input({tensor.qparams ? DType::kF32 : tensor.type.dtype, shape});
  if (input.GetDType() == DType::kF32)
    for (int64_t i = 0; i < input.Elements(); ++i) input.F32()[i] = static_cast<float>((i * 7919 % 201) - 100) / 8;
  return input;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  constexpr char kMark[] = "EDIT";
  const uint8_t* const end = data + size;
  const uint8_t* const edits = std::find_end(data, end, kMark, kMark + 4);
  try {
    Model model =
        Parse({reinterpret_cast<const std::byte*>(data), static_cast<size_t>(edits - data)}, nullptr, "input");
    Edit edit{};
    for (const uint8_t* at = edits + 4; edits != end && end - at >= 8; at += sizeof(Edit)) {
      std::memcpy(&edit, at, sizeof(Edit));
      Apply(edit, model);
    }
    if (!IsSmall(model) || !Verify(model).empty()) return 0;
    std::map<std::string, circlet::Tensor> inputs;
    for (const int32_t index : model.inputs) inputs[model.tensors[index].name] = InputFor(model.tensors[index], 2);
    RunModel(model, inputs);
  } catch (const circlet::Error&) {
  }
  return 0;
}
