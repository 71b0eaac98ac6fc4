#pragma once

#include <filesystem>

namespace circlet {

// Keeps other processes away from an output directory, which need not exist: the file NAME.lock beside it, locked for as
// long as this object and the process live. It holds the process's number and goes with the object; a killed process
// leaves it behind unlocked, and the next one takes it.
class OutputLock {
 public:
  // Throws Error when another process has it ("another run (process 4711) is writing there") or when the file cannot be
  // made. On a file system without locks nothing is held.
  explicit OutputLock(const std::filesystem::path& output);
  ~OutputLock();
  OutputLock(const OutputLock&) = delete;
  OutputLock& operator=(const OutputLock&) = delete;

 private:
  bool TryTake();

  std::filesystem::path path_;
  int file_ = -1;
};

}  // namespace circlet
