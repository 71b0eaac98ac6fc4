#include "ops/codes.h"

#include <algorithm>
#include <array>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"
#include "ops/internal.h"
#include "ops/simd.h"

namespace circlet {
namespace {

void UnpackNibbles(const uint8_t* bytes, int64_t first, int64_t count, bool is_signed, int16_t* codes) {
  const int sign = is_signed ? 8 : 0;
  const auto code = [sign](int nibble) { return static_cast<int16_t>((nibble ^ sign) - sign); };
  int64_t i = 0;
  if (first % 2 != 0 && count > 0) codes[i++] = code(bytes[first / 2] >> 4);
  const uint8_t* in = bytes + (first + i) / 2;
  const int64_t pairs = (count - i) / 2;
  int16_t* out = codes + i;
#pragma omp simd
  for (int64_t p = 0; p < pairs; ++p) {
    out[2 * p] = code(in[p] & 15);
    out[2 * p + 1] = code(in[p] >> 4);
  }
  if ((count - i) % 2 != 0) out[2 * pairs] = code(in[pairs] & 15);
}

void PackNibbles(const int16_t* codes, int64_t count, int64_t first, uint8_t* bytes) {
  int64_t i = 0;
  if (first % 2 != 0 && count > 0) {
    bytes[first / 2] |= static_cast<uint8_t>(codes[0] << 4);
    i = 1;
  }
  uint8_t* out = bytes + (first + i) / 2;
  const int64_t pairs = (count - i) / 2;
  const int16_t* in = codes + i;
#pragma omp simd
  for (int64_t p = 0; p < pairs; ++p) out[p] = static_cast<uint8_t>((in[2 * p] & 15) | (in[2 * p + 1] << 4));
  if ((count - i) % 2 != 0) out[pairs] = static_cast<uint8_t>(in[2 * pairs] & 15);
}

// Codes of at most 8 bits, widened.
void Widen(const Tensor& codes, int64_t first, int64_t count, int16_t* out) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(codes.Raw());
  switch (codes.GetDType()) {
    case DType::kI8:
      std::copy_n(reinterpret_cast<const int8_t*>(bytes) + first, count, out);
      break;
    case DType::kU8:
      std::copy_n(bytes + first, count, out);
      break;
    default:
      UnpackNibbles(bytes, first, count, codes.GetDType() == DType::kI4, out);
  }
}

// Elements on one grid.
void DequantizeRun(const Tensor& codes, int64_t first, float scale, int32_t zero_point, std::span<float> values) {
  const auto count = static_cast<int64_t>(values.size());
  if (codes.GetDType() == DType::kI16) {
    simd::Dequantize(codes.As<int16_t>().data() + first, count, scale, zero_point, values.data());
  } else if (BitWidth(codes.GetDType()) <= 8 && IsInteger(codes.GetDType())) {
    std::array<int16_t, 1024> wide;
    for (int64_t done = 0; done < count; done += wide.size()) {
      const int64_t part = std::min<int64_t>(wide.size(), count - done);
      Widen(codes, first + done, part, wide.data());
      simd::Dequantize(wide.data(), part, scale, zero_point, values.data() + done);
    }
  } else {
    for (int64_t i = 0; i < count; ++i)
      values[i] = (static_cast<float>(CodeAt(codes, first + i)) - static_cast<float>(zero_point)) * scale;
  }
}

}  // namespace

