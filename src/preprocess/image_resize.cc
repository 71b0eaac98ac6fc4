#include <algorithm>
#include <cmath>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/preprocess/image.h"

namespace circlet {
namespace {

constexpr int kFractionBits = 22;  // 8 bits of pixel, 2 of overshoot, 22 of fraction

// Weights of the input samples that make up each output sample of one axis.
struct Taps {
  int64_t width = 0;             // weights stored for each output
  std::vector<int64_t> first;    // [out], index of the first input sample
  std::vector<int64_t> count;    // [out]
  std::vector<int32_t> weights;  // [out, width], sum 2^22
};

// Keys' cubic with a = -0.5.
double Cubic(double x) {
  constexpr double a = -0.5;
  x = std::abs(x);
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  if (x < 2) return (((x - 5) * x + 8) * x - 4) * a;
  return 0;
}

// model.md 6.1.
Taps MakeTaps(int64_t in, int64_t out) {
  const double scale = static_cast<double>(in) / static_cast<double>(out);
  const double stretch = std::max(scale, 1.0);
  const double support = 2 * stretch;
  Taps taps;
  taps.width = 2 * static_cast<int64_t>(std::ceil(support)) + 1;
  taps.first.resize(out);
  taps.count.resize(out);
  taps.weights.resize(out * taps.width);
  std::vector<double> exact(taps.width);
  for (int64_t i = 0; i < out; ++i) {
    const double center = (static_cast<double>(i) + 0.5) * scale;
    const int64_t first = std::max<int64_t>(0, static_cast<int64_t>(center - support + 0.5));
    const int64_t last = std::min(in, static_cast<int64_t>(center + support + 0.5));
    double sum = 0;
    for (int64_t k = first; k < last; ++k)
      sum += exact[k - first] = Cubic((static_cast<double>(k) - center + 0.5) / stretch);
    for (int64_t k = 0; k < last - first; ++k)
      taps.weights[i * taps.width + k] = static_cast<int32_t>(std::lround(exact[k] / sum * (1 << kFractionBits)));
    taps.first[i] = first;
    taps.count[i] = last - first;
  }
  return taps;
}

constexpr int32_t kHalf = 1 << (kFractionBits - 1);

uint8_t Round(int32_t sum) { return static_cast<uint8_t>(std::clamp(sum >> kFractionBits, 0, 255)); }

Image ResizeWidth(const Image& image, int64_t width) {
  const Taps taps = MakeTaps(image.size.width, width);
  Image out{{width, image.size.height}, std::vector<uint8_t>(3 * width * image.size.height)};
  ParallelFor(image.size.height, 16, [&](int64_t begin, int64_t end) {
    for (int64_t y = begin; y < end; ++y) {
      const uint8_t* row = &image.rgb[3 * image.size.width * y];
      uint8_t* to = &out.rgb[3 * width * y];
      for (int64_t x = 0; x < width; ++x, to += 3) {
        const uint8_t* pixel = row + 3 * taps.first[x];
        const int32_t* weight = &taps.weights[x * taps.width];
        int32_t r = kHalf, g = kHalf, b = kHalf;
        for (int64_t k = 0; k < taps.count[x]; ++k, pixel += 3) {
          r += weight[k] * pixel[0];
          g += weight[k] * pixel[1];
          b += weight[k] * pixel[2];
        }
        to[0] = Round(r);
        to[1] = Round(g);
        to[2] = Round(b);
      }
    }
  });
  return out;
}

Image ResizeHeight(const Image& image, int64_t height) {
  const Taps taps = MakeTaps(image.size.height, height);
  const int64_t row_bytes = 3 * image.size.width;
  Image out{{image.size.width, height}, std::vector<uint8_t>(row_bytes * height)};
  ParallelFor(height, 8, [&](int64_t begin, int64_t end) {
    std::vector<int32_t> sums(row_bytes);
    int32_t* sum = sums.data();
    for (int64_t y = begin; y < end; ++y) {
      std::ranges::fill(sums, kHalf);
      for (int64_t k = 0; k < taps.count[y]; ++k) {
        const uint8_t* row = &image.rgb[row_bytes * (taps.first[y] + k)];
        const int32_t weight = taps.weights[y * taps.width + k];
#pragma omp simd
        for (int64_t i = 0; i < row_bytes; ++i) sum[i] += weight * row[i];
      }
      uint8_t* to = &out.rgb[row_bytes * y];
#pragma omp simd
      for (int64_t i = 0; i < row_bytes; ++i) to[i] = Round(sum[i]);
    }
  });
  return out;
}

}  // namespace

Image ResizeBicubic(const Image& image, ImageSize target) {
  CIRCLET_CHECK(image.size.width > 0 && image.size.height > 0 && target.width > 0 && target.height > 0,
                "{}x{} to {}x{}", image.size.width, image.size.height, target.width, target.height);
  if (target == image.size) return image;
  if (target.width == image.size.width) return ResizeHeight(image, target.height);
  Image wide = ResizeWidth(image, target.width);
  return target.height == image.size.height ? wide : ResizeHeight(wide, target.height);
}

}  // namespace circlet
