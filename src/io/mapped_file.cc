#include "io/mapped_file.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>

#include "io/system_error.h"

namespace circlet {

std::shared_ptr<const MappedFile> MappedFile::Open(const std::filesystem::path& path) {
  const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
  if (file < 0) FailErrno(path, "opened");
  const std::shared_ptr<const void> closer(nullptr, [file](const void*) { close(file); });
  struct stat status {};
  if (fstat(file, &status) != 0) FailErrno(path, "opened");
  if (!S_ISREG(status.st_mode)) {
    Fail("{}: is {}; name a file", path.string(), S_ISDIR(status.st_mode) ? "a directory" : "not a regular file");
  }
  const auto size = static_cast<size_t>(status.st_size);
  void* start = nullptr;
  if (size > 0) {  // the kernel refuses an empty mapping
    start = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, file, 0);
    if (start == MAP_FAILED) FailErrno(path, "mapped");
  }
  return std::shared_ptr<const MappedFile>(new MappedFile({static_cast<const std::byte*>(start), size}));
}

MappedFile::~MappedFile() {
  if (!bytes_.empty()) munmap(const_cast<std::byte*>(bytes_.data()), bytes_.size());
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
