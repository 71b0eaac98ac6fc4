#include "pipeline/gemma4/data.h"

#include <algorithm>
#include <cstdio>
#include <filesystem>
#include <set>

#include "circlet/base/communicator.h"
#include "circlet/io/file.h"
#include "circlet/io/safetensors.h"
#include "io/mapped_file.h"
#include "pipeline/gemma4/perplexity.h"
#include "pipeline/quantize.h"

namespace circlet::gemma4 {
namespace {

namespace fs = std::filesystem;

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

// Where calibration samples come from.
struct SampleFile {
  fs::path path;
  bool tensors = false;  // safetensors, else JSON lines
  int64_t most = INT64_MAX;
};

// Exactly one of the options, or else what the recipe names.
std::vector<SampleFile> SampleFiles(const QuantizeOptions& options, const Settings& settings) {
  const auto is_tensors = [](const fs::path& path) { return path.extension() == ".safetensors"; };
  std::vector<SampleFile> files;
  if (!options.data.empty()) files.push_back({.path = options.data, .tensors = is_tensors(options.data)});
  if (!options.samples.empty()) files.push_back({.path = options.samples, .tensors = true});
  const size_t given = files.size() + !options.random_samples.empty();
  const std::vector<DataSource>& datasets = settings.calibration.datasets;
  if (given > 1 || (given == 0 && datasets.empty() && options.qparams.empty()))
    Fail("calibration data: give exactly one of --data, --samples and --random-samples (found {})", given);
  if (given > 0) return files;
  for (const DataSource& source : datasets) {
    const fs::path path = source.dataset;
    if (!is_tensors(path) && !fs::exists(path))
      Fail(
          "calibration.datasets: \"{}\" is no file; circlet downloads nothing, give the path of a .jsonl or "
          ".safetensors "
          "file",
          source.dataset);
    files.push_back({.path = path, .tensors = is_tensors(path), .most = source.n_samples});
  }
  return files;
}

// Read when the first file asks for it: samples of ids need none.
class LazyProcessor {
 public:
  explicit LazyProcessor(fs::path model) : model_(std::move(model)) {}
  const Processor& Get() {
    if (!processor_) processor_ = LoadProcessor(model_);
    return *processor_;
  }

