#include "circlet/io/packed/packed_weight.h"

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <memory>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet {
namespace {

constexpr int64_t kGrainBytes = int64_t{1} << 16;
constexpr int64_t kQ40Block = 32;

int64_t RowGrain(int64_t row_bytes) { return std::max<int64_t>(1, kGrainBytes / std::max<int64_t>(1, row_bytes)); }

// The storage codes of a byte: two of 4 bits as they are, or four of 2 bits as 4-bit ones.
using Spread = std::array<uint16_t, 256>;
constexpr Spread kOfTwoBits = [] {
  Spread spread{};
  for (unsigned byte = 0; byte < 256; ++byte)
    for (unsigned k = 0; k < 4; ++k)
      spread[byte] = static_cast<uint16_t>(spread[byte] | (((byte >> (2 * k) & 3) + 6) << (4 * k)));
  return spread;
}();

unsigned FieldAt(const std::byte* row, int bits, int64_t i) {
  const auto byte = static_cast<unsigned>(row[i * bits / 8]);
  return byte >> (i * bits % 8) & ((1U << bits) - 1);
}

float CodeOf(const Tensor& codes, int64_t i) {
  const auto byte = static_cast<unsigned>(codes.Raw()[i / 2]);
  return static_cast<float>(static_cast<int>(i % 2 == 0 ? byte & 15 : byte >> 4) - 8);
}

}  // namespace

DType StorageOf(int bits) { return bits == 8 ? DType::kI8 : DType::kU4; }
int32_t ZeroPointOf(int bits) { return bits == 8 ? 0 : 8; }
int64_t PackedRowBytes(int bits, int64_t width) { return (width * bits + 7) / 8; }

Tensor UnpackedRows(const Tensor& stored, int bits, int64_t width) {
  const int64_t rows = stored.GetShape()[0], row_bytes = PackedRowBytes(bits, width);
  const TensorType type{StorageOf(bits), {rows, width}};
  CIRCLET_CHECK(stored.Bytes() == rows * row_bytes, "{} holds no rows of {} codes of {} bits", stored.Type().ToString(),
                width, bits);
  if (bits == 8 || (bits == 4 && width % 2 == 0)) return Tensor(type, stored.Raw(), std::make_shared<Tensor>(stored));
  const Tensor codes(type);
  const std::byte* const from = stored.Raw();
  std::byte* const to = codes.Raw();
  if (bits == 2 && width % 4 == 0) {
    ParallelFor(rows * row_bytes, kGrainBytes, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const uint16_t four = kOfTwoBits[static_cast<uint8_t>(from[i])];
        to[2 * i] = static_cast<std::byte>(four & 255);
        to[2 * i + 1] = static_cast<std::byte>(four >> 8);
      }
    });
    return codes;
  }
  // Rows meet within bytes.
  const unsigned shift = bits == 2 ? 6 : 0;
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t i = 0; i < width; ++i) {
      const int64_t at = row * width + i;
      to[at / 2] |= static_cast<std::byte>((FieldAt(from + row * row_bytes, bits, i) + shift) << (at % 2 * 4));
    }
  return codes;
}

Tensor BlockWeight::Values() const {
  const int64_t rows = codes.GetShape()[0], width = codes.GetShape()[1], blocks = width / block;
  const Tensor values = Tensor::Uninitialized({DType::kF32, codes.GetShape()});
  ParallelFor(rows, RowGrain(4 * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * width; i < end * width; ++i)
      values.F32()[static_cast<size_t>(i)] =
          CodeOf(codes, i) * scales.F32()[static_cast<size_t>(i / width * blocks + i % width / block)];
  });
  return values;
}

// ---- Q4_0
// ---------------------------------------------------------------------------------------------------------------

namespace {

float FromBf16(uint16_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16); }

// To the nearest, ties to even; no NaN.
uint16_t ToBf16(float value) {
  const auto bits = std::bit_cast<uint32_t>(value);
  return static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
}

// The nearest float16; infinite beyond its range.
double ToHalf(double value) {
  constexpr double kLargest = 65504;
  int exponent = 0;
  std::frexp(value, &exponent);
  const double spacing = std::ldexp(1.0, std::max(exponent - 11, -24));
  const double half = std::nearbyint(value / spacing) * spacing;
  return std::abs(half) > kLargest ? HUGE_VAL : half;
}

