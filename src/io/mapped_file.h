#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>

namespace circlet {

// A regular file mapped read-only; writing through it faults. The file must not shrink while it is mapped.
class MappedFile {
 public:
  // Throws Error naming the path and the system's text.
  static std::shared_ptr<const MappedFile> Open(const std::filesystem::path& path);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> Bytes() const { return bytes_; }
  // Lets the kernel drop the whole pages inside `part`; a later read maps them again. A part outside is left alone.
  void Release(std::span<const std::byte> part) const;
  // Lets the kernel read the pages of `part` ahead.
  void Prefetch(std::span<const std::byte> part) const;

 private:
  explicit MappedFile(std::span<const std::byte> bytes) : bytes_(bytes) {}

  void Advise(std::span<const std::byte> part, int advice) const;

  std::span<const std::byte> bytes_;
};

}  // namespace circlet
