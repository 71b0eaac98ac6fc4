#include "ops/table.h"

#include <cstring>

#include "circlet/base/error.h"

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

}  // namespace circlet
