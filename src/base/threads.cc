#include "circlet/base/threads.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <latch>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "circlet/base/error.h"
#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

namespace circlet {
namespace {

// ThreadSanitizer does not see how OpenMP starts and ends a region, which orders what is done before, in and behind it.
#ifdef __SANITIZE_THREAD__
char region_begins, region_ends;
void BeforeRegion() { __tsan_release(&region_begins); }
void InRegion() { __tsan_acquire(&region_begins); }
void LeavingRegion() { __tsan_release(&region_ends); }
void BehindRegion() { __tsan_acquire(&region_ends); }
#else
void BeforeRegion() {}
void InRegion() {}
void LeavingRegion() {}
void BehindRegion() {}
#endif

// OpenMP ends the process when a thread cannot be started. These are told instead: so many at the same time, once.
void TryThreads(int count) {
  std::latch all(1);
  std::vector<std::jthread> threads;
  std::string failure;
  try {
    while (static_cast<int>(threads.size()) < count) threads.emplace_back([&all] { all.wait(); });
  } catch (const std::system_error& error) {
    failure = error.code().message();
  } catch (const std::bad_alloc&) {
    failure = "out of memory";
  }
  const size_t started = threads.size();
  all.count_down();
  threads.clear();
  if (!failure.empty())
    Fail("{} threads: only {} can be started ({}); use fewer (--threads), or raise the limit of processes or memory",
         count + 1, started + 1, failure);
}

// Threads that a parallel region gets which asks for `wanted` (OMP_THREAD_LIMIT, OMP_MAX_ACTIVE_LEVELS and whatever
// else may bound it).
int ThreadsOfRegion(int wanted) {
  int granted = 1;
#pragma omp parallel num_threads(wanted)
#pragma omp master
  granted = omp_get_num_threads();
  return granted;
}

}  // namespace

void SetThreads(int count) { omp_set_num_threads(std::max(1, count)); }

// The products of oneDNN are made for the number of threads that OpenMP names and leave work out when a region then
// gets fewer: what it names must be what it gives. The settings are the calling thread's own, and so is the proof.
int Threads() {
  if (omp_in_parallel()) return 1;                 // parallel regions inside others have one thread
  if (omp_get_dynamic() != 0) omp_set_dynamic(0);  // else the number changes with the machine's load
  const int wanted = omp_get_max_threads();
  thread_local int proven = 1;
  if (wanted == 1 || wanted == proven) return wanted;
  TryThreads(wanted - 1);
  const int granted = ThreadsOfRegion(wanted);
  SetThreads(granted);
  if (granted > 1) proven = granted;
  return granted;
}

SingleThreadScope::SingleThreadScope() : before_(omp_get_max_threads()) { SetThreads(1); }
SingleThreadScope::~SingleThreadScope() { SetThreads(before_); }

void ParallelItems(int64_t count, const std::function<void(int64_t, int)>& body) {
  const int workers = static_cast<int>(std::min<int64_t>(Threads(), count));
  if (workers <= 1) {
    for (int64_t item = 0; item < count; ++item) body(item, 0);
    return;
  }
  std::atomic<int64_t> next = 0;
  std::mutex mutex;  // guards the failure
  std::exception_ptr failure;
  int64_t failed = count;
  BeforeRegion();
#pragma omp parallel num_threads(workers)
  {
    InRegion();
    const SingleThreadScope alone;
    for (int64_t item = next++; item < count; item = next++) {
      try {
        body(item, omp_get_thread_num());
      } catch (...) {
        next = count;
        const std::lock_guard lock(mutex);
        if (item < failed) {
          failed = item;
          failure = std::current_exception();
        }
      }
    }
    LeavingRegion();
  }
  BehindRegion();
  if (failure != nullptr) std::rethrow_exception(failure);
}

}  // namespace circlet
