#include "pipeline/stage.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <memory>
#include <mutex>
#include <nlohmann/json.hpp>
#include <set>
#include <tuple>

#include "circlet/base/threads.h"
#include "circlet/io/json.h"
#include "pipeline/exchange.h"

namespace circlet {

WeightSource CachedFloat(WeightSource stored) {
  return [stored = std::move(stored), cache = std::make_shared<std::map<std::string, Tensor>>()](const std::string& name) {
    Tensor& tensor = (*cache)[name];
    if (tensor.Empty()) tensor = ToF32(stored(name));
    return tensor;
  };
}

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

std::string CapturedName(Chain chain, const Item& item, const std::string& stage) {
  return fmt::format("{}.{}.{}", chain == Chain::kFloat ? "float" : "quant", item.label, stage);
}

Tensor Positions(const Tensor& tensor, int64_t begin, int64_t end, int axis) {
  Shape shape = tensor.GetShape();
  const int64_t bytes = tensor.Bytes() / shape[axis];
  shape[axis] = end - begin;
  return Tensor({tensor.GetDType(), shape}, tensor.Raw() + begin * bytes, std::make_shared<Tensor>(tensor));
}

Tensor ChainTables::For(Chain chain, const std::string& point, const Tensor& table) {
  if (chain == Chain::kFloat) return table;
  const std::lock_guard lock(mutex_);
  Tensor& rounded = rounded_[table.Raw()];
  if (rounded.Empty()) rounded = Rounded(calibration_, point, table);
  return rounded;
}

Tensor LayerSlice(const Tensor& tensor, int64_t layer) {
  const int64_t length = tensor.GetShape()[1], layers = tensor.GetShape()[2], width = tensor.GetShape()[3];
  Tensor slice = Tensor::Uninitialized({DType::kF32, {1, length, width}});
  for (int64_t s = 0; s < length; ++s)
    std::memcpy(slice.F32().data() + s * width, tensor.F32().data() + (s * layers + layer) * width,
                width * sizeof(float));
  return slice;
}

Tensor JoinLayers(const ActivationStore& store, const Item& item, Chain chain, const std::string& key, int64_t layers) {
  Tensor joined;
  for (int64_t layer = 0; layer < layers; ++layer) {
    const Tensor part = store.Get(item.id, chain, fmt::format("{}.{}", key, layer));
    const int64_t length = part.GetShape()[1], width = part.GetShape()[2];
    if (joined.Empty()) joined = Tensor::Uninitialized({DType::kF32, {1, length, layers, width}});
    for (int64_t s = 0; s < length; ++s)
      std::memcpy(joined.F32().data() + (s * layers + layer) * width, part.F32().data() + s * width,
                  width * sizeof(float));
  }
  return joined;
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

std::vector<ErrorMetrics> ShareMetrics(std::vector<ErrorMetrics> mine, const std::vector<Item>& items,
                                       Communicator& world) {
  const auto all = AllGather<ErrorMetrics>(world, mine);
  for (size_t i = 0; i < items.size(); ++i) mine[i] = all[items[i].rank][i];
  return mine;
}

namespace {

std::map<std::string, Tensor> InputsOf(const Step& step, const Item& item, Chain chain) {
  std::map<std::string, Tensor> inputs;
  for (const auto& [name, source] : step.inputs) inputs[name] = source(item, chain);
  return inputs;
}

std::map<std::string, Tensor> RunItem(const Step& step, const Item& item, Chain chain, bool rounded, Executor& executor,
                                      const WeightSource& weights) {
  if (step.fresh) executor.ForgetWeights();
  return Within(item.label, [&] {
    return executor.RunInPlace(InputsOf(step, item, chain), [&](const std::string& name) {
      const Tensor own = step.own ? step.own(name, item, rounded) : Tensor();
      return own.Empty() ? weights(name) : own;
    });
  });
}

// The errors at positions that are no padding, of [1,S,..] tensors; of tensors of another form all count.
void AddReal(const Item& item, const Tensor& expected, const Tensor& found, ErrorMetrics& metrics) {
  const Shape& shape = found.GetShape();
  if (shape.Rank() < 3 || shape[1] != item.length) return metrics.Add(expected, found);
  const int64_t width = found.Elements() / item.length;
  for (const auto& [begin, end] : item.real)
    metrics.Add(expected.F32().subspan(begin * width, (end - begin) * width),
                found.F32().subspan(begin * width, (end - begin) * width));
}

bool Observed(const Item& item) { return item.kind == ItemKind::kCalibration; }
bool InFloat(const Item& item) { return item.kind != ItemKind::kVerify; }
bool Rounded(const Item& item) { return item.kind != ItemKind::kControl; }

ErrorMetrics Total(const std::vector<ErrorMetrics>& of_items) {
  ErrorMetrics total;
  for (const ErrorMetrics& metrics : of_items) total.Merge(metrics);
  return total;
}

}  // namespace

const Item* Repeated(const std::vector<Item>& items) {
  for (const Item& control : items)
    if (control.kind == ItemKind::kControl)
      for (const Item& item : items)
        if (item.id == control.control_of) return &item;
  return nullptr;
}

ItemKind MeasuredKind(const std::vector<Item>& items) {
  const bool has_evaluation =
      std::any_of(items.begin(), items.end(), [](const Item& item) { return item.kind == ItemKind::kEvaluation; });
  return has_evaluation ? ItemKind::kEvaluation : ItemKind::kCalibration;
}

void ChooseAlone(std::vector<Item>& items) {
  const ItemKind measured = MeasuredKind(items);
  const int64_t count = std::ranges::count(items, measured, &Item::kind), chosen = std::min(count, kAloneItems);
  int64_t i = 0;
  for (Item& item : items)
    if (item.kind == measured) {
      item.alone = (i + 1) * chosen / count > i * chosen / count;
      ++i;
    }
}

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
    if (item.rank == c_.world.Rank()) work += InFloat(item) + Rounded(item) + item.alone;
  return work * static_cast<int64_t>(stage.steps.size());
}

// With the outputs that are kept of some item.
Graph StageRunner::Build(const Step& step, const Item& item) const {
  std::vector<std::string> kept;
  for (const Step::Sink& sink : step.outputs)
    if (Keeps(sink)) kept.push_back(sink.output);
  return WithOutputs(step.build(item), kept);
}

void StageRunner::Keep(const Step& step, const Item& item, Chain chain, const std::map<std::string, Tensor>& results) {
  static std::mutex mutex;
  for (const Step::Sink& sink : step.outputs) {
    if (!Keeps(sink)) continue;
    const Tensor& tensor = results.at(sink.output);
    if (sink.by_layer) {
      for (int64_t layer = 0; layer < tensor.GetShape()[2]; ++layer)
        c_.store.Put(item.id, chain, fmt::format("{}.{}", sink.key, layer), LayerSlice(tensor, layer),
                     ActivationStore::Read::kLate);
    } else if (!sink.key.empty()) {
      c_.store.Put(item.id, chain, sink.key, tensor.Clone());
    }
    if (!Captures(sink) || item.kind != ItemKind::kEvaluation) continue;
    const std::lock_guard lock(mutex);
    (*c_.captured)[CapturedName(chain, item, sink.capture)] = tensor.Clone();
  }
}

void StageRunner::Observe(const Step& step) {
  std::vector<const Item*> items;
  for (const Item& item : c_.items)
    if (InFloat(item) && item.rank == c_.world.Rank()) items.push_back(&item);
  if (items.empty()) return;
  const Graph graph = step.build(**std::ranges::max_element(items, {}, &Item::length));
  std::set<std::string> variants;
  bool ordered = false;
  for (const Item* item : items)
    if (variants.insert(item->variant).second) ordered |= OrderMatters(c_.calibration, step.build(*item));
  const bool side_by_side = SideBySide(graph) && !ordered;
  std::vector<StepRuns> workers(Threads());
  const WeightSource float_weights = Shared(CachedFloat(step.stored));
  const WeightSource stored = Shared(step.stored);  // linears take bf16 as it is
  const Item* const repeated = Repeated(c_.items);
  ObserverMap of_control, of_repeated;
  const auto observers_of = [&](const Item& item, int worker) -> ObserverMap* {
    if (c_.calibration.Frozen()) return nullptr;
    if (item.kind == ItemKind::kControl) return item.control_of == repeated->id ? &of_control : nullptr;
    if (!Observed(item)) return nullptr;
    return &item == repeated && !ordered ? &of_repeated : &workers[worker].observers;
  };
  ForItems(static_cast<int64_t>(items.size()), side_by_side, [&](int64_t i, int w) {
    const Item& item = *items[i];
    ObserverMap* const observers = observers_of(item, w);
    const auto reading_of = [&]() -> std::unique_ptr<PointReading> {
      if (observers == nullptr) return nullptr;
      return std::make_unique<ObserveReading>(c_.calibration, *observers);
    };
    ReadyGraph& plan =
        workers[w].For(item, observers, c_.ComputeOf(item), [&] { return Build(step, item); }, reading_of);
    auto* reading = static_cast<ObserveReading*>(plan.reading.get());
    if (reading != nullptr) reading->Begin(item.index);
    const bool bf16 = c_.ComputeOf(item).compute == Compute::kBf16;
    Keep(step, item, Chain::kFloat,
         RunItem(step, item, Chain::kFloat, false, plan.executor, bf16 ? stored : float_weights));
    if (reading != nullptr) reading->End();
    c_.advance();
  });
  if (c_.change != nullptr) CompareRanges(of_control, of_repeated);
  c_.calibration.Absorb(std::move(of_repeated));
  for (StepRuns& worker : workers) c_.calibration.Absorb(std::move(worker.observers));
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

StageError StageRunner::Round(const Step& step) {
  std::vector<size_t> mine;
  for (size_t i = 0; i < c_.items.size(); ++i)
    if (c_.items[i].rank == c_.world.Rank() && Rounded(c_.items[i])) mine.push_back(i);
  const auto longest = std::ranges::max_element(mine, {}, [&](size_t i) { return c_.items[i].length; });
  const bool side_by_side = longest != mine.end() && SideBySide(step.build(c_.items[*longest]));
  std::vector<ErrorMetrics> alone(c_.items.size()), accumulated(c_.items.size());
  const ItemKind measured = MeasuredKind(c_.items);
  const Step::Sink& main = step.outputs.front();
  const bool compares = step.measured && !main.key.empty();
  const WeightSource weights = Shared(c_.calibration.RoundedWeights(step.stored));
  // body(i, executor) for the items at these places.
  const auto for_items = [&](const std::vector<size_t>& places, bool on_grid, const auto& body) {
    std::vector<StepRuns> workers(Threads());
    ForItems(static_cast<int64_t>(places.size()), side_by_side, [&](int64_t place, int w) {
      const Item& item = c_.items[places[place]];
      ReadyGraph& plan = workers[w].For(
          item, nullptr, c_.ComputeOf(item), [&] { return Build(step, item); },
          [&] { return std::make_unique<FakeQuantReading>(c_.calibration, on_grid); });
      body(places[place], plan.executor);
      c_.advance();
    });
  };
  const auto compare = [&](const Item& item, const std::map<std::string, Tensor>& results, ErrorMetrics& metrics) {
    const Tensor& found = results.at(main.output);
    const Tensor expected = main.by_layer ? JoinLayers(c_.store, item, Chain::kFloat, main.key, found.GetShape()[2])
                                          : c_.store.Get(item.id, Chain::kFloat, main.key);
    AddReal(item, expected, found, metrics);
  };
  std::vector<size_t> lone;
  std::ranges::copy_if(mine, std::back_inserter(lone), [&](size_t i) { return c_.items[i].alone; });
  for_items(lone, false, [&](size_t i, Executor& executor) {
    if (compares)
      compare(c_.items[i], RunItem(step, c_.items[i], Chain::kFloat, true, executor, weights), alone[i]);
  });
  // The rounded chain runs from grid to grid; the reference's layers round their input once more.
  const bool from_grids = !c_.calibration.GetDialect().duplicate_points;
  for_items(mine, from_grids, [&](size_t i, Executor& executor) {
    const Item& item = c_.items[i];
    const std::map<std::string, Tensor> results = RunItem(step, item, Chain::kQuant, true, executor, weights);
    if (compares && item.kind == measured) compare(item, results, accumulated[i]);
    Keep(step, item, Chain::kQuant, results);
  });
  return {.stage = step.name,
          .alone = Total(ShareMetrics(std::move(alone), c_.items, c_.world)),
          .accumulated = Total(ShareMetrics(std::move(accumulated), c_.items, c_.world))};
}

void StageRunner::Run(const Stage& stage, std::vector<StageError>& errors) {
  for (const Step& step : stage.steps) Observe(step);
  ShareObservers(c_.calibration, c_.world);
  // A variant may have points that others lack (the reference's fusion with pictures).
  for (const Step& step : stage.steps) {
    std::set<std::string> frozen;
    for (const Item& item : c_.items)
      if ((Observed(item) || c_.calibration.Frozen()) && frozen.insert(item.variant).second)
        c_.calibration.Freeze(step.build(item), step.stored);
  }
  for (const Step& step : stage.steps) errors.push_back(Round(step));
  c_.calibration.DropWeights();
}

}  // namespace circlet
