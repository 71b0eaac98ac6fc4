#pragma once

// A model that runs token by token: the exported files of an output directory, the float checkpoint, or its
// simulation, behind one interface (docs/runtime.md).

#include <cstdint>
#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "circlet/base/tensor.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/preprocess/chat.h"
#include "circlet/preprocess/samples.h"

namespace circlet::runtime {

struct ModelFacts {
  int64_t context = 0;     // positions that a sequence may have
  int64_t vocabulary = 0;  // ids but placeholders are below it
  int64_t bos = -1, pad = 0;
  std::vector<int64_t> stops;  // ids that end an answer
  Placeholders placeholders;
  bool pictures = false;  // whether it takes any
  bool decodes = true;    // whether Decode is possible
};

// One sequence. Not for several threads at a time; it computes on all that SetThreads gives.
class Session {
 public:
  virtual ~Session() = default;

  virtual const ModelFacts& Facts() const = 0;
  // Begins a sequence: ids with a placeholder for each soft token, and the pictures that these stand for. Throws Error
  // for no ids, more than the context has, ids past the vocabulary, other placeholders than pictures, and pictures of a
  // size that the model has no units for.
  virtual void Prefill(const Sample& prompt) = 0;
  // Why Prefill would refuse the prompt's pictures; empty: it takes them.
  virtual std::string PictureFault(const Sample& prompt) const = 0;
  // Appends one token. Throws Error when the context is full.
  virtual void Decode(int64_t id) = 0;
  // Positions so far.
  virtual int64_t Length() const = 0;
  // [1,1,V]: what may follow `position`, one of those that the last Prefill or Decode computed. Files give codes with
  // their grid (Tensor::Grid), a checkpoint float32, a simulation the float32 values of the codes.
  virtual Tensor Logits(int64_t position) = 0;
  Tensor Logits() { return Logits(Length() - 1); }
  // Reads the weights of one decode step as plainly as all threads can, which bounds its speed: bytes 0 where a session
  // has no such weights.
  struct WeightRead {
    int64_t bytes = 0;
    double seconds = 0;
  };
  virtual WeightRead ReadWeights() { return {}; }
};

// Logits as float32, whatever they are.
std::vector<float> ValuesOf(const Tensor& logits);

// Of a checkpoint; what quantize wrote takes none of them.
struct SessionOptions {
  // Positions of its caches. 0: 2048, or fewer when config.json says so; of a simulation, those that its files would
  // have.
  int64_t context = 0;
  bool text_only = false;  // leave the vision tower out
  // The simulation instead of the float model: fake-quantized as this run calibrates it, or on the grids of its
  // qparams. `model` is the directory, and nothing is written or measured.
  std::optional<QuantizeOptions> simulation;
  std::string* notes = nullptr;  // gets what calibration did not use or had to assume, a line each
};

// `directory`: what quantize wrote, or a checkpoint. Nothing but small files is read before units are run, and of those
// whether all are there in the size that manifest.json lists; each unit's hash is compared when it is first run. Throws
// Error for a directory that is neither, one of another version, and missing or altered files.
std::unique_ptr<Session> OpenSession(const std::filesystem::path& directory, const SessionOptions& options = {});
// Whether it is what quantize wrote, not a checkpoint.
bool IsOutputDirectory(const std::filesystem::path& directory);

}  // namespace circlet::runtime
