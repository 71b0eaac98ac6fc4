#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace circlet {

// SHA-256 of bytes that come in pieces (FIPS 180-4).
class Sha256Stream {
 public:
  void Add(std::span<const std::byte> bytes);
  // 64 lower-case hexadecimal digits; the stream is spent.
  std::string Finish();

 private:
  void Block(const std::byte* bytes);  // 64 of them

  std::array<uint32_t, 8> state_{0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a,
                                 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  std::array<std::byte, 64> pending_{};
  uint64_t size_ = 0;  // bytes seen; the last size_ % 64 wait in pending_
};

}  // namespace circlet
