#include "circle/schema.h"

#include <fmt/format.h>

#include <algorithm>
#include <array>
#include <cmath>

#include "circlet/circle/model.h"

namespace circlet::circle {
namespace {

using enum FieldKind;

// ---- Tables of the file
// ----------------------------------------------------------------------------------------------

constexpr FieldSchema kQuantizationFields[] = {
    {quantization_field::kScale, "scale", kFloats},
    {quantization_field::kZeroPoint, "zero_point", kInt64s},
    {quantization_field::kDetailsType, "details_type", kUint8},
    {quantization_field::kQuantizedDimension, "quantized_dimension", kInt32},
};
constexpr TableSchema kQuantization{"QuantizationParameters", kQuantizationFields};

constexpr FieldSchema kTensorFields[] = {
    {tensor_field::kShape, "shape", kInt32s},
    {tensor_field::kType, "type", kInt8},
    {tensor_field::kBuffer, "buffer", kUint32},
    {tensor_field::kName, "name", kString},
    {tensor_field::kQuantization, "quantization", kTable, 0, &kQuantization},
    {tensor_field::kIsVariable, "is_variable", kBool},
    {tensor_field::kShapeSignature, "shape_signature", kInt32s},
    {tensor_field::kHasRank, "has_rank", kBool},
    {tensor_field::kCompressionType, "compression_type", kInt8},
};
constexpr TableSchema kTensor{"Tensor", kTensorFields};

constexpr FieldSchema kOperatorFields[] = {
    {operator_field::kOpcodeIndex, "opcode_index", kUint32},
    {operator_field::kInputs, "inputs", kInt32s},
    {operator_field::kOutputs, "outputs", kInt32s},
    {operator_field::kOptionsType, "builtin_options_type", kUint8},
    {operator_field::kOptions, "builtin_options", kUnion},
    {operator_field::kLargeCustomOptionsOffset, "large_custom_options_offset", kUint64},
    {operator_field::kOptions2Type, "builtin_options_2_type", kUint8},
};
constexpr TableSchema kOperator{"Operator", kOperatorFields};

constexpr FieldSchema kSubgraphFields[] = {
    {subgraph_field::kTensors, "tensors", kTables, 0, &kTensor},
    {subgraph_field::kInputs, "inputs", kInt32s},
    {subgraph_field::kOutputs, "outputs", kInt32s},
    {subgraph_field::kOperators, "operators", kTables, 0, &kOperator},
    {subgraph_field::kName, "name", kString},
};
constexpr TableSchema kSubgraph{"SubGraph", kSubgraphFields};

constexpr FieldSchema kCodeFields[] = {
    {code_field::kDeprecatedBuiltinCode, "deprecated_builtin_code", kInt8},
    {code_field::kCustomCode, "custom_code", kString},
    {code_field::kVersion, "version", kInt32, 1},
    {code_field::kBuiltinCode, "builtin_code", kInt32},
};
constexpr TableSchema kCode{"OperatorCode", kCodeFields};

constexpr FieldSchema kBufferFields[] = {
    {buffer_field::kData, "data", kBytes},
    {buffer_field::kOffset, "offset", kUint64},
    {buffer_field::kSize, "size", kUint64},
};
constexpr TableSchema kBuffer{"Buffer", kBufferFields};

constexpr FieldSchema kModelFields[] = {
    {model_field::kVersion, "version", kUint32},
    {model_field::kOperatorCodes, "operator_codes", kTables, 0, &kCode},
    {model_field::kSubgraphs, "subgraphs", kTables, 0, &kSubgraph},
    {model_field::kDescription, "description", kString},
    {model_field::kBuffers, "buffers", kTables, 0, &kBuffer},
};
constexpr TableSchema kModel{"Model", kModelFields};

// ---- Element types (format.md 2.2)
// -------------------------------------------------------------------------------------

struct TypeRow {
  int8_t type;
  std::string_view name;
  std::optional<DType> dtype;
};

constexpr TypeRow kTypes[] = {
    {0, "FLOAT32", DType::kF32}, {1, "FLOAT16", DType::kF16}, {2, "INT32", DType::kI32},    {3, "UINT8", DType::kU8},
    {4, "INT64", DType::kI64},   {5, "STRING", {}},           {6, "BOOL", DType::kBool},    {7, "INT16", DType::kI16},
    {8, "COMPLEX64", {}},        {9, "INT8", DType::kI8},     {10, "FLOAT64", DType::kF64}, {11, "COMPLEX128", {}},
    {12, "UINT64", DType::kU64}, {13, "RESOURCE", {}},        {14, "VARIANT", {}},          {15, "UINT32", DType::kU32},
    {16, "UINT16", DType::kU16}, {17, "INT4", DType::kI4},    {18, "BFLOAT16", {}},  // named by later schemas; no
                                                                                     // reader of 0.10 takes it
    {-1, "UINT4", DType::kU4},   {-2, "GGML_Q4_0", {}},       {-3, "GGML_Q4_1", {}},        {-4, "GGML_Q8_0", {}},
    {-5, "GGML_Q8_1", {}},       {-6, "MXFP4", {}},           {-7, "MXINT8", {}},
};

// ---- Options tables (format.md 3.2)
// ------------------------------------------------------------------------------------

constexpr FieldSchema Act(int id) { return {id, "fused_activation_function", kInt8}; }
constexpr FieldSchema Bool(int id, std::string_view name, bool value = false) {
  return {id, name, kBool, value ? 1. : 0.};
}
constexpr FieldSchema Byte(int id, std::string_view name) { return {id, name, kInt8}; }
constexpr FieldSchema Int(int id, std::string_view name, int value = 0) {
  return {id, name, kInt32, static_cast<double>(value)};
}

constexpr FieldSchema kActOnly[] = {Act(0)};
constexpr FieldSchema kAddSub[] = {Act(0), Bool(1, "pot_scale_int16", true)};
constexpr FieldSchema kFullyConnected[] = {Act(0), Byte(1, "weights_format"), Bool(2, "keep_num_dims"),
                                           Bool(3, "asymmetric_quantize_inputs"), Byte(4, "quantized_bias_type")};
constexpr FieldSchema kBatchMatMul[] = {Bool(0, "adjoint_lhs"), Bool(1, "adjoint_rhs"),
                                        Bool(2, "asymmetric_quantize_inputs")};
constexpr FieldSchema kGelu[] = {Bool(0, "approximate")};
constexpr FieldSchema kSoftmax[] = {{0, "beta", kFloat}};
constexpr FieldSchema kReducer[] = {Bool(0, "keep_dims")};
constexpr FieldSchema kReshape[] = {{0, "new_shape", kInt32s}};
constexpr FieldSchema kSqueeze[] = {{0, "squeeze_dims", kInt32s}};
constexpr FieldSchema kConcatenation[] = {Int(0, "axis"), Act(1)};
constexpr FieldSchema kStridedSlice[] = {Int(0, "begin_mask"),    Int(1, "end_mask"),         Int(2, "ellipsis_mask"),
                                         Int(3, "new_axis_mask"), Int(4, "shrink_axis_mask"), Bool(5, "offset")};
constexpr FieldSchema kSplit[] = {Int(0, "num_splits")};
constexpr FieldSchema kPack[] = {Int(0, "values_count"), Int(1, "axis")};
constexpr FieldSchema kUnpack[] = {Int(0, "num"), Int(1, "axis")};
constexpr FieldSchema kGather[] = {Int(0, "axis"), Int(1, "batch_dims")};
constexpr FieldSchema kOneHot[] = {Int(0, "axis")};
constexpr FieldSchema kCast[] = {Byte(0, "in_data_type"), Byte(1, "out_data_type")};
constexpr FieldSchema kConv2D[] = {Byte(0, "padding"),
                                   Int(1, "stride_w"),
                                   Int(2, "stride_h"),
                                   Act(3),
                                   Int(4, "dilation_w_factor", 1),
                                   Int(5, "dilation_h_factor", 1),
                                   Byte(6, "quantized_bias_type")};
constexpr FieldSchema kDepthwiseConv2D[] = {Byte(0, "padding"),
                                            Int(1, "stride_w"),
                                            Int(2, "stride_h"),
                                            Int(3, "depth_multiplier"),
                                            Act(4),
                                            Int(5, "dilation_w_factor", 1),
                                            Int(6, "dilation_h_factor", 1)};
constexpr FieldSchema kPool2D[] = {Byte(0, "padding"),     Int(1, "stride_w"),      Int(2, "stride_h"),
                                   Int(3, "filter_width"), Int(4, "filter_height"), Act(5)};
constexpr FieldSchema kShape[] = {Byte(0, "out_type")};
constexpr FieldSchema kArgMinMax[] = {Byte(0, "output_type")};
constexpr FieldSchema kCumsum[] = {Bool(0, "exclusive"), Bool(1, "reverse")};
constexpr FieldSchema kCall[] = {{0, "subgraph", kUint32}};
constexpr FieldSchema kIf[] = {Int(0, "then_subgraph_index"), Int(1, "else_subgraph_index")};
constexpr FieldSchema kWhile[] = {Int(0, "cond_subgraph_index"), Int(1, "body_subgraph_index")};
constexpr FieldSchema kInstanceNorm[] = {{0, "epsilon", kFloat}, Act(1)};
constexpr FieldSchema kBcqFullyConnected[] = {Int(0, "weights_hidden_size"), Act(1)};
constexpr FieldSchema kBcqGather[] = {Int(0, "input_hidden_size"), Int(1, "axis")};
constexpr FieldSchema kGru[] = {Act(0), Bool(1, "return_sequences"), Bool(2, "time_major")};
constexpr FieldSchema kRmsNorm[] = {{0, "epsilon", kFloat}};
constexpr FieldSchema kRope[] = {Int(0, "mode")};
constexpr FieldSchema kRunModel[] = {{0, "location", kString}, {1, "signature", kString}};

constexpr TableSchema kNone{"none", {}};

// By code.
constexpr OperatorSchema kOperators[] = {
    {-8, "RUN_MODEL", 248, {"RunModelOptions", kRunModel}},
    {-7, "ROPE", 249, {"RoPEOptions", kRope}},
    {-6, "RMS_NORM", 250, {"RmsNormOptions", kRmsNorm}},
    {-5, "GRU", 251, {"GRUOptions", kGru}},
    {-4, "BCQ_GATHER", 252, {"BCQGatherOptions", kBcqGather}},
    {-3, "BCQ_FULLY_CONNECTED", 253, {"BCQFullyConnectedOptions", kBcqFullyConnected}},
    {-2, "INSTANCE_NORM", 254, {"InstanceNormOptions", kInstanceNorm}},
    {0, "ADD", 11, {"AddOptions", kAddSub}},
    {1, "AVERAGE_POOL_2D", 5, {"Pool2DOptions", kPool2D}},
    {2, "CONCATENATION", 10, {"ConcatenationOptions", kConcatenation}},
    {3, "CONV_2D", 1, {"Conv2DOptions", kConv2D}},
    {4, "DEPTHWISE_CONV_2D", 2, {"DepthwiseConv2DOptions", kDepthwiseConv2D}},
    {6, "DEQUANTIZE", 38, {"DequantizeOptions", {}}},
    {7, "EMBEDDING_LOOKUP", 0, kNone},
    {9, "FULLY_CONNECTED", 8, {"FullyConnectedOptions", kFullyConnected}},
    {14, "LOGISTIC", 0, kNone},
    {17, "MAX_POOL_2D", 5, {"Pool2DOptions", kPool2D}},
    {18, "MUL", 21, {"MulOptions", kActOnly}},
    {22, "RESHAPE", 17, {"ReshapeOptions", kReshape}},
    {25, "SOFTMAX", 9, {"SoftmaxOptions", kSoftmax}},
    {28, "TANH", 0, kNone},
    {31, "CALL", 16, {"CallOptions", kCall}},
    {34, "PAD", 22, {"PadOptions", {}}},
    {36, "GATHER", 23, {"GatherOptions", kGather}},
    {39, "TRANSPOSE", 26, {"TransposeOptions", {}}},
    {40, "MEAN", 27, {"ReducerOptions", kReducer}},
    {41, "SUB", 28, {"SubOptions", kAddSub}},
    {42, "DIV", 29, {"DivOptions", kActOnly}},
    {43, "SQUEEZE", 30, {"SqueezeOptions", kSqueeze}},
    {45, "STRIDED_SLICE", 32, {"StridedSliceOptions", kStridedSlice}},
    {47, "EXP", 33, {"ExpOptions", {}}},
    {49, "SPLIT", 35, {"SplitOptions", kSplit}},
    {53, "CAST", 37, {"CastOptions", kCast}},
    {55, "MAXIMUM", 39, {"MaximumMinimumOptions", {}}},
    {56, "ARG_MAX", 40, {"ArgMaxOptions", kArgMinMax}},
    {57, "MINIMUM", 39, {"MaximumMinimumOptions", {}}},
    {58, "LESS", 41, {"LessOptions", {}}},
    {59, "NEG", 42, {"NegOptions", {}}},
    {60, "PADV2", 43, {"PadV2Options", {}}},
    {61, "GREATER", 44, {"GreaterOptions", {}}},
    {62, "GREATER_EQUAL", 45, {"GreaterEqualOptions", {}}},
    {63, "LESS_EQUAL", 46, {"LessEqualOptions", {}}},
    {64, "SELECT", 47, {"SelectOptions", {}}},
    {65, "SLICE", 48, {"SliceOptions", {}}},
    {66, "SIN", 0, kNone},
    {69, "TILE", 51, {"TileOptions", {}}},
    {70, "EXPAND_DIMS", 52, {"ExpandDimsOptions", {}}},
    {71, "EQUAL", 53, {"EqualOptions", {}}},
    {72, "NOT_EQUAL", 54, {"NotEqualOptions", {}}},
    {74, "SUM", 27, {"ReducerOptions", kReducer}},
    {75, "SQRT", 0, kNone},
    {76, "RSQRT", 0, kNone},
    {77, "SHAPE", 55, {"ShapeOptions", kShape}},
    {78, "POW", 56, {"PowOptions", {}}},
    {79, "ARG_MIN", 57, {"ArgMinOptions", kArgMinMax}},
    {81, "REDUCE_PROD", 27, {"ReducerOptions", kReducer}},
    {82, "REDUCE_MAX", 27, {"ReducerOptions", kReducer}},
    {83, "PACK", 59, {"PackOptions", kPack}},
    {84, "LOGICAL_OR", 60, {"LogicalOrOptions", {}}},
    {85, "ONE_HOT", 61, {"OneHotOptions", kOneHot}},
    {86, "LOGICAL_AND", 62, {"LogicalAndOptions", {}}},
    {87, "LOGICAL_NOT", 63, {"LogicalNotOptions", {}}},
    {88, "UNPACK", 64, {"UnpackOptions", kUnpack}},
    {89, "REDUCE_MIN", 27, {"ReducerOptions", kReducer}},
    {91, "REDUCE_ANY", 27, {"ReducerOptions", kReducer}},
    {92, "SQUARE", 66, {"SquareOptions", {}}},
    {102, "SPLIT_V", 79, {"SplitVOptions", kSplit}},
    {107, "GATHER_ND", 83, {"GatherNdOptions", {}}},
    {108, "COS", 84, {"CosOptions", {}}},
    {109, "WHERE", 85, {"WhereOptions", {}}},
    {114, "QUANTIZE", 89, {"QuantizeOptions", {}}},
    {118, "IF", 92, {"IfOptions", kIf}},
    {119, "WHILE", 93, {"WhileOptions", kWhile}},
    {123, "SELECT_V2", 98, {"SelectV2Options", {}}},
    {126, "BATCH_MATMUL", 101, {"BatchMatMulOptions", kBatchMatMul}},
    {128, "CUMSUM", 102, {"CumsumOptions", kCumsum}},
    {130, "BROADCAST_TO", 104, {"BroadcastToOptions", {}}},
    {140, "REDUCE_ALL", 27, {"ReducerOptions", kReducer}},
    {150, "GELU", 116, {"GeluOptions", kGelu}},
    {151, "DYNAMIC_UPDATE_SLICE", 117, {"DynamicUpdateSliceOptions", {}}},
};
static_assert(std::ranges::is_sorted(kOperators, {}, &OperatorSchema::code));

}  // namespace

const TableSchema& ModelTable() { return kModel; }

std::string TensorTypeName(int8_t type) {
  const auto* row = std::ranges::find(kTypes, type, &TypeRow::type);
  return row != std::end(kTypes) ? std::string(row->name) : fmt::format("TYPE_{}", type);
}

std::optional<DType> DTypeOf(int8_t type) {
  const auto* row = std::ranges::find(kTypes, type, &TypeRow::type);
  return row != std::end(kTypes) ? row->dtype : std::nullopt;
}

std::optional<int8_t> TensorTypeOf(DType type) {
  const auto* row = std::ranges::find(kTypes, std::optional(type), &TypeRow::dtype);
  return row != std::end(kTypes) ? std::optional(row->type) : std::nullopt;
}

std::span<const OperatorSchema> Operators() { return kOperators; }

const OperatorSchema* FindOperator(int32_t code) {
  const auto* row = std::ranges::lower_bound(kOperators, code, {}, &OperatorSchema::code);
  return row != std::end(kOperators) && row->code == code ? row : nullptr;
}

bool IsControlFlow(int32_t code) {
  constexpr std::array<std::string_view, 4> kNames{"CALL", "IF", "RUN_MODEL", "WHILE"};
  const OperatorSchema* row = FindOperator(code);
  return row != nullptr && std::ranges::find(kNames, row->name) != kNames.end();
}

bool HoldsCodes(DType type) { return IsInteger(type) && type != DType::kU32 && type != DType::kU64; }

std::optional<std::string> FaultOf(const QParams& grid) {
  if (!HoldsCodes(grid.dtype))
    return fmt::format("codes of {}; only int4 to int64 and uint4 to uint16 are quantized", Name(grid.dtype));
  if (grid.scale.empty() || grid.scale.size() != grid.zero_point.size())
    return fmt::format("{} scales and {} zero points; there must be equally many, at least one", grid.scale.size(),
                       grid.zero_point.size());
  const auto scale = std::ranges::find_if(grid.scale, [](float s) { return !std::isfinite(s) || s <= 0; });
  if (scale != grid.scale.end())
    return fmt::format("scale {} is {}; it must be finite and larger than 0", scale - grid.scale.begin(), *scale);
  if (grid.dtype == DType::kI64) return std::nullopt;
  const CodeRange codes = CodesOf(grid.dtype);
  const auto zero = std::ranges::find_if(grid.zero_point, [&](int32_t z) { return z < codes.min || z > codes.max; });
  if (zero == grid.zero_point.end()) return std::nullopt;
  return fmt::format("zero point {} is {}, outside {}..{} of {}", zero - grid.zero_point.begin(), *zero, codes.min,
                     codes.max, Name(grid.dtype));
}

bool Fits(const CircleOption& option, const FieldSchema& field) {
  switch (field.kind) {
    case kFloat:
      return std::holds_alternative<double>(option.value);
    case kInt32s:
      return std::holds_alternative<std::vector<int32_t>>(option.value);
    case kString:
      return std::holds_alternative<std::string>(option.value);
    default:
      break;
  }
  const int64_t* value = std::get_if<int64_t>(&option.value);
  if (value == nullptr) return false;
  switch (field.kind) {
    case kBool:
      return *value == 0 || *value == 1;
    case kInt8:
      return *value >= INT8_MIN && *value <= INT8_MAX;
    case kInt32:
      return *value >= INT32_MIN && *value <= INT32_MAX;
    case kUint32:
      return *value >= 0 && *value <= UINT32_MAX;
    default:
      return false;
  }
}

std::string OperatorName(int32_t code) {
  const OperatorSchema* row = FindOperator(code);
  return row != nullptr ? std::string(row->name) : fmt::format("OPERATOR_{}", code);
}

}  // namespace circlet::circle
