#include "circlet/report/statistics.h"

#include <gtest/gtest.h>

#include <cmath>
#include <vector>

namespace circlet {
namespace {

TEST(MeanOfTest, SingleObservationsHaveTheTextbooksStandardError) {
  const std::vector<Cluster> clusters{{1, 1.0}, {1, 2.0}, {1, 6.0}};
  const Mean mean = MeanOf(clusters);
  EXPECT_DOUBLE_EQ(mean.value, 3);
  // Sample variance (4 + 1 + 9) / 2 = 7 over 3 observations.
  EXPECT_DOUBLE_EQ(mean.standard_error, std::sqrt(7.0 / 3));
}

TEST(MeanOfTest, RepeatingAnObservationWithinItsClusterTellsNothingNew) {
  const std::vector<Cluster> once{{1, 1.0}, {1, 2.0}, {1, 6.0}}, often{{10, 10.0}, {10, 20.0}, {10, 60.0}};
  EXPECT_DOUBLE_EQ(MeanOf(often).value, MeanOf(once).value);
  EXPECT_DOUBLE_EQ(MeanOf(often).standard_error, MeanOf(once).standard_error);
}

TEST(MeanOfTest, ClustersCountByTheirObservations) {
  // Mean 3; residuals 2 - 3 * 1 = -1 and 10 - 3 * 3 = 1.
  const Mean mean = MeanOf(std::vector<Cluster>{{1, 2.0}, {3, 10.0}});
  EXPECT_DOUBLE_EQ(mean.value, 3);
  EXPECT_DOUBLE_EQ(mean.standard_error, std::sqrt(2.0 / 1 * 2) / 4);
}

TEST(MeanOfTest, WhatIsNotKnownIsNoNumber) {
  EXPECT_TRUE(std::isnan(MeanOf({}).value));
  EXPECT_TRUE(std::isnan(MeanOf(std::vector<Cluster>{{0, 0.0}}).value));
  const Mean one = MeanOf(std::vector<Cluster>{{4, 2.0}});
  EXPECT_EQ(one.value, 0.5);
  EXPECT_TRUE(std::isnan(one.standard_error)) << "one cluster does not tell how much clusters differ";
}

}  // namespace
}  // namespace circlet
