#pragma once

// The points of graphs one by one, in both readings: what a trace is made of.

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "circlet/smoke/trace.h"
#include "pipeline/watch.h"

namespace circlet {

// Each step runs as often as it takes to capture its points without holding more than a bounded part of them at a time.
class PointTrace {
 public:
  // `explained`: the point whose values are kept; empty: none.
  explicit PointTrace(std::string explained) : explained_(std::move(explained)) {}

  // Pieces of one step (slices, or several items) follow one another.
  void See(const WatchedStep& step);
  static int64_t Bytes(const Graph& graph);

  // In order of computation, when all steps are seen.
  std::vector<TracePoint> Take();

 private:
  struct Entry {
    TracePoint point;
    double weight_error = 0;   // of the weight in the product in front
    bool behind_norm = false;  // its own error was taken behind the norm that reads it
  };
  struct Sums;
  struct Seen;

  void Capture(const WatchedStep& step, const std::vector<std::string>& names, Seen& seen);
  void Settle();

  std::string explained_;
  std::vector<Entry> entries_;
  std::map<std::string, size_t> index_;         // of a point's entry
  std::map<std::string, double> error_of_key_;  // of what the store holds under a key
  std::shared_ptr<Seen> last_;                  // the step whose pieces come in
};

}  // namespace circlet
