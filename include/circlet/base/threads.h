#pragma once

#include <cstdint>
#include <functional>

namespace circlet {

// Threads that ParallelFor and the matrix products use; at least 1. Results never depend on it.
void SetThreads(int count);
int Threads();

// Calls body(begin, end) for disjoint pieces of [0, count), each a multiple of `grain` long but the last. Pieces may run
// at the same time; an exception of one is thrown again here. Nested calls run in the calling thread.
void ParallelFor(int64_t count, int64_t grain, const std::function<void(int64_t begin, int64_t end)>& body);

}  // namespace circlet
