#pragma once

// y = x W^T of operands on integer grids, summed in integers: exact, so that neither the order of the sum nor the
// kernel nor the processor can be seen in y, and where oneDNN sums bytes (gemm::MultipliesBytes) four times (x of 8
// bits) or twice (16 bits) as fast as in float32. Few rows of x are multiplied with W as it is stored (row_product.h).
//
//   y[i,j] = scale_x scale_w[j] sum_k (x[i,k] - zero_x) (w[j,k] - zero_w[j]) + bias[j]      (format.md 4)
//
// with codes x and w; the integer times the scales plus the bias is rounded once, from float64.

#include <cstdint>
#include <string>

#include "circlet/base/tensor.h"

namespace circlet {

// Whether a product of values on these grids (null: on none), `k` terms a sum, is summed in integers: x on one grid of
// at most 8 bits or of int16; W of at most 8 bits, on one grid or one for each row.
bool SummedInIntegers(const QParams* x, const QParams* w, int64_t k);

// The same for two computed operands: both on one grid of at most 8 bits.
bool BytesSummedInIntegers(const QParams* a, const QParams* b, int64_t k);
// The zero point of a grid of at most 8 bits whose codes count from 0 up, as products of bytes want their left operand;
// the right one is less by 128.
int32_t UnsignedZeroPoint(const QParams& grid);

// y = a b of matrices [m,k] and [k,n] (`transposed`: [n,k]) on those grids, row by row without gaps.
void IntegerMatMul(const float* a, const QParams& a_grid, const float* b, const QParams& b_grid, bool transposed,
                   int64_t m, int64_t n, int64_t k, float* y);

// x: float32 [..,k] whose values lie on x.Grid(). w: codes [n,k] of w.Grid(), a few MiB of which are unpacked at a time
// where they are no signed bytes. bias [n] or null. A NaN in a row of x makes its row of y NaN.
void IntegerLinear(const Tensor& x, const Tensor& w, const float* bias, const Tensor& y);

// What results depend on beside their inputs, for manifests: simd::InstructionSet(), and oneDNN's where that is lower.
// Products that are summed in integers depend on neither.
std::string InstructionSets();
// Whether circlet's own kernels round alike with both: those with fused multiply-adds do, AVX2 and AVX3. What then
// differs are float32 products in oneDNN, of weights of 16 bits.
bool SameOwnSums(const std::string& a, const std::string& b);

}  // namespace circlet