void StoreCodes(const int16_t* codes, int64_t count, int64_t first, DType dtype, std::byte* storage) {
  if (BitWidth(dtype) == 4) return PackNibbles(codes, count, first, reinterpret_cast<uint8_t*>(storage));
  if (dtype == DType::kI16) {
    std::copy_n(codes, count, reinterpret_cast<int16_t*>(storage) + first);
    return;
  }
  auto* out = reinterpret_cast<uint8_t*>(storage) + first;
#pragma omp simd
  for (int64_t i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(codes[i]);
}

int64_t CodeAt(const Tensor& codes, int64_t index) {
  const auto* bytes = reinterpret_cast<const uint8_t*>(codes.Raw());
  switch (codes.GetDType()) {
    case DType::kU4:
    case DType::kI4: {
      int16_t code;
      UnpackNibbles(bytes, index, 1, codes.GetDType() == DType::kI4, &code);
      return code;
    }
    case DType::kU8:
      return bytes[index];
    case DType::kI8:
      return static_cast<int8_t>(bytes[index]);
    case DType::kI16:
      return codes.As<int16_t>()[index];
    case DType::kI32:
      return codes.As<int32_t>()[index];
    case DType::kI64:
      return codes.As<int64_t>()[index];
    default:
      Fail("constants of type {} cannot be dequantized", Name(codes.GetDType()));
  }
}

void Dequantize(const Tensor& codes, const QParams& grid, int64_t first, std::span<float> values) {
  const auto sizes = codes.GetShape().Sizes();
  // Elements that follow each other on one grid.
  const int64_t run = grid.PerChannel() ? Product(sizes.subspan(static_cast<size_t>(grid.axis) + 1)) : codes.Elements();
  const auto channels = static_cast<int64_t>(grid.scale.size());
  ParallelFor(static_cast<int64_t>(values.size()), kElementGrain, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t element = first + at;
      const int64_t count = std::min(end - at, run - element % run);
      const auto channel = static_cast<size_t>(element / run % channels);
      DequantizeRun(codes, element, grid.scale[channel], grid.zero_point[channel],
                    values.subspan(static_cast<size_t>(at), static_cast<size_t>(count)));
      at += count;
    }
  });
}

Tensor RowsOfCodes(const Tensor& codes, int64_t begin, int64_t end) {
  QParams grid = *codes.Grid();
  if (grid.PerChannel()) {
    grid.scale = {grid.scale.begin() + begin, grid.scale.begin() + end};
    grid.zero_point = {grid.zero_point.begin() + begin, grid.zero_point.begin() + end};
  }
  return codes.Slice(begin, end, 0).WithGrid(std::make_shared<QParams>(std::move(grid)));
}

void SignedCodes(const Tensor& codes, int64_t first, std::span<int8_t> out) {
  CIRCLET_CHECK(IsInteger(codes.GetDType()) && BitWidth(codes.GetDType()) <= 8, "codes of type {} in bytes",
                Name(codes.GetDType()));
  const auto* const from = reinterpret_cast<const uint8_t*>(codes.Raw());
  const bool nibbles = BitWidth(codes.GetDType()) == 4;
  const uint8_t sign = codes.GetDType() == DType::kI4 ? 8 : 0, flip = codes.GetDType() == DType::kU8 ? 0x80 : 0;
  ParallelFor(static_cast<int64_t>(out.size()), kElementGrain, [&](int64_t begin, int64_t end) {
    int8_t* const bytes = out.data();
    if (!nibbles) {
#pragma omp simd
      for (int64_t i = begin; i < end; ++i) bytes[i] = static_cast<int8_t>(from[first + i] ^ flip);
      return;
    }
    const auto code = [sign](uint8_t nibble) {
      return static_cast<int8_t>(static_cast<uint8_t>((nibble ^ sign) - sign));
    };
    if ((first + begin) % 2 != 0 && begin < end) bytes[begin++] = code(from[(first + begin) / 2] >> 4);
    const uint8_t* const packed = from + (first + begin) / 2;
    int8_t* const to = bytes + begin;
    const int64_t pairs = (end - begin) / 2;
#pragma omp simd
    for (int64_t p = 0; p < pairs; ++p) {
      to[2 * p] = code(packed[p] & 15);
      to[2 * p + 1] = code(packed[p] >> 4);
    }
    if ((end - begin) % 2 != 0) to[2 * pairs] = code(packed[pairs] & 15);
  });
}

}  // namespace circlet
