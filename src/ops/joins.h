#pragma once

#include <optional>

#include "circlet/ops/ops.h"

namespace circlet {

// The axis along which an operator's output, of `rank` axes, is its inputs one behind the other; none where it is not.
std::optional<int> JoinedAxis(const Op& op, int rank);

}  // namespace circlet
