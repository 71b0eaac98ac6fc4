#include "circlet/model/gemma4/tables.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet {
namespace {

// base^(-2j/dim) for j < count. The reference raises in float32; rounding the double result to float32 gives the same
// frequencies to the last bit or two, on every machine.
std::vector<float> Powers(float base, int dim, int count) {
  std::vector<float> frequencies(count);
  for (int j = 0; j < count; ++j) {
    const float exponent = static_cast<float>(2 * j) / static_cast<float>(dim);
    frequencies[j] = 1.0f / static_cast<float>(std::pow(static_cast<double>(base), static_cast<double>(exponent)));
  }
  return frequencies;
}

// Writes one axis of one row: [f, f] with f = position * frequencies, at cos and sin.
void FillRow(int64_t position, std::span<const float> frequencies, float first_sign, float* cos, float* sin) {
  const size_t half = frequencies.size();
  for (size_t j = 0; j < half; ++j) {
    // The angle in float32, as the reference multiplies; cosine and sine in float64, so that they are rounded once.
    const double angle = static_cast<float>(position) * frequencies[j];
    cos[j] = cos[j + half] = static_cast<float>(std::cos(angle));
    sin[j + half] = static_cast<float>(std::sin(angle));
    sin[j] = first_sign * sin[j + half];
  }
}

RopeTables NewTables(int64_t count, int head_dim) {
  const TensorType type{DType::kF32, {1, count, head_dim}};
  return {Tensor(type), Tensor(type)};
}

int64_t PairCount(std::span<const int64_t> positions) {
  CIRCLET_CHECK(positions.size() % 2 == 0, "{} values are no (x, y) pairs", positions.size());
  return static_cast<int64_t>(positions.size() / 2);
}

// Mask [1,1,S,S] in which `seen(q, k)` says what stays 0.
template <typename Seen>
Tensor SquareMask(int64_t length, float fill, Seen seen) {
  const Tensor mask = Tensor::Uninitialized({DType::kF32, {1, 1, length, length}});
  float* const out = mask.F32().data();
  ParallelFor(length, 64, [&](int64_t begin, int64_t end) {
    for (int64_t q = begin; q < end; ++q)
      for (int64_t k = 0; k < length; ++k) out[q * length + k] = seen(q, k) ? 0.0f : fill;
  });
  return mask;
}

}  // namespace

std::vector<float> RopeFrequencies(const RopeConfig& rope, int head_dim) {
  const int half = head_dim / 2;
  if (rope.type == RopeConfig::Type::kDefault) return Powers(rope.theta, head_dim, half);
  const int turning = static_cast<int>(rope.partial_rotary_factor * head_dim / 2);
  std::vector<float> frequencies = Powers(rope.theta, head_dim, turning);
  for (float& frequency : frequencies) frequency /= rope.factor;
  frequencies.resize(half, 0.0f);
  return frequencies;
}

RopeTables TextRopeTables(const RopeConfig& rope, int head_dim, int64_t start, int64_t count, bool negated_sin) {
  const std::vector<float> frequencies = RopeFrequencies(rope, head_dim);
  RopeTables tables = NewTables(count, head_dim);
  for (int64_t row = 0; row < count; ++row) {
    FillRow(start + row, frequencies, negated_sin ? -1.0f : 1.0f, tables.cos.F32().data() + row * head_dim,
            tables.sin.F32().data() + row * head_dim);
  }
  return tables;
}

RopeTables VisionRopeTables(float theta, int head_dim, std::span<const int64_t> positions, bool negated_sin) {
  const int64_t count = PairCount(positions);
  const int axis_dim = head_dim / 2;
  const std::vector<float> frequencies = Powers(theta, axis_dim, axis_dim / 2);
  RopeTables tables = NewTables(count, head_dim);
  for (int64_t row = 0; row < count; ++row) {
    for (int axis = 0; axis < 2; ++axis) {
      const int64_t offset = row * head_dim + axis * axis_dim;
      FillRow(std::max<int64_t>(positions[2 * row + axis], 0), frequencies, negated_sin ? -1.0f : 1.0f,
              tables.cos.F32().data() + offset, tables.sin.F32().data() + offset);
    }
  }
  return tables;
}

Tensor PrefillMask(int64_t length, int64_t valid, int window, float fill, std::span<const int64_t> places) {
  CIRCLET_CHECK(valid >= 0 && valid <= length, "{} of {} positions", valid, length);
  std::vector<int64_t> keep(static_cast<size_t>(length), 0);
  std::fill_n(keep.begin(), valid, 1);
  return PrefillMask(keep, window, fill, places);
}

Tensor PrefillMask(std::span<const int64_t> keep, int window, float fill, std::span<const int64_t> places) {
  const auto length = static_cast<int64_t>(keep.size());
  // The last position that each query may see: itself, or the end of the run of soft tokens that it is in.
  std::vector<int64_t> last(keep.size());
  std::iota(last.begin(), last.end(), 0);
  for (auto place = places.rbegin(); place != places.rend(); ++place) {
    CIRCLET_CHECK(*place >= 0 && *place < length, "soft token {} of {} positions", *place, length);
    if (place != places.rbegin() && *place + 1 == *std::prev(place)) last[*place] = last[*place + 1];
  }
  return SquareMask(length, fill, [&](int64_t q, int64_t k) {
    return k <= last[q] && keep[k] != 0 && (window == 0 || k > q - window);
  });
}

Tensor DecodeMask(int64_t slots, int64_t past, int window, float fill) {
  if (past < 0 || past > slots - 1) {
    Fail("decode mask: {} past tokens do not fit into {} slots, one of which is the new token's; use a larger max_seq",
         past, slots);
  }
  Tensor mask(TensorType{DType::kF32, {1, 1, slots}});
  const int64_t first = window == 0 ? 0 : std::max<int64_t>(0, past - (window - 1));
  for (int64_t k = 0; k < slots; ++k) {
    const bool seen = k == slots - 1 || (k >= first && k < past);
    mask.F32()[k] = seen ? 0.0f : fill;
  }
  return mask;
}

Tensor VisionMask(std::span<const int64_t> positions, float fill) {
  return SquareMask(PairCount(positions), fill,
                    [=](int64_t q, int64_t k) { return positions[2 * q] >= 0 && positions[2 * k] >= 0; });
}

}  // namespace circlet
