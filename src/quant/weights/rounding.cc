#include "quant/weights/rounding.h"

#include <algorithm>
#include <cmath>
#include <numeric>
#include <optional>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/aligned.h"
#include "ops/codes.h"
#include "ops/gemm.h"
#include "quant/weights/factor.h"

namespace circlet::weights {
namespace {

constexpr int64_t kFloat64Columns = 4096;  // up to here factors are computed in float64
constexpr int64_t kBlock = 32;             // columns whose errors reach each other one by one, the rest by a product

// ---- Factors ------------------------------------------------------------------------------------------------------

// The damped moment in `order` as T, row-major.
template <typename T>
std::vector<T> DampedMatrix(const Moment& moment, const std::vector<int32_t>& order, double added) {
  const auto n = static_cast<int64_t>(order.size());
  std::vector<T> matrix(static_cast<size_t>(n * n));
  ParallelFor(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      for (int64_t j = 0; j < n; ++j)
        matrix[i * n + j] = static_cast<T>(moment.At(order[i], order[j]) + (i == j ? added : 0));
  });
  return matrix;
}

double MeanDiagonal(const Moment& moment) {
  double sum = 0;
  for (int64_t j = 0; j < moment.Columns(); ++j) sum += moment.At(j, j);
  return sum / static_cast<double>(moment.Columns());
}

// What stands on the diagonal for `damping`; 1 where no input was ever different from 0.
double Added(double damping, double mean) { return mean > 0 ? damping * mean : 1; }

// Calls make(damping), which tells whether the matrix was positive, with ten times more damping until it was.
template <typename Make>
double UntilPositive(double damping, const Make& make) {
  for (int tries = 0; tries < 8; ++tries) {
    if (make(damping)) return damping;
    damping = std::max(10 * damping, 1e-6);
  }
  Fail("second moments that are no positive matrix even with damping {}; are the activations finite?", damping);
}

// ---- A group of rows ----------------------------------------------------------------------------------------------

// Rows of the matrix as panels (gemm.h): value (column i, row r) at data[(r / width) * n * width + i * width + r %
// width], with columns in the metric's order.
class Panels {
 public:
  Panels(int64_t columns, int64_t panels)
      : columns_(columns),
        width_(gemm::PanelColumns()),
        panels_(panels),
        data_(Aligned<float>(columns * width_ * panels)) {
    std::fill_n(data_.get(), columns * width_ * panels, 0.0f);
  }
  float* At(int64_t panel, int64_t column) { return data_.get() + (panel * columns_ + column) * width_; }
  float& Value(int64_t column, int64_t row) { return At(row / width_, column)[row % width_]; }
  gemm::Panels Operand() { return {data_.get(), columns_, panels_ * width_}; }
  int64_t Width() const { return width_; }
  int64_t Count() const { return panels_; }

 private:
  int64_t columns_, width_, panels_;
  hwy::AlignedFreeUniquePtr<float[]> data_;
};

// The grids of a group's rows; zero points as floats, for the loops.
struct RowGrids {
  std::vector<float> scale, zero_point;
};

// Rounds some rows of one matrix. All loops over rows are the innermost: rows do not know of each other.
class RowGroup {
 public:
  RowGroup(const Metric& metric, const RoundingOptions& options, int64_t panels)
      : metric_(metric),
        n_(metric.Columns()),
        rows_(panels * gemm::PanelColumns()),
        low_(static_cast<float>(options.Codes().min)),
        high_(static_cast<float>(options.Codes().max)),
        target_(n_, panels),
        codes_(n_, panels),
        errors_(n_, panels),
        products_(Aligned<float>(kBlock * rows_)) {}

  Panels& Target() { return target_; }
  Panels& Codes() { return codes_; }
  int64_t Rows() const { return rows_; }

  // Every column to the nearest code.
  void RoundToNearest(const RowGrids& grids) {
    ForRows([&](int64_t panel, int64_t column, int64_t first) {
      Snap(grids, first, target_.At(panel, column), target_.At(panel, column), codes_.At(panel, column),
           errors_.At(panel, column));
    });
  }

