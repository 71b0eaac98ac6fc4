#include "quant/weights/rounding.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <numeric>
#include <optional>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/aligned.h"
#include "ops/codes.h"
#include "ops/gemm.h"
#include "quant/weights/factor.h"
#include "quant/weights/row_loops.h"

namespace circlet::weights {
namespace {

constexpr int64_t kFloat64Columns = 4096;  // up to here the metric's factor is computed in float64
// The same for a correction, whose damping is larger: against 0.3 of the mean of the diagonal a float32 factor is off
// by some 1e-7 times the columns.
constexpr int64_t kCorrectionFloat64Columns = 512;
constexpr int64_t kBlock = 32;  // columns whose errors reach each other one by one, the rest by a product

// ---- Factors ------------------------------------------------------------------------------------------------------

// The damped moment in `order` as T, row-major; in `room` where there is some.
template <typename T>
hwy::AlignedFreeUniquePtr<T[]> DampedMatrix(const Moment& moment, const std::vector<int32_t>& order, double added,
                                            hwy::AlignedFreeUniquePtr<T[]> room = nullptr) {
  const auto n = static_cast<int64_t>(order.size());
  auto matrix = room != nullptr ? std::move(room) : Aligned<T>(n * n);
  std::vector<int32_t> place(order.size());
  for (int64_t i = 0; i < n; ++i) place[order[i]] = static_cast<int32_t>(i);
  // A stored row, which begins at its diagonal, fills a part of one row; the rest are mirror images.
  ParallelFor(n, 16, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      T* const to = matrix.get() + place[row] * n;
      for (int64_t column = row; column < n; ++column)
        to[place[column]] = static_cast<T>(moment.At(row, column) + (row == column ? added : 0));
    }
  });
  constexpr int64_t kTile = 32;
  ParallelFor(n, kTile, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < n; first += kTile)
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = std::max(first, i + 1); j < std::min(n, first + kTile); ++j)
          if (order[i] < order[j])
            matrix[j * n + i] = matrix[i * n + j];
          else
            matrix[i * n + j] = matrix[j * n + i];
  });
  return matrix;
}

// The upper half becomes the mirror image of the lower one.
void MirrorLower(float* matrix, int64_t n) {
  constexpr int64_t kTile = 32;
  ParallelFor(n, kTile, [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < n; first += kTile)
      for (int64_t i = begin; i < end; ++i)
        for (int64_t j = std::max(first, i + 1); j < std::min(n, first + kTile); ++j)
          matrix[i * n + j] = matrix[j * n + i];
  });
}

template <typename T>
std::span<T> Whole(const hwy::AlignedFreeUniquePtr<T[]>& matrix, int64_t n) {
  return {matrix.get(), static_cast<size_t>(n * n)};
}

double MeanDiagonal(const Moment& moment) {
  double sum = 0;
  for (int64_t j = 0; j < moment.Columns(); ++j) sum += moment.At(j, j);
  return sum / static_cast<double>(moment.Columns());
}

// What stands on the diagonal for `damping`; 1 where no input was ever different from 0.
double AddedFor(double damping, double mean) { return mean > 0 ? damping * mean : 1; }

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
    Clear();
  }
  void Clear() { std::fill_n(data_.get(), columns_ * width_ * panels_, 0.0f); }
  float* At(int64_t panel, int64_t column) { return data_.get() + (panel * columns_ + column) * width_; }
  gemm::Panels Operand() { return {data_.get(), columns_, panels_ * width_}; }
  int64_t Width() const { return width_; }
  int64_t Count() const { return panels_; }

  void CopyFrom(const Panels& other) { std::copy_n(other.data_.get(), columns_ * width_ * panels_, data_.get()); }
  // The rows for which `take` says so become those of `other`.
  void Take(const Panels& other, std::span<const uint8_t> take) {
    for (int64_t at = 0; at < columns_ * panels_; ++at) {
      const uint8_t* const taken = take.data() + at / columns_ * width_;
      for (int64_t r = 0; r < width_; ++r)
        if (taken[r] != 0) data_[at * width_ + r] = other.data_[at * width_ + r];
    }
  }

  // Calls body(row, i, value) for the first `count` rows and all columns, in squares that stay in the cache.
  template <typename Body>
  void ForValues(int64_t count, const Body& body) {
    constexpr int64_t kColumns = 64;
    for (int64_t first = 0; first < count; first += width_)
      for (int64_t begin = 0; begin < columns_; begin += kColumns)
        for (int64_t r = first; r < std::min(count, first + width_); ++r)
          for (int64_t i = begin; i < std::min(columns_, begin + kColumns); ++i)
            body(r, i, At(first / width_, i)[r - first]);
  }

 private:
  int64_t columns_, width_, panels_;
  hwy::AlignedFreeUniquePtr<float[]> data_;
};

