#include "pipeline/gemma4/stream.h"

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <set>

#include "circlet/model/gemma4/widening.h"
#include "circlet/report/terminal.h"
#include "pipeline/exchange.h"
#include "pipeline/gemma4/text_stages.h"
#include "pipeline/gemma4/vision_stages.h"
#include "pipeline/schedule.h"
#include "pipeline/stage.h"

namespace circlet::gemma4 {
namespace {

using Maxima = std::map<std::string, std::vector<float>>;

void Merge(std::span<const float> values, std::vector<float>& maxima) {
  for (size_t c = 0; c < maxima.size(); ++c) maxima[c] = std::max(maxima[c], values[c]);
}

// The largest |value| of each channel at the points of the stream.
class StreamReading final : public PointReading {
 public:
  // Adds what it has seen to `all` when it goes.
  StreamReading(Maxima& all, std::mutex& mutex) : all_(all), mutex_(mutex) {}
  ~StreamReading() override {
    const std::lock_guard lock(mutex_);
    for (const auto& [name, visitor] : visitors_) {
      std::vector<float>& maxima = all_[name];
      maxima.resize(visitor->maxima.size());
      Merge(visitor->maxima, maxima);
    }
  }
  PointVisitor* At(const Point& point, const TensorType& type) override {
    if (!LiesOnStream(point.name)) return nullptr;
    auto& visitor = visitors_[point.name];
    if (visitor == nullptr) visitor = std::make_unique<Visitor>(type.shape[-1]);
    return visitor.get();
  }
  bool Writes() const override { return false; }

 private:
  struct Visitor final : PointVisitor {
    explicit Visitor(int64_t width) : maxima(static_cast<size_t>(width)) {}
    // Whole rows, of several threads.
    void Visit(std::span<float> values, int64_t /*first*/) override {
      std::vector<float> own(maxima.size());
      for (size_t row = 0; row < values.size(); row += own.size())
        for (size_t c = 0; c < own.size(); ++c) own[c] = std::max(own[c], std::abs(values[row + c]));
      const std::lock_guard lock(mutex);
      Merge(own, maxima);
    }
    std::vector<float> maxima;
    std::mutex mutex;
  };

  Maxima& all_;
  std::mutex& mutex_;
  std::map<std::string, std::unique_ptr<Visitor>> visitors_;
};

// The same context with those samples alone.
Context Chosen(const Context& context) {
  Context chosen = context;
  chosen.texts = chosen.images = {};
  const int64_t count = std::ranges::count(context.texts, ItemKind::kCalibration, &Item::kind);
  const int64_t taken = std::min(count, kMeasured);
  std::set<int> pictures;
  int64_t i = 0;
  for (const Item& item : context.texts) {
    if (item.kind != ItemKind::kCalibration) continue;
    if (!IsSpread(i++, taken, count)) continue;
    chosen.texts.Add(item);
    for (const int picture : context.SequenceOf(item).pictures) pictures.insert(picture);
  }
  for (const Item& image : context.images)
    if (pictures.contains(image.id)) chosen.images.Add(image);
  return chosen;
}

// The stages up to the last sum of the last layer.
class StreamStages {
 public:
  explicit StreamStages(const Context& context)
      : context_(context), text_tables_(context_), text_stages_(context_, text_tables_) {
    if (!context_.images.Empty()) {
      picture_tables_.emplace(context_);
      vision_stages_.emplace(context_, *picture_tables_);
      std::map<int, Tensor> pixels;
      for (const Item& image : context_.images) pixels[image.id] = context_.PictureOf(image.id).pixel_values;
      for (Stage& stage : vision_stages_->All(std::move(pixels))) Add(std::move(stage), context_.images);
    }
    Add(text_stages_.Tables(), context_.texts);
    Add(text_stages_.Embeddings(), context_.texts);
    if (context_.config.text.HasPle()) Add(text_stages_.PerLayerInputs(), context_.texts);
    for (int i = 0; i < context_.config.text.NumLayers(); ++i) Add(text_stages_.Layer(i), context_.texts);
  }
  std::vector<PhaseSpec>& Phases() { return phases_; }
  WeightSource Stored() const {
    if (picture_tables_) return picture_tables_->Parameters();
    return [this](const std::string& name) { return context_.weights.Stored(name); };
  }

