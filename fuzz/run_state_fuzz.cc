// A saved state with any fields, under a right hash, is an Error or something to go on from: never another exception,
// and values are read within their files.

#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <nlohmann/json.hpp>
#include <string>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/quant/recipe.h"
#include "pipeline/run_state.h"

namespace {

using namespace circlet;
namespace fs = std::filesystem;

struct Folder {
  Folder() { fs::create_directories(path / "rank.0/values"); }
  ~Folder() { fs::remove_all(path); }
  const fs::path path = fs::temp_directory_path() / fmt::format("circlet-run-state-fuzz-{}", getpid());
};

// The members that a fuzzer need not find.
std::string Signed(nlohmann::json state, const std::string& values) {
  state["done"] = 1;
  state["identity"] = nlohmann::json::object();
  state.erase("sha256");
  if (state.contains("values") && state["values"].is_object() && state["values"].contains("keys") &&
      state["values"]["keys"].is_object())
    for (auto& [key, described] : state["values"]["keys"].items())
      if (described.is_object() && described.contains("slots") && described["slots"].is_array())
        for (nlohmann::json& slot : described["slots"])
          if (slot.is_object() && slot.value("sha256", nlohmann::json()) == "right") slot["sha256"] = values;
  const std::string text = state.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  // The hash is taken of what a reader sees.
  nlohmann::json read = nlohmann::json::parse(text);
  const std::string again = read.dump();
  read["sha256"] = Sha256(std::as_bytes(std::span(again)));
  return read.dump();
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Folder folder;
  static const std::string bytes(64, 'v');
  // Of "float32[1,16]" over the first 64 bytes.
  static const std::string right = [] {
    const std::string text = "float32[1,16]" + bytes;
    return Sha256(std::as_bytes(std::span(text)));
  }();
  const nlohmann::json state = nlohmann::json::parse(data, data + size, nullptr, /*allow_exceptions=*/false);
  if (!state.is_object()) return 0;
  std::ofstream(folder.path / "rank.0/state.1.json") << Signed(state, right);
  std::ofstream(folder.path / "rank.0/values/0.values") << bytes;
  std::ofstream(folder.path / "unit.q.circle") << "unit";
  std::ofstream(folder.path / "rank.0/params.1.json") << R"({"order": []})";
  try {
    static const Recipe recipe = Recipe::Load("w8a16", {});
    Calibration calibration(recipe, DialectFromName("default"));
    ActivationStore store;
    store.UseFiles(folder.path / "rank.0/values", 0);
    UnitWriter units(folder.path, calibration, store);
    std::vector<StageError> errors;
    std::vector<RoundedLinear> linears;
    std::vector<SecondRounding> second_roundings;
    std::optional<HeadResult> head;
    std::optional<ComputeChange> change;
    std::map<std::string, double> seconds;
    RunParts parts{calibration, store, units, errors, linears, second_roundings, head, change, seconds};
    RunState run(folder.path / "rank.0", nlohmann::json::object(), 0, World());
    run.Load(
        parts, [](const std::string& point) { return PointSpec{.point = point}; }, /*phases=*/2);
    units.WriteCodes();
  } catch (const Error&) {
  }
  return 0;
}
