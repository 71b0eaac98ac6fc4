#pragma once

// What a session runs: units with named ends, wherever they come from.

#include <map>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "circlet/runtime/session.h"

namespace circlet::runtime {

using Values = std::map<std::string, Tensor>;

// As in pipeline.json (docs/report.md).
struct End {
  std::string name, key;
};
struct LayerPlace {
  int index = 0;
  std::string attention;
  int window = 0;
  bool bidirectional_pictures = false;
};

class RunnableUnit {
 public:
  virtual ~RunnableUnit() = default;
  // By the names of the ends. Integers on a grid go in and come out as codes with their grid; values of a graph that
  // has no grids are float32.
  virtual Values Run(const Values& inputs) = 0;
  // As they are stored: what a run of one position reads once. Empty where that is not known.
  virtual std::vector<Tensor> LinearWeights() { return {}; }

  std::string name;
  std::vector<End> inputs, outputs;
  std::optional<LayerPlace> layer;
};

inline constexpr char kNoDecoding[] =
    "was exported without decode units (export.prefill_decode: false), so that it gives no token after the first; "
    "quantize again with them";

class UnitSource {
 public:
  virtual ~UnitSource() = default;
  virtual const ModelFacts& Facts() const = 0;
  // In the order of running, up to the hidden states that the head reads. The fusion, if there is one, has an input
  // "visual". Valid until the next call.
  virtual std::vector<RunnableUnit*> Prefill(int64_t length) = 0;
  // The length that a prompt is padded to.
  virtual int64_t PaddedLength(int64_t length) const = 0;
  // What gives a longer context: an option of its export, or of the call.
  virtual std::string_view LongerBy() const = 0;
  virtual std::vector<RunnableUnit*> Decode() = 0;
  virtual RunnableUnit& Head() = 0;
  // pixels [1,P,3 ps^2] uint8, positions [P,2] of one picture -> its soft tokens [n,D].
  virtual Tensor Features(const Tensor& pixels, std::span<const int64_t> positions) = 0;
  // Why it would refuse a picture of these positions; empty: it would not.
  virtual std::string PictureFault(std::span<const int64_t> positions) const = 0;
  // text [1,S,D] with the soft tokens of each picture at its places.
  virtual Tensor Fused(const Tensor& text, std::span<const Tensor> features, std::span<const int64_t> places) = 0;
  // Rows of positions from `first` on, [1,count,h].
  virtual Tensor Rope(const std::string& attention, bool cosine, int64_t first, int64_t count) = 0;
  virtual float MaskFill() const = 0;
};

// The same bytes with the grid of `like`.
inline Tensor Gridded(const Tensor& tensor, const Tensor& like) {
  return like.Grid() == nullptr ? tensor : tensor.WithGrid(like.Grid());
}
// Codes as float32; anything else as it is.
Tensor Widened(const Tensor& tensor);

std::unique_ptr<UnitSource> OpenFiles(const std::filesystem::path& directory);
std::unique_ptr<UnitSource> OpenCheckpoint(const std::filesystem::path& directory, const SessionOptions& options);

}  // namespace circlet::runtime
