#include "circlet/quant/calibration.h"

#include <fmt/ranges.h>

#include <cstring>

#include "circlet/base/threads.h"
#include "circlet/quant/affine.h"
#include "circlet/quant/mx.h"
#include "ops/codes.h"
#include "ops/integer_product.h"
#include "ops/simd.h"
#include "ops/table.h"

namespace circlet {

namespace {

// What a file is labelled with: everything of a specification but how its range was found.
bool SameType(const PointSpec& a, const PointSpec& b) {
  if (a.kind != b.kind) return false;
  if (a.kind == QuantKind::kMx) return a.mx == b.mx;
  return a.kind == QuantKind::kNone ||
         (a.dtype == b.dtype && a.scheme.symmetric == b.scheme.symmetric && a.axis == b.axis);
}

// Codes as signed 4-bit ones differ from unsigned ones around 8 in each code's highest bit.
void FlipSigns(std::span<std::byte> bytes) {
  for (std::byte& two : bytes) two ^= std::byte{0x88};
}

// Stored codes in the type of `grid`, whose codes mean the same values.
Tensor InTypeOf(const Tensor& codes, const std::shared_ptr<const QParams>& grid) {
  if (codes.GetDType() == grid->dtype) return codes.WithGrid(grid);
  const Tensor flipped = Tensor::Uninitialized({grid->dtype, codes.GetShape()});
  std::memcpy(flipped.Raw(), codes.Raw(), static_cast<size_t>(codes.Bytes()));
  FlipSigns({flipped.Raw(), static_cast<size_t>(flipped.Bytes())});
  return flipped.WithGrid(grid);
}

std::string TypeText(const PointSpec& spec) {
  if (spec.kind == QuantKind::kMx) return "MX";
  if (spec.kind == QuantKind::kNone) return "float";
  return fmt::format("{} {}{}", Name(spec.dtype), spec.scheme.symmetric ? "symmetric" : "asymmetric",
                     spec.axis < 0 ? "" : fmt::format(" by axis {}", spec.axis));
}

}  // namespace

void Calibration::GivePoint(const std::string& name, QParams grid) { given_points_[name] = std::move(grid); }

void Calibration::GiveCodes(const std::string& name, QParams grid) {
  PointSpec spec{.point = name, .dtype = grid.dtype, .scheme = {.per_channel = true, .symmetric = true}, .axis = 0};
  spec.observer.kind = ObserverSpec::Kind::kGiven;
  params_.Set({.spec = std::move(spec), .min = {0}, .max = {0}, .qparams = std::move(grid)});
}

const QParams* Calibration::GivenGrid(const Point& point) const {
  if (point.use == PointUse::kExportOnly) return nullptr;
  const auto given = given_points_.find(point.name);
  return given == given_points_.end() ? nullptr : &given->second;
}

PointSpec Calibration::SpecFor(const Point& point) const {
  if (const PointParams* const codes = params_.Find(point.name); codes != nullptr && codes->GivenWithCodes())
    return codes->spec;
  const auto given = given_points_.find(point.name);
  if (given == given_points_.end()) return recipe_.SpecFor(point, dialect_);
  const QParams& grid = given->second;
  return {.point = point.name,
          .dtype = grid.dtype,
          .scheme = {.symmetric = grid.zero_point[0] == 0},
          .observer = {.kind = ObserverSpec::Kind::kGiven, .step = grid.scale[0], .zero_point = grid.zero_point[0]}};
}

void Calibration::UseFrozen(ParameterStore params) {
  params_ = std::move(params);
  all_frozen_ = true;
}

void Calibration::CheckTypes(std::span<const Point> points, const std::string& file) const {
  constexpr size_t kShown = 3;
  std::vector<std::string> shown;
  size_t different = 0;
  for (const Point& point : points) {
    const PointParams* frozen = params_.Find(point.name);
    if (frozen == nullptr) continue;
    const PointSpec spec = SpecFor(point);
    if (const QParams* const given = GivenGrid(point); given != nullptr && SameType(frozen->spec, spec)) {
      if (frozen->qparams != *given)
        Fail("{}: {} has another grid there than the checkpoint gives it; leave --qparams out", file, point.name);
      continue;
    }
    if (SameType(frozen->spec, spec) || different++ >= kShown) continue;
    shown.push_back(fmt::format("{} is {} there and {} here", point.name, TypeText(frozen->spec), TypeText(spec)));
  }
  if (different > 0)
    Fail("{}: {} of {} points have another type than in recipe {}: {}{}; give the recipe that made the file{}", file,
         different, points.size(), recipe_.Name(), fmt::join(shown, ", "), different > kShown ? ", ..." : "",
         params_.RecipeName().empty() ? "" : fmt::format(" (it says {})", params_.RecipeName()));
}

void Calibration::Resume(const ParameterStore& params) {
  for (const std::string& name : params.Names()) params_.Set(*params.Find(name));
}

Observer* Calibration::ObserverOf(const Point& point, ObserverMap& observers) const {
  if (all_frozen_ || point.use == PointUse::kBoundary || params_.Find(point.name) != nullptr) return nullptr;
  auto [it, inserted] = observers.try_emplace(point.name);
  if (inserted) it->second = Observer::Make(SpecFor(point));
  return it->second.get();
}

bool Calibration::OrderMatters(const Point& point) const {
  if (all_frozen_ || point.use == PointUse::kBoundary || params_.Find(point.name) != nullptr) return false;
  const PointSpec spec = SpecFor(point);
  return spec.kind == QuantKind::kAffine && spec.observer.kind == ObserverSpec::Kind::kEma;
}

void Calibration::Absorb(ObserverMap observers) {
  for (auto& [name, observer] : observers) {
    const auto [it, inserted] = observers_.try_emplace(name, std::move(observer));
    if (!inserted) Within(name, [&mine = *it->second, &other = *observer] { mine.Merge(other); });
  }
}

void Calibration::Freeze(const Graph& graph, const WeightSource& weights) {
  if (all_frozen_) return CheckFits(graph, weights);
  for (const Value& value : graph.Values()) {
    const std::string& name = value.weight_point.name;
    if (value.kind != ValueKind::kWeight || name.empty() || params_.Find(name) != nullptr) continue;
    const PointSpec spec = SpecFor(value.weight_point);
    params_.Set(spec.kind == QuantKind::kAffine ? ParamsOfWeight(weights(value.name), spec)
                                                : PointParams{.spec = spec});
  }
  for (const Node& node : graph.Nodes()) {
    for (const Point& point : node.points) {
      if (point.name.empty() || point.use == PointUse::kBoundary || params_.Find(point.name) != nullptr) continue;
      const auto observer = observers_.find(point.name);
      CIRCLET_CHECK(observer != observers_.end(), "{} was not observed before its graph was frozen", point.name);
      params_.Set(circlet::ParamsOf(*observer->second, SpecFor(point), point.headroom_below));
      observers_.erase(observer);
    }
  }
}

void Calibration::CheckFits(const Graph& graph, const WeightSource& weights) const {
  for (const Value& value : graph.Values()) {
    if (value.kind != ValueKind::kWeight || value.weight_point.name.empty()) continue;
    const QParams* grid = GridOf(value.weight_point.name);
    if (grid == nullptr || !grid->PerChannel()) continue;
    const int64_t rows = weights(value.name).GetShape()[grid->axis];
    if (rows != static_cast<int64_t>(grid->scale.size()))
      Fail("{}: the qparams file has {} grids for {} rows; it belongs to another model, give this one's",
           value.weight_point.name, grid->scale.size(), rows);
  }
}

void Calibration::SetGrid(const std::string& name, QParams grid) {
  PointParams params = params_.Get(name);
  params.qparams = std::move(grid);
  params_.Set(std::move(params));
}

const PointParams& Calibration::ParamsOf(const std::string& name) const { return params_.Get(name); }

const QParams* Calibration::GridOf(const std::string& name) const {
  const PointParams& params = params_.Get(name);
  return params.spec.kind == QuantKind::kAffine ? &params.qparams : nullptr;
}

std::shared_ptr<const QParams> Calibration::GridOfRows(const std::string& name, const Tensor& rows,
                                                       int64_t first_row) const {
  const PointParams* params = params_.Find(name);
  if (params == nullptr || params->spec.kind != QuantKind::kAffine) return nullptr;
  // Grids from a file: nobody has looked at the weights yet, and codes cannot tell a NaN.
  if (all_frozen_ && rows.Grid() == nullptr && !IsInteger(rows.GetDType()))
    Within(name, [&] { RangeOfWeight(rows, -1); });
  auto grid = std::make_shared<QParams>(params->qparams);
  if (grid->PerChannel()) {
    const auto cut = [&](auto& values) {
      values = {values.begin() + first_row, values.begin() + first_row + rows.GetShape()[0]};
    };
    cut(grid->scale);
    cut(grid->zero_point);
  }
  return grid;
}

Tensor Calibration::RoundedRows(const std::string& name, const Tensor& rows, int64_t first_row) const {
  const std::shared_ptr<const QParams> grid = GridOfRows(name, rows, first_row);
  if (grid != nullptr && HoldsCodes(name)) return OperandOf(InTypeOf(rows, grid));
  if (grid != nullptr && MultipliedAsCodes(rows, *grid))
    return OperandOf(QuantizeWeight(rows, *grid, dialect_.rounding).codes.WithGrid(grid));
  return RoundedValues(name, rows, grid.get());
}

Tensor Calibration::RoundedRowsAt(const std::string& name, const Tensor& table, std::span<const int64_t> ids) const {
  if (HoldsCodes(name)) return DequantizedRows(table, ids);
  const Tensor rows = table.Grid() != nullptr ? DequantizedRows(table, ids) : RowsOf(table, ids);
  const PointParams* params = params_.Find(name);
  if (params == nullptr || params->spec.kind != QuantKind::kAffine) return RoundedValues(name, rows, nullptr);
  const QParams& of_table = params->qparams;
  if (!of_table.PerChannel()) return RoundedValues(name, rows, &of_table);
  QParams grid{of_table.dtype, of_table.axis, {}, {}};
  for (const int64_t id : ids) {
    grid.scale.push_back(of_table.scale[id]);
    grid.zero_point.push_back(of_table.zero_point[id]);
  }
  return RoundedValues(name, rows, &grid);
}

Tensor Calibration::RoundedValues(const std::string& name, const Tensor& rows, const QParams* grid) const {
  if (grid != nullptr) return FakeQuantizeWeight(rows, *grid, dialect_.rounding);
  const PointParams* params = params_.Find(name);
  if (params == nullptr || params->spec.kind == QuantKind::kNone) return ToF32(rows);
  Tensor rounded = ToF32(rows).Clone();
  MxFakeQuantize(rounded, params->spec.mx);
  return rounded;
}

Tensor Calibration::CodesOfRows(const std::string& name, const Tensor& rows, int64_t first_row) const {
  const std::shared_ptr<const QParams> grid = GridOfRows(name, rows, first_row);
  if (grid == nullptr) return {};
  if (HoldsCodes(name)) return InTypeOf(rows, grid);
  return Within(name, [&] { return QuantizeWeight(rows, *grid, dialect_.rounding).codes; }).WithGrid(grid);
}

bool Calibration::HoldsCodes(const std::string& name) const {
  const PointParams* const params = params_.Find(name);
  return params != nullptr && params->GivenWithCodes();
}

Tensor Calibration::ReferenceOperand(const Tensor& stored) const {
  return stored.Grid() != nullptr ? OperandOf(stored) : ToF32(stored);
}

Tensor Calibration::OperandOf(const Tensor& codes) const {
  const QParams& grid = *codes.Grid();
  if (!MultipliedAsCodes(codes, grid)) {
    const Tensor values = Tensor::Uninitialized({DType::kF32, codes.GetShape()});
    constexpr int64_t kPieceElements = int64_t{1} << 16;
    ParallelFor(codes.Elements(), kPieceElements, [&](int64_t begin, int64_t end) {
      Dequantize(codes, grid, begin, values.F32().subspan(begin, end - begin));
    });
    return values;
  }
  return SignedWeight(codes);
}

bool Calibration::MultipliedAsCodes(const Tensor& weight, const QParams& grid) const {
  const QuantSpec& activation = recipe_.specs.activation;
  if (weight.GetShape().Rank() != 2 || activation.kind != QuantKind::kAffine) return false;
  const QParams usual{.dtype = activation.dtype.value_or(DType::kI16), .scale = {1}, .zero_point = {0}};
  return SummedInIntegers(&usual, &grid, weight.GetShape()[1]);
}

namespace {

simd::Grid GridOfTensor(const QParams& grid, Rounding rounding) {
  const CodeRange codes = CodesOf(grid.dtype);
  return {grid.scale[0], grid.zero_point[0], static_cast<int32_t>(codes.min), static_cast<int32_t>(codes.max),
          rounding};
}

}  // namespace

// ---- Observing ----------------------------------------------------------------------------------------------------

class ObserveReading::Visitor final : public PointVisitor {
 public:
  // Either may be null: nobody observes, or nothing is given.
  Visitor(const ObserveReading& reading, Observer* observer, const QParams* given, const TensorType& type)
      : reading_(reading),
        observer_(observer),
        elements_(type.shape.Elements()),
        width_(type.shape.Rank() == 0 ? 1 : type.shape[-1]) {
    if (given != nullptr) given_ = GridOfTensor(*given, reading.calibration_.GetDialect().rounding);
  }
  void Visit(std::span<float> values, int64_t first) override {
    if (observer_ != nullptr) Observe(values, first);
    if (given_) simd::Snap(values.data(), static_cast<int64_t>(values.size()), *given_);
  }
  void Observe(std::span<float> values, int64_t first) {
    if (!reading_.slice_) return observer_->Visit(values, first);
    const Slice& slice = *reading_.slice_;
    const bool cut = width_ == slice.columns;
    if (!cut && slice.column > 0) return;
    // Rows lie together in the slice, not in the whole.
    const int64_t width = cut ? slice.width : width_, begin = cut ? slice.column : 0;
    for (int64_t at = 0; at < static_cast<int64_t>(values.size());) {
      const int64_t row = (first + at) / width_, column = (first + at) % width_;
      const int64_t size = std::min<int64_t>(width_ - column, static_cast<int64_t>(values.size()) - at);
      observer_->Visit(values.subspan(at, size), (slice.position + row) * width + begin + column);
      at += size;
    }
  }
  void Begin(int64_t sample) {
    if (observer_ == nullptr) return;
    const std::optional<Slice>& slice = reading_.slice_;
    const int64_t width = slice && width_ == slice->columns ? slice->width : width_;
    observer_->BeginSample(sample, slice ? slice->length * width : elements_);
  }
  void End() {
    if (observer_ != nullptr) observer_->EndSample();
  }

