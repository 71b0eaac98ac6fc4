// The vision side against the reference's recordings (tests/data/golden/README.md), and our own dialect against the
// files that it is exported to.

#include "circlet/model/gemma4/vision.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <nlohmann/json.hpp>
#include <regex>
#include <sstream>

#include "circlet/circle/export.h"
#include "circlet/model/gemma4/text.h"
#include "circlet/quant/calibration.h"
#include "error_text.h"
#include "golden.h"
#include "model/gemma4/vision_profile.h"
#include "ops/codes.h"
#include "vision_golden.h"

namespace circlet {
namespace {

using ::testing::HasSubstr;

constexpr const char* kModels[] = {"tiny_e2b", "tiny_wide", "seed_example"};

std::vector<std::string> RecipesOf(const std::string& model) {
  if (model == "tiny_wide") return {"default", "w4a16"};
  if (model == "seed_example") return {"default", "w4a16", "w8a8", "mixed8"};
  return {"default", "w4a16", "w8a8"};
}

// Rows of real patches differ from the reference's in nothing; what padding patches hold is never read.
Tensor RealRows(const Picture& picture, const Tensor& tensor) {
  const Shape& shape = tensor.GetShape();
  const int64_t patches = static_cast<int64_t>(picture.positions.size()) / 2;
  if (shape.Rank() != 3 || shape[1] != patches) return tensor;
  int64_t valid = 0;
  while (valid < patches && picture.positions[2 * valid] >= 0) ++valid;
  return Tensor::Of<float>({1, valid, shape[2]}, tensor.F32().first(valid * shape[2]));
}

double MaxAbs(const Tensor& tensor) {
  double top = 0;
  for (const float value : tensor.F32()) top = std::max(top, std::abs(static_cast<double>(value)));
  return top;
}

double MaxDifference(const Tensor& a, const Tensor& b) {
  EXPECT_EQ(a.GetShape().ToString(), b.GetShape().ToString());
  double top = 0;
  for (size_t i = 0; i < a.F32().size() && i < b.F32().size(); ++i)
    top = std::max(top, std::abs(static_cast<double>(a.F32()[i]) - b.F32()[i]));
  return top;
}

TEST(VisionTest, FloatStagesAreThoseOfTheModel) {
  for (const std::string model_name : kModels) {
    const GoldenModel model(model_name);
    const SafetensorsFile expected = OpenGolden(fmt::format("golden/{}/float.safetensors.xz", model_name));
    const Picture picture = model.Pictures("eval.1").at(0);
    for (const Dialect& dialect : {kTico, kDefault}) {
      const Stages stages = RunVision(model, picture, dialect, nullptr, nullptr);
      int compared = 0;
      for (const auto& [name, tensor] : stages) {
        const Tensor* reference = expected.Find("eval.1." + name);
        if (reference == nullptr || name.starts_with("vision.rope") || name == "vision.attn_mask") continue;
        const Tensor real = RealRows(picture, *reference);
        EXPECT_LE(MaxDifference(real, RealRows(picture, tensor)), 3e-5 * MaxAbs(real))
            << model_name << " " << dialect.name << " " << name;
        ++compared;
      }
      EXPECT_EQ(compared, 4 + model.config.vision->num_layers) << model_name;
    }
  }
}

// Share of elements that differ by more than half a step, and the largest difference in steps.
struct Flips {
  double share = 0, steps = 0;
};
Flips FlipsOf(const Tensor& expected, const Tensor& found, float scale) {
  Flips flips;
  for (size_t i = 0; i < expected.F32().size(); ++i) {
    const double steps = std::abs(static_cast<double>(expected.F32()[i]) - found.F32()[i]) / scale;
    flips.steps = std::max(flips.steps, steps);
    if (steps > 0.5) flips.share += 1.0 / static_cast<double>(expected.F32().size());
  }
  return flips;
}

// Each step gets the reference's input, so that differences do not add up.
TEST(VisionTest, QuantizedStagesAreThoseOfTheReferenceWithItsGrids) {
  for (const std::string model_name : kModels) {
    const GoldenModel model(model_name);
    const SafetensorsFile expected = OpenGolden(fmt::format("golden/{}/quant.safetensors.xz", model_name));
    const Picture picture = model.Pictures("eval.1").at(0);
    for (const std::string& recipe : RecipesOf(model_name)) {
      if (recipe == "mixed8") continue;  // only vision.projected is recorded
      Calibration grids(Recipe::Load(recipe), kTico);
      grids.UseFrozen(GoldenGrids(model_name, recipe));
      FakeQuantReading reading(grids);
      const auto given = [&](const std::string& stage) { return expected.Find(recipe + ".eval.1." + stage); };
      const Stages stages = RunVision(model, picture, kTico, &reading, &grids, given);
      int compared = 0;
      for (const auto& [name, tensor] : stages) {
        const Tensor* reference = given(name);
        if (reference == nullptr || name.starts_with("vision.rope") || name == "vision.attn_mask") continue;
        const QParams* grid = grids.GridOf(PointOfStage(name, *model.config.vision));
        const Flips flips = FlipsOf(RealRows(picture, *reference), RealRows(picture, tensor), grid->scale[0]);
        EXPECT_LE(flips.share, 0.10) << model_name << " " << recipe << " " << name;
        EXPECT_LE(flips.steps, 27) << model_name << " " << recipe << " " << name;
        if (std::getenv("VERBOSE"))
          fmt::print("{} {} {}: {:.4f} of elements, {:.1f} steps\n", model_name, recipe, name, flips.share,
                     flips.steps);
        ++compared;
      }
      EXPECT_GE(compared, 4 + model.config.vision->num_layers) << model_name << " " << recipe;
    }
  }
}

TEST(VisionTest, CalibrationOnTheSamePicturesGivesTheReferencesGrids) {
  for (const std::string model_name : kModels) {
    const GoldenModel model(model_name);
    for (const std::string& recipe : RecipesOf(model_name)) {
      Calibration calibration(Recipe::Load(recipe), kTico);
      CalibrateVision(model, calibration);
      const ParameterStore expected = GoldenGrids(model_name, recipe);
      int compared = 0;
      for (const std::string& name : expected.Names()) {
        if (!name.starts_with("model.vision_tower") && !name.starts_with("model.embed_vision")) continue;
        const PointParams* found = calibration.Params().Find(name);
        ASSERT_NE(found, nullptr) << model_name << " " << recipe << " " << name;
        const PointParams& reference = *expected.Find(name);
        EXPECT_EQ(found->spec, reference.spec) << name;
        ASSERT_EQ(found->qparams.scale.size(), reference.qparams.scale.size()) << name;
        for (size_t c = 0; c < reference.qparams.scale.size(); ++c) {
          EXPECT_NEAR(found->qparams.scale[c] / reference.qparams.scale[c], 1, 2e-5)
              << model_name << recipe << " " << name;
          EXPECT_NEAR(found->qparams.zero_point[c], reference.qparams.zero_point[c], 1) << name;
        }
        ++compared;
      }
      EXPECT_GT(compared, 70) << model_name << " " << recipe;
      EXPECT_EQ(VisionPoints(model.config, kTico).size(), static_cast<size_t>(compared));
    }
  }
}

TEST(VisionTest, ListedPointsAreThoseThatCalibrationMeets) {
  for (const std::string model_name : kModels) {
    const GoldenModel model(model_name);
    for (const Dialect& dialect : {kTico, kDefault}) {
      Calibration calibration(Recipe::Load("default"), dialect);
      CalibrateVision(model, calibration);
      std::vector<std::string> listed;
      for (const Point& point : VisionPoints(model.config, dialect)) listed.push_back(point.name);
      EXPECT_THAT(listed, testing::UnorderedElementsAreArray(calibration.Params().Names())) << model_name;
    }
  }
}

// No picture of seed_example has padding: the reference's grid holds nothing but 0 (scale 1e-8).
TEST(VisionTest, MaskGridHoldsBothValuesAlsoWithoutPaddedPictures) {
  const GoldenModel model("seed_example");
  Calibration calibration(Recipe::Load("default"), kDefault);
  CalibrateVision(model, calibration);
  EXPECT_GE(calibration.GridOf(VisionMaskPoint())->scale[0] * 32767, 120.0f * 0.9999f);
}

// ---- Files ----------------------------------------------------------------------------------------------------------

struct Unit {
  Graph graph;
  WeightSource weights;  // float, as CalibratedGrids takes them
  Calibration& grids;

