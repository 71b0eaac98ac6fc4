#include "circlet/base/threads.h"

#include <omp.h>

#include <algorithm>
#include <exception>

namespace circlet {

void SetThreads(int count) { omp_set_num_threads(std::max(1, count)); }
int Threads() { return omp_get_max_threads(); }

void ParallelFor(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  const int64_t pieces = (count + grain - 1) / grain;
  if (pieces == 1 || Threads() == 1 || omp_in_parallel()) {
    body(0, count);
    return;
  }
  std::exception_ptr failure;
#pragma omp parallel for schedule(dynamic, 1)
  for (int64_t piece = 0; piece < pieces; ++piece) {
    try {
      body(piece * grain, std::min(count, (piece + 1) * grain));
    } catch (...) {
#pragma omp critical(circlet_parallel_for)
      if (failure == nullptr) failure = std::current_exception();
    }
  }
  if (failure != nullptr) std::rethrow_exception(failure);
}

}  // namespace circlet
