#pragma once

#include <algorithm>
#include <cstdint>
#include <functional>

namespace circlet {

// Threads that ParallelFor and the matrix products of the calling thread use; at least 1. Results never depend on it.
// Threads() is never more than OpenMP gives to a parallel region: the first call after a change starts one to see, which
// may be fewer than were set (OMP_THREAD_LIMIT) and then are all that there are from there on. It switches off dynamic
// numbers of threads (OMP_DYNAMIC) for the calling thread. Throws Error when the system refuses to start them.
void SetThreads(int count);
int Threads();

// While it lives, the calling thread computes alone: Threads() is 1 for it, and only for it. Executors of several
// threads may then run side by side (each thread its own executor).
class SingleThreadScope {
 public:
  SingleThreadScope();
  ~SingleThreadScope();
  SingleThreadScope(const SingleThreadScope&) = delete;
  SingleThreadScope& operator=(const SingleThreadScope&) = delete;

 private:
  int before_;
};

// Calls body(item, worker) for the items 0 to count - 1, handed out in order to Threads() workers, each in a
// SingleThreadScope; one item alone has all threads. 0 <= worker < Threads(); a worker has one item at a time. After an
// exception no further item starts; the exception of the smallest item that threw is thrown again here.
void ParallelItems(int64_t count, const std::function<void(int64_t item, int worker)>& body);

// Calls body(begin, end) for disjoint pieces of [0, count), each a multiple of `grain` long but the last. Pieces may run
// at the same time, each in a SingleThreadScope; nested calls run in the calling thread. When pieces throw, the
// exception of the first of them is thrown again here.
template <typename Body>
void ParallelFor(int64_t count, int64_t grain, const Body& body) {
  if (count <= 0) return;
  if (count <= grain || Threads() == 1) return body(int64_t{0}, count);
  const int64_t pieces = (count + grain - 1) / grain;
  const auto piece = [&](int64_t item, int) { body(item * grain, std::min(count, (item + 1) * grain)); };
  ParallelItems(pieces, std::cref(piece));  // by reference: a std::function allocates room for what it copies
}

}  // namespace circlet