  // The errors of the codes as they stand, now from `values`.
  void ErrorsFrom(Panels& values, const RowGrids& grids) {
    ForRows([&](int64_t panel, int64_t column, int64_t first) {
      const float *const codes = codes_.At(panel, column), *const value = values.At(panel, column);
      float* const errors = errors_.At(panel, column);
      for (int64_t r = 0; r < target_.Width(); ++r)
        errors[r] = grids.scale[first + r] * (codes[r] - grids.zero_point[first + r]) - value[r];
    });
  }

  // sum_j e_j v_j by row.
  std::vector<double> ErrorsTimes(Panels& values) {
    std::vector<double> sums(static_cast<size_t>(rows_));
    ForRows([&](int64_t panel, int64_t column, int64_t first) {
      const float *const errors = errors_.At(panel, column), *const value = values.At(panel, column);
      for (int64_t r = 0; r < target_.Width(); ++r) sums[first + r] += static_cast<double>(errors[r]) * value[r];
    });
    return sums;
  }

  // Columns in order, each given the errors of those before. Returns the losses.
  std::vector<double> Compensate(const RowGrids& grids) {
    std::vector<double> loss(static_cast<size_t>(rows_));
    const int64_t width = target_.Width();
    std::vector<float> wanted(static_cast<size_t>(width));
    ForBlocks(metric_.Factor(), true, [&](int64_t begin, int64_t end, int64_t panel) {
      const int64_t first = panel * width;
      for (int64_t i = begin; i < end; ++i) {
        float* const carried = InBlock(i, begin, panel);
        const float pivot = metric_.Factor()[i * n_ + i];
        const float *const target = target_.At(panel, i), *const errors = errors_.At(panel, i);
        for (int64_t r = 0; r < width; ++r) wanted[r] = target[r] - carried[r] / pivot;
        Snap(grids, first, wanted.data(), target, codes_.At(panel, i), errors_.At(panel, i));
        for (int64_t r = 0; r < width; ++r) loss[first + r] += Square(carried[r] + pivot * errors[r]);
      }
    });
    return loss;
  }

  // One pass of coordinate descent; subtracts from the losses what it gains. Returns whether a code has changed.
  bool Descend(const RowGrids& grids, std::vector<double>& loss) {
    const int64_t width = target_.Width();
    std::vector<float> wanted(static_cast<size_t>(width)), steps(static_cast<size_t>(width));
    bool changed = false;
    ForBlocks(metric_.Damped(), false, [&](int64_t begin, int64_t end, int64_t panel) {
      const int64_t first = panel * width;
      for (int64_t i = begin; i < end; ++i) {
        const float* const row = metric_.Damped() + i * n_;
        const float* const gradient = products_.get() + (i - begin) * rows_ + first;
        const float* const target = target_.At(panel, i);
        float *const errors = errors_.At(panel, i), *const codes = codes_.At(panel, i);
        for (int64_t r = 0; r < width; ++r) {
          wanted[r] = target[r] + errors[r] - gradient[r] / row[i];
          steps[r] = codes[r];
        }
        Snap(grids, first, wanted.data(), target, codes, errors);
        bool any = false;
        for (int64_t r = 0; r < width; ++r) {
          steps[r] = (codes[r] - steps[r]) * grids.scale[first + r];
          any = any || steps[r] != 0;
          loss[first + r] += 2.0 * steps[r] * gradient[r] + static_cast<double>(row[i]) * steps[r] * steps[r];
        }
        if (!any) continue;
        changed = true;
        for (int64_t k = i + 1; k < end; ++k) {
          float* const other = products_.get() + (k - begin) * rows_ + first;
          for (int64_t r = 0; r < width; ++r) other[r] += row[k] * steps[r];
        }
      }
    });
    return changed;
  }