// The grids of a group's rows; zero points as floats, for the loops.
struct RowGrids {
  std::vector<float> scale, zero_point;
};

// Rounds some rows of one matrix.
class RowGroup {
 public:
  RowGroup(const Metric& metric, const RoundingOptions& options, int64_t panels)
      : metric_(metric),
        n_(metric.Columns()),
        width_(gemm::PanelColumns()),
        rows_(panels * width_),
        low_(static_cast<float>(options.Codes().min)),
        high_(static_cast<float>(options.Codes().max)),
        target_(n_, panels),
        codes_(n_, panels),
        errors_(n_, panels),
        left_(n_, panels),
        products_(Aligned<float>(kBlock * rows_)) {}

  Panels& Target() { return target_; }
  Panels& Codes() { return codes_; }
  Panels& Errors() { return errors_; }
  Panels& Left() { return left_; }  // L e, behind Compensate() and Loss()
  int64_t Rows() const { return rows_; }

  // Every column to the code that is nearest to `values`; errors are those from the target.
  void RoundToNearest(Panels& values, const RowGrids& grids) {
    for (int64_t panel = 0; panel < target_.Count(); ++panel)
      Snap(GridOf(grids, panel), width_, n_, values.At(panel, 0), target_.At(panel, 0), codes_.At(panel, 0),
           errors_.At(panel, 0));
  }

  // The errors of the codes as they stand, now from `values`.
  void ErrorsFrom(Panels& values, const RowGrids& grids) {
    ForColumns([&](int64_t panel, int64_t column, int64_t first) {
      const float *const codes = codes_.At(panel, column), *const value = values.At(panel, column);
      float* const errors = errors_.At(panel, column);
      for (int64_t r = 0; r < width_; ++r)
        errors[r] = grids.scale[first + r] * (codes[r] - grids.zero_point[first + r]) - value[r];
    });
  }

  // sum_j e_j v_j by row.
  std::vector<double> ErrorsTimes(Panels& values) {
    std::vector<double> sums(static_cast<size_t>(rows_));
    for (int64_t panel = 0; panel < errors_.Count(); ++panel)
      for (int64_t begin = 0; begin < n_; begin += kBlock)
        AddDots(width_, std::min(kBlock, n_ - begin), errors_.At(panel, begin), width_, values.At(panel, begin),
                &sums[panel * width_]);
    return sums;
  }

  // Columns in order, each given the errors of those before. Returns the losses.
  std::vector<double> Compensate(const RowGrids& grids) {
    std::vector<double> loss(static_cast<size_t>(rows_));
    ForBlocks(metric_.Factor(), Columns::kBefore, errors_, [&](int64_t begin, int64_t end, int64_t panel) {
      CompensateBlock(BlockAt(begin, end, panel), GridOf(grids, panel), width_, target_.At(panel, begin),
                      codes_.At(panel, begin), errors_.At(panel, begin), left_.At(panel, begin), &loss[panel * width_]);
    });
    return loss;
  }

  // The losses of the errors as they stand.
  std::vector<double> Loss() {
    std::vector<double> loss(static_cast<size_t>(rows_));
    ForBlocks(metric_.Factor(), Columns::kBefore, errors_, [&](int64_t begin, int64_t end, int64_t panel) {
      AddLoss(BlockAt(begin, end, panel), width_, errors_.At(panel, begin), left_.At(panel, begin),
              &loss[panel * width_]);
    });
    return loss;
  }

