#include "cli/process.h"

#include <malloc.h>
#include <unistd.h>

#include <cerrno>
#include <csignal>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <iostream>
#include <system_error>

#include "circlet/base/error.h"
#include "io/mapped_file.h"

namespace circlet {
namespace {

// What OpenMP reads before main starts. Its threads wait busily between parallel loops unless the environment says
// otherwise; beside any other load that slows a run down eightfold (133 s against 16 s measured). They spin for some
// 10 us, the length of a short loop's gap, and then sleep: 6.5 s where sleeping at once took 11.4 s. A stack size meant
// for another program may be too small for the kernels.
void SettleOpenMp(char** argv) {
  const bool waits = getenv("OMP_WAIT_POLICY") == nullptr;
  const bool stack = getenv("OMP_STACKSIZE") != nullptr || getenv("GOMP_STACKSIZE") != nullptr;
  if (!waits && !stack) return;
  unsetenv("OMP_STACKSIZE");
  unsetenv("GOMP_STACKSIZE");
  if (waits) {
    setenv("OMP_WAIT_POLICY", "passive", 1);
    setenv("GOMP_SPINCOUNT", "10000", 0);
  }
  execv("/proc/self/exe", argv);  // on failure the run goes on as it is
}

// Left alone, glibc takes ever larger blocks from its heaps, whose holes a streaming run never gives back.
void ReturnLargeBlocks() {
  constexpr int kLargeBytes = 256 << 10;
  mallopt(M_MMAP_THRESHOLD, kLargeBytes);
  mallopt(M_TRIM_THRESHOLD, kLargeBytes);
}

void Tell(const char* text) { [[maybe_unused]] const ssize_t told = write(STDERR_FILENO, text, strlen(text)); }

// A read of a mapped file failed: the file has become shorter, or its disk failed. What is called here may be called in
// a handler.
void OnBusError(int signal, siginfo_t* info, void*) {
  const char* const path = PathOfMapping(info->si_addr);
  if (path == nullptr) {  // not of a file: the signal comes again and ends the process
    std::signal(signal, SIG_DFL);
    return;
  }
  Tell("circlet: ");
  Tell(path);
  Tell(
      ": cannot be read any more, it was cut (or its disk failed) while it was in use; leave it alone and run again\n");
  _exit(2);
}

void MeetSignals() {
  struct sigaction action {};
  action.sa_sigaction = OnBusError;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGBUS, &action, nullptr);
  // A file past the limit (ulimit -f) is then told like a full disk.
  std::signal(SIGXFSZ, SIG_IGN);
}

}  // namespace

void PrepareProcess(char** argv) {
  SettleOpenMp(argv);
  ReturnLargeBlocks();
  MeetSignals();
}

void FlushOutput() {
  std::cout.flush();
  if (std::fflush(stdout) == 0 && std::ferror(stdout) == 0 && std::cout.good()) return;
  Fail("standard output: cannot be written{}; what the command printed is not complete",
       errno == 0 ? "" : ": " + std::generic_category().message(errno));
}

}  // namespace circlet