  // The scale that is best for each row's codes; the errors follow.
  void Refit(RowGrids& grids, std::vector<double>& loss) {
    const int64_t width = target_.Width();
    ForRows([&](int64_t panel, int64_t column, int64_t first) {
      float* const steps = errors_.At(panel, column);
      for (int64_t r = 0; r < width; ++r) steps[r] = codes_.At(panel, column)[r] - grids.zero_point[first + r];
    });
    std::vector<double> with_target(static_cast<size_t>(rows_)), with_itself(static_cast<size_t>(rows_));
    ForBlocks(metric_.Damped(), false, [&](int64_t begin, int64_t end, int64_t panel) {
      const int64_t first = panel * width;
      for (int64_t i = begin; i < end; ++i)
        for (int64_t r = 0; r < width; ++r) {
          const double product = products_[(i - begin) * rows_ + first + r];
          with_target[first + r] += product * target_.At(panel, i)[r];
          with_itself[first + r] += product * errors_.At(panel, i)[r];
        }
    });
    for (int64_t r = 0; r < rows_; ++r) {
      const auto best = static_cast<float>(with_target[r] / with_itself[r]);
      if (!(with_itself[r] > 0) || !(best > kScaleFloor) || !std::isfinite(best)) continue;
      loss[r] -= Square(with_target[r] - grids.scale[r] * with_itself[r]) / with_itself[r];
      grids.scale[r] = best;
    }
    ForRows([&](int64_t panel, int64_t column, int64_t first) {
      float* const errors = errors_.At(panel, column);
      for (int64_t r = 0; r < width; ++r) errors[r] = errors[r] * grids.scale[first + r] - target_.At(panel, column)[r];
    });
  }

  // The losses of the errors as they stand.
  std::vector<double> Loss() {
    std::vector<double> loss(static_cast<size_t>(rows_));
    const int64_t width = target_.Width();
    ForBlocks(metric_.Factor(), true, [&](int64_t begin, int64_t end, int64_t panel) {
      for (int64_t i = begin; i < end; ++i) {
        const float* const carried = InBlock(i, begin, panel);
        const float pivot = metric_.Factor()[i * n_ + i];
        for (int64_t r = 0; r < width; ++r)
          loss[panel * width + r] += Square(carried[r] + pivot * errors_.At(panel, i)[r]);
      }
    });
    return loss;
  }

  // sum_j d_j (W_j - Q_j)^2 with Q to the nearest.
  std::vector<double> DiagonalLoss(const RowGrids& grids, Panels& weight, const float* diagonal) {
    std::vector<double> loss(static_cast<size_t>(rows_));
    const int64_t width = weight.Width();
    std::vector<float> codes(static_cast<size_t>(width)), errors(static_cast<size_t>(width)),
        sums(static_cast<size_t>(rows_));
    for (int64_t panel = 0; panel < weight.Count(); ++panel) {
      const int64_t first = panel * width;
      for (int64_t begin = 0; begin < n_; begin += kBlock) {
        std::fill(sums.begin(), sums.end(), 0.0f);
        for (int64_t i = begin; i < std::min(n_, begin + kBlock); ++i) {
          Snap(grids, first, weight.At(panel, i), weight.At(panel, i), codes.data(), errors.data());
          const float factor = diagonal == nullptr ? 1.0f : diagonal[i];
          for (int64_t r = 0; r < width; ++r) sums[r] += factor * errors[r] * errors[r];
        }
        for (int64_t r = 0; r < width; ++r) loss[first + r] += sums[r];
      }
    }
    return loss;
  }

 private:
  static double Square(double x) { return x * x; }

  // The nearest codes of `values`, and how far they lie from `target`.
  void Snap(const RowGrids& grids, int64_t first, const float* values, const float* target, float* codes,
            float* errors) const {
    const float *const scale = grids.scale.data() + first, *const zero = grids.zero_point.data() + first;
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it loses its fraction, to the nearest even
    for (int64_t r = 0; r < target_.Width(); ++r) {
      const float code = std::min(std::max(values[r] / scale[r] + zero[r], low_), high_);
      codes[r] = (code + kRound) - kRound;
      errors[r] = scale[r] * (codes[r] - zero[r]) - target[r];
    }
  }

  template <typename Body>
  void ForRows(const Body& body) {
    for (int64_t panel = 0; panel < target_.Count(); ++panel)
      for (int64_t column = 0; column < n_; ++column) body(panel, column, panel * target_.Width());
  }

