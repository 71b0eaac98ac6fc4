// Preloaded into the program, it makes one file-system call go wrong. Calls count when their path, or the file that their
// descriptor was opened from, lies below FAULT_UNDER. Environment:
//   FAULT_UNDER  absolute path
//   FAULT_AT     number of the call, from 1; 0: none
//   FAULT_MODE   kill: SIGKILL in front of the call; tear: of a write the first half is done before that
//                fail: the call fails with FAULT_ERRNO; fail-on: so do all later ones
//                short: this and all later writes and reads move half of what they could
//   FAULT_COUNT  file that gets the number of calls when the process exits

#include <dirent.h>
#include <dlfcn.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <cerrno>

namespace {

constexpr int kDescriptors = 4096;
std::atomic<bool> watched[kDescriptors];
std::atomic<long> calls{0};

struct Plan {
  const char* under = getenv("FAULT_UNDER");
  long at = getenv("FAULT_AT") != nullptr ? atol(getenv("FAULT_AT")) : 0;
  const char* mode = getenv("FAULT_MODE") != nullptr ? getenv("FAULT_MODE") : "";
  int error = getenv("FAULT_ERRNO") != nullptr ? atoi(getenv("FAULT_ERRNO")) : EIO;
  bool Is(const char* name) const { return strcmp(mode, name) == 0; }
};

const Plan& ThePlan() {
  static const Plan plan;
  return plan;
}

bool Below(const char* path) {
  const char* under = ThePlan().under;
  return under != nullptr && path != nullptr && strncmp(path, under, strlen(under)) == 0;
}
bool Watched(int file) { return file >= 0 && file < kDescriptors && watched[file]; }
int Watch(int file, bool yes) {
  if (file >= 0 && file < kDescriptors) watched[file] = yes;
  return file;
}
bool Concerns(int directory, const char* path) {
  return path[0] == '/' ? Below(path) : directory != AT_FDCWD && Watched(directory);
}

enum class Fault { kNone, kFail, kTear, kShort };

// Counts a call.
Fault Next() {
  const Plan& plan = ThePlan();
  const long call = ++calls;
  if (plan.at == 0 || call < plan.at) return Fault::kNone;
  if (plan.Is("short")) return Fault::kShort;
  if (plan.Is("fail-on") || (call == plan.at && plan.Is("fail"))) {
    errno = plan.error;
    return Fault::kFail;
  }
  if (call > plan.at) return Fault::kNone;
  if (plan.Is("tear")) return Fault::kTear;
  if (plan.Is("kill")) kill(getpid(), SIGKILL);
  return Fault::kNone;
}

template <typename Function>
Function* Real(Function*, const char* name) {
  return reinterpret_cast<Function*>(dlsym(RTLD_NEXT, name));
}

// Of a call without bytes: a torn one is a kill.
bool Fails(bool concerned) {
  if (!concerned) return false;
  const Fault fault = Next();
  if (fault == Fault::kTear) kill(getpid(), SIGKILL);
  return fault == Fault::kFail;
}

// Of a call that moves `size` bytes.
template <typename Call>
ssize_t Move(int file, size_t size, const Call& call) {
  if (!Watched(file)) return call(size);
  switch (Next()) {
    case Fault::kFail:
      return -1;
    case Fault::kTear:
      call(size / 2);
      kill(getpid(), SIGKILL);
      return -1;
    case Fault::kShort:
      return call(size > 1 ? size / 2 : size);
    case Fault::kNone:
      break;
  }
  return call(size);
}

__attribute__((destructor)) void TellCount() {
  const char* path = getenv("FAULT_COUNT");
  if (path == nullptr) return;
  char text[32];
  const int size = snprintf(text, sizeof text, "%ld", calls.load());
  const long file = syscall(SYS_openat, AT_FDCWD, path, O_WRONLY | O_CREAT | O_TRUNC, 0666);
  if (syscall(SYS_write, file, text, size) != size) _exit(70);
}

mode_t ModeOf(int flags, va_list arguments) {
  return (flags & (O_CREAT | __O_TMPFILE)) != 0 ? va_arg(arguments, mode_t) : 0;
}

}  // namespace

#define REAL(name) static auto* const real = Real(&::name, #name)

