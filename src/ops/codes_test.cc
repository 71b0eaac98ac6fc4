// Operands that stay codes: the same bits as from the float32 tensor, whatever part of it is asked for.

#include "ops/codes.h"

#include <gmock/gmock.h>

#include <cmath>

#include "circlet/ops/layout.h"
#include "circlet/ops/matmul.h"
#include "error_text.h"
#include "ops/gemm.h"
#include "ops/test_values.h"

namespace circlet {
namespace {

// Every code of the type occurs.
Tensor CodesOfType(DType dtype, Shape shape) {
  Tensor codes({dtype, std::move(shape)});
  for (int64_t i = 0; i < codes.Bytes(); ++i) codes.Raw()[i] = static_cast<std::byte>((i * 37 + 11) ^ (i >> 8));
  return codes;
}

// Another scale and zero point for each index of the axis.
QParams GridFor(const Tensor& codes, int axis) {
  QParams grid{.dtype = codes.GetDType(), .axis = axis};
  const int64_t count = axis < 0 ? 1 : codes.GetShape()[axis];
  for (int64_t c = 0; c < count; ++c) {
    grid.scale.push_back(0.01f + 0.003f * static_cast<float>(c));
    grid.zero_point.push_back(static_cast<int32_t>(c % 5));
  }
  return grid;
}

Tensor Dequantized(const Tensor& codes, const QParams& grid) {
  Tensor values({DType::kF32, codes.GetShape()});
  Dequantize(codes, grid, 0, values.F32());
  return values;
}

TEST(CodesTest, FourBitCodesLieEvenElementFirst) {
  Tensor codes({DType::kI4, {3}});
  codes.Raw()[0] = std::byte{0x78}, codes.Raw()[1] = std::byte{0x0f};
  EXPECT_EQ(CodeAt(codes, 0), -8);
  EXPECT_EQ(CodeAt(codes, 1), 7);
  EXPECT_EQ(CodeAt(codes, 2), -1);
}

// Odd sizes, so that rows of 4-bit codes begin inside a byte; more elements than one piece of a thread.
TEST(CodesTest, AnyPartDequantizesToTheValuesOfItsCodes) {
  for (const DType dtype : {DType::kI4, DType::kU4, DType::kI8, DType::kU8, DType::kI16, DType::kI32, DType::kI64}) {
    const Tensor codes = CodesOfType(dtype, {7, 33, 155});
    for (const int axis : {-1, 0, 1, 2}) {
      const QParams grid = GridFor(codes, axis);
      const int64_t inner = axis == 0 ? 33 * 155 : axis == 1 ? 155 : 1;
      const auto channels = static_cast<int64_t>(grid.scale.size());
      for (const auto& [first, count] : {std::pair<int64_t, int64_t>{0, codes.Elements()}, {1, 2}, {34567, 1000}}) {
        std::vector<float> values(static_cast<size_t>(count));
        Dequantize(codes, grid, first, values);
        for (int64_t i = 0; i < count; ++i) {
          const auto c = static_cast<size_t>(axis < 0 ? 0 : (first + i) / inner % channels);
          const float expected =
              (static_cast<float>(CodeAt(codes, first + i)) - static_cast<float>(grid.zero_point[c])) * grid.scale[c];
          ASSERT_EQ(values[static_cast<size_t>(i)], expected) << Name(dtype) << ", axis " << axis << ", " << first + i;
        }
      }
    }
  }
}

TEST(CodesTest, TypesWithoutCodesAreNamed) {
  EXPECT_THAT(ErrorText([] { CodeAt(Tensor::Scalar(1), 0); }), testing::HasSubstr("constants of type float32"));
}

TEST(CodesTest, GatheredRowsOfCodesAreTheRowsOfTheTable) {
  const std::vector<int64_t> ids{48, 0, 7, 7, 31};
  const Tensor id = Tensor::Of<int64_t>({1, 5}, ids);
  for (const DType dtype : {DType::kI4, DType::kU4, DType::kU8, DType::kI16}) {
    const Tensor table = CodesOfType(dtype, {49, 37});
    for (const int axis : {-1, 0}) {
      const QParams grid = GridFor(table, axis);
      const Tensor in_codes[] = {table.WithGrid(&grid), id}, in_float[] = {Dequantized(table, grid), id};
      const Tensor found[] = {Tensor({DType::kF32, {1, 5, 37}})}, expected[] = {Tensor({DType::kF32, {1, 5, 37}})};
      Gather{}.Eval({.in = in_codes, .out = found});
      Gather{}.Eval({.in = in_float, .out = expected});
      EXPECT_TRUE(SameBits(found[0].F32(), expected[0].F32())) << Name(dtype) << ", axis " << axis;
    }
  }
}

// The last weight is more than 64 MiB as float32 and is taken in two slices.
TEST(CodesTest, ProductsWithCodesAreThoseWithTheWeight) {
  for (const auto& [dtype, n, k] : {std::tuple{DType::kI4, 33, 15}, {DType::kI16, 64, 48}, {DType::kU8, 17001, 999}}) {
    const Tensor w = CodesOfType(dtype, {n, k});
    const QParams grid = GridFor(w, 0);
    const Tensor whole = Dequantized(w, grid), bias = NormalTensor({n}, 2);
    for (const int64_t m : {1, 3}) {
      const Tensor x = NormalTensor({1, m, k}, 1);
      const Tensor in_codes[] = {x, w.WithGrid(&grid), bias}, in_float[] = {x, whole, bias};
      const TensorType type{DType::kF32, {1, m, n}};
      const Tensor found[] = {Tensor(type)}, expected[] = {Tensor(type)};
      FullyConnected{}.Eval({.in = in_codes, .out = found});
      FullyConnected{}.Eval({.in = in_float, .out = expected});
      EXPECT_TRUE(SameBits(found[0].F32(), expected[0].F32())) << Name(dtype) << ", " << m << " rows";
    }
  }
}

// What slices of a head rest on, in the simulation and in a file: a column of a product depends on no other column.
TEST(CodesTest, AColumnOfAProductDoesNotDependOnTheOthers) {
  constexpr int64_t k = 1536, n = 8200;
  const std::vector<float> x = Normal(64 * k, 1), w = Normal(n * k, 2);
  for (const int64_t m : {1, 3, 64}) {
    std::vector<float> whole(static_cast<size_t>(m * n));
    gemm::Linear(x.data(), w.data(), nullptr, m, n, k, whole.data());
    for (const auto& [first, count] :
         {std::pair<int64_t, int64_t>{0, 4096}, {5, 8192}, {4001, 1000}, {100, 16}, {8193, 7}, {77, 1}}) {
      std::vector<float> slice(static_cast<size_t>(m * count)), expected;
      gemm::Linear(x.data(), w.data() + first * k, nullptr, m, count, k, slice.data());
      for (int64_t row = 0; row < m; ++row)
        expected.insert(expected.end(), whole.begin() + row * n + first, whole.begin() + row * n + first + count);
      EXPECT_TRUE(SameBits(slice, expected)) << m << " rows, columns " << first << " to " << first + count;
    }
  }
}

}  // namespace
}  // namespace circlet
