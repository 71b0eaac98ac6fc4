#include "circlet/quant/observer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <limits>
#include <nlohmann/json.hpp>
#include <random>
#include <set>
#include <thread>

#include "circlet/quant/affine.h"
#include "error_text.h"

namespace circlet {
namespace {

using testing::HasSubstr;
using Samples = std::vector<std::vector<float>>;

PointSpec SpecOf(ObserverSpec observer, DType dtype = DType::kI16) {
  return {.point = "layers.3.act_in",
          .dtype = dtype,
          .scheme = {.per_channel = false, .symmetric = dtype == DType::kI16},
          .observer = observer};
}

const PointSpec kMinMax = SpecOf({});
const PointSpec kEma = SpecOf({.kind = ObserverSpec::Kind::kEma, .momentum = 0.9});
const PointSpec kPercentile =
    SpecOf({.kind = ObserverSpec::Kind::kPercentile, .max_samples = 500, .samples_per_batch = 64});

Samples RandomSamples(int count) {
  std::mt19937 generator(11);
  std::normal_distribution<float> normal;
  Samples samples(count);
  for (size_t i = 0; i < samples.size(); ++i) {
    samples[i].resize(40 + 97 * i);
    for (float& value : samples[i]) value = normal(generator);
  }
  return samples;
}

void Observe(Observer& observer, int64_t index, const std::vector<float>& sample, size_t chunk = SIZE_MAX) {
  observer.BeginSample(index, static_cast<int64_t>(sample.size()));
  for (size_t first = 0; first < sample.size(); first += std::min(chunk, sample.size()))
    observer.Visit(std::span(sample).subspan(first, std::min(chunk, sample.size() - first)),
                   static_cast<int64_t>(first));
  observer.EndSample();
}

std::unique_ptr<Observer> ObserveAll(const PointSpec& spec, const Samples& samples) {
  std::unique_ptr<Observer> observer = Observer::Make(spec);
  for (size_t i = 0; i < samples.size(); ++i) Observe(*observer, static_cast<int64_t>(i), samples[i]);
  return observer;
}

TEST(ObserverTest, MinMaxHoldsTheExtremesOfAllSamples) {
  const auto observer = ObserveAll(kMinMax, {{1, -2, 3}, {}, {0.5f, 7}});
  EXPECT_EQ(observer->Min(), -2.0f);
  EXPECT_EQ(observer->Max(), 7.0f);
  EXPECT_EQ(observer->Samples(), 2);
  EXPECT_EQ(observer->Freeze(kMinMax, 0), ComputeQParams(-2, 7, DType::kI16, true));
}

TEST(ObserverTest, HeadroomReachesBelowTheSmallestValue) {
  const PointSpec spec = SpecOf({}, DType::kU8);
  const auto observer = ObserveAll(spec, {{-2, 6}});
  EXPECT_EQ(observer->Freeze(spec, 10), ComputeQParams(-12, 6, DType::kU8, false));
}

TEST(ObserverTest, MovingAveragesAreThoseOfTheReferenceInFloat32) {
  const auto observer = ObserveAll(kEma, {{-1, 2}, {-3, 1}, {-0.5f, 4}});
  const float past = 0.9f;
  const auto present = static_cast<float>(1.0 - 0.9);
  EXPECT_EQ(observer->Min(), past * (past * -1.0f + present * -3.0f) + present * -0.5f);
  EXPECT_EQ(observer->Max(), past * (past * 2.0f + present * 1.0f) + present * 4.0f);
}

TEST(ObserverTest, AllValuesOfSmallSamplesReachTheQuantiles) {
  std::vector<float> values(101);
  for (int i = 0; i <= 100; ++i) values[i] = static_cast<float>(i);
  const auto bounds = [&](ObserverSpec spec, const std::vector<float>& sample, DType dtype) {
    spec.kind = ObserverSpec::Kind::kPercentile;
    const PointSpec point = SpecOf(spec, dtype);
    return ObserveAll(point, {sample})->Freeze(point, 0);
  };
  std::vector<float> negative = values;
  for (float& value : negative) value = -value;
  std::vector<float> both = values;
  for (float& value : both) value -= 50;
  // 101 values 0 .. 100: the quantile q is 100 q.
  EXPECT_EQ(bounds({.percentile = 90}, values, DType::kI16), ComputeQParams(-90, 90, DType::kI16, true));
  EXPECT_EQ(bounds({.percentile = 100}, both, DType::kI16), ComputeQParams(-50, 50, DType::kI16, true));
  EXPECT_EQ(bounds({.percentile = 90}, values, DType::kU8), ComputeQParams(0, 90, DType::kU8, false));
  EXPECT_EQ(bounds({.percentile = 75}, negative, DType::kU8), ComputeQParams(-75, 0, DType::kU8, false));
  EXPECT_EQ(bounds({.percentile = 50}, both, DType::kU8), ComputeQParams(-25, 25, DType::kU8, false));
  EXPECT_EQ(bounds({.percentile = 100}, both, DType::kU8), ComputeQParams(-50, 50, DType::kU8, false));
  EXPECT_EQ(bounds({.lower = 25, .upper = 100}, both, DType::kU8), ComputeQParams(-25, 50, DType::kU8, false));
  EXPECT_EQ(bounds({.lower = 0, .upper = 75}, both, DType::kU8), ComputeQParams(-50, 25, DType::kU8, false));
  EXPECT_EQ(bounds({.lower = 0.5, .upper = 99.5}, both, DType::kU8), ComputeQParams(-49.5f, 49.5f, DType::kU8, false));
  // Explicit bounds on one side of zero are widened to hold it.
  EXPECT_EQ(bounds({.lower = 25, .upper = 75}, values, DType::kU8), ComputeQParams(0, 75, DType::kU8, false));
  EXPECT_EQ(bounds({.percentile = 99.5}, values, DType::kI16), ComputeQParams(-99.5f, 99.5f, DType::kI16, true));
}

TEST(ObserverTest, AReservoirEstimatesTheQuantilesOfFarMoreValues) {
  std::mt19937 generator(2);
  std::uniform_real_distribution<float> uniform(0, 1);
  const PointSpec spec = SpecOf(
      {.kind = ObserverSpec::Kind::kPercentile, .percentile = 90, .max_samples = 4000, .samples_per_batch = 1000});
  const std::unique_ptr<Observer> observer = Observer::Make(spec);
  for (int sample = 0; sample < 20; ++sample) {
    std::vector<float> values(20000);
    for (float& value : values) value = uniform(generator);
    Observe(*observer, sample, values);
  }
  EXPECT_NEAR(observer->Freeze(spec, 0).scale[0] * 32767, 0.9f, 0.015f);
  EXPECT_EQ(observer->State().at("values").size(), 4000u);
}

TEST(ObserverTest, ASmallReservoirHoldsTheStrongestOfALargeOne) {
  const Samples samples = RandomSamples(40);
  ObserverSpec observer{.kind = ObserverSpec::Kind::kPercentile, .max_samples = 1 << 20, .samples_per_batch = 64};
  nlohmann::json expected = ObserveAll(SpecOf(observer), samples)->State();
  observer.max_samples = 50;
  const nlohmann::json small = ObserveAll(SpecOf(observer), samples)->State();
  for (const char* key : {"priorities", "values"}) {
    ASSERT_GT(expected.at(key).size(), 2000u);
    expected[key].erase(expected[key].begin() + 50, expected[key].end());
    EXPECT_EQ(small.at(key), expected.at(key));
  }
}

TEST(ObserverTest, PositionsShiftFromSampleToSample) {
  std::vector<float> ramp(10000);
  for (size_t i = 0; i < ramp.size(); ++i) ramp[i] = static_cast<float>(i);
  const ObserverSpec observer{.kind = ObserverSpec::Kind::kPercentile, .samples_per_batch = 10};
  const std::vector<float> kept = ObserveAll(SpecOf(observer), {ramp, ramp, ramp})->State().at("values");
  EXPECT_EQ(kept.size(), 30u);
  EXPECT_EQ(std::set<float>(kept.begin(), kept.end()).size(), 30u);
}

TEST(ObserverTest, TheSeedAndTheSampleDecideWhatIsKept) {
  std::vector<float> ramp(100);
  for (size_t i = 0; i < ramp.size(); ++i) ramp[i] = static_cast<float>(i);
  ObserverSpec observer{.kind = ObserverSpec::Kind::kPercentile, .max_samples = 20};
  const auto kept = [&](int64_t sample) {
    const std::unique_ptr<Observer> one = Observer::Make(SpecOf(observer));
    Observe(*one, sample, ramp);
    return one->State().at("values");
  };
  const nlohmann::json first = kept(0);
  EXPECT_NE(kept(1), first);
  observer.seed = 1;
  EXPECT_NE(kept(0), first);
}

TEST(ObserverTest, TheSignOfZeroDoesNotTellWhichSampleCameFirst) {
  EXPECT_EQ(ObserveAll(kMinMax, {{0.0f}, {-0.0f}})->State().dump(),
            ObserveAll(kMinMax, {{-0.0f}, {0.0f}})->State().dump());
}

class AnyObserverTest : public testing::TestWithParam<const PointSpec*> {};
INSTANTIATE_TEST_SUITE_P(Kinds, AnyObserverTest, testing::Values(&kMinMax, &kEma, &kPercentile),
                         [](const auto& info) { return std::string(info.param->ObserverName()); });

TEST_P(AnyObserverTest, ChunksInAnyOrderGiveTheSameState) {
  const Samples samples = RandomSamples(9);
  const auto whole = ObserveAll(*GetParam(), samples);
  const std::unique_ptr<Observer> pieces = Observer::Make(*GetParam());
  for (size_t i = 0; i < samples.size(); ++i) {
    const auto size = static_cast<int64_t>(samples[i].size());
    pieces->BeginSample(static_cast<int64_t>(i), size);
    for (int64_t end = size; end > 0; end -= 7)
      pieces->Visit(std::span(samples[i]).subspan(std::max<int64_t>(0, end - 7), std::min<int64_t>(7, end)),
                    std::max<int64_t>(0, end - 7));
    pieces->EndSample();
  }
  EXPECT_EQ(pieces->State(), whole->State());
}

TEST_P(AnyObserverTest, ThreadsGiveTheSameState) {
  const Samples samples = RandomSamples(30);
  const auto whole = ObserveAll(*GetParam(), samples);
  const std::unique_ptr<Observer> shared = Observer::Make(*GetParam());
  for (size_t i = 0; i < samples.size(); ++i) {
    const std::span<const float> values(samples[i]);
    shared->BeginSample(static_cast<int64_t>(i), static_cast<int64_t>(values.size()));
    std::vector<std::thread> threads;
    for (size_t t = 0; t < 3; ++t) {
      threads.emplace_back([&, t] {
        for (size_t first = t * 13; first < values.size(); first += 39)
          shared->Visit(values.subspan(first, std::min<size_t>(13, values.size() - first)),
                        static_cast<int64_t>(first));
      });
    }
    for (std::thread& thread : threads) thread.join();
    shared->EndSample();
  }
  EXPECT_EQ(shared->State(), whole->State());
}

TEST_P(AnyObserverTest, AStateRestoredGoesOnAsIfNothingHadHappened) {
  const Samples samples = RandomSamples(12);
  const auto whole = ObserveAll(*GetParam(), samples);
  std::unique_ptr<Observer> observer = Observer::Make(*GetParam());
  for (size_t i = 0; i < samples.size(); ++i) {
    if (i == 5) observer = Observer::FromState(nlohmann::json::parse(observer->State().dump()));
    Observe(*observer, static_cast<int64_t>(i), samples[i]);
  }
  EXPECT_EQ(observer->State(), whole->State());
  EXPECT_EQ(observer->Freeze(*GetParam(), 0), whole->Freeze(*GetParam(), 0));
}

class MergeTest : public testing::TestWithParam<std::tuple<const PointSpec*, int>> {};
INSTANTIATE_TEST_SUITE_P(Parts, MergeTest,
                         testing::Combine(testing::Values(&kMinMax, &kPercentile), testing::Range(1, 4)));

TEST_P(MergeTest, SamplesSharedBetweenPartsGiveTheStateOfOne) {
  const auto& [spec, parts] = GetParam();
  const Samples samples = RandomSamples(30);
  const auto whole = ObserveAll(*spec, samples);
  std::vector<std::unique_ptr<Observer>> observers;
  for (int part = 0; part < parts; ++part) {
    observers.push_back(Observer::Make(*spec));
    for (size_t i = part; i < samples.size(); i += parts)
      Observe(*observers[part], static_cast<int64_t>(i), samples[i], 11);
  }
  const std::unique_ptr<Observer> merged = Observer::Make(*spec);
  for (int part = parts; part-- > 0;) merged->Merge(*Observer::FromState(observers[part]->State()));
  EXPECT_EQ(merged->State(), whole->State());
  EXPECT_EQ(merged->Samples(), 30);
}

TEST(ObserverTest, HeadsThatShareAPointCountAllTheirValues) {
  const std::unique_ptr<Observer> one = Observer::Make(kPercentile);
  const std::unique_ptr<Observer> other = Observer::Make(kPercentile);
  const std::vector<float> a{1, 2, 3}, b{4, -5, 6};
  for (Observer* observer : {one.get(), other.get()}) {
    observer->BeginSample(0, 3);
    observer->Visit(observer == one.get() ? a : b, 0);
    observer->Visit(observer == one.get() ? b : a, 0);
    observer->EndSample();
  }
  EXPECT_EQ(one->State(), other->State());
  EXPECT_EQ(one->Min(), -5.0f);
  EXPECT_EQ(one->Samples(), 1);
  EXPECT_EQ(one->State().at("values").size(), 6u);
}

TEST(ObserverTest, MovingAveragesRefuseToMerge) {
  const auto a = ObserveAll(kEma, {{1}});
  const auto b = ObserveAll(kEma, {{2}});
  EXPECT_THAT(
      ErrorText([&] { a->Merge(*b); }),
      HasSubstr("a moving average depends on the order of the samples and cannot be merged; calibrate in one process"));
}

TEST(ObserverTest, APointWithoutDataIsNamedWhenItIsFrozen) {
  for (const PointSpec* spec : {&kMinMax, &kEma, &kPercentile}) {
    const std::unique_ptr<Observer> observer = Observer::Make(*spec);
    EXPECT_THAT(ErrorText([&] { observer->Freeze(*spec, 0); }),
                HasSubstr("layers.3.act_in: no calibration data reached this point; add samples that reach it"));
  }
}

TEST(ObserverTest, ANaNOrAnInfinityIsNamedWhenThePointIsFrozen) {
  for (const PointSpec* spec : {&kMinMax, &kEma, &kPercentile}) {
    const auto observer = ObserveAll(*spec, {{1, std::nanf(""), 2}, {-std::numeric_limits<float>::infinity()}});
    EXPECT_EQ(observer->NonFinite(), 2);
    EXPECT_EQ(observer->Max(), 2.0f);
    EXPECT_THAT(ErrorText([&] { observer->Freeze(*spec, 0); }),
                HasSubstr("layers.3.act_in: a NaN or an infinity reached this point (2 values in 2 samples); check the "
                          "weights and the calibration data"));
  }
}

TEST(ObserverTest, PointsThatAreNotAffineFreezeToNothing) {
  const PointSpec spec{.point = "p", .kind = QuantKind::kNone};
  const auto observer = Observer::Make(spec);
  EXPECT_TRUE(observer->Freeze(spec, 0).scale.empty());
}

TEST(ObserverTest, ADamagedStateIsAnError) {
  nlohmann::json state = ObserveAll(kPercentile, {{1, 2}})->State();
  state["values"].erase(0);
  EXPECT_THAT(ErrorText([&] { Observer::FromState(state); }),
              HasSubstr("observer state: priorities: expected two lists of one length"));
  state.erase("samples");
  EXPECT_THAT(ErrorText([&] { Observer::FromState(state); }), HasSubstr("observer state: samples: is missing"));
}

}  // namespace
}  // namespace circlet
