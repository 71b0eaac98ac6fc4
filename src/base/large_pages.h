#pragma once

#include <cstdint>

namespace circlet {

// Asks for large pages in memory that nobody has touched yet: a fault for each 2 MiB instead of each 4 KiB makes filling a
// large block some five times cheaper. Small blocks, and systems without large pages, stay as they are.
void AskForLargePages(void* memory, int64_t bytes);

}  // namespace circlet