 private:
  const ObserveReading& reading_;
  Observer* observer_;
  int64_t elements_, width_;
  std::optional<simd::Grid> given_;
};

ObserveReading::ObserveReading(const Calibration& calibration, ObserverMap* observers)
    : calibration_(calibration), observers_(observers) {}

std::unique_ptr<ObserveReading> ObserveReading::Reference(const Calibration& calibration) {
  if (!calibration.GivesPoints()) return nullptr;
  return std::unique_ptr<ObserveReading>(new ObserveReading(calibration, nullptr));
}

ObserveReading::~ObserveReading() = default;

PointVisitor* ObserveReading::At(const Point& point, const TensorType& type) {
  Observer* const observer = observers_ == nullptr ? nullptr : calibration_.ObserverOf(point, *observers_);
  const QParams* const given = calibration_.GivenGrid(point);
  if (observer == nullptr && given == nullptr) return nullptr;
  visitors_.push_back(std::make_unique<Visitor>(*this, observer, given, type));
  return visitors_.back().get();
}

void ObserveReading::Begin(int64_t sample, const std::optional<Slice>& piece) {
  slice_ = piece;
  for (const auto& visitor : visitors_) visitor->Begin(sample);
}

void ObserveReading::End() {
  for (const auto& visitor : visitors_) visitor->End();
}

// ---- Rounding -----------------------------------------------------------------------------------------------------

namespace {

class AffineVisitor final : public PointVisitor {
 public:
  AffineVisitor(const QParams& qparams, Rounding rounding) : grid_(GridOfTensor(qparams, rounding)) {}
  void Visit(std::span<float> values, int64_t) override {
    simd::Snap(values.data(), static_cast<int64_t>(values.size()), grid_);
  }

