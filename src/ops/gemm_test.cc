#include "ops/gemm.h"

#include <gtest/gtest.h>

#include <atomic>
#include <cmath>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/ops/ops.h"
#include "hwy/aligned_allocator.h"
#include "ops/simd.h"
#include "ops/tally.h"
#include "ops/test_values.h"

namespace circlet::gemm {
namespace {

class WithThreads {
 public:
  explicit WithThreads(int count) : before_(Threads()) { SetThreads(count); }
  ~WithThreads() { SetThreads(before_); }

 private:
  int before_;
};

struct Size {
  int64_t m, n, k;
};

TEST(LinearTest, IsTheProductWithTheTransposedWeight) {
  for (const auto& [m, n, k] : {Size{1, 1, 1}, {3, 5, 7}, {1, 200, 64}, {70, 33, 129}, {200, 300, 64}}) {
    const std::vector<float> x = Normal(static_cast<size_t>(m * k), 1), w = Normal(static_cast<size_t>(n * k), 2);
    const std::vector<float> bias = Normal(static_cast<size_t>(n), 3);
    for (const float* b : {static_cast<const float*>(nullptr), bias.data()}) {
      for (const auto linear : {Linear, LinearByPanels}) {
        std::vector<float> y(static_cast<size_t>(m * n));
        linear(x.data(), w.data(), b, m, n, k, y.data());
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) {
            double sum = b == nullptr ? 0 : b[j];
            for (int64_t l = 0; l < k; ++l) sum += static_cast<double>(x[i * k + l]) * w[j * k + l];
            EXPECT_NEAR(y[i * n + j], sum, 1e-6 * static_cast<double>(k)) << i << "," << j << " of " << m << "x" << n;
          }
      }
    }
  }
}

TEST(LinearTest, WithoutRowsOrInnerElementsGivesNothingOrTheBias) {
  const float bias[] = {1, 2};
  float y[] = {7, 7, 7, 7};
  Linear(nullptr, nullptr, bias, 0, 2, 4, y);
  EXPECT_EQ(y[0], 7);
  Linear(nullptr, nullptr, bias, 2, 2, 0, y);
  EXPECT_TRUE(SameBits(y, std::vector<float>{1, 2, 1, 2}));
}

// Widths of E2B; the longest products of a run among them. Fewer rows than the model's 2048 keep the test short.
TEST(LinearTest, ThreadsChangeNoBit) {
  for (const auto& [m, n, k] : {Size{1, 1536, 2048},
                                {1, 4096, 1536},
                                {7, 256, 1536},
                                {64, 2048, 1536},
                                {200, 1536, 6144},
                                {24, 64, 192},
                                {129, 77, 333},
                                {2, 1536, 12288}}) {
    const std::vector<float> x = Normal(static_cast<size_t>(m * k), 4), w = Normal(static_cast<size_t>(n * k), 5);
    for (const auto linear : {Linear, LinearByPanels}) {
      std::vector<float> alone(static_cast<size_t>(m * n)), y(alone.size());
      {
        const WithThreads one(1);
        linear(x.data(), w.data(), nullptr, m, n, k, alone.data());
      }
      for (const int threads : {2, 3, 4}) {
        const WithThreads several(threads);
        linear(x.data(), w.data(), nullptr, m, n, k, y.data());
        EXPECT_TRUE(SameBits(y, alone)) << m << "x" << n << "x" << k << " with " << threads << " threads";
      }
    }
  }
}

// Each worker computes alone with kernels of its own, next to others of the same and of other sizes.
TEST(LinearTest, WorkersSideBySideGetTheBitsOfAllThreads) {
  const std::vector<Size> sizes{{1, 1536, 512}, {24, 64, 192},  {129, 77, 333}, {7, 256, 1536},
                                {64, 512, 768}, {33, 128, 900}, {2, 40, 6144},  {200, 96, 64}};
  std::vector<std::vector<float>> x, w, together;
  for (const auto& [m, n, k] : sizes) {
    x.push_back(Normal(static_cast<size_t>(m * k), 8));
    w.push_back(Normal(static_cast<size_t>(n * k), 9));
    together.emplace_back(static_cast<size_t>(m * n));
  }
  const auto product = [&](size_t i, std::vector<float>& y) {
    Linear(x[i].data(), w[i].data(), nullptr, sizes[i].m, sizes[i].n, sizes[i].k, y.data());
  };
  const WithThreads four(4);
  for (size_t i = 0; i < sizes.size(); ++i) product(i, together[i]);
  constexpr size_t kRounds = 5;
  std::vector<std::vector<float>> alone(kRounds * sizes.size());
  ParallelItems(static_cast<int64_t>(alone.size()), [&](int64_t item, int worker) {
    EXPECT_TRUE(worker >= 0 && worker < 4);
    EXPECT_EQ(Threads(), 1);
    const size_t i = static_cast<size_t>(item) % sizes.size();
    alone[static_cast<size_t>(item)].resize(together[i].size());
    product(i, alone[static_cast<size_t>(item)]);
  });
  EXPECT_EQ(Threads(), 4);
  for (size_t item = 0; item < alone.size(); ++item)
    EXPECT_TRUE(SameBits(alone[item], together[item % sizes.size()])) << "item " << item;
}

TEST(TallyTest, CountsProductsByShape) {
  Tally tally;
  const auto run = [](const Op& op, const std::vector<Tensor>& in) {
    std::vector<TensorType> types;
    for (const Tensor& tensor : in) types.push_back(tensor.Type());
    std::vector<Tensor> out;
    for (const TensorType& type : op.Infer(types)) out.emplace_back(type);
    op.Eval({.in = in, .out = out});
  };
  {
    const TallyScope scope(tally);
    for (int i = 0; i < 3; ++i) run(FullyConnected{}, {NormalTensor({1, 5, 8}, 1), NormalTensor({6, 8}, 2)});
    run(BatchMatMul{}, {NormalTensor({4, 5, 8}, 1), NormalTensor({1, 8, 3}, 2)});
    const Tensor keys = NormalTensor({1, 2, 9, 16}, 4);
    run(Attention{}, {NormalTensor({1, 4, 7, 16}, 3), keys, keys, NormalTensor({1, 1, 7, 9}, 5)});
  }
  run(FullyConnected{}, {NormalTensor({1, 5, 8}, 1), NormalTensor({6, 8}, 2)});  // not counted
  const std::map<ProductShape, int64_t> expected{
      {{5, 6, 8, true}, 3}, {{5, 3, 8, false}, 4}, {{7, 9, 16, true}, 4}, {{7, 16, 9, false}, 4}};
  EXPECT_EQ(tally.Counts(), expected);
  EXPECT_EQ(tally.Flops(), 2 * (3 * 5 * 6 * 8 + 4 * 5 * 3 * 8 + 8 * 7 * 9 * 16));
}

// Ten of one product take ten times one of it, within what another program on the machine may disturb (factor 4).
TEST(TallyTest, SecondsAloneGrowWithTheCounts) {
  Tally one, ten, none;
  one.Add({64, 256, 512}, 1);
  ten.Add({64, 256, 512}, 10);
  const double seconds = SecondsAlone(one);
  EXPECT_GT(seconds, 0);
  EXPECT_GT(SecondsAlone(ten), 2.5 * seconds);
  EXPECT_EQ(SecondsAlone(none), 0);
  // Over the limit, all but the largest shape is estimated.
  ten.Add({8, 16, 32}, 1000);
  EXPECT_GT(SecondsAlone(ten, 0), 0);
}

TEST(ParallelItemsTest, RunsEachItemOnceAndOneItemWithAllThreads) {
  const WithThreads four(4);
  std::vector<std::atomic<int>> runs(100);
  ParallelItems(100, [&](int64_t item, int) { ++runs[static_cast<size_t>(item)]; });
  for (const auto& count : runs) EXPECT_EQ(count, 1);
  ParallelItems(1, [&](int64_t, int) { EXPECT_EQ(Threads(), 4); });
  ParallelItems(0, [&](int64_t, int) { FAIL(); });
}

TEST(ParallelItemsTest, TheSmallestItemThatThrewIsReported) {
  const WithThreads four(4);
  std::atomic<int64_t> started = 0;
  try {
    ParallelItems(1000, [&](int64_t item, int) {
      ++started;
      if (item >= 10) Fail("item {}", item);
    });
    FAIL() << "no error";
  } catch (const Error& error) {
    EXPECT_STREQ(error.what(), "item 10");
  }
  EXPECT_LT(started, 100);
  EXPECT_EQ(Threads(), 4);
}

std::vector<uint16_t> Bf16(const std::vector<float>& values) {
  std::vector<uint16_t> bf16(values.size());
  simd::F32ToBF16(values.data(), static_cast<int64_t>(values.size()), bf16.data());
  return bf16;
}

// |y - y32| <= (2^-8 + 2^-18) sum |x w|: each rounded operand is off by at most 2^-9 of itself. The sum's own rounding,
// 2^-24 a step of the same sum, is added.
TEST(Bf16Test, ProductsAreAsNearAsTheRoundingOfTheirOperands) {
  if (!Bf16Supported()) GTEST_SKIP() << "the kernel is made of AVX-512 BF16 instructions; without them the executor refuses bf16";
  for (const auto& [m, n, k] : {Size{1, 1, 1}, {3, 5, 7}, {1, 200, 64}, {70, 33, 129}, {50, 70, 2048}}) {
    const Tensor x = NormalTensor({m, k}, 1), w = NormalTensor({n, k}, 2), bias = NormalTensor({n}, 3);
    const Tensor y({DType::kF32, {m, n}}), plain({DType::kF32, {m, n}}), batched({DType::kF32, {m, n}});
    const std::vector<uint16_t> w_bf16 = Bf16({w.F32().begin(), w.F32().end()});
    LinearBf16(x.F32().data(), w_bf16.data(), bias.F32().data(), m, n, k, y.F32().data());
    LinearBf16(x.F32().data(), w_bf16.data(), nullptr, m, n, k, plain.F32().data());
    BatchMatMul{.transpose_b = true}.Eval(
        {.in = std::vector<Tensor>{x, w}, .out = std::vector<Tensor>{batched}, .compute = Compute::kBf16});
    for (int64_t i = 0; i < m; ++i)
      for (int64_t j = 0; j < n; ++j) {
        double sum = 0, magnitude = 0;
        for (int64_t l = 0; l < k; ++l) {
          const double term = static_cast<double>(x.F32()[i * k + l]) * w.F32()[j * k + l];
          sum += term;
          magnitude += std::abs(term);
        }
        const double bound =
            magnitude * (std::ldexp(1, -8) + std::ldexp(1, -18) + static_cast<double>(k) * std::ldexp(1, -24));
        EXPECT_NEAR(plain.F32()[i * n + j], sum, bound);
        EXPECT_NEAR(batched.F32()[i * n + j], sum, bound);
        EXPECT_NEAR(y.F32()[i * n + j], sum + bias.F32()[j], bound + std::ldexp(4, -24));
      }
  }
}

TEST(Bf16Test, ThreadsChangeNoBit) {
  if (!Bf16Supported()) GTEST_SKIP() << "the kernel is made of AVX-512 BF16 instructions; without them the executor refuses bf16";
  for (const auto& [m, n, k] : {Size{1, 4096, 1536}, {7, 256, 1536}, {200, 512, 6144}, {129, 77, 333}}) {
    const std::vector<float> x = Normal(static_cast<size_t>(m * k), 4);
    const std::vector<uint16_t> w = Bf16(Normal(static_cast<size_t>(n * k), 5));
    std::vector<float> alone(static_cast<size_t>(m * n)), y(alone.size());
    {
      const SingleThreadScope one;
      LinearBf16(x.data(), w.data(), nullptr, m, n, k, alone.data());
    }
    for (const int threads : {2, 3, 4}) {
      const WithThreads several(threads);
      LinearBf16(x.data(), w.data(), nullptr, m, n, k, y.data());
      EXPECT_TRUE(SameBits(y, alone)) << m << "x" << n << "x" << k << " with " << threads << " threads";
    }
  }
}

// Operands of one product, and its whole result.
struct Product {
  int64_t m, n, k;
  bool transposed;
  std::vector<float> a, b, given;  // [m,k], [k,n], and b as it is packed
  hwy::AlignedFreeUniquePtr<float[]> packed;
  Panels panels;

