#include "pipeline/schedule.h"

#include <gmock/gmock.h>

namespace circlet {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::UnorderedElementsAre;
using Drop = Schedule::Drop;

std::string BugText(std::vector<PhaseFlow> phases) {
  try {
    Schedule schedule(std::move(phases));
  } catch (const Bug& bug) {
    return bug.what();
  }
  return "";
}

TEST(ScheduleTest, AKeyIsDroppedBehindTheLastStageThatReadsIt) {
  const Schedule schedule({{.name = "a", .makes = {{"x"}}},
                           {.name = "b", .makes = {{"y"}}, .reads = {"x"}},
                           {.name = "c", .reads = {"x", "y"}},
                           {.name = "d"}});
  EXPECT_THAT(schedule.After(0), IsEmpty());
  EXPECT_THAT(schedule.After(1), IsEmpty());
  EXPECT_THAT(schedule.After(2), UnorderedElementsAre(Drop{"x"}, Drop{"y"}));
  EXPECT_THAT(schedule.After(3), IsEmpty());
}

TEST(ScheduleTest, WhatNothingReadsIsDroppedWhereItIsMade) {
  const Schedule schedule({{.name = "a", .makes = {{"x"}}}, {.name = "b"}});
  EXPECT_THAT(schedule.After(0), ElementsAre(Drop{"x"}));
}

TEST(ScheduleTest, OnlyTheVerificationSampleIsKeptForAUnitFurtherOn) {
  const Schedule schedule({{.name = "a", .makes = {{"x"}}},
                           {.name = "b", .reads = {"x"}},
                           {.name = "c"},
                           {.name = "d", .unit_reads = {"x"}}});
  EXPECT_THAT(schedule.After(1), ElementsAre(Drop{"x", /*keeps_verification=*/true}));
  EXPECT_THAT(schedule.After(2), IsEmpty());
  EXPECT_THAT(schedule.After(3), ElementsAre(Drop{"x", false}));
}

TEST(ScheduleTest, AUnitOfTheSamePhaseOrAnEarlierOneKeepsNothing) {
  const Schedule schedule({{.name = "a", .makes = {{"x"}, {"y"}}, .unit_reads = {"x", "y"}},
                           {.name = "b", .reads = {"x"}, .unit_reads = {"x"}}});
  EXPECT_THAT(schedule.After(0), ElementsAre(Drop{"y", false}));
  EXPECT_THAT(schedule.After(1), ElementsAre(Drop{"x", false}));
}

TEST(ScheduleTest, WhatUnitsPassOnLivesFromUnitToUnit) {
  const Schedule schedule({{.name = "a", .unit_makes = {{"decode.x", 8, 8}}},
                           {.name = "b"},
                           {.name = "c", .unit_reads = {"decode.x"}},
                           {.name = "d"}});
  EXPECT_THAT(schedule.After(0), ElementsAre(Drop{"decode.x", true}));
  EXPECT_THAT(schedule.After(2), ElementsAre(Drop{"decode.x", false}));
  EXPECT_EQ(schedule.BytesIn(1), 8);
  EXPECT_EQ(schedule.BytesIn(3), 0);
}

TEST(ScheduleTest, BytesAreThoseOfAllItemsUntilTheLastStageAndThenOfTheVerificationSample) {
  const Schedule schedule({{.name = "a", .makes = {{"x", 100, 10}}},
                           {.name = "b", .makes = {{"y", 50, 5}}, .reads = {"x"}},
                           {.name = "c", .makes = {{"z", 7, 7}}, .reads = {"y"}, .unit_reads = {"x"}}});
  EXPECT_EQ(schedule.BytesIn(0), 100);
  EXPECT_EQ(schedule.BytesIn(1), 150);
  EXPECT_EQ(schedule.BytesIn(2), 10 + 50 + 7);
  EXPECT_EQ(schedule.PeakBytes(), 150);
}

TEST(ScheduleTest, AKeyThatNothingHasMadeIsABug) {
  EXPECT_THAT(BugText({{.name = "layers.0", .reads = {"hiden.0"}}}),
              HasSubstr("layers.0 reads hiden.0, which nothing has made"));
  EXPECT_THAT(BugText({{.name = "a", .unit_reads = {"x"}}, {.name = "b", .makes = {{"x"}}}}),
              HasSubstr("a reads x, which nothing has made"));
}

TEST(ScheduleTest, AKeyThatIsMadeTwiceIsABug) {
  EXPECT_THAT(BugText({{.name = "a", .makes = {{"x"}}}, {.name = "b", .makes = {{"x"}}}}),
              HasSubstr("b makes x, which is made already"));
}

}  // namespace
}  // namespace circlet
