#include "circlet/quant/observer.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/base/hash.h"
#include "circlet/io/json.h"
#include "circlet/quant/affine.h"
#include "ops/simd.h"

namespace circlet {
namespace {

using nlohmann::json;

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::string_view kStateName = "observer state";

// The loop ends: each failed exchange means that another thread brought a more extreme value.
template <typename Better>
void Replace(std::atomic<float>& held, float value, Better better) {
  float seen = held.load(std::memory_order_relaxed);
  while (better(value, seen) && !held.compare_exchange_weak(seen, value, std::memory_order_relaxed)) {
  }
}

class MinMaxObserver final : public Observer {
 public:
  explicit MinMaxObserver(const ObserverSpec& spec) : Observer(spec) {}
};

class EmaObserver final : public Observer {
 public:
  explicit EmaObserver(const ObserverSpec& spec) : Observer(spec) {}

  void Merge(const Observer&) override {
    Fail(
        "a moving average depends on the order of the samples and cannot be merged; calibrate in one process, or use "
        "observer minmax or percentile");
  }

 protected:
  void Fold(Bounds range) override {
    if (min_ > max_) {
      Observer::Fold(range);
      return;
    }
    const auto past = static_cast<float>(spec_.momentum);
    const auto present = static_cast<float>(1.0 - spec_.momentum);
    min_ = past * min_ + present * range.min;
    max_ = past * max_ + present * range.max;
  }
};

// Linearly interpolated quantile of sorted values, q in [0, 1].
double Quantile(const std::vector<double>& sorted, double q) {
  const double rank = q * static_cast<double>(sorted.size() - 1);
  const auto below = static_cast<size_t>(std::floor(rank));
  const size_t above = std::min(below + 1, sorted.size() - 1);
  return std::lerp(sorted[below], sorted[above], rank - static_cast<double>(below));
}

// Keeps the `max_samples` values of largest priority, out of up to `samples_per_batch` evenly spread ones of each
// sample (quantization.md 3.1). The priority is a hash of (seed, sample, element), so that what is kept does not depend
// on who saw a sample or when, and merging is the union cut to size.
class PercentileObserver final : public Observer {
 public:
  explicit PercentileObserver(const ObserverSpec& spec) : Observer(spec) {}

  void BeginSample(int64_t sample, int64_t elements) override {
    Observer::BeginSample(sample, elements);
    elements_ = elements;
    picks_ = std::min(elements, spec_.samples_per_batch);
    // Shifts the even spacing from sample to sample by the golden ratio, so that no position is always left out.
    phase_ = picks_ == elements ? 0 : std::fmod(static_cast<double>(sample) * 0.6180339887498949, 1.0);
    sample_hash_ = Mix(Mix(spec_.seed + kSplitMixStep) ^ static_cast<uint64_t>(sample));
  }

  void Visit(std::span<const float> values, int64_t first) override {
    Observer::Visit(values, first);
    if (picks_ == 0) return;
    const int64_t end = first + static_cast<int64_t>(values.size());
    const double spacing = static_cast<double>(elements_) / static_cast<double>(picks_);
    auto pick = static_cast<int64_t>(std::max(0.0, std::floor(static_cast<double>(first) / spacing - phase_) - 1));
    std::vector<Entry> found;
    for (int64_t at; (at = Position(pick)) < end && pick < picks_; ++pick) {
      if (at < first || !std::isfinite(values[at - first])) continue;
      const uint64_t priority = Mix(sample_hash_ ^ static_cast<uint64_t>(at));
      if (priority >= floor_.load(std::memory_order_relaxed)) found.push_back({priority, values[at - first]});
    }
    if (found.empty()) return;
    const std::lock_guard lock(mutex_);
    kept_.insert(kept_.end(), found.begin(), found.end());
    if (static_cast<int64_t>(kept_.size()) >= 2 * spec_.max_samples) Cut();
  }

  void Merge(const Observer& other) override {
    Observer::Merge(other);
    const auto& kept = dynamic_cast<const PercentileObserver&>(other).kept_;
    kept_.insert(kept_.end(), kept.begin(), kept.end());
    Cut();
  }

  json State() const override {
    json state = Observer::State();
    json priorities = json::array();
    json values = json::array();
    for (const Entry& entry : Kept()) {
      priorities.push_back(entry.priority);
      values.push_back(F32(entry.value));
    }
    state["priorities"] = std::move(priorities);
    state["values"] = std::move(values);
    return state;
  }

