// What docs/architecture.md says of the rooms holds in the sources.

#include <gmock/gmock.h>

#include <algorithm>
#include <filesystem>
#include <fstream>
#include <map>
#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "paths.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::IsEmpty;

const fs::path kSource = kSourceDirectory;

std::vector<std::string> Lines(const fs::path& file) {
  std::ifstream stream(file);
  std::vector<std::string> lines;
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

// The rooms in the document's order, the uppermost first: "cli", "pipeline/gemma4", ...
std::vector<std::string> Rooms() {
  std::vector<std::string> rooms;
  for (const std::string& line : Lines(kSource / "docs/architecture.md"))
    if (line.starts_with("| `src/") && line.find("/` |") != std::string::npos)
      rooms.push_back(line.substr(7, line.find("/` |") - 7));
  return rooms;
}

// The room that a path below src/ or include/circlet/ lies in: the longest that it begins with.
std::optional<size_t> RoomOf(const std::string& path, const std::vector<std::string>& rooms) {
  std::optional<size_t> found;
  for (size_t i = 0; i < rooms.size(); ++i)
    if (path.starts_with(rooms[i] + "/") && (!found || rooms[i].size() > rooms[*found].size())) found = i;
  return found;
}

// "src/ROOM/FILE includes PATH, which lies above it".
std::vector<std::string> Violations(const std::vector<std::string>& rooms) {
  std::vector<std::string> violations;
  for (const char* root : {"src", "include/circlet"})
    for (const auto& entry : fs::recursive_directory_iterator(kSource / root)) {
      const std::string name = entry.path().lexically_relative(kSource);
      const bool is_source = name.ends_with(".cc") || name.ends_with(".h");
      // A test of a room may use what stands on it; one header gathers those of all rooms.
      if (!is_source || name.ends_with("_test.cc") || name == "include/circlet/circlet.h") continue;
      const auto from = RoomOf(entry.path().lexically_relative(kSource / root), rooms);
      if (!from) {
        violations.push_back(name + " lies in no room");
        continue;
      }
      for (const std::string& line : Lines(entry.path())) {
        if (!line.starts_with("#include \"")) continue;
        std::string path = line.substr(10, line.find('"', 10) - 10);
        if (path.starts_with("circlet/")) path = path.substr(8);
        const auto to = RoomOf(path, rooms);
        // Of no room: a library's header, or one of tests/ in a header for tests.
        if (to && *to < *from) violations.push_back(name + " includes " + path + ", which lies above it");
      }
    }
  return violations;
}

// What an operator is like stands in its struct (op.h); who runs or drives graphs asks for that and not for its name.
TEST(ArchitectureTest, TheExecutorAndTheDriverNameNoOperator) {
  size_t files = 0;
  for (const char* room : {"src/exec", "src/pipeline"})
    for (const auto& entry : fs::directory_iterator(kSource / room)) {
      const std::string name = entry.path().filename();
      if (!entry.is_regular_file() || name.ends_with("_test.cc")) continue;
      ++files;
      for (const std::string& line : Lines(entry.path())) EXPECT_EQ(line.find("op.kind"), line.npos) << name << ": " << line;
    }
  EXPECT_GT(files, 20u);
}

TEST(ArchitectureTest, EveryFolderOfSourcesIsARoomOfTheDocument) {
  const std::vector<std::string> rooms = Rooms();
  ASSERT_GE(rooms.size(), 13u);
  for (const auto& entry : fs::directory_iterator(kSource / "src")) {
    const std::string name = entry.path().filename();
    EXPECT_TRUE(std::ranges::any_of(rooms, [&](const std::string& room) {
      return room == name || room.starts_with(name + "/");
    })) << name;
  }
}

TEST(ArchitectureTest, IncludesGoDownTheListOfRooms) {
  EXPECT_THAT(Violations(Rooms()), IsEmpty());
  // The list decides: upside down nearly every include is against it.
  std::vector<std::string> reversed = Rooms();
  std::ranges::reverse(reversed);
  EXPECT_GT(Violations(reversed).size(), 100u);
}

TEST(ArchitectureTest, TheDriverKnowsNoModel) {
  int files = 0;
  for (const auto& entry : fs::directory_iterator(kSource / "src/pipeline")) {
    if (!entry.is_regular_file()) continue;
    ++files;
    for (const std::string& line : Lines(entry.path())) {
      if (!line.starts_with("#include")) continue;
      EXPECT_EQ(line.find("gemma4"), std::string::npos) << entry.path() << ": " << line;
      EXPECT_EQ(line.find("model/"), std::string::npos) << entry.path() << ": " << line;
    }
  }
  EXPECT_GE(files, 20);
}

// Kinds of weights are said where a weight is born, settings of the program are read in settings/.
TEST(ArchitectureTest, TheQuantizerNamesNoModel) {
  int files = 0;
  for (const char* room : {"src/quant", "include/circlet/quant"})
    for (const auto& entry : fs::recursive_directory_iterator(kSource / room)) {
      const std::string name = entry.path().filename();
      // The texts of the built-in recipe files name the family that they are for.
      if (!entry.is_regular_file() || name.find("_test.") != name.npos || name == "builtin_recipes.cc") continue;
      ++files;
      for (const std::string& line : Lines(entry.path())) {
        std::string code = line.substr(0, line.find("//"));
        std::ranges::transform(code, code.begin(), [](unsigned char c) { return std::tolower(c); });
        for (const char* word : {"gemma", "vision_tower", "_proj", "embed_tokens", "position_embedding", "layernorm"})
          EXPECT_EQ(code.find(word), std::string::npos) << entry.path() << ": " << line;
      }
    }
  EXPECT_GE(files, 20);
}

}  // namespace
}  // namespace circlet
