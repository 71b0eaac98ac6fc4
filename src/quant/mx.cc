#include "circlet/quant/mx.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet {
namespace {

struct Format {
  MxFormat format;
  std::string_view name;
  int exponent_bits;  // 0: integers
  int mantissa_bits;  // sign and implicit one included
  int emax;
};

constexpr std::array<Format, 10> kFormats{{
    {MxFormat::kInt8, "int8", 0, 8, 0},
    {MxFormat::kInt4, "int4", 0, 4, 0},
    {MxFormat::kInt2, "int2", 0, 2, 0},
    {MxFormat::kFp8E5M2, "fp8_e5m2", 5, 4, 15},
    {MxFormat::kFp8E4M3, "fp8_e4m3", 4, 5, 8},
    {MxFormat::kFp6E3M2, "fp6_e3m2", 3, 4, 4},
    {MxFormat::kFp6E2M3, "fp6_e2m3", 2, 5, 2},
    {MxFormat::kFp4, "fp4", 2, 3, 2},
    {MxFormat::kFp16, "fp16", 5, 12, 15},
    {MxFormat::kBF16, "bf16", 8, 9, 127},
}};

constexpr std::array<std::string_view, 3> kRoundings{"nearest", "floor", "even"};

const Format& Find(MxFormat format) { return kFormats[static_cast<size_t>(format)]; }

float MaxNorm(const Format& format) {
  // e4m3 spends its largest mantissa on NaN.
  if (format.format == MxFormat::kFp8E4M3) return 448.0f;
  const int steps = (1 << (format.mantissa_bits - 1)) - 1;
  return std::ldexp(static_cast<float>(steps), format.emax - (format.mantissa_bits - 2));
}

float Round(float x, MxRounding rounding) {
  switch (rounding) {
    case MxRounding::kNearest:
      return std::round(x);
    case MxRounding::kFloor:
      return std::trunc(x);
    case MxRounding::kEven:
      return std::nearbyint(x);
  }
  return x;
}

// floor(log2(|x|)), zero as the smallest normal number.
int Exponent(float magnitude) { return magnitude == 0 ? -126 : std::ilogb(magnitude); }

float RoundElement(float x, const Format& format, float max_norm, MxRounding rounding) {
  const int smallest = format.exponent_bits == 0 ? 0 : 2 - (1 << (format.exponent_bits - 1));
  const int exponent = format.exponent_bits == 0 ? 0 : std::max(Exponent(std::abs(x)), smallest);
  const int shift = format.mantissa_bits - 2 - exponent;
  return std::clamp(std::ldexp(Round(std::ldexp(x, shift), rounding), -shift), -max_norm, max_norm);
}

void RoundBlock(float* values, int64_t count, int64_t stride, const MxSpec& spec, const Format& format,
                float max_norm) {
  constexpr int kMaxExponent = 127;
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float magnitude = std::abs(values[i * stride]);
    if (!(magnitude <= largest)) largest = magnitude;
    if (std::isnan(magnitude)) break;
  }
  for (int64_t i = 0; i < count; ++i) {
    float& value = values[i * stride];
    const float reach = spec.shared_max ? largest : std::abs(value);
    const int exponent = std::isfinite(reach) ? Exponent(reach) - format.emax : kMaxExponent + 1;
    if (exponent > kMaxExponent) {
      value = std::numeric_limits<float>::quiet_NaN();
      continue;
    }
    const int scale = std::max(exponent, -kMaxExponent);
    value = std::ldexp(RoundElement(std::ldexp(value, -scale), format, max_norm, spec.rounding), scale);
  }
}

template <typename Table, typename NameOf>
std::string KnownNames(const Table& table, NameOf name_of) {
  std::string names;
  for (const auto& entry : table) names += (names.empty() ? "" : ", ") + std::string(name_of(entry));
  return names;
}

}  // namespace

std::string_view Name(MxFormat format) { return Find(format).name; }
std::string_view Name(MxRounding rounding) { return kRoundings[static_cast<size_t>(rounding)]; }

MxFormat MxFormatFromName(std::string_view name) {
  for (const Format& format : kFormats)
    if (format.name == name) return format.format;
  Fail("unknown MX element format \"{}\"; known are {}", name,
       KnownNames(kFormats, [](const Format& format) { return format.name; }));
}

MxRounding MxRoundingFromName(std::string_view name) {
  for (size_t i = 0; i < kRoundings.size(); ++i)
    if (kRoundings[i] == name) return static_cast<MxRounding>(i);
  Fail("unknown MX rounding \"{}\"; known are {}", name, KnownNames(kRoundings, [](auto entry) { return entry; }));
}

void MxFakeQuantize(Tensor& values, const MxSpec& spec) {
  const Shape& shape = values.GetShape();
  const int axis = spec.axis < 0 ? spec.axis + shape.Rank() : spec.axis;
  if (axis < 0 || axis >= shape.Rank())
    Fail("MX blocks lie along axis {}, but the tensor has shape {}; choose an axis that it has", spec.axis,
         shape.ToString());
  const std::span<float> data = values.F32();
  const int64_t length = shape[axis];
  int64_t stride = 1;
  for (int i = axis + 1; i < shape.Rank(); ++i) stride *= shape[i];
  const int64_t lines = length == 0 ? 0 : static_cast<int64_t>(data.size()) / length;
  const Format& format = Find(spec.format);
  const float max_norm = MaxNorm(format);
  constexpr int64_t kLinesPerPiece = 64;
  ParallelFor(lines, kLinesPerPiece, [&](int64_t begin, int64_t end) {
    for (int64_t line = begin; line < end; ++line) {
      float* first = data.data() + line / stride * stride * length + line % stride;
      for (int64_t i = 0; i < length; i += kMxBlock)
        RoundBlock(first + i * stride, std::min(kMxBlock, length - i), stride, spec, format, max_norm);
    }
  });
}

}  // namespace circlet
