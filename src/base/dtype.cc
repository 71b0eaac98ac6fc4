#include "circlet/base/dtype.h"

#include <array>
#include <string>

#include "circlet/base/error.h"

namespace circlet {
namespace {

struct Entry {
  DType type;
  std::string_view name;
  int bits;
  bool is_integer;
  bool is_signed;
};

constexpr std::array<Entry, 15> kTypes{{
    {DType::kF32, "float32", 32, false, true},
    {DType::kF16, "float16", 16, false, true},
    {DType::kBF16, "bfloat16", 16, false, true},
    {DType::kF64, "float64", 64, false, true},
    {DType::kI4, "int4", 4, true, true},
    {DType::kU4, "uint4", 4, true, false},
    {DType::kI8, "int8", 8, true, true},
    {DType::kU8, "uint8", 8, true, false},
    {DType::kI16, "int16", 16, true, true},
    {DType::kU16, "uint16", 16, true, false},
    {DType::kI32, "int32", 32, true, true},
    {DType::kU32, "uint32", 32, true, false},
    {DType::kI64, "int64", 64, true, true},
    {DType::kU64, "uint64", 64, true, false},
    {DType::kBool, "bool", 8, false, false},
}};

const Entry& Find(DType type) { return kTypes[static_cast<size_t>(type)]; }

}  // namespace

int BitWidth(DType type) { return Find(type).bits; }
std::string_view Name(DType type) { return Find(type).name; }
bool IsInteger(DType type) { return Find(type).is_integer; }

DType DTypeFromName(std::string_view name) {
  std::string known;
  for (const Entry& entry : kTypes) {
    if (entry.name == name) return entry.type;
    known += (known.empty() ? "" : ", ") + std::string(entry.name);
  }
  Fail("unknown element type \"{}\"; known are {}", name, known);
}

CodeRange CodesOf(DType type) {
  const Entry& entry = Find(type);
  CIRCLET_CHECK(entry.is_integer && entry.bits <= 32, "{} has no code range", entry.name);
  if (entry.is_signed) return {-(int64_t{1} << (entry.bits - 1)), (int64_t{1} << (entry.bits - 1)) - 1};
  return {0, (int64_t{1} << entry.bits) - 1};
}

}  // namespace circlet
