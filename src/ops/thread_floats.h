#pragma once

#include <cstdint>

#include "ops/aligned.h"

namespace circlet {

// `count` floats of the calling thread, uninitialized, for the use that the type `Use` stands for; valid until the same
// thread asks again for that use. They are kept: fresh memory for every operator costs a page fault for each 4 KiB.
template <class Use>
float* ThreadFloats(int64_t count) {
  thread_local hwy::AlignedFreeUniquePtr<float[]> floats;
  thread_local int64_t capacity = 0;
  if (capacity < count) {
    capacity = 0;
    floats.reset();
    floats = Aligned<float>(count);
    capacity = count;
  }
  return floats.get();
}

}  // namespace circlet
