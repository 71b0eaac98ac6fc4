#include "circlet/base/tensor.h"

#include <bit>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <fmt/ranges.h>
#include <mutex>

#include "base/large_pages.h"
#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet {

int64_t Shape::Elements() const {
  int64_t product = 1;
  for (const int64_t size : Sizes()) {
    if (size < 0 || __builtin_mul_overflow(product, size, &product))
      Fail("shape {} has no element count: a size is negative or the product leaves 64 bits", ToString());
  }
  return product;
}

std::string Shape::ToString() const { return fmt::format("[{}]", fmt::join(Sizes(), ",")); }

int64_t TensorType::Bytes() const {
  const int64_t elements = shape.Elements();
  const int bits = BitWidth(dtype);
  if (bits < 8) return elements / (8 / bits) + (elements % (8 / bits) != 0);
  int64_t bytes = 0;
  if (__builtin_mul_overflow(elements, bits / 8, &bytes)) Fail("{} has more bytes than 64 bits can count", ToString());
  return bytes;
}

std::string TensorType::ToString() const { return std::string(Name(dtype)) + shape.ToString(); }

namespace {

// The last tensors' memory, for the next ones: activations of one size come and go by the thousand, and memory fresh from
// the system costs a page fault for each 4 KiB.
class FreeBlocks {
 public:
  static constexpr int64_t kAlignment = 64;
  struct Block {
    void* memory;
    int64_t bytes;
  };

  // Lives as long as the last tensor does.
  static FreeBlocks& Shared() {
    static auto* const blocks = new FreeBlocks;
    return *blocks;
  }

  // Null memory: there is none. `bytes`: a multiple of kAlignment.
  Block Take(int64_t bytes) {
    if (bytes >= kSmall) {
      const std::lock_guard lock(mutex_);
      for (auto block = blocks_.rbegin(); block != blocks_.rend(); ++block) {
        if (block->bytes < bytes || block->bytes > bytes + bytes / 8) continue;
        const Block found = *block;
        blocks_.erase(std::next(block).base());
        bytes_ -= found.bytes;
        return found;
      }
    }
    const Block fresh{std::aligned_alloc(kAlignment, static_cast<size_t>(bytes)), bytes};
    if (fresh.memory != nullptr) AskForLargePages(fresh.memory, bytes);
    return fresh;
  }

  void Give(const Block& block) {
    if (block.bytes < kSmall || block.bytes > kMost / 8) return std::free(block.memory);
    const std::lock_guard lock(mutex_);
    blocks_.push_back(block);
    bytes_ += block.bytes;
    while (bytes_ > kMost) {
      std::free(blocks_.front().memory);
      bytes_ -= blocks_.front().bytes;
      blocks_.pop_front();
    }
  }

 private:
#ifdef __SANITIZE_ADDRESS__
  static constexpr int64_t kMost = 0;  // it watches freed memory only
#else
  static constexpr int64_t kMost = int64_t{16} << 20;
#endif
  static constexpr int64_t kSmall = int64_t{32} << 10;  // the heap serves smaller ones well

  std::mutex mutex_;
  std::deque<Block> blocks_;  // the newest last
  int64_t bytes_ = 0;
};

}  // namespace

Tensor::Tensor(TensorType type) {
  *this = Uninitialized(std::move(type));
  std::memset(data_, 0, static_cast<size_t>(Bytes()));
}

Tensor Tensor::Uninitialized(TensorType type) {
  Tensor tensor;
  constexpr int64_t kAlignment = FreeBlocks::kAlignment;
  const int64_t bytes = type.Bytes();
  const int64_t rounded = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
  const FreeBlocks::Block block = FreeBlocks::Shared().Take(rounded);
  if (block.memory == nullptr) Fail("{}: no memory for {} bytes", type.ToString(), bytes);
  tensor.type_ = std::move(type);
  tensor.data_ = static_cast<std::byte*>(block.memory);
  tensor.owner_ = std::shared_ptr<const void>(block.memory, [block](const void*) { FreeBlocks::Shared().Give(block); });
  return tensor;
}

Tensor::Tensor(TensorType type, void* data, std::shared_ptr<const void> owner)
    : type_(std::move(type)), data_(static_cast<std::byte*>(data)), owner_(std::move(owner)) {}

namespace {

template <typename T>
constexpr DType kDTypeOf = [] {
  if constexpr (std::is_same_v<T, float>) return DType::kF32;
  if constexpr (std::is_same_v<T, double>) return DType::kF64;
  if constexpr (std::is_same_v<T, int8_t>) return DType::kI8;
  if constexpr (std::is_same_v<T, uint8_t>) return DType::kU8;
  if constexpr (std::is_same_v<T, int16_t>) return DType::kI16;
  if constexpr (std::is_same_v<T, uint16_t>) return DType::kU16;
  if constexpr (std::is_same_v<T, int32_t>) return DType::kI32;
  if constexpr (std::is_same_v<T, int64_t>) return DType::kI64;
}();

}  // namespace

template <typename T>
std::span<T> Tensor::As() const {
  // bfloat16, float16 and bool are looked at through their bits.
  const bool same = type_.dtype == kDTypeOf<T> || (std::is_same_v<T, uint8_t> && type_.dtype == DType::kBool) ||
                    (std::is_same_v<T, uint16_t> && (type_.dtype == DType::kBF16 || type_.dtype == DType::kF16));
  CIRCLET_CHECK(same, "the elements are {}", Name(type_.dtype));
  CIRCLET_CHECK(reinterpret_cast<uintptr_t>(data_) % alignof(T) == 0, "{} is not aligned", type_.ToString());
  return {reinterpret_cast<T*>(data_), static_cast<size_t>(data_ == nullptr ? 0 : Elements())};
}

