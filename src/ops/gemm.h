#pragma once

// The matrix products of circlet (architecture.md, rule 6): float32, bf16 operands whose products are summed in float32,
// or bytes that are summed in int32.
//
// Linear is for weights: oneDNN where its order of summation depends on the shape alone (its AVX-512 kernels, and
// single rows), else Multiply; the same bits for every thread count. Panels and Multiply are for attention and
// BATCH_MATMUL. Each element is one chain of fused multiply-adds in the order of k, so that its bits do not depend on
// the sizes, on where rows, columns or k are cut, or on how many threads share the work, and terms that are 0 may be
// left out. That is what makes the fused attention, which skips masked keys, equal its expansion bit for bit.

#include <cstdint>

namespace circlet::gemm {

// y[m,n] = x[m,k] w[n,k]^T (+ bias[n], when not null). Uses Threads() threads.
void Linear(const float* x, const float* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y);

// The same by Multiply: what Linear does where oneDNN's kernel will not do.
void LinearByPanels(const float* x, const float* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y);

// The same of bf16 operands: x is rounded to bf16, w is stored so, at any address. Needs Bf16Supported(). Each rounded
// operand is off by at most 2^-9 of itself, so y differs from the float32 product by at most 2^-8 (1 + 2^-10) sum_k |x
// w| and the sum's own rounding.
void LinearBf16(const float* x, const void* w, const float* bias, int64_t m, int64_t n, int64_t k, float* y);

// Columns of a panel: two vectors of the processor.
int64_t PanelColumns();

// The right operand b [k,n], stored as panels of PanelColumns() columns: panel p holds, row by row, the columns from
// p * PanelColumns() on, padded with zeros.
struct Panels {
  float* data;  // PackedFloats(k, n) of them
  int64_t k, n;
};
int64_t PackedFloats(int64_t k, int64_t n);
// Fills the panels [first, last) from b [k,n] of row stride `stride`, or from its transpose [n,k] when `transposed`.
void Pack(const float* b, int64_t stride, bool transposed, const Panels& panels, int64_t first, int64_t last);
int64_t PanelCount(int64_t n);

// c[i,j] = sum over k_begin <= k < k_end of a[i,k] b[k,j], for i < m and the columns of the panels [first, last).
// a and c point at their element (0, 0); their strides are row strides.
struct Part {
  int64_t first, last;  // panels
  int64_t k_begin, k_end;
};
void Multiply(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
              int64_t c_stride);

// c[i,j] += sum over k of a[i,k] b[k,j], i < m, first <= j < last, for few rows: the bits of Multiply, without packing
// b; c holds the sums over what comes before along k, zeros where nothing does. b [k,n], or [n,k] when `transposed`.
// Terms of the former whose a is 0 in all rows are left out.
void MultiplyFewRows(const float* a, int64_t a_stride, int64_t m, const float* b, int64_t k, int64_t n, bool transposed,
                     int64_t first, int64_t last, float* c, int64_t c_stride);

// The same in bf16 (needs Bf16Supported()). Two neighbours along k, rounded to bf16, stand where one float32 stands
// otherwise, a 0 behind an odd k: sizes, strides and parts of a, b and its panels count pairs, and Pack moves them.
inline int64_t Pairs(int64_t k) { return (k + 1) / 2; }
void MultiplyPairs(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
                   int64_t c_stride);
// x [rows,k] -> [rows,Pairs(k)] of row stride `stride`.
void PairAlongRows(const float* x, int64_t x_stride, int64_t rows, int64_t k, float* pairs, int64_t stride);
// The pairs [first, last) of rows of x [k,n]: pairs [Pairs(k),n].
void PairRows(const float* x, int64_t k, int64_t n, int64_t first, int64_t last, float* pairs);

// The same in bytes: four neighbours along k, unsigned ones in a and signed ones in b, stand
// where one float32 stands otherwise, zeros behind the last; c holds int32 sums, exact in any order.
inline int64_t Quads(int64_t k) { return (k + 3) / 4; }
void MultiplyQuads(const float* a, int64_t a_stride, int64_t m, const Panels& b, const Part& part, float* c,
                   int64_t c_stride);
// The quads [first, last) of rows of x [k,n]: quads [Quads(k),n].
void QuadRows(const int8_t* x, int64_t k, int64_t n, int64_t first, int64_t last, float* quads);

// Whether oneDNN multiplies bytes and sums them exactly, which is fast: with AVX-512 VNNI, which processors with AMX have
// too (older instructions saturate). Elsewhere other instructions give the same sums.
bool MultipliesBytes();

}  // namespace circlet::gemm
