#pragma once

// The Circle schema as data (format.md 1.1, 2, 3.2). Writer, reader, bounds check and dump walk these tables; a field,
// an operator or an element type is stated here and nowhere else.

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include "circlet/base/dtype.h"
#include "circlet/base/qparams.h"
#include "circlet/ops/op.h"

namespace circlet::circle {

inline constexpr char kIdentifier[] = "CIR0";

enum class FieldKind : uint8_t {
  kBool,
  kInt8,
  kUint8,
  kInt32,
  kUint32,
  kUint64,
  kFloat,
  kString,
  kBytes,   // [ubyte]
  kInt32s,  // [int32]
  kInt64s,
  kFloats,
  kTable,
  kTables,
  kUnion,  // its type byte is the field before it
};

struct TableSchema;

struct FieldSchema {
  int id;  // FlatBuffers field id: vtable slot 4 + 2 * id
  std::string_view name;
  FieldKind kind;
  double default_value = 0;
  const TableSchema* table = nullptr;  // of kTable and kTables
};

struct TableSchema {
  std::string_view name;
  std::span<const FieldSchema> fields;  // by id; the fields that circlet reads or refuses
};

// ---- Tables of the file -------------------------------------------------------------------------------------

namespace model_field {
enum : int { kVersion = 0, kOperatorCodes = 1, kSubgraphs = 2, kDescription = 3, kBuffers = 4 };
}
namespace subgraph_field {
enum : int { kTensors = 0, kInputs = 1, kOutputs = 2, kOperators = 3, kName = 4 };
}
namespace operator_field {
enum : int {
  kOpcodeIndex = 0,
  kInputs = 1,
  kOutputs = 2,
  kOptionsType = 3,
  kOptions = 4,
  kLargeCustomOptionsOffset = 9,
  kOptions2Type = 11,
};
}
namespace code_field {
enum : int { kDeprecatedBuiltinCode = 0, kCustomCode = 1, kVersion = 2, kBuiltinCode = 3 };
}
namespace buffer_field {
enum : int { kData = 0, kOffset = 1, kSize = 2 };
}
namespace tensor_field {
enum : int {
  kShape = 0,
  kType = 1,
  kBuffer = 2,
  kName = 3,
  kQuantization = 4,
  kIsVariable = 5,
  kSparsity = 6,
  kShapeSignature = 7,
  kHasRank = 8,
  kCompressionType = 10,
};
}
namespace quantization_field {
enum : int { kScale = 2, kZeroPoint = 3, kDetailsType = 4, kQuantizedDimension = 6 };
}

const TableSchema& ModelTable();

// ---- Element types ------------------------------------------------------------------------------------------

// "INT16" for 7, "GGML_Q4_0" for -2; "TYPE_99" for values outside the schema.
std::string TensorTypeName(int8_t type);
// The element type; none for strings, complex, block and other types that circlet does not hold.
std::optional<DType> DTypeOf(int8_t type);
// The other way; none for bfloat16, which readers of schema 0.10 lack.
std::optional<int8_t> TensorTypeOf(DType type);

// Whether values of the type may have a scale and zero point.
bool HoldsCodes(DType type);
// What the format cannot hold of a grid; none = it can.
std::optional<std::string> FaultOf(const QParams& grid);

// ---- Operators ----------------------------------------------------------------------------------------------

struct OperatorSchema {
  int32_t code;  // BuiltinOperator
  std::string_view name;
  uint8_t options_type;  // BuiltinOptions; 0 = the operator has no options table
  TableSchema options;
};

inline constexpr int32_t kCustomCode = 32;

std::span<const OperatorSchema> Operators();
const OperatorSchema* FindOperator(int32_t code);
// Operators that run another subgraph or file.
bool IsControlFlow(int32_t code);

// Whether the value has the kind of the field.
bool Fits(const CircleOption& option, const FieldSchema& field);

}  // namespace circlet::circle
