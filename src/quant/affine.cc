#include "circlet/quant/affine.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/codes.h"
#include "ops/simd.h"

namespace circlet {
namespace {

// Large enough that starting a piece costs nothing beside it, small enough to share a 256 x 1536 projection.
constexpr int64_t kPieceElements = int64_t{1} << 16;

struct Grid {
  float scale;
  int32_t zero_point;
};

Grid SymmetricGrid(float min, float max, float qmax) {
  const float reach = std::max(std::abs(min), std::abs(max));
  return {std::max(reach / qmax, kScaleFloor), 0};
}

Grid AsymmetricGrid(float min, float max, float qmin, float qmax) {
  float range = max - min;
  if (min > 0) range = max;
  if (max < 0) range = -min;
  const float scale = std::max(range / (qmax - qmin), kScaleFloor);
  const float zero_point = std::clamp(std::nearbyint(qmin - min / scale), qmin, qmax);
  return {scale, static_cast<int32_t>(zero_point)};
}

// A weight as a matrix: one row for each index of axis 0. Hands out rows as float32; of codes with a grid their values.
class Rows {
 public:
  explicit Rows(const Tensor& tensor) : tensor_(tensor) {
    const int64_t elements = tensor.Elements();
    count_ = tensor.GetShape().Rank() > 1 ? tensor.GetShape()[0] : 1;
    width_ = count_ == 0 ? 0 : elements / count_;
  }

  int64_t Count() const { return count_; }
  int64_t Width() const { return width_; }
  int64_t Grain() const { return std::max<int64_t>(1, kPieceElements / std::max<int64_t>(1, width_)); }

  // Calls run(row, column, count) for the parts of rows that make up the elements [begin, end).
  template <typename Run>
  void ForRuns(int64_t begin, int64_t end, const Run& run) const {
    while (begin < end) {
      const int64_t row = begin / width_, column = begin % width_;
      const int64_t count = std::min(width_ - column, end - begin);
      run(row, column, count);
      begin += count;
    }
  }

  // `count` elements of a row, in place where they are float32 already, else in `buffer`.
  const float* Get(int64_t row, int64_t column, int64_t count, std::vector<float>& buffer) const {
    if (IsInteger(tensor_.GetDType())) {
      buffer.resize(count);
      Dequantize(tensor_, *tensor_.Grid(), row * width_ + column, buffer);
      return buffer.data();
    }
    const std::byte* from = At(row, column);
    const auto address = reinterpret_cast<uintptr_t>(from);
    if (tensor_.GetDType() == DType::kF32 && address % alignof(float) == 0) return reinterpret_cast<const float*>(from);
    buffer.resize(count);
    CopyTo(from, count, buffer.data());
    return buffer.data();
  }
  const float* Get(int64_t row, std::vector<float>& buffer) const { return Get(row, 0, width_, buffer); }

  void Copy(int64_t row, float* out) const {
    if (tensor_.Grid() == nullptr) return CopyTo(At(row, 0), width_, out);
    Dequantize(tensor_, *tensor_.Grid(), row * width_, {out, static_cast<size_t>(width_)});
  }

 private:
  const std::byte* At(int64_t row, int64_t column) const {
    return tensor_.Raw() + (row * width_ + column) * BitWidth(tensor_.GetDType()) / 8;
  }

  void CopyTo(const std::byte* from, int64_t count, float* out) const {
    const auto address = reinterpret_cast<uintptr_t>(from);
    if (tensor_.GetDType() == DType::kF32) {
      std::memcpy(out, from, static_cast<size_t>(count) * sizeof(float));
    } else if (tensor_.GetDType() == DType::kBF16 && address % alignof(uint16_t) == 0) {
      simd::BF16ToF32(reinterpret_cast<const uint16_t*>(from), count, out);
    } else {
      const Tensor view({tensor_.GetDType(), {count}}, const_cast<std::byte*>(from), nullptr);
      const Tensor converted = ToF32(view);
      std::memcpy(out, converted.Raw(), converted.Bytes());
    }
  }

