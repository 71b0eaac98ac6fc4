#pragma once

// Random parameters with the statistics of a model's: what make-checkpoint fills its files with.

#include <cstdint>
#include <string_view>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet {

// One random bfloat16 tensor, row by row. The value of an element depends on seed, tensor name, row and column only, so
// rows may be made in any order by any number of threads.
//
// Distributions by name, `in` = product of all sizes but the first:
//   linears          N(0, 1/in); a few output rows x8 (x2.5 where the row goes straight into the residual stream:
//                    down_proj, per_layer_projection; none in gates), one input column x2
//   embeddings       N(0, 1/in), two columns x4: activations have outlier channels
//   norms            1 +- 0.25; the final norm 2.5 times that; q_norm, k_norm 1.1 * dim^(-1/4) times that, so that
//                    attention logits have a spread of about 1
//   layer_scalar     0.55 .. 1.25
//   clip bounds      2 .. 4 in magnitude
class RandomTensor {
 public:
  RandomTensor(std::string_view name, const Shape& shape, uint64_t seed);

  int64_t Rows() const { return rows_; }
  int64_t Columns() const { return columns_; }
  // Writes Columns() bfloat16 values.
  void FillRow(int64_t row, uint16_t* out) const;

 private:
  void Choose(std::string_view name);
  float RowFactor(int64_t row) const;

  uint64_t key_;
  int64_t rows_ = 1, columns_ = 1;
  bool normal_ = true;  // N(center, spread^2), else uniform in center +- spread
  float center_ = 0.0f;
  float spread_ = 1.0f;
  std::vector<int64_t> outlier_rows_, outlier_columns_;
  float row_factor_ = 1.0f, column_factor_ = 1.0f;
};

}  // namespace circlet