  // For blocks of columns in order: products_ = the block's rows of `matrix` times the errors (of the columns before
  // the block when `before`, else of all), then body(begin, end, panel).
  template <typename Body>
  void ForBlocks(const float* matrix, bool before, const Body& body) {
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      const int64_t end = std::min(n_, begin + kBlock), steps = before ? begin : n_;
      if (steps == 0)
        std::fill_n(products_.get(), (end - begin) * rows_, 0.0f);
      else
        gemm::Multiply(matrix + begin * n_, n_, end - begin, errors_.Operand(), {0, errors_.Count(), 0, steps},
                       products_.get(), rows_);
      for (int64_t panel = 0; panel < errors_.Count(); ++panel) body(begin, end, panel);
    }
  }

  // Row i of L times the errors of all columns before it, for one panel.
  float* InBlock(int64_t i, int64_t begin, int64_t panel) {
    const int64_t width = target_.Width();
    float* const sums = products_.get() + (i - begin) * rows_ + panel * width;
    const float* const row = metric_.Factor() + i * n_;
    for (int64_t k = begin; k < i; ++k) {
      const float* const errors = errors_.At(panel, k);
      for (int64_t r = 0; r < width; ++r) sums[r] += row[k] * errors[r];
    }
    return sums;
  }

  const Metric& metric_;
  int64_t n_, rows_;
  float low_, high_;
  Panels target_, codes_, errors_;
  hwy::AlignedFreeUniquePtr<float[]> products_;  // [kBlock, rows_]
};

// ---- A matrix -----------------------------------------------------------------------------------------------------

RowGrids GridsOf(const RoundingOptions& options, const std::vector<float>& low, const std::vector<float>& high,
                 float factor) {
  std::vector<float> min(low), max(high);
  for (float& value : min) value *= factor;
  for (float& value : max) value *= factor;
  const QParams grid = ComputeQParams(min, max, options.dtype, options.Codes(), options.symmetric, 0);
  return {grid.scale, {grid.zero_point.begin(), grid.zero_point.end()}};
}

float FactorAt(const RoundingOptions& options, int index, int count) {
  if (count <= 1) return 1;
  const double step = (1 - options.method.lowest_factor) / (count - 1);
  return static_cast<float>(index == count - 1 ? 1 : options.method.lowest_factor + index * step);
}

// Where `better` says so, row r of `to` becomes that of `from`.
void TakeRows(RowGrids& to, const RowGrids& from, const std::vector<bool>& better) {
  for (size_t r = 0; r < better.size(); ++r) {
    if (!better[r]) continue;
    to.scale[r] = from.scale[r];
    to.zero_point[r] = from.zero_point[r];
  }
}

// Codes of a group in the order of the matrix, with their grids and losses.
struct GroupResult {
  std::vector<int16_t> codes;  // [rows, columns]
  RowGrids grids;
  std::vector<double> loss;

  // Row r becomes that of `other`.
  void Take(int64_t r, const GroupResult& other, int64_t columns) {
    std::copy_n(other.codes.begin() + r * columns, columns, codes.begin() + r * columns);
    grids.scale[r] = other.grids.scale[r];
    grids.zero_point[r] = other.grids.zero_point[r];
    loss[r] = other.loss[r];
  }
};

class MatrixRounding {
 public:
  // `change` empty: codes for `target` alone (null: the weight). Else the better of those and the weight's own.
  MatrixRounding(const Tensor& weight, const Tensor* target, std::span<const double> change, const Metric& metric,
                 const RoundingOptions& options)
      : rows_(weight.GetShape()[0]),
        n_(weight.GetShape()[1]),
        weight_(ToF32(weight)),
        target_(target == nullptr ? weight_ : *target),
        change_(change),
        metric_(metric),
        options_(options),
        range_(RangeOfWeight(weight, 0)) {}

