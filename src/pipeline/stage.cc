#include "pipeline/stage.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <deque>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "circlet/base/threads.h"
#include "circlet/io/json.h"
#include "pipeline/exchange.h"
#include "pipeline/step_rounding.h"

namespace circlet {

namespace {

// A parameter as float32 (one that is stored as codes as products take it), converted once and kept until the source
// goes.
WeightSource CachedFloat(const Calibration& calibration, WeightSource stored) {
  return [&calibration, stored = std::move(stored),
          cache = std::make_shared<std::map<std::string, Tensor>>()](const std::string& name) {
    Tensor& tensor = (*cache)[name];
    if (tensor.Empty()) tensor = calibration.ReferenceOperand(stored(name));
    return tensor;
  };
}

}  // namespace

WeightSource Shared(WeightSource source) {
  return [source = std::move(source), mutex = std::make_shared<std::mutex>()](const std::string& name) {
    const std::lock_guard lock(*mutex);
    return source(name);
  };
}

void ForItems(int64_t count, bool side_by_side, const std::function<void(int64_t, int)>& body) {
  if (side_by_side) return ParallelItems(count, body);
  for (int64_t i = 0; i < count; ++i) body(i, 0);
}

bool SideBySide(const Graph& graph) {
  constexpr int64_t kLargeBytes = int64_t{4} << 20;
  return std::ranges::none_of(graph.Values(), [](const Value& value) {
    return value.kind != ValueKind::kWeight && value.type.Bytes() > kLargeBytes;
  });
}

bool OrderMatters(const Calibration& calibration, const Graph& graph) {
  return std::ranges::any_of(PointsOf(graph), [&](const Point& point) { return calibration.OrderMatters(point); });
}

std::vector<Tensor> Fetch(const ActivationStore& store, const Read& read, const Item& item, Chain chain) {
  std::vector<Tensor> values;
  for (const int owner : read.of ? read.of(item) : std::vector<int>{item.id}) {
    const Tensor value = store.Get(owner, chain, read.key);
    const int64_t all = value.GetShape().Rank() > 1 ? value.GetShape()[1] : 0;
    const int64_t taken = read.last ? read.last(item) : all;
    values.push_back(taken == all ? value : value.Slice(all - taken, all, 1));
  }
  return values;
}

Tensor Joined(std::span<const Tensor> layers) {
  const auto count = static_cast<int64_t>(layers.size());
  const int64_t length = layers[0].GetShape()[1], width = layers[0].GetShape()[2];
  const Tensor joined = Tensor::Uninitialized({DType::kF32, {1, length, count, width}});
  for (int64_t layer = 0; layer < count; ++layer)
    for (int64_t s = 0; s < length; ++s)
      std::memcpy(joined.F32().data() + (s * count + layer) * width, layers[layer].F32().data() + s * width,
                  width * sizeof(float));
  return joined;
}

std::pair<ErrorMetrics, PositionSummary> ShareErrors(std::span<const PositionErrors> mine, const ItemSet& items,
                                                     Communicator& world) {
  std::vector<ErrorMetrics> totals;
  std::vector<float> relative;
  for (const PositionErrors& errors : mine) {
    totals.push_back(errors.total);
    relative.insert(relative.end(), errors.relative.begin(), errors.relative.end());
  }
  const auto all = AllGather<ErrorMetrics>(world, totals);
  ErrorMetrics total;
  for (size_t i = 0; i < items.Size(); ++i) total.Merge(all[items[i].rank][i]);
  std::vector<float> gathered;
  for (const auto& of_rank : AllGather<float>(world, relative))
    gathered.insert(gathered.end(), of_rank.begin(), of_rank.end());
  return {total, Summarize(std::move(gathered))};
}

void ShareObservers(Calibration& calibration, Communicator& world) {
  if (world.Size() == 1) return;
  nlohmann::json mine = nlohmann::json::object();
  for (const auto& [name, observer] : calibration.Observers()) mine[name] = observer->State();
  calibration.Observers().clear();
  for (const std::string& text : world.AllGather(mine.dump())) {
    const nlohmann::json states = ParseJson(text, "observers of another process");
    ObserverMap observers;
    for (const auto& [name, state] : states.items()) observers[name] = Observer::FromState(state);
    calibration.Absorb(std::move(observers));
  }
}

namespace {

// The errors at positions that are no padding, of [1,S,..] tensors; of tensors of another form each row of the last
// axis is a position.
void AddReal(const Item& item, const Tensor& expected, const Tensor& found, PositionErrors& errors) {
  const Shape& shape = found.GetShape();
  if (expected.GetShape() != shape)
    Fail("the float output has shape {}, the quantized one {}", expected.GetShape().ToString(), shape.ToString());
  if (shape.Rank() < 3 || shape[1] != item.length)
    return errors.Add(expected.F32(), found.F32(), shape.Rank() > 0 ? shape[-1] : 1);
  const int64_t width = found.Elements() / item.length;
  for (const auto& [begin, end] : item.real)
    errors.Add(expected.F32().subspan(begin * width, (end - begin) * width),
               found.F32().subspan(begin * width, (end - begin) * width), width);
}

}  // namespace

// One thread's executors of one step and one reading, by length, and what they observed.
class StageRunner::StepRuns {
 public:
  // `observers`: where the reading's observers are; null: it has none.
  template <typename Build, typename MakeReading>
  ReadyGraph& For(const Item& item, const ObserverMap* observers, ExecutorOptions options, const Build& build,
                  const MakeReading& make) {
    const std::tuple key{item.length, item.variant, observers, options.compute};
    auto& plan = plans_[key];
    if (plan != nullptr) return *plan;
    // Each executor in bf16 has its own copy of the rounded weights.
    if (options.compute == Compute::kBf16) {
      plans_.clear();
      return *(plans_[key] = std::make_unique<ReadyGraph>(build(), make(), options));
    }
    plan = std::make_unique<ReadyGraph>(build(), make(), options);
    return *plan;
  }