  const Tensor& tensor_;
  int64_t count_, width_;
};

void CheckGrids(const QParams& qparams, int64_t rows) {
  CIRCLET_CHECK(qparams.axis <= 0, "channel axis {} of a weight", qparams.axis);
  const size_t grids = qparams.PerChannel() ? rows : 1;
  CIRCLET_CHECK(qparams.scale.size() == grids && qparams.zero_point.size() == grids,
                "{} scales, {} zero points, {} grids", qparams.scale.size(), qparams.zero_point.size(), grids);
}

simd::Grid GridOf(const QParams& qparams, int64_t row, Rounding rounding) {
  const size_t index = qparams.PerChannel() ? row : 0;
  const CodeRange codes = CodesOf(qparams.dtype);
  return {qparams.scale[index], qparams.zero_point[index], static_cast<int32_t>(codes.min),
          static_cast<int32_t>(codes.max), rounding};
}

// Rank 1 has a grid for each element when it has an axis at all; such a weight is a matrix of width 1.
Tensor AsMatrix(const Tensor& weight, int axis) {
  if (weight.GetShape().Rank() == 1 && axis == 0) return weight.Reshaped({weight.Elements(), 1});
  return weight;
}

}  // namespace

QParams ComputeQParams(float min, float max, DType dtype, bool symmetric) {
  const CodeRange codes = CodesOf(dtype);
  const auto qmin = static_cast<float>(codes.min);
  const auto qmax = static_cast<float>(codes.max);
  Grid grid;
  if (symmetric) {
    grid = SymmetricGrid(min, max, qmax);
  } else if (std::abs(max - min) < kScaleFloor) {
    const float value = min;
    if (std::abs(value) <= kScaleFloor) {
      grid = {1.0f, 0};
    } else {
      grid = {std::abs(value), value > 0 ? 0 : static_cast<int32_t>(codes.max)};
    }
  } else {
    grid = AsymmetricGrid(min, max, qmin, qmax);
  }
  return {dtype, -1, {grid.scale}, {grid.zero_point}};
}

QParams ComputeQParams(std::span<const float> min, std::span<const float> max, DType dtype, bool symmetric, int axis) {
  return ComputeQParams(min, max, dtype, CodesOf(dtype), symmetric, axis);
}

QParams ComputeQParams(std::span<const float> min, std::span<const float> max, DType dtype, CodeRange codes,
                       bool symmetric, int axis) {
  CIRCLET_CHECK(min.size() == max.size() && axis >= 0, "{} minima, {} maxima, axis {}", min.size(), max.size(), axis);
  const auto qmin = static_cast<float>(codes.min);
  const auto qmax = static_cast<float>(codes.max);
  QParams qparams{dtype, axis, std::vector<float>(min.size()), std::vector<int32_t>(min.size())};
  for (size_t c = 0; c < min.size(); ++c) {
    const Grid grid = symmetric ? SymmetricGrid(min[c], max[c], qmax) : AsymmetricGrid(min[c], max[c], qmin, qmax);
    qparams.scale[c] = grid.scale;
    qparams.zero_point[c] = grid.zero_point;
  }
  return qparams;
}

void VisitWeight(const Tensor& weight, const std::function<void(std::span<const float> values, int64_t first)>& visit) {
  const Rows rows(weight);
  ParallelFor(weight.Elements(), kPieceElements, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    rows.ForRuns(begin, end, [&](int64_t row, int64_t column, int64_t count) {
      visit({rows.Get(row, column, count, buffer), static_cast<size_t>(count)}, row * rows.Width() + column);
    });
  });
}

WeightRange RangeOfWeight(const Tensor& weight, int axis) {
  CIRCLET_CHECK(axis <= 0, "channel axis {} of a weight", axis);
  const Tensor matrix = AsMatrix(weight, axis);
  const Rows rows(matrix);
  WeightRange range{std::vector<float>(rows.Count()), std::vector<float>(rows.Count())};
  constexpr int64_t kNone = std::numeric_limits<int64_t>::max();
  std::atomic<int64_t> first_bad_row{kNone};
  ParallelFor(rows.Count(), rows.Grain(), [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    for (int64_t row = begin; row < end; ++row) {
      const simd::Range found = simd::MinMax(rows.Get(row, buffer), rows.Width());
      range.min[row] = found.min;
      range.max[row] = found.max;
      if (found.finite) continue;
      int64_t seen = first_bad_row.load();
      while (row < seen && !first_bad_row.compare_exchange_weak(seen, row)) {
      }
    }
  });
  if (const int64_t row = first_bad_row.load(); row != kNone) {
    std::vector<float> buffer;
    const float* values = rows.Get(row, buffer);
    const float* bad = std::find_if_not(values, values + rows.Width(), [](float x) { return std::isfinite(x); });
    Fail("row {}, column {} of the weight is {}; a grid needs finite weights: is the checkpoint damaged?", row,
         bad - values, *bad);
  }
  if (axis < 0 && rows.Count() > 0) {
    range.min = {*std::min_element(range.min.begin(), range.min.end())};
    range.max = {*std::max_element(range.max.begin(), range.max.end())};
  }
  return range;
}

