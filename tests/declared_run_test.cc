// A run is what its phases declare: what the store holds, how much is multiplied, and that weights are rounded once.

#include <gmock/gmock.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "circlet/circle/model.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "error_text.h"
#include "golden.h"
#include "pipeline/estimate.h"
#include "pipeline/gemma4/job.h"
#include "pipeline/run_state.h"
#include "temp_directory.h"

namespace circlet {
namespace {

class DeclaredRun : public testing::Test {
 protected:
  DeclaredRun() {
    options_.model = TestData("golden/tiny_e2b/model");
    options_.samples = directory_.Path() / "inputs.safetensors";
    options_.recipe = "w8a8";
    UnpackGolden("golden/tiny_e2b/inputs.safetensors.xz", options_.samples);
  }

  int64_t DeclaredBytes() const {
    const RunSettings settings(options_);
    gemma4::Gemma4Job job(settings);
    const std::vector<PhaseSpec> phases = job.Phases();
    return ScheduleOf(phases, settings, job.GetCalibration()).PeakBytes();
  }
  double DeclaredFlops() const {
    const RunSettings settings(options_);
    gemma4::Gemma4Job job(settings);
    double flops = 0;
    for (const PhaseSpec& phase : job.Phases())
      flops += (phase.output ? phase.output->Estimate() : EstimateStage(phase.stage, *phase.items, 0)).flops;
    return flops;
  }

