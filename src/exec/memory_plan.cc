#include "exec/memory_plan.h"

#include <algorithm>
#include <limits>
#include <map>
#include <optional>

#include "ops/joins.h"

namespace circlet {
namespace {

constexpr int kAlways = std::numeric_limits<int>::max();
constexpr int64_t kAlignment = 64;

// Lowest free range first; the ranges in use are kept by offset.
class Arena {
 public:
  int64_t Take(int64_t bytes) {
    bytes = std::max(kAlignment, (bytes + kAlignment - 1) / kAlignment * kAlignment);
    int64_t offset = 0;
    for (const auto& [begin, end] : used_) {
      if (begin - offset >= bytes) break;
      offset = end;
    }
    used_[offset] = offset + bytes;
    size_ = std::max(size_, offset + bytes);
    return offset;
  }
  void Give(int64_t offset) { used_.erase(offset); }
  int64_t Size() const { return size_; }

 private:
  std::map<int64_t, int64_t> used_;
  int64_t size_ = 0;
};

std::vector<char> NeededNodes(const Graph& graph, const std::vector<PointUseOfNode>& points) {
  std::vector<char> value_needed(graph.Values().size(), 0);
  for (const Graph::Output& output : graph.Outputs()) value_needed[output.value] = 1;
  std::vector<char> needed(graph.Nodes().size(), 0);
  for (int i = static_cast<int>(graph.Nodes().size()) - 1; i >= 0; --i) {
    const Node& node = graph.Nodes()[i];
    const bool observed = points[i].visited && points[i].observes;
    needed[i] = observed || std::any_of(node.out.begin(), node.out.end(), [&](ValueId id) { return value_needed[id]; });
    if (needed[i])
      for (const ValueId id : node.in) value_needed[id] = 1;
  }
  return needed;
}

// Where a value stands within a concatenation that reads it last: there it is made, and need not be copied.
struct PlaceInWhole {
  ValueId whole = -1;
  int64_t offset = 0;
};

// By value, of concatenations whose parts follow each other in memory. `same`: who has the bytes of a value.
std::vector<PlaceInWhole> PlacesInWholes(const Graph& graph, const std::vector<char>& needed,
                                         const std::vector<ValueId>& same, const std::vector<int>& last_reader) {
  std::vector<PlaceInWhole> places(graph.Values().size());
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    const Node& node = graph.Nodes()[i];
    const Shape& whole = graph.TypeOf(node.out[0]).shape;
    const std::optional<int> axis = JoinedAxis(node.op, whole.Rank());
    if (!axis || !needed[i]) continue;
    const auto before = whole.Sizes().first(static_cast<size_t>(*axis));
    if (std::ranges::any_of(before, [](int64_t size) { return size != 1; })) continue;
    int64_t offset = 0;
    for (const ValueId in : node.in) {
      PlaceInWhole& place = places[same[in]];
      if (offset % kAlignment == 0 && last_reader[same[in]] == static_cast<int>(i) && place.whole < 0)
        place = {node.out[0], offset};
      offset += graph.TypeOf(in).Bytes();
    }
  }
  return places;
}

}  // namespace

MemoryPlan PlanMemory(const Graph& graph, const std::vector<PointUseOfNode>& points) {
  MemoryPlan plan;
  plan.homes.resize(graph.Values().size());
  plan.needed = NeededNodes(graph, points);

  // Values that share bytes whatever happens have one representative, and one last reader.
  std::vector<ValueId> same(graph.Values().size());
  for (size_t id = 0; id < same.size(); ++id) same[id] = static_cast<ValueId>(id);
  std::vector<int> last_reader(graph.Values().size(), -1);
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    if (!plan.needed[i]) continue;
    const Node& node = graph.Nodes()[i];
    const bool renames = node.op.IsView() || (node.op.IsPoint() && !points[i].writes);
    for (const ValueId id : node.in) last_reader[same[id]] = static_cast<int>(i);
    if (renames) same[node.out[0]] = same[node.in[0]];
    // A result that nobody reads still needs a place while it is written.
    for (const ValueId id : node.out) last_reader[same[id]] = std::max(last_reader[same[id]], static_cast<int>(i));
  }
  for (const Graph::Output& output : graph.Outputs()) last_reader[same[output.value]] = kAlways;

  Arena arena;
  std::vector<std::vector<int64_t>> dying(
      graph.Nodes().size());  // arena offsets, by the node after which they are free
  const auto live_until = [&](int64_t offset, int node) {
    if (node != kAlways) dying[node].push_back(offset);
  };
  const std::vector<PlaceInWhole> in_wholes = PlacesInWholes(graph, plan.needed, same, last_reader);
  const auto place = [&](const auto& self, ValueId id) -> int64_t {
    MemoryPlan::Home& home = plan.homes[id];
    if (home.place == MemoryPlan::Place::kArena) return home.offset;  // a whole, with the first of its parts
    const PlaceInWhole& part = in_wholes[id];
    const int64_t offset =
        part.whole >= 0 ? self(self, part.whole) + part.offset : arena.Take(graph.TypeOf(id).Bytes());
    if (part.whole < 0) live_until(offset, last_reader[id]);
    home = {MemoryPlan::Place::kArena, id, offset};
    return offset;
  };
  for (size_t id = 0; id < graph.Values().size(); ++id) {
    using Place = MemoryPlan::Place;
    const ValueKind kind = graph.Values()[id].kind;
    const Place place = kind == ValueKind::kInput      ? Place::kInput
                        : kind == ValueKind::kWeight   ? Place::kWeight
                        : kind == ValueKind::kConstant ? Place::kConstant
                                                       : Place::kNone;
    if (place != Place::kNone) plan.homes[id] = {place, static_cast<ValueId>(id), 0};
  }
  for (size_t i = 0; i < graph.Nodes().size(); ++i) {
    if (!plan.needed[i]) continue;
    const Node& node = graph.Nodes()[i];
    for (const ValueId id : node.out) {
      if (same[id] != id) {
        plan.homes[id] = plan.homes[same[id]];
        continue;
      }
      const bool may_overwrite = node.op.InPlace() || node.op.IsPoint();
      const ValueId first = node.in.empty() ? -1 : node.in[0];
      const bool overwrites = may_overwrite && plan.homes[first].place == MemoryPlan::Place::kArena &&
                              last_reader[same[first]] == static_cast<int>(i) &&
                              graph.TypeOf(first).Bytes() == graph.TypeOf(id).Bytes() &&
                              std::none_of(node.in.begin() + 1, node.in.end(), [&](ValueId other) {
                                return same[other] == same[first] && graph.TypeOf(other) != graph.TypeOf(id);
                              });
      if (overwrites) {
        plan.homes[id] = plan.homes[first];
        // The range passes to the new value: it does not die with the old one.
        auto& dead = dying[i];
        dead.erase(std::find(dead.begin(), dead.end(), plan.homes[id].offset));
        live_until(plan.homes[id].offset, last_reader[id]);
      } else {
        place(place, id);
      }
    }
    for (const int64_t offset : dying[i]) arena.Give(offset);
  }
  plan.arena_bytes = arena.Size();
  return plan;
}

}  // namespace circlet
