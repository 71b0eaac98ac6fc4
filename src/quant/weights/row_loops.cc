#include "quant/weights/row_loops.h"

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "quant/weights/row_loops.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace circlet::weights::HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;
using Floats = hn::ScalableTag<float>;
using V = hn::Vec<Floats>;
constexpr Floats kD;
constexpr int64_t kLanes = hn::MaxLanes(kD);
constexpr hn::ScalableTag<double> kD64;
constexpr hn::Rebind<float, hn::ScalableTag<double>> kHalf;
constexpr int64_t kDoubles = hn::MaxLanes(kD64);

// sums[0, kLanes) += x.
HWY_INLINE void AddTo(V x, double* sums) {
  HWY_ALIGN float values[kLanes];
  hn::Store(x, kD, values);
  for (int64_t i = 0; i < kLanes; i += kDoubles)
    hn::StoreU(hn::Add(hn::LoadU(kD64, sums + i), hn::PromoteTo(kD64, hn::LoadU(kHalf, values + i))), kD64, sums + i);
}

// The grids of kLanes rows.
struct Grid {
  Grid(const RowGrid& grid, int64_t row)
      : scale(hn::LoadU(kD, grid.scale + row)),
        zero(hn::LoadU(kD, grid.zero_point + row)),
        low(hn::Set(kD, grid.low)),
        high(hn::Set(kD, grid.high)) {}
  // The nearest code of a value in steps of the scale.
  HWY_INLINE V Nearest(V steps) const { return hn::Round(hn::Min(hn::Max(hn::Add(steps, zero), low), high)); }
  HWY_INLINE V Code(V value) const { return Nearest(hn::Div(value, scale)); }
  HWY_INLINE V Value(V code) const { return hn::Mul(scale, hn::Sub(code, zero)); }
  V scale, zero, low, high;
};

void SnapImpl(const RowGrid& rows, int64_t width, int64_t columns, const float* values, const float* target,
              float* codes, float* errors) {
  for (int64_t r = 0; r < width; r += kLanes) {
    const Grid grid(rows, r);
    for (int64_t at = r; at < columns * width; at += width) {
      const V code = grid.Code(hn::LoadU(kD, values + at));
      hn::StoreU(code, kD, codes + at);
      hn::StoreU(hn::Sub(grid.Value(code), hn::LoadU(kD, target + at)), kD, errors + at);
    }
  }
}

void AddRangeLossImpl(const RowGrid& rows, int64_t width, int64_t columns, const float* values, const float* weights,
                      double* loss) {
  for (int64_t r = 0; r < width; r += kLanes) {
    const Grid grid(rows, r);
    const V inverse = hn::Div(hn::Set(kD, 1.0f), grid.scale);
    V sum = hn::Zero(kD);
    for (int64_t i = 0; i < columns; ++i) {
      const V value = hn::LoadU(kD, values + i * width + r);
      const V error = hn::Sub(grid.Value(grid.Nearest(hn::Mul(value, inverse))), value);
      const V weight = hn::Set(kD, weights == nullptr ? 1.0f : weights[i]);
      sum = hn::MulAdd(hn::Mul(weight, error), error, sum);
    }
    AddTo(sum, loss + r);
  }
}

void AddDotsImpl(int64_t width, int64_t columns, const float* a, int64_t a_stride, const float* b, double* sums) {
  for (int64_t r = 0; r < width; r += kLanes) {
    V sum = hn::Zero(kD);
    for (int64_t i = 0; i < columns; ++i)
      sum = hn::MulAdd(hn::LoadU(kD, a + i * a_stride + r), hn::LoadU(kD, b + i * width + r), sum);
    AddTo(sum, sums + r);
  }
}

// Row i of L times the errors of the columns before it, for the rows from r on. Two sums, so that one need not wait for
// the other.
HWY_INLINE V Carried(const FactorBlock& block, int64_t i, int64_t width, int64_t r, const float* errors) {
  const float* const row = block.factor + i * block.n;
  V even = hn::LoadU(kD, block.carried + i * block.stride + r), odd = hn::Zero(kD);
  int64_t k = 0;
  for (; k + 2 <= i; k += 2) {
    even = hn::MulAdd(hn::Set(kD, row[k]), hn::LoadU(kD, errors + k * width + r), even);
    odd = hn::MulAdd(hn::Set(kD, row[k + 1]), hn::LoadU(kD, errors + (k + 1) * width + r), odd);
  }
  if (k < i) even = hn::MulAdd(hn::Set(kD, row[k]), hn::LoadU(kD, errors + k * width + r), even);
  return hn::Add(even, odd);
}

