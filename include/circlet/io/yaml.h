#pragma once

#include <cstdint>
#include <filesystem>
#include <nlohmann/json_fwd.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace circlet {

struct YamlMember;

// A YAML document as a tree that keeps the order of keys and the line of everything.
struct YamlNode {
  enum class Kind { kNull, kBool, kInt, kFloat, kString, kList, kMap };
  Kind kind = Kind::kNull;
  bool boolean = false;             // kBool
  int64_t integer = 0;              // kInt
  double number = 0;                // kFloat
  std::string text;                 // kString
  std::vector<YamlNode> items;      // kList
  std::vector<YamlMember> members;  // kMap
  int line = 0;                     // from 1; 0 = set on the command line

  const YamlNode* Find(std::string_view key) const;  // the member of a map, or null
  YamlNode* Find(std::string_view key);
};

struct YamlMember {
  std::string key;
  YamlNode value;
};

// Reads one YAML document (JSON is YAML too). Plain scalars get their type by the core schema of YAML 1.2: null, ~ and
// nothing; true/false; decimal, 0x and 0o integers; floats with .inf and .nan; all else, and everything in quotes, is a
// string. Refused with "file:line: what": bad syntax, a key that stands twice in a mapping, keys that are not scalars,
// anchors and aliases, tags, nesting past 64, more than 100000 nodes, several documents.
YamlNode ParseYaml(std::string_view text, std::string_view file);
YamlNode ReadYaml(const std::filesystem::path& path);

// Block style, keys in the tree's order; ParseYaml reads the same tree back (but for the lines).
std::string DumpYaml(const YamlNode& tree);

// The tree as JSON values, for JsonObject and for comparisons; keys are sorted there.
nlohmann::json ToJson(const YamlNode& tree);

// `--set a.b.c=value` (quantization.md 15): the value is read as YAML. A numeric part indexes a list (one past the end
// appends), any other part of a list selects the only item whose `name` equals it; missing mappings are created.
// Anything else is an Error naming the assignment, the part and, for lists, the names there are.
void ApplyOverride(YamlNode& tree, std::string_view assignment);

}  // namespace circlet
