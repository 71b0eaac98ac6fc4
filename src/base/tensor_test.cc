#include "circlet/base/tensor.h"

#include <gtest/gtest.h>

#include <numeric>

#include "circlet/base/error.h"

namespace circlet {
namespace {

// 0, 1, 2, ...
Tensor Counting(Shape shape) {
  std::vector<float> values(shape.Elements());
  std::iota(values.begin(), values.end(), 0.0f);
  return Tensor::Of<float>(shape, values);
}

std::vector<float> Values(const Tensor& tensor) { return {tensor.F32().begin(), tensor.F32().end()}; }

TEST(TensorTest, ASliceBehindAxesOfSizeOneSharesTheBytes) {
  const Tensor tensor = Counting({1, 4, 2});
  const Tensor slice = tensor.Slice(1, 3, 1);
  EXPECT_EQ(slice.GetShape(), Shape({1, 2, 2}));
  EXPECT_EQ(Values(slice), (std::vector<float>{2, 3, 4, 5}));
  EXPECT_EQ(slice.Raw(), tensor.Raw() + 2 * sizeof(float));
}

TEST(TensorTest, ASliceOutlivesWhatItIsCutFrom) {
  Tensor slice = Counting({4, 2}).Slice(3, 4, 0);
  EXPECT_EQ(Values(slice), (std::vector<float>{6, 7}));
}

TEST(TensorTest, ASliceOfAnInnerAxisIsACopy) {
  const Tensor slice = Counting({2, 3, 2}).Slice(1, 3, 1);
  EXPECT_EQ(slice.GetShape(), Shape({2, 2, 2}));
  EXPECT_EQ(Values(slice), (std::vector<float>{2, 3, 4, 5, 8, 9, 10, 11}));
}

TEST(TensorTest, ASliceOfPackedElementsCutsNoByte) {
  const Tensor tensor({DType::kU4, {4, 3}});
  EXPECT_EQ(tensor.Slice(2, 3, 0).Raw(), tensor.Raw() + 3);
  EXPECT_THROW(tensor.Slice(1, 3, 0), Bug);  // begins at element 3, in the middle of byte 1
  EXPECT_THROW(tensor.Slice(0, 1, 1), Bug);
}

TEST(TensorTest, ASliceOutsideTheAxisIsABug) {
  EXPECT_THROW(Counting({4}).Slice(2, 5, 0), Bug);
  EXPECT_THROW(Counting({4}).Slice(3, 2, 0), Bug);
}

}  // namespace
}  // namespace circlet
