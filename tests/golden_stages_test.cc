// Stages and grids of the golden models' text samples against the reference's records. Tolerances are those of
// tests/data/golden/README.md; they come from the reference's own differences under other summation orders.

#include <gmock/gmock.h>

#include "circlet/model/gemma4/tables.h"
#include "circlet/quant/params.h"
#include "golden_run.h"

namespace circlet {
namespace {

constexpr GoldenCase kRecorded[] = {{"seed_example", "default"}, {"seed_example", "w4a16"}, {"seed_example", "w8a8"},
                                    {"seed_example", "mixed8"},  {"tiny_e2b", "default"},   {"tiny_e2b", "w4a16"},
                                    {"tiny_e2b", "w8a8"},        {"tiny_wide", "default"},  {"tiny_wide", "w4a16"}};

// ---- Float ----------------------------------------------------------------------------------------------------------

// The reference masks with the lowest float32; which keys are masked is what counts.
int WronglyMasked(const Tensor& found, const Tensor& expected) {
  EXPECT_EQ(found.GetShape(), expected.GetShape());
  int wrong = 0;
  for (size_t i = 0; i < expected.F32().size(); ++i)
    wrong += found.F32()[i] != (expected.F32()[i] < 0 ? kMaskFill : 0.0f);
  return wrong;
}

// Exported units take sine tables whose first half is negated; the reference's float model does not.
Tensor WithFirstHalfNegated(const Tensor& table) {
  Tensor negated = table.Clone();
  const int64_t width = table.GetShape()[-1];
  for (int64_t i = 0; i < table.Elements(); ++i)
    if (i % width < width / 2) negated.F32()[i] *= -1;
  return negated;
}

class GoldenFloatTest : public testing::TestWithParam<GoldenCase> {};
INSTANTIATE_TEST_SUITE_P(All, GoldenFloatTest,
                         testing::Values(GoldenCase{"seed_example", "default"}, GoldenCase{"tiny_e2b", "default"},
                                         GoldenCase{"tiny_wide", "default"}),
                         CaseName);

TEST_P(GoldenFloatTest, EveryStageIsThatOfTheReference) {
  const SafetensorsFile found = GoldenRun::OnRecordedGrids(GetParam()).Stages();
  const SafetensorsFile golden = OpenGolden(GetParam().Path("float.safetensors.xz"));
  int compared = 0;
  for (const auto& [name, expected] : golden.Tensors()) {
    if (!name.starts_with("eval.0.")) continue;
    SCOPED_TRACE(name);
    const Tensor& tensor = found.Get("float." + name);
    if (name.find("attn_mask") != name.npos) {
      EXPECT_EQ(WronglyMasked(tensor, expected), 0);
    } else {
      const bool sine = name.find("rope_sin") != name.npos;
      EXPECT_LE(Compare(tensor, sine ? WithFirstHalfNegated(expected) : expected).Relative(), 3e-5);
    }
    ++compared;
  }
  EXPECT_GE(compared, 10);
}

// ---- Fake-quantized on the reference's grids ------------------------------------------------------------------------

class GoldenStagesTest : public testing::TestWithParam<GoldenCase> {
 protected:
  bool EightBits() const {
    return GetParam().recipe == std::string("w8a8") || GetParam().recipe == std::string("mixed8");
  }
};
INSTANTIATE_TEST_SUITE_P(All, GoldenStagesTest, testing::ValuesIn(kRecorded), CaseName);

// Embeddings involve no sum, so nothing may differ. A sum that falls on a tie of its grid moves one step, and what
// follows amplifies that; at 8 bits no tie falls otherwise on these samples.
TEST_P(GoldenStagesTest, QuantizedStagesAreThoseOfTheReference) {
  const SafetensorsFile found = GoldenRun::OnRecordedGrids(GetParam()).Stages();
  const SafetensorsFile golden = OpenGolden(GetParam().Path("quant.safetensors.xz"));
  const std::string prefix = fmt::format("{}.eval.0.", GetParam().recipe);
  int compared = 0;
  for (const auto& [name, expected] : golden.Tensors()) {
    if (!name.starts_with(prefix)) continue;
    const std::string stage = name.substr(prefix.size());
    SCOPED_TRACE(stage);
    const Difference difference = Compare(found.Get("quant.eval.0." + stage), expected);
    const bool exact =
        EightBits() || stage == "embed.tokens" || stage == "ple.token_inputs" || stage == "inputs_embeds";
    EXPECT_LE(difference.Relative(), exact ? 0 : 3e-2);
    RecordProperty(stage, fmt::to_string(difference.Relative()));
    ++compared;
  }
  EXPECT_GE(compared, 2);
}

TEST_P(GoldenStagesTest, TheErrorOfTheLogitsIsThatOfTheReference) {
  const QuantizeResult& result = GoldenRun::OnRecordedGrids(GetParam()).Result();
  const nlohmann::json figures =
      ReadJson(TestData(GetParam().Path("metrics.json"))).at("recipes").at(GetParam().recipe).at("eval.0").at("logits");
  const double tolerance = EightBits() ? 1e-4 : 0.2;
  const double peir = figures.at("peir"), mean = figures.at("mean_abs_diff"), largest = figures.at("max_abs_diff");
  EXPECT_NEAR(result.output.Peir() / peir, 1, tolerance);
  EXPECT_NEAR(result.output.MeanAbs() / mean, 1, tolerance);
  EXPECT_NEAR(result.output.MaxAbs() / largest, 1, tolerance);
}

// ---- Own calibration ------------------------------------------------------------------------------------------------

class GoldenCalibrationTest : public testing::TestWithParam<GoldenCase> {};
INSTANTIATE_TEST_SUITE_P(All, GoldenCalibrationTest,
                         testing::Values(GoldenCase{"seed_example", "default"}, GoldenCase{"seed_example", "w4a16"},
                                         GoldenCase{"seed_example", "w8a8"}, GoldenCase{"tiny_e2b", "default"},
                                         GoldenCase{"tiny_e2b", "w4a16"}, GoldenCase{"tiny_e2b", "w8a8"},
                                         GoldenCase{"tiny_wide", "default"}, GoldenCase{"tiny_wide", "w4a16"},
                                         GoldenCase{"tiny_wide", "w8a8"}),
                         CaseName);

// Sums and constants that the reference leaves in float32 and that lie on grids here, so that a file has no hole: the
// PLE sum, and the constants of the PLE projection and of the soft cap.
constexpr std::string_view kOurs[] = {"model.language_model.per_layer_input_scale", "logit_softcapping_div_scale"};

// Points that only pictures reach were recorded as never observed; every other one must be there.
TEST_P(GoldenCalibrationTest, TextSamplesGiveTheReferencesGrids) {
  const ParameterStore golden =
      ParseParameters(GoldenText(GetParam().Path(fmt::format("{}.text.qparams.json.xz", GetParam().recipe))), "golden");
  const GoldenRun run(GetParam());
  const ParameterStore found = ParameterStore::Load(run.Output() / "qparams.json");
  int weights = 0, activations = 0;
  for (const std::string& name : found.Names()) {
    SCOPED_TRACE(name);
    const PointParams* expected = golden.Find(name);
    if (expected == nullptr) {
      // Only our files have these: where the reference's leave a value in float (quantization.md B4), and the soft
      // cap's factors.
      EXPECT_THAT(name, testing::AnyOf(testing::EndsWith("_scale"), testing::EndsWith("per_layer_sum")));
      continue;
    }
    const PointParams& params = *found.Find(name);
    EXPECT_EQ(params.spec, expected->spec);
    if (name.ends_with(".weight") || name.ends_with("embed_scale")) {
      EXPECT_EQ(params.qparams, expected->qparams);
      ++weights;
      continue;
    }
    ASSERT_EQ(params.qparams.scale.size(), 1u);
    ASSERT_EQ(expected->qparams.scale.size(), 1u);
    EXPECT_NEAR(params.qparams.scale[0] / expected->qparams.scale[0], 1, 2e-5);
    EXPECT_NEAR(params.qparams.zero_point[0], expected->qparams.zero_point[0], 1);
    ++activations;
  }
  for (const std::string& name : golden.Names()) {
    const bool text = name.starts_with("model.language_model") || name.starts_with("lm_head");
    if (!text || !golden.Find(name)->Observed()) continue;
    EXPECT_NE(found.Find(name), nullptr) << name;
  }
  EXPECT_GT(weights, 10);
  EXPECT_GT(activations, 50);
}

}  // namespace
}  // namespace circlet