  circle::Model Exported() const { return circle::ToCircle(graph, CalibratedGrids(grids, weights)); }
};

// The graph of an exported unit.
Graph UnitGraph(const std::string& unit, const Gemma4Config& config, const Picture& picture, const Dialect& dialect) {
  const VisionConfig& vision = *config.vision;
  const std::span<const int64_t> positions = picture.positions;
  for (VisionStep& step : VisionSteps(config, positions, dialect, {}))
    if (step.name == unit) {
      step.graph.KeepOutputs({step.graph.Outputs().front().name});
      return std::move(step.graph);
    }
  return GraphOf(dialect, [&](const BlockBuilder& b) {
    if (unit == "multimodal_embedder") {
      BuildMultimodalEmbedder(b, config, LayoutOf(vision, positions).tokens);
    } else if (unit == "vision_encoder") {
      BuildVisionEncoder(b, vision, positions);
    } else if (unit == "vision_model") {
      BuildVisionModel(b, vision, positions);
    } else {
      CIRCLET_CHECK(unit == "vision_prefill", "{} is no unit of the vision side", unit);
      BuildVisionPrefill(b, config, positions);
    }
  });
}

// Tensors renumbered by first mention, one line each.
std::vector<std::string> Listing(const circle::Model& model) {
  const std::string text = circle::Dump(model);
  static const std::regex kIndex("#[0-9]+");
  std::map<std::string, int> numbers;
  std::string renumbered;
  auto rest = text.cbegin();
  for (std::sregex_iterator it(text.begin(), text.end(), kIndex), end; it != end; ++it) {
    renumbered.append(rest, (*it)[0].first);
    renumbered += fmt::format("#{}", numbers.try_emplace(it->str(), numbers.size()).first->second);
    rest = (*it)[0].second;
  }
  renumbered.append(rest, text.cend());
  std::vector<std::string> lines;
  std::istringstream stream(renumbered);
  for (std::string line; std::getline(stream, line);) lines.push_back(line);
  return lines;
}

// The first line that two listings do not share; whole listings of a layer are no readable failure.
std::string FirstDifference(const std::vector<std::string>& found, const std::vector<std::string>& expected) {
  for (size_t i = 0; i < std::max(found.size(), expected.size()); ++i) {
    const std::string a = i < found.size() ? found[i] : "the end", b = i < expected.size() ? expected[i] : "the end";
    if (a != b) return fmt::format("line {}: {}\nexpected {}", i, a, b);
  }
  return "";
}

// The reference's files of the vision side by unit.
std::map<std::string, circle::Model> RecordedFiles(const std::string& model, const std::string& recipe) {
  std::map<std::string, circle::Model> files;
  const std::string folder = fmt::format("golden/{}/circle/{}", model, recipe);
  if (!std::filesystem::exists(TestData(folder))) return files;
  const TempDirectory unpacked;
  for (const auto& entry : std::filesystem::directory_iterator(TestData(folder))) {
    const std::string name = entry.path().filename();
    const std::string unit = name.substr(0, name.find('.'));
    if (!name.starts_with("vision_") && unit != "multimodal_embedder") continue;
    if (name.ends_with(".circle")) files[unit] = circle::Read(entry.path());
    if (!name.ends_with(".circle.xz")) continue;
    const std::filesystem::path path = unpacked.Path() / (unit + ".circle");
    UnpackGolden(folder + "/" + name, path);
    files[unit] = circle::Read(path);
  }
  return files;
}

// Largest difference of the codes of two constants; -1 when their types differ.
int64_t CodeDifference(const Tensor& a, const Tensor& b) {
  if (a.Type() != b.Type()) return -1;
  if (a.GetDType() == DType::kF32) return std::memcmp(a.Raw(), b.Raw(), a.Bytes()) == 0 ? 0 : -1;
  int64_t top = 0;
  for (int64_t i = 0; i < a.Elements(); ++i) top = std::max(top, std::abs(CodeAt(a, i) - CodeAt(b, i)));
  return top;
}

TEST(VisionFilesTest, OperatorsTypesGridsAndConstantsAreThoseOfTheReferencesFiles) {
  int compared = 0;
  for (const std::string model_name : kModels) {
    const GoldenModel model(model_name);
    const Picture picture = model.Pictures("eval.1").at(0);
    for (const std::string& recipe : RecipesOf(model_name)) {
      Calibration grids(Recipe::Load(recipe), kTico);
      grids.UseFrozen(GoldenGrids(model_name, recipe));
      for (const auto& [unit, golden] : RecordedFiles(model_name, recipe)) {
        SCOPED_TRACE(model_name + " " + recipe + " " + unit);
        const circle::Model ours =
            Unit{UnitGraph(unit, model.config, picture, kTico), PictureWeights(model, picture, kTico, &grids), grids}
                .Exported();
        ASSERT_EQ(FirstDifference(Listing(ours), Listing(golden)), "");
        EXPECT_THAT(circle::Verify(ours), testing::IsEmpty());
        for (size_t i = 0; i < ours.operators.size(); ++i) {
          for (size_t k = 0; k < ours.operators[i].inputs.size(); ++k) {
            const int a = ours.operators[i].inputs[k], b = golden.operators[i].inputs[k];
            if (b < 0 || golden.tensors[b].data.Empty()) continue;
            // The folded bias is a sum, which the reference takes in float32.
            const int64_t allowed = golden.operators[i].code == FullyConnected::kCircleCode && k == 2 ? 8 : 0;
            const int64_t difference = CodeDifference(ours.tensors[a].data, golden.tensors[b].data);
            EXPECT_GE(difference, 0) << "operator " << i << " input " << k;
            EXPECT_LE(difference, allowed) << "operator " << i << " input " << k;
          }
        }
        ++compared;
      }
    }
  }
  EXPECT_EQ(compared, 38);
}

TEST(VisionFilesTest, DefaultRecipeExportsThePatchEmbedderThatTheReferenceCannot) {
  const GoldenModel model("tiny_e2b");
  const Picture picture = model.Pictures("eval.1").at(0);
  Calibration grids(Recipe::Load("default"), kTico);
  grids.UseFrozen(GoldenGrids("tiny_e2b", "default"));
  const circle::Model file = Unit{UnitGraph("vision_patch_embedder", model.config, picture, kTico),
                                  PictureWeights(model, picture, kTico, &grids), grids}
                                 .Exported();
  const circle::Operator& product = file.operators.at(0);
  const float weight_scale = file.tensors[product.inputs[1]].qparams->scale.at(0);
  const float input_scale = file.tensors[product.inputs[0]].qparams->scale.at(0);
  const circle::Tensor& bias = file.tensors[product.inputs[2]];
  EXPECT_EQ(bias.type.dtype, DType::kI64);
  EXPECT_EQ(bias.qparams->axis, 0);
  EXPECT_THAT(bias.qparams->scale, testing::AllOf(testing::SizeIs(32), testing::Each(weight_scale * input_scale)));
  EXPECT_THAT(circle::Verify(file), testing::IsEmpty());
}

// What the file computes from the simulation's inputs is what the simulation computes, to the last code.
void ExpectSameAsFile(const Unit& unit, const std::map<std::string, Tensor>& inputs) {
  const circle::Model file = unit.Exported();
  EXPECT_THAT(circle::Verify(file), testing::IsEmpty());
  EXPECT_THAT(circle::Dump(file), testing::Not(HasSubstr("FLOAT32")));
  FakeQuantReading reading(unit.grids);
  const auto simulated = Executor(unit.graph, &reading).Run(inputs, RoundedWeights(unit.grids, unit.weights));
  std::map<std::string, Tensor> file_inputs;
  for (size_t i = 0; i < file.inputs.size(); ++i)
    file_inputs[file.tensors[file.inputs[i]].name] = inputs.at(unit.graph.At(unit.graph.Inputs()[i]).name);
  const circle::FileGraph graph = circle::ToGraph(file);
  const auto computed = circle::RunModel(file, file_inputs);
  for (size_t i = 0; i < unit.graph.Outputs().size(); ++i) {
    const Tensor& expected = simulated.at(unit.graph.Outputs()[i].name);
    const Tensor& found = computed.at(graph.graph.Outputs()[i].name);
    ASSERT_EQ(found.Type(), expected.Type());
    int different = 0;
    for (size_t k = 0; k < expected.F32().size(); ++k) different += expected.F32()[k] != found.F32()[k];
    EXPECT_EQ(different, 0) << "of " << expected.Elements() << " elements of " << unit.graph.Outputs()[i].name;
  }
}

TEST(VisionFilesTest, EveryUnitOfOurDialectComputesWhatItsSimulationComputes) {
  for (const std::string model_name : kModels) {
    const GoldenModel model(model_name);
    const Picture picture = model.Pictures("eval.1").at(0);
    for (const char* recipe : {"default", "w4a16", "w8a8", "w8a16", "mixed8"}) {
      Calibration grids(Recipe::Load(recipe), kDefault);
      CalibrateVision(model, grids);
      const WeightSource weights = PictureWeights(model, picture, kDefault, &grids);
      FakeQuantReading reading(grids);
      Stages stages = RunVision(model, picture, kDefault, &reading, &grids);
      for (const VisionStep& step : VisionSteps(model.config, picture.positions, kDefault, {})) {
        if (step.name == "tables") continue;
        SCOPED_TRACE(model_name + " " + recipe + " " + step.name);
        std::map<std::string, Tensor> inputs;
        for (const auto& [name, stage] : step.inputs) inputs[name] = stages.at(stage);
        ExpectSameAsFile({step.graph, weights, grids}, inputs);
      }
      const std::pair<const char*, std::map<std::string, Tensor>> wholes[] = {
          {"multimodal_embedder", {{"hidden", stages["vision.last_hidden_state"]}}},
          {"vision_encoder", {{"hidden", stages["vision.patch_embed"]}}},
          {"vision_model", {{"pixel_values", picture.pixels}}},
          {"vision_prefill", {{"pixel_values", picture.pixels}}}};
      for (const auto& [unit, inputs] : wholes) {
        SCOPED_TRACE(model_name + " " + recipe + " " + unit);
        ExpectSameAsFile({UnitGraph(unit, model.config, picture, kDefault), weights, grids}, inputs);
      }
    }
  }
}

// ---- Text and pictures together
// --------------------------------------------------------------------------------------

// ids, picture and place of the image tokens of a recorded sample.
struct Prompt {
  Prompt(const GoldenModel& model, const std::string& sample)
      : picture(model.Pictures(sample).at(0)), tokens(LayoutOf(*model.config.vision, picture.positions).tokens) {
    const std::span<const int64_t> raw = model.inputs.Find(sample + ".input_ids")->I64();
    slots = CheckPlaceholders(model.config, raw, std::vector<int64_t>{tokens});
    ids = WithoutPlaceholders(model.config, raw);
  }
  int64_t Length() const { return static_cast<int64_t>(ids.size()); }
  std::map<std::string, Tensor> Inputs() const {
    return {{"ids", Tensor::Of<int64_t>({1, Length()}, ids)}, {"pixel_values", picture.pixels}};
  }
  ImageSlot Slot() const { return {picture.positions, slots.front()}; }

