// The kernels at E2B's sizes. Items per second of products are floating-point operations; bytes per second of the
// elementwise loops count what is read and written. "Raw" is oneDNN's product alone, without circlet around it.
//
//   ops_bench --benchmark_filter=Attention

#include <benchmark/benchmark.h>

#include <oneapi/dnnl/dnnl.hpp>
#include <random>
#include <vector>

#include "circlet/base/threads.h"
#include "circlet/ops/ops.h"
#include "ops/gemm.h"
#include "ops/simd.h"

namespace circlet {
namespace {

Tensor Random(Shape shape) {
  Tensor tensor(TensorType{DType::kF32, std::move(shape)});
  std::mt19937 bits(1);
  std::uniform_real_distribution<float> uniform(-1, 1);
  for (float& value : tensor.F32()) value = uniform(bits);
  return tensor;
}

void CountFlops(benchmark::State& state, double flops) {
  state.counters["FLOP/s"] =
      benchmark::Counter(flops, benchmark::Counter::kIsIterationInvariantRate, benchmark::Counter::kIs1000);
}

// rows, outputs, inputs of a linear layer; panels: by our kernel instead of oneDNN's.
void Linear(benchmark::State& state, bool panels) {
  const int64_t m = state.range(0), n = state.range(1), k = state.range(2);
  const Tensor x = Random({m, k}), w = Random({n, k}), y = Random({m, n});
  const auto linear = panels ? gemm::LinearByPanels : gemm::Linear;
  for (auto _ : state) linear(x.F32().data(), w.F32().data(), nullptr, m, n, k, y.F32().data());
  CountFlops(state, 2.0 * static_cast<double>(m * n * k));
}
void LinearSizes(benchmark::internal::Benchmark* bench) {
  for (const auto& [n, k] : {std::pair{6144, 1536}, {1536, 6144}, {2048, 1536}, {256, 1536}})
    for (const int m : {2048, 24, 1}) bench->Args({m, n, k});
  bench->Unit(benchmark::kMillisecond)->UseRealTime();
}
BENCHMARK_CAPTURE(Linear, oneDNN, false)->Apply(LinearSizes);
BENCHMARK_CAPTURE(Linear, Panels, true)->Apply(LinearSizes);

// heads, kv heads, positions, head size, and how many keys back a query sees.
void Attention(benchmark::State& state) {
  const int64_t heads = state.range(0), kv_heads = state.range(1), rows = state.range(2), width = state.range(3);
  std::vector<Tensor> in{Random({1, heads, rows, width}), Random({1, kv_heads, rows, width}),
                         Random({1, kv_heads, rows, width}), Random({1, 1, rows, rows})};
  double kept = 0;
  for (int64_t query = 0; query < rows; ++query)
    for (int64_t key = 0; key < rows; ++key) {
      const bool keep = key <= query && key > query - state.range(4);
      in[3].F32()[static_cast<size_t>(query * rows + key)] = keep ? 0.0f : -120.0f;
      kept += keep;
    }
  const std::vector<Tensor> out{Random({1, rows, heads * width})};
  const circlet::Attention op;
  for (auto _ : state) op.Eval({.in = in, .out = out});
  CountFlops(state, 4.0 * kept * static_cast<double>(heads * width));
}
BENCHMARK(Attention)
    ->Args({8, 1, 2048, 256, 2048})
    ->Args({8, 1, 2048, 256, 512})
    ->Args({8, 1, 2048, 512, 2048})
    ->Args({12, 12, 2520, 64, 2520})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

// The two products of an attention without mask, as one oneDNN matmul over the heads each.
void RawAttentionProducts(benchmark::State& state) {
  const int64_t heads = state.range(0), rows = state.range(1), width = state.range(2);
  const Tensor q = Random({heads, rows, width}), scores = Random({heads, rows, rows}),
               out = Random({heads, rows, width});
  using Desc = dnnl::memory::desc;
  const dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  dnnl::stream stream(engine);
  const auto f32 = dnnl::memory::data_type::f32;
  const Desc q_desc({heads, rows, width}, f32, {rows * width, width, 1}),
      k_desc({heads, width, rows}, f32, {rows * width, 1, width});
  const Desc s_desc({heads, rows, rows}, f32, {rows * rows, rows, 1});
  const dnnl::matmul first({dnnl::matmul::desc(q_desc, k_desc, s_desc), engine});
  const dnnl::matmul second({dnnl::matmul::desc(s_desc, q_desc, q_desc), engine});
  const auto memory = [&](const Desc& desc, const Tensor& tensor) { return dnnl::memory(desc, engine, tensor.Raw()); };
  for (auto _ : state) {
    first.execute(stream, {{DNNL_ARG_SRC, memory(q_desc, q)},
                           {DNNL_ARG_WEIGHTS, memory(k_desc, q)},
                           {DNNL_ARG_DST, memory(s_desc, scores)}});
    second.execute(stream, {{DNNL_ARG_SRC, memory(s_desc, scores)},
                            {DNNL_ARG_WEIGHTS, memory(q_desc, q)},
                            {DNNL_ARG_DST, memory(q_desc, out)}});
    stream.wait();
  }
  CountFlops(state, 4.0 * static_cast<double>(heads * rows * rows * width));
}
BENCHMARK(RawAttentionProducts)
    ->Args({8, 2048, 256})
    ->Args({8, 2048, 512})
    ->Args({12, 2520, 64})
    ->Unit(benchmark::kMillisecond)
    ->UseRealTime();

void RawCopy(benchmark::State& state) {
  const Tensor x = Random({state.range(0)}), y = Random({state.range(0)});
  for (auto _ : state) {
    std::memcpy(y.Raw(), x.Raw(), static_cast<size_t>(x.Bytes()));
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 2 * x.Bytes());
}
void Snap(benchmark::State& state, Rounding rounding) {
  const Tensor x = Random({state.range(0)});
  for (auto _ : state) {
    simd::Snap(x.F32().data(), state.range(0), {1.0f / 32767, 0, -32768, 32767, rounding});
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 2 * x.Bytes());
}
void MinMax(benchmark::State& state) {
  const Tensor x = Random({state.range(0)});
  for (auto _ : state) benchmark::DoNotOptimize(simd::MinMax(x.F32().data(), state.range(0)));
  state.SetBytesProcessed(state.iterations() * x.Bytes());
}
void Gelu(benchmark::State& state) {
  const Tensor x = Random({state.range(0)}), y = Random({state.range(0)});
  for (auto _ : state) {
    simd::Gelu(x.F32().data(), state.range(0), y.F32().data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 2 * x.Bytes());
}
void RmsNormRows(benchmark::State& state) {
  constexpr int64_t kWidth = 1536;
  const Tensor x = Random({state.range(0) / kWidth, kWidth}), gamma = Random({kWidth}), y = Random(x.GetShape());
  for (auto _ : state) {
    simd::RmsNormRows(x.F32().data(), gamma.F32().data(), x.GetShape()[0], kWidth, 1e-6f, y.F32().data());
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 2 * x.Bytes());
}
void SoftmaxRows(benchmark::State& state) {
  const Tensor x = Random({state.range(0)});
  for (auto _ : state) {
    for (int64_t row = 0; row < state.range(0) / 2048; ++row) simd::SoftmaxRow(x.F32().data() + row * 2048, 2048);
    benchmark::ClobberMemory();
  }
  state.SetBytesProcessed(state.iterations() * 2 * x.Bytes());
}
// In the first-level cache, and far beyond the last.
void LoopSizes(benchmark::internal::Benchmark* bench) { bench->Arg(1 << 12)->Arg(1 << 24); }
BENCHMARK(RawCopy)->Apply(LoopSizes);
BENCHMARK(MinMax)->Apply(LoopSizes);
BENCHMARK_CAPTURE(Snap, HalfEven, Rounding::kHalfEvenReciprocal)->Apply(LoopSizes);
BENCHMARK_CAPTURE(Snap, HalfAway, Rounding::kHalfAwayDivide)->Apply(LoopSizes);
BENCHMARK(Gelu)->Apply(LoopSizes);
BENCHMARK(RmsNormRows)->Apply(LoopSizes);
BENCHMARK(SoftmaxRows)->Apply(LoopSizes);

}  // namespace
}  // namespace circlet

int main(int argc, char** argv) {
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  benchmark::AddCustomContext("instruction set", circlet::simd::InstructionSet());
  benchmark::AddCustomContext("threads", std::to_string(circlet::Threads()));
  benchmark::RunSpecifiedBenchmarks();
}
