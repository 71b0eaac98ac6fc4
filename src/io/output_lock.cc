#include "io/output_lock.h"

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <string>
#include <string_view>

#include "io/system_error.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

// The number of the process that wrote it; "" in the moment before it did.
std::string OwnerIn(int file) {
  char text[32];
  const ssize_t size = pread(file, text, sizeof text, 0);
  return std::string(text, static_cast<size_t>(std::max<ssize_t>(0, size)));
}

bool IsNumber(std::string_view text) {
  return std::all_of(text.begin(), text.end(), [](char c) { return c >= '0' && c <= '9'; });
}

}  // namespace

OutputLock::OutputLock(const fs::path& output) {
  std::error_code error;
  path_ = fs::weakly_canonical(fs::absolute(output, error), error).lexically_normal();
  if (error) FailErrno(output, "used for output", error.value());
  if (path_.filename().empty()) path_ = path_.parent_path();
  path_ += ".lock";
  while (!TryTake()) close(file_);
}

// False: its owner took the file away between open and lock.
bool OutputLock::TryTake() {
  file_ = open(path_.c_str(), O_RDWR | O_CREAT | O_NOFOLLOW | O_NONBLOCK | O_CLOEXEC, 0666);
  if (file_ < 0) FailErrno(errno == ENOENT ? path_.parent_path() : path_, "written");
  const auto give_up = [this](const std::string& what) {
    close(file_);
    Fail("{}", what);
  };
  const std::string owner = OwnerIn(file_);
  if (!IsNumber(owner))
    give_up(fmt::format("{}: is in the way and no lock of circlet; move it away, or choose another output", path_.string()));
  if (flock(file_, LOCK_EX | LOCK_NB) != 0 && errno == EWOULDBLOCK)
    give_up(fmt::format("another run{} is writing there; wait for its end, or choose another output",
                        owner.empty() ? "" : " (process " + owner + ")"));
  struct stat held {}, there {};
  if (fstat(file_, &held) != 0 || stat(path_.c_str(), &there) != 0) return false;
  if (held.st_dev != there.st_dev || held.st_ino != there.st_ino) return false;
  // On a full disk the number is missing, which is only told to others.
  const std::string number = std::to_string(getpid());
  if (ftruncate(file_, 0) == 0 && pwrite(file_, number.data(), number.size(), 0) < 0) return true;
  return true;
}

OutputLock::~OutputLock() {
  unlink(path_.c_str());
  close(file_);
}

}  // namespace circlet
