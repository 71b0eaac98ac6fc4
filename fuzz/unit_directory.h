#pragma once

// A result of quantize with one unit, y = x + x on int16 grids, for the readers behind `verify`.

#include "circlet/circle/export.h"
#include "circlet/io/safetensors.h"
#include "temporary.h"

inline constexpr char kManifest[] = R"({"dialect":"default","instruction_set":"X","outputs":[]})";
inline constexpr char kPipeline[] =
    R"({"units":[{"name":"unit","file":"unit.q.circle","inputs":[{"dtype":"int16","scale":0.5,"zero_point":0}],)"
    R"("outputs":[{"dtype":"int16","scale":1.0,"zero_point":0}]}],"boundaries":[]})";

inline void WriteUnit(const Temporary& directory) {
  using namespace circlet;
  circle::Model model;
  const auto tensor = [](const char* name, float scale) {
    return circle::Tensor{name, {DType::kI16, {1, 4}}, {}, QParams{DType::kI16, -1, {scale}, {0}}, {}};
  };
  model.tensors = {tensor("x", 0.5f), tensor("y", 1.0f)};
  model.inputs = {0};
  model.outputs = {1};
  model.operators = {{Add::kCircleCode, {}, {0, 0}, {1}}};
  circle::Write(model, directory.Path() / "unit.q.circle");
  const std::vector<int16_t> in{1, -2, 3, 4}, out{1, -2, 3, 4};
  WriteSafetensors(directory.Path() / "verify.safetensors",
                   {{"unit.in.0", Tensor::Of<int16_t>({1, 4}, in)}, {"unit.out.0", Tensor::Of<int16_t>({1, 4}, out)}});
}
