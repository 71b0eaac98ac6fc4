#pragma once

#include <cstdint>

namespace circlet {

// How weights of linears become codes where a recipe has a stage "gptq" (docs/recipes.md); without one each element goes
// to the nearest code of its row's min/max grid. The defaults are those of the recipes *-gptq.
struct WeightRounding {
  // Which range of a row its grid covers: factors of the row's extremes, the one whose rounding to the nearest has the
  // least sum of squared errors, columns weighted.
  enum class Range : uint8_t {
    kMinMax,   // the extremes themselves
    kMse,      // all columns count the same. Ruin beside rounding to the nearest where inputs have outliers
    kMoments,  // a column counts the second moment of its input
  };
  Range range = Range::kMoments;
  // How much a position counts in the moments. Errors of outputs that a norm reads are divided by what it divides by.
  enum class TokenWeights : uint8_t {
    kNone,     // all alike
    kOutputs,  // 1 / ms(y), y what the next norm behind the linear reads in the float model, ms the mean of squares
    kStream,   // 1 / (ms(y) ms(h)), h the sum that the norm's output goes into
  };
  TokenWeights token_weights = TokenWeights::kNone;
  int range_factors = 25;  // from lowest_factor to 1, both ends of the range alike
  double lowest_factor = 0.4;
  bool compensate = true;  // GPTQ: each column makes up for the errors of those before it
  int solved_ranges = 0;   // so many ranges more go through that; the best is kept
  int descent_passes = 2;  // of coordinate descent on the codes, before and after each refit
  int scale_refits = 1;    // of a row's scale to its codes
  double damping = 0.05;   // of the mean of the moments' diagonal, added to it
  bool order_by_moment = true;  // columns by descending moment (act-order); else as they are
  // Whether codes also make up for what rounding has changed in the inputs. Taken row by row where it lowers the error of
  // the outputs.
  bool correct_inputs = true;
  double correction_damping = 0.3;  // less extrapolates from few positions
  int bits = 0;                     // of a 4-bit type's codes that are used: 2 or 3; 0: all
  // Linears whose outputs go through a norm into a sum also make up for this part of what the sum's other operand has
  // lost; 0: none. Takes correct_inputs.
  float residual_target = 0;
  bool operator==(const WeightRounding&) const = default;
};

}  // namespace circlet
