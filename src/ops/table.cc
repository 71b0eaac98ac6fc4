#include "ops/table.h"

#include <algorithm>
#include <cstring>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/codes.h"

namespace circlet {

void RequireRow(int64_t id, int64_t position, int64_t rows) {
  if (id < 0 || id >= rows)
    Fail("id {} at position {} is outside the table of {} rows; ids must lie in [0, {}]: check the tokenizer", id,
         position, rows, rows - 1);
}

Tensor RowsOf(const Tensor& table, std::span<const int64_t> ids) {
  const int64_t count = table.GetShape()[0], width = table.GetShape()[1];
  const Tensor rows = Tensor::Uninitialized({table.GetDType(), {static_cast<int64_t>(ids.size()), width}});
  const int64_t bytes = TensorType{table.GetDType(), {width}}.Bytes();
  for (size_t i = 0; i < ids.size(); ++i) {
    RequireRow(ids[i], static_cast<int64_t>(i), count);
    std::memcpy(rows.Raw() + static_cast<int64_t>(i) * bytes, table.Raw() + ids[i] * bytes, static_cast<size_t>(bytes));
  }
  return rows;
}

Tensor DequantizedRows(const Tensor& codes, std::span<const int64_t> ids) {
  const int64_t count = codes.GetShape()[0], width = codes.GetShape()[1];
  const auto size = static_cast<int64_t>(ids.size());
  const Tensor rows = Tensor::Uninitialized({DType::kF32, {size, width}});
  ParallelFor(size, std::max<int64_t>(1, (1 << 16) / width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      RequireRow(ids[i], i, count);
      Dequantize(codes, *codes.Grid(), ids[i] * width, rows.F32().subspan(i * width, width));
    }
  });
  return rows;
}

}  // namespace circlet
