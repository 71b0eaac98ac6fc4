#pragma once

// Hashes that decide what is drawn: the same bits on every machine. Not for untrusted keys (io/sha256.h).

#include <cstdint>
#include <string_view>

namespace circlet {

// The step of SplitMix64's counter: 2^64 over the golden ratio.
inline constexpr uint64_t kSplitMixStep = 0x9e3779b97f4a7c15;

// The output function of SplitMix64: spreads every bit of a counter or key over all bits.
constexpr uint64_t Mix(uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9;
  x = (x ^ (x >> 27)) * 0x94d049bb133111eb;
  return x ^ (x >> 31);
}

// FNV-1a of 64 bits.
constexpr uint64_t Fnv1a64(std::string_view text) {
  uint64_t hash = 0xcbf29ce484222325;
  for (const char c : text) hash = (hash ^ static_cast<uint8_t>(c)) * 0x100000001b3;
  return hash;
}

}  // namespace circlet
