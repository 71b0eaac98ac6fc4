#pragma once

// The contract of an operator. One operator = one struct in one header under ops/, with
//   static constexpr std::string_view kName           the name in dumps and errors
//   std::vector<TensorType> Infer(Types in) const     the shape rule; throws Error naming the shapes and the rule
//   void Eval(const EvalContext&) const               the float kernel
//   bool operator==(const T&) const = default
// and, when Circle has the operator,
//   static constexpr int32_t kCircleCode              builtin operator code (format.md 3.2)
//   CircleOp Emit(Types in, Types out) const          how it is written
//   static Parsed<T> Parse(const CircleNode&)         how it is read; throws Error for options that Eval cannot honour
// or, when it is a fused kernel,
//   std::vector<ValueId> Expand(GraphSink&, std::span<const ValueId> in, std::span<const Point> points) const
//                                                     the primitive graph with the same points
// Optional traits:
//   kView            the output shares input 0's bytes
//   kInPlace         the output may overwrite input 0
//   kKeepsValues     moves values without arithmetic: an output keeps its input's grid
//   kGridInput       which input of its Circle form that is, where it is not the first
//   kClamps          holds input 0 against a bound, input 1
//   kIsPoint         computes nothing: its point is what it is there for
//   kOutputPoints    which of the node's points act on the output, nothing but moves behind them; the last first
//   kWeightInput     a linear's weight: taken as bf16 too, and as codes that are multiplied with those of the input ahead
//   kTableInput      rows of it are looked up: taken as codes too
//   kCodeInputs      computed values that are taken as codes of their grid too
//   std::vector<MatrixProduct> Products(Types in) const   what it multiplies, for estimates

#include <cstdint>
#include <functional>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/base/tensor.h"

namespace circlet {

using ValueId = int32_t;
using Types = std::span<const TensorType>;

// y[m,n] = a[m,k] b, `count` times; b as [n,k] where it is transposed, else as [k,n].
struct MatrixProduct {
  int64_t m, n, k;
  bool transposed = true;
  int64_t count = 1;
  double Flops() const {
    return 2.0 * static_cast<double>(m) * static_cast<double>(n) * static_cast<double>(k) * static_cast<double>(count);
  }
  bool operator==(const MatrixProduct&) const = default;
};

// Which default of a recipe a point follows (quantization.md 4.2).
enum class PointRole : uint8_t { kActivation, kWeight };

// Where a point acts. The reference simulates points that it does not export; our export has some it does not simulate.
enum class PointUse : uint8_t {
  kNormal,
  kBoundary,        // a graph input on its producer's grid: rounded and exported, but observed only by the producer
  kSimulationOnly,  // observed and rounded, absent from the file
  kExportOnly,      // observed and exported, not rounded
};

// What a parameter is. It is said where the parameter is born, and is what recipes, random values and rounding methods
// go by.
enum class WeightKind : uint8_t {
  kNone,             // no parameter
  kLinear,           // [out,in] of a product
  kPatchProjection,  // the same, of a picture's patches
  kHead,             // the same, to the vocabulary
  kConvolution,
  kEmbedding,      // a table, looked up by row
  kPositionTable,  // positions along both axes of a picture
  kNorm,           // the gain of a norm
  kScale,          // other factors of channels
  kBias,
  kLayerScalar,  // the factor of a layer's output
  kLowerBound,   // of a clamp
  kUpperBound,
};
// The operand of a product: a row for each output.
constexpr bool IsLinear(WeightKind kind) {
  return kind == WeightKind::kLinear || kind == WeightKind::kPatchProjection || kind == WeightKind::kHead;
}
// The axis along which a parameter of the kind may have a grid for each index; -1: it has one.
constexpr int ChannelAxis(WeightKind kind) { return IsLinear(kind) || kind == WeightKind::kEmbedding ? 0 : -1; }

struct Point {
  std::string name;  // full: "model.language_model.layers.3.self_attn.q_rot"
  PointRole role = PointRole::kActivation;
  PointUse use = PointUse::kNormal;
  // The grid reaches this far below the smallest observed value. Masked keys, -120 lower, saturate there instead of
  // stretching the grid of the kept ones (docs/dialects.md).
  float headroom_below = 0;
  // Of the parameter, or of the one whose block the point belongs to: a linear's act_in and act_out are kLinear.
  WeightKind kind = WeightKind::kNone;
  bool operator==(const Point&) const = default;
};

// What one reading does with the values at one quantization point. Kernels hand over whole rows of the last axis, as
// soon as they have them; disjoint pieces may come from several threads at once. `first` is the flat index of the first.
class PointVisitor {
 public:
  virtual ~PointVisitor() = default;
  virtual void Visit(std::span<float> values, int64_t first) = 0;
};

// What matrix products multiply; their sums and everything between them are float32.
enum class Compute : uint8_t { kFloat32, kBf16 };
// Whether the processor multiplies bf16: it has AVX-512 BF16, as processors with AMX do.
bool Bf16Supported();

struct EvalContext {
  std::span<const Tensor> in;
  std::span<const Tensor> out;                  // allocated, typed by Infer
  std::span<PointVisitor* const> points;        // of a fused kernel, in the order of its node; null: pass
  std::span<const QParams* const> grids;        // that visitors put values on, in the order of `points`; null: none
  bool points_write = false;                    // whether visitors change values (fake-quantize) or only look
  Compute compute = Compute::kFloat32;          // of products of computed values; a linear goes by its weight's type
};

// ---- Circle form of an operator -----------------------------------------------------------------------------------

struct CircleOption {
  std::string name;  // field name of the schema, snake_case
  std::variant<int64_t, double, std::vector<int32_t>, std::string> value;
  bool operator==(const CircleOption&) const = default;
};

struct CircleArg {
  enum class Kind : uint8_t { kInput, kInts, kInt, kAbsent } kind;
  int input = 0;               // kInput: index among the node's inputs
  std::vector<int32_t> ints;   // kInts: constant int32 vector; kInt: constant int32 scalar (one element)

