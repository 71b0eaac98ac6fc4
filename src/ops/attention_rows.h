#pragma once

// Keys or values of an attention, [KV,T,h], which may be given in two parts, those of the past ahead, and each part as
// float32 or as codes of its grid. Products with few rows widen a few keys at a time, in the first-level cache.

#include <algorithm>
#include <span>
#include <vector>

#include "circlet/base/threads.h"
#include "ops/codes.h"
#include "ops/gemm.h"
#include "ops/internal.h"
#include "ops/simd.h"
#include "ops/thread_scratch.h"

namespace circlet {

class AttentionRows {
 public:
  // Of Attention's inputs, `index` 1 (keys) or 2 (values).
  AttentionRows(std::span<const Tensor> in, size_t index) {
    if (in.size() > 4) parts_.push_back(in[index + 3]);
    parts_.push_back(in[index]);
    for (const Tensor& part : parts_) rows_ += part.GetShape()[2];
  }

  int64_t Past() const { return rows_ - parts_.back().GetShape()[2]; }
  // The one grid of all of them; null: there is none.
  const QParams* Grid() const {
    const QParams* const grid = parts_[0].Grid();
    const auto same = [&](const Tensor& part) { return part.Grid() != nullptr && *part.Grid() == *grid; };
    return grid != nullptr && std::ranges::all_of(parts_, same) ? grid : nullptr;
  }

  // All of them as float32.
  template <class Use>
  const float* Whole() const {
    if (parts_.size() == 1 && !IsCodes(parts_[0])) return parts_[0].F32().data();
    const int64_t width = Width();
    float* const all = ThreadScratch<float, Use>(KvHeads() * rows_ * width);
    ParallelFor(KvHeads() * rows_, RowGrain(width), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t count = std::min(end - at, rows_ - at % rows_);
        Widen(at / rows_, at % rows_, count, all + at * width);
        at += count;
      }
    });
    return all;
  }

  // c[i,j] = a[i,:] times row j, of m rows of a; begin <= j < end, begin a multiple of kSoftmaxLanes. c has whole
  // vectors.
  void AddScores(const float* a, int64_t a_stride, int64_t m, int64_t kv_head, int64_t begin, int64_t end, float* c,
                 int64_t c_stride) const {
    for (int64_t row = begin; row < end; row += Chunk()) {
      const int64_t count = std::min(Chunk(), end - row);
      const int64_t padded = (count + simd::kSoftmaxLanes - 1) / simd::kSoftmaxLanes * simd::kSoftmaxLanes;
      for (int64_t i = 0; i < m; ++i) std::fill_n(c + i * c_stride + row, padded, 0.0f);
      gemm::MultiplyFewRows(a, a_stride, m, Some(kv_head, row, count, padded), Width(), padded, /*transposed=*/true, 0,
                            padded, c + row, c_stride);
    }
  }

  // c[i,:] = sum over begin <= j < end of a[i,j] times row j. The rows of c [m,Width()] follow each other.
  void AddWeighted(const float* a, int64_t a_stride, int64_t m, int64_t kv_head, int64_t begin, int64_t end,
                   float* c) const {
    std::fill_n(c, m * Width(), 0.0f);
    for (int64_t row = begin; row < end; row += Chunk()) {
      const int64_t count = std::min(Chunk(), end - row);
      bool any = false;
      for (int64_t i = 0; i < m; ++i)
        any |= std::any_of(a + i * a_stride + row, a + i * a_stride + row + count, [](float p) { return p != 0; });
      if (!any) continue;
      gemm::MultiplyFewRows(a + row, a_stride, m, Some(kv_head, row, count, count), count, Width(),
                            /*transposed=*/false, 0, Width(), c, Width());
    }
  }

 private:
  static bool IsCodes(const Tensor& part) { return part.GetDType() != DType::kF32; }
  int64_t Width() const { return parts_[0].GetShape()[3]; }
  int64_t KvHeads() const { return parts_[0].GetShape()[1]; }
  // Rows that are multiplied together: 16 KiB, whole vectors.
  int64_t Chunk() const {
    constexpr int64_t kFloats = 4096;
    return std::max<int64_t>(1, kFloats / Width() / simd::kSoftmaxLanes) * simd::kSoftmaxLanes;
  }

  // Rows [first, first + count), zeros behind them up to `padded`: where they stand, or widened.
  const float* Some(int64_t kv_head, int64_t first, int64_t count, int64_t padded) const {
    if (parts_.size() == 1 && !IsCodes(parts_[0]) && count == padded)
      return parts_[0].F32().data() + (kv_head * rows_ + first) * Width();
    float* const some = ThreadScratch<float, AttentionRows>(padded * Width());
    Widen(kv_head, first, count, some);
    std::fill(some + count * Width(), some + padded * Width(), 0.0f);
    return some;
  }

  void Widen(int64_t kv_head, int64_t first, int64_t count, float* to) const {
    const int64_t width = Width();
    int64_t part_begin = 0;
    for (const Tensor& part : parts_) {
      const int64_t rows = part.GetShape()[2];
      const int64_t begin = std::max(first, part_begin), end = std::min(first + count, part_begin + rows);
      if (begin < end) {
        const int64_t from = (kv_head * rows + begin - part_begin) * width;
        const std::span<float> values(to + (begin - first) * width, static_cast<size_t>((end - begin) * width));
        if (IsCodes(part))
          Dequantize(part, *part.Grid(), from, values);
        else
          std::copy_n(part.F32().data() + from, values.size(), values.data());
      }
      part_begin += rows;
    }
  }

  std::vector<Tensor> parts_;
  int64_t rows_ = 0;
};

}  // namespace circlet
