#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <cerrno>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>

#include "io/system_error.h"

namespace circlet {
namespace {

// The mapped files, for PathOfMapping: plain numbers that a signal handler may read at any moment. A file that finds no
// room is mapped without.
struct MappingSlot {
  std::atomic<bool> taken = false;
  std::atomic<uintptr_t> begin = 0, end = 0;
  std::atomic<const char*> path = nullptr;
};
std::array<MappingSlot, 1024> mapping_slots;

struct Closer {
  int file;
  ~Closer() { close(file); }
};

}  // namespace

std::string_view KindOf(mode_t mode) {
  if (S_ISDIR(mode)) return "a directory";
  if (S_ISFIFO(mode)) return "a pipe";
  if (S_ISCHR(mode) || S_ISBLK(mode)) return "a device";
  return "not a regular file";
}

MappedFile::Stamp MappedFile::StampOf(const struct ::stat& status) {
  return {.device = status.st_dev,
          .inode = status.st_ino,
          .size = status.st_size,
          .seconds = status.st_mtim.tv_sec,
          .nanoseconds = status.st_mtim.tv_nsec};
}

std::shared_ptr<const MappedFile> MappedFile::Open(const std::filesystem::path& path) {
  // Without O_NONBLOCK the opening of a pipe waits for its writer.
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK | O_NOCTTY);
  if (file < 0) FailErrno(path, "opened");
  const Closer closer{file};
  struct stat status {};
  if (fstat(file, &status) != 0) FailErrno(path, "opened");
  if (!S_ISREG(status.st_mode)) Fail("{}: is {}; name a file", path.string(), KindOf(status.st_mode));
  return Map(path, file);
}

std::shared_ptr<const MappedFile> MappedFile::Nameless(const std::filesystem::path& directory,
                                                       const std::function<void(const Append& append)>& write_all) {
  const int file = OpenNameless(directory);
  if (file < 0) FailErrno(directory, "written");
  const Closer closer{file};
  write_all([&](std::span<const std::byte> bytes) {
    while (!bytes.empty()) {
      const ssize_t written = write(file, bytes.data(), bytes.size());
      if (written < 0 && errno == EINTR) continue;
      if (written <= 0) FailErrno(directory, "written");
      bytes = bytes.subspan(static_cast<size_t>(written));
    }
  });
  return Map(directory, file);
}

std::shared_ptr<const MappedFile> MappedFile::Map(const std::filesystem::path& path, int file) {
  struct stat status {};
  if (fstat(file, &status) != 0) FailErrno(path, "opened");
  const auto size = static_cast<size_t>(status.st_size);
  void* start = nullptr;
  if (size > 0) {  // the kernel refuses an empty mapping
    start = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (start == MAP_FAILED) FailErrno(path, "mapped");
  }
  return std::shared_ptr<const MappedFile>(
      new MappedFile(path, {static_cast<const std::byte*>(start), size}, StampOf(status)));
}

int OpenNameless(const std::filesystem::path& directory) {
  if (const int file = open(directory.c_str(), O_TMPFILE | O_RDWR | O_CLOEXEC, 0600); file >= 0) return file;
  // Some file systems cannot.
  std::string name = (directory / "circlet-XXXXXX").string();
  const int file = mkostemp(name.data(), O_CLOEXEC);
  if (file >= 0) unlink(name.c_str());
  return file;
}

MappedFile::MappedFile(std::filesystem::path path, std::span<const std::byte> bytes, const Stamp& stamp)
    : path_(std::move(path)), bytes_(bytes), stamp_(stamp) {
  if (bytes_.empty()) return;
  for (size_t i = 0; i < mapping_slots.size() && slot_ < 0; ++i)
    if (!mapping_slots[i].taken.exchange(true)) slot_ = static_cast<int>(i);
  if (slot_ < 0) return;
  MappingSlot& slot = mapping_slots[static_cast<size_t>(slot_)];
  slot.path = path_.c_str();
  slot.begin = reinterpret_cast<uintptr_t>(bytes_.data());
  slot.end = slot.begin + bytes_.size();
}

MappedFile::~MappedFile() {
  if (slot_ >= 0) {
    MappingSlot& slot = mapping_slots[static_cast<size_t>(slot_)];
    slot.end = 0;
    slot.begin = 0;
    slot.path = nullptr;
    slot.taken = false;
  }
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
}

void MappedFile::RequireUnchanged() const {
  struct stat status {};
  if (stat(path_.c_str(), &status) != 0) {
    if (errno == ENOENT || errno == ENOTDIR) return;  // deleted
    FailErrno(path_, "examined");
  }
  if (StampOf(status) == stamp_) return;
  if (status.st_dev == stamp_.device && status.st_ino == stamp_.inode)
    Fail("{}: was written to while it was read, results may mix both contents; leave it alone and run again",
         path_.string());
  Fail("{}: was replaced while it was read, results are not of the file that is there; run again", path_.string());
}

const char* PathOfMapping(const void* address) {
  const auto at = reinterpret_cast<uintptr_t>(address);
  for (const MappingSlot& slot : mapping_slots)
    if (slot.begin <= at && at < slot.end) return slot.path;
  return nullptr;
}

void MappedFile::Release(std::span<const std::byte> part) const { Advise(part, MADV_DONTNEED); }
void MappedFile::Prefetch(std::span<const std::byte> part) const { Advise(part, MADV_WILLNEED); }

void MappedFile::Advise(std::span<const std::byte> part, int advice) const {
  const auto begin = reinterpret_cast<uintptr_t>(part.data());
  const auto mapped = reinterpret_cast<uintptr_t>(bytes_.data());
  // On memory that is not this mapping, MADV_DONTNEED would wipe it.
  if (begin < mapped || begin + part.size() > mapped + bytes_.size()) return;
  const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const uintptr_t first = (begin + page - 1) / page * page;
  const uintptr_t last = (begin + part.size()) / page * page;
  if (first < last) madvise(reinterpret_cast<void*>(first), last - first, advice);
}

}  // namespace circlet
