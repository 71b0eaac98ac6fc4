// Products of codes against sums of int64, one element at a time.

#include "ops/integer_product.h"

#include <gmock/gmock.h>

#include <cmath>
#include <limits>

#include "circlet/base/threads.h"
#include "circlet/ops/matmul.h"
#include "ops/codes.h"
#include "ops/gemm.h"
#include "ops/test_values.h"

namespace circlet {
namespace {

bool IsSigned(DType dtype) { return dtype == DType::kI8 || dtype == DType::kI4; }

// Codes of the whole range; the ends come often.
Tensor CodesOfType(DType dtype, Shape shape, uint32_t seed) {
  std::mt19937 random(seed);
  Tensor codes({dtype, std::move(shape)});
  for (int64_t i = 0; i < codes.Bytes(); ++i)
    codes.Raw()[i] = static_cast<std::byte>(random() % 4 == 0 ? (IsSigned(dtype) ? 0x80 : 0xff) : random());
  return codes;
}

QParams GridFor(DType dtype, int64_t channels, bool symmetric) {
  QParams grid{.dtype = dtype, .axis = channels == 0 ? -1 : 0};
  const CodeRange range = CodesOf(dtype);
  for (int64_t c = 0; c < std::max<int64_t>(1, channels); ++c) {
    grid.scale.push_back(0.013f + 0.0007f * static_cast<float>(c % 91));
    grid.zero_point.push_back(symmetric ? 0 : static_cast<int32_t>(range.min + c * 31 % (range.max - range.min + 1)));
  }
  return grid;
}

struct Case {
  DType x, w;
  int64_t m, n, k;
  bool per_row = true, symmetric = false;
};

// x [m,k] on a grid, W as codes.
struct Operands {
  QParams x_grid, w_grid;
  Tensor x_codes, x, w, bias;

