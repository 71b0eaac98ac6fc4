#include <algorithm>

#include "circlet/smoke/smoke.h"

namespace circlet {
namespace {

// Figures of this program with three calibration samples and seed 123; scripts/smoke_bounds.sh makes the list.
struct Measured {
  std::string_view name, profile, recipe;
  double mean, peir;
};
constexpr Measured kMeasured[] = {
#include "smoke/measured.inc"
};

// Instruction sets differ in the last bits, and codes that flip there move these figures by a few percent; twice the
// measured figure is never reached by that, nor is a third of it.
constexpr double kAbove = 2.0;
constexpr double kBelow = 1.0 / 3;

}  // namespace

std::optional<SmokeBounds> BoundsOf(std::string_view case_name, std::string_view profile, std::string_view recipe) {
  const auto row = std::ranges::find_if(kMeasured, [&](const Measured& measured) {
    return measured.name == case_name && measured.profile == profile && measured.recipe == recipe;
  });
  if (row == std::end(kMeasured)) return std::nullopt;
  return SmokeBounds{kAbove * row->mean, kAbove * row->peir, kBelow * row->mean};
}

}  // namespace circlet