struct Block {
  float scale = 0;
  std::array<int8_t, kQ40Block> codes{};
};

class BlockFinder {
 public:
  // `bits`: 32 values of bfloat16.
  explicit BlockFinder(const uint16_t* bits) : bits_(bits) {
    for (size_t i = 0; i < kQ40Block; ++i) {
      values_[i] = FromBf16(bits[i]);
      finite_ = finite_ && std::isfinite(values_[i]);
      largest_ = std::max(largest_, std::abs(static_cast<double>(values_[i])));
    }
  }

  std::optional<Block> Find() {
    if (!finite_) return std::nullopt;
    if (largest_ == 0) return Block{};
    for (int m = 1; m <= 8; ++m)
      if (std::optional<Block> block = WithLargest(m)) return block;
    return std::nullopt;
  }

 private:
  // The block whose largest code is m.
  std::optional<Block> WithLargest(int m) {
    double low = 0, high = HUGE_VAL;
    bool positive_8 = false, negative_8 = false;
    for (size_t i = 0; i < kQ40Block; ++i) {
      const double size = std::abs(static_cast<double>(values_[i]));
      steps_[i] = static_cast<int>(std::nearbyint(size * m / largest_));
      if (size == 0) continue;
      if (steps_[i] == 0) return std::nullopt;
      int exponent = 0;
      const bool power = std::frexp(size, &exponent) == 0.5;
      const double half = std::ldexp(1.0, exponent - 9);  // of a spacing of 8 significant bits
      low = std::max(low, (size - (power ? half / 2 : half)) / steps_[i]);
      high = std::min(high, (size + half) / steps_[i]);
      if (low > high) return std::nullopt;
      if (steps_[i] == 8) (values_[i] > 0 ? positive_8 : negative_8) = true;
    }
    if (positive_8 && negative_8) return std::nullopt;
    const double step = ToHalf((low + high) / 2);
    return Exact(positive_8 ? -step : step);
  }

  // With the scale, if each value comes back.
  std::optional<Block> Exact(double scale) {
    if (!std::isfinite(scale) || scale == 0) return std::nullopt;
    Block block{.scale = static_cast<float>(scale), .codes = {}};
    for (size_t i = 0; i < kQ40Block; ++i) {
      const int code = (values_[i] < 0) == (scale < 0) ? steps_[i] : -steps_[i];
      block.codes[i] = static_cast<int8_t>(code);
      // A stored -0 counts as 0.
      const uint16_t made = ToBf16(block.scale * static_cast<float>(code));
      if (made != bits_[i] && (code != 0 || values_[i] != 0)) return std::nullopt;
    }
    return block;
  }

  const uint16_t* bits_;
  std::array<float, kQ40Block> values_{};
  std::array<int, kQ40Block> steps_{};
  bool finite_ = true;
  double largest_ = 0;
};

}  // namespace

std::optional<BlockWeight> RecoverQ40(const Tensor& weight) {
  const Shape& shape = weight.GetShape();
  if (weight.GetDType() != DType::kBF16 || shape.Rank() != 2 || shape[1] % kQ40Block != 0 || shape.Elements() == 0)
    return std::nullopt;
  const int64_t rows = shape[0], width = shape[1], blocks = width / kQ40Block;
  const auto* const values = reinterpret_cast<const uint16_t*>(weight.Raw());
  if (!BlockFinder(values).Find()) return std::nullopt;
  BlockWeight found{
      .codes = Tensor({DType::kU4, shape}), .scales = Tensor({DType::kF32, {rows, blocks}}), .block = kQ40Block};
  std::atomic<bool> failed = false;
  ParallelFor(rows, RowGrain(2 * width), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * blocks; i < end * blocks && !failed; ++i) {
      const std::optional<Block> block = BlockFinder(values + i * kQ40Block).Find();
      if (!block) {
        failed = true;
        return;
      }
      found.scales.F32()[static_cast<size_t>(i)] = block->scale;
      for (int64_t k = 0; k < kQ40Block; k += 2)
        found.codes.Raw()[(i * kQ40Block + k) / 2] = static_cast<std::byte>(
            (block->codes[static_cast<size_t>(k)] + 8) | ((block->codes[static_cast<size_t>(k) + 1] + 8) << 4));
    }
  });
  if (failed) return std::nullopt;
  return found;
}

}  // namespace circlet
