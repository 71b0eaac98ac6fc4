#pragma once

#include <cstdint>
#include <new>

#include "base/large_pages.h"
#include "hwy/aligned_allocator.h"

namespace circlet {

// `count` elements at an address that suits every kernel, uninitialized. Throws std::bad_alloc; Highway's own function
// gives null.
template <typename T>
hwy::AlignedFreeUniquePtr<T[]> Aligned(int64_t count) {
  auto memory = hwy::AllocateAligned<T>(static_cast<size_t>(count));
  if (memory == nullptr) throw std::bad_alloc();
  AskForLargePages(memory.get(), count * static_cast<int64_t>(sizeof(T)));
  return memory;
}

}  // namespace circlet