  RoundedMatrix Run() {
    RoundedMatrix result;
    result.loss.resize(static_cast<size_t>(rows_));
    result.nearest_loss.resize(static_cast<size_t>(rows_));
    QParams& grid = result.weight.qparams;
    grid = {options_.dtype, 0, std::vector<float>(static_cast<size_t>(rows_)),
            std::vector<int32_t>(static_cast<size_t>(rows_))};
    std::vector<int16_t> codes(static_cast<size_t>(rows_ * n_));
    std::vector<uint8_t> nearest(static_cast<size_t>(rows_)), corrected(nearest);
    // A group's products read the whole of L or H' for its rows: wide groups share that, as long as every thread has
    // one.
    const int64_t width = gemm::PanelColumns();
    const int64_t panels = std::clamp<int64_t>((rows_ + width * Threads() - 1) / (width * Threads()), 1, 4);
    const int64_t size = panels * width;
    ParallelItems((rows_ + size - 1) / size, [&](int64_t group, int) {
      const int64_t first = group * size, count = std::min(size, rows_ - first);
      const GroupRounding rounded = RoundGroup(first, count, panels);
      const GroupResult& best = rounded.best;
      std::copy(best.codes.begin(), best.codes.end(), codes.begin() + first * n_);
      for (int64_t r = 0; r < count; ++r) {
        grid.scale[first + r] = best.grids.scale[r];
        grid.zero_point[first + r] = static_cast<int32_t>(best.grids.zero_point[r]);
        result.loss[first + r] = best.loss[r];
        result.nearest_loss[first + r] = rounded.nearest_loss[r];
        nearest[first + r] = rounded.nearest[r];
        corrected[first + r] = rounded.corrected[r];
      }
    });
    result.rows_to_nearest = std::ranges::count(nearest, 1);
    result.rows_corrected = std::ranges::count(corrected, 1);
    result.weight.codes = Tensor({options_.dtype, weight_.GetShape()});
    StoreCodes(codes.data(), rows_ * n_, 0, options_.dtype, result.weight.codes.Raw());
    return result;
  }

 private:
  struct GroupRounding {
    GroupResult best;
    std::vector<double> nearest_loss;
    std::vector<uint8_t> nearest, corrected;
  };

  GroupRounding RoundGroup(int64_t first, int64_t count, int64_t panels) const {
    RowGroup group(metric_, options_, panels);
    Panels weight(n_, panels);
    std::optional<Panels> change;
    Fill(weight, weight_.F32().data(), first, count);
    if (Corrects()) Fill(change.emplace(n_, panels), change_.data(), first, count);
    Fill(group.Target(), Corrects() ? weight_.F32().data() : target_.F32().data(), first, count);
    std::vector<float> low(static_cast<size_t>(group.Rows())), high(low);
    std::copy_n(range_.min.begin() + first, count, low.begin());
    std::copy_n(range_.max.begin() + first, count, high.begin());
    // What decides between two codes of a row: with a correction E |W x_f - Q x|^2, which differs from
    // e H' e - 2 e . change (e = Q - W) by nothing that depends on Q.
    const auto true_losses = [&](const RowGrids& grids, const std::vector<double>& loss) {
      if (!Corrects()) return loss;
      group.ErrorsFrom(weight, grids);
      std::vector<double> sums = group.Loss();
      const std::vector<double> gained = group.ErrorsTimes(*change);
      for (size_t r = 0; r < sums.size(); ++r) sums[r] -= 2 * gained[r];
      return sums;
    };

    GroupRounding rounded;
    rounded.nearest.resize(static_cast<size_t>(count));
    rounded.corrected.resize(static_cast<size_t>(count));
    const RowGrids widest = GridsOf(options_, low, high, 1);
    group.RoundToNearest(widest);
    rounded.nearest_loss = group.Loss();
    const std::vector<double> nearest_true = true_losses(widest, rounded.nearest_loss);
    rounded.best = ResultOf(group, widest, rounded.nearest_loss, count);

    RowGrids grids = BestRanges(group, weight, low, high);
    std::vector<double> loss = Compensate(group, grids, low, high);
    if (Corrects()) {
      // Which target a row takes shows once columns have made up for each other; what follows goes on from there.
      const std::vector<double> plain_true = true_losses(grids, loss);
      const RowGrids plain_grids = grids;
      const GroupResult plain = ResultOf(group, grids, loss, count);
      Fill(group.Target(), target_.F32().data(), first, count);
      loss = Compensate(group, grids, low, high);
      const std::vector<double> corrected_true = true_losses(grids, loss);
      for (int64_t r = 0; r < count; ++r) {
        rounded.corrected[r] = corrected_true[r] < plain_true[r];
        if (rounded.corrected[r]) continue;
        loss[r] = plain.loss[r];
        grids.scale[r] = plain_grids.scale[r];
        grids.zero_point[r] = plain_grids.zero_point[r];
        for (int64_t i = 0; i < n_; ++i) {
          group.Target().Value(i, r) = weight.Value(i, r);
          group.Codes().Value(i, r) = plain.codes[r * n_ + metric_.Order()[static_cast<size_t>(i)]];
        }
      }
      group.ErrorsFrom(group.Target(), grids);
    }
    for (int refit = 0;; ++refit) {
      for (int pass = 0; pass < options_.method.descent_passes && group.Descend(grids, loss); ++pass) {
      }
      if (refit == options_.method.scale_refits) break;
      group.Refit(grids, loss);
    }
    loss = group.Loss();
    const GroupResult improved = ResultOf(group, grids, loss, count);
    const std::vector<double> improved_true = true_losses(grids, loss);
    for (int64_t r = 0; r < count; ++r) {
      rounded.nearest[r] = !(improved_true[r] < nearest_true[r]);
      if (rounded.nearest[r])
        rounded.corrected[r] = false;
      else
        rounded.best.Take(r, improved, n_);
    }
    return rounded;
  }

