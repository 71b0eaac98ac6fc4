#pragma once

// Plain structs between the processes of a run, which are copies of one program.

#include <cstring>
#include <span>
#include <type_traits>
#include <vector>

#include "circlet/base/communicator.h"

namespace circlet {

// By rank.
template <typename T>
std::vector<std::vector<T>> AllGather(Communicator& world, std::span<const T> mine) {
  static_assert(std::is_trivially_copyable_v<T>);
  std::vector<std::vector<T>> all;
  for (const std::string& bytes : world.AllGather({reinterpret_cast<const char*>(mine.data()), mine.size_bytes()})) {
    all.emplace_back(bytes.size() / sizeof(T));
    if (!bytes.empty()) std::memcpy(all.back().data(), bytes.data(), bytes.size());
  }
  return all;
}

}  // namespace circlet
