#pragma once

#include <cstdint>
#include <limits>
#include <span>

namespace circlet {

struct Mean {
  double value = std::numeric_limits<double>::quiet_NaN();
  double standard_error = std::numeric_limits<double>::quiet_NaN();
};

// Observations that depend on each other (tokens of one window): how many, and their sum.
struct Cluster {
  int64_t count = 0;
  double sum = 0;
};

// The mean m of all observations. Its standard error lets those of a cluster be correlated in any way and takes clusters
// as independent (the ratio estimator of single-stage cluster sampling):
//   sqrt(k / (k - 1) * sum over clusters (sum_i - m count_i)^2) / sum over clusters count_i.
// NaN: no observation; a standard error with fewer than two clusters.
Mean MeanOf(std::span<const Cluster> clusters);

}  // namespace circlet