 protected:
  Bounds Covered(const PointSpec& spec) const override {
    std::vector<double> values;
    for (const Entry& entry : Kept()) values.push_back(spec.scheme.symmetric ? std::abs(entry.value) : entry.value);
    std::sort(values.begin(), values.end());
    const double share = spec_.percentile / 100.0;
    const bool all = spec_.percentile == 100.0;
    double low = min_;
    double high = max_;
    if (spec.scheme.symmetric) {
      high = all ? std::max(std::abs(min_), std::abs(max_)) : Quantile(values, share);
      low = -high;
    } else if (spec_.lower) {
      if (*spec_.lower > 0) low = Quantile(values, *spec_.lower / 100.0);
      if (*spec_.upper < 100) high = Quantile(values, *spec_.upper / 100.0);
    } else if (!all && min_ >= 0) {
      high = Quantile(values, share);
    } else if (!all && max_ <= 0) {
      low = Quantile(values, 1.0 - share);
    } else if (!all) {
      const double tail = (1.0 - share) / 2.0;
      low = Quantile(values, tail);
      high = Quantile(values, 1.0 - tail);
    }
    return {static_cast<float>(std::min(low, 0.0)), static_cast<float>(std::max(high, 0.0))};
  }

  void Restore(const json& state) override {
    Observer::Restore(state);
    const JsonObject object(state, std::string(kStateName));
    const json& priorities = object.Raw("priorities");
    const json& values = object.Raw("values");
    if (!priorities.is_array() || !values.is_array() || priorities.size() != values.size())
      object.FailAt("priorities", "expected two lists of one length, priorities and values; the file is damaged");
    for (size_t i = 0; i < priorities.size(); ++i) {
      if (!priorities[i].is_number_integer())
        object.FailAt("priorities", fmt::format("expected an integer, found {}", priorities[i].dump()));
      kept_.push_back({priorities[i].get<uint64_t>(), F32(values[i], kStateName)});
    }
  }

 private:
  struct Entry {
    uint64_t priority;
    float value;
    // Strongest first. Visits of equal position (heads that share a point) have equal priorities; the value decides.
    bool operator<(const Entry& other) const {
      return priority != other.priority ? priority > other.priority : value < other.value;
    }
  };

  int64_t Position(int64_t pick) const {
    if (picks_ == elements_) return pick;
    const double share = (static_cast<double>(pick) + phase_) / static_cast<double>(picks_);
    return static_cast<int64_t>(share * static_cast<double>(elements_));
  }

  void Cut() {
    if (static_cast<int64_t>(kept_.size()) <= spec_.max_samples) return;
    const auto end = kept_.begin() + spec_.max_samples;
    std::nth_element(kept_.begin(), end - 1, kept_.end());
    floor_.store((end - 1)->priority, std::memory_order_relaxed);
    kept_.erase(end, kept_.end());
  }

  // What counts, in an order that depends on nothing else.
  std::vector<Entry> Kept() const {
    std::vector<Entry> kept = kept_;
    std::sort(kept.begin(), kept.end());
    if (static_cast<int64_t>(kept.size()) > spec_.max_samples) kept.resize(spec_.max_samples);
    return kept;
  }

  int64_t elements_ = 0;
  int64_t picks_ = 0;
  double phase_ = 0;
  uint64_t sample_hash_ = 0;
  std::mutex mutex_;
  std::vector<Entry> kept_;         // up to twice max_samples between cuts
  std::atomic<uint64_t> floor_{0};  // weaker entries cannot be kept any more
};

// Watches values that go to a grid which is not theirs to change.
class GivenObserver final : public Observer {
 public:
  GivenObserver(const ObserverSpec& spec, DType type) : Observer(spec), type_(type) {
    const CodeRange codes = CodesOf(type);
    low_ = (static_cast<float>(codes.min - spec.zero_point) - 0.5f) * spec.step;
    high_ = (static_cast<float>(codes.max - spec.zero_point) + 0.5f) * spec.step;
  }

  void Visit(std::span<const float> values, int64_t first) override {
    Observer::Visit(values, first);
    values_ += static_cast<int64_t>(values.size());
    beyond_ += std::ranges::count_if(values, [this](float value) { return value < low_ || value > high_; });
  }
  void Merge(const Observer& other) override {
    Observer::Merge(other);
    const Beyond more = other.CountBeyond();
    values_ += more.values;
    beyond_ += more.beyond;
  }
  Beyond CountBeyond() const override { return {values_, beyond_}; }
  json State() const override {
    json state = Observer::State();
    state["given"] = {{"dtype", Name(type_)}, {"step", F32(spec_.step)}, {"zero_point", spec_.zero_point}};
    state["values"] = values_.load();
    state["beyond"] = beyond_.load();
    return state;
  }
  static std::unique_ptr<Observer> FromState(const json& state) {
    const JsonObject object(state, std::string(kStateName)), given = object.Object("given");
    const ObserverSpec spec{.kind = ObserverSpec::Kind::kGiven,
                            .step = F32(given.Raw("step"), given.Where("step")),
                            .zero_point = given.Required<int>("zero_point")};
    auto observer = std::make_unique<GivenObserver>(spec, DTypeFromName(given.Required<std::string>("dtype")));
    observer->Restore(state);
    observer->values_ = object.Required<int64_t>("values");
    observer->beyond_ = object.Required<int64_t>("beyond");
    return observer;
  }

