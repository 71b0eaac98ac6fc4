#include "pipeline/gemma4/items.h"

#include <algorithm>

#include "circlet/model/gemma4/vision.h"

namespace circlet::gemma4 {
namespace {

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

// Sequences go round the processes; the one that writes the files has the one that verifies them.
int RankOf(const NewItem& item, const Context& context) {
  return item.kind == ItemKind::kVerify ? 0 : static_cast<int>(context.texts.Size() % context.world_size);
}

// A control item runs where the one that it repeats does.
void SetControl(Item& item, const Item& repeated) {
  item.control_of = repeated.id;
  item.rank = repeated.rank;
}

void Trim(Picture& picture, const VisionConfig& vision) {
  const int64_t valid = LayoutOf(vision, picture.positions).valid;
  picture.positions.resize(valid * 2);
  picture.pixel_values = picture.pixel_values.Slice(0, valid, 1);
}

int AddPicture(const Item& text, const Sample& sample, int64_t number, Context& context) {
  const VisionConfig& vision = *context.config.vision;
  const Tensor positions = sample.image_position_ids.Slice(number, number + 1, 0);
  Picture picture{.pixel_values = sample.pixel_values.Slice(number, number + 1, 0),
                  .positions = {positions.I64().begin(), positions.I64().end()}};
  picture.budget = LayoutOf(vision, picture.positions).slots;
  // Padding patches change nothing that is read, so only the verification picture carries them, as the exported graphs
  // do; with run_padding_patches ranges cover them too.
  if (text.kind != ItemKind::kVerify && !context.GetDialect().run_padding_patches) Trim(picture, vision);
  // Observers tell pictures apart by number; calibration pictures come first, so theirs do not depend on the others.
  Item item{.id = Context::kFirstPicture + static_cast<int>(context.pictures.size()),
            .kind = text.kind,
            .index = static_cast<int64_t>(context.pictures.size()),
            .length = static_cast<int64_t>(picture.positions.size()) / 2,
            .rank = text.rank};
  if (text.control_of >= 0) SetControl(item, context.ImageItem(context.sequences[text.control_of].pictures[number]));
  if (text.rank != context.world_rank) picture.pixel_values = Tensor();
  item.real = {{0, LayoutOf(vision, picture.positions).valid}};
  item.variant.assign(reinterpret_cast<const char*>(picture.positions.data()),
                      picture.positions.size() * sizeof(int64_t));
  item.label = number == 0 ? text.label : fmt::format("{}.image.{}", text.label, number);
  context.images.Add(item);
  context.pictures.push_back(std::move(picture));
  return item.id;
}

void AddSample(const Sample& sample, ItemKind kind, size_t index, std::string label, Context& context) {
  AddItem({.kind = kind,
           .index = static_cast<int64_t>(index),
           .label = std::move(label),
           .ids = sample.input_ids,
           .keep = {sample.attention_mask.begin(), sample.attention_mask.end()},
           .sample = &sample},
          context);
}

}  // namespace

void AddItem(NewItem made, Context& context) {
  if (made.keep.empty()) made.keep.assign(made.ids.size(), 1);
  Sequence sequence{.keep = std::move(made.keep), .answer = made.answer};
  Item item{.id = static_cast<int>(context.texts.Size()),
            .kind = made.kind,
            .index = made.index,
            .length = static_cast<int64_t>(made.ids.size()),
            .label = made.label,
            .rank = RankOf(made, context)};
  if (made.control_of >= 0) SetControl(item, context.texts[made.control_of]);
  std::vector<int64_t> soft_tokens;
  if (made.sample != nullptr && !made.sample->pixel_values.Empty())
    for (int64_t i = 0; i < made.sample->pixel_values.GetShape()[0]; ++i) {
      sequence.pictures.push_back(
          Within(made.sample->source, [&] { return AddPicture(item, *made.sample, i, context); }));
      soft_tokens.push_back(LayoutOf(*context.config.vision, context.pictures.back().positions).tokens);
    }
  Within(made.sample == nullptr ? made.label : made.sample->source,
         [&] { sequence.places = CheckPlaceholders(context.config, made.ids, soft_tokens); });
  sequence.ids = WithoutPlaceholders(context.config, made.ids);
  item.real = RunsOf(sequence.keep);
  if (!sequence.pictures.empty()) item.variant = "pictures";
  if (sequence.FirstRead() > 0) item.variant += fmt::format(" from {}", sequence.FirstRead());
  context.texts.Add(std::move(item));
  context.sequences.push_back(std::move(sequence));
}

void MakeItems(const RunData& data, Compute compute, std::optional<int64_t> max_seq_len, Context& context) {
  for (size_t i = 0; i < data.calibration.size(); ++i)
    AddSample(data.calibration[i], ItemKind::kCalibration, i, fmt::format("calib.{}", i), context);
  for (size_t i = 0; i < data.evaluation.size(); ++i)
    AddSample(data.evaluation[i], ItemKind::kEvaluation, i, fmt::format("eval.{}", i), context);
  for (size_t i = 0; i < data.windows.size(); ++i)
    AddItem({.kind = ItemKind::kWindow,
             .index = static_cast<int64_t>(i),
             .label = fmt::format("window.{}", i),
             .ids = data.windows[i]},
            context);
  for (size_t i = 0; i < data.captions.size(); ++i) {
    const Sample& prompt = data.captions[i].prompt;
    std::vector<int64_t> ids = prompt.input_ids;
    ids.insert(ids.end(), data.answers[i].begin(), data.answers[i].end());
    AddItem({.kind = ItemKind::kCaption,
             .index = static_cast<int64_t>(i),
             .label = fmt::format("caption.{}", i),
             .ids = std::move(ids),
             .sample = &prompt,
             .answer = static_cast<int64_t>(prompt.input_ids.size())},
            context);
  }
  if (compute == Compute::kBf16 && !data.calibration.empty()) {
    const auto pictured =
        std::ranges::find_if(data.calibration, [](const Sample& s) { return !s.pixel_values.Empty(); });
    const int index = pictured == data.calibration.end() ? 0 : static_cast<int>(pictured - data.calibration.begin());
    const Sample& sample = data.calibration[index];
    AddItem({.kind = ItemKind::kControl,
             .index = index,
             .label = "control",
             .ids = sample.input_ids,
             .keep = {sample.attention_mask.begin(), sample.attention_mask.end()},
             .sample = &sample,
             .control_of = index},
            context);
  }
  context.texts.ChooseAlone();
  context.images.ChooseAlone();

  int64_t longest = 1;
  for (const Item& text : context.texts)
    if (text.kind == ItemKind::kCalibration || text.kind == ItemKind::kEvaluation)
      longest = std::max(longest, text.length);
  context.max_seq_len = max_seq_len.value_or((longest + 7) / 8 * 8);
  if (context.max_seq_len < 2 || context.max_seq_len > kLongestSequence)
    Fail("sequence length {}: expected 2 .. {}", context.max_seq_len, kLongestSequence);
  if (longest > context.max_seq_len)
    Fail("a sample has {} tokens, the exported sequence length is {}; raise --max-seq-len", longest,
         context.max_seq_len);
}

}  // namespace circlet::gemma4
