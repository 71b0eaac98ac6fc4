#pragma once

#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <string>

#include "circlet/graph/graph.h"

namespace circlet {

// Gives a parameter: float32, or codes with their grid; the tensor must stay valid during the run. For an executor that
// computes in bf16 it may be bf16 as well.
using WeightSource = std::function<Tensor(const std::string& name)>;

// What a reading does at the points of a graph. Null = the float reading.
class PointReading {
 public:
  virtual ~PointReading() = default;
  // The visitor of a point, or null to pass. Called when a plan meets the point for the first time.
  virtual PointVisitor* At(const Point& point, const TensorType& type) = 0;
  // Whether visitors change values (fake-quantize) or only look (observe).
  virtual bool Writes() const = 0;
  // Whether visitors look at values, so that those are computed which nothing else reads.
  virtual bool Observes() const { return !Writes(); }
  // The grid that the values of a point lie on when the reading is done with them; null: on none. It must stay valid as
  // long as the reading.
  virtual const QParams* GridAt(const Point&) { return nullptr; }

  // A piece of a sample: positions from `position` of `length` and, of tensors that are `columns` wide, columns from
  // `column` of `width`. Elements count as if the whole had run at once; what is not that wide is the same in every
  // piece.
  struct Slice {
    int64_t position = 0, length = 0;
    int64_t column = 0, columns = 0, width = 0;
  };
  // Around the run of one sample, or of one of its pieces, for readings that tell samples apart.
  virtual void Begin(int64_t /*sample*/, const std::optional<Slice>& /*piece*/ = std::nullopt) {}
  virtual void End() {}
};

struct ExecutorOptions {
  // kBf16: products of linears and attention multiply bf16. Weights that are stored so are used in place, others are
  // rounded once when they are fetched. A weight that anything but linears reads stays float32.
  Compute compute = Compute::kFloat32;
  // Linears whose sums are float32 stay codes too and are widened a few MiB at a time in every run: for those who run a
  // graph seldom, or at one position, and would keep many.
  bool keep_codes = false;
};

// A float tensor rounded to bf16, or as it is when it is bf16 already: a weight for several executors with Compute::kBf16.
Tensor ToBF16(const Tensor& tensor);

// Runs one graph many times. Memory is planned once: buffers of dead values are reused, views share bytes, in-place
// operators overwrite; no value is allocated per operator at run time. Parameters that are codes stay so where products
// are summed in integers, where only rows are asked for, and where they would be large; else they are float32 for as
// long as the executor lives. Several threads may run executors at the same time, one each, in a SingleThreadScope.
class Executor {
 public:
  // `reading` may be null and must outlive the executor. Throws Error when the processor lacks what `options` asks for.
  Executor(Graph graph, PointReading* reading, ExecutorOptions options = {});
  ~Executor();
  Executor(Executor&&) noexcept;

  // `inputs` by input name; those of float32 may be codes with their grid. Throws Error naming a missing input or one
  // of another type. Weights are fetched once, at the first run. Results are copies, by output name. An Error inside a
  // node names the node's operator and nearest point.
  std::map<std::string, Tensor> Run(const std::map<std::string, Tensor>& inputs, const WeightSource& weights);

  // The same without copies: results are valid until the calling thread runs an executor again, and no longer than the
  // inputs and weights that they may be views of.
  std::map<std::string, Tensor> RunInPlace(const std::map<std::string, Tensor>& inputs, const WeightSource& weights);

  // The next run fetches the weights again (tables whose rows differ from run to run).
  void ForgetWeights();

  // Called behind every node with its output values; those of weights are bf16 where the executor binds them so
  // (debugging, traces, comparing files with the simulation).
  using Probe = std::function<void(const Node& node, int output, const Tensor& value)>;
  void SetProbe(Probe probe);

  int64_t PlannedBytes() const;  // size of the reused arena

 private:
  struct Plan;
  std::unique_ptr<Plan> plan_;
};

}  // namespace circlet
