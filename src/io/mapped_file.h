#pragma once

#include <sys/stat.h>

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <span>
#include <string_view>

namespace circlet {

// A regular file mapped read-only; writing through it faults. A file that shrinks while it is mapped, or whose disk
// fails, makes a read behind its end raise SIGBUS: PathOfMapping tells a handler of that signal which file it was.
class MappedFile {
 public:
  // Throws Error naming the path and the system's text. Pipes and devices are refused at once, never waited for.
  static std::shared_ptr<const MappedFile> Open(const std::filesystem::path& path);
  // A file in `directory` that has no name and is gone with the mapping, filled by write(append).
  using Append = std::function<void(std::span<const std::byte>)>;
  static std::shared_ptr<const MappedFile> Nameless(const std::filesystem::path& directory,
                                                    const std::function<void(const Append& append)>& write);
  ~MappedFile();
  MappedFile(const MappedFile&) = delete;
  MappedFile& operator=(const MappedFile&) = delete;

  std::span<const std::byte> Bytes() const { return bytes_; }
  // Lets the kernel drop the whole pages inside `part`; a later read maps them again. A part outside is left alone.
  void Release(std::span<const std::byte> part) const;
  // Lets the kernel read the pages of `part` ahead.
  void Prefetch(std::span<const std::byte> part) const;
  // Throws Error when the path holds another file than was mapped, or this one with another size or time of writing. A
  // file that was only deleted keeps its bytes for as long as it is mapped.
  void RequireUnchanged() const;

 private:
  // What tells that a file is still the same, with the same bytes.
  struct Stamp {
    uint64_t device = 0, inode = 0;
    int64_t size = 0, seconds = 0, nanoseconds = 0;
    bool operator==(const Stamp&) const = default;
  };
  MappedFile(std::filesystem::path path, std::span<const std::byte> bytes, const Stamp& stamp);

  static std::shared_ptr<const MappedFile> Map(const std::filesystem::path& path, int file);
  static Stamp StampOf(const struct ::stat& status);
  void Advise(std::span<const std::byte> part, int advice) const;

  std::filesystem::path path_;
  std::span<const std::byte> bytes_;
  Stamp stamp_;
  int slot_ = -1;  // in the list that PathOfMapping reads
};

// What a file that is no regular one is: "a directory", "a pipe" ...
std::string_view KindOf(mode_t mode);

// A descriptor of a new file in `directory` without a name, so that it is gone with the process; negative: errno tells.
int OpenNameless(const std::filesystem::path& directory);

// The path of the mapped file that the address lies in, null when there is none. Safe in a signal handler.
const char* PathOfMapping(const void* address);

}  // namespace circlet
