#pragma once

// Integer codes in the storage form of a file: 4-bit ones packed over the whole tensor, the even element in the low
// half.

#include <cstdint>
#include <span>

#include "circlet/base/qparams.h"
#include "circlet/base/tensor.h"

namespace circlet {

// Element `index` (flat); Error for types that hold no codes.
int64_t CodeAt(const Tensor& codes, int64_t index);

// `count` codes into the storage of a whole tensor; `first` is the flat index of the first one. 4-bit codes that begin in
// the middle of a byte need zeros there; such a byte's other half is left as it is, that behind the last code is zeroed.
void StoreCodes(const int16_t* codes, int64_t count, int64_t first, DType dtype, std::byte* storage);

// Elements first .. first + values.size() - 1 (flat) as (code - zero_point) * scale. Throws what CodeAt throws.
void Dequantize(const Tensor& codes, const QParams& grid, int64_t first, std::span<float> values);

// Rows [begin, end) of codes with their grid, which keeps the rows' scales where it has one a row.
Tensor RowsOfCodes(const Tensor& codes, int64_t begin, int64_t end);

// The same elements as signed bytes; uint8 codes less 128. Codes of at most 8 bits (CHECKed).
void SignedCodes(const Tensor& codes, int64_t first, std::span<int8_t> out);

}  // namespace circlet
