#pragma once

#include <cstdint>
#include <new>

#include "hwy/aligned_allocator.h"

namespace circlet {

// `count` elements at an address that suits every kernel, uninitialized. Throws std::bad_alloc; Highway's own function
// gives null.
template <typename T>
hwy::AlignedFreeUniquePtr<T[]> Aligned(int64_t count) {
  auto memory = hwy::AllocateAligned<T>(static_cast<size_t>(count));
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}

}  // namespace circlet
