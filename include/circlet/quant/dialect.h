#pragma once

#include <string_view>

#include "circlet/base/qparams.h"

namespace circlet {

// Where circlet computes what the reference computes, and where it deliberately does better. Each switch is one such
// place; docs/dialects.md gives the reason and the measured effect of each.
struct Dialect {
  std::string_view name;
  // A second point on a value that the producer's point has rounded already (a linear's act_in behind a norm's
  // act_out).
  bool duplicate_points;
  // Points on the pieces that RoPE moves around (q_x1, q_x2, q_neg, q_cat), each with a range of its own; without them
  // the pieces share the grid of the tensor they are cut from.
  bool rope_piece_points;
  // Statistics of attention sums include masked keys, -120 lower than the others.
  bool observe_masked_keys;
  // Signed linear weights per tensor, signed tables per row with a zero point (quantization.md 4.4); otherwise signed
  // weights are symmetric per row, zero point 0. Unsigned weights are asymmetric per row in both.
  bool signed_weights_as_reference;
  // act_out of a clipped linear sees values before the output clamp.
  bool clamp_after_point;
  // The PLE projection leaves some values without a grid.
  bool ple_float_holes;
  // K is transposed by an operator of its own ahead of the product.
  bool explicit_k_transpose;
  Rounding rounding;

  bool operator==(const Dialect&) const = default;
};

inline constexpr Dialect kTico{
    .name = "tico",
    .duplicate_points = true,
    .rope_piece_points = true,
    .observe_masked_keys = true,
    .signed_weights_as_reference = true,
    .clamp_after_point = true,
    .ple_float_holes = true,
    .explicit_k_transpose = true,
    .rounding = Rounding::kHalfEvenReciprocal,
};

inline constexpr Dialect kDefault{
    .name = "default",
    .duplicate_points = false,
    .rope_piece_points = false,
    .observe_masked_keys = false,
    .signed_weights_as_reference = false,
    .clamp_after_point = false,
    .ple_float_holes = false,
    .explicit_k_transpose = false,
    .rounding = Rounding::kHalfAwayDivide,
};

// Throws Error listing the known names.
const Dialect& DialectFromName(std::string_view name);

}  // namespace circlet