extern "C" {

#define DEFINE_OPEN(name)                                  \
  int name(const char* path, int flags, ...) {             \
    REAL(name);                                            \
    va_list arguments;                                     \
    va_start(arguments, flags);                            \
    const mode_t mode = ModeOf(flags, arguments);          \
    va_end(arguments);                                     \
    const bool concerned = Below(path);                    \
    if (Fails(concerned)) return -1;                       \
    return Watch(real(path, flags, mode), concerned);      \
  }
DEFINE_OPEN(open)
DEFINE_OPEN(open64)

#define DEFINE_OPENAT(name)                                          \
  int name(int directory, const char* path, int flags, ...) {        \
    REAL(name);                                                      \
    va_list arguments;                                               \
    va_start(arguments, flags);                                      \
    const mode_t mode = ModeOf(flags, arguments);                    \
    va_end(arguments);                                               \
    const bool concerned = Concerns(directory, path);                \
    if (Fails(concerned)) return -1;                                 \
    return Watch(real(directory, path, flags, mode), concerned);     \
  }
DEFINE_OPENAT(openat)
DEFINE_OPENAT(openat64)

int close(int file) {
  REAL(close);
  const bool fails = Fails(Watched(file));
  const int error = errno, closed = real(Watch(file, false));
  if (!fails) return closed;
  errno = error;
  return -1;
}

DIR* opendir(const char* path) {
  REAL(opendir);
  return Fails(Below(path)) ? nullptr : real(path);
}

ssize_t write(int file, const void* bytes, size_t size) {
  REAL(write);
  return Move(file, size, [&](size_t n) { return real(file, bytes, n); });
}
ssize_t pwrite(int file, const void* bytes, size_t size, off_t at) {
  REAL(pwrite);
  return Move(file, size, [&](size_t n) { return real(file, bytes, n, at); });
}
ssize_t pwrite64(int file, const void* bytes, size_t size, off64_t at) {
  REAL(pwrite64);
  return Move(file, size, [&](size_t n) { return real(file, bytes, n, at); });
}
ssize_t pread(int file, void* bytes, size_t size, off_t at) {
  REAL(pread);
  return Move(file, size, [&](size_t n) { return real(file, bytes, n, at); });
}
ssize_t pread64(int file, void* bytes, size_t size, off64_t at) {
  REAL(pread64);
  return Move(file, size, [&](size_t n) { return real(file, bytes, n, at); });
}

int fsync(int file) {
  REAL(fsync);
  return Fails(Watched(file)) ? -1 : real(file);
}
int fdatasync(int file) {
  REAL(fdatasync);
  return Fails(Watched(file)) ? -1 : real(file);
}
int ftruncate(int file, off_t size) noexcept {
  REAL(ftruncate);
  return Fails(Watched(file)) ? -1 : real(file, size);
}
int ftruncate64(int file, off64_t size) noexcept {
  REAL(ftruncate64);
  return Fails(Watched(file)) ? -1 : real(file, size);
}
int flock(int file, int operation) noexcept {
  REAL(flock);
  return Fails(Watched(file)) ? -1 : real(file, operation);
}

int mkdir(const char* path, mode_t mode) noexcept {
  REAL(mkdir);
  return Fails(Below(path)) ? -1 : real(path, mode);
}
int rmdir(const char* path) noexcept {
  REAL(rmdir);
  return Fails(Below(path)) ? -1 : real(path);
}
int unlink(const char* path) noexcept {
  REAL(unlink);
  return Fails(Below(path)) ? -1 : real(path);
}
int unlinkat(int directory, const char* path, int flags) noexcept {
  REAL(unlinkat);
  return Fails(Concerns(directory, path)) ? -1 : real(directory, path, flags);
}
int remove(const char* path) noexcept {
  REAL(remove);
  return Fails(Below(path)) ? -1 : real(path);
}
int rename(const char* from, const char* to) noexcept {
  REAL(rename);
  return Fails(Below(from) || Below(to)) ? -1 : real(from, to);
}
int renameat2(int from_directory, const char* from, int to_directory, const char* to, unsigned flags) noexcept {
  REAL(renameat2);
  return Fails(Below(from) || Below(to)) ? -1 : real(from_directory, from, to_directory, to, flags);
}

}  // extern "C"
