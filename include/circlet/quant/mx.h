#pragma once

// Block floating point: 32 values share one power-of-two scale (quantization.md 2.7). Simulated only; a file cannot
// hold it.

#include <cstdint>
#include <string_view>

#include "circlet/base/tensor.h"

namespace circlet {

inline constexpr int64_t kMxBlock = 32;

enum class MxFormat : uint8_t { kInt8, kInt4, kInt2, kFp8E5M2, kFp8E4M3, kFp6E3M2, kFp6E2M3, kFp4, kFp16, kBF16 };
enum class MxRounding : uint8_t { kNearest, kFloor, kEven };  // half away from zero; towards zero; half to even

struct MxSpec {
  MxFormat format = MxFormat::kFp8E4M3;
  int axis = -1;           // the axis that blocks lie along; negative counts from the end
  bool shared_max = true;  // false: every element has an exponent of its own
  MxRounding rounding = MxRounding::kNearest;
  bool operator==(const MxSpec&) const = default;
};

std::string_view Name(MxFormat format);      // "int8", "fp8_e4m3", "fp6_e2m3", "fp4", ...
std::string_view Name(MxRounding rounding);  // "nearest", "floor", "even"
// Throw Error listing the known names.
MxFormat MxFormatFromName(std::string_view name);
MxRounding MxRoundingFromName(std::string_view name);

// Rounds float32 values in place, block by block along spec.axis; the last block of an axis may be short. A block whose
// exponent leaves 8 bits becomes NaN. Throws Error when the tensor lacks the axis.
void MxFakeQuantize(Tensor& values, const MxSpec& spec);

}  // namespace circlet
