#include "pipeline/gemma4/items.h"

#include <algorithm>
#include <cstdio>
#include <nlohmann/json.hpp>

#include "circlet/base/communicator.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/model/gemma4/vision.h"

namespace circlet::gemma4 {
namespace {

constexpr int64_t kLongestSequence = int64_t{1} << 20;

struct RandomShape {
  int64_t count = 0, length = 0;
};

RandomShape ParseRandom(const std::string& text) {
  long count = 0, length = 0;
  char x = 0, rest = 0;
  if (std::sscanf(text.c_str(), "%ld%c%ld%c", &count, &x, &length, &rest) != 3 || x != 'x' || count < 1 || length < 1 ||
      count > 1'000'000 || length > kLongestSequence)
    Fail("--random-samples {}: expected NxLENGTH, e.g. 8x2048", text);
  constexpr int64_t kMostTokens = int64_t{1} << 28;  // they stand in memory
  if (int64_t{count} * length > kMostTokens)
    Fail("--random-samples {}: {} tokens, at most {}; take fewer or shorter samples", text, int64_t{count} * length,
         kMostTokens);
  return {count, length};
}

void Append(SampleSet set, std::vector<Sample>& samples, std::vector<std::string>& skipped) {
  std::move(set.samples.begin(), set.samples.end(), std::back_inserter(samples));
  std::move(set.skipped.begin(), set.skipped.end(), std::back_inserter(skipped));
}

// Reads JSON lines and notes what was read; a pipe gives them only once.
DataFile ReadLines(const std::filesystem::path& path, RunData& data) {
  DataFile file = ReadDataFile(path);
  if (!file.repeatable && World().Size() > 1)
    Fail("{}: cannot be read by several processes; write the samples to a file", file.place);
  data.files.push_back(file);
  data.files.back().text.clear();
  return file;
}

void LoadCaptionTasks(const QuantizeOptions& options, const Processor& processor, const SampleOptions& rules, RunData& data) {
  data.captions = LoadCaptions(ReadLines(options.eval_captions, data), processor, rules);
  const int64_t turn_end = processor.tokenizer.RequireId("<turn|>");
  for (const CaptionTask& task : data.captions) {
    data.answers.push_back(processor.tokenizer.Encode(task.caption, /*add_special=*/false));
    data.answers.back().push_back(turn_end);
  }
}

// One picture of a sample as its own tensor, sharing the bytes.
Tensor ImageRow(const Tensor& tensor, int64_t image) {
  Shape shape = tensor.GetShape();
  const int64_t bytes = tensor.Bytes() / shape[0];
  shape[0] = 1;
  return Tensor({tensor.GetDType(), shape}, tensor.Raw() + image * bytes, std::make_shared<Tensor>(tensor));
}

// Runs [begin, end) of ones.
std::vector<std::pair<int64_t, int64_t>> RunsOf(const std::vector<int64_t>& keep) {
  std::vector<std::pair<int64_t, int64_t>> runs;
  for (int64_t i = 0; i < static_cast<int64_t>(keep.size()); ++i) {
    if (keep[i] == 0) continue;
    if (runs.empty() || runs.back().second < i) runs.emplace_back(i, i);
    runs.back().second = i + 1;
  }
  return runs;
}

class ItemMaker {
 public:
  explicit ItemMaker(RunContext& context) : context_(context) {}