  // Makes the gradient H' e = L^T (L e) from Left(), which Descend and Refit then keep true: a pass changes one code of
  // a hundred, so adding those columns' part costs a fraction of a product.
  void StartDescent() {
    if (gradient_ == nullptr) gradient_ = Aligned<float>(rows_ * n_);
    ForBlocks(metric_.Factor(), Columns::kBehind, left_, [&](int64_t begin, int64_t end, int64_t panel) {
      AddTransposed(BlockAt(begin, end, panel), width_, left_.At(panel, begin), products_.get() + panel * width_,
                    rows_);
      ToRows(begin, end, panel, gradient_.get());
    });
  }

  // One pass of coordinate descent; subtracts from the losses what it gains. Returns whether a code has changed.
  bool Descend(const RowGrids& grids, std::vector<double>& loss) {
    constexpr int64_t kTile = 8 * kBlock;  // columns whose gradient follows at once, that of the others behind the tile
    std::vector<float> gradient(static_cast<size_t>(kBlock * width_)), steps(gradient);
    std::vector<std::vector<Change>> changes(static_cast<size_t>(rows_));
    bool changed = false;
    for (int64_t tile = 0; tile < n_; tile += kTile) {
      const int64_t tile_end = std::min(n_, tile + kTile);
      for (int64_t begin = tile; begin < tile_end; begin += kBlock)
        for (int64_t panel = 0; panel < errors_.Count(); ++panel) {
          const int64_t count = std::min(kBlock, tile_end - begin), first = panel * width_;
          for (int64_t r = 0; r < width_; ++r)
            for (int64_t i = 0; i < count; ++i) gradient[i * width_ + r] = gradient_[(first + r) * n_ + begin + i];
          if (!DescendBlock(metric_.Damped() + begin * n_ + begin, n_, count, GridOf(grids, panel), width_,
                            gradient.data(), target_.At(panel, begin), codes_.At(panel, begin),
                            errors_.At(panel, begin), steps.data(), &loss[first]))
            continue;
          changed = true;
          for (int64_t r = 0; r < width_; ++r) {
            std::vector<Change>& row = changes[first + r];
            const size_t before = row.size();
            for (int64_t i = 0; i < count; ++i)
              if (steps[i * width_ + r] != 0) row.push_back({begin + i, steps[i * width_ + r]});
            Follow(std::span(row).subspan(before), first + r, tile, tile_end);
          }
        }
      for (int64_t r = 0; r < rows_; ++r) {
        Follow(changes[r], r, 0, tile);
        Follow(changes[r], r, tile_end, n_);
        changes[r].clear();
      }
    }
    return changed;
  }

  // The scale that is best for each row's codes; errors and gradient follow.
  void Refit(RowGrids& grids, std::vector<double>& loss) {
    ForColumns([&](int64_t panel, int64_t column, int64_t first) {
      float* const units = errors_.At(panel, column);
      for (int64_t r = 0; r < width_; ++r) units[r] = codes_.At(panel, column)[r] - grids.zero_point[first + r];
    });
    std::vector<double> with_target(static_cast<size_t>(rows_)), with_itself(with_target);
    if (unit_gradient_ == nullptr) unit_gradient_ = Aligned<float>(rows_ * n_);
    ForBlocks(metric_.Damped(), Columns::kAll, errors_, [&](int64_t begin, int64_t end, int64_t panel) {
      const int64_t first = panel * width_;
      const float* const products = products_.get() + first;
      AddDots(width_, end - begin, products, rows_, target_.At(panel, begin), &with_target[first]);
      AddDots(width_, end - begin, products, rows_, errors_.At(panel, begin), &with_itself[first]);
      ToRows(begin, end, panel, unit_gradient_.get());
    });
    for (int64_t r = 0; r < rows_; ++r) {
      const auto best = static_cast<float>(with_target[r] / with_itself[r]);
      if (!(with_itself[r] > 0) || !(best > kScaleFloor) || !std::isfinite(best)) continue;
      loss[r] -= Square(with_target[r] - grids.scale[r] * with_itself[r]) / with_itself[r];
      const Change change{0, best - grids.scale[r]};
      AddRows(std::span(&change, 1), unit_gradient_.get() + r * n_, n_, n_, gradient_.get() + r * n_);
      grids.scale[r] = best;
    }
    ForColumns([&](int64_t panel, int64_t column, int64_t first) {
      float* const errors = errors_.At(panel, column);
      for (int64_t r = 0; r < width_; ++r)
        errors[r] = errors[r] * grids.scale[first + r] - target_.At(panel, column)[r];
    });
  }

