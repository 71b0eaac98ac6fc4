#pragma once

#include <cstdint>

#include "ops/aligned.h"

namespace circlet {

// `count` elements of the calling thread, uninitialized, for the use that the type `Use` stands for; valid until the
// same thread asks again for that use. They are kept: fresh memory for every operator costs a page fault for each 4
// KiB.
template <typename T, class Use>
T* ThreadScratch(int64_t count) {
  thread_local hwy::AlignedFreeUniquePtr<T[]> elements;
  thread_local int64_t capacity = 0;
  if (capacity < count) {
    capacity = 0;
    elements.reset();
    elements = Aligned<T>(count);
    capacity = count;
  }
  return elements.get();
}

}  // namespace circlet
