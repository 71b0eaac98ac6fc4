// What rounding one matrix with second moments takes, part by part, and what its products alone would.
//
//   rounding_bench [ROWS COLUMNS]...     default: the linears of E2B's layers
//
// A line a matrix: seconds of the moments of 2048 positions, of the correction (its factor; the target), of the metric
// and of the codes; then of the same floating-point operations as one large product in oneDNN.

#include <fmt/format.h>

#include <chrono>
#include <cmath>
#include <cstdlib>
#include <random>
#include <utility>
#include <vector>

#include "circlet/base/threads.h"
#include "pipeline/estimate.h"
#include "quant/weights/rounding.h"

namespace circlet {
namespace {

constexpr int64_t kPositions = 2048;

class Clock {
 public:
  double Lap() {
    const auto now = std::chrono::steady_clock::now();
    return std::chrono::duration<double>(now - std::exchange(last_, now)).count();
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

Tensor Random(Shape shape, float scale) {
  Tensor tensor(TensorType{DType::kF32, std::move(shape)});
  std::mt19937 bits(1);
  std::normal_distribution<float> normal(0, scale);
  for (float& value : tensor.F32()) value = normal(bits);
  return tensor;
}

void Measure(int64_t rows, int64_t columns, double speed) {
  const Tensor x = Random({kPositions, columns}, 1), weight = Random({rows, columns}, 0.02f);
  const Tensor change = Random({rows, columns}, 0.001f * kPositions);
  const WeightRounding method;
  Clock clock;
  weights::Moment moment = weights::Moment::Symmetric(columns, weights::MagnitudeOf(x), kPositions);
  moment.Add(x);
  const double moments = clock.Lap();
  Tensor target;
  double factor = 0, targets = 0, added = 0;
  hwy::AlignedFreeUniquePtr<float[]> room;
  {
    weights::InputCorrection correction(moment, method.correction_damping);
    factor = clock.Lap();
    added = correction.Added();
    target = correction.Target(weight, change.F32());
    room = correction.GiveUp();
    targets = clock.Lap();
  }
  const weights::Metric metric(std::move(moment), method, std::move(room));
  const double metrics = clock.Lap();
  weights::RoundCorrected(weight, target, change.F32(), added, metric, {.method = method});
  const double codes = clock.Lap();
  const double n = static_cast<double>(columns), products = static_cast<double>(rows) * n * n;
  fmt::print("{:6} {:7}  {:8.2f} {:8.2f} {:8.2f} {:8.2f} {:8.2f}   {:8.2f}\n", rows, columns, moments, factor, targets,
             metrics, codes, (kPositions * n * n + 2 * n * n * n / 3 + (2 + 7) * products) / speed);
}

}  // namespace
}  // namespace circlet

int main(int argc, char** argv) {
  using namespace circlet;
  std::vector<std::pair<int64_t, int64_t>> sizes;
  for (int i = 1; i + 1 < argc; i += 2) sizes.emplace_back(std::atoll(argv[i]), std::atoll(argv[i + 1]));
  if (sizes.empty())
    sizes = {{2048, 1536},  {256, 1536},   {1536, 2048}, {6144, 1536}, {1536, 6144},
             {12288, 1536}, {1536, 12288}, {4096, 1536}, {1536, 4096}, {1536, 256}};
  const double speed = MeasuredFlops();
  fmt::print("{} threads, {:.0f} GFLOP/s in oneDNN; seconds\n", Threads(), speed * 1e-9);
  fmt::print("{:>6} {:>7}  {:>8} {:>8} {:>8} {:>8} {:>8}   {:>8}\n", "rows", "columns", "moments", "factor", "target",
             "metric", "codes", "products");
  for (const auto& [rows, columns] : sizes) Measure(rows, columns, speed);
}
