#include "circlet/base/threads.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <exception>

namespace circlet {

void SetThreads(int count) { omp_set_num_threads(std::max(1, count)); }
// Parallel regions inside others have one thread.
int Threads() { return omp_in_parallel() ? 1 : omp_get_max_threads(); }

SingleThreadScope::SingleThreadScope() : before_(omp_get_max_threads()) { SetThreads(1); }
SingleThreadScope::~SingleThreadScope() { SetThreads(before_); }

void ParallelItems(int64_t count, const std::function<void(int64_t, int)>& body) {
  const int workers = static_cast<int>(std::min<int64_t>(Threads(), count));
  if (workers <= 1) {
    for (int64_t item = 0; item < count; ++item) body(item, 0);
    return;
  }
  std::atomic<int64_t> next = 0;
  std::exception_ptr failure;
  int64_t failed = count;
#pragma omp parallel num_threads(workers)
  {
    const SingleThreadScope alone;
    for (int64_t item = next++; item < count; item = next++) {
      try {
        body(item, omp_get_thread_num());
      } catch (...) {
        next = count;
#pragma omp critical(circlet_parallel_items)
        if (item < failed) {
          failed = item;
          failure = std::current_exception();
        }
      }
    }
  }
  if (failure != nullptr) std::rethrow_exception(failure);
}

}  // namespace circlet
