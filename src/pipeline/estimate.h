#pragma once

// What a stage will need, from its graphs alone: for --dry-run, for the budget of the activations, and for the check of
// the disk before anything is computed.

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "circlet/quant/calibration.h"
#include "pipeline/phase.h"

namespace circlet {

// Products of one run of a graph: linears, and those of attention for the keys of all positions.
std::vector<MatrixProduct> ProductsOf(const Graph& graph);
double ProductFlops(const Graph& graph);

StageEstimate EstimateStage(const Stage& stage, const ItemSet& items, int rank);

// Of all that the units' graphs become: Circle files, their codes in verify.safetensors, their grids in qparams.json.
int64_t FilesBytes(std::span<const PhaseSpec> phases, const Calibration& calibration);

// Floating-point operations a second that products of this machine reach, measured in a fraction of a second.
double MeasuredFlops();

// Memory of this process that is its own: not pages of mapped files, which the system may take back.
int64_t OwnMemoryBytes();

}  // namespace circlet
