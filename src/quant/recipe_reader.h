#pragma once

#include <string>

#include "circlet/io/yaml.h"
#include "circlet/quant/recipe.h"

namespace circlet {

// Fills a recipe's members from the section `pipeline` of a file; `file` stands in front of errors.
void ReadPipeline(const JsonObject& root, const YamlNode& tree, const std::string& file, Recipe& recipe);

// A stage "gptq". Keys of the reference are mapped, what it leaves open has WeightRounding's defaults.
WeightRounding ReadGptqStage(const JsonObject& stage);

}  // namespace circlet
