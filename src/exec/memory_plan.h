#pragma once

#include <cstdint>
#include <vector>

#include "circlet/graph/graph.h"

namespace circlet {

// Where the values of a graph live during a run.
struct MemoryPlan {
  enum class Place : uint8_t { kNone, kInput, kWeight, kConstant, kArena };
  struct Home {
    Place place = Place::kNone;
    ValueId root = -1;   // kInput, kWeight, kConstant: the value whose bytes these are
    int64_t offset = 0;  // kArena
  };
  std::vector<Home> homes;         // by value
  std::vector<char> needed;        // by node: some output or observed point depends on it
  int64_t arena_bytes = 0;
};

// What the nodes' points ask of the plan.
struct PointUseOfNode {
  bool visited = false;  // a visitor looks at or changes the values
  bool writes = false;
  bool observes = false;
};

// Values that only rename others (views, points that do not write) share a home; an operator that may overwrite its
// first input does so when nothing reads that input later; what a concatenation reads last is made in its place there,
// when the parts follow each other in memory; every other value gets the lowest free range of one arena.
MemoryPlan PlanMemory(const Graph& graph, const std::vector<PointUseOfNode>& points);

}  // namespace circlet
