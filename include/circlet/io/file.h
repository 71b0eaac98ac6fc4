#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace circlet {

// Largest text file (JSON, YAML, templates) that is read as a whole: 256 MiB.
inline constexpr int64_t kTextLimitBytes = int64_t{256} << 20;

// The bytes of a regular file. An Error names the path and whether it is missing, a directory, unreadable or larger
// than `limit_bytes`.
std::string ReadFile(const std::filesystem::path& path, int64_t limit_bytes = kTextLimitBytes);

// That a file can come to stand at `path`: its directory is there and may be written to, and what has that name, if
// anything, is a regular file. Else an Error: a new file would take the place of a device, a pipe or a link.
void RequireWritable(const std::filesystem::path& path);

// A file that appears whole or not at all: bytes go to a temporary name in the same directory; Commit() flushes them to
// the disk and renames. Without Commit() nothing remains. Failures (no space, no permission, missing directory, a path
// that RequireWritable() refuses) are Errors naming the final path and the system's text.
class AtomicFile {
 public:
  explicit AtomicFile(std::filesystem::path path);
  ~AtomicFile();
  AtomicFile(AtomicFile&&) noexcept;

  void Write(std::span<const std::byte> bytes);
  void Write(std::string_view text) { Write(std::as_bytes(std::span(text))); }
  int64_t Size() const;  // bytes written so far
  const std::filesystem::path& Path() const;
  void Commit();

 private:
  struct State;
  std::unique_ptr<State> state_;
};

// AtomicFile in one call.
void WriteFile(const std::filesystem::path& path, std::string_view text);

// SHA-256 (FIPS 180-4) as 64 lower-case hexadecimal digits.
std::string Sha256(std::span<const std::byte> bytes);
std::string Sha256File(const std::filesystem::path& path);

// Makes a directory and its parents where they are missing. A path that cannot be one is an Error.
void CreateDirectories(const std::filesystem::path& path);

// Makes `path` a directory that a run may fill: creates it with its parents, or takes it when it is empty. One that
// holds files, a path that is no directory or one that cannot be written is an Error.
void PrepareOutputDirectory(const std::filesystem::path& path);

// What lies in a directory, sorted.
std::vector<std::filesystem::path> EntriesOf(const std::filesystem::path& directory);
// Removes a file, when there is one.
void RemoveFile(const std::filesystem::path& path);
// Brings the names in a directory to the disk, where the file system can: until then a power cut takes new ones back.
void SyncDirectory(const std::filesystem::path& directory);

// Whether `path` is what an AtomicFile of a killed process left.
bool IsLeftover(const std::filesystem::path& path);
// Removes all such files in `directory`.
void RemoveLeftovers(const std::filesystem::path& directory);

// Throws Error naming both figures when the file system of `directory` has less than `needed_bytes` free.
void RequireFreeSpace(const std::filesystem::path& directory, int64_t needed_bytes);

// "931 B", "12.4 KiB", "1.9 GiB".
std::string HumanBytes(int64_t bytes);

}  // namespace circlet