  Picture picture;
  int64_t tokens;
  std::vector<int64_t> slots, ids;
};

Graph FullGraph(const GoldenModel& model, const Prompt& prompt) {
  return GraphOf(kDefault, [&, slot = prompt.Slot()](const BlockBuilder& b) {
    BuildGemma4Full(b, model.config, prompt.Length(), &slot);
  });
}

TEST(Gemma4FullTest, FloatResultIsThatOfTheModel) {
  for (const std::string model_name : kModels) {
    const GoldenModel model(model_name);
    const Prompt prompt(model, "eval.1");
    const Graph graph = FullGraph(model, prompt);
    const auto results =
        Executor(graph, nullptr).Run(prompt.Inputs(), model.Vision(kDefault).For(prompt.picture.positions));
    const SafetensorsFile expected = OpenGolden(fmt::format("golden/{}/float.safetensors.xz", model_name));
    const Tensor& reference = *expected.Find("eval.1.last_hidden_state");
    EXPECT_LE(MaxDifference(reference, results.at("last_hidden_state")), 3e-5 * MaxAbs(reference)) << model_name;
  }
}

// Verification runs this graph alone, so nothing else tells what its constant masks hide.
TEST(Gemma4FullTest, SoftTokensSeeEachOtherOnTheLayersThatSaySo) {
  const GoldenModel model("tiny_e2b");
  const Prompt prompt(model, "eval.1");
  Gemma4Config config = model.config;
  for (LayerConfig& layer : config.text.layers) layer.bidirectional_pictures = !layer.full;
  const Graph graph = GraphOf(kDefault, [&](const BlockBuilder& b) {
    const ImageSlot slot{prompt.picture.positions, prompt.slots.front()};
    BuildGemma4Full(b, config, prompt.Length(), &slot);
  });
  const int64_t length = prompt.Length();
  const int window = config.text.layers.front().window;
  const auto has = [&](const Tensor& mask) {
    return std::ranges::any_of(graph.Values(), [&](const Value& value) {
      return value.kind == ValueKind::kConstant && value.type == mask.Type() &&
             std::memcmp(value.constant.Raw(), mask.Raw(), static_cast<size_t>(mask.Bytes())) == 0;
    });
  };
  EXPECT_TRUE(has(PrefillMask(length, length, window, kMaskFill, prompt.slots)));
  EXPECT_TRUE(has(PrefillMask(length, length, 0)));
  EXPECT_FALSE(has(PrefillMask(length, length, window)));
}

TEST(Gemma4FullTest, FileComputesWhatTheSimulationComputesWithFusionOnIntegers) {
  for (const std::string model_name : {"tiny_e2b", "tiny_wide"}) {
    const GoldenModel model(model_name);
    const TextConfig& text = model.config.text;
    const Prompt prompt(model, "eval.1");
    const WeightSource weights = model.Vision(kDefault).For(prompt.picture.positions);
    const int64_t length = prompt.Length();
    for (const char* recipe : {"default", "w4a16", "w8a8", "mixed8"}) {
      SCOPED_TRACE(model_name + " " + recipe);
      Calibration grids(Recipe::Load(recipe), kDefault);
      const auto observe = [&](const Graph& graph, const std::map<std::string, Tensor>& inputs) {
        ObserveReading reading(grids);
        Executor executor(graph, &reading);
        reading.Begin(0);
        auto results = executor.Run(inputs, weights);
        reading.End();
        grids.Freeze(graph, weights);
        return results;
      };
      CalibrateVision(model, grids);
      for (const LayerConfig& layer : text.layers) {
        const RopeTables rope = TextRopeTables(layer.rope, layer.head_dim, 0, length, true);
        observe(GraphOf(kDefault,
                        [&](const BlockBuilder& b) {
                          b.Output("m",
                                   b.Point(MaskPoint(layer), b.Constant(PrefillMask(length, length, layer.window))));
                          b.Output("c", b.Point(RopePoint(layer, true), b.Constant(rope.cos)));
                          b.Output("s", b.Point(RopePoint(layer, false), b.Constant(rope.sin)));
                        }),
                {});
      }
      const Tensor tokens =
          observe(
              GraphOf(kDefault, [&](const BlockBuilder& b) { BuildTokenEmbedding(b, text, length, text.vocab_size); }),
              {{"ids", prompt.Inputs().at("ids")}})
              .at("hidden");
      const Tensor projected = RunVision(model, prompt.picture, kDefault, nullptr, nullptr).at("vision.projected");
      const Tensor fused = FuseAt(tokens, projected, prompt.slots);
      observe(GraphOf(kDefault, [&](const BlockBuilder& b) { BuildMergedEmbedding(b, text, length, true); }),
              {{"hidden", fused}});
      const Graph full = FullGraph(model, prompt);
      observe(full, prompt.Inputs());

      ExpectSameAsFile({full, weights, grids}, prompt.Inputs());
      const Graph fusion = GraphOf(
          kDefault, [&](const BlockBuilder& b) { BuildFusion(b, text, length, prompt.slots.front(), prompt.tokens); });
      ExpectSameAsFile({fusion, weights, grids}, {{"text", tokens}, {"visual", projected}});
    }
  }
}

TEST(FusionTest, GraphWritesVisualRowsOverTheirSpan) {
  const TextConfig config{.hidden_size = 2};
  const std::vector<float> text{0, 1, 2, 3, 4, 5, 6, 7}, visual{10, 11, 12, 13};
  const auto fused = [&](const Dialect& dialect, int64_t start, int64_t tokens) {
    const Graph graph = GraphOf(dialect, [&](const BlockBuilder& b) { BuildFusion(b, config, 4, start, tokens); });
    const auto results = Executor(graph, nullptr)
                             .Run({{"text", Tensor::Of<float>({1, 4, 2}, text)},
                                   {"visual", Tensor::Of<float>({tokens, 2}, std::span(visual).first(tokens * 2))}},
                                  nullptr);
    const std::span<const float> values = results.at("fused").F32();
    return std::vector<float>(values.begin(), values.end());
  };
  for (const Dialect& dialect : {kTico, kDefault}) {
    EXPECT_THAT(fused(dialect, 0, 2), testing::ElementsAre(10, 11, 12, 13, 4, 5, 6, 7));
    EXPECT_THAT(fused(dialect, 1, 2), testing::ElementsAre(0, 1, 10, 11, 12, 13, 6, 7));
    EXPECT_THAT(fused(dialect, 3, 1), testing::ElementsAre(0, 1, 2, 3, 4, 5, 10, 11));
  }
  EXPECT_THAT(ErrorText([&] { fused(kDefault, 3, 2); }),
              HasSubstr("fusion: image tokens [3,5) do not fit into [0,4); check visual_start_idx"));
}

TEST(FusionTest, TheReferencesFloatFusionIsOnGridsHere) {
  const GoldenModel model("tiny_wide");
  Calibration grids(Recipe::Load("w4a16"), kTico);
  grids.UseFrozen(GoldenGrids("tiny_wide", "w4a16"));
  const Graph graph = GraphOf(kTico, [&](const BlockBuilder& b) { BuildFusion(b, model.config.text, 20, 1, 6); });
  const circle::Model file = circle::ToCircle(graph, CalibratedGrids(grids, WeightSource()));
  for (const circle::Tensor& tensor : file.tensors) EXPECT_NE(tensor.type.dtype, DType::kF32) << tensor.name;
  ASSERT_EQ(file.outputs.size(), 1u);
  EXPECT_EQ(*file.tensors[file.outputs[0]].qparams, *grids.GridOf(EmbeddingPoint()));
}

// ---- Placeholders ---------------------------------------------------------------------------------------------------

Gemma4Config PlaceholderConfig() {
  Gemma4Config config;
  config.image_token_id = 10;
  config.video_token_id = 11;
  config.audio_token_id = 12;
  config.text.pad_token_id = 0;
  return config;
}

TEST(PlaceholderTest, PositionsOfSeveralImagesComeInOrder) {
  const std::vector<int64_t> ids{5, 10, 10, 6, 10, 7}, sizes{2, 1};
  EXPECT_THAT(CheckPlaceholders(PlaceholderConfig(), ids, sizes), testing::ElementsAre(1, 2, 4));
  EXPECT_THAT(WithoutPlaceholders(PlaceholderConfig(), ids), testing::ElementsAre(5, 0, 0, 6, 0, 7));
  const std::vector<int64_t> plain{5, 6};
  EXPECT_THAT(CheckPlaceholders(PlaceholderConfig(), plain, {}), testing::IsEmpty());
}

TEST(PlaceholderTest, TextOnlyModelsHaveOrdinaryIdsOnly) {
  const std::vector<int64_t> ids{10, 11, 12};
  EXPECT_THAT(CheckPlaceholders(Gemma4Config{}, ids, {}), testing::IsEmpty());
  EXPECT_THAT(WithoutPlaceholders(Gemma4Config{}, ids), testing::ElementsAreArray(ids));
}

TEST(PlaceholderTest, EveryMisuseHasItsOwnError) {
  const auto error = [](std::vector<int64_t> ids, std::vector<int64_t> sizes) {
    return ErrorText([&] { CheckPlaceholders(PlaceholderConfig(), ids, sizes); });
  };
  EXPECT_EQ(error({5, 12}, {}),
            "position 1: audio placeholder (id 12); circlet runs text and images, take the audio out of the prompt");
  EXPECT_EQ(error({11, 5}, {}),
            "position 0: video placeholder (id 11); circlet runs text and images, take the video out of the prompt");
  EXPECT_EQ(
      error({5, 10}, {}),
      "1 image placeholders (id 10) but no pixel_values; give the image, or take the placeholders out of the prompt");
  EXPECT_EQ(error({5, 6}, {2}),
            "pixel_values of 1 images but no image placeholder (id 10) in the prompt; write one for each image token");
  EXPECT_EQ(error({10, 10}, {2, 1}),
            "image placeholders: expected 3 (2 + 1 image tokens), got 2; write as many as the images have tokens");
}

TEST(PlaceholderTest, BatchesAreCheckedByRowAndNameIt) {
  const std::vector<int64_t> ids{10, 10, 5, 5, 10, 6};
  const Tensor batch = Tensor::Of<int64_t>({2, 3}, ids);
  EXPECT_THAT(CheckPlaceholders(PlaceholderConfig(), batch, {{2}, {1}}),
              testing::ElementsAre(testing::ElementsAre(0, 1), testing::ElementsAre(1)));
  EXPECT_THAT(ErrorText([&] {
                CheckPlaceholders(PlaceholderConfig(), batch, {{2}, {2}});
              }),
              HasSubstr("prompt 1: image placeholders: expected 2 (2 image tokens), got 1"));
  EXPECT_THAT(ErrorText([&] { CheckPlaceholders(PlaceholderConfig(), batch, {{2}}); }),
              HasSubstr("input_ids has 2 prompts, the images belong to 1"));
}

TEST(PlaceholderTest, FusionRefusesRowsThatDoNotFit) {
  const std::vector<float> values(8, 0.0f);
  const Tensor text = Tensor::Of<float>({1, 4, 2}, values),
               visual = Tensor::Of<float>({2, 2}, std::span(values).first(4));
  const std::vector<int64_t> one{1}, outside{1, 4};
  EXPECT_EQ(ErrorText([&] { FuseAt(text, visual, one); }), "fusion: expected 1 visual rows (one a placeholder), got 2");
  EXPECT_EQ(ErrorText([&] { FuseAt(text, visual, outside); }), "fusion: placeholder 4 is outside [0,4)");
  EXPECT_EQ(ErrorText([&] { FuseAt(text, text, one); }),
            "fusion: text [1,4,2] and visual [1,4,2] do not belong together; expected [1,S,D] and [V,D]");
}

TEST(PlaceholderTest, StaticLayoutIsExact) {
  const std::vector<int64_t> exact{5, 10, 10, 6}, shifted{5, 6, 10, 10}, more{10, 10, 10, 6};
  CheckStaticLayout(PlaceholderConfig(), exact, 1, 2);
  EXPECT_THAT(ErrorText([&] { CheckStaticLayout(PlaceholderConfig(), shifted, 1, 2); }),
              HasSubstr("position 1: no image placeholder; the static layout has them at [1,3)"));
  EXPECT_THAT(ErrorText([&] { CheckStaticLayout(PlaceholderConfig(), more, 1, 2); }),
              HasSubstr("position 0: an image placeholder; the static layout has them at [1,3)"));
}

// ---- Layouts --------------------------------------------------------------------------------------------------------

VisionConfig SmallTower() { return {.pooling_kernel_size = 2, .position_embedding_size = 8}; }

TEST(PatchLayoutTest, CountsPatchesAndSoftTokens) {
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < 8; ++i) positions.insert(positions.end(), {i % 4, i / 4});
  for (int i = 0; i < 4; ++i) positions.insert(positions.end(), {-1, -1});
  const PatchLayout layout = LayoutOf(SmallTower(), positions);
  EXPECT_EQ(layout.patches, 12);
  EXPECT_EQ(layout.valid, 8);
  EXPECT_EQ(layout.grid_width, 4);
  EXPECT_EQ(layout.slots, 3);
  EXPECT_EQ(layout.tokens, 2);
  const Tensor pool = PoolMatrix(SmallTower(), positions);
  EXPECT_EQ(pool.GetShape().ToString(), "[1,3,12]");
  EXPECT_THAT(pool.F32().subspan(12, 12), testing::ElementsAre(0, 0, 0.25f, 0.25f, 0, 0, 0.25f, 0.25f, 0, 0, 0, 0));
}

TEST(PatchLayoutTest, EveryFaultNamesItsPatch) {
  const auto error = [](std::vector<int64_t> positions) {
    return ErrorText([&] { LayoutOf(SmallTower(), positions); });
  };
  EXPECT_THAT(error({0, 0, 1, 0}), HasSubstr("2 patches are no multiple of 4 (pooling kernel 2 x 2); pad them"));
  EXPECT_THAT(error({-1, -1, -1, -1, -1, -1, -1, -1}), HasSubstr("all 4 patches are padding"));
  EXPECT_THAT(error({0, 0, -1, -1, 0, 1, 1, 1}), HasSubstr("patch 2 at (0,1) stands after padding"));
  EXPECT_THAT(error({0, 0, 1, 0, 0, -1, 1, 1}), HasSubstr("patch 2 is at (0,-1); both must lie in [0,8)"));
  EXPECT_THAT(error({0, 0, 8, 0, 0, 1, 1, 1}), HasSubstr("patch 1 is at (8,0); both must lie in [0,8)"));
  EXPECT_THAT(error({0, 0, 1, 0, 0, 2, 1, 2}), HasSubstr("patch 2 at (0,2) falls into soft token 1 of 1"));
}

// ---- Profiles -------------------------------------------------------------------------------------------------------

TEST(VisionProfileTest, NamedProfilesHaveTheSizesOfTheTable) {
  const VisionProfile& first = VisionProfile::Named("e2b_66x36_264");
  EXPECT_EQ(&first, &VisionProfile::All().front());
  const nlohmann::json expected = nlohmann::json::parse(R"({
    "name": "e2b_66x36_264", "visual_start_idx": 1, "num_visual_tokens": 264, "max_soft_tokens": 280,
    "patch_grid_height": 36, "patch_grid_width": 66, "patch_size": 16, "pooling_kernel_size": 3, "batch_size": 1,
    "tokenizer_add_bos_token": false, "num_valid_patches": 2376, "num_patches": 2520, "num_padding_patches": 144,
    "soft_grid_height": 12, "soft_grid_width": 22, "image_height": 576, "image_width": 1056,
    "patch_vector_size": 768, "visual_end_idx": 265, "image_position_ids_shape": [1, 2520, 2],
    "image_position_ids_sha256": "245f8e683f7c4f08a07cd32b8cd24e0f496656b070eeb5095f5e2a7161894432"})");
  EXPECT_EQ(first.ToJson(), expected);
  const VisionProfile& second = VisionProfile::Named("e2b_57x42_266");
  EXPECT_EQ(second.PaddingPatches(), 126);
  EXPECT_EQ(second.ImageHeight(), 672);
  EXPECT_EQ(second.ImageWidth(), 912);
  EXPECT_EQ(second.PositionsSha256(), "b3f89b38d2b04bed3b30b2bc36a1dbef671f2ff14ae991cec917c709429cb3d6");
  for (const VisionProfile& profile : VisionProfile::All()) profile.Validate();
  EXPECT_THAT(ErrorText([] { VisionProfile::Named("e2b_66x36_246"); }),
              HasSubstr("no vision profile \"e2b_66x36_246\"; nearest: \"e2b_66x36_264\""));
}

