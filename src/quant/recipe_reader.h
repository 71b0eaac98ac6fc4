#pragma once

#include <string>

#include "circlet/io/yaml.h"
#include "circlet/quant/recipe.h"

namespace circlet {

// Fills a recipe's members from its tree; `file` stands in front of errors.
void ReadRecipe(const YamlNode& tree, const std::string& file, Recipe& recipe);

}  // namespace circlet
