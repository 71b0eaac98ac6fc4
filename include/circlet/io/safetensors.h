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

class MappedFile;

// A safetensors file, mapped read-only (model.md 1). Tensors point into the mapping and keep it alive, but for those
// whose bytes the file does not align to their element type: these are copied. Anything wrong with the header (length,
// JSON, dtype, offsets that overlap, leave gaps, run out or overflow, product of the shape) is an Error naming file,
// tensor, expected and found.
class SafetensorsFile {
 public:
  static SafetensorsFile Open(const std::filesystem::path& path);

  const std::filesystem::path& Path() const { return path_; }
  const std::map<std::string, Tensor>& Tensors() const { return tensors_; }
  const std::map<std::string, std::string>& Metadata() const { return metadata_; }
  // Tensors of types that circlet does not read ("F8_E4M3"), by name.
  const std::map<std::string, std::string, std::less<>>& Opaque() const { return opaque_; }
  const Tensor* Find(std::string_view name) const;
  // Throws Error naming the file, the tensor and the nearest name.
  const Tensor& Get(std::string_view name) const;
  // Tells the kernel that the pages of a tensor are not needed any more (they are clean; a later read maps them again).
  void Release(const Tensor& tensor) const;
  // Tells it that they will be, so that it reads ahead.
  void Prefetch(const Tensor& tensor) const;
  // Throws Error when the file was replaced or written to since it was opened: tensors of before and after are mixed.
  void RequireUnchanged() const;

 private:
  std::filesystem::path path_;
  std::shared_ptr<const MappedFile> mapping_;
  std::map<std::string, Tensor> tensors_;
  std::map<std::string, std::string> metadata_;
  std::map<std::string, std::string, std::less<>> opaque_;
};

// The tensors of a checkpoint directory (model.md 1): model.safetensors, or all tensors of the shards that the
// weight_map of model.safetensors.index.json names. Which tensor the index looks for where does not count, as in the
// reference: an index often stays behind when a checkpoint is saved again. A shard that is missing or lies outside the
// directory, and a tensor in two shards with different values are Errors.
class Checkpoint {
 public:
  static Checkpoint Open(const std::filesystem::path& directory);
  // The names of the files that Open reads.
  static std::vector<std::string> FilesOf(const std::filesystem::path& directory);

  const Tensor* Find(std::string_view name) const;
  // Throws Error naming directory, tensor, expected and found shape.
  const Tensor& Get(std::string_view name, const Shape& expected) const;
  std::vector<std::string> Names() const;
  // Tensors of types that circlet does not read, by name.
  const std::map<std::string, std::string, std::less<>>& Opaque() const { return opaque_; }
  // Where a tensor lies, for errors: "model-00002-of-00003.safetensors".
  std::string FileOf(std::string_view name) const;
  // Those of SafetensorsFile by name.
  void Release(std::string_view name) const;
  void Prefetch(std::string_view name) const;
  // Of all its files; a run asks when it has read them for the last time.
  void RequireUnchanged() const;

 private:
  std::filesystem::path directory_;
  std::vector<SafetensorsFile> files_;
  std::map<std::string, int, std::less<>> file_of_;
  std::map<std::string, std::string, std::less<>> opaque_;
};

// Writes tensors (dtype, shape, bytes as they are) in the order of their declaration; appears whole or not at all.
// Tensors are appended one by one, so that a file larger than memory can be written. The bytes of the first tensor are
// 8-aligned; those of the others are when tensors are declared by falling element size.
class SafetensorsWriter {
 public:
  explicit SafetensorsWriter(std::filesystem::path path, std::map<std::string, std::string> metadata = {});
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

// In the order of the names.
void WriteSafetensors(const std::filesystem::path& path, const std::map<std::string, Tensor>& tensors,
                      const std::map<std::string, std::string>& metadata = {});

}  // namespace circlet
