#pragma once

#include <string>

#include "circlet/io/yaml.h"
#include "circlet/quant/recipe.h"

namespace circlet {

// Fills a recipe's members from the section `pipeline` of a file; `file` stands in front of errors.
void ReadPipeline(const JsonObject& root, const YamlNode& tree, const std::string& file, Recipe& recipe);

}  // namespace circlet
