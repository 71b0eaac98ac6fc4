#pragma once

// A small model with one of everything that the format can hold, for the tests of this room.

#include <array>
#include <cstring>
#include <span>

#include "circlet/circle/model.h"

namespace circlet::circle {

template <typename T, size_t kCount>
circlet::Tensor ConstantOf(Shape shape, const std::array<T, kCount>& values) {
  return circlet::Tensor::Of<T>(std::move(shape), std::span<const T>(values));
}

// 24 4-bit codes, two a byte.
inline circlet::Tensor PackedCodes(Shape shape) {
  circlet::Tensor packed(TensorType{DType::kU4, std::move(shape)});
  for (int64_t i = 0; i < packed.Bytes(); ++i) packed.Raw()[i] = static_cast<std::byte>(0x10 + 0x11 * i);
  return packed;
}

inline Tensor Activation(std::string name, TensorType type, float scale) {
  const DType dtype = type.dtype;
  return {std::move(name), std::move(type), {}, QParams{dtype, -1, {scale}, {0}}, {}};
}

inline Tensor ConstantTensor(std::string name, circlet::Tensor data, std::optional<QParams> qparams = {}) {
  return {std::move(name), data.Type(), {}, std::move(qparams), data};
}

// x -> FULLY_CONNECTED (uint4, per channel) -> RMS_NORM -> RESHAPE -> MUL by a scalar; x has an unknown size.
inline Model SmallModel() {
  Model model;
  model.description = "circle";
  model.tensors = {
      Activation("x", {DType::kI16, {1, 1, 8}}, 0.5f),
      ConstantTensor("w", PackedCodes({3, 8}), QParams{DType::kU4, 0, {0.25f, 0.5f, 1.0f}, {7, 8, 15}}),
      Activation("y", {DType::kI16, {1, 1, 3}}, 0.125f),
      ConstantTensor("gamma", ConstantOf<int16_t, 3>({3}, {1, -2, 32767}), QParams{DType::kI16, -1, {1e-4f}, {0}}),
      Activation("n", {DType::kI16, {1, 1, 3}}, 3.0517578e-05f),
      ConstantTensor("shape", ConstantOf<int32_t, 2>({2}, {-1, 3})),
      Activation("r", {DType::kI16, {1, 3}}, 3.0517578e-05f),
      ConstantTensor("factor", ConstantOf<int16_t, 1>({}, {9}), QParams{DType::kI16, -1, {2.0f}, {0}}),
      Activation("z", {DType::kI16, {1, 3}}, 1.0f),
  };
  model.tensors[0].signature = {1, -1, 8};
  model.tensors[2].signature = {1, -1, 3};
  model.tensors[4].signature = {1, -1, 3};
  model.tensors[6].signature = {-1, 3};
  model.tensors[8].signature = {-1, 3};
  model.inputs = {0};
  model.outputs = {8, 4};
  model.operators = {
      {9, {{"keep_num_dims", int64_t{1}}}, {0, 1, -1}, {2}},
      {-6, {{"epsilon", double{1e-6f}}}, {2, 3}, {4}},
      {22, {{"new_shape", std::vector<int32_t>{-1, 3}}}, {4, 5}, {6}},
      {18, {}, {6, 7}, {8}},
  };
  return model;
}

// Whether two models say the same, constants by their bytes; options at their default may be absent on either side.
inline bool SameModel(const Model& a, const Model& b) {
  if (Dump(a) != Dump(b) || a.description != b.description || a.subgraph_name != b.subgraph_name) return false;
  for (size_t i = 0; i < a.tensors.size(); ++i) {
    const Tensor& x = a.tensors[i];
    const Tensor& y = b.tensors[i];
    if (x.name != y.name || x.type != y.type || x.signature != y.signature || x.qparams != y.qparams) return false;
    if (x.data.Empty() != y.data.Empty()) return false;
    if (!x.data.Empty() && std::memcmp(x.data.Raw(), y.data.Raw(), static_cast<size_t>(x.data.Bytes())) != 0)
      return false;
  }
  return true;
}

}  // namespace circlet::circle
