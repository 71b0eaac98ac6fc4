#include "smoke/session.h"

#include <algorithm>

#include "circlet/model/gemma4/vision.h"

namespace circlet {
namespace {

Point Observable(Point point) {
  if (point.use == PointUse::kBoundary) point.use = PointUse::kNormal;
  return point;
}

// In a model a boundary is observed by its producer; here the inputs are all that there is of it.
class ObserveAll final : public PointReading {
 public:
  explicit ObserveAll(Calibration& calibration) : observe_(calibration) {}
  PointVisitor* At(const Point& point, const TensorType& type) override { return observe_.At(Observable(point), type); }
  bool Writes() const override { return false; }
  ObserveReading& Observing() { return observe_; }

 private:
  ObserveReading observe_;
};

}  // namespace

void SmokeSession::Observe(int iters) {
  int64_t index = 0;
  for (const SmokePart& part : parts_) {
    ObserveAll reading(calibration_);
    Executor executor(part.graph, &reading);
    const size_t count = iters <= 0 ? part.calibration.size() : std::min<size_t>(iters, part.calibration.size());
    for (size_t i = 0; i < count; ++i) {
      reading.Observing().Begin(index++);
      executor.RunInPlace(part.calibration[i], part.stored);
      reading.Observing().End();
    }
  }
}

std::vector<std::string> SmokeSession::NonFinite() {
  std::vector<std::string> names;
  for (const auto& [name, observer] : calibration_.Observers())
    if (observer->NonFinite() > 0) names.push_back(name);
  return names;
}

void SmokeSession::Freeze() {
  for (const SmokePart& part : parts_) {
    calibration_.Freeze(part.graph, part.stored);
    Graph boundaries;
    const ValueId value = boundaries.AddInput("value", {DType::kF32, {1}});
    for (const Point& point : PointsOf(part.graph))
      if (point.use == PointUse::kBoundary) boundaries.AddPoint(Observable(point), value);
    calibration_.Freeze(boundaries, part.stored);
  }
}

SmokeValues SmokeSession::RunFloat(const SmokePart& part, const SmokeValues& inputs, PointReading* reading) const {
  return Executor(part.graph, reading).Run(inputs, part.stored);
}

SmokeValues SmokeSession::RunRounded(const SmokePart& part, const SmokeValues& inputs, PointReading* reading) {
  FakeQuantReading rounding(calibration_);
  const RoundedWeights rounded(calibration_, part.stored);
  // Position embeddings have one name and as many values as there are patch grids, and round at a point of their own.
  const WeightSource weights = [&](const std::string& name) {
    return name == VisionWeights::PositionEmbeddingsName() ? part.stored(name) : rounded(name);
  };
  return Executor(part.graph, reading != nullptr ? reading : &rounding).Run(inputs, weights);
}

std::vector<Point> SmokeSession::Points() const {
  std::vector<Point> points;
  std::set<std::string> known;
  for (const SmokePart& part : parts_)
    for (const Point& point : PointsOf(part.graph))
      if (!point.name.empty() && known.insert(point.name).second) points.push_back(point);
  return points;
}

}  // namespace circlet
