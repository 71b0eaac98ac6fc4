#include "circlet/io/file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <utility>

#include "circlet/base/error.h"
#include "io/mapped_file.h"
#include "io/system_error.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

constexpr std::string_view kTemporaryMark = ".circlet-partial-";

}  // namespace

std::string ReadFile(const fs::path& path, int64_t limit_bytes) {
  const auto file = MappedFile::Open(path);
  const auto size = static_cast<int64_t>(file->Bytes().size());
  if (size > limit_bytes) {
    Fail("{}: has {}, at most {} are read; is it the right file?", path.string(), HumanBytes(size),
         HumanBytes(limit_bytes));
  }
  return std::string(reinterpret_cast<const char*>(file->Bytes().data()), file->Bytes().size());
}

void RequireWritable(const fs::path& path) {
  if (!path.has_filename()) Fail("\"{}\": names no file; give its name, too", path.string());
  struct stat status {};
  if (lstat(path.c_str(), &status) == 0 && !S_ISREG(status.st_mode)) {
    std::error_code error;
    if (S_ISLNK(status.st_mode))
      Fail("{}: is a link to {}; name the file itself", path.string(), fs::read_symlink(path, error).string());
    Fail("{}: is {}; name a file", path.string(), KindOf(status.st_mode));
  }
  const fs::path directory = path.has_parent_path() ? path.parent_path() : fs::path(".");
  if (faccessat(AT_FDCWD, directory.c_str(), W_OK | X_OK, AT_EACCESS) != 0) FailErrno(path, "written");
}

struct AtomicFile::State {
  fs::path path;
  fs::path temporary;
  int file = -1;
  int64_t size = 0;
  std::string pending;  // small writes are gathered

  void Flush(std::string_view bytes) {
    while (!bytes.empty()) {
      const ssize_t put = write(file, bytes.data(), bytes.size());
      if (put < 0 && errno == EINTR) continue;
      if (put < 0) FailErrno(path, "written");
      bytes.remove_prefix(static_cast<size_t>(put));
    }
  }

  ~State() {
    if (file >= 0) close(file);
    if (!temporary.empty()) unlink(temporary.c_str());
  }
};

AtomicFile::AtomicFile(fs::path path) : state_(std::make_unique<State>()) {
  static std::atomic<int> serial{0};
  state_->path = std::move(path);
  RequireWritable(state_->path);
  const std::string name =
      fmt::format(".{}{}{}-{}", state_->path.filename().string(), kTemporaryMark, getpid(), serial++);
  const fs::path temporary = state_->path.parent_path() / name;
  state_->file = open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
  if (state_->file < 0) FailErrno(state_->path, "written");
  state_->temporary = temporary;
}

AtomicFile::~AtomicFile() = default;
AtomicFile::AtomicFile(AtomicFile&&) noexcept = default;

void AtomicFile::Write(std::span<const std::byte> bytes) {
  constexpr size_t kGatherBytes = size_t{256} << 10;
  CIRCLET_CHECK(state_ != nullptr && state_->file >= 0, "written after Commit()");
  const std::string_view text(reinterpret_cast<const char*>(bytes.data()), bytes.size());
  state_->size += static_cast<int64_t>(text.size());
  if (state_->pending.size() + text.size() < kGatherBytes) {
    state_->pending += text;
    return;
  }
  state_->Flush(state_->pending);
  state_->pending.clear();
  state_->Flush(text);
}

int64_t AtomicFile::Size() const { return state_->size; }
const fs::path& AtomicFile::Path() const { return state_->path; }

void AtomicFile::Commit() {
  CIRCLET_CHECK(state_ != nullptr && state_->file >= 0, "committed twice");
  State& state = *state_;
  state.Flush(state.pending);
  state.pending.clear();
  if (fsync(state.file) != 0) FailErrno(state.path, "written");
  const int file = std::exchange(state.file, -1);
  if (close(file) != 0) FailErrno(state.path, "written");
  if (rename(state.temporary.c_str(), state.path.c_str()) != 0) FailErrno(state.path, "written");
  state.temporary.clear();
  SyncDirectory(state.path.parent_path());
}

void WriteFile(const fs::path& path, std::string_view text) {
  AtomicFile file(path);
  file.Write(text);
  file.Commit();
}

std::vector<fs::path> EntriesOf(const fs::path& directory) {
  std::vector<fs::path> entries;
  std::error_code error;
  for (fs::directory_iterator entry(directory, error); !error && entry != fs::directory_iterator();
       entry.increment(error))
    entries.push_back(entry->path());
  if (error) FailErrno(directory, "listed", error.value());
  std::sort(entries.begin(), entries.end());
  return entries;
}

void RemoveFile(const fs::path& path) {
  std::error_code error;
  if (fs::remove(path, error); error) FailErrno(path, "removed", error.value());
}

void SyncDirectory(const fs::path& directory) {
  const int handle = open(directory.empty() ? "." : directory.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC);
  if (handle < 0) return;
  fsync(handle);
  close(handle);
}

bool IsLeftover(const fs::path& path) {
  const std::string name = path.filename();
  return name.starts_with('.') && name.find(kTemporaryMark) != std::string::npos &&
         fs::is_regular_file(fs::symlink_status(path));
}

void RemoveLeftovers(const fs::path& directory) {
  for (const fs::path& entry : EntriesOf(directory))
    if (IsLeftover(entry)) RemoveFile(entry);
}

void CreateDirectories(const fs::path& path) {
  std::error_code error;
  fs::create_directories(path, error);
  if (error) FailErrno(path, "created", error.value());
}

void PrepareOutputDirectory(const fs::path& path) {
  try {
    if (fs::exists(path) && !fs::is_directory(path)) {
      Fail("{}: is a file, the output must be a directory; choose another name", path.string());
    }
    fs::create_directories(path);
    if (access(path.c_str(), R_OK | W_OK | X_OK) != 0) FailErrno(path, "written");
    if (fs::is_empty(path)) return;
    Fail("{}: is not empty (it holds \"{}\"); pass --force to replace it, or choose another directory", path.string(),
         EntriesOf(path).front().filename().string());
  } catch (const fs::filesystem_error& error) {
    FailErrno(path, "used for output", error.code().value());
  }
}

void RequireFreeSpace(const fs::path& directory, int64_t needed_bytes) {
  std::error_code error;
  const fs::space_info space = fs::space(directory, error);
  if (error) FailErrno(directory, "examined", error.value());
  if (space.available < static_cast<uintmax_t>(needed_bytes)) {
    Fail("{}: {} are free, {} are needed; free some space or choose another place", directory.string(),
         HumanBytes(static_cast<int64_t>(space.available)), HumanBytes(needed_bytes));
  }
}

std::string HumanBytes(int64_t bytes) {
  if (bytes < 1024) return fmt::format("{} B", bytes);
  double amount = static_cast<double>(bytes);
  const char* const units[] = {"B", "KiB", "MiB", "GiB", "TiB"};
  int unit = 0;
  for (; amount >= 1023.95 && unit < 4; ++unit) amount /= 1024;
  return fmt::format("{:.1f} {}", amount, units[unit]);
}

}  // namespace circlet