  TempDirectory directory_;
  QuantizeOptions options_;
};

TEST_F(DeclaredRun, TheStoreHoldsWhatTheScheduleSays) {
  EXPECT_EQ(Quantize(options_).activation_bytes, DeclaredBytes());
  options_.dialect = "tico";
  EXPECT_EQ(Quantize(options_).activation_bytes, DeclaredBytes());
}

// Beside them stand the codes of the units' ends, which wait for verify.safetensors.
TEST_F(DeclaredRun, WithFilesTheStoreHoldsTheCodesOfTheUnitsBeside) {
  options_.output = directory_.Path() / "out";
  options_.max_seq_len = 64;
  const int64_t declared = DeclaredBytes(), held = Quantize(options_).activation_bytes;
  const auto codes = static_cast<int64_t>(std::filesystem::file_size(options_.output / "verify.safetensors"));
  EXPECT_GE(held, declared);
  EXPECT_LE(held, declared + codes);
}

TEST_F(DeclaredRun, TheProductsAreThoseOfTheEstimate) {
  options_.timings = true;
  const double estimated = DeclaredFlops();
  EXPECT_NEAR(Quantize(options_).products->flops / estimated, 1, 0.1);
}

// Nothing is observed then, so the head reads no calibration sample but to measure it.
TEST_F(DeclaredRun, FrozenGridsLeaveOutTheReadingThatObserves) {
  const double observing = DeclaredFlops();
  options_.output = directory_.Path() / "out";
  Quantize(options_);
  options_.qparams = options_.output / "qparams.json";
  options_.output.clear();
  const double frozen = DeclaredFlops();
  EXPECT_LT(frozen, observing);
  options_.timings = true;
  EXPECT_NEAR(Quantize(options_).products->flops / frozen, 1, 0.1);
}

// A run with moments is held against two forward runs and the moments as they are defined, whatever less it computes.
TEST_F(DeclaredRun, RoundingIsHeldAgainstForwardRunsAndWholeMoments) {
  options_.timings = true;
  EXPECT_EQ(Quantize(options_).products->plain_flops, 0);
  options_.recipe = "w4a16-gptq";
  const QuantizeResult corrected = Quantize(options_);
  double linears = 0, moments = 0;
  for (const RoundedLinear& linear : corrected.linears) {
    const auto n = static_cast<double>(linear.columns), positions = static_cast<double>(linear.positions);
    linears += 2 * static_cast<double>(linear.rows) * n * positions;
    // Those of the text read with another one what has its moment already; a picture's clip their inputs for
    // themselves.
    const std::string& name = linear.name;
    const bool shares =
        name.ends_with(".k_proj.weight") || name.ends_with(".v_proj.weight") || name.ends_with(".up_proj.weight");
    if (!shares) moments += 2 * n * n * positions;
  }
  const double both = corrected.products->plain_flops;
  EXPECT_GT(both, 2 * linears + 2 * moments);  // attention
  EXPECT_LT(both, 2.5 * linears + 2 * moments);
  EXPECT_GT(corrected.products->plain_seconds, 0);
  options_.set = {"pipeline.gptq.correct_inputs=false"};
  EXPECT_DOUBLE_EQ(both - Quantize(options_).products->plain_flops, moments);
}

// Parts of what an executor made are the store's own, of a single position too.
TEST_F(DeclaredRun, SamplesOfOnePositionKeepTheirValues) {
  options_.samples.clear();
  options_.random_samples = "3x1";
  for (const StageError& stage : Quantize(options_).stages) {
    EXPECT_TRUE(stage.accumulated.Finite()) << stage.stage;
    EXPECT_LT(stage.accumulated_by_position.median, 0.5) << stage.stage;
  }
}

TEST_F(DeclaredRun, TheCallerSeesEachStageAndMayEndTheRun) {
  std::vector<double> done;
  options_.on_progress = [&](const ProgressInfo& info) {
    EXPECT_EQ(info.number, static_cast<int>(done.size()) + 1);
    done.push_back(info.done);
    return true;
  };
  Quantize(options_);
  EXPECT_TRUE(std::ranges::is_sorted(done));
  EXPECT_DOUBLE_EQ(done.back(), 1);
  options_.output = directory_.Path() / "out";
  options_.on_progress = [](const ProgressInfo& info) { return info.number < 3; };
  EXPECT_THAT(ErrorText([&] { Quantize(options_); }), testing::HasSubstr(fmt::format("3 of {} stages", done.size())));
  EXPECT_FALSE(std::filesystem::exists(options_.output));
}

TEST_F(DeclaredRun, ARunIsKnownByAllItsInputsAndByNoNumberOfAPipe) {
  const RunSettings settings(options_);
  const auto identity = [&](const char* data, const char* first, const char* second) {
    QuantizeOptions options = options_;
    options.data = data;
    const nlohmann::json inputs{{{"file", "calib.jsonl"}, {"sha256", first}},
                                {{"file", "calib.jsonl"}, {"sha256", second}}};
    return IdentityOf(options, settings.recipe, 1, "", inputs);
  };
  EXPECT_NE(identity("calib.jsonl", "a", "b"), identity("calib.jsonl", "c", "b"));
  EXPECT_NE(identity("calib.jsonl", "a", "b"), identity("calib.jsonl", "a", "c"));
  EXPECT_EQ(identity("/dev/fd/63", "a", "b"), identity("/dev/fd/62", "a", "b"));
}

// Rows that are looked up, and the head's slices, are those of a file: its unit is written before they are read.
TEST_F(DeclaredRun, TablesAreWrittenBeforeTheirRowsAreRead) {
  options_.output = directory_.Path() / "out";
  options_.max_seq_len = 64;
  const RunSettings settings(options_);
  gemma4::Gemma4Job job(settings);
  std::vector<std::string> first;
  for (const PhaseSpec& phase : job.Phases()) {
    std::set<std::string> tables, written;
    const auto add = [](const Graph& graph, std::set<std::string>& names) {
      for (const Value& value : graph.Values())
        if (value.kind == ValueKind::kWeight) names.insert(value.name);
    };
    for (const Step& step : phase.stage.steps)
      if (step.fresh) add(step.build((*phase.items)[0]), tables);
    if (phase.output) tables.insert(kHeadWeight);
    for (const UnitSpec& unit : phase.units) {
      if (!unit.written_first) continue;
      first.push_back(unit.name);
      add(unit.build(), written);
    }
    EXPECT_TRUE(std::ranges::includes(written, tables)) << phase.name;
  }
  EXPECT_THAT(first, testing::ElementsAre("token_embedding", "ple_embedding", "lm_head"));
}

TEST_F(DeclaredRun, PipelineJsonTellsWholeGraphsFromTheirParts) {
  options_.output = directory_.Path() / "out";
  Quantize(options_);
  const nlohmann::json pipeline = ReadJson(options_.output / "pipeline.json");
  std::set<std::string> whole;
  for (const nlohmann::json& unit : pipeline.at("units")) {
    if (unit.at("kind") == "whole_graph") {
      whole.insert(unit.at("name"));
    } else {
      EXPECT_EQ(unit.at("kind"), "part");
    }
  }
  EXPECT_THAT(whole, testing::UnorderedElementsAre("gemma4_model", "gemma4_model_full", "vision_encoder",
                                                   "vision_model", "vision_prefill"));
}

TEST_F(DeclaredRun, PipelineJsonTellsHowUnitsAreRun) {
  options_.output = directory_.Path() / "out";
  Quantize(options_);
  const nlohmann::json pipeline = ReadJson(options_.output / "pipeline.json");
  EXPECT_EQ(pipeline.at("schema_version"), 2);
  std::map<std::string, nlohmann::json> units;
  for (const nlohmann::json& unit : pipeline.at("units")) units[unit.at("name")] = unit;
  // Each unit has its place in a phase, or stands for some that have.
  std::set<std::string> run;
  for (const nlohmann::json& phase : pipeline.at("phases"))
    for (const nlohmann::json& name : phase) run.insert(name);
  for (const auto& [name, unit] : units) EXPECT_NE(run.contains(name), unit.contains("replaces")) << name;
  for (const std::string& name : run) EXPECT_TRUE(units.contains(name)) << name;
  const std::vector<std::string> prefill = pipeline.at("phases").at("prefill");
  EXPECT_THAT(std::vector(prefill.begin(), prefill.begin() + 5),
              testing::ElementsAre("token_embedding", "ple_embedding", "multimodal_fusion_prefill",
                                   "ple_projection_prefill", "decoder_layer_prefill_0"));
  EXPECT_EQ(prefill.back(), "lm_head");
  EXPECT_THAT(pipeline.at("phases").at("decode").get<std::vector<std::string>>(),
              testing::IsSupersetOf({"token_embedding", "ple_projection_decode", "decoder_layer_decode_0", "lm_head"}));

  const int64_t context = pipeline.at("context");
  EXPECT_EQ(pipeline.at("cache").at("newest_slot"), context - 1);
  EXPECT_EQ(pipeline.at("mask").at("unseen"), -120);
  EXPECT_THAT(pipeline.at("picture").at("patch_grid").size(), 2u);
  const SafetensorsFile tables = SafetensorsFile::Open(options_.output / std::string(pipeline.at("tables")));
  for (const auto& [name, unit] : units) {
    // A host that goes by name finds each end in the file, also where the graph had one name twice.
    const circle::Model file = circle::Read(options_.output / std::string(unit.at("file")));
    for (const auto& [side, indices] : {std::pair{"inputs", &file.inputs}, {"outputs", &file.outputs}})
      for (size_t k = 0; k < indices->size(); ++k)
        EXPECT_EQ(unit.at(side)[k].at("tensor"), file.tensors[(*indices)[k]].name) << name;
    if (!name.starts_with("decoder_layer")) continue;
    const nlohmann::json& layer = unit.at("layer");
    const std::string type = layer.at("attention");
    EXPECT_EQ(layer.at("window").get<int>() == 0, type == "full_attention");
    EXPECT_TRUE(name.ends_with("_" + layer.at("index").dump()));
    // The layer that the keys come from is the one that the key of the end names.
    for (const nlohmann::json& end : unit.at("inputs")) {
      if (end.at("name") == "shared_key")
        EXPECT_EQ(end.at("key"), fmt::format("kv.{}.key", layer.at("kv_source").get<int>()));
      if (end.at("name") == "cos" && name.find("prefill") != name.npos)
        EXPECT_EQ(tables.Get("cos." + type).GetShape(), Shape(end.at("shape").get<std::vector<int64_t>>()));
    }
  }
}

}  // namespace
}  // namespace circlet