 protected:
  QParams GridOver(Bounds, const PointSpec&) const override { return {type_, -1, {spec_.step}, {spec_.zero_point}}; }

 private:
  DType type_;
  float low_, high_;
  std::atomic<int64_t> values_{0}, beyond_{0};
};

std::unique_ptr<Observer> MakeOf(const ObserverSpec& spec) {
  switch (spec.kind) {
    case ObserverSpec::Kind::kMinMax:
      break;
    case ObserverSpec::Kind::kEma:
      return std::make_unique<EmaObserver>(spec);
    case ObserverSpec::Kind::kPercentile:
      return std::make_unique<PercentileObserver>(spec);
    case ObserverSpec::Kind::kGiven:
      break;  // Make and FromState make it, which know its type
  }
  return std::make_unique<MinMaxObserver>(spec);
}

}  // namespace

std::unique_ptr<Observer> Observer::Make(const PointSpec& spec) {
  if (spec.kind != QuantKind::kAffine) return MakeOf({});
  if (spec.observer.kind == ObserverSpec::Kind::kGiven)
    return std::make_unique<GivenObserver>(spec.observer, spec.dtype);
  return MakeOf(spec.observer);
}

std::unique_ptr<Observer> Observer::FromState(const json& state) {
  const JsonObject object(state, std::string(kStateName));
  if (object.Has("given")) return GivenObserver::FromState(state);
  const QuantSpec spec = QuantSpecFromJson(object.Raw("spec"), kStateName);
  std::unique_ptr<Observer> observer = MakeOf(spec.observer.value_or(ObserverSpec{}));
  observer->Restore(state);
  return observer;
}

void Observer::BeginSample(int64_t, int64_t) {
  sample_min_.store(kInfinity, std::memory_order_relaxed);
  sample_max_.store(-kInfinity, std::memory_order_relaxed);
  reached_.store(false, std::memory_order_relaxed);
}

void Observer::Visit(std::span<const float> values, int64_t) {
  if (values.empty()) return;
  const simd::Range range = simd::MinMax(values.data(), static_cast<int64_t>(values.size()));
  Replace(sample_min_, range.min, std::less<>());
  Replace(sample_max_, range.max, std::greater<>());
  if (!range.finite)
    non_finite_ += std::count_if(values.begin(), values.end(), [](float x) { return !std::isfinite(x); });
  if (!reached_.load(std::memory_order_relaxed)) reached_.store(true, std::memory_order_relaxed);
}

void Observer::EndSample() {
  if (!reached_.exchange(false)) return;
  ++samples_;
  if (sample_min_ <= sample_max_) Fold({sample_min_, sample_max_});
}

void Observer::Fold(Bounds range) {
  min_ = std::min(min_, range.min);
  max_ = std::max(max_, range.max);
}

void Observer::Merge(const Observer& other) {
  CIRCLET_CHECK(spec_ == other.spec_, "observers of different specifications");
  samples_ += other.samples_;
  non_finite_ += other.non_finite_;
  if (other.min_ <= other.max_) Fold({other.min_, other.max_});
}

json Observer::State() const {
  const bool given = spec_.kind == ObserverSpec::Kind::kGiven;
  return {{"spec", ToJson(QuantSpec{.observer = given ? ObserverSpec{} : spec_})},
          {"min", F32(min_)},
          {"max", F32(max_)},
          {"samples", samples_},
          {"non_finite", non_finite_.load()}};
}

void Observer::Restore(const json& state) {
  const JsonObject object(state, std::string(kStateName));
  min_ = F32(object.Raw("min"), object.Where("min"));
  max_ = F32(object.Raw("max"), object.Where("max"));
  samples_ = object.Required<int64_t>("samples");
  non_finite_ = object.Required<int64_t>("non_finite");
}

QParams Observer::Freeze(const PointSpec& spec, float headroom_below) const {
  if (spec.kind != QuantKind::kAffine) return {};
  CIRCLET_CHECK(spec.axis < 0, "{}: observers are per tensor, the axis is {}", spec.point, spec.axis);
  if (non_finite_ > 0)
    Fail(
        "{}: a NaN or an infinity reached this point ({} values in {} samples); check the weights and the calibration "
        "data, `circlet trace` shows where it began",
        spec.point, non_finite_.load(), samples_);
  if (min_ > max_)
    Fail(
        "{}: no calibration data reached this point; add samples that reach it (an image, for vision), or set it to "
        "no_quant in the recipe",
        spec.point);
  const Bounds covered = Covered(spec);
  return GridOver({covered.min - headroom_below, covered.max}, spec);
}

QParams Observer::GridOver(Bounds covered, const PointSpec& spec) const {
  return ComputeQParams(covered.min, covered.max, spec.dtype, spec.scheme.symmetric);
}

}  // namespace circlet