 private:
  fs::path model_;
  std::optional<Processor> processor_;
};

void Append(SampleSet set, std::vector<Sample>& samples, std::vector<std::string>& skipped) {
  std::move(set.samples.begin(), set.samples.end(), std::back_inserter(samples));
  std::move(set.skipped.begin(), set.skipped.end(), std::back_inserter(skipped));
}

// Reads JSON lines and notes what was read; a pipe gives them only once.
DataFile ReadLines(const fs::path& path, RunData& data) {
  DataFile file = ReadDataFile(path);
  if (!file.repeatable && World().Size() > 1)
    Fail("{}: cannot be read by several processes; write the samples to a file", file.place);
  data.files.push_back(file);
  data.files.back().text.clear();
  return file;
}

// Which groups a file of samples has. Names that belong to neither are an Error.
struct SampleGroups {
  bool calibration = false, evaluation = false;
};
SampleGroups GroupsOf(const fs::path& path) {
  SampleGroups groups;
  const SafetensorsFile file = SafetensorsFile::Open(path);
  for (const auto& [name, tensor] : file.Tensors()) {
    groups.calibration |= name.starts_with("calib.");
    groups.evaluation |= name.starts_with("eval.");
    if (!name.starts_with("calib.") && !name.starts_with("eval."))
      Fail("{}: tensor \"{}\" is no sample's; names are calib.N.KEY and eval.N.KEY (docs/report.md)", path.string(),
           name);
  }
  return groups;
}

// `frozen`: grids are given, so that nothing need be calibrated on.
void ReadSamples(const SampleFile& file, bool frozen, const SampleOptions& rules, LazyProcessor& processor,
                 RunData& data) {
  SampleSet set;
  if (!file.tensors) {
    set = LoadJsonl(ReadLines(file.path, data), processor.Get(), rules);
  } else {
    const SampleGroups groups = GroupsOf(file.path);
    if (groups.calibration || !groups.evaluation || !frozen) set = SamplesFromSafetensors(file.path, "calib", rules);
    if (groups.evaluation) Append(SamplesFromSafetensors(file.path, "eval", rules), data.evaluation, data.skipped);
  }
  if (!set.shortened.empty() && !data.shortened.empty()) data.shortened += "; ";
  data.shortened += set.shortened;
  if (static_cast<int64_t>(set.samples.size()) > file.most) set.samples.resize(file.most);
  for (const Sample& sample : set.samples) {
    if (frozen) break;
    AddPictures(sample, data.calibrated_on);
    if (!file.tensors)
      AddLines(processor.Get().tokenizer.Decode(sample.input_ids, /*skip_special=*/true), data.calibrated_on);
  }
  Append(std::move(set), data.calibration, data.skipped);
}

// Held-out samples as JSON lines. Those that were calibrated on are told.
void ReadEvaluation(const QuantizeOptions& options, const SampleOptions& rules, LazyProcessor& processor,
                    RunData& data) {
  if (!data.evaluation.empty())
    Fail("--eval-data: {} has evaluation samples (eval.N.*) already; leave one of them out", options.samples.string());
  if (options.eval_data.extension() == ".safetensors")
    Fail("--eval-data {}: takes JSON lines; tensors named eval.N.* are evaluation samples of --samples",
         options.eval_data.string());
  SampleSet set = LoadJsonl(ReadLines(options.eval_data, data), processor.Get(), rules);
  if (!set.shortened.empty()) data.shortened += (data.shortened.empty() ? "" : "; ") + set.shortened;
  const auto hash_of = [](const Sample& sample) {
    DataHashes hashes;
    AddPictures(sample, hashes);
    std::string all = Sha256(std::as_bytes(std::span(sample.input_ids)));
    for (const std::string& picture : hashes.pictures) all += picture;
    return all;
  };
  std::set<std::string> calibrated;
  for (const Sample& sample : data.calibration) calibrated.insert(hash_of(sample));
  const auto again = [&](const Sample& sample) { return calibrated.contains(hash_of(sample)); };
  if (const auto first = std::ranges::find_if(set.samples, again); first != set.samples.end())
    data.overlaps.push_back(fmt::format("{}: {} of {} samples are calibration samples too, the first: {}",
                                        options.eval_data.string(), std::ranges::count_if(set.samples, again),
                                        set.samples.size(), first->source));
  Append(std::move(set), data.evaluation, data.skipped);
}

void ReadCaptions(const fs::path& path, const SampleOptions& rules, const Processor& processor, RunData& data) {
  data.captions = LoadCaptions(ReadLines(path, data), processor, rules);
  const int64_t turn_end = processor.tokenizer.RequireId("<turn|>");
  for (const CaptionTask& task : data.captions) {
    data.answers.push_back(processor.tokenizer.Encode(task.caption, /*add_special=*/false));
    data.answers.back().push_back(turn_end);
  }
}

void ReadWindows(const fs::path& path, std::optional<int64_t> most, const Gemma4Config& config,
                 LazyProcessor& processor, RunData& data) {
  const std::string text = ReadFile(path);
  data.windows = Within(path.string(), [&] {
    return PerplexityWindows(text, processor.Get().tokenizer, kWindow, config.text.bos_token_id);
  });
  if (most && *most < static_cast<int64_t>(data.windows.size())) data.windows.resize(*most);
}

// What is measured and was calibrated on: an Error where `strict` asks for it.
void FindOverlaps(const QuantizeOptions& options, RunData& data) {
  const auto tell = [&](const fs::path& path, const std::string& overlap) {
    if (!overlap.empty()) data.overlaps.push_back(fmt::format("{}: {}", path.string(), overlap));
  };
  if (!options.eval_text.empty()) tell(options.eval_text, OverlapOf(ReadFile(options.eval_text), data.calibrated_on));
  tell(options.eval_captions, OverlapOf(data.captions, data.calibrated_on));
  if (options.strict && !data.overlaps.empty())
    Fail("{}; figures of such data flatter: take it out of either, or leave out --strict", data.overlaps.front());
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

void AddRandomSamples(const RandomShape& shape, int64_t images, const Gemma4Config& config, RunData& data) {
  const std::vector<int64_t> forbidden{config.image_token_id, config.video_token_id, config.audio_token_id,
                                       config.text.pad_token_id};
  constexpr uint64_t kSeed = 42;
  data.random = true;
  data.calibration = RandomSamples(shape.count, shape.length, kSeed, config.text.vocab_size, forbidden);
  if (images == 0) return;
  if (!config.vision) Fail("--random-images: the model has no vision tower");
  const VisionProfile profile = RandomProfile(*config.vision);
  constexpr int64_t kTextBehind = 60;
  std::vector<Sample> prompts =
      RandomSamples(images, profile.VisualEnd() + kTextBehind, kSeed + 1, config.text.vocab_size, forbidden);
  for (Sample& prompt : prompts)
    data.calibration.push_back(
        PatternSample(profile, config, std::move(prompt.input_ids), prompt.source + " with a picture"));
}

}  // namespace

std::function<Tensor(Tensor)> PixelHolder(int64_t budget, const std::function<fs::path()>& directory) {
  return [=, held = int64_t{0}](Tensor pixels) mutable {
    held += pixels.Bytes();
    if (held <= budget) return pixels;
    const fs::path place = directory();
    RequireFreeSpace(place, pixels.Bytes());
    const auto file = MappedFile::Nameless(place, [&](const auto& append) {
      append({pixels.Raw(), static_cast<size_t>(pixels.Bytes())});
    });
    return Tensor(pixels.Type(), const_cast<std::byte*>(file->Bytes().data()), file);
  };
}

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

// Without a calibration picture nothing is known of the vision tower's ranges.
void RequireCalibrationPictures(const RunData& data) {
  const auto pictured = [](const Sample& sample) { return !sample.pixel_values.Empty(); };
  if (std::ranges::any_of(data.calibration, pictured)) return;
  const auto refuse = [](const std::string& what) {
    Fail("{} has a picture, and no calibration sample has one; calibrate on pictures too, or measure without them",
         what);
  };
  if (const auto sample = std::ranges::find_if(data.evaluation, pictured); sample != data.evaluation.end())
    refuse(sample->source);
  if (!data.captions.empty()) refuse(data.captions[0].prompt.source);
}

RunData ReadData(const QuantizeOptions& options, const Settings& settings, const Gemma4Config& config) {
  const std::vector<SampleFile> files = SampleFiles(options, settings);
  if (options.eval_data == options.data && options.data == "-")
    Fail("--eval-data -: standard input is read by --data; write one of them to a file");
  if (options.long_samples != LongSamples::kRefuse && !options.max_seq_len)
    Fail("--truncate and --chunk: shorten samples to --max-seq-len; give that too");
  const SampleOptions rules{.vocab_size = config.text.vocab_size,
                            .max_length = options.max_seq_len.value_or(0),
                            .longer = options.long_samples,
                            .bos = config.text.bos_token_id,
                            .patch_positions = config.vision ? config.vision->position_embedding_size : 0,
                            .text_only = options.text_only || !config.vision.has_value(),
                            .placeholders = {config.image_token_id, config.video_token_id, config.audio_token_id},
                            .hold_pixels = PixelHolder(options.memory_limit / 20, TemporaryDirectory)};
  LazyProcessor processor(options.model);
  RunData data;
  for (const SampleFile& file : files) ReadSamples(file, !options.qparams.empty(), rules, processor, data);
  if (!options.random_samples.empty())
    AddRandomSamples(ParseRandom(options.random_samples), options.random_images, config, data);
  if (!options.eval_data.empty()) ReadEvaluation(options, rules, processor, data);
  if (!options.eval_text.empty()) ReadWindows(options.eval_text, options.eval_windows, config, processor, data);
  if (!options.eval_captions.empty()) {
    if (!config.vision)
      Fail("--eval-captions {}: {} has no vision tower to see the pictures with; leave it out",
           options.eval_captions.string(), options.model.string());
    ReadCaptions(options.eval_captions, rules, processor.Get(), data);
  }
  for (const std::vector<Sample>* samples : {&data.calibration, &data.evaluation})
    for (const Sample& sample : *samples)
      if (data.dated.empty()) data.dated = sample.date_place;
  for (const CaptionTask& task : data.captions)
    if (data.dated.empty()) data.dated = task.prompt.date_place;
  FindOverlaps(options, data);
  if (options.qparams.empty()) RequireCalibrationPictures(data);
  if (!files.empty() && data.calibration.empty() && (options.qparams.empty() || data.evaluation.empty()))
    Fail("no calibration sample is left: {} have pictures, which this run leaves out", data.skipped.size());
  return data;
}

void MeasureOne(int64_t most, RunData& data) {
  if (data.evaluation.empty()) {
    if (data.calibration.size() < 2)
      Fail("{}: {} sample; a trace calibrates on all but the last and needs at least 2",
           data.calibration.empty() ? "the data" : data.calibration[0].source, data.calibration.size());
    data.evaluation.push_back(std::move(data.calibration.back()));
    data.calibration.pop_back();
  }
  data.evaluation.resize(1);
  Sample& measured = data.evaluation[0];
  if (!measured.attention_mask.empty()) {
    std::vector<int64_t> real;
    for (size_t i = 0; i < measured.input_ids.size(); ++i)
      if (measured.attention_mask[i] != 0) real.push_back(measured.input_ids[i]);
    measured.input_ids = std::move(real);
    measured.attention_mask.clear();
  }
  if (static_cast<int64_t>(data.calibration.size()) > most) data.calibration.resize(static_cast<size_t>(most));
  RequireCalibrationPictures(data);
}

void RunData::ReleasePictures() {
  for (std::vector<Sample>* samples : {&calibration, &evaluation})
    for (Sample& sample : *samples) sample.pixel_values = Tensor();
  for (CaptionTask& task : captions) task.prompt.pixel_values = Tensor();
}

}  // namespace circlet::gemma4
