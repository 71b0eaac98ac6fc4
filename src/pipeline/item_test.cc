#include "pipeline/item.h"

#include <gtest/gtest.h>

namespace circlet {
namespace {

ItemSet Items(const std::vector<ItemKind>& kinds) {
  ItemSet items;
  for (const ItemKind kind : kinds) items.Add({.id = static_cast<int>(items.Size()), .kind = kind});
  return items;
}

TEST(ItemSetTest, EvaluationItemsAreMeasuredWhereThereAreAny) {
  const ItemSet both = Items({ItemKind::kCalibration, ItemKind::kEvaluation});
  EXPECT_FALSE(both.PassageOf(both[0]).measured);
  EXPECT_TRUE(both.PassageOf(both[1]).measured);
  const ItemSet alone = Items({ItemKind::kCalibration, ItemKind::kWindow});
  EXPECT_TRUE(alone.PassageOf(alone[0]).measured);
  EXPECT_FALSE(alone.PassageOf(alone[1]).measured);
}

TEST(ItemSetTest, NothingIsObservedUnderGridsFromAFile) {
  ItemSet items = Items({ItemKind::kCalibration, ItemKind::kEvaluation});
  EXPECT_TRUE(items.PassageOf(items[0]).observed);
  EXPECT_EQ(items.PassageOf(items[0]).HeadRuns(), 1);
  items.SetFrozen();
  EXPECT_FALSE(items.PassageOf(items[0]).observed);
  EXPECT_EQ(items.PassageOf(items[0]).HeadRuns(), 0);
  EXPECT_EQ(items.PassageOf(items[0]).StageRuns(), 2);
}

TEST(ItemSetTest, AtMostEightMeasuredItemsRunAloneSpreadEvenly) {
  ItemSet items = Items(std::vector<ItemKind>(17, ItemKind::kCalibration));
  items.Add({.id = 17, .kind = ItemKind::kVerify});
  items.ChooseAlone();
  std::vector<int> alone;
  for (const Item& item : items)
    if (items.PassageOf(item).alone) alone.push_back(item.id);
  EXPECT_EQ(alone, (std::vector<int>{2, 4, 6, 8, 10, 12, 14, 16}));
}

TEST(ItemSetTest, TheVerificationSampleRunsInTheRoundedChainAloneAndInFloat32) {
  const ItemSet items = Items({ItemKind::kVerify, ItemKind::kControl});
  const Passage verify = items.PassageOf(items[0]), control = items.PassageOf(items[1]);
  EXPECT_TRUE(verify.rounded && verify.exact && !verify.in_float);
  EXPECT_TRUE(control.in_float && control.exact && !control.rounded);
  EXPECT_EQ(verify.StageRuns() + control.StageRuns(), 2);
}

TEST(ItemSetTest, AControlItemFindsWhatItRepeats) {
  ItemSet items = Items({ItemKind::kCalibration, ItemKind::kCalibration});
  EXPECT_EQ(items.Repeated(), nullptr);
  items.Add({.id = 2, .kind = ItemKind::kControl, .control_of = 1});
  ASSERT_NE(items.Repeated(), nullptr);
  EXPECT_EQ(items.Repeated()->id, 1);
}

}  // namespace
}  // namespace circlet