 private:
  simd::Grid grid_;
};

class MxVisitor final : public PointVisitor {
 public:
  MxVisitor(const MxSpec& spec, int64_t width) : spec_(spec), width_(width) {}
  // Blocks begin with the row, wherever the values do: a fused kernel hands over the keys that it keeps.
  void Visit(std::span<float> values, int64_t first) override {
    while (!values.empty()) {
      const auto size = static_cast<int64_t>(values.size());
      const int64_t column = first % width_, inside = column % kMxBlock;
      const int64_t rows = column == 0 ? size / width_ : 0;
      int64_t count = rows * width_;
      if (rows == 0) count = std::min({size, width_ - column, inside == 0 ? size : kMxBlock - inside});
      Tensor piece({DType::kF32, {std::max<int64_t>(rows, 1), rows == 0 ? count : width_}}, values.data(), nullptr);
      MxFakeQuantize(piece, spec_);
      values = values.subspan(static_cast<size_t>(count));
      first += count;
    }
  }

 private:
  MxSpec spec_;
  int64_t width_;
};

}  // namespace

FakeQuantReading::FakeQuantReading(const Calibration& calibration, bool on_grid)
    : calibration_(calibration), on_grid_(on_grid) {}
FakeQuantReading::~FakeQuantReading() = default;

PointVisitor* FakeQuantReading::At(const Point& point, const TensorType& type) {
  if (point.use == PointUse::kExportOnly || (on_grid_ && point.use == PointUse::kBoundary)) return nullptr;
  const PointParams& params = calibration_.ParamsOf(point.name);
  if (params.spec.kind == QuantKind::kNone) return nullptr;
  if (params.spec.kind == QuantKind::kMx) {
    const int rank = type.shape.Rank();
    MxSpec spec = params.spec.mx;
    if (spec.axis != -1 && spec.axis != rank - 1)
      Fail("{}: MX blocks of activations lie along the last axis, -1 or here {}; axis {} is another", point.name,
           rank - 1, spec.axis);
    spec.axis = -1;
    const int64_t width = rank == 0 ? 1 : type.shape[-1];
    std::unique_ptr<PointVisitor>& visitor = visitors_[fmt::format("{} {}", point.name, width)];
    if (!visitor) visitor = std::make_unique<MxVisitor>(spec, width);
    return visitor.get();
  }
  std::unique_ptr<PointVisitor>& visitor = visitors_[point.name];
  if (!visitor) visitor = std::make_unique<AffineVisitor>(params.qparams, calibration_.GetDialect().rounding);
  return visitor.get();
}

const QParams* FakeQuantReading::GridAt(const Point& point) {
  const PointParams* params = calibration_.Params().Find(point.name);
  const bool rounded =
      point.use != PointUse::kExportOnly && params != nullptr && params->spec.kind == QuantKind::kAffine;
  return rounded ? &params->qparams : nullptr;
}

Tensor Rounded(const Calibration& calibration, const std::string& point, const Tensor& values) {
  FakeQuantReading reading(calibration);
  PointVisitor* const visitor = reading.At({.name = point}, values.Type());
  if (visitor == nullptr) return values;
  const Tensor rounded = values.Clone();
  visitor->Visit(rounded.F32(), 0);
  return rounded;
}

// ---- Export -------------------------------------------------------------------------------------------------------

const QParams* CalibratedGrids::Find(const Point& point) const {
  const PointParams* params = calibration_.Params().Find(point.name);
  if (params != nullptr && params->spec.kind == QuantKind::kMx)
    Fail("{}: MX formats are simulated only, a Circle file cannot hold them; set the point to an integer type",
         point.name);
  // The reference's files of grids know nothing of points that only our export has; the exporter derives those.
  if (params == nullptr && point.use == PointUse::kExportOnly) return nullptr;
  return calibration_.GridOf(point.name);
}

namespace {

class LazyCodes final : public circle::LazyConstant {
 public:
  // `stored`: the weight holds the codes already.
  LazyCodes(Tensor weight, const QParams& grid, Rounding rounding, bool stored)
      : weight_(std::move(weight)), grid_(grid), rounding_(rounding), stored_(stored) {}
  void Fill(int64_t first, std::span<std::byte> out) const override {
    if (stored_) {
      std::memcpy(out.data(), weight_.Raw() + first, out.size());
      if (weight_.GetDType() != grid_.dtype) FlipSigns(out);
      return;
    }
    QuantizeWeightBytes(weight_, grid_, rounding_, first, out);
  }