  Product(int64_t m, int64_t n, int64_t k, bool transposed = false)
      : m(m),
        n(n),
        k(k),
        transposed(transposed),
        a(Normal(static_cast<size_t>(m * k), 6)),
        b(Normal(static_cast<size_t>(n * k), 7)),
        packed(hwy::AllocateAligned<float>(static_cast<size_t>(PackedFloats(k, n)))),
        panels{packed.get(), k, n} {
    given = b;
    if (transposed)
      for (int64_t i = 0; i < k; ++i)
        for (int64_t j = 0; j < n; ++j) given[static_cast<size_t>(j * k + i)] = b[static_cast<size_t>(i * n + j)];
    // Stale bytes must not reach a result.
    std::fill_n(packed.get(), PackedFloats(k, n), std::nanf(""));
    Pack(given.data(), transposed ? k : n, transposed, panels, 0, PanelCount(n));
  }
  // By MultiplyFewRows, columns in two parts, and so k where b lies across it.
  std::vector<float> FewRows() const {
    std::vector<float> c(static_cast<size_t>(m * n));
    for (const auto& [first, last] : {std::pair<int64_t, int64_t>{0, n / 3}, {n / 3, n}})
      for (const auto& [begin, end] :
           {std::pair<int64_t, int64_t>{0, transposed ? 0 : k / 2}, {transposed ? 0 : k / 2, k}})
        if (begin < end)
          MultiplyFewRows(a.data() + begin, k, m, given.data() + (transposed ? 0 : begin * n), end - begin, n,
                          transposed, first, last, c.data(), n);
    return c;
  }
  std::vector<float> Whole() const {
    std::vector<float> c(static_cast<size_t>(m * n), std::nanf(""));
    Multiply(a.data(), k, m, panels, {0, PanelCount(n), 0, k}, c.data(), n);
    return c;
  }
};

const std::vector<Size> kSizes{{1, 1, 1}, {1, 70, 33}, {5, 16, 20}, {13, 33, 515}, {25, 64, 1030}, {12, 32, 512}};

TEST(BlockProductTest, EachElementIsOneChainInTheOrderOfK) {
  OnEveryTarget([] {
    const bool fma = simd::InstructionSet()[0] == 'A';
    for (const auto& [m, n, k] : kSizes)
      for (const bool transposed : {false, true}) {
        const Product p(m, n, k, transposed);
        std::vector<float> expected(static_cast<size_t>(m * n));
        for (int64_t i = 0; i < m; ++i)
          for (int64_t j = 0; j < n; ++j) {
            float sum = 0;
            for (int64_t l = 0; l < k; ++l) {
              const float x = p.a[static_cast<size_t>(i * k + l)], y = p.b[static_cast<size_t>(l * n + j)];
              sum = fma ? std::fma(x, y, sum) : sum + x * y;
            }
            expected[static_cast<size_t>(i * n + j)] = sum;
          }
        EXPECT_TRUE(SameBits(p.Whole(), expected)) << m << "x" << n << "x" << k;
        EXPECT_TRUE(SameBits(p.FewRows(), expected)) << m << "x" << n << "x" << k << " by few rows";
      }
  });
}

TEST(BlockProductTest, CutsOfRowsAndColumnsChangeNoBit) {
  OnEveryTarget([] {
    const Product p(29, 150, 300);
    const std::vector<float> whole = p.Whole();
    std::vector<float> c(whole.size());
    for (int64_t row = 0; row < p.m; row += 7)
      for (int64_t panel = 0; panel < PanelCount(p.n); ++panel)
        Multiply(p.a.data() + row * p.k, p.k, std::min<int64_t>(7, p.m - row), p.panels, {panel, panel + 1, 0, p.k},
                 c.data() + row * p.n, p.n);
    EXPECT_TRUE(SameBits(c, whole));
  });
}

TEST(BlockProductTest, TermsThatAreZeroMayBeLeftOut) {
  OnEveryTarget([] {
    Product p(20, 40, 2000);
    const int64_t begin = 531, end = 1807;
    for (int64_t i = 0; i < p.m; ++i)
      for (int64_t l = 0; l < p.k; ++l)
        if (l < begin || l >= end) p.a[static_cast<size_t>(i * p.k + l)] = 0;
    std::vector<float> c(static_cast<size_t>(p.m * p.n));
    Multiply(p.a.data(), p.k, p.m, p.panels, {0, PanelCount(p.n), begin, end}, c.data(), p.n);
    EXPECT_TRUE(SameBits(c, p.Whole()));
  });
}

}  // namespace
}  // namespace circlet::gemm