TEST(VisionProfileTest, EveryRuleHasItsOwnError) {
  const auto error = [](auto change, std::optional<int64_t> max_seq = std::nullopt) {
    VisionProfile profile = VisionProfile::All().front();
    change(profile);
    return ErrorText([&] { profile.Validate(nullptr, max_seq); });
  };
  EXPECT_EQ(error([](VisionProfile& p) { p.name = ""; }), "vision profile: the name is empty; give it one");
  EXPECT_THAT(error([](VisionProfile& p) { p.batch_size = 2; }), HasSubstr("e2b_66x36_264: batch_size is 2"));
  EXPECT_THAT(error([](VisionProfile& p) { p.patch_size = 0; }), HasSubstr("patch_size is 0; it must be at least 1"));
  EXPECT_THAT(error([](VisionProfile& p) { p.visual_start_idx = -1; }), HasSubstr("visual_start_idx is -1"));
  EXPECT_THAT(error([](VisionProfile& p) { p.patch_grid_width = 65; }),
              HasSubstr("patch_grid_width 65 is no multiple of the pooling kernel 3"));
  EXPECT_THAT(error([](VisionProfile& p) { p.num_visual_tokens = 281; }),
              HasSubstr("num_visual_tokens 281 is larger than max_soft_tokens 280"));
  EXPECT_THAT(error([](VisionProfile& p) { p.num_visual_tokens = 263; }),
              HasSubstr("num_visual_tokens is 263, but a grid of 36 x 66 patches makes 12 x 22 = 264"));
  EXPECT_THAT(error([](VisionProfile&) {}, 264), HasSubstr("image tokens end at 265, max_seq is 264"));
  VisionConfig vision{.patch_size = 14, .pooling_kernel_size = 3, .position_embedding_size = 10240};
  EXPECT_THAT(ErrorText([&] { VisionProfile::All().front().Validate(&vision); }),
              HasSubstr("patch_size is 16, the model's vision_config says 14"));
  vision.patch_size = 16;
  vision.position_embedding_size = 64;
  EXPECT_THAT(ErrorText([&] { VisionProfile::All().front().Validate(&vision); }),
              HasSubstr("a grid of 36 x 66 patches leaves the position table of 64"));
}

