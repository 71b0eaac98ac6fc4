#include "circlet/report/statistics.h"

#include <cmath>

namespace circlet {

Mean MeanOf(std::span<const Cluster> clusters) {
  double count = 0, sum = 0;
  for (const Cluster& cluster : clusters) {
    count += static_cast<double>(cluster.count);
    sum += cluster.sum;
  }
  if (count == 0) return {};
  Mean mean{.value = sum / count};
  if (clusters.size() < 2) return mean;
  double squares = 0;
  for (const Cluster& cluster : clusters) {
    const double residual = cluster.sum - mean.value * static_cast<double>(cluster.count);
    squares += residual * residual;
  }
  const auto k = static_cast<double>(clusters.size());
  mean.standard_error = std::sqrt(k / (k - 1) * squares) / count;
  return mean;
}

}  // namespace circlet
