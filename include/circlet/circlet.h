#pragma once

// All that a program needs to quantize a checkpoint, verify the result, and read, run or make Circle files. What is
// declared here keeps its meaning between minor versions; headers that are not listed may change with any version.

#include "circlet/base/error.h"
#include "circlet/circle/export.h"
#include "circlet/circle/listing.h"
#include "circlet/circle/model.h"
#include "circlet/exec/executor.h"
#include "circlet/graph/builder.h"
#include "circlet/io/safetensors.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/pipeline/verify.h"
#include "circlet/quant/calibration.h"
#include "circlet/quant/recipe.h"
#include "circlet/report/metrics.h"
#include "circlet/runtime/generate.h"
#include "circlet/runtime/measure.h"
#include "circlet/runtime/prompts.h"
#include "circlet/runtime/sampler.h"
#include "circlet/runtime/session.h"