TEST(VisionProfileTest, OtherPositionsAreRefusedWithBothHashes) {
  const VisionProfile& profile = VisionProfile::All().front();
  std::vector<int64_t> positions = profile.Positions();
  profile.CheckPositions(positions);
  positions[2 * 66] = 1;
  EXPECT_THAT(ErrorText([&] { profile.CheckPositions(positions); }),
              testing::AllOf(HasSubstr("(SHA-256 245f8e683f7c"), HasSubstr("patch 66 is (1,1), expected (0,1)"),
                             HasSubstr("resize the image to 1056 x 576 pixels")));
}

TEST(VisionProfileTest, RecipesNameAProfileOrStateAllOfIt) {
  const VisionConfig vision{.patch_size = 4, .pooling_kernel_size = 3, .position_embedding_size = 24};
  EXPECT_EQ(ProfileOf({}, "", vision), std::nullopt);
  ModelArgs args{.visual_start_idx = 4, .num_visual_tokens = 6, .max_soft_tokens = 8};
  EXPECT_THAT(ErrorText([&] { ProfileOf(args, "", vision); }),
              HasSubstr("model_args.vision: patch_grid_height, patch_grid_width missing"));
  args.patch_grid_height = 6;
  args.patch_grid_width = 9;
  const VisionProfile custom = *ProfileOf(args, "", vision, 24);
  EXPECT_EQ(custom.name, "custom");
  EXPECT_EQ(custom.Patches(), 72);
  args.image_height = 32;
  args.image_width = 36;
  EXPECT_THAT(ErrorText([&] { ProfileOf(args, "", vision); }),
              HasSubstr("model_args.vision.image_height: is 32, 6 patches of 4 pixels are 24"));
  EXPECT_THAT(ErrorText([&] { ProfileOf({.num_visual_tokens = 6}, "e2b_66x36_264", vision); }),
              HasSubstr("model_args.vision.num_visual_tokens: is 6, profile e2b_66x36_264 says 264"));
}

}  // namespace
}  // namespace circlet
