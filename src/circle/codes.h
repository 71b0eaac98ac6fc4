#pragma once

#include "circlet/base/error.h"
#include "circlet/base/tensor.h"

namespace circlet::circle {

// Element `index` of a constant of integer type (4-bit packed, low half first); Error for other types.
inline int64_t CodeAt(const circlet::Tensor& data, int64_t index) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(data.Raw());
  switch (data.GetDType()) {
    case DType::kU4:
      return (bytes[index / 2] >> (index % 2 * 4)) & 0xf;
    case DType::kI4:
      return static_cast<int8_t>(static_cast<uint8_t>(bytes[index / 2] << (index % 2 == 0 ? 4 : 0))) >> 4;
    case DType::kU8:
      return bytes[index];
    case DType::kI8:
      return static_cast<int8_t>(bytes[index]);
    case DType::kI16:
      return data.As<int16_t>()[index];
    case DType::kI32:
      return data.As<int32_t>()[index];
    case DType::kI64:
      return data.As<int64_t>()[index];
    default:
      Fail("constants of type {} cannot be dequantized", Name(data.GetDType()));
  }
}

}  // namespace circlet::circle
