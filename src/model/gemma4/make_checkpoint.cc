#include "circlet/model/gemma4/make_checkpoint.h"

#include <fmt/format.h>

#include <future>
#include <nlohmann/json.hpp>
#include <optional>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "io/output_lock.h"
#include "model/gemma4/presets.h"
#include "model/gemma4/random_weights.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;

constexpr int64_t kShardBytes = 2'000'000'000;
constexpr int64_t kBlockBytes = int64_t{16} << 20;
constexpr int64_t kGrainValues = 1 << 17;

std::string ShardName(size_t index, size_t count) {
  if (count == 1) return "model.safetensors";
  return fmt::format("model-{:05}-of-{:05}.safetensors", index + 1, count);
}

// Makes blocks of rows with all threads while the block before goes to the file.
class Stream {
 public:
  Stream(uint64_t seed, int64_t total, const CheckpointProgress& progress)
      : seed_(seed), total_(total), progress_(progress) {}
  ~Stream() {
    if (pending_.valid()) pending_.wait();
  }

  void WriteShard(const fs::path& path, const std::vector<Parameter>& tensors) {
    SafetensorsWriter writer(path, {{"format", "pt"}});
    for (const Parameter& tensor : tensors) writer.Declare(tensor.name, {DType::kBF16, tensor.shape});
    for (const Parameter& tensor : tensors) WriteTensor(writer, tensor);
    Settle();
    writer.Finish();
  }

 private:
  void WriteTensor(SafetensorsWriter& writer, const Parameter& tensor) {
    const RandomTensor random(tensor, seed_);
    const int64_t columns = random.Columns();
    const int64_t block = std::max<int64_t>(1, kBlockBytes / (2 * columns));
    for (int64_t first = 0; first < random.Rows(); first += block) {
      const int64_t rows = std::min(block, random.Rows() - first);
      std::vector<uint16_t>& buffer = buffers_[turn_];
      turn_ = 1 - turn_;
      buffer.resize(rows * columns);
      ParallelFor(rows, std::max<int64_t>(1, kGrainValues / columns), [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) random.FillRow(first + row, buffer.data() + row * columns);
      });
      Settle();
      pending_ =
          std::async(std::launch::async, [&writer, &buffer] { writer.Append(std::as_bytes(std::span(buffer))); });
      done_ += 2 * rows * columns;
      if (progress_) progress_(done_, total_);
    }
  }

  void Settle() {
    if (pending_.valid()) pending_.get();
  }

  uint64_t seed_;
  int64_t done_ = 0, total_;
  const CheckpointProgress& progress_;
  std::vector<uint16_t> buffers_[2];
  int turn_ = 0;
  std::future<void> pending_;
};

void PrepareDirectory(const fs::path& directory) {
  std::error_code ignored;
  if (fs::exists(directory / "config.json", ignored))
    Fail("{}: holds a config.json already; choose another directory or remove this checkpoint", directory.string());
  CreateDirectories(directory);
}

}  // namespace

std::vector<std::string> CheckpointPresets() { return PresetNames(); }

CheckpointSummary MakeCheckpoint(std::string_view preset, uint64_t seed, const fs::path& directory,
                                 const CheckpointProgress& progress) {
  const std::map<std::string, json> files = PresetFiles(preset);
  const std::vector<Parameter> tensors = StoredTensors(files.at("config.json"));
  CheckpointSummary summary;
  summary.tensors = static_cast<int64_t>(tensors.size());
  for (const Parameter& tensor : tensors) summary.parameters += tensor.shape.Elements();
  CreateDirectories(directory);
  const OutputLock lock(directory);
  PrepareDirectory(directory);
  RequireFreeSpace(directory, 2 * summary.parameters);

  const std::vector<std::vector<Parameter>> shards = SplitIntoShards(tensors, kShardBytes);
  json weight_map = json::object();
  Stream stream(seed, 2 * summary.parameters, progress);
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = ShardName(i, shards.size());
    stream.WriteShard(directory / name, shards[i]);
    summary.files.push_back(directory / name);
    for (const Parameter& tensor : shards[i]) weight_map[tensor.name] = name;
  }
  if (shards.size() > 1) {
    summary.files.push_back(directory / "model.safetensors.index.json");
    WriteJson(summary.files.back(),
              {{"metadata", {{"total_parameters", summary.parameters}, {"total_size", 2 * summary.parameters}}},
               {"weight_map", weight_map}});
  }
  // config.json comes last: a directory without it is a checkpoint that was not finished.
  for (const char* name :
       {"generation_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "config.json"}) {
    summary.files.push_back(directory / name);
    WriteJson(summary.files.back(), files.at(name));
  }
  for (const fs::path& file : summary.files) summary.bytes += static_cast<int64_t>(fs::file_size(file));
  return summary;
}

}  // namespace circlet
