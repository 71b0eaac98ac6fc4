#include "pipeline/item.h"

#include "circlet/base/error.h"

namespace circlet {

Passage ItemSet::PassageOf(const Item& item) const {
  Passage passage;
  switch (item.kind) {
    case ItemKind::kCalibration:
      passage = {.observed = !frozen_, .in_float = true, .rounded = true};
      break;
    case ItemKind::kEvaluation:
      passage = {.in_float = true, .rounded = true};
      break;
    case ItemKind::kWindow:
    case ItemKind::kCaption:
      passage = {.in_float = true, .rounded = true, .followed = true};
      break;
    case ItemKind::kControl:
      passage = {.in_float = true, .control = true, .exact = true};
      break;
    case ItemKind::kVerify:
      passage = {.rounded = true, .exact = true, .exported = true};
      break;
  }
  passage.measured = item.kind == MeasuredKind();
  passage.alone = item.alone;
  return passage;
}

void ItemSet::ChooseAlone() {
  const ItemKind measured = MeasuredKind();
  const int64_t count = std::ranges::count(items_, measured, &Item::kind), chosen = std::min(count, kAloneItems);
  int64_t i = 0;
  for (Item& item : items_)
    if (item.kind == measured) {
      item.alone = IsSpread(i++, chosen, count);
    }
}

const Item* ItemSet::Repeated() const {
  const auto control = std::ranges::find(items_, ItemKind::kControl, &Item::kind);
  if (control == items_.end()) return nullptr;
  const auto item = std::ranges::find(items_, control->control_of, &Item::id);
  CIRCLET_CHECK(item != items_.end(), "{} repeats no item", control->label);
  return &*item;
}

}  // namespace circlet
