#include <algorithm>
#include <nlohmann/json.hpp>
#include <set>
#include <utility>

#include "circlet/base/error.h"
#include "circlet/circle/export.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/ops/matmul.h"
#include "circlet/preprocess/image.h"
#include "circlet/quant/affine.h"
#include "pipeline/output_directory.h"
#include "pipeline/units.h"
#include "runtime/units.h"

namespace circlet::runtime {
namespace {

namespace fs = std::filesystem;

// Points of a file round alike where their tensors have one grid.
AlikePoints SameGrids(const std::map<std::string, QParams>& grids) {
  return [&grids](const Point& a, const Point& b) {
    const auto of_a = grids.find(a.name), of_b = grids.find(b.name);
    return of_a != grids.end() && of_b != grids.end() && of_a->second == of_b->second;
  };
}

// What manifest.json says of the files beside it.
class Inventory {
 public:
  explicit Inventory(fs::path directory) : directory_(std::move(directory)) {
    const nlohmann::json tree = ReadJson(directory_ / kManifestFile);
    for (const JsonObject& output : JsonObject(tree, (directory_ / kManifestFile).string()).Objects("outputs"))
      files_[output.Required<std::string>("file")] = {output.Required<int64_t>("bytes"),
                                                      output.Required<std::string>("sha256")};
  }

  // Throws Error unless the file is there in its size; a file that is not listed only has to be there.
  void RequireThere(const std::string& name) const {
    const fs::path path = directory_ / name;
    if (fs::path(name).filename() != name)
      Fail("{}: \"{}\" is no plain file name", (directory_ / kPipelineFile).string(), name);
    std::error_code error;
    const auto bytes = static_cast<int64_t>(fs::file_size(path, error));
    if (error) Fail("{}: cannot be read: {}; quantize again", path.string(), error.message());
    const auto listed = files_.find(name);
    if (listed != files_.end() && listed->second.bytes != bytes)
      Fail("{}: has {} bytes, {} lists {}; quantize again", path.string(), bytes, kManifestFile, listed->second.bytes);
  }

  // The same of its content.
  fs::path Checked(const std::string& name) const {
    RequireThere(name);
    const auto listed = files_.find(name);
    if (listed != files_.end() && Sha256File(directory_ / name) != listed->second.sha256)
      Fail("{}: differs from the file that {} lists (SHA-256); quantize again", (directory_ / name).string(),
           kManifestFile);
    return directory_ / name;
  }

  // Tokenizer, template and settings, which others read from the directory.
  void CheckSettings() const {
    for (const auto& [name, entry] : files_)
      if ((name.ends_with(".json") || name.ends_with(".jinja")) && name != "qparams.json" && name != "report.json")
        Checked(name);
  }

 private:
  struct Entry {
    int64_t bytes;
    std::string sha256;
  };
  fs::path directory_;
  std::map<std::string, Entry> files_;
};

class FileUnit final : public RunnableUnit {
 public:
  FileUnit(const JsonObject& unit, int64_t context, const Inventory& inventory) : inventory_(inventory) {
    name = unit.Required<std::string>("name");
    file_ = unit.Required<std::string>("file");
    inventory.RequireThere(file_);
    for (const auto& [side, ends] : {std::pair{"inputs", &inputs}, std::pair{"outputs", &outputs}})
      for (const JsonObject& end : unit.Objects(side)) {
        ends->push_back({end.Required<std::string>("name"), end.Required<std::string>("key")});
        const nlohmann::json& shape = end.Raw("shape");
        if (ends->back().name == "mask" && unit.Has("layer") &&
            (!shape.is_array() || shape.empty() || shape.back() != context))
          end.FailAt("shape", fmt::format("is {}; a mask has the context's {} positions", Shown(shape), context));
      }
    if (const auto place = unit.OptionalObject("layer"))
      layer = LayerPlace{place->Required<int>("index"), place->Required<std::string>("attention"),
                         place->Required<int>("window"), place->Optional<bool>("bidirectional_pictures", false)};
  }

  Values Run(const Values& given) override {
    return Within(file_, [&] {
      const circle::Model& model = Model();
      Plan& plan = PlanFor(LengthOf(model, given));
      Values bound;
      for (size_t k = 0; k < inputs.size(); ++k) bound[model.tensors[model.inputs[k]].name] = given.at(inputs[k].name);
      Values computed = plan.executor.RunInPlace(bound, [&](const std::string& weight) {
        const circle::Tensor& tensor = model.tensors[plan.constants.at(weight)];
        return tensor.data.WithGrid(&*tensor.qparams);
      });
      Values results;
      for (size_t k = 0; k < outputs.size(); ++k) {
        const circle::Tensor& tensor = model.tensors[model.outputs[k]];
        const Tensor& value = computed.at(tensor.name);
        results[outputs[k].name] =
            tensor.qparams
                ? QuantizeWeight(value, *tensor.qparams, Rounding::kHalfAwayDivide).codes.WithGrid(&*tensor.qparams)
                : value.Clone();
      }
      return results;
    });
  }

