#pragma once

// Which matrix products a run makes, and how long they take alone: what the rest of the run is measured against.

#include <compare>
#include <cstdint>
#include <map>
#include <mutex>

namespace circlet::gemm {

// What is multiplied: float32 or bf16 with its like, giving float32; unsigned bytes with signed ones, giving int32.
enum class Operand : uint8_t { kF32, kBF16, kBytes };
inline Operand FloatOperand(bool bf16) { return bf16 ? Operand::kBF16 : Operand::kF32; }

// y[m,n] = a[m,k] b, with b stored as [n,k] (weights, keys) or as [k,n].
struct ProductShape {
  int64_t m, n, k;
  bool transposed = true;
  Operand operand = Operand::kF32;
  int64_t y_stride = 0;  // of its rows; 0: n
  auto operator<=>(const ProductShape&) const = default;
};

// Attention counts two products a head over all keys, whatever the mask lets it leave out.
class Tally {
 public:
  void Add(const ProductShape& shape, int64_t count);
  std::map<ProductShape, int64_t> Counts() const;
  int64_t Flops() const;  // two for each multiply-add

 private:
  mutable std::mutex mutex_;
  std::map<ProductShape, int64_t> counts_;
};

// While it lives, the products of all threads are counted in `tally`. One at a time.
class TallyScope {
 public:
  explicit TallyScope(Tally& tally);
  ~TallyScope();
  TallyScope(const TallyScope&) = delete;
  TallyScope& operator=(const TallyScope&) = delete;
};

// Adds to the tally of the scope that lives, if any.
void Count(const ProductShape& shape, int64_t count = 1);

// Seconds that the products of `tally` take one after the other in oneDNN, with Threads() threads: the time of each
// shape alone (warm, the minimum of up to five runs) times its count. What is not measured when `limit` seconds have
// passed, the cheapest shapes, is assumed to run at the average speed of the others.
double SecondsAlone(const Tally& tally, double limit = 5);

}  // namespace circlet::gemm
