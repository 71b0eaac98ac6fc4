#pragma once

// What a point's grid shall be: the forms that a recipe may write (quantization.md 4.1), the rules that fill what it
// leaves open (2.2, 4.4), and the outcome for one point.

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <string_view>

#include "circlet/base/dtype.h"
#include "circlet/ops/op.h"
#include "circlet/quant/dialect.h"
#include "circlet/quant/mx.h"

namespace circlet {

enum class QuantKind : uint8_t { kAffine, kMx, kNone };

// "per_tensor_asymm", "per_tensor_symm", "per_channel_asymm", "per_channel_symm".
struct Scheme {
  bool per_channel = false;
  bool symmetric = false;
  bool operator==(const Scheme&) const = default;
};
std::string_view Name(Scheme scheme);
Scheme SchemeFromName(std::string_view name);  // throws Error listing the known names

// How statistics become a range (quantization.md 3).
struct ObserverSpec {
  enum class Kind : uint8_t { kMinMax, kEma, kPercentile, kGiven };
  Kind kind = Kind::kMinMax;
  double momentum = 0.9;               // kEma: weight of the past, in (0, 1)
  double percentile = 99.99;           // kPercentile: (0, 100]; symmetric: of |x|; asymmetric: both tails together
  std::optional<double> lower, upper;  // kPercentile, asymmetric only: explicit quantiles, 0 <= lower < upper <= 100
  int64_t max_samples = 131072;        // kPercentile: values kept
  int64_t samples_per_batch = 4096;    // kPercentile: values taken from one tensor
  uint64_t seed = 0;                   // kPercentile: which values are kept
  float step = 0;                      // kGiven: the scale, which no value changes; no recipe asks for it
  int32_t zero_point = 0;              // kGiven
  bool operator==(const ObserverSpec&) const = default;
};

// A specification as written; what it leaves open comes from the next weaker source.
struct QuantSpec {
  QuantKind kind = QuantKind::kAffine;
  std::optional<DType> dtype;  // kAffine
  std::optional<Scheme> scheme;
  std::optional<int> axis;  // of a per-channel scheme
  std::optional<ObserverSpec> observer;
  MxSpec mx;  // kMx
  bool operator==(const QuantSpec&) const = default;

  static QuantSpec Affine(DType dtype, std::optional<Scheme> scheme = {}) { return {.dtype = dtype, .scheme = scheme}; }
  static QuantSpec None() { return {.kind = QuantKind::kNone}; }
};

// The forms of quantization.md 4.1: "int16"; 8 (bits, unsigned); {kind: affine, dtype, qscheme, channel_axis, observer,
// arguments}; {kind: mx, elem_format, axis, shared_exp_method, round}; {kind: no_quant}. An affine mapping may leave
// dtype out: it then changes only what it names. `where` stands in front of errors: unknown keys and names, arguments
// outside their range, arguments of another observer, unsigned and symmetric together.
QuantSpec QuantSpecFromJson(const nlohmann::json& value, std::string_view where);
nlohmann::json ToJson(const QuantSpec& spec);

// What the operator around a point asks for (quantization.md 4.4).
enum class WrapperDefault : uint8_t {
  kNone,
  kPerRow,      // weights of linears and embedding tables: a grid a row, asymmetric
  kFixedInt16,  // int16, per tensor, symmetric: the vision position table
};

// The outcome for one point.
struct PointSpec {
  std::string point;  // full name
  QuantKind kind = QuantKind::kAffine;
  DType dtype = DType::kI16;
  Scheme scheme;
  int axis = -1;  // channel axis; -1: one grid for the tensor, whatever the scheme says (quantization.md 2.2)
  ObserverSpec observer;
  MxSpec mx;
  bool operator==(const PointSpec&) const = default;

  // "MinMaxObserver", "EMAObserver", "PercentileObserver", "GivenObserver", "MXObserver", "IdentityObserver".
  std::string_view ObserverName() const;
};

// Applies the precedence of quantization.md 4.4: `override` (null: none), then the wrapper's default, then the role's
// specification, field by field; then the scheme that fits the element type. An override with a dtype of its own has
// its scheme inferred and leaves nothing to the role. Throws Error "POINT: ..." for unsigned with a symmetric scheme,
// for no dtype at all, and for a percentile observer on a per-channel grid.
PointSpec ResolveSpec(const Point& point, const QuantSpec* override, WrapperDefault wrapper, const QuantSpec& role,
                      const Dialect& dialect);

}  // namespace circlet
