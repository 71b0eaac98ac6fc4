#include "io/sha256.h"

#include <algorithm>
#include <bit>
#include <cstring>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "io/mapped_file.h"

namespace circlet {
namespace {

constexpr std::array<uint32_t, 64> kRound = {
    0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
    0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
    0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
    0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
    0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
    0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
    0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
    0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};

}  // namespace

void Sha256Stream::Block(const std::byte* bytes) {
  std::array<uint32_t, 64> w;
  for (int t = 0; t < 16; ++t) {
    std::memcpy(&w[t], bytes + 4 * t, 4);
    if constexpr (std::endian::native == std::endian::little) w[t] = __builtin_bswap32(w[t]);
  }
  for (int t = 16; t < 64; ++t) {
    const uint32_t s0 = std::rotr(w[t - 15], 7) ^ std::rotr(w[t - 15], 18) ^ (w[t - 15] >> 3);
    const uint32_t s1 = std::rotr(w[t - 2], 17) ^ std::rotr(w[t - 2], 19) ^ (w[t - 2] >> 10);
    w[t] = w[t - 16] + s0 + w[t - 7] + s1;
  }
  auto [a, b, c, d, e, f, g, h] = state_;
  for (int t = 0; t < 64; ++t) {
    const uint32_t choice = (e & f) ^ (~e & g);
    const uint32_t majority = (a & b) ^ (a & c) ^ (b & c);
    const uint32_t t1 = h + (std::rotr(e, 6) ^ std::rotr(e, 11) ^ std::rotr(e, 25)) + choice + kRound[t] + w[t];
    const uint32_t t2 = (std::rotr(a, 2) ^ std::rotr(a, 13) ^ std::rotr(a, 22)) + majority;
    h = g, g = f, f = e, e = d + t1, d = c, c = b, b = a, a = t1 + t2;
  }
  const std::array<uint32_t, 8> worked{a, b, c, d, e, f, g, h};
  for (size_t i = 0; i < state_.size(); ++i) state_[i] += worked[i];
}

void Sha256Stream::Add(std::span<const std::byte> bytes) {
  const size_t waiting = size_ % 64;
  size_ += bytes.size();
  if (waiting > 0) {
    const size_t taken = std::min(64 - waiting, bytes.size());
    std::copy_n(bytes.begin(), taken, pending_.begin() + waiting);
    if (waiting + taken < 64) return;
    Block(pending_.data());
    bytes = bytes.subspan(taken);
  }
  for (; bytes.size() >= 64; bytes = bytes.subspan(64)) Block(bytes.data());
  std::copy(bytes.begin(), bytes.end(), pending_.begin());
}

std::string Sha256Stream::Finish() {
  const uint64_t bits = size_ * 8;
  std::array<std::byte, 72> padding{std::byte{0x80}};
  const size_t zeros_end = (size_ % 64 < 56 ? 56 : 120) - size_ % 64;
  for (int i = 0; i < 8; ++i) padding[zeros_end + i] = static_cast<std::byte>(bits >> (56 - 8 * i));
  Add(std::span(padding).first(zeros_end + 8));
  std::string digits;
  for (const uint32_t word : state_) digits += fmt::format("{:08x}", word);
  return digits;
}

std::string Sha256(std::span<const std::byte> bytes) {
  Sha256Stream stream;
  stream.Add(bytes);
  return stream.Finish();
}

std::string Sha256File(const std::filesystem::path& path) {
  constexpr size_t kPiece =
      size_t{16} << 20;  // released behind the reading, so that a large file does not fill the memory
  const auto file = MappedFile::Open(path);
  Sha256Stream stream;
  for (size_t at = 0; at < file->Bytes().size(); at += kPiece) {
    const auto piece = file->Bytes().subspan(at, std::min(kPiece, file->Bytes().size() - at));
    stream.Add(piece);
    file->Release(piece);
  }
  return stream.Finish();
}

}  // namespace circlet
