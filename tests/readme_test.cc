// The README's first screen: its commands are the demo's, and they print what it shows.

#include <gmock/gmock.h>

#include <algorithm>
#include <cctype>
#include <sstream>

#include "golden.h"
#include "ops/integer_product.h"
#include "paths.h"
#include "program.h"

namespace circlet {
namespace {

// What stands between the line `fence` and the next line "```", from `*from` on, which moves behind it.
std::string Block(const std::string& text, const std::string& fence, size_t* from) {
  const size_t begin = text.find("\n" + fence + "\n", *from);
  CIRCLET_CHECK(begin != text.npos, "no {}", fence);
  const size_t first = begin + fence.size() + 2;
  const size_t end = text.find("\n```\n", first - 1);
  CIRCLET_CHECK(end != text.npos, "no end of {}", fence);
  *from = end + 5;
  return text.substr(first, end + 1 - first);
}

std::string Replaced(std::string text, std::string_view what, const std::string& by) {
  for (size_t at = text.find(what); at != text.npos; at = text.find(what, at + by.size()))
    text.replace(at, what.size(), by);
  return text;
}

std::vector<std::string> Lines(const std::string& text) {
  std::vector<std::string> lines;
  std::istringstream stream(text);
  for (std::string line; std::getline(stream, line);) lines.push_back(line.substr(0, line.find_last_not_of(' ') + 1));
  return lines;
}

TEST(ReadmeTest, TheFirstScreenIsWhatTheDemoPrints) {
  const std::string source = kSourceDirectory;
  const std::string readme = ReadFile(source + "/README.md");
  size_t at = 0;
  const std::string commands = Block(readme, "```sh", &at);
  EXPECT_THAT(ReadFile(source + "/scripts/demo.sh"), testing::EndsWith("\n" + commands));

  const TempDirectory out;
  const std::string directory = out.Path() / "demo";
  const std::string here = Replaced(Replaced(commands, "build/circlet", kCircletBinary), "out/demo", directory);
  const ProgramResult result = RunProgram({"-euc", here}, "cd '" + source + "' && ", "/bin/bash");
  ASSERT_EQ(result.exit_code, 0) << result.err;

  // "..." stands for any lines. Last digits are those of one instruction set.
  const bool same_processor = InstructionSets() == "AVX3";
  const auto comparable = [&](std::string line) {
    if (!same_processor)
      std::ranges::replace_if(
          line, [](unsigned char c) { return std::isdigit(c) != 0; }, '0');
    return line;
  };
  std::vector<std::string> printed = Lines(Replaced(result.out, directory, "out/demo"));
  for (std::string& line : printed) line = comparable(line);
  auto next = printed.begin();
  bool gap = true;
  for (const std::string& line : Lines(Block(readme, "```", &at))) {
    if (line == "...") {
      gap = true;
      continue;
    }
    const auto found = std::find(next, printed.end(), comparable(line));
    ASSERT_TRUE(found != printed.end() && (gap || found == next)) << "README.md shows\n"
                                                                  << line << "\nwhere the demo prints\n"
                                                                  << (next == printed.end() ? "nothing" : *next);
    next = found + 1;
    gap = false;
  }
}

// In an empty directory with the samples that it shows, on the bundled checkpoint.
TEST(ReadmeTest, EveryFurtherCommandBlockRuns) {
  const TempDirectory work;
  const std::string readme = ReadFile(SourcePath("README.md"));
  size_t at = 0;
  WriteFile(work.Path() / "samples.jsonl", Block(readme, "```json", &at));
  std::filesystem::copy(SourcePath("examples/tiny-gemma4/eval/images"), work.Path() / "images");
  const auto picture = std::filesystem::directory_iterator(work.Path() / "images")->path();
  std::filesystem::copy(picture, work.Path() / "cat.png");
  at = 0;
  Block(readme, "```sh", &at);  // the demo's
  int blocks = 0;
  while (readme.find("\n```sh\n", at) != readme.npos) {
    std::string commands = Replaced(Block(readme, "```sh", &at), "build/circlet", kCircletBinary);
    commands = Replaced(Replaced(commands, "MODEL_DIR", "examples/tiny-gemma4"), "examples/", SourcePath("examples/"));
    commands = Replaced(commands, "heldout.txt", "heldout.txt --eval-windows 2");
    const ProgramResult result = RunProgram({"-euc", commands}, "cd '" + work.Path().string() + "' && ", "/bin/bash");
    EXPECT_EQ(result.exit_code, 0) << commands << result.err;
    ++blocks;
  }
  EXPECT_EQ(blocks, 2);
}

}  // namespace
}  // namespace circlet