  std::vector<Tensor> LinearWeights() override {
    std::set<int32_t> found;
    for (const circle::Operator& op : Model().operators)
      if (op.code == FullyConnected::kCircleCode) found.insert(op.inputs.at(1));
    std::vector<Tensor> weights;
    for (const int32_t index : found)
      if (index >= 0 && !model_->tensors[index].data.Empty()) weights.push_back(model_->tensors[index].data);
    return weights;
  }

  const circle::Model& Model() {
    if (model_) return *model_;
    model_ = circle::Read(inventory_.Checked(file_));
    if (model_->inputs.size() != inputs.size() || model_->outputs.size() != outputs.size())
      Fail("has {} inputs and {} outputs, {} lists {} and {}; quantize again", model_->inputs.size(),
           model_->outputs.size(), kPipelineFile, inputs.size(), outputs.size());
    for (const auto* ends : {&model_->inputs, &model_->outputs})
      for (const int32_t end : *ends) {
        const circle::Tensor& tensor = model_->tensors[end];
        if (tensor.qparams && (tensor.qparams->PerChannel() || BitWidth(tensor.qparams->dtype) % 8 != 0))
          Fail("\"{}\" is {} with {} scales; values between units are bytes on one grid", tensor.name,
               tensor.type.ToString(), tensor.qparams->scale.size());
      }
    return *model_;
  }

 private:
  // A graph of one length, ready to be run.
  struct Plan {
    explicit Plan(circle::FileGraph file)
        : constants(std::move(file.constants)),
          reading(file.grids),
          executor(Folded(file.graph, SameGrids(file.grids)), &reading, {.keep_codes = true}) {}
    std::map<std::string, int32_t> constants;
    circle::FileReading reading;
    Executor executor;
  };

  Plan& PlanFor(std::optional<int64_t> length) {
    std::unique_ptr<Plan>& plan = plans_[length.value_or(0)];
    if (plan == nullptr) plan = std::make_unique<Plan>(circle::ToGraph(*model_, length));
    return *plan;
  }

  // Of a file with an open size, the one that is given.
  std::optional<int64_t> LengthOf(const circle::Model& model, const Values& given) const {
    for (size_t k = 0; k < inputs.size(); ++k) {
      const circle::Tensor& tensor = model.tensors[model.inputs[k]];
      const Tensor& value = given.at(inputs[k].name);
      for (int axis = 0; axis < static_cast<int>(tensor.signature.size()); ++axis)
        if (tensor.signature[axis] < 0 && axis < value.GetShape().Rank()) return value.GetShape()[axis];
    }
    return std::nullopt;
  }

  const Inventory& inventory_;
  std::string file_;
  std::optional<circle::Model> model_;
  std::map<int64_t, std::unique_ptr<Plan>> plans_;
};

// Where a picture's soft tokens come from, and where the fusion puts them.
struct PictureLayout {
  int64_t position = 0, tokens = 0, patches = 0, height = 0, width = 0;
  std::string tables;  // file; empty: the units have theirs
};

class Files final : public UnitSource {
 public:
  explicit Files(const fs::path& directory) : directory_(directory), inventory_(directory) {
    const std::string place = (directory / kPipelineFile).string();
    inventory_.CheckSettings();
    const nlohmann::json tree = ReadJson(inventory_.Checked(kPipelineFile));
    const JsonObject pipeline(tree, place);
    const auto version = pipeline.Optional<int64_t>("schema_version", 1);
    if (version != kPipelineVersion)
      pipeline.FailAt("schema_version", fmt::format("{}; units are run by version {}; {}", version, kPipelineVersion,
                                                    version == 1 ? "quantize again with this circlet"
                                                                 : "take the circlet that wrote it"));
    ReadFacts(pipeline);
    for (const JsonObject& unit : pipeline.Objects("units")) {
      auto made = std::make_unique<FileUnit>(unit, facts_.context, inventory_);
      units_[made->name] = std::move(made);
    }
    const JsonObject phases = pipeline.Object("phases");
    for (const auto& [phase, units] : {std::pair{"picture", &picture_}, {"prefill", &prefill_}, {"decode", &decode_}})
      for (const auto& name : phases.Required<std::vector<std::string>>(phase)) {
        const auto unit = units_.find(name);
        if (unit == units_.end()) phases.FailAt(phase, fmt::format("there is no unit \"{}\"", name));
        units->push_back(unit->second.get());
      }
    if (prefill_.empty()) phases.FailAt("prefill", "lists no unit");
    // It reads one position of what the others compute.
    head_ = prefill_.back();
    prefill_.pop_back();
    if (!decode_.empty()) decode_.pop_back();
    facts_.decodes = !decode_.empty();
    if (head_->inputs.size() != 1 || head_->outputs.empty())
      pipeline.FailAt("units", fmt::format("{}: has {} inputs and {} outputs, expected hidden states and logits",
                                           head_->name, head_->inputs.size(), head_->outputs.size()));
    const auto fusion = std::ranges::find_if(prefill_, [](const RunnableUnit* unit) {
      return std::ranges::any_of(unit->inputs, [](const End& end) { return end.name == "visual"; });
    });
    if (fusion != prefill_.end()) fusion_ = static_cast<FileUnit*>(*fusion);
    if (fusion_ != nullptr && (fusion_->inputs.size() != 2 || fusion_->inputs[0].name != "text" ||
                               fusion_->inputs[1].name != "visual" || fusion_->outputs.size() != 1))
      pipeline.FailAt("units", fmt::format("{}: expected inputs text and visual, one output", fusion_->name));
    facts_.pictures = fusion_ != nullptr && !picture_.empty() && layout_.tokens > 0;
    tables_.emplace(SafetensorsFile::Open(inventory_.Checked(pipeline.Required<std::string>("tables"))));
  }

