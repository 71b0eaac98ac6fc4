#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet {

// A safetensors file, mapped read-only (gemma4.md 1). Tensors point into the mapping and keep it alive. Anything wrong
// with the header (length, JSON, dtype, offsets that overlap, leave gaps, run out or overflow, product of the shape) is
// an Error naming file, tensor, expected and found.
class SafetensorsFile {
 public:
  static SafetensorsFile Open(const std::filesystem::path& path);

  const std::filesystem::path& Path() const { return path_; }
  const std::map<std::string, Tensor>& Tensors() const { return tensors_; }
  const std::map<std::string, std::string>& Metadata() const { return metadata_; }
  const Tensor* Find(std::string_view name) const;
  // Throws Error naming the file, the tensor and the nearest name.
  const Tensor& Get(std::string_view name) const;

 private:
  std::filesystem::path path_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

// The tensors of a checkpoint directory: model.safetensors, or the shards of model.safetensors.index.json.
class Checkpoint {
 public:
  static Checkpoint Open(const std::filesystem::path& directory);

  const Tensor* Find(std::string_view name) const;
  // Throws Error naming directory, tensor, expected and found shape.
  const Tensor& Get(std::string_view name, const Shape& expected) const;
  std::vector<std::string> Names() const;
  // Where a tensor lies, for errors: "model-00002-of-00003.safetensors".
  std::string FileOf(std::string_view name) const;
  // Tells the kernel that the pages of a tensor are not needed any more (they are clean; a later read maps them again).
  void Release(std::string_view name) const;

 private:
  std::filesystem::path directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, int, std::less<>> file_of_;
};

// Writes tensors (dtype, shape, bytes as they are) in the order of their names; appears whole or not at all. Tensors may
// be appended one by one, so that a file larger than memory can be written.
class SafetensorsWriter {
 public:
  explicit SafetensorsWriter(std::filesystem::path path);
  ~SafetensorsWriter();  // an unfinished file is removed
  SafetensorsWriter(SafetensorsWriter&&) noexcept;
  // Types and names of all tensors first, bytes after that in the same order.
  void Declare(std::string name, TensorType type);
  void Write(const Tensor& tensor);  // the next declared tensor
  // The next bytes of the tensor that is being written, in pieces of any size, for tensors larger than memory.
  void Append(std::span<const std::byte> bytes);
  void Finish();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

void WriteSafetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace circlet