 private:
  void Add(Stage stage, const ItemSet& items) {
    phases_.push_back({.name = stage.name, .items = &items, .stage = std::move(stage)});
  }

  const Context& context_;
  TextTables text_tables_;
  TextStages text_stages_;
  std::optional<PictureTables> picture_tables_;
  std::optional<VisionStages> vision_stages_;
  std::vector<PhaseSpec> phases_;
};

// What all processes have seen.
void Share(Communicator& world, int64_t width, Maxima& maxima) {
  if (world.Size() == 1) return;
  std::string names;
  for (const auto& [name, values] : maxima) names += name + "\n";
  const std::vector<std::string> all_names = world.AllGather(names);
  std::vector<float> mine;
  for (const auto& [name, values] : maxima) mine.insert(mine.end(), values.begin(), values.end());
  const auto all = AllGather<float>(world, mine);
  for (size_t rank = 0; rank < all.size(); ++rank) {
    std::span<const float> rest = all[rank];
    for (size_t begin = 0; begin < all_names[rank].size();) {
      const size_t end = all_names[rank].find('\n', begin);
      std::vector<float>& values = maxima[all_names[rank].substr(begin, end - begin)];
      values.resize(static_cast<size_t>(width));
      Merge(rest.first(values.size()), values);
      rest = rest.subspan(values.size());
      begin = end + 1;
    }
  }
}

}  // namespace

std::vector<StreamPoint> MeasureStream(const Context& context, const RunSettings& settings,
                                       const Preparation& preparation) {
  const Context chosen = Chosen(context);
  StreamStages stages(chosen);
  std::vector<PhaseFlow> flows;
  for (const PhaseSpec& phase : stages.Phases()) flows.push_back(FlowOf(phase, settings.world.Rank(), false));
  const Schedule schedule(std::move(flows));
  ActivationStore store;
  store.UseFiles(preparation.directory, preparation.memory_bytes, ActivationStore::Files::kNameless);
  const WeightSource stored = stages.Stored();
  const RoundedWeights rounded(context.calibration, stored);
  Progress progress(preparation.progress);
  Maxima maxima;
  std::mutex mutex, progress_mutex;
  int64_t work = 0;
  for (const PhaseSpec& phase : stages.Phases())
    work += std::ssize(phase.stage.steps) * std::ranges::count(*phase.items, settings.world.Rank(), &Item::rank);
  progress.Begin("residual stream", work);
  for (int number = 0; number < static_cast<int>(stages.Phases().size()); ++number) {
    PhaseSpec& phase = stages.Phases()[static_cast<size_t>(number)];
    const StageContext stage{.calibration = context.calibration,
                             .store = store,
                             .items = *phase.items,
                             .stored = stored,
                             .rounded = rounded,
                             .captured = nullptr,
                             .world = settings.world,
                             .compute = settings.options.compute,
                             .change = nullptr,
                             .advance = [&] {
                               const std::lock_guard lock(progress_mutex);
                               progress.Advance();
                             }};
    Within(phase.name, [&] {
      StageRunner(stage).RunInFloat(phase.stage, [&] { return std::make_unique<StreamReading>(maxima, mutex); });
    });
    for (const Schedule::Drop& drop : schedule.After(number)) store.Drop(drop.key);
    phase = {.name = phase.name, .items = phase.items};
  }
  progress.End();
  Share(settings.world, context.config.text.hidden_size, maxima);
  std::vector<StreamPoint> points;
  for (auto& [name, values] : maxima) points.push_back({name, std::move(values)});
  return points;
}

}  // namespace circlet::gemma4