  bool Corrects() const { return !change_.empty(); }

  // The first codes for the group's target: columns that make up for each other, or the nearest; from ranges that are
  // good to begin with, which may give way to better ones.
  std::vector<double> Compensate(RowGroup& group, RowGrids& grids, const std::vector<float>& low,
                                 const std::vector<float>& high) const {
    if (!options_.method.compensate) {
      group.RoundToNearest(grids);
      return group.Loss();
    }
    std::vector<double> loss = group.Compensate(grids);
    for (int i = 0; i < options_.method.solved_ranges; ++i) {
      const RowGrids other = GridsOf(options_, low, high, FactorAt(options_, i, options_.method.solved_ranges));
      const std::vector<double> other_loss = group.Compensate(other);
      std::vector<bool> better(loss.size());
      for (size_t r = 0; r < loss.size(); ++r) better[r] = other_loss[r] < loss[r];
      TakeRows(grids, other, better);
      for (size_t r = 0; r < loss.size(); ++r) loss[r] = std::min(loss[r], other_loss[r]);
    }
    if (options_.method.solved_ranges > 0) group.Compensate(grids);
    return loss;
  }

  RowGrids BestRanges(RowGroup& group, Panels& weight, const std::vector<float>& low,
                      const std::vector<float>& high) const {
    RowGrids best = GridsOf(options_, low, high, 1);
    if (options_.method.range == WeightRounding::Range::kMinMax) return best;
    const float* const diagonal =
        options_.method.range == WeightRounding::Range::kMoments ? metric_.Diagonal().data() : nullptr;
    std::vector<double> least = group.DiagonalLoss(best, weight, diagonal);
    for (int i = 0; i + 1 < options_.method.range_factors; ++i) {
      const RowGrids grids = GridsOf(options_, low, high, FactorAt(options_, i, options_.method.range_factors));
      const std::vector<double> loss = group.DiagonalLoss(grids, weight, diagonal);
      std::vector<bool> better(loss.size());
      for (size_t r = 0; r < loss.size(); ++r) {
        better[r] = loss[r] < least[r];
        least[r] = std::min(least[r], loss[r]);
      }
      TakeRows(best, grids, better);
    }
    return best;
  }

  template <typename T>
  void Fill(Panels& panels, const T* rows, int64_t first, int64_t count) const {
    for (int64_t r = 0; r < count; ++r) {
      const T* const row = rows + (first + r) * n_;
      for (int64_t i = 0; i < n_; ++i)
        panels.Value(i, r) = static_cast<float>(row[metric_.Order()[static_cast<size_t>(i)]]);
    }
  }