  // sum_j d_j (W_j - Q_j)^2 with Q to the nearest.
  std::vector<double> DiagonalLoss(const RowGrids& grids, Panels& weight, const float* diagonal) {
    std::vector<double> loss(static_cast<size_t>(rows_));
    for (int64_t panel = 0; panel < weight.Count(); ++panel)
      for (int64_t begin = 0; begin < n_; begin += kBlock)
        AddRangeLoss(GridOf(grids, panel), width_, std::min(kBlock, n_ - begin), weight.At(panel, begin),
                     diagonal == nullptr ? nullptr : diagonal + begin, &loss[panel * width_]);
    return loss;
  }

 private:
  static double Square(double x) { return x * x; }

  RowGrid GridOf(const RowGrids& grids, int64_t panel) const {
    return {&grids.scale[panel * width_], &grids.zero_point[panel * width_], low_, high_};
  }

  template <typename Body>
  void ForColumns(const Body& body) {
    for (int64_t panel = 0; panel < target_.Count(); ++panel)
      for (int64_t column = 0; column < n_; ++column) body(panel, column, panel * width_);
  }

  enum class Columns : uint8_t { kBefore, kAll, kBehind };

  // For blocks of columns in order: products_ = the block's rows of `matrix` times `values` (of the columns before or
  // behind the block, or of all), then body(begin, end, panel).
  template <typename Body>
  void ForBlocks(const float* matrix, Columns columns, Panels& values, const Body& body) {
    for (int64_t begin = 0; begin < n_; begin += kBlock) {
      const int64_t end = std::min(n_, begin + kBlock);
      const int64_t first = columns == Columns::kBehind ? end : 0, last = columns == Columns::kBefore ? begin : n_;
      if (first == last)
        std::fill_n(products_.get(), (end - begin) * rows_, 0.0f);
      else
        gemm::Multiply(matrix + begin * n_, n_, end - begin, values.Operand(), {0, values.Count(), first, last},
                       products_.get(), rows_);
      for (int64_t panel = 0; panel < values.Count(); ++panel) body(begin, end, panel);
    }
  }

  FactorBlock BlockAt(int64_t begin, int64_t end, int64_t panel) const {
    return {metric_.Factor() + begin * n_ + begin, n_, end - begin, products_.get() + panel * width_, rows_};
  }

  // Products of a block's columns into rows [rows_, n_].
  void ToRows(int64_t begin, int64_t end, int64_t panel, float* rows) const {
    for (int64_t r = panel * width_; r < (panel + 1) * width_; ++r)
      for (int64_t i = begin; i < end; ++i) rows[r * n_ + i] = products_[(i - begin) * rows_ + r];
  }

  // Row r's gradient in the columns [begin, end) after changes of its errors.
  void Follow(std::span<const Change> changes, int64_t r, int64_t begin, int64_t end) {
    if (!changes.empty() && begin < end)
      AddRows(changes, metric_.Damped() + begin, n_, end - begin, gradient_.get() + r * n_ + begin);
  }

