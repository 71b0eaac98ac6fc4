#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <initializer_list>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "circlet/base/dtype.h"
#include "circlet/base/qparams.h"

namespace circlet {

// Sizes of a dense row-major array; no axes = a scalar.
class Shape {
 public:
  Shape() = default;
  Shape(std::initializer_list<int64_t> sizes) { Assign({sizes.begin(), sizes.size()}); }
  explicit Shape(const std::vector<int64_t>& sizes) { Assign(sizes); }

  int Rank() const { return rank_; }
  // A negative axis counts from the end.
  int64_t operator[](int axis) const { return Sizes()[axis < 0 ? axis + rank_ : axis]; }
  int64_t& operator[](int axis) { return Data()[axis < 0 ? axis + rank_ : axis]; }
  std::span<const int64_t> Sizes() const {
    return {rank_ <= kFew ? few_.data() : many_.data(), static_cast<size_t>(rank_)};
  }
  // Product of the sizes; throws Error when a size is negative or the product leaves int64.
  int64_t Elements() const;
  std::string ToString() const;  // "[1,16,64]"
  bool operator==(const Shape&) const = default;

 private:
  static constexpr int kFew = 4;  // axes that stand in the object itself: tensors are copied far more often than made

  void Assign(std::span<const int64_t> sizes) {
    rank_ = static_cast<int>(sizes.size());
    if (rank_ > kFew) many_.resize(sizes.size());
    std::copy(sizes.begin(), sizes.end(), Data());
  }
  int64_t* Data() { return rank_ <= kFew ? few_.data() : many_.data(); }

  int rank_ = 0;
  std::array<int64_t, kFew> few_{};
  std::vector<int64_t> many_;
};

struct TensorType {
  DType dtype = DType::kF32;
  Shape shape;

  int64_t Bytes() const;         // ceil(elements * bits / 8)
  std::string ToString() const;  // "float32[1,16,64]"
  bool operator==(const TensorType&) const = default;
};

// A dense array: a type and a pointer to its first byte, kept alive by whoever owns the bytes. Copies share the bytes.
class Tensor {
 public:
  Tensor() = default;
  // New zeroed memory, aligned to 64 bytes.
  explicit Tensor(TensorType type);
  // The same without zeroing, for a caller that writes every byte.
  static Tensor Uninitialized(TensorType type);
  // Somebody else's memory; `owner` (may be null) is kept as long as the tensor lives.
  Tensor(TensorType type, void* data, std::shared_ptr<const void> owner);

  template <typename T>
  static Tensor Of(Shape shape, std::span<const T> values);  // copies float, int32_t, int64_t, uint8_t, int8_t, int16_t
  static Tensor Scalar(float value);                         // float32 []

  const TensorType& Type() const { return type_; }
  const Shape& GetShape() const { return type_.shape; }
  DType GetDType() const { return type_.dtype; }
  int64_t Elements() const { return type_.shape.Elements(); }
  int64_t Bytes() const { return type_.Bytes(); }
  bool Empty() const { return data_ == nullptr; }

  std::byte* Raw() const { return data_; }
  // The elements as T; CHECKs that T is the element type.
  template <typename T>
  std::span<T> As() const;
  std::span<float> F32() const { return As<float>(); }
  std::span<int64_t> I64() const { return As<int64_t>(); }

  // Of codes: the grid that says what they mean. Of float32: a grid that all values lie on. Null: none is known.
  const QParams* Grid() const { return grid_.get(); }
  Tensor WithGrid(std::shared_ptr<const QParams> grid) const;
  // The grid must outlive every copy of the result. Null takes it away.
  Tensor WithGrid(const QParams* grid) const { return WithGrid({std::shared_ptr<void>(), grid}); }

  // The same bytes under another shape of equally many elements.
  Tensor Reshaped(Shape shape) const;
  // Indices [begin, end) of an axis, without a grid. It shares the bytes where they lie together (all axes ahead have
  // size 1), else it is a copy. Packed 4-bit elements only where no byte is cut and none is copied (CHECKed, as the
  // range).
  Tensor Slice(int64_t begin, int64_t end, int axis) const;
  // Own, contiguous copy.
  Tensor Clone() const;

 private:
  TensorType type_;
  std::byte* data_ = nullptr;
  std::shared_ptr<const void> owner_;
  std::shared_ptr<const QParams> grid_;
};

// Any float type (f32, f16, bf16, f64) as new float32; float32 is returned as it is, without copying.
Tensor ToF32(const Tensor& tensor);

}  // namespace circlet
