#pragma once

// From graph to Circle and back. Both ways read the same operators, so what a file computes is what its graph computes.

#include <map>
#include <memory>
#include <optional>
#include <string>

#include "circlet/circle/model.h"
#include "circlet/exec/executor.h"
#include "circlet/graph/graph.h"

namespace circlet::circle {

// The grids and codes that a graph's names stand for.
class GridSource {
 public:
  virtual ~GridSource() = default;
  // Null: the point has no grid and its tensor stays float.
  virtual const QParams* Find(const Point& point) const = 0;
  // A parameter in the storage form of its grid (4-bit packed).
  virtual circlet::Tensor WeightCodes(const std::string& name, const QParams& grid) const = 0;
  // The same in pieces, for a parameter too large to hold. Null: it is small enough, call WeightCodes.
  virtual std::shared_ptr<const LazyConstant> LazyWeightCodes(const std::string& name, const QParams& grid) const = 0;
  // A parameter without a grid of its own, as float32 (layer scalars, clip bounds).
  virtual circlet::Tensor WeightFloat(const std::string& name) const = 0;
  virtual circlet::Tensor Quantize(const circlet::Tensor& values, const QParams& grid) const = 0;
};

struct ExportOptions {
  // Axis 1 of every computed tensor has unknown size (token_embedding, ple_embedding); build the graph with length 1.
  bool dynamic_length = false;
};

// Fused operators are written as their expansions. A point becomes the grid of the tensor that it stands on; a second
// point with another grid becomes a QUANTIZE; operators that only move values keep their input's grid (format.md
// 7). Throws Error naming the nearest point when a computed float tensor is left without a grid.
Model ToCircle(const Graph& graph, const GridSource& grids, const ExportOptions& options = {});

// A file as a graph for Executor. Points are named after tensors; a quantized input, and the output of every operator that
// computes, is a point; rounding is that of format.md 4.
struct FileGraph {
  Graph graph;
  std::map<std::string, QParams> grids;     // by point name
  std::map<std::string, int32_t> constants;  // weight name -> tensor index in the model
};

// `length`: the size that stands for -1 in signatures. Throws Error naming operator and place when the file needs
// something that the executor lacks.
FileGraph ToGraph(const Model& model, std::optional<int64_t> length = std::nullopt);

// Constants as float32: (code - zero_point) * scale.
circlet::Tensor DequantizedConstant(const Tensor& tensor);

// Rounds at the points of a FileGraph.
class FileReading final : public PointReading {
 public:
  explicit FileReading(const std::map<std::string, QParams>& grids);
  ~FileReading() override;
  PointVisitor* At(const Point& point, const TensorType& type) override;
  bool Writes() const override { return true; }
  const QParams* GridAt(const Point& point) override;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// Runs a file once: inputs and outputs by tensor name, float32 where quantized. A dynamic length is taken from the inputs.
std::map<std::string, circlet::Tensor> RunModel(const Model& model, const std::map<std::string, circlet::Tensor>& inputs);

}  // namespace circlet::circle