  const Metric& metric_;
  int64_t n_, width_, rows_;
  float low_, high_;
  Panels target_, codes_, errors_, left_;
  hwy::AlignedFreeUniquePtr<float[]> products_;                  // [kBlock, rows_]
  hwy::AlignedFreeUniquePtr<float[]> gradient_, unit_gradient_;  // [rows_, n_]: H' e; H' (code - zero_point)
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
void TakeRows(RowGrids& to, const RowGrids& from, std::span<const uint8_t> better) {
  for (size_t r = 0; r < better.size(); ++r) {
    if (better[r] == 0) continue;
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
  MatrixRounding(const Tensor& weight, const Tensor* target, std::span<const float> change, const Metric& metric,
                 const RoundingOptions& options, double correction_added = 0)
      : rows_(weight.GetShape()[0]),
        n_(weight.GetShape()[1]),
        weight_(ToF32(weight)),
        target_(target == nullptr ? weight_ : *target),
        change_(change),
        metric_(metric),
        options_(options),
        added_(static_cast<float>(correction_added - metric.Added())),
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
    std::vector<std::unique_ptr<Workspace>> workers(Threads());
    ParallelItems((rows_ + size - 1) / size, [&](int64_t group, int worker) {
      const int64_t first = group * size, count = std::min(size, rows_ - first);
      if (workers[worker] == nullptr)
        workers[worker] = std::make_unique<Workspace>(metric_, options_, n_, panels, Corrects());
      const GroupRounding rounded = RoundGroup(first, count, *workers[worker]);
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

  // What a thread rounds its groups in.
  struct Workspace {
    Workspace(const Metric& metric, const RoundingOptions& options, int64_t columns, int64_t panels, bool corrects)
        : group(metric, options, panels), weight(columns, panels) {
      if (!corrects) return;
      for (auto* extra : {&change, &plain_codes, &plain_left}) extra->emplace(columns, panels);
    }
    RowGroup group;
    Panels weight;
    std::optional<Panels> change, plain_codes, plain_left;  // with a correction
  };

  // What decides between two codes of a row with a correction is E |W x_f - Q x|^2. With e = Q - W that differs from
  // e H' e - 2 e . change by nothing that depends on Q; `loss` is e H' e, and stays so without a correction.
  std::vector<double> TrueLosses(Workspace& w, std::vector<double> loss) const {
    if (!Corrects()) return loss;
    const std::vector<double> gained = w.group.ErrorsTimes(*w.change);
    for (size_t r = 0; r < loss.size(); ++r) loss[r] -= 2 * gained[r];
    return loss;
  }

  // The same from the loss of errors e from the corrected target T = W + d. As d solves (H' + added) d = change, H' d
  // is known, and (e + d) H' (e + d) - 2 (e + d) . change = e H' e - d . change - added (2 e . d + d . d).
  std::vector<double> TrueLossesFromTarget(Workspace& w, std::vector<double> loss) const {
    Panels& errors = w.group.Errors();
    const int64_t width = errors.Width();
    for (int64_t panel = 0; panel < errors.Count(); ++panel)
      for (int64_t begin = 0; begin < n_; begin += kBlock)
        SubtractCorrection(width, std::min(kBlock, n_ - begin), added_, errors.At(panel, begin),
                           w.group.Target().At(panel, begin), w.weight.At(panel, begin), w.change->At(panel, begin),
                           &loss[panel * width]);
    return loss;
  }

  GroupRounding RoundGroup(int64_t first, int64_t count, Workspace& w) const {
    RowGroup& group = w.group;
    Fill(w.weight, weight_.F32().data(), first, count);
    if (Corrects()) {
      Fill(*w.change, change_.data(), first, count);
      group.Target().CopyFrom(w.weight);
    } else {
      Fill(group.Target(), target_.F32().data(), first, count);
    }
    std::vector<float> low(static_cast<size_t>(group.Rows())), high(low);
    std::copy_n(range_.min.begin() + first, count, low.begin());
    std::copy_n(range_.max.begin() + first, count, high.begin());

    GroupRounding rounded;
    rounded.nearest.resize(static_cast<size_t>(count));
    rounded.corrected.resize(static_cast<size_t>(group.Rows()));
    const RowGrids widest = GridsOf(options_, low, high, 1);
    group.RoundToNearest(group.Target(), widest);
    rounded.nearest_loss = group.Loss();
    const std::vector<double> nearest_true = TrueLosses(w, rounded.nearest_loss);
    rounded.best = ResultOf(group, widest, rounded.nearest_loss, count);

    RowGrids grids = BestRanges(group, w.weight, low, high);
    std::vector<double> loss = Compensate(group, grids, low, high);
    std::vector<double> offsets;  // from the nearest codes' loss to the corrected target to their true one
    if (Corrects()) {
      // Which target a row takes shows once columns have made up for each other; what follows goes on from there. The
      // two losses are known to some 1e-5 of themselves.
      constexpr double kLeastGain = 1e-4;
      const std::vector<double> plain_loss = loss, plain_true = TrueLosses(w, loss);
      const RowGrids plain_grids = grids;
      w.plain_codes->CopyFrom(group.Codes());
      w.plain_left->CopyFrom(group.Left());
      Fill(group.Target(), target_.F32().data(), first, count);
      group.RoundToNearest(w.weight, widest);
      offsets = TrueLossesFromTarget(w, std::vector<double>(loss.size()));
      loss = Compensate(group, grids, low, high);
      const std::vector<double> corrected_true = TrueLossesFromTarget(w, loss);
      std::vector<uint8_t> plain(loss.size());
      for (size_t r = 0; r < loss.size(); ++r) {
        plain[r] = !(corrected_true[r] < plain_true[r] - kLeastGain * plain_loss[r]);
        rounded.corrected[r] = plain[r] == 0;
        if (plain[r] != 0) loss[r] = plain_loss[r];
      }
      TakeRows(grids, plain_grids, plain);
      group.Target().Take(w.weight, plain);
      group.Codes().Take(*w.plain_codes, plain);
      group.Left().Take(*w.plain_left, plain);
      group.ErrorsFrom(group.Target(), grids);
    }
    if (options_.method.descent_passes > 0 || options_.method.scale_refits > 0) group.StartDescent();
    for (int refit = 0;; ++refit) {
      for (int pass = 0; pass < options_.method.descent_passes && group.Descend(grids, loss); ++pass) {
      }
      if (refit == options_.method.scale_refits) break;
      group.Refit(grids, loss);
    }
    // Anew, for sums that followed changes are off by their rounding; those of a row with a corrected target stay, as
    // only its true loss is asked for.
    if (Corrects()) group.ErrorsFrom(w.weight, grids);
    const std::vector<double> from_weight = group.Loss();
    for (size_t r = 0; r < loss.size(); ++r)
      if (rounded.corrected[r] == 0) loss[r] = from_weight[r];
    const std::vector<double> improved_true = TrueLosses(w, from_weight);
    const GroupResult improved = ResultOf(group, grids, loss, count);
    for (int64_t r = 0; r < count; ++r) {
      rounded.nearest[r] = !(improved_true[r] < nearest_true[r]);
      if (rounded.nearest[r] != 0) {
        rounded.corrected[r] = 0;
        continue;
      }
      rounded.best.Take(r, improved, n_);
      if (rounded.corrected[r] != 0) rounded.nearest_loss[r] = nearest_true[r] - offsets[r];
    }
    return rounded;
  }

  bool Corrects() const { return !change_.empty(); }

  // The first codes for the group's target: columns that make up for each other, or the nearest; from ranges that are
  // good to begin with, which may give way to better ones.
  std::vector<double> Compensate(RowGroup& group, RowGrids& grids, const std::vector<float>& low,
                                 const std::vector<float>& high) const {
    if (!options_.method.compensate) {
      group.RoundToNearest(group.Target(), grids);
      return group.Loss();
    }
    std::vector<double> loss = group.Compensate(grids);
    for (int i = 0; i < options_.method.solved_ranges; ++i) {
      const RowGrids other = GridsOf(options_, low, high, FactorAt(options_, i, options_.method.solved_ranges));
      const std::vector<double> other_loss = group.Compensate(other);
      std::vector<uint8_t> better(loss.size());
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
      std::vector<uint8_t> better(loss.size());
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
    const int32_t* const order = metric_.Order().data();
    if (count < panels.Count() * panels.Width()) panels.Clear();
    panels.ForValues(count, [&](int64_t r, int64_t i, float& value) {
      value = static_cast<float>(rows[(first + r) * n_ + order[i]]);
    });
  }

  GroupResult ResultOf(RowGroup& group, RowGrids grids, std::vector<double> loss, int64_t count) const {
    GroupResult result{std::vector<int16_t>(static_cast<size_t>(count * n_)), std::move(grids), std::move(loss)};
    const int32_t* const order = metric_.Order().data();
    group.Codes().ForValues(
        count, [&](int64_t r, int64_t i, float code) { result.codes[r * n_ + order[i]] = static_cast<int16_t>(code); });
    return result;
  }

  int64_t rows_, n_;
  Tensor weight_, target_;
  std::span<const float> change_;
  const Metric& metric_;
  const RoundingOptions& options_;
  float added_;  // what the correction's diagonal has beyond the metric's
  WeightRange range_;
};

}  // namespace

Metric::Metric(Moment moment, const WeightRounding& method, hwy::AlignedFreeUniquePtr<float[]> room)
    : n_(moment.Columns()) {
  order_.resize(static_cast<size_t>(n_));
  std::iota(order_.begin(), order_.end(), 0);
  if (method.order_by_moment)
    std::stable_sort(order_.begin(), order_.end(),
                     [&](int32_t a, int32_t b) { return moment.At(a, a) > moment.At(b, b); });
  for (const int32_t column : order_) diagonal_.push_back(static_cast<float>(moment.At(column, column)));
  dead_ = std::count(diagonal_.begin(), diagonal_.end(), 0.0f);
  const double mean = MeanDiagonal(moment);
  if (n_ <= kFloat64Columns) {
    damping_ = UntilPositive(method.damping, [&](double damping) {
      const auto factor = DampedMatrix<double>(moment, order_, AddedFor(damping, mean));
      if (Factorize(Whole(factor, n_), n_) >= 0) return false;
      factor_ = Aligned<float>(n_ * n_);
      ParallelFor(n_ * n_, 4096, [&](int64_t begin, int64_t end) {
        std::transform(factor.get() + begin, factor.get() + end, factor_.get() + begin,
                       [](double value) { return static_cast<float>(value); });
      });
      return true;
    });
    damped_ = DampedMatrix<float>(moment, order_, AddedFor(damping_, mean), std::move(room));
  } else {
    damped_ = DampedMatrix<float>(moment, order_, 0, std::move(room));
    { const Moment gone = std::move(moment); }
    factor_ = Aligned<float>(n_ * n_);
    damping_ = UntilPositive(method.damping, [&](double damping) {
      for (int64_t i = 0; i < n_; ++i) damped_[i * n_ + i] = static_cast<float>(diagonal_[i] + AddedFor(damping, mean));
      ParallelFor(n_ * n_, 4096, [&](int64_t begin, int64_t end) {
        std::copy(damped_.get() + begin, damped_.get() + end, factor_.get() + begin);
      });
      return Factorize(Whole(factor_, n_), n_) < 0;
    });
  }
  added_ = AddedFor(damping_, mean);
  MirrorLower(factor_.get(), n_);
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

RoundedMatrix RoundCorrected(const Tensor& weight, const Tensor& target, std::span<const float> change,
                             double correction_added, const Metric& metric, const RoundingOptions& options) {
  RequireColumns(weight, metric.Columns());
  RequireWeightType(options.dtype);
  CIRCLET_CHECK(static_cast<int64_t>(change.size()) == weight.Elements(), "{} changes of a weight {}", change.size(),
                weight.GetShape().ToString());
  return MatrixRounding(weight, &target, change, metric, options, correction_added).Run();
}

InputCorrection::InputCorrection(const Moment& moment, double damping) : n_(moment.Columns()) {
  std::vector<int32_t> order(static_cast<size_t>(n_));
  std::iota(order.begin(), order.end(), 0);
  const double mean = MeanDiagonal(moment);
  const auto factorize = [&]<typename T>(hwy::AlignedFreeUniquePtr<T[]>& factor) {
    const double used = UntilPositive(damping, [&](double tried) {
      factor = nullptr;
      factor = DampedMatrix<T>(moment, order, AddedFor(tried, mean));
      return Factorize(Whole(factor, n_), n_) < 0;
    });
    added_ = AddedFor(used, mean);
  };
  n_ > kCorrectionFloat64Columns ? factorize(factor32_) : factorize(factor64_);
}

Tensor InputCorrection::Target(const Tensor& weight, std::span<const float> change) const {
  RequireColumns(weight, n_);
  const int64_t rows = weight.GetShape()[0];
  CIRCLET_CHECK(static_cast<int64_t>(change.size()) == rows * n_, "{} changes of a weight {}", change.size(),
                weight.GetShape().ToString());
  const Tensor target = ToF32(weight).Clone();
  const auto solve = [&]<typename T>(const hwy::AlignedFreeUniquePtr<T[]>& factor) {
    std::vector<T> solution(change.begin(), change.end());
    SolveWithFactor(std::span<const T>(Whole(factor, n_)), n_, std::span(solution), rows);
    for (int64_t i = 0; i < rows * n_; ++i) target.F32()[i] += static_cast<float>(solution[i]);
  };
  n_ > kCorrectionFloat64Columns ? solve(factor32_) : solve(factor64_);
  return target;
}

}  // namespace circlet::weights
