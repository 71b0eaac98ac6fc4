#pragma once

#include "circlet/ops/op.h"

namespace circlet {

// y = x W^T (+ b). Inputs: x [.., K], W [N,K], optional b [N]; output [.., N] (keep_num_dims).
// Eval also takes W in bf16 (Compute::kBf16): x is rounded to bf16 then, and sums stay float32. And it takes W as codes
// of W.Grid(): where x lies on a grid as well, sums are exact, in integers (architecture.md, rule 6); else at most
// 64 MiB of W are float32 at a time.
struct FullyConnected {
  static constexpr std::string_view kName = "fully_connected";
  static constexpr int32_t kCircleCode = 9;
  static constexpr int kWeightInput = 1;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  std::vector<MatrixProduct> Products(Types in) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<FullyConnected> Parse(const CircleNode& node);
  bool operator==(const FullyConnected&) const = default;
};

// y = a b, over equal or broadcast leading axes; transpose_b: y = a b^T with b [.., N, K].
// Every element of y is a sum over k in a fixed order that does not depend on M, N or the thread count: the same
// products inside the fused attention give the same bits (architecture.md, rule 6).
struct BatchMatMul {
  static constexpr std::string_view kName = "batch_matmul";
  static constexpr int32_t kCircleCode = 126;
  bool transpose_b = false;

  std::vector<TensorType> Infer(Types in) const;
  void Eval(const EvalContext& context) const;
  std::vector<MatrixProduct> Products(Types in) const;
  CircleOp Emit(Types in, Types out) const;
  static Parsed<BatchMatMul> Parse(const CircleNode& node);
  bool operator==(const BatchMatMul&) const = default;
};

}  // namespace circlet