  static CircleArg In(int index) { return {Kind::kInput, index, {}}; }
  static CircleArg Ints(std::vector<int32_t> values) { return {Kind::kInts, 0, std::move(values)}; }
  static CircleArg Int(int32_t value) { return {Kind::kInt, 0, {value}}; }
  static CircleArg None() { return {Kind::kAbsent, 0, {}}; }
};

struct CircleOp {
  int32_t code;
  std::vector<CircleOption> options;
  std::vector<CircleArg> inputs;
};

// One operator as read from a file.
struct CircleNode {
  int32_t code = 0;
  std::vector<CircleOption> options;
  std::vector<std::optional<TensorType>> types;  // by input; none = absent
  std::vector<Tensor> constants;                 // by input; empty = computed or absent
  std::vector<TensorType> outputs;

  int64_t Int(std::string_view option, int64_t otherwise) const;
  double Real(std::string_view option, double otherwise) const;
  // A constant int32 or int64 input (vector or scalar); throws Error naming the input when it is absent or computed.
  std::vector<int64_t> Constant(int input) const;
  bool Has(int input) const { return input < static_cast<int>(types.size()) && types[input].has_value(); }
};

template <typename T>
struct Parsed {
  T op;
  std::vector<int> inputs;  // which of the node's inputs the operator takes, in order
};

// ---- Expansion of a fused kernel ----------------------------------------------------------------------------------

struct Op;

class GraphSink {
 public:
  virtual ~GraphSink() = default;
  virtual std::vector<ValueId> Add(Op op, std::vector<ValueId> in) = 0;
  virtual ValueId AddPoint(const Point& point, ValueId value) = 0;
  virtual ValueId AddConstant(Tensor tensor) = 0;
  virtual const TensorType& TypeOf(ValueId value) const = 0;
};

// Shared by shape rules: "op: what; rule".
[[noreturn]] void ShapeError(std::string_view op, Types in, std::string_view rule);
void ExpectInputs(std::string_view op, Types in, size_t count);
// NumPy broadcasting of two shapes; throws Error for `op`.
Shape Broadcast(std::string_view op, const Shape& a, const Shape& b);

}  // namespace circlet
