// A run is what its phases declare: what the store holds, how much is multiplied, and that weights are rounded once.

#include <gmock/gmock.h>

#include <cmath>
#include <nlohmann/json.hpp>
#include <set>

#include "circlet/io/json.h"
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
  EXPECT_THAT(whole, testing::UnorderedElementsAre("gemma4_model", "gemma4_model_full", "vision_encoder", "vision_model",
                                                   "vision_prefill"));
}

}  // namespace
}  // namespace circlet