void CompensateBlockImpl(const FactorBlock& block, const RowGrid& rows, int64_t width, const float* target,
                         float* codes, float* errors, float* lefts, double* loss) {
  for (int64_t r = 0; r < width; r += kLanes) {
    const Grid grid(rows, r);
    V sum = hn::Zero(kD);
    for (int64_t i = 0; i < block.count; ++i) {
      const V carried = Carried(block, i, width, r, errors), wanted = hn::LoadU(kD, target + i * width + r);
      const V pivot = hn::Set(kD, block.factor[i * block.n + i]);
      const V code = grid.Code(hn::Sub(wanted, hn::Div(carried, pivot)));
      const V error = hn::Sub(grid.Value(code), wanted);
      hn::StoreU(code, kD, codes + i * width + r);
      hn::StoreU(error, kD, errors + i * width + r);
      const V left = hn::MulAdd(pivot, error, carried);
      hn::StoreU(left, kD, lefts + i * width + r);
      sum = hn::MulAdd(left, left, sum);
    }
    AddTo(sum, loss + r);
  }
}

void AddLossImpl(const FactorBlock& block, int64_t width, const float* errors, float* lefts, double* loss) {
  for (int64_t r = 0; r < width; r += kLanes) {
    V sum = hn::Zero(kD);
    for (int64_t i = 0; i < block.count; ++i) {
      const V pivot = hn::Set(kD, block.factor[i * block.n + i]);
      const V left = hn::MulAdd(pivot, hn::LoadU(kD, errors + i * width + r), Carried(block, i, width, r, errors));
      hn::StoreU(left, kD, lefts + i * width + r);
      sum = hn::MulAdd(left, left, sum);
    }
    AddTo(sum, loss + r);
  }
}

void AddTransposedImpl(const FactorBlock& block, int64_t width, const float* left, float* gradient, int64_t stride) {
  for (int64_t r = 0; r < width; r += kLanes)
    for (int64_t i = 0; i < block.count; ++i) {
      V sum = hn::LoadU(kD, gradient + i * stride + r);
      for (int64_t k = i; k < block.count; ++k)
        sum = hn::MulAdd(hn::Set(kD, block.factor[k * block.n + i]), hn::LoadU(kD, left + k * width + r), sum);
      hn::StoreU(sum, kD, gradient + i * stride + r);
    }
}

void SubtractCorrectionImpl(int64_t width, int64_t columns, float added, const float* errors, const float* target,
                            const float* weight, const float* change, double* sums) {
  const V factor = hn::Set(kD, added);
  for (int64_t r = 0; r < width; r += kLanes) {
    V sum = hn::Zero(kD);
    for (int64_t at = r; at < columns * width; at += width) {
      const V moved = hn::Sub(hn::LoadU(kD, target + at), hn::LoadU(kD, weight + at));
      const V error = hn::LoadU(kD, errors + at);
      const V other = hn::MulAdd(factor, hn::Add(moved, hn::Add(error, error)), hn::LoadU(kD, change + at));
      sum = hn::NegMulAdd(moved, other, sum);
    }
    AddTo(sum, sums + r);
  }
}

bool DescendBlockImpl(const float* damped, int64_t n, int64_t count, const RowGrid& rows, int64_t width,
                      float* gradient, const float* target, float* codes, float* errors, float* steps, double* loss) {
  bool changed = false;
  for (int64_t r = 0; r < width; r += kLanes) {
    const Grid grid(rows, r);
    V gained = hn::Zero(kD);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t at = i * width + r;
      const float* const row = damped + i * n;
      const V slope = hn::LoadU(kD, gradient + at), curvature = hn::Set(kD, row[i]);
      const V wanted = hn::LoadU(kD, target + at), error = hn::LoadU(kD, errors + at), old = hn::LoadU(kD, codes + at);
      const V code = grid.Code(hn::Sub(hn::Add(wanted, error), hn::Div(slope, curvature)));
      const V step = hn::Mul(hn::Sub(code, old), grid.scale);
      hn::StoreU(step, kD, steps + at);
      if (hn::AllTrue(kD, hn::Eq(code, old))) continue;
      changed = true;
      hn::StoreU(code, kD, codes + at);
      hn::StoreU(hn::Sub(grid.Value(code), wanted), kD, errors + at);
      // 2 step slope + curvature step^2.
      gained = hn::MulAdd(step, hn::MulAdd(curvature, step, hn::Add(slope, slope)), gained);
      for (int64_t k = i + 1; k < count; ++k) {
        float* const other = gradient + k * width + r;
        hn::StoreU(hn::MulAdd(hn::Set(kD, row[k]), step, hn::LoadU(kD, other)), kD, other);
      }
    }
    AddTo(gained, loss + r);
  }
  return changed;
}

