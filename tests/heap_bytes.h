#pragma once

// Bytes of the heap that are in use, for tests of what is held. Not with AddressSanitizer, whose heap is its own.

#include <malloc.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <thread>
#include <vector>

#include "circlet/base/tensor.h"

namespace circlet {

inline int64_t HeapBytes() {
  const struct mallinfo2 heap = mallinfo2();
  return static_cast<int64_t>(heap.uordblks + heap.hblkhd);
}

// The same with as many blocks of tensors that wait for their next use each time.
inline int64_t HeldBytes() {
  {
    std::vector<Tensor> blocks;
    for (int i = 0; i < 8; ++i) blocks.push_back(Tensor::Uninitialized({DType::kU8, {int64_t{2} << 20}}));
  }
  return HeapBytes();
}

// The most that `run` holds at a time beyond what was held before.
template <typename Run>
int64_t MostHeldBy(const Run& run) {
  const int64_t before = HeldBytes();
  std::atomic<bool> ended = false;
  int64_t most = 0;
  std::jthread watch([&] {
    while (!ended) {
      most = std::max(most, HeapBytes() - before);
      std::this_thread::sleep_for(std::chrono::microseconds(200));
    }
  });
  run();
  ended = true;
  watch.join();
  return most;
}

}  // namespace circlet