  const ModelFacts& Facts() const override { return facts_; }
  int64_t PaddedLength(int64_t) const override { return facts_.context; }
  std::string_view LongerBy() const override { return "export with --max-seq-len"; }
  std::vector<RunnableUnit*> Prefill(int64_t) override { return prefill_; }
  std::vector<RunnableUnit*> Decode() override {
    if (decode_.empty()) Fail("{}: {}", directory_.string(), kNoDecoding);
    return decode_;
  }
  RunnableUnit& Head() override { return *head_; }
  float MaskFill() const override { return mask_fill_; }

  Tensor Rope(const std::string& attention, bool cosine, int64_t first, int64_t count) override {
    const std::string name = (cosine ? "cos." : "sin.") + attention;
    const Tensor& table = tables_->Get(name);
    if (table.GetShape().Rank() != 3 || table.GetShape()[1] < facts_.context || table.GetDType() != DType::kF32)
      Fail("{}: {} is {}, expected float32 [1,{},size]", tables_->Path().string(), name, table.Type().ToString(),
           facts_.context);
    return table.Slice(first, first + count, 1);
  }

  std::string PictureFault(std::span<const int64_t> positions) const override {
    int64_t height = 0, width = 0;
    for (size_t i = 0; i + 1 < positions.size(); i += 2) {
      width = std::max(width, positions[i] + 1);
      height = std::max(height, positions[i + 1] + 1);
    }
    if (height == layout_.height && width == layout_.width && std::ssize(positions) == 2 * layout_.patches) return "";
    return fmt::format(
        "the picture becomes {}x{} patches of {}, the vision units were exported for {}x{} of {}; crop it to that "
        "shape, or export with a --vision-profile of its own",
        height, width, positions.size() / 2, layout_.height, layout_.width, layout_.patches);
  }

  Tensor Features(const Tensor& pixels, std::span<const int64_t> /*those of the units*/) override {
    std::map<std::string, Tensor> values;
    for (RunnableUnit* unit : picture_) {
      Values in;
      for (const End& end : unit->inputs) {
        if (end.name == "pixel_values")
          in[end.name] = PixelValues(pixels);
        else if (const auto value = values.find(end.key); value != values.end())
          in[end.name] = value->second;
        else
          in[end.name] = PictureTables().Get(end.name);
      }
      const Values out = unit->Run(in);
      for (const End& end : unit->outputs) values[end.key] = out.at(end.name);
    }
    const auto features = values.find(fusion_->inputs[1].key);
    if (features == values.end() || features->second.GetShape().Rank() != 2 ||
        features->second.GetShape()[0] != layout_.tokens)
      Fail("the picture's units give no {} soft tokens ({}); quantize again", layout_.tokens, fusion_->inputs[1].key);
    return features->second;
  }

