#include <fmt/ranges.h>

#include "circlet/base/error.h"
#include "circlet/circle/export.h"
#include "circlet/io/file.h"
#include "circlet/io/names.h"
#include "circlet/report/terminal.h"
#include "smoke/parts.h"
#include "smoke/session.h"

namespace circlet {
namespace {

constexpr int kSamples = 20;

struct Example {
  std::string_view name, recipe;
  std::vector<SmokePart> (*parts)(const PartOptions&);
};

const Example kExamples[] = {
    {"model", "default", [](const PartOptions& options) { return WholeModelParts(options, {}); }},
    {"for_causal_lm", "default",
     [](const PartOptions& options) { return WholeModelParts(options, {.image = false, .logits = true}); }},
    {"for_conditional_generation", "default",
     [](const PartOptions& options) { return WholeModelParts(options, {.logits = true}); }},
    {"vision_model", "smoke-u8", VisionModelParts},
    {"vision_patch_embedder", "smoke-u8", PatchEmbedderParts},
    {"vision_pooler", "smoke-u8", VisionPoolerParts},
    {"multimodal_embedder", "smoke-u8", EmbedderParts},
    {"text_scaled_word_embedding", "smoke-u8", WordEmbeddingParts},
};

const Example& Find(std::string_view name) {
  constexpr std::string_view kPrefix = "gemma4_";
  const std::string_view bare = name.starts_with(kPrefix) ? name.substr(kPrefix.size()) : name;
  for (const Example& example : kExamples)
    if (example.name == bare) return example;
  Fail("example: no example \"{}\"{}; known are {}", name, NearestHint(bare, ExampleNames()),
       fmt::join(ExampleNames(), ", "));
}

}  // namespace

const std::vector<std::string>& ExampleNames() {
  static const std::vector<std::string> names = [] {
    std::vector<std::string> all;
    for (const Example& example : kExamples) all.emplace_back(example.name);
    return all;
  }();
  return names;
}

std::string RunExample(std::string_view name, const std::filesystem::path& output_dir, uint64_t seed) {
  const Example& example = Find(name);
  SmokeSession session(Recipe::Load(std::string(example.recipe)),
                       example.parts({.sizes = ExampleSizes(), .samples = kSamples, .seed = seed}));
  std::string text = "Preparing model for quantization...\n";
  for (const SmokePart& part : session.Parts())
    text += part.name.empty()       ? "Calibrating...\n"
            : part.name == "image" ? "Calibrating (image-text)...\n"
                                   : "Calibrating (text-only)...\n";
  session.Observe(0);
  session.Freeze();
  text += "Converting to quantized model...\n";

  for (const SmokePart& part : session.Parts()) {
    const std::string& output = part.graph.Outputs().front().name;
    const auto measure = [&](const SmokeValues& inputs) {
      return std::pair(session.RunFloat(part, inputs).at(output), session.RunRounded(part, inputs).at(output));
    };
    const auto [reference, rounded] = measure(part.evaluation);
    const auto [seen_reference, seen_rounded] = measure(part.calibration.front());
    ErrorMetrics metrics, seen;
    metrics.Add(reference, rounded);
    seen.Add(seen_reference, seen_rounded);
    const char* title = part.name == "image" ? "Image-Text Quantization Error" : "Quantization Error Summary";
    text += fmt::format("\n{}", ErrorSummary(title, reference.GetShape(), rounded.GetShape(), metrics));
    text += fmt::format("on a sample that was not calibrated on; on one that was: mean |diff| {:.6f}, PEIR {:.6f} %\n",
                        seen.MeanAbs(), 100 * seen.Peir());
    if (part.name != "image") text += ScatterPlot(reference.F32(), rounded.F32(), part.name) + "\n";
  }

  const SmokePart& part = session.Parts().back();
  const circle::Model model =
      circle::ToCircle(part.graph, CalibratedGrids(session.GetCalibration(), part.stored));
  text += "\nExporting to Circle format...\n";
  text += fmt::format("Export output shape: {}\n",
                      TupleText(part.graph.TypeOf(part.graph.Outputs().front().value).shape));
  text += "Converting to Circle format...\n";
  CreateDirectories(output_dir);
  const std::filesystem::path path = output_dir / fmt::format("gemma4_{}.q.circle", example.name);
  circle::Write(model, path);
  return text + fmt::format("Circle model saved as '{}'\n", path.lexically_normal().string());
}

}  // namespace circlet
