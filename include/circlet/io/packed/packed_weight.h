#pragma once

#include <optional>

#include "circlet/base/tensor.h"

namespace circlet {

// Of codes of 2, 4 or 8 bits: the type that holds them in memory and in Circle files, and the code of 0. Circle has no
// 2-bit type; unsigned 4-bit codes are what its runtimes read.
DType StorageOf(int bits);
int32_t ZeroPointOf(int bits);

// Bytes that a packed row of `width` codes takes.
int64_t PackedRowBytes(int bits, int64_t width);

// Rows of `width` codes as Google packs them ([rows, PackedRowBytes]: low bits first, offset binary, a row padded to
// whole bytes; 8 bits: int8) in storage form, [rows, width]. Where the bytes need not change the result shares them: of
// 8 bits, and of 4 bits where no row ends within a byte. Throws nothing: the type and shape are the caller's to check.
Tensor UnpackedRows(const Tensor& stored, int bits, int64_t width);

// A weight in blocks of consecutive inputs, each with a scale of its own.
struct BlockWeight {
  Tensor codes;   // uint4 [out, in]; 8 is 0
  Tensor scales;  // float32 [out, in / block]; may be negative (GGML's Q4_0)
  int64_t block = 0;

  Tensor Values() const;  // (code - 8) * scale, float32 [out, in]
};

// The blocks of 32 of a bfloat16 weight [out, in] whose values are bf16(d * q), q an integer of -8 .. 7 and d a
// float16: what a model trained for GGML's Q4_0 holds. Nothing unless each block is found and gives back every value
// exactly; a weight that is none costs little, for its first block tells.
//
// Of a block the smallest m of 1 .. 8 counts for which k_i = round(|w_i| m / max|w|) has a step s with |w_i| within
// half a spacing of bfloat16 of k_i s, and which needs not both 8 and -8; d is s or, when a positive value has k = 8,
// -s.
std::optional<BlockWeight> RecoverQ40(const Tensor& weight);

}  // namespace circlet