void RequireWeightType(DType dtype) {
  if (std::ranges::find(kGridTypes, dtype) == kGridTypes.end())
    Fail("weights cannot be stored as {}; choose {}", Name(dtype), kGridTypeNames);
}

QuantizedWeight QuantizeWeight(const Tensor& weight, const QParams& qparams, Rounding rounding) {
  RequireWeightType(qparams.dtype);
  QuantizedWeight result{qparams, Tensor::Uninitialized({qparams.dtype, weight.GetShape()})};
  QuantizeWeightBytes(weight, qparams, rounding, 0, {result.codes.Raw(), static_cast<size_t>(result.codes.Bytes())});
  return result;
}

Tensor SignedWeight(const Tensor& codes) {
  if (codes.GetDType() == DType::kI8) return codes;
  QParams grid = *codes.Grid();
  const Tensor bytes = Tensor::Uninitialized({DType::kI8, codes.GetShape()});
  SignedCodes(codes, 0, bytes.As<int8_t>());
  if (grid.dtype == DType::kU8)
    for (int32_t& zero_point : grid.zero_point) zero_point -= 128;
  grid.dtype = DType::kI8;
  return bytes.WithGrid(std::make_shared<QParams>(std::move(grid)));
}

void QuantizeWeightBytes(const Tensor& weight, const QParams& qparams, Rounding rounding, int64_t first,
                         std::span<std::byte> out) {
  RequireWeightType(qparams.dtype);
  const Tensor matrix = AsMatrix(weight, qparams.axis);
  const Rows rows(matrix);
  CheckGrids(qparams, rows.Count());
  const int64_t bits = BitWidth(qparams.dtype), origin = first * 8 / bits;
  CIRCLET_CHECK(first * 8 % bits == 0, "byte {} is inside a code of {}", first, Name(qparams.dtype));
  const int64_t count = std::min(static_cast<int64_t>(out.size()) * 8 / bits, weight.Elements() - origin);
  // Pieces of even size never share a byte of packed 4-bit codes.
  ParallelFor(count, kPieceElements, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer;
    std::vector<int16_t> codes;
    rows.ForRuns(origin + begin, origin + end, [&](int64_t row, int64_t column, int64_t length) {
      const int64_t at = row * rows.Width() + column - origin;
      codes.resize(static_cast<size_t>(length));
      simd::Quantize(rows.Get(row, column, length, buffer), length, GridOf(qparams, row, rounding), codes.data());
      StoreCodes(codes.data(), length, at, qparams.dtype, out.data());
    });
  });
}

Tensor FakeQuantizeWeight(const Tensor& weight, const QParams& qparams, Rounding rounding) {
  const Tensor matrix = AsMatrix(weight, qparams.axis);
  const Rows rows(matrix);
  CheckGrids(qparams, rows.Count());
  const Tensor result = Tensor::Uninitialized({DType::kF32, weight.GetShape()});
  auto* out = reinterpret_cast<float*>(result.Raw());
  ParallelFor(rows.Count(), rows.Grain(), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      rows.Copy(row, out + row * rows.Width());
      simd::Snap(out + row * rows.Width(), rows.Width(), GridOf(qparams, row, rounding));
    }
  });
  return result;
}

float FakeQuantize(float x, float scale, int32_t zero_point, DType dtype, Rounding rounding) {
  const CodeRange codes = CodesOf(dtype);
  const float steps =
      rounding == Rounding::kHalfEvenReciprocal ? std::nearbyint(x * (1.0f / scale)) : std::round(x / scale);
  const auto low = static_cast<float>(codes.min - zero_point);
  const auto high = static_cast<float>(codes.max - zero_point);
  return std::clamp(steps, low, high) * scale;
}

}  // namespace circlet