  GroupResult ResultOf(RowGroup& group, RowGrids grids, std::vector<double> loss, int64_t count) const {
    GroupResult result{std::vector<int16_t>(static_cast<size_t>(count * n_)), std::move(grids), std::move(loss)};
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < n_; ++i)
        result.codes[r * n_ + metric_.Order()[static_cast<size_t>(i)]] =
            static_cast<int16_t>(group.Codes().Value(i, r));
    return result;
  }

  int64_t rows_, n_;
  Tensor weight_, target_;
  std::span<const double> change_;
  const Metric& metric_;
  const RoundingOptions& options_;
  WeightRange range_;
};

}  // namespace

Metric::Metric(const Moment& moment, const WeightRounding& method) : n_(moment.Columns()) {
  order_.resize(static_cast<size_t>(n_));
  std::iota(order_.begin(), order_.end(), 0);
  if (method.order_by_moment)
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int32_t a, int32_t b) { return moment.At(a, a) > moment.At(b, b); });
  for (const int32_t column : order_) diagonal_.push_back(static_cast<float>(moment.At(column, column)));
  dead_ = std::count(diagonal_.begin(), diagonal_.end(), 0.0f);
  const double mean = MeanDiagonal(moment);
  damping_ = UntilPositive(method.damping, [&](double damping) {
    if (n_ > kFloat64Columns) {
      factor_ = DampedMatrix<float>(moment, order_, Added(damping, mean));
      return Factorize(std::span(factor_), n_) < 0;
    }
    std::vector<double> factor = DampedMatrix<double>(moment, order_, Added(damping, mean));
    if (Factorize(std::span(factor), n_) >= 0) return false;
    factor_.assign(factor.begin(), factor.end());
    return true;
  });
  damped_ = DampedMatrix<float>(moment, order_, Added(damping_, mean));
}

namespace {

void RequireColumns(const Tensor& weight, int64_t columns) {
  CIRCLET_CHECK(weight.GetShape().Rank() == 2 && weight.GetShape()[1] == columns, "a matrix {} and {} columns",
                weight.GetShape().ToString(), columns);
}

}  // namespace

RoundedMatrix Round(const Tensor& weight, const Tensor* target, const Metric& metric, const RoundingOptions& options) {
  RequireColumns(weight, metric.Columns());
  RequireWeightType(options.dtype);
  return MatrixRounding(weight, target, {}, metric, options).Run();
}

RoundedMatrix RoundCorrected(const Tensor& weight, const Tensor& target, std::span<const double> change,
                             const Metric& metric, const RoundingOptions& options) {
  RequireColumns(weight, metric.Columns());
  RequireWeightType(options.dtype);
  CIRCLET_CHECK(static_cast<int64_t>(change.size()) == weight.Elements(), "{} changes of a weight {}", change.size(),
                weight.GetShape().ToString());
  return MatrixRounding(weight, &target, change, metric, options).Run();
}

InputCorrection::InputCorrection(const Moment& moment, double damping) : n_(moment.Columns()) {
  std::vector<int32_t> order(static_cast<size_t>(n_));
  std::iota(order.begin(), order.end(), 0);
  const double mean = MeanDiagonal(moment);
  const auto factorize = [&]<typename T>(std::vector<T>& factor) {
    UntilPositive(damping, [&](double added) {
      factor = DampedMatrix<T>(moment, order, Added(added, mean));
      return Factorize(std::span(factor), n_) < 0;
    });
  };
  n_ > kFloat64Columns ? factorize(factor32_) : factorize(factor64_);
}

Tensor InputCorrection::Target(const Tensor& weight, std::span<const double> change) const {
  RequireColumns(weight, n_);
  const int64_t rows = weight.GetShape()[0];
  CIRCLET_CHECK(static_cast<int64_t>(change.size()) == rows * n_, "{} changes of a weight {}", change.size(),
                weight.GetShape().ToString());
  const Tensor target = ToF32(weight).Clone();
  const auto solve = [&]<typename T>(const std::vector<T>& factor) {
    std::vector<T> solution(change.begin(), change.end());
    SolveWithFactor(std::span(factor), n_, std::span(solution), rows);
    for (int64_t i = 0; i < rows * n_; ++i) target.F32()[i] += static_cast<float>(solution[i]);
  };
  n_ > kFloat64Columns ? solve(factor32_) : solve(factor64_);
  return target;
}

}  // namespace circlet::weights