template <typename T>
Tensor Tensor::Of(Shape shape, std::span<const T> values) {
  Tensor tensor(TensorType{kDTypeOf<T>, std::move(shape)});
  CIRCLET_CHECK(tensor.Elements() == static_cast<int64_t>(values.size()), "{} from {} values",
                tensor.Type().ToString(), values.size());
  if (!values.empty()) std::memcpy(tensor.Raw(), values.data(), values.size_bytes());
  return tensor;
}

#define CIRCLET_INSTANTIATE(T)               \
  template std::span<T> Tensor::As() const; \
  template Tensor Tensor::Of(Shape, std::span<const T>);
CIRCLET_INSTANTIATE(float)
CIRCLET_INSTANTIATE(double)
CIRCLET_INSTANTIATE(int8_t)
CIRCLET_INSTANTIATE(uint8_t)
CIRCLET_INSTANTIATE(int16_t)
CIRCLET_INSTANTIATE(uint16_t)
CIRCLET_INSTANTIATE(int32_t)
CIRCLET_INSTANTIATE(int64_t)
#undef CIRCLET_INSTANTIATE

Tensor Tensor::Scalar(float value) { return Of<float>(Shape{}, std::span<const float>(&value, 1)); }

Tensor Tensor::WithGrid(std::shared_ptr<const QParams> grid) const {
  Tensor tensor = *this;
  tensor.grid_ = std::move(grid);
  return tensor;
}

Tensor Tensor::Reshaped(Shape shape) const {
  Tensor tensor = *this;
  CIRCLET_CHECK(shape.Elements() == Elements(), "{} as {}", type_.ToString(), shape.ToString());
  tensor.type_.shape = std::move(shape);
  return tensor;
}

Tensor Tensor::Slice(int64_t begin, int64_t end, int axis) const {
  TensorType type = type_;
  const int64_t size = type.shape[axis];
  int64_t outer = 1, inner_bits = BitWidth(type.dtype);
  for (int i = 0; i < axis; ++i) outer *= type.shape[i];
  for (int i = axis + 1; i < type.shape.Rank(); ++i) inner_bits *= type.shape[i];
  const bool whole_bytes = inner_bits % 8 == 0 || (outer == 1 && begin * inner_bits % 8 == 0);
  CIRCLET_CHECK(whole_bytes && 0 <= begin && begin <= end && end <= size, "[{},{}) of axis {} of {}", begin, end, axis,
                type_.ToString());
  type.shape[axis] = end - begin;
  if (outer == 1) return Tensor(std::move(type), data_ + begin * inner_bits / 8, owner_);
  const int64_t inner = inner_bits / 8;
  Tensor copy = Uninitialized(std::move(type));
  const int64_t bytes = (end - begin) * inner;
  for (int64_t i = 0; i < outer && bytes > 0; ++i)
    std::memcpy(copy.Raw() + i * bytes, data_ + (i * size + begin) * inner, static_cast<size_t>(bytes));
  return copy;
}

Tensor Tensor::Clone() const {
  Tensor copy = Uninitialized(type_);
  constexpr int64_t kPiece = int64_t{1} << 20;
  ParallelFor(Bytes(), kPiece, [&](int64_t begin, int64_t end) {
    std::memcpy(copy.Raw() + begin, data_ + begin, static_cast<size_t>(end - begin));
  });
  return copy;
}

namespace {

float HalfToFloat(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  uint32_t exponent = (half >> 10) & 0x1fu;
  uint32_t mantissa = half & 0x3ffu;
  if (exponent == 0x1f) return std::bit_cast<float>(sign | 0x7f800000u | (mantissa << 13));
  if (exponent == 0) {
    const float magnitude = static_cast<float>(mantissa) * 0x1p-24f;
    return sign != 0 ? -magnitude : magnitude;
  }
  return std::bit_cast<float>(sign | ((exponent + 112) << 23) | (mantissa << 13));
}

}  // namespace

Tensor ToF32(const Tensor& tensor) {
  if (tensor.GetDType() == DType::kF32) return tensor;
  const Tensor result = Tensor::Uninitialized({DType::kF32, tensor.GetShape()});
  const std::span<float> out = result.F32();
  // Checkpoint bytes need not be aligned to their element.
  const std::byte* in = tensor.Raw();
  switch (tensor.GetDType()) {
    case DType::kBF16:
      for (size_t i = 0; i < out.size(); ++i) {
        uint16_t bits;
        std::memcpy(&bits, in + 2 * i, 2);
        out[i] = std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
      }
      break;
    case DType::kF16:
      for (size_t i = 0; i < out.size(); ++i) {
        uint16_t bits;
        std::memcpy(&bits, in + 2 * i, 2);
        out[i] = HalfToFloat(bits);
      }
      break;
    case DType::kF64:
      for (size_t i = 0; i < out.size(); ++i) {
        double value;
        std::memcpy(&value, in + 8 * i, 8);
        out[i] = static_cast<float>(value);
      }
      break;
    default:
      Fail("{} is not a float tensor", tensor.Type().ToString());
  }
  return result;
}

}  // namespace circlet
