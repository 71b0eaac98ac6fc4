#pragma once

#include <atomic>
#include <cstdint>
#include <limits>
#include <memory>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>

#include "circlet/base/qparams.h"
#include "circlet/quant/spec.h"

namespace circlet {

// Statistics of the values at one point (quantization.md 3). The outcome depends on the samples alone: not on how a
// tensor is cut into chunks, not on the order of the chunks or on the thread that brings them, and, EMA aside, not on
// the order of samples or on how they were shared between processes.
//
// One sample at a time: BeginSample, any number of Visits, EndSample. A point may be visited several times in a sample.
class Observer {
 public:
  // An observer of the kind that `spec` asks for; at points that are not affine it only watches.
  static std::unique_ptr<Observer> Make(const PointSpec& spec);
  // As it was when State() was taken; throws Error for anything else.
  static std::unique_ptr<Observer> FromState(const nlohmann::json& state);
  virtual ~Observer() = default;

  // `sample` names the sample in the whole calibration set, whatever process sees it; `elements` is the size of the
  // point's tensor.
  virtual void BeginSample(int64_t sample, int64_t elements);
  // Values first .. first + size - 1 of the tensor. Thread-safe.
  virtual void Visit(std::span<const float> values, int64_t first);
  void EndSample();

  // Adds what `other`, of the same specification, has seen of other samples. EMA depends on the order of samples: an
  // Error.
  virtual void Merge(const Observer& other);

  // Over all finished samples: smallest and largest finite value (+inf, -inf when there were none), or their moving
  // averages.
  float Min() const { return min_; }
  float Max() const { return max_; }
  int64_t Samples() const { return samples_; }       // samples that brought values
  int64_t NonFinite() const { return non_finite_; }  // NaNs and infinities among the values
  // Of a given grid: values seen, and how many of them lay beyond it.
  struct Beyond {
    int64_t values = 0, beyond = 0;
    bool operator==(const Beyond&) const = default;
  };
  virtual Beyond CountBeyond() const { return {}; }

  virtual nlohmann::json State() const;

  // The grid, per tensor; its range reaches `headroom_below` below the smallest value (Point::headroom_below). Empty
  // for a point that is not affine. Throws Error "POINT: ..." when no data reached it, or a NaN or an infinity did.
  QParams Freeze(const PointSpec& spec, float headroom_below) const;

 protected:
  struct Bounds {
    float min, max;
  };
  explicit Observer(const ObserverSpec& spec) : spec_(spec) {}
  // Takes in the range of one finished sample, or of another observer.
  virtual void Fold(Bounds range);
  // The range that the grid shall cover.
  virtual Bounds Covered(const PointSpec&) const { return {min_, max_}; }
  // The grid over that range.
  virtual QParams GridOver(Bounds covered, const PointSpec& spec) const;
  virtual void Restore(const nlohmann::json& state);

  const ObserverSpec spec_;
  float min_ = std::numeric_limits<float>::infinity();
  float max_ = -std::numeric_limits<float>::infinity();

 private:
  // Of the sample that is under way.
  std::atomic<float> sample_min_{std::numeric_limits<float>::infinity()};
  std::atomic<float> sample_max_{-std::numeric_limits<float>::infinity()};
  std::atomic<bool> reached_{false};
  std::atomic<int64_t> non_finite_{0};
  int64_t samples_ = 0;
};

}  // namespace circlet
