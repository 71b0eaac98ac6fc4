#pragma once

// What a host must know to run the units (docs/report.md, pipeline.json): which of them in which order, what it gives
// them besides codes of other units, and the files of the checkpoint that turn text and pictures into ids and pixels.

#include <filesystem>
#include <map>
#include <nlohmann/json_fwd.hpp>
#include <optional>
#include <string>
#include <vector>

#include "model/gemma4/vision_profile.h"
#include "pipeline/gemma4/context.h"
#include "pipeline/gemma4/text_tables.h"
#include "pipeline/phase.h"

namespace circlet::gemma4 {

inline constexpr char kTextTablesFile[] = "text_context.safetensors";
inline constexpr char kVisionTablesFile[] = "vision_context.safetensors";

// For pipeline.json. `written` are the units in the order of the file, `profile` the layout of the vision units.
nlohmann::json ContractOf(const Context& context, const std::vector<std::string>& written,
                          const std::optional<VisionProfile>& profile);

// "cos.TYPE" and "sin.TYPE" [1,length,h], float32, for the layers' units.
std::map<std::string, Tensor> RopeTablesOf(int64_t length, TextTables& tables);

// Adds the files of `model` that a package has, as they are.
void AddProcessorFiles(const std::filesystem::path& model, PhaseSpec& phase);

}  // namespace circlet::gemma4
