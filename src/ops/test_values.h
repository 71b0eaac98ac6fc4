#pragma once

// Random tensors, Highway targets and bit comparison for the tests of src/ops.

#include <gtest/gtest.h>

#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "circlet/base/tensor.h"
#include "hwy/highway.h"

namespace circlet {

inline std::vector<float> Normal(size_t count, uint32_t seed, float scale = 1.0f) {
  std::mt19937 bits(seed);
  std::normal_distribution<float> normal(0.0f, scale);
  std::vector<float> values(count);
  for (float& value : values) value = normal(bits);
  return values;
}

inline Tensor NormalTensor(Shape shape, uint32_t seed, float scale = 1.0f) {
  const std::vector<float> values = Normal(static_cast<size_t>(shape.Elements()), seed, scale);
  return Tensor::Of<float>(std::move(shape), values);
}

// Runs `body` once for every instruction set that this processor and the build have; traces carry its name.
inline void OnEveryTarget(const std::function<void()>& body) {
  const int64_t all = hwy::SupportedTargets() & HWY_TARGETS;
  for (int64_t rest = all; rest != 0; rest &= rest - 1) {
    const int64_t target = rest & -rest;
    SCOPED_TRACE(hwy::TargetName(target));
    hwy::SetSupportedTargetsForTest(target);
    hwy::GetChosenTarget().Update(target);
    body();
  }
  hwy::SetSupportedTargetsForTest(0);
  hwy::GetChosenTarget().Update(hwy::SupportedTargets());
}

// Index of the first element whose bits differ, -1 if none does.
inline int64_t FirstDifference(std::span<const float> a, std::span<const float> b) {
  if (a.size() != b.size()) return 0;
  for (size_t i = 0; i < a.size(); ++i)
    if (std::memcmp(&a[i], &b[i], sizeof(float)) != 0) return static_cast<int64_t>(i);
  return -1;
}

inline ::testing::AssertionResult SameBits(std::span<const float> a, std::span<const float> b) {
  const int64_t at = FirstDifference(a, b);
  if (at < 0) return ::testing::AssertionSuccess();
  if (a.size() != b.size()) return ::testing::AssertionFailure() << a.size() << " and " << b.size() << " values";
  return ::testing::AssertionFailure() << "element " << at << " of " << a.size() << ": " << a[static_cast<size_t>(at)]
                                       << " and " << b[static_cast<size_t>(at)];
}

}  // namespace circlet