  void Add(ItemKind kind, int64_t index, const std::string& label, std::vector<int64_t> ids, std::vector<int64_t> keep,
           const Sample* sample, int64_t answer = 0, int control_of = -1) {
    if (keep.empty()) keep.assign(ids.size(), 1);
    TextItem text{.keep = std::move(keep), .answer = answer};
    text.item = {.id = static_cast<int>(context_.texts.size()),
                 .kind = kind,
                 .index = index,
                 .length = static_cast<int64_t>(ids.size()),
                 .label = label,
                 .rank = RankOf(kind, context_.texts.size())};
    if (control_of >= 0) SetControl(text.item, control_of);
    std::vector<int64_t> soft_tokens;
    if (sample != nullptr && !sample->pixel_values.Empty())
      for (int64_t image = 0; image < sample->pixel_values.GetShape()[0]; ++image) {
        text.images.push_back(Within(sample->source, [&] { return AddImage(text.item, *sample, image, label); }));
        soft_tokens.push_back(LayoutOf(*context_.config.vision, context_.images.back().positions).tokens);
      }
    Within(sample == nullptr ? label : sample->source,
           [&] { text.places = CheckPlaceholders(context_.config, ids, soft_tokens); });
    text.ids = WithoutPlaceholders(context_.config, ids);
    text.item.real = RunsOf(text.keep);
    if (!text.images.empty()) text.item.variant = "pictures";
    if (text.FirstRead() > 0) text.item.variant += fmt::format(" from {}", text.FirstRead());
    context_.items.push_back(text.item);
    context_.texts.push_back(std::move(text));
  }

 private:
  // Sequences go round the processes; the one that writes the files has the one that verifies them.
  int RankOf(ItemKind kind, size_t index) const {
    return kind == ItemKind::kVerify ? 0 : static_cast<int>(index % context_.world.Size());
  }

  // A control sample runs where the one that it repeats does.
  void SetControl(Item& item, int repeated) const {
    item.control_of = repeated;
    item.rank =
        repeated >= RunContext::kFirstImage ? context_.ImageOf(repeated).item.rank : context_.texts[repeated].item.rank;
  }

  int AddImage(const Item& text, const Sample& sample, int64_t image, const std::string& label) {
    const ItemKind kind = text.kind;
    const Tensor positions = ImageRow(sample.image_position_ids, image);
    ImageItem item{.pixel_values = ImageRow(sample.pixel_values, image),
                   .positions = {positions.I64().begin(), positions.I64().end()}};
    item.budget = LayoutOf(*context_.config.vision, item.positions).slots;
    // Padding patches change nothing that is read (gemma4.md 5), so only the verification picture carries them, as the
    // exported graphs do; the reference also takes its ranges over them.
    if (kind != ItemKind::kVerify && !context_.GetDialect().duplicate_points) Trim(item);
    // Observers tell pictures apart by number; calibration pictures come first, so theirs do not depend on the others.
    item.item = {.id = RunContext::kFirstImage + static_cast<int>(context_.images.size()),
                 .kind = kind,
                 .index = static_cast<int64_t>(context_.images.size()),
                 .length = static_cast<int64_t>(item.positions.size()) / 2,
                 .rank = text.rank};
    if (text.control_of >= 0) SetControl(item.item, context_.texts[text.control_of].images[image]);
    if (text.rank != context_.world.Rank()) item.pixel_values = Tensor();
    item.item.real = {{0, LayoutOf(*context_.config.vision, item.positions).valid}};
    item.item.variant.assign(reinterpret_cast<const char*>(item.positions.data()), item.positions.size() * sizeof(int64_t));
    item.item.label = image == 0 ? label : fmt::format("{}.image.{}", label, image);
    context_.image_items.push_back(item.item);
    context_.images.push_back(std::move(item));
    return context_.images.back().item.id;
  }

  void Trim(ImageItem& item) const {
    const int64_t valid = LayoutOf(*context_.config.vision, item.positions).valid;
    item.positions.resize(valid * 2);
    item.pixel_values = Positions(item.pixel_values, 0, valid);
  }