  // The unit has one place for one picture. Its rows there are the picture's soft tokens on the sequence's grid, and
  // may stand anywhere: so a picture at another place, or several, need no other unit.
  Tensor Fused(const Tensor& text, std::span<const Tensor> features, std::span<const int64_t> places) override {
    const auto fuse = [&](const Tensor& visual) {
      return fusion_->Run({{fusion_->inputs.at(0).name, text}, {fusion_->inputs.at(1).name, visual}})
          .at(fusion_->outputs.at(0).name);
    };
    const int64_t row = text.Bytes() / text.GetShape()[1];
    if (features.size() == 1 && places[0] == layout_.position && places.back() == layout_.position + layout_.tokens - 1)
      return fuse(features[0]);
    Tensor sequence;
    size_t used = 0;
    for (const Tensor& visual : features) {
      const Tensor fused = fuse(visual);
      if (sequence.Empty()) {
        if (fused.Grid() == nullptr || text.Grid() == nullptr || *fused.Grid() != *text.Grid() ||
            fused.Type() != text.Type() || layout_.position + layout_.tokens > fused.GetShape()[1])
          Fail(
              "the picture begins at position {}, the units were exported for one picture at {}; export with "
              "--vision-profile for that place",
              places[0], layout_.position);
        sequence = Gridded(text.Clone(), text);
      }
      for (int64_t i = 0; i < layout_.tokens; ++i, ++used)
        std::copy_n(fused.Raw() + (layout_.position + i) * row, row, sequence.Raw() + places[used] * row);
    }
    return sequence;
  }

 private:
  void ReadFacts(const JsonObject& pipeline) {
    facts_ = {.context = pipeline.Required<int64_t>("context"),
              .vocabulary = pipeline.Required<int64_t>("vocabulary"),
              .bos = pipeline.Required<int64_t>("bos_token_id"),
              .pad = pipeline.Required<int64_t>("pad_token_id"),
              .stops = pipeline.Required<std::vector<int64_t>>("stop_token_ids")};
    if (facts_.pad < 0 || facts_.pad >= facts_.vocabulary)
      pipeline.FailAt("pad_token_id", fmt::format("{}; the vocabulary is {}", facts_.pad, facts_.vocabulary));
    if (facts_.context < 1 || facts_.context > (int64_t{1} << 24))
      pipeline.FailAt("context", fmt::format("{}; expected 1 to 2^24", facts_.context));
    const JsonObject ids = pipeline.Object("placeholder_token_ids");
    facts_.placeholders = {ids.Optional<int64_t>("image", -1), ids.Optional<int64_t>("video", -1),
                           ids.Optional<int64_t>("audio", -1)};
    const JsonObject cache = pipeline.Object("cache"), mask = pipeline.Object("mask");
    if (cache.Required<int64_t>("slots") != facts_.context || cache.Required<int64_t>("first_past_slot") != 0 ||
        cache.Required<int64_t>("newest_slot") != facts_.context - 1 || mask.Required<float>("seen") != 0)
      pipeline.FailAt("cache", "another rule than: past from slot 0 on, the newest in the last one, seen keys 0");
    mask_fill_ = mask.Required<float>("unseen");
    if (const auto picture = pipeline.OptionalObject("picture")) {
      const auto grid = picture->Required<std::vector<int64_t>>("patch_grid");
      if (grid.size() != 2) picture->FailAt("patch_grid", "expected height and width");
      layout_ = {picture->Required<int64_t>("position"),
                 picture->Required<int64_t>("soft_tokens"),
                 picture->Required<int64_t>("patches"),
                 grid[0],
                 grid[1],
                 picture->Optional<std::string>("tables", "")};
      if (layout_.position < 0 || layout_.tokens < 1 || layout_.position > facts_.context - layout_.tokens)
        picture->FailAt("position", fmt::format("{} soft tokens from {} on do not fit {} positions", layout_.tokens,
                                                layout_.position, facts_.context));
    }
  }

  const SafetensorsFile& PictureTables() {
    if (!picture_tables_) picture_tables_.emplace(SafetensorsFile::Open(inventory_.Checked(layout_.tables)));
    return *picture_tables_;
  }

  fs::path directory_;
  Inventory inventory_;
  ModelFacts facts_;
  float mask_fill_ = 0;
  PictureLayout layout_;
  std::map<std::string, std::unique_ptr<FileUnit>> units_;
  std::vector<RunnableUnit*> picture_, prefill_, decode_;
  RunnableUnit* head_ = nullptr;
  FileUnit* fusion_ = nullptr;
  std::optional<SafetensorsFile> tables_, picture_tables_;
};

// What was given instead of an output directory of quantize.
void CheckDirectory(const fs::path& directory) {
  std::error_code error;
  if (!fs::exists(directory, error))
    Fail("{}: there is no such directory; give the one that quantize wrote, or a checkpoint", directory.string());
  if (!fs::exists(directory / kManifestFile, error))
    Fail("{}: is neither an output of quantize (it has no {}) nor a checkpoint (no config.json)", directory.string(),
         kManifestFile);
}

}  // namespace

std::unique_ptr<UnitSource> OpenFiles(const std::filesystem::path& directory) {
  CheckDirectory(directory);
  return std::make_unique<Files>(directory);
}

}  // namespace circlet::runtime