  explicit Operands(const Case& c)
      : x_grid(GridFor(c.x, 0, c.symmetric || c.x == DType::kI16)),
        w_grid(GridFor(c.w, c.per_row ? c.n : 0, c.symmetric)),
        x_codes(CodesOfType(c.x, {c.m, c.k}, 1)),
        x(Tensor({DType::kF32, {c.m, c.k}}).WithGrid(&x_grid)),
        w(CodesOfType(c.w, {c.n, c.k}, 2).WithGrid(&w_grid)),
        bias(NormalTensor({c.n}, 3)) {
    if (c.x != DType::kI16 && !c.symmetric) x_grid.zero_point[0] = static_cast<int32_t>(CodesOf(c.x).min + 3);
    Dequantize(x_codes, x_grid, 0, x.F32());
  }
  float Expected(int64_t row, int64_t column, bool with_bias) const {
    const int64_t k = w.GetShape()[1];
    const auto channel = static_cast<size_t>(w_grid.PerChannel() ? column : 0);
    int64_t sum = 0;
    for (int64_t i = 0; i < k; ++i)
      sum += (CodeAt(x_codes, row * k + i) - x_grid.zero_point[0]) *
             (CodeAt(w, column * k + i) - w_grid.zero_point[channel]);
    const double scale = static_cast<double>(x_grid.scale[0]) * w_grid.scale[channel];
    return static_cast<float>(std::fma(static_cast<double>(sum), scale, with_bias ? bias.F32()[column] : 0.0));
  }
};

void ExpectExactSums(const Case& c) {
  const Operands o(c);
  const Tensor plain({DType::kF32, {c.m, c.n}}), biased({DType::kF32, {c.m, c.n}});
  ASSERT_TRUE(SummedInIntegers(o.x.Grid(), o.w.Grid(), c.k));
  IntegerLinear(o.x, o.w, nullptr, plain);
  IntegerLinear(o.x, o.w, o.bias.F32().data(), biased);
  for (int64_t i = 0; i < c.m; ++i)
    for (int64_t j = 0; j < c.n; ++j) {
      ASSERT_EQ(plain.F32()[i * c.n + j], o.Expected(i, j, false))
          << Name(c.x) << " " << Name(c.w) << " " << i << ", " << j << " of " << c.m << "x" << c.n << "x" << c.k;
      ASSERT_EQ(biased.F32()[i * c.n + j], o.Expected(i, j, true)) << "with bias";
    }
}

TEST(IntegerProductTest, ElementsAreExactSumsRoundedOnce) {
  using enum DType;
  OnEveryTarget([] {
    for (const Case& c : {Case{kU8, kU8, 5, 7, 33},
                          {kU8, kU8, 1, 1, 1},
                          {kI8, kI8, 3, 40, 257},
                          {kU8, kI4, 9, 33, 15},
                          {kI16, kU4, 17, 70, 129},
                          {kI16, kI4, 1, 200, 64},
                          {kU4, kI8, 2, 5, 9},
                          {kI16, kU8, 13, 9, 1536},
                          {kI16, kU8, 4, 6, 77, false},
                          {kU8, kI8, 4, 6, 77, false, true}})
      ExpectExactSums(c);
  });
  for (const Case& c : {Case{kU8, kU4, 3, 600, 16001},
                        {kI16, kU8, 150, 2100, 16},
                        {kI16, kI8, 70, 33000, 4},
                        {kI16, kU8, 70, 33, 1536},
                        {kU8, kU8, 9, 3, 1 << 15},
                        {kI8, kU8, 9, 3, 1 << 15}})
    ExpectExactSums(c);
}

// One position by W as it is stored, every width of it, with rows that end anywhere in a vector.
TEST(IntegerProductTest, ASingleRowReadsWeightsOfEveryWidth) {
  using enum DType;
  OnEveryTarget([] {
    for (const DType x : {kI16, kU8, kI8, kU4})
      for (const DType w : {kU8, kI8, kU4, kI4})
        for (const int64_t k : {1, 2, 31, 62, 64, 126, 130, 1536}) ExpectExactSums({x, w, 1, 19, k});
  });
}

// The largest sums that there are: all terms at the ends of their ranges and of one sign.
TEST(IntegerProductTest, SumsAtTheEndsOfTheRangesStayExact) {
  using enum DType;
  constexpr int64_t kTerms = 1 << 15, kColumns = 3;
  OnEveryTarget([&] {
    for (const DType w_type : {kU8, kI8, kU4, kI4})
      for (const int64_t m : {int64_t{1}, int64_t{9}}) {
        QParams x_grid{.dtype = kI16, .axis = -1, .scale = {1.0f}, .zero_point = {0}};
        QParams w_grid{.dtype = w_type, .axis = -1, .scale = {1.0f}, .zero_point = {0}};
        Tensor x({kF32, {m, kTerms}}), w({w_type, {kColumns, kTerms}}), y({kF32, {m, kColumns}});
        std::ranges::fill(x.F32(), -32768.0f);
        std::fill_n(w.Raw(), w.Bytes(),
                    std::byte{static_cast<uint8_t>(w_type == kI8   ? 0x80
                                                   : w_type == kI4 ? 0x88
                                                                   : 0xff)});
        IntegerLinear(x.WithGrid(&x_grid), w.WithGrid(&w_grid), nullptr, y);
        const auto expected = static_cast<float>(kTerms * -32768 * CodeAt(w, 0));
        for (const float value : y.F32()) ASSERT_EQ(value, expected) << Name(w_type) << " " << m;
      }
  });
}

// Codes of 16 bits around a zero point need 17 bits when it is taken off.
TEST(IntegerProductTest, AZeroPointOf16BitsIsExact) {
  using enum DType;
  for (const int64_t m : {1, 9})
    for (const DType w_type : {kU8, kI4, kI8}) {
      const Operands o({kI16, w_type, m, 20, 90});
      QParams grid = o.x_grid;
      grid.zero_point[0] = -32000;
      const Tensor x = o.x.Clone(), y({kF32, {m, 20}});
      Dequantize(o.x_codes, grid, 0, x.F32());
      IntegerLinear(x.WithGrid(&grid), o.w, nullptr, y);
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < 20; ++j) {
          int64_t sum = 0;
          for (int64_t t = 0; t < 90; ++t)
            sum += (CodeAt(o.x_codes, i * 90 + t) + 32000) * (CodeAt(o.w, j * 90 + t) - o.w_grid.zero_point[j]);
          ASSERT_EQ(y.F32()[i * 20 + j], static_cast<float>(static_cast<double>(sum) *
                                                            (static_cast<double>(grid.scale[0]) * o.w_grid.scale[j])));
        }
    }
}

// Sums of both digits are 48 MB, packed codes 10 MB when unpacked: several blocks of rows and slices of columns.
TEST(IntegerProductTest, BlocksAndThreadsChangeNoBit) {
  for (const auto& [w_type, m] : {std::pair<DType, int64_t>{DType::kI8, 1200}, {DType::kU4, 1200}, {DType::kI8, 1}}) {
    const Operands o({DType::kI16, w_type, m, 5000, 2048});
    const Tensor alone({DType::kF32, {m, 5000}}), y({DType::kF32, {m, 5000}});
    {
      const SingleThreadScope one;
      IntegerLinear(o.x, o.w, nullptr, alone);
    }
    IntegerLinear(o.x, o.w, nullptr, y);
    EXPECT_TRUE(SameBits(y.F32(), alone.F32()));
    for (const auto& [row, column] :
         {std::pair<int64_t, int64_t>{0, 0}, {1199, 4999}, {640, 4096}, {7, 2500}, {1100, 1}})
      if (row < m) {
        EXPECT_EQ(y.F32()[row * 5000 + column], o.Expected(row, column, false)) << row << ", " << column;
      }
  }
}

TEST(IntegerProductTest, ANaNStaysInItsRow) {
  for (const DType x_type : {DType::kU8, DType::kI16}) {
    const Operands o({x_type, DType::kI8, 3, 20, 50, true, true});
    o.x.F32()[50 + 7] = std::numeric_limits<float>::quiet_NaN();
    const Tensor y({DType::kF32, {3, 20}});
    IntegerLinear(o.x, o.w, nullptr, y);
    for (int64_t j = 0; j < 20; ++j) {
      EXPECT_EQ(y.F32()[j], o.Expected(0, j, false));
      EXPECT_TRUE(std::isnan(y.F32()[20 + j]));
      EXPECT_EQ(y.F32()[40 + j], o.Expected(2, j, false));
    }
  }
}

TEST(IntegerProductTest, OnlyWhatStaysExactIsSummedInIntegers) {
  const QParams bytes = GridFor(DType::kU8, 0, false), wide = GridFor(DType::kI16, 0, true),
                rows = GridFor(DType::kI8, 4, true);
  QParams columns = rows;
  columns.axis = 1;
  EXPECT_TRUE(SummedInIntegers(&wide, &rows, 1 << 15));
  EXPECT_FALSE(SummedInIntegers(&wide, &rows, (1 << 15) + 1)) << "sums may leave 32 bits";
  EXPECT_FALSE(SummedInIntegers(&wide, &wide, 8)) << "16 bits by 16";
  EXPECT_FALSE(SummedInIntegers(&wide, &columns, 8)) << "a grid for each term of the sum";
  EXPECT_FALSE(SummedInIntegers(&rows, &bytes, 8)) << "x on one grid a row";
  EXPECT_FALSE(SummedInIntegers(nullptr, &bytes, 8)) << "x on no grid";
  EXPECT_FALSE(SummedInIntegers(&bytes, nullptr, 8)) << "W on no grid";
}

// The operator chooses: codes by values that lie on a grid are exact, by others they are a float product.
TEST(IntegerProductTest, ALinearOfCodesIsExactWhereItsInputLiesOnAGrid) {
  const Operands o({DType::kI16, DType::kI4, 6, 30, 500});
  const Tensor on_grid({DType::kF32, {6, 30}}), floats({DType::kF32, {6, 30}}), expected({DType::kF32, {6, 30}});
  const Tensor free_x(o.x.Type(), o.x.Raw(), nullptr), values({DType::kF32, {30, 500}});
  Dequantize(o.w, o.w_grid, 0, values.F32());
  FullyConnected{}.Eval({.in = std::vector<Tensor>{o.x, o.w}, .out = std::vector<Tensor>{on_grid}});
  FullyConnected{}.Eval({.in = std::vector<Tensor>{free_x, o.w}, .out = std::vector<Tensor>{floats}});
  FullyConnected{}.Eval({.in = std::vector<Tensor>{free_x, values}, .out = std::vector<Tensor>{expected}});
  EXPECT_TRUE(SameBits(floats.F32(), expected.F32()));
  EXPECT_FALSE(SameBits(floats.F32(), on_grid.F32())) << "sums of float32 are not exact";
  for (int64_t j = 0; j < 30; ++j) EXPECT_EQ(on_grid.F32()[j], o.Expected(0, j, false));
}

// Weights that are widened slice by slice, for one row by several threads, give the bits of the whole float product.
TEST(IntegerProductTest, ALinearOf16BitWeightsIsTheFloatProductHoweverItIsCut) {
  const Operands o({DType::kI16, DType::kI16, 5, 700, 1601});
  const Tensor values({DType::kF32, {700, 1601}});
  Dequantize(o.w, o.w_grid, 0, values.F32());
  for (const int64_t m : {1, 5}) {
    const Tensor x = o.x.Slice(0, m, 0), found({DType::kF32, {m, 700}}), expected({DType::kF32, {m, 700}});
    FullyConnected{}.Eval({.in = std::vector<Tensor>{x, o.w}, .out = std::vector<Tensor>{found}});
    FullyConnected{}.Eval({.in = std::vector<Tensor>{x, values}, .out = std::vector<Tensor>{expected}});
    EXPECT_TRUE(SameBits(found.F32(), expected.F32())) << m;
  }
}

}  // namespace
}  // namespace circlet