  ObserverMap observers;

 private:
  std::map<std::tuple<int64_t, std::string, const ObserverMap*, Compute>, std::unique_ptr<ReadyGraph>> plans_;
};

int64_t StageRunner::Work(const Stage& stage) const {
  int64_t work = 0;
  for (const Item& item : c_.items)
    if (c_.IsMine(item)) work += c_.PassageOf(item).StageRuns();
  work *= static_cast<int64_t>(stage.steps.size());
  for (const Step& step : stage.steps) work += StepRounding(c_, step, Kept(step)).Work();
  return work;
}

// The outputs that are kept of some item.
std::vector<std::string> StageRunner::Kept(const Step& step) const {
  std::vector<std::string> kept;
  for (const Step::Sink& sink : step.outputs)
    if (Keeps(sink)) kept.push_back(sink.output);
  return kept;
}

Graph StageRunner::Build(const Step& step, const Item& item) const { return WithOutputs(step.build(item), Kept(step)); }

void StageRunner::Keep(const Step& step, const Item& item, Chain chain, const std::map<std::string, Tensor>& results) {
  for (const Step::Sink& sink : step.outputs) {
    if (!Keeps(sink)) continue;
    const Tensor& tensor = results.at(sink.output);
    for (size_t i = 0; i < sink.keys.size(); ++i) {
      if (!sink.by_layer) {
        c_.store.Put(item.id, chain, sink.keys[i], tensor.Clone());
        continue;
      }
      const auto layer = static_cast<int64_t>(i);
      // The slice of a single position is no copy, but a part of what the executor uses again.
      const Tensor part = tensor.Slice(layer, layer + 1, 2).Clone();
      c_.store.Put(item.id, chain, sink.keys[i], part.Reshaped({1, tensor.GetShape()[1], tensor.GetShape()[3]}),
                   ActivationStore::Read::kLate);
    }
    if (Captures(sink) && item.kind == ItemKind::kEvaluation)
      c_.captured->Update(chain, item, sink.capture, [&](Tensor& value) { value = tensor.Clone(); });
  }
}

std::map<std::string, Tensor> RunItem(const StageContext& context, const Step& step, const Item& item, Chain chain,
                                      bool rounded, Executor& executor, const WeightSource& weights,
                                      std::map<std::string, Tensor> inputs) {
  if (step.fresh) executor.ForgetWeights();
  return Within(item.label, [&] {
    for (const Input& input : step.inputs) {
      std::vector<Tensor> read;
      for (const Read& each : input.reads)
        std::ranges::move(Fetch(context.store, each, item, chain), std::back_inserter(read));
      inputs[input.name] = input.make ? input.make(item, chain, read) : read.at(0);
    }
    return executor.RunInPlace(inputs, [&](const std::string& name) {
      const Tensor own = step.own ? step.own(name, item, rounded ? &context.rounded : nullptr) : Tensor();
      return own.Empty() ? weights(name) : own;
    });
  });
}

void StageRunner::Observe(const Step& step, StepRounding& rounding) {
  std::vector<const Item*> items;
  for (const Item& item : c_.items)
    if (c_.IsMine(item) && c_.PassageOf(item).in_float) items.push_back(&item);
  if (items.empty()) return;
  const Graph graph = step.build(**std::ranges::max_element(items, {}, &Item::length));
  std::set<std::string> variants;
  bool ordered = false;
  for (const Item* item : items)
    if (variants.insert(item->variant).second) ordered |= OrderMatters(c_.calibration, step.build(*item));
  const bool side_by_side = SideBySide(graph) && !ordered;
  std::vector<StepRuns> workers(Threads());
  const WeightSource float_weights = Shared(CachedFloat(c_.calibration, c_.stored));
  const WeightSource stored = Shared(c_.stored);  // linears take bf16 as it is
  const Item* const repeated = c_.items.Repeated();
  ObserverMap of_control, of_repeated;
  const auto observers_of = [&](const Item& item, int worker) -> ObserverMap* {
    if (c_.calibration.Frozen()) return nullptr;
    if (c_.PassageOf(item).control) return item.control_of == repeated->id ? &of_control : nullptr;
    if (!c_.PassageOf(item).observed) return nullptr;
    return &item == repeated && !ordered ? &of_repeated : &workers[worker].observers;
  };
  ForItems(static_cast<int64_t>(items.size()), side_by_side, [&](int64_t i, int w) {
    const Item& item = *items[i];
    ObserverMap* const observers = observers_of(item, w);
    const auto reading_of = [&]() -> std::unique_ptr<PointReading> {
      if (observers == nullptr) return ObserveReading::Reference(c_.calibration);
      return std::make_unique<ObserveReading>(c_.calibration, *observers);
    };
    ReadyGraph& plan = workers[w].For(
        item, observers, c_.ComputeOf(item), [&] { return rounding.WithInputs(Build(step, item), item); }, reading_of);
    PointReading* const reading = plan.reading.get();
    if (reading != nullptr) reading->Begin(item.index);
    const bool bf16 = c_.ComputeOf(item).compute == Compute::kBf16;
    const std::map<std::string, Tensor> results =
        RunItem(c_, step, item, Chain::kFloat, false, plan.executor, bf16 ? stored : float_weights);
    Keep(step, item, Chain::kFloat, results);
    rounding.KeepInputs(item, results);
    if (reading != nullptr) reading->End();
    c_.advance();
  });
  if (c_.change != nullptr) CompareRanges(of_control, of_repeated);
  c_.calibration.Absorb(std::move(of_repeated));
  for (StepRuns& worker : workers) c_.calibration.Absorb(std::move(worker.observers));
}

void StageRunner::RunInFloat(const Stage& stage, const std::function<std::unique_ptr<PointReading>()>& make_reading) {
  std::vector<const Item*> items;
  for (const Item& item : c_.items)
    if (c_.IsMine(item)) items.push_back(&item);
  if (items.empty()) return;
  for (const Step& step : stage.steps) {
    std::vector<StepRuns> workers(Threads());
    const WeightSource weights =
        Shared(c_.compute == Compute::kBf16 ? c_.stored : CachedFloat(c_.calibration, c_.stored));
    const Graph graph = step.build(**std::ranges::max_element(items, {}, &Item::length));
    ForItems(static_cast<int64_t>(items.size()), SideBySide(graph), [&](int64_t i, int w) {
      const Item& item = *items[i];
      ReadyGraph& plan = workers[w].For(
          item, nullptr, c_.ComputeOf(item), [&] { return Build(step, item); }, make_reading);
      Keep(step, item, Chain::kFloat, RunItem(c_, step, item, Chain::kFloat, false, plan.executor, weights));
      c_.advance();
    });
  }
}

void StageRunner::CompareRanges(const ObserverMap& control, const ObserverMap& repeated) {
  ComputeChange& change = *c_.change;
  double sum = change.mean_range_change * static_cast<double>(change.points);
  for (const auto& [name, exact] : control) {
    const auto it = repeated.find(name);
    if (it == repeated.end() || exact->Samples() == 0 || it->second->Samples() == 0) continue;
    const double width = std::max<double>(double{exact->Max()} - exact->Min(), std::numeric_limits<float>::min());
    const double moved = std::max(std::abs(double{it->second->Min()} - exact->Min()),
                                  std::abs(double{it->second->Max()} - exact->Max())) /
                         width;
    sum += moved;
    ++change.points;
    if (moved <= change.max_range_change) continue;
    change.max_range_change = moved;
    change.max_point = name;
  }
  if (change.points > 0) change.mean_range_change = sum / static_cast<double>(change.points);
}

StageError StageRunner::Round(const Step& step, StepRounding& rounding) {
  std::vector<size_t> mine;
  for (size_t i = 0; i < c_.items.Size(); ++i)
    if (c_.IsMine(c_.items[i]) && c_.PassageOf(c_.items[i]).rounded) mine.push_back(i);
  const auto longest = std::ranges::max_element(mine, {}, [&](size_t i) { return c_.items[i].length; });
  const bool side_by_side = longest != mine.end() && SideBySide(step.build(c_.items[*longest]));
  std::vector<PositionErrors> alone(c_.items.Size()), accumulated(c_.items.Size());
  const Step::Sink& main = step.outputs.front();
  const bool compares = step.measured && !main.keys.empty();
  const WeightSource weights = c_.rounded;
  // body(i, executor) for the items at these places.
  const auto for_items = [&](const std::vector<size_t>& places, bool on_grid, const auto& build, const auto& body) {
    std::vector<StepRuns> workers(Threads());
    ForItems(static_cast<int64_t>(places.size()), side_by_side, [&](int64_t place, int w) {
      const Item& item = c_.items[places[place]];
      ReadyGraph& plan = workers[w].For(
          item, nullptr, c_.ComputeOf(item), [&] { return build(item); },
          [&] { return std::make_unique<FakeQuantReading>(c_.calibration, on_grid); });
      body(places[place], plan.executor);
      c_.advance();
    });
  };
  const auto compare = [&](const Item& item, const std::map<std::string, Tensor>& results, PositionErrors& errors) {
    const Tensor& found = results.at(main.output);
    std::vector<Tensor> expected;
    for (const std::string& key : main.keys) expected.push_back(c_.store.Get(item.id, Chain::kFloat, key));
    AddReal(item, main.by_layer ? Joined(expected) : expected[0], found, errors);
  };
  std::vector<size_t> lone;
  std::ranges::copy_if(mine, std::back_inserter(lone), [&](size_t i) { return c_.PassageOf(c_.items[i]).alone; });
  const auto whole = [&](const Item& item) { return Build(step, item); };
  for_items(lone, false, whole, [&](size_t i, Executor& executor) {
    if (compares)
      compare(c_.items[i], RunItem(c_, step, c_.items[i], Chain::kFloat, true, executor, weights), alone[i]);
  });
  // The rounded chain runs from grid to grid, unless layers round their input once more.
  const bool from_grids = !c_.calibration.GetDialect().requantizing_points;
  const auto take = [&](size_t i, const std::map<std::string, Tensor>& results) {
    const Item& item = c_.items[i];
    if (compares && c_.PassageOf(item).measured) compare(item, results, accumulated[i]);
    Keep(step, item, Chain::kQuant, results);
  };
  const auto waiting =
      std::ranges::stable_partition(mine, [&](size_t i) { return !from_grids || !rounding.Waits(c_.items[i]); });
  for_items(
      {waiting.begin(), waiting.end()}, true, [&](const Item& item) { return rounding.Rest(item); },
      [&](size_t i, Executor& executor) { take(i, rounding.Finish(c_.items[i], executor)); });
  rounding.Drop();
  mine.erase(waiting.begin(), waiting.end());
  for_items(mine, from_grids, whole, [&](size_t i, Executor& executor) {
    take(i, RunItem(c_, step, c_.items[i], Chain::kQuant, true, executor, weights));
  });
  StageError error{.stage = step.name};
  std::tie(error.alone, error.alone_by_position) = ShareErrors(alone, c_.items, c_.world);
  std::tie(error.accumulated, error.accumulated_by_position) = ShareErrors(accumulated, c_.items, c_.world);
  return error;
}

// Shows the step, as it has run, to the watcher.
void StageRunner::Watch(const Step& step) {
  const WeightSource of_checkpoint = CachedFloat(c_.calibration, c_.stored), of_rounded = c_.rounded;
  const auto weights = [&](bool rounded) { return rounded ? of_rounded : of_checkpoint; };
  std::map<std::string, std::vector<std::string>> reads, keeps;
  for (const Input& input : step.inputs)
    for (const Read& read : input.reads) reads[input.name].push_back(read.key);
  for (const Step::Sink& sink : step.outputs) keeps[sink.output] = sink.keys;
  for (const Item& item : c_.items) {
    if (!c_.IsMine(item) || !c_.PassageOf(item).measured) continue;
    const Graph graph = Build(step, item);
    c_.watcher->See({.name = step.name,
                     .graph = graph,
                     .calibration = c_.calibration,
                     .on_grid = !c_.calibration.GetDialect().requantizing_points,
                     .reads = reads,
                     .keeps = keeps,
                     .parameter =
                         [&](const std::string& name, bool rounded) {
                           const Tensor own =
                               step.own ? step.own(name, item, rounded ? &c_.rounded : nullptr) : Tensor();
                           return own.Empty() ? weights(rounded)(name) : own;
                         },
                     .run =
                         [&](Chain chain, PointReading& reading) {
                           const bool rounded = chain == Chain::kQuant;
                           Executor executor(graph, &reading, c_.ComputeOf(item));
                           RunItem(c_, step, item, chain, rounded, executor, weights(rounded));
                         }});
  }
}

void StageRunner::Run(const Stage& stage, std::vector<StageError>& errors) {
  std::deque<StepRounding> rounding;
  for (const Step& step : stage.steps) Observe(step, rounding.emplace_back(c_, step, Kept(step)));
  ShareObservers(c_.calibration, c_.world);
  // A variant may have points that others lack (the reference's fusion with pictures).
  for (const Step& step : stage.steps) {
    std::set<std::string> frozen;
    for (const Item& item : c_.items)
      if ((c_.PassageOf(item).observed || c_.items.Frozen()) && frozen.insert(item.variant).second)
        c_.calibration.Freeze(step.build(item), c_.stored);
  }
  c_.frozen();
  for (size_t i = 0; i < stage.steps.size(); ++i) {
    rounding[i].Run();
    errors.push_back(Round(stage.steps[i], rounding[i]));
    if (c_.watcher != nullptr) Watch(stage.steps[i]);
  }
}

}  // namespace circlet
