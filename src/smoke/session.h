#pragma once

// The readings of a case, one after the other: what runner, trace and examples share.

#include <functional>
#include <set>

#include "circlet/smoke/smoke.h"

namespace circlet {

class SmokeSession {
 public:
  SmokeSession(Recipe recipe, std::vector<SmokePart> parts)
      : parts_(std::move(parts)), calibration_(std::move(recipe), kDefault) {}

  // Shows up to `iters` samples of each part to the observers (0 or less: all).
  void Observe(int iters);
  // Points that met a NaN or an infinity.
  std::vector<std::string> NonFinite();
  // Fixes every grid; also of boundaries, which no other graph of a case computes.
  void Freeze();

  SmokeValues RunFloat(const SmokePart& part, const SmokeValues& inputs, PointReading* reading = nullptr) const;
  // `reading`: null for plain fake-quantization.
  SmokeValues RunRounded(const SmokePart& part, const SmokeValues& inputs, PointReading* reading = nullptr);

  const std::vector<SmokePart>& Parts() const { return parts_; }
  Calibration& GetCalibration() { return calibration_; }
  // Every point of every part, once.
  std::vector<Point> Points() const;

 private:
  std::vector<SmokePart> parts_;
  Calibration calibration_;
};

}  // namespace circlet
