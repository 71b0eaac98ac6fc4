#include "pipeline/stage.h"

#include <algorithm>
#include <memory>
#include <set>
#include <tuple>

namespace circlet {

WeightSource CachedFloat(WeightSource stored) {
  return [stored = std::move(stored), cache = std::make_shared<std::map<std::string, Tensor>>()](const std::string& name) {
    Tensor& tensor = (*cache)[name];
    if (tensor.Empty()) tensor = ToF32(stored(name));
    return tensor;
  };
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
    return executor.Run(InputsOf(step, item, chain), [&](const std::string& name) {
      const Tensor own = step.own ? step.own(name, item, rounded) : Tensor();
      return own.Empty() ? weights(name) : own;
    });
  });
}

// The values of positions that are no padding: a prefix of axis 1 of a [1,S,..] tensor.
std::span<const float> RealPart(const Item& item, const Tensor& tensor) {
  const Shape& shape = tensor.GetShape();
  const std::span<const float> values = tensor.F32();
  if (shape.Rank() < 3 || shape[1] != item.length) return values;
  return values.first(values.size() / item.length * item.real);
}

bool Observed(const Item& item) { return item.kind == ItemKind::kCalibration; }
bool InFloat(const Item& item) { return item.kind != ItemKind::kVerify; }

}  // namespace

ItemKind MeasuredKind(const std::vector<Item>& items) {
  const bool has_evaluation =
      std::any_of(items.begin(), items.end(), [](const Item& item) { return item.kind == ItemKind::kEvaluation; });
  return has_evaluation ? ItemKind::kEvaluation : ItemKind::kCalibration;
}

// The executors of one step and one reading, by length.
class StageRunner::StepRuns {
 public:
  explicit StepRuns(const Step& step) : step_(step) {}

  struct Plan {
    Plan(Graph g, std::unique_ptr<PointReading> r) : reading(std::move(r)), graph(std::move(g)), executor(graph, reading.get()) {}
    std::unique_ptr<PointReading> reading;
    Graph graph;
    Executor executor;
  };
  template <typename MakeReading>
  Plan& For(const Item& item, bool observed, const MakeReading& make) {
    auto& plan = plans_[{item.length, item.variant, observed}];
    if (plan == nullptr) plan = std::make_unique<Plan>(step_.build(item), make());
    return *plan;
  }

 private:
  const Step& step_;
  std::map<std::tuple<int64_t, std::string, bool>, std::unique_ptr<Plan>> plans_;
};

int64_t StageRunner::Work(const Stage& stage) const {
  int64_t work = 0;
  const ItemKind measured = MeasuredKind(items_);
  for (const Item& item : items_) work += (InFloat(item) ? 1 : 0) + (item.kind == measured ? 1 : 0) + 1;
  return work * static_cast<int64_t>(stage.steps.size());
}

void StageRunner::Keep(const Step& step, const Item& item, Chain chain, const std::map<std::string, Tensor>& results) {
  for (const Step::Sink& sink : step.outputs) {
    const Tensor& tensor = results.at(sink.output);
    if (!sink.key.empty()) store_.Put(item.id, chain, sink.key, tensor);
    if (captured_ != nullptr && !sink.capture.empty() && item.kind == ItemKind::kEvaluation)
      (*captured_)[fmt::format("{}.{}.{}", chain == Chain::kFloat ? "float" : "quant", item.label, sink.capture)] = tensor;
  }
}

void StageRunner::Run(const Stage& stage, std::vector<StageError>& errors, const std::function<void()>& advance) {
  for (const Step& step : stage.steps) {
    StepRuns runs(step);
    const WeightSource weights = CachedFloat(step.stored);
    for (const Item& item : items_) {
      if (!InFloat(item)) continue;
      const bool observe = Observed(item) && !calibration_.Frozen();
      StepRuns::Plan& plan = runs.For(item, observe, [&]() -> std::unique_ptr<PointReading> {
        if (!observe) return nullptr;
        return std::make_unique<ObserveReading>(calibration_);
      });
      auto* reading = static_cast<ObserveReading*>(plan.reading.get());
      if (reading != nullptr) reading->Begin(item.index);
      Keep(step, item, Chain::kFloat, RunItem(step, item, Chain::kFloat, false, plan.executor, weights));
      if (reading != nullptr) reading->End();
      advance();
    }
  }
  // A variant may have points that others lack (the reference's fusion with pictures).
  for (const Step& step : stage.steps) {
    std::set<std::string> frozen;
    for (const Item& item : items_)
      if ((Observed(item) || calibration_.Frozen()) && frozen.insert(item.variant).second) calibration_.Freeze(step.build(item), step.stored);
  }
  for (const Step& step : stage.steps) {
    StepRuns runs(step);
    const ItemKind measured = MeasuredKind(items_);
    const WeightSource weights = calibration_.RoundedWeights(step.stored);
    StageError error{.stage = step.name};
    for (const Item& item : items_) {
      StepRuns::Plan& plan =
          runs.For(item, false, [&] { return std::make_unique<FakeQuantReading>(calibration_); });
      const Step::Sink& main = step.outputs.front();
      const auto compare = [&](const std::map<std::string, Tensor>& results, ErrorMetrics& metrics) {
        if (main.key.empty() || !step.measured) return;
        const Tensor expected = store_.Get(item.id, Chain::kFloat, main.key);
        metrics.Add(RealPart(item, expected), RealPart(item, results.at(main.output)));
      };
      if (item.kind == measured) {
        compare(RunItem(step, item, Chain::kFloat, true, plan.executor, weights), error.alone);
        advance();
      }
      const std::map<std::string, Tensor> results =
          RunItem(step, item, Chain::kQuant, true, plan.executor, weights);
      if (item.kind == measured) compare(results, error.accumulated);
      Keep(step, item, Chain::kQuant, results);
      advance();
    }
    errors.push_back(std::move(error));
  }
  calibration_.DropWeights();
}

}  // namespace circlet
