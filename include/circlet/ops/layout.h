#pragma once

// Operators that move values and compute nothing; any element type.

#include <optional>

#include "circlet/base/qparams.h"
#include "circlet/ops/op.h"

namespace circlet {

struct Reshape {
  static constexpr std::string_view kName = "reshape";
  static constexpr int32_t kCircleCode = 22;
  static constexpr bool kView = true;
  static constexpr bool kKeepsValues = true;
  Shape shape;  // as many elements as the input

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Reshape> Parse(const CircleNode& node);  // one -1 is resolved
  bool operator==(const Reshape&) const = default;
};

// Output axis i is input axis perm[i].
struct Transpose {
  static constexpr std::string_view kName = "transpose";
  static constexpr int32_t kCircleCode = 39;
  static constexpr bool kKeepsValues = true;
  std::vector<int32_t> perm;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Transpose> Parse(const CircleNode& node);
  bool operator==(const Transpose&) const = default;
};

// begin[i] <= index < end[i] on every axis (STRIDED_SLICE with strides 1, no masks).
struct Slice {
  static constexpr std::string_view kName = "slice";
  static constexpr int32_t kCircleCode = 45;
  static constexpr bool kKeepsValues = true;
  std::vector<int32_t> begin, end;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Slice> Parse(const CircleNode& node);  // negative bounds and begin/end masks are resolved
  bool operator==(const Slice&) const = default;
};

// Equal parts along an axis.
struct Split {
  static constexpr std::string_view kName = "split";
  static constexpr int32_t kCircleCode = 49;
  static constexpr bool kKeepsValues = true;
  static constexpr int kGridInput = 1;  // SPLIT takes its axis first
  int32_t axis = -1;
  int32_t parts = 2;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Split> Parse(const CircleNode& node);
  bool operator==(const Split&) const = default;
};

// Parts of stated sizes along an axis.
struct SplitV {
  static constexpr std::string_view kName = "split_v";
  static constexpr int32_t kCircleCode = 102;
  static constexpr bool kKeepsValues = true;
  int32_t axis = -1;
  std::vector<int32_t> sizes;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<SplitV> Parse(const CircleNode& node);  // one -1 is resolved
  bool operator==(const SplitV&) const = default;
};

struct Concat {
  static constexpr std::string_view kName = "concat";
  static constexpr int32_t kCircleCode = 2;
  static constexpr bool kKeepsValues = true;
  int32_t axis = -1;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Concat> Parse(const CircleNode& node);
  bool operator==(const Concat&) const = default;
};

struct BroadcastTo {
  static constexpr std::string_view kName = "broadcast_to";
  static constexpr int32_t kCircleCode = 130;
  static constexpr bool kKeepsValues = true;
  Shape shape;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<BroadcastTo> Parse(const CircleNode& node);
  bool operator==(const BroadcastTo&) const = default;
};

// Rows of a table: y[.., :] = table[ids[..], :]. Inputs: table [V,D], ids int32 or int64 [..]; output [.., D].
// An id outside [0, V) is an Error that names it. (GATHER, axis 0.)
// Eval also takes a float table as codes of its Grid(); then only the rows asked for become float32.
struct Gather {
  static constexpr std::string_view kName = "gather";
  static constexpr int32_t kCircleCode = 36;
  static constexpr bool kKeepsValues = true;
  static constexpr int kTableInput = 0;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<Gather> Parse(const CircleNode& node);
  bool operator==(const Gather&) const = default;
};

}  // namespace circlet