 private:
  Tensor weight_;
  QParams grid_;
  Rounding rounding_;
  bool stored_;
};

}  // namespace

std::shared_ptr<const circle::LazyConstant> CalibratedGrids::LazyWeightCodes(const std::string& name,
                                                                             const QParams& grid) const {
  constexpr int64_t kLargeBytes = int64_t{16} << 20;
  RequireWeightType(grid.dtype);
  if (weights_.HoldsCodes(name) || !Own(name).Empty()) return nullptr;
  const Tensor weight = weights_.Stored(name);
  if (TensorType{grid.dtype, weight.GetShape()}.Bytes() <= kLargeBytes) return nullptr;
  return std::make_shared<LazyCodes>(weight, grid, calibration_.GetDialect().rounding, calibration_.HoldsCodes(name));
}

Tensor CalibratedGrids::WeightCodes(const std::string& name, const QParams& grid) const {
  if (const Tensor own = Own(name); !own.Empty()) return Quantize(own, grid);
  return weights_.Codes(name);
}

Tensor CalibratedGrids::WeightFloat(const std::string& name) const {
  const Tensor own = Own(name);
  return own.Empty() ? ToF32(weights_.Stored(name)) : own;
}

Tensor CalibratedGrids::Quantize(const Tensor& values, const QParams& grid) const {
  return QuantizeWeight(values, grid, calibration_.GetDialect().rounding).codes;
}

}  // namespace circlet