  RunContext& context_;
};

VisionProfile ProfileOf(const RunContext& context, const TextItem& text) {
  const VisionConfig& vision = *context.config.vision;
  const ImageItem& image = context.ImageOf(text.images[0]);
  const PatchLayout layout = LayoutOf(vision, image.positions);
  VisionProfile profile{.name = "custom",
                        .visual_start_idx = text.places[0],
                        .num_visual_tokens = layout.tokens,
                        .max_soft_tokens = image.budget,
                        .patch_grid_height = layout.valid / layout.grid_width,
                        .patch_grid_width = layout.grid_width,
                        .patch_size = vision.patch_size,
                        .pooling_kernel_size = vision.pooling_kernel_size};
  for (const VisionProfile& known : VisionProfile::All()) {
    profile.name = known.name;
    if (profile == known) return profile;
  }
  profile.name = "custom";
  return profile;
}

// The most frequent layout among calibration samples with one picture; the first of equals.
std::optional<VisionProfile> FrequentProfile(const RunContext& context) {
  std::vector<std::pair<VisionProfile, int64_t>> counts;
  for (const TextItem& text : context.texts) {
    if (text.images.size() != 1 || text.item.kind != ItemKind::kCalibration) continue;
    const VisionProfile profile = ProfileOf(context, text);
    const auto same = std::find_if(counts.begin(), counts.end(), [&](const auto& c) { return c.first == profile; });
    if (same == counts.end()) {
      counts.emplace_back(profile, 1);
    } else {
      ++same->second;
    }
  }
  const auto most = std::max_element(counts.begin(), counts.end(),
                                     [](const auto& a, const auto& b) { return a.second < b.second; });
  if (most == counts.end()) return std::nullopt;
  return most->first;
}

VisionProfile ProfileFromFile(const std::filesystem::path& path) {
  const nlohmann::json json = ReadJson(path);
  const JsonObject object(json, path.filename());
  return {.name = object.Optional<std::string>("name", "custom"),
          .visual_start_idx = object.Required<int64_t>("visual_start_idx"),
          .num_visual_tokens = object.Required<int64_t>("num_visual_tokens"),
          .max_soft_tokens = object.Required<int64_t>("max_soft_tokens"),
          .patch_grid_height = object.Required<int64_t>("patch_grid_height"),
          .patch_grid_width = object.Required<int64_t>("patch_grid_width"),
          .patch_size = object.Required<int64_t>("patch_size"),
          .pooling_kernel_size = object.Required<int64_t>("pooling_kernel_size")};
}

// What --vision-profile or the recipe asks for.
std::optional<VisionProfile> AskedProfile(const QuantizeOptions& options, const RunContext& context) {
  if (!context.config.vision) {
    if (!options.vision_profile.empty()) Fail("--vision-profile: the model has no vision tower");
    return std::nullopt;
  }
  const VisionConfig& vision = *context.config.vision;
  if (options.vision_profile.ends_with(".json")) {
    VisionProfile profile = ProfileFromFile(options.vision_profile);
    profile.Validate(&vision, context.max_seq_len);
    return profile;
  }
  return ProfileOf(context.calibration.GetRecipe().model_args, options.vision_profile, vision, context.max_seq_len);
}

// A square picture of at most 256 soft tokens behind the first ids of a random prompt.
VisionProfile RandomProfile(const VisionConfig& vision) {
  const int64_t side = std::min<int64_t>(16, vision.position_embedding_size / vision.pooling_kernel_size);
  const int64_t patches = side * vision.pooling_kernel_size;
  return {.name = "random",
          .visual_start_idx = 4,
          .num_visual_tokens = side * side,
          .max_soft_tokens = side * side,
          .patch_grid_height = patches,
          .patch_grid_width = patches,
          .patch_size = vision.patch_size,
          .pooling_kernel_size = vision.pooling_kernel_size};
}

// A sample of a layout that none of the data has: a text sample's ids around the picture's slot, and a pattern for the
// picture. It only tries the machinery.
Sample PatternSample(const VisionProfile& profile, const Gemma4Config& config, std::vector<int64_t> ids,
                     std::string source) {
  Sample sample{.source = std::move(source)};
  ids.resize(std::max<int64_t>(static_cast<int64_t>(ids.size()), profile.VisualEnd()), config.text.bos_token_id);
  std::fill(ids.begin() + profile.visual_start_idx, ids.begin() + profile.VisualEnd(), config.image_token_id);
  sample.input_ids = std::move(ids);
  const int64_t patches = profile.Patches();
  sample.image_position_ids = Tensor::Of<int64_t>({1, patches, 2}, profile.Positions());
  sample.pixel_values = Tensor(TensorType{DType::kF32, {1, patches, profile.PatchValues()}});
  const std::span<float> pixels = sample.pixel_values.F32();
  for (int64_t i = 0; i < profile.ValidPatches() * profile.PatchValues(); ++i)
    pixels[i] = static_cast<float>((i * 7919 + i / 48 * 31) % 256) / 255.0f;
  return sample;
}

void AddRandomSamples(const QuantizeOptions& options, const Gemma4Config& config, RunData& data) {
  const RandomShape shape = ParseRandom(options.random_samples);
  const std::vector<int64_t> forbidden{config.image_token_id, config.video_token_id, config.audio_token_id,
                                       config.text.pad_token_id};
  constexpr uint64_t kSeed = 42;
  data.random = true;
  data.calibration = RandomSamples(shape.count, shape.length, kSeed, config.text.vocab_size, forbidden);
  if (options.random_images == 0) return;
  if (!config.vision) Fail("--random-images: the model has no vision tower");
  const VisionProfile profile = RandomProfile(*config.vision);
  constexpr int64_t kTextBehind = 60;
  std::vector<Sample> prompts = RandomSamples(options.random_images, profile.VisualEnd() + kTextBehind, kSeed + 1,
                                              config.text.vocab_size, forbidden);
  for (Sample& prompt : prompts)
    data.calibration.push_back(
        PatternSample(profile, config, std::move(prompt.input_ids), prompt.source + " with a picture"));
}

}  // namespace

QuantizeOptions WithRecipe(QuantizeOptions options, const Recipe& recipe) {
  if (options.model.empty()) options.model = recipe.model.name_or_path;
  if (options.model.empty()) Fail("no checkpoint: give MODEL_DIR, or model.name_or_path in the recipe");
  if (options.output.empty() && options.exports) options.output = recipe.export_options.output_dir;
  if (options.output.empty() && options.exports) Fail("no output directory: give --output, or export.output_dir in the recipe");
  if (!options.max_seq_len) options.max_seq_len = recipe.export_options.max_seq_len;
  if (!options.max_seq_len) options.max_seq_len = recipe.model_args.max_seq;
  if (!options.max_seq_len) options.max_seq_len = recipe.calibration.seq_len;
  if (options.random_images > 0 && options.random_samples.empty())
    Fail("--random-images: goes with --random-samples; pictures of one's own come with --data or --samples");
  if (recipe.evaluation.enabled && recipe.evaluation.perplexity.enabled && options.eval_text.empty())
    options.eval_text = recipe.evaluation.perplexity.dataset;
  if (recipe.evaluation.enabled && recipe.evaluation.captions && options.eval_captions.empty())
    Fail("evaluation.coco: circlet downloads nothing; give the pictures and captions with --eval-captions FILE.jsonl");
  return options;
}

RunData LoadRunData(const QuantizeOptions& options, const Recipe& recipe, const Gemma4Config& config) {
  constexpr int64_t kEverySample = int64_t{1} << 40;
  std::vector<DataSource> sources;
  for (const auto& path : {options.data, options.samples})
    if (!path.empty()) sources.push_back({.dataset = path, .n_samples = kEverySample});
  const size_t given = sources.size() + !options.random_samples.empty();
  if (given == 0) sources = recipe.calibration.datasets;
  if (given > 1 || (given == 0 && sources.empty() && options.qparams.empty()))
    Fail("calibration data: give exactly one of --data, --samples and --random-samples (found {})", given);

  if (options.long_samples != LongSamples::kRefuse && !options.max_seq_len)
    Fail("--truncate and --chunk: shorten samples to --max-seq-len; give that too");

  RunData data;
  const SampleOptions rules{.vocab_size = config.text.vocab_size,
                            .max_length = options.max_seq_len.value_or(0),
                            .longer = options.long_samples,
                            .bos = config.text.bos_token_id,
                            .patch_positions = config.vision ? config.vision->position_embedding_size : 0,
                            .text_only = options.text_only || !config.vision.has_value(),
                            .placeholders = {config.image_token_id, config.video_token_id, config.audio_token_id}};
  std::optional<Processor> processor;
  const auto needs_processor = [&]() -> const Processor& {
    if (!processor) processor = LoadProcessor(options.model);
    return *processor;
  };
  for (const DataSource& source : sources) {
    const std::filesystem::path path = source.dataset;
    SampleSet set;
    if (path.extension() == ".safetensors" || path == options.samples) {
      set = SamplesFromSafetensors(path, "calib", rules);
      if (SafetensorsFile::Open(path).Find("eval.0.input_ids") != nullptr)
        Append(SamplesFromSafetensors(path, "eval", rules), data.evaluation, data.skipped);
    } else if (path == options.data || std::filesystem::exists(path)) {
      set = LoadJsonl(ReadLines(path, data), needs_processor(), rules);
    } else {
      Fail("calibration.datasets: \"{}\" is no file; circlet downloads nothing, give the path of a .jsonl or .safetensors "
           "file", source.dataset);
    }
    if (!set.shortened.empty() && !data.shortened.empty()) data.shortened += "; ";
    data.shortened += set.shortened;
    if (static_cast<int64_t>(set.samples.size()) > source.n_samples) set.samples.resize(source.n_samples);
    Append(std::move(set), data.calibration, data.skipped);
  }
  if (!options.random_samples.empty()) AddRandomSamples(options, config, data);
  if (!options.eval_text.empty()) {
    constexpr int64_t kWindow = 255;
    data.windows = Within(options.eval_text.string(), [&] {
      return PerplexityWindows(ReadFile(options.eval_text), needs_processor().tokenizer, kWindow,
                               config.text.bos_token_id);
    });
    if (options.eval_windows && *options.eval_windows < static_cast<int64_t>(data.windows.size()))
      data.windows.resize(*options.eval_windows);
  }
  if (!options.eval_captions.empty()) {
    if (!config.vision) Fail("--eval-captions: the model has no vision tower");
    LoadCaptionTasks(options, needs_processor(), rules, data);
  }
  for (const std::vector<Sample>* samples : {&data.calibration, &data.evaluation})
    for (const Sample& sample : *samples)
      if (data.dated.empty()) data.dated = sample.date_place;
  for (const CaptionTask& task : data.captions)
    if (data.dated.empty()) data.dated = task.prompt.date_place;
  if (!sources.empty() && data.calibration.empty())
    Fail("no calibration sample is left: {} have pictures, which this run leaves out", data.skipped.size());
  return data;
}

void MakeItems(const RunData& data, const QuantizeOptions& options, RunContext& context) {
  ItemMaker maker(context);
  const auto add_samples = [&](const std::vector<Sample>& samples, ItemKind kind, const char* label) {
    for (size_t i = 0; i < samples.size(); ++i)
      maker.Add(kind, static_cast<int64_t>(i), fmt::format("{}.{}", label, i), samples[i].input_ids,
                {samples[i].attention_mask.begin(), samples[i].attention_mask.end()}, &samples[i]);
  };
  add_samples(data.calibration, ItemKind::kCalibration, "calib");
  add_samples(data.evaluation, ItemKind::kEvaluation, "eval");
  for (size_t i = 0; i < data.windows.size(); ++i)
    maker.Add(ItemKind::kWindow, static_cast<int64_t>(i), fmt::format("window.{}", i), data.windows[i], {}, nullptr);
  for (size_t i = 0; i < data.captions.size(); ++i) {
    std::vector<int64_t> ids = data.captions[i].prompt.input_ids;
    const auto answer = static_cast<int64_t>(ids.size());
    ids.insert(ids.end(), data.answers[i].begin(), data.answers[i].end());
    maker.Add(ItemKind::kCaption, static_cast<int64_t>(i), fmt::format("caption.{}", i), std::move(ids), {},
              &data.captions[i].prompt, answer);
  }

  if (options.compute == Compute::kBf16 && !data.calibration.empty()) {
    const auto pictured =
        std::ranges::find_if(data.calibration, [](const Sample& s) { return !s.pixel_values.Empty(); });
    const int index = pictured == data.calibration.end() ? 0 : static_cast<int>(pictured - data.calibration.begin());
    const Sample& sample = data.calibration[index];
    maker.Add(ItemKind::kControl, index, "control", sample.input_ids,
              {sample.attention_mask.begin(), sample.attention_mask.end()}, &sample, 0, index);
  }

  ChooseAlone(context.items);
  ChooseAlone(context.image_items);

  int64_t longest = 1;
  for (const TextItem& text : context.texts)
    if (text.item.kind == ItemKind::kCalibration || text.item.kind == ItemKind::kEvaluation)
      longest = std::max(longest, text.item.length);
  context.max_seq_len = options.max_seq_len.value_or((longest + 7) / 8 * 8);
  if (context.max_seq_len < 2 || context.max_seq_len > kLongestSequence)
    Fail("sequence length {}: expected 2 .. {}", context.max_seq_len, kLongestSequence);
  if (longest > context.max_seq_len)
    Fail("a sample has {} tokens, the exported sequence length is {}; raise --max-seq-len", longest, context.max_seq_len);
  if (options.output.empty()) return;

  // Calibration picks the vision layout unless one is asked for; a sample that was not calibrated on verifies it when
  // there is one.
  const std::optional<VisionProfile> asked = AskedProfile(options, context);
  const std::optional<VisionProfile> profile = asked ? asked : FrequentProfile(context);
  const auto fits = [&](const TextItem& text) {
    if (!profile) return text.images.empty();
    if (text.images.size() != 1) return false;
    VisionProfile own = ProfileOf(context, text);
    own.name = profile->name;
    return own == *profile;
  };
  std::optional<Sample> chosen;
  size_t at = 0;
  for (const auto* pool : {&data.calibration, &data.evaluation}) {
    const Sample* best = nullptr;
    for (const Sample& sample : *pool) {
      const TextItem& text = context.texts[at++];
      if (fits(text) && (best == nullptr || sample.input_ids.size() > best->input_ids.size())) best = &sample;
    }
    if (best != nullptr) chosen = *best;
  }
  if (!chosen && asked && !context.images.empty() && !data.calibration.empty())
    chosen = PatternSample(*asked, context.config,
                           WithoutPlaceholders(context.config, data.calibration.front().input_ids), "pattern");
  if (!chosen) return;
  std::vector<int64_t> ids = chosen->input_ids;
  std::vector<int64_t> keep(chosen->attention_mask.begin(), chosen->attention_mask.end());
  if (keep.empty()) keep.assign(ids.size(), 1);
  ids.resize(context.max_seq_len, context.config.text.pad_token_id);
  keep.resize(context.max_seq_len, 0);
  maker.Add(ItemKind::kVerify, 0, "verify", std::move(ids), std::move(keep), &*chosen);
}

void ReleasePictures(RunData& data) {
  for (std::vector<Sample>* samples : {&data.calibration, &data.evaluation})
    for (Sample& sample : *samples) sample.pixel_values = Tensor();
  for (CaptionTask& task : data.captions) task.prompt.pixel_values = Tensor();
}

std::optional<VisionProfile> ExportedProfile(const RunContext& context) {
  const TextItem* verify = context.VerifyText();
  if (verify == nullptr || verify->images.size() != 1) return std::nullopt;
  return ProfileOf(context, *verify);
}

}  // namespace circlet::gemma4
