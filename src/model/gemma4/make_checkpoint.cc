#include "circlet/model/gemma4/make_checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <cmath>
#include <cstring>
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
#include "ops/simd.h"

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

// int8 steps that leave room for values of the size that norms give; the head's are not rounded.
std::optional<float> StepOf(const StoredTensor& tensor) {
  using Part = StoredTensor::Part;
  constexpr float kInputEnd = 6, kOutputEnd = 12, kCodes = 127;
  const bool head = tensor.parameter.kind == WeightKind::kHead;
  switch (tensor.part) {
    case Part::kInputStep:
      return head ? 0 : kInputEnd / kCodes;
    case Part::kOutputStep:
      return head ? 0 : kOutputEnd / kCodes;
    case Part::kCacheStep:
      return kInputEnd / kCodes;
    default:
      return std::nullopt;
  }
}

// A row's values, or the codes or scales of them: a group's largest value lies half a step inside the largest code.
void StoreRow(const StoredTensor& tensor, std::span<const uint16_t> values, std::byte* out) {
  using Part = StoredTensor::Part;
  if (tensor.part == Part::kValues && tensor.type.dtype == DType::kBF16) {
    std::memcpy(out, values.data(), values.size_bytes());
    return;
  }
  std::vector<float> row(values.size());
  simd::BF16ToF32(values.data(), static_cast<int64_t>(values.size()), row.data());
  if (tensor.part == Part::kValues) {
    std::memcpy(out, row.data(), row.size() * sizeof(float));
    return;
  }
  const int levels = 1 << (tensor.bits - 1);
  const size_t groups = tensor.groups, width = row.size() / groups;
  if (tensor.part == Part::kCodes) std::memset(out, 0, static_cast<size_t>(tensor.type.shape[1]));
  for (size_t group = 0; group < groups; ++group) {
    float largest = 0;
    for (size_t i = 0; i < width; ++i) largest = std::max(largest, std::abs(row[group * width + i]));
    const float scale = largest > 0 ? largest / (static_cast<float>(levels) - 0.5f) : 1.0f;
    if (tensor.part == Part::kScales) {
      std::memcpy(out + group * sizeof(float), &scale, sizeof(float));
      continue;
    }
    for (size_t i = group * width; i < (group + 1) * width; ++i) {
      const int code = std::clamp(static_cast<int>(std::lrint(row[i] / scale)), -levels, levels - 1);
      const size_t bit = i * static_cast<size_t>(tensor.bits);
      const int field = tensor.bits == 8 ? code : code + levels;
      out[bit / 8] |= static_cast<std::byte>(static_cast<unsigned>(field & ((1 << tensor.bits) - 1)) << (bit % 8));
    }
  }
}

// Makes blocks of rows with all threads while the block before goes to the file.
class Stream {
 public:
  Stream(uint64_t seed, int64_t total, const CheckpointProgress& progress)
      : seed_(seed), total_(total), progress_(progress) {}
  ~Stream() {
    if (pending_.valid()) pending_.wait();
  }

  void WriteShard(const fs::path& path, const std::vector<StoredTensor>& tensors) {
    SafetensorsWriter writer(path, {{"format", "pt"}});
    for (const StoredTensor& tensor : tensors) writer.Declare(tensor.name, tensor.type);
    for (const StoredTensor& tensor : tensors) WriteTensor(writer, tensor);
    Settle();
    writer.Finish();
  }

 private:
  void WriteTensor(SafetensorsWriter& writer, const StoredTensor& tensor) {
    if (const std::optional<float> step = StepOf(tensor)) {
      Settle();
      writer.Append(std::as_bytes(std::span(&*step, 1)));
      done_ += static_cast<int64_t>(sizeof(float));
      if (progress_) progress_(done_, total_);
      return;
    }
    const RandomTensor random(tensor.parameter, seed_);
    const int64_t columns = random.Columns();
    const int64_t row_bytes = tensor.type.Bytes() / random.Rows();
    const int64_t block = std::max<int64_t>(1, kBlockBytes / std::max(2 * columns, row_bytes));
    for (int64_t first = 0; first < random.Rows(); first += block) {
      const int64_t rows = std::min(block, random.Rows() - first);
      std::vector<std::byte>& buffer = buffers_[turn_];
      turn_ = 1 - turn_;
      buffer.resize(rows * row_bytes);
      ParallelFor(rows, std::max<int64_t>(1, kGrainValues / columns), [&](int64_t begin, int64_t end) {
        std::vector<uint16_t> values(columns);
        for (int64_t row = begin; row < end; ++row) {
          random.FillRow(first + row, values.data());
          StoreRow(tensor, values, buffer.data() + row * row_bytes);
        }
      });
      Settle();
      pending_ =
          std::async(std::launch::async, [&writer, &buffer] { writer.Append(std::as_bytes(std::span(buffer))); });
      done_ += rows * row_bytes;
      if (progress_) progress_(done_, total_);
    }
  }

  void Settle() {
    if (pending_.valid()) pending_.get();
  }

  uint64_t seed_;
  int64_t done_ = 0, total_;
  const CheckpointProgress& progress_;
  std::vector<std::byte> buffers_[2];
  int turn_ = 0;
  std::future<void> pending_;
};

// Packed checkpoints are one file.
std::vector<std::vector<StoredTensor>> ShardsOf(const json& config, const std::vector<StoredTensor>& tensors) {
  if (config.contains("quantization_config")) return {tensors};
  std::vector<std::vector<StoredTensor>> shards;
  auto next = tensors.begin();
  for (const std::vector<Parameter>& shard : SplitIntoShards(StoredTensors(config), kShardBytes)) {
    shards.emplace_back(next, next + static_cast<std::ptrdiff_t>(shard.size()));
    next += static_cast<std::ptrdiff_t>(shard.size());
  }
  return shards;
}

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
  const json& config = files.at("config.json");
  const std::vector<StoredTensor> tensors = TensorsOfFile(config);
  CheckpointSummary summary;
  summary.tensors = static_cast<int64_t>(tensors.size());
  int64_t bytes = 0;
  for (const StoredTensor& tensor : tensors) {
    using Part = StoredTensor::Part;
    if (tensor.part == Part::kValues || tensor.part == Part::kCodes)
      summary.parameters += tensor.parameter.shape.Elements();
    bytes += tensor.type.Bytes();
  }
  CreateDirectories(directory);
  const OutputLock lock(directory);
  PrepareDirectory(directory);
  RequireFreeSpace(directory, bytes);

  const std::vector<std::vector<StoredTensor>> shards = ShardsOf(config, tensors);
  json weight_map = json::object();
  Stream stream(seed, bytes, progress);
  for (size_t i = 0; i < shards.size(); ++i) {
    const std::string name = ShardName(i, shards.size());
    stream.WriteShard(directory / name, shards[i]);
    summary.files.push_back(directory / name);
    for (const StoredTensor& tensor : shards[i]) weight_map[tensor.name] = name;
  }
  if (shards.size() > 1) {
    summary.files.push_back(directory / "model.safetensors.index.json");
    WriteJson(summary.files.back(), {{"metadata", {{"total_parameters", summary.parameters}, {"total_size", bytes}}},
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