void AddRowsImpl(std::span<const Change> changes, const float* matrix, int64_t n, int64_t count, float* sums) {
  constexpr int64_t kVectors = 4;
  int64_t j = 0;
  for (; j + kVectors * kLanes <= count; j += kVectors * kLanes) {
    V sum[kVectors];
    for (int64_t v = 0; v < kVectors; ++v) sum[v] = hn::LoadU(kD, sums + j + v * kLanes);
    for (const Change& change : changes) {
      const float* const row = matrix + change.column * n + j;
      const V step = hn::Set(kD, change.step);
      for (int64_t v = 0; v < kVectors; ++v) sum[v] = hn::MulAdd(step, hn::LoadU(kD, row + v * kLanes), sum[v]);
    }
    for (int64_t v = 0; v < kVectors; ++v) hn::StoreU(sum[v], kD, sums + j + v * kLanes);
  }
  // The rest lane by lane with the same instructions, so that no bit depends on where columns are cut.
  const hn::CappedTag<float, 1> one;
  for (; j < count; ++j) {
    auto sum = hn::LoadU(one, sums + j);
    for (const Change& change : changes)
      sum = hn::MulAdd(hn::Set(one, change.step), hn::LoadU(one, matrix + change.column * n + j), sum);
    hn::StoreU(sum, one, sums + j);
  }
}

void AddRoundedImpl(const float* values, int64_t count, double factor, int64_t* sums) {
  const hn::RebindToSigned<decltype(kD64)> integers;
  const auto factors = hn::Set(kD64, factor);
  const auto rounded = [&](auto x) HWY_ATTR { return hn::ConvertTo(integers, hn::Round(hn::Mul(x, factors))); };
  int64_t i = 0;
  for (; i + kDoubles <= count; i += kDoubles)
    hn::StoreU(hn::Add(hn::LoadU(integers, sums + i), rounded(hn::PromoteTo(kD64, hn::LoadU(kHalf, values + i)))),
               integers, sums + i);
  for (; i < count; ++i) sums[i] += hn::GetLane(rounded(hn::Set(kD64, static_cast<double>(values[i]))));
}

}  // namespace circlet::weights::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE
namespace circlet::weights {

HWY_EXPORT(SnapImpl);
HWY_EXPORT(AddRangeLossImpl);
HWY_EXPORT(AddDotsImpl);
HWY_EXPORT(CompensateBlockImpl);
HWY_EXPORT(AddLossImpl);
HWY_EXPORT(AddTransposedImpl);
HWY_EXPORT(SubtractCorrectionImpl);
HWY_EXPORT(DescendBlockImpl);
HWY_EXPORT(AddRowsImpl);
HWY_EXPORT(AddRoundedImpl);

void Snap(const RowGrid& grid, int64_t width, int64_t columns, const float* values, const float* target, float* codes,
          float* errors) {
  HWY_DYNAMIC_DISPATCH(SnapImpl)(grid, width, columns, values, target, codes, errors);
}
void AddRangeLoss(const RowGrid& grid, int64_t width, int64_t columns, const float* values, const float* weights,
                  double* loss) {
  HWY_DYNAMIC_DISPATCH(AddRangeLossImpl)(grid, width, columns, values, weights, loss);
}
void AddDots(int64_t width, int64_t columns, const float* a, int64_t a_stride, const float* b, double* sums) {
  HWY_DYNAMIC_DISPATCH(AddDotsImpl)(width, columns, a, a_stride, b, sums);
}
void CompensateBlock(const FactorBlock& block, const RowGrid& grid, int64_t width, const float* target, float* codes,
                     float* errors, float* left, double* loss) {
  HWY_DYNAMIC_DISPATCH(CompensateBlockImpl)(block, grid, width, target, codes, errors, left, loss);
}
void AddLoss(const FactorBlock& block, int64_t width, const float* errors, float* left, double* loss) {
  HWY_DYNAMIC_DISPATCH(AddLossImpl)(block, width, errors, left, loss);
}
void AddTransposed(const FactorBlock& block, int64_t width, const float* left, float* gradient, int64_t stride) {
  HWY_DYNAMIC_DISPATCH(AddTransposedImpl)(block, width, left, gradient, stride);
}
void SubtractCorrection(int64_t width, int64_t columns, float added, const float* errors, const float* target,
                        const float* weight, const float* change, double* sums) {
  HWY_DYNAMIC_DISPATCH(SubtractCorrectionImpl)(width, columns, added, errors, target, weight, change, sums);
}
bool DescendBlock(const float* damped, int64_t n, int64_t count, const RowGrid& grid, int64_t width, float* gradient,
                  const float* target, float* codes, float* errors, float* steps, double* loss) {
  return HWY_DYNAMIC_DISPATCH(DescendBlockImpl)(damped, n, count, grid, width, gradient, target, codes, errors, steps,
                                                loss);
}
void AddRows(std::span<const Change> changes, const float* matrix, int64_t n, int64_t count, float* sums) {
  HWY_DYNAMIC_DISPATCH(AddRowsImpl)(changes, matrix, n, count, sums);
}
void AddRounded(const float* values, int64_t count, double factor, int64_t* sums) {
  HWY_DYNAMIC_DISPATCH(AddRoundedImpl)(values, count, factor, sums);
}

}  // namespace circlet::weights
#endif  // HWY_ONCE
