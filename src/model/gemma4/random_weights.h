#pragma once

// Random parameters with the statistics of a model's: what make-checkpoint fills its files with.

#include <cstdint>
#include <vector>

#include "circlet/model/gemma4/weights.h"

namespace circlet {

// One random bfloat16 tensor, row by row. The value of an element depends on seed, tensor name, row and column only, so
// rows may be made in any order by any number of threads.
//
// Distributions by the parameter's kind and flow, `in` = product of all sizes but the first:
//   linears          N(0, 1/in); a few output rows x8 (x2.5 where they go straight into the residual stream; none into
//                    a gate), one input column x2; convolutions likewise
//   embeddings       N(0, 1/in), two columns x4: activations have outlier channels
//   position tables  N(0, 1/16), smaller than the patch's own embedding
//   norms, scales    1 +- 0.25; the norm ahead of the head 2.5 times that; those of queries and keys 1.1 * dim^(-1/4)
//                    times that, so that attention logits have a spread of about 1
//   biases           +- 0.25
//   layer_scalar     0.55 .. 1.25
//   clip bounds      2 .. 4 in magnitude
class RandomTensor {
 public:
  RandomTensor(const Parameter& parameter, uint64_t seed);

  int64_t Rows() const { return rows_; }
  int64_t Columns() const { return columns_; }
  // Writes Columns() bfloat16 values.
  void FillRow(int64_t row, uint16_t* out) const;

 private:
  void Choose(WeightKind kind, Flow flow);
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
