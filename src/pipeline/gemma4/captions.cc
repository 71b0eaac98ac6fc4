#include "pipeline/gemma4/captions.h"

#include <algorithm>

namespace circlet::gemma4 {

bool Answers(const Sequence& caption, std::span<const int> stops, const Tails& tails, Tail TailPair::*chain) {
  const auto length = static_cast<int64_t>(caption.ids.size());
  bool exact = true;
  for (int64_t position = caption.FirstRead(); position + 1 < length; ++position) {
    const int64_t choice = (tails[position].*chain).choice;
    const bool stop = std::ranges::find(stops, choice) != stops.end();
    exact &= position + 2 == length ? stop : choice == caption.ids[position + 1];
  }
  return exact;
}

}  // namespace circlet::gemma4
