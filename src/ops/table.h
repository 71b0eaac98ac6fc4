#pragma once

// Rows of a table [rows, width], by id.

#include <cstdint>
#include <span>

#include "circlet/base/tensor.h"

namespace circlet {

// Throws Error naming `id`, its place among the ids and the table's size when the table has no such row.
void RequireRow(int64_t id, int64_t position, int64_t rows);

// Rows in the order of `ids`, as stored; elements are whole bytes. Throws what RequireRow throws.
Tensor RowsOf(const Tensor& table, std::span<const int64_t> ids);

// Rows of codes with their grid, as float32. Throws what RequireRow throws.
Tensor DequantizedRows(const Tensor& codes, std::span<const int64_t> ids);

}  // namespace circlet
