#pragma once

#include <cstdint>
#include <string_view>

namespace circlet {

// Element types of tensors in memory and in files. i4 and u4 are packed two to a byte, the even element in the low
// nibble (format.md 2.2).
enum class DType : uint8_t { kF32, kF16, kBF16, kF64, kI4, kU4, kI8, kU8, kI16, kU16, kI32, kU32, kI64, kU64, kBool };

int BitWidth(DType type);
std::string_view Name(DType type);        // "float32", "bfloat16", "int16", "uint4", ...
DType DTypeFromName(std::string_view name);  // throws Error listing the known names

bool IsInteger(DType type);               // i4 .. u64, not bool
// Smallest and largest code of an integer type of at most 32 bits: [-2^(b-1), 2^(b-1)-1] or [0, 2^b-1].
struct CodeRange {
  int64_t min, max;
};
CodeRange CodesOf(DType type);

}  // namespace circlet
