#pragma once

// A look into a run (circlet/smoke/trace.h): whoever watches sees each step of the measured items once its grids are
// fixed, and may run it again with readings of its own.

#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "circlet/pipeline/quantize.h"
#include "circlet/quant/calibration.h"
#include "pipeline/activations.h"

namespace circlet {

struct WatchedStep {
  std::string name;
  const Graph& graph;
  const Calibration& calibration;
  bool on_grid = false;  // inputs of the rounded chain lie on the grids of boundary points already
  // Keys that the graph's inputs are made of and that its outputs are kept under.
  std::map<std::string, std::vector<std::string>> reads, keeps;
  // Of a graph that computes a piece of the item: the head, in slices of positions and vocabulary.
  std::optional<PointReading::Slice> slice;
  // A parameter as the checkpoint has it, or as the rounded chain multiplies it; of a slice its rows.
  std::function<Tensor(const std::string& name, bool rounded)> parameter;
  // Runs the graph on what a chain brought here; Chain::kQuant with rounded parameters.
  std::function<void(Chain chain, PointReading& reading)> run;
};

class Watcher {
 public:
  virtual ~Watcher() = default;
  // How many samples are calibrated on, at most, before the one that is measured.
  virtual int64_t CalibrationSamples() const = 0;
  // Every point and parameter that will be met, before anything is computed. May throw Error.
  virtual void Expect(std::span<const Point> points) = 0;
  // In order of computation, one at a time; what a step is cut into, one after the other.
  virtual void See(const WatchedStep& step) = 0;
  // Memory that it takes while it sees such a graph.
  virtual int64_t Bytes(const Graph& graph) const = 0;
};

// Quantize without files, on the calibration samples and one that is measured: the first of the evaluation samples, or
// the last of the others where there are none. A watcher sees the latter, without padding.
QuantizeResult QuantizeWatched(const QuantizeOptions& options, Watcher& watcher);

}  // namespace circlet
