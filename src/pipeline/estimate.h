#pragma once

// What a run will need, from its graphs alone: for --dry-run, for the budget of the activations, and for the check of
// the disk before anything is computed.

#include <cstdint>
#include <string>
#include <vector>

#include "pipeline/stage.h"
#include "pipeline/gemma4/text_stages.h"

namespace circlet {

struct StageEstimate {
  std::string name;
  int64_t weight_bytes = 0;   // parameters in float32
  int64_t working_bytes = 0;  // values of the longest item that live at a time, its inputs and outputs with them
  double flops = 0;           // of the matrix products of all readings of all items

  // The weights of a stage live once, in float32 or rounded, with their codes beside them while its files are written.
  int64_t MemoryBytes() const { return weight_bytes * 3 / 2 + working_bytes; }
};

// Products of one run of a graph: linears, and those of attention for the keys of all positions.
double ProductFlops(const Graph& graph);

StageEstimate EstimateStage(const Stage& stage, const std::vector<Item>& items, int rank);
StageEstimate EstimateHead(const gemma4::RunContext& context);

// Activations that live at a time at most, of all items of this process.
int64_t ActivationBytes(const gemma4::RunContext& context);

// The Circle files, and verify.safetensors.
int64_t OutputBytes(const gemma4::RunContext& context, bool whole_model);

// Floating-point operations a second that products of this machine reach, measured in a fraction of a second.
double MeasuredFlops();

// Memory of this process that is its own: not pages of mapped files, which the system may take back.
int64_t OwnMemoryBytes();

}  // namespace circlet
