#include "pipeline/run_state.h"

#include <algorithm>
#include <array>
#include <bit>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "ops/integer_product.h"
#include "pipeline/exchange.h"

namespace circlet {
using namespace gemma4;
namespace fs = std::filesystem;
namespace {

// Bits, since JSON has no infinities.
using MetricBits = std::array<uint64_t, sizeof(ErrorMetrics) / sizeof(uint64_t)>;

nlohmann::json SaveError(const StageError& error) {
  return {{"stage", error.stage},
          {"alone", std::bit_cast<MetricBits>(error.alone)},
          {"accumulated", std::bit_cast<MetricBits>(error.accumulated)}};
}

StageError RestoreError(const nlohmann::json& json) {
  const auto metrics = [&](const char* which) { return std::bit_cast<ErrorMetrics>(json.at(which).get<MetricBits>()); };
  return {.stage = json.at("stage"), .alone = metrics("alone"), .accumulated = metrics("accumulated")};
}

nlohmann::json SaveHead(const HeadResult& head) {
  nlohmann::json scatter = nlohmann::json::array();
  for (const auto& [f, q] : head.scatter) scatter.push_back({std::bit_cast<uint32_t>(f), std::bit_cast<uint32_t>(q)});
  return {{"error", SaveError(head.error)},
          {"shape", head.shape.Sizes()},
          {"scatter", std::move(scatter)},
          {"nll", {std::bit_cast<uint64_t>(head.float_nll), std::bit_cast<uint64_t>(head.quantized_nll)}},
          {"counts", {head.window_tokens, head.captions, head.float_exact, head.quantized_exact}}};
}

HeadResult RestoreHead(const nlohmann::json& json) {
  HeadResult head{.error = RestoreError(json.at("error")),
                  .shape = Shape(json.at("shape").get<std::vector<int64_t>>())};
  for (const auto& pair : json.at("scatter"))
    head.scatter.emplace_back(std::bit_cast<float>(pair.at(0).get<uint32_t>()),
                              std::bit_cast<float>(pair.at(1).get<uint32_t>()));
  head.float_nll = std::bit_cast<double>(json.at("nll").at(0).get<uint64_t>());
  head.quantized_nll = std::bit_cast<double>(json.at("nll").at(1).get<uint64_t>());
  const auto counts = json.at("counts").get<std::array<int64_t, 4>>();
  std::tie(head.window_tokens, head.captions, head.float_exact, head.quantized_exact) =
      std::tie(counts[0], counts[1], counts[2], counts[3]);
  return head;
}

// Of all sequences, and of the pictures of this process.
std::string HashOf(const RunContext& context) {
  std::string all;
  const auto add = [&](const auto& values) { all += Sha256(std::as_bytes(std::span(values.data(), values.size()))); };
  for (const TextItem& text : context.texts) {
    all += text.item.label;
    add(text.ids);
    add(text.keep);
    add(text.places);
  }
  for (const ImageItem& image : context.images) {
    add(image.positions);
    if (!image.pixel_values.Empty())
      add(std::span(image.pixel_values.Raw(), static_cast<size_t>(image.pixel_values.Bytes())));
  }
  return Sha256(std::as_bytes(std::span(all)));
}

// "data: calib.jsonl" for the first member that differs.
std::string FirstChange(const nlohmann::json& before, const nlohmann::json& now, const std::string& place) {
  if (!before.is_object() || !now.is_object()) {
    const auto text = [](const nlohmann::json& value) { return value.is_null() ? "nothing" : value.dump(); };
    const std::string a = text(before), b = text(now);
    constexpr size_t kLong = 80;
    if (a.size() > kLong || b.size() > kLong) return place;
    return fmt::format("{}: was {}, is {}", place, a, b);
  }
  for (const nlohmann::json* side : {&before, &now})
    for (const auto& [key, value] : side->items()) {
      const nlohmann::json a = before.value(key, nlohmann::json()), b = now.value(key, nlohmann::json());
      if (a != b) return FirstChange(a, b, place.empty() ? key : place + " " + key);
    }
  return place;
}

}  // namespace

nlohmann::json SaveChange(const ComputeChange& change) {
  return {{"sample", change.sample},
          {"points", change.points},
          {"changes",
           {std::bit_cast<uint64_t>(change.mean_range_change), std::bit_cast<uint64_t>(change.max_range_change)}},
          {"max_point", change.max_point},
          {"logits", std::bit_cast<MetricBits>(change.logits)}};
}

ComputeChange RestoreChange(const nlohmann::json& json) {
  return {.sample = json.at("sample"),
          .points = json.at("points"),
          .mean_range_change = std::bit_cast<double>(json.at("changes").at(0).get<uint64_t>()),
          .max_range_change = std::bit_cast<double>(json.at("changes").at(1).get<uint64_t>()),
          .max_point = json.at("max_point"),
          .logits = std::bit_cast<ErrorMetrics>(json.at("logits").get<MetricBits>())};
}

nlohmann::json IdentityOf(const QuantizeOptions& options, const RunContext& context, const nlohmann::json& inputs) {
  nlohmann::json files = nlohmann::json::object();
  for (const nlohmann::json& input : inputs) files[input.at("file").get<std::string>()] = input.at("sha256");
  return {{"circlet version", CIRCLET_VERSION},
          {"instruction set", InstructionSets()},
          {"file", files},
          {"recipe", context.calibration.GetRecipe().EffectiveYaml()},
          {"number of processes", context.world.Size()},
          {"samples or the pictures that they name", HashOf(context)},
          {"option",
           {{"--dialect", options.dialect},
            {"--random-samples", options.random_samples},
            {"--random-images", options.random_images},
            {"--max-seq-len", options.max_seq_len.value_or(0)},
            {"--eval-windows", options.eval_windows.value_or(0)},
            {"--eval-text", options.eval_text.filename().string()},
            {"--eval-captions", options.eval_captions.filename().string()},
            {"--data", options.data.filename().string()},
            {"--samples", options.samples.filename().string()},
            {"--qparams", options.qparams.filename().string()},
            {"--units", static_cast<int>(options.units)},
            {"--text-only", options.text_only},
            {"--vision-profile", options.vision_profile},
            {"--compute", options.compute == Compute::kBf16 ? "bf16" : "float32"}}}};
}

RunState::RunState(fs::path directory, nlohmann::json identity, double save_seconds, Communicator& world)
    : directory_(std::move(directory)), identity_(std::move(identity)), interval_(save_seconds), world_(world) {
  CreateDirectories(directory_);
}

std::vector<int> RunState::Numbers() const {
  std::vector<int> numbers;
  for (const auto& entry : fs::directory_iterator(directory_)) {
    int number = 0;
    char rest = 0;
    const std::string name = entry.path().filename();
    if (std::sscanf(name.c_str(), "state.%d.jso%c", &number, &rest) == 2 && rest == 'n' &&
        name == StatePath(number).filename())
      numbers.push_back(number);
  }
  return numbers;
}

int RunState::Load(RunParts& parts, const std::function<PointSpec(const std::string&)>& specs) {
  // A process may have been killed before it saved what another had saved: the newest that all have.
  const std::vector<int> mine = Numbers();
  std::vector<int> common = mine;
  for (const std::vector<int>& others : AllGather<int>(world_, mine))
    std::erase_if(common, [&](int number) { return std::ranges::find(others, number) == others.end(); });
  if (common.empty()) {
    for (const int number : mine) fs::remove(StatePath(number));
    return 0;
  }
  const int done = *std::ranges::max_element(common);
  const fs::path path = StatePath(done);
  try {
    const nlohmann::json state = ReadJson(path, int64_t{1} << 32);
    if (state.at("identity") != identity_)
      Fail("cannot go on with the unfinished run: {}; put it back, or start again with --force",
           FirstChange(state.at("identity"), identity_, ""));
    // Frozen grids come from their file, whose hash is part of the identity.
    params_files_ = state.at("params").get<std::vector<std::string>>();
    for (const std::string& file : params_files_) {
      const nlohmann::json json = ReadJson(directory_ / file, int64_t{1} << 32);
      const ParameterStore saved = ParseParameters(json.dump(), (directory_ / file).string());
      ParameterStore ordered;
      for (const auto& name : json.at("order")) {
        PointParams params = saved.Get(name.get<std::string>());
        params.spec = specs(params.spec.point);
        ordered.Set(std::move(params));
      }
      parts.calibration.Resume(ordered);
    }
    params_saved_ = parts.calibration.Params().Size();
    for (const auto& [name, observer] : state.at("observers").items())
      parts.calibration.Observers()[name] = Observer::FromState(observer);
    parts.units.Restore(state.at("units"));
    for (const nlohmann::json& error : state.at("errors")) parts.errors.push_back(RestoreError(error));
    if (!state.at("head").is_null()) parts.head = RestoreHead(state.at("head"));
    if (!state.at("change").is_null()) parts.change = RestoreChange(state.at("change"));
    parts.seconds = state.at("seconds").get<std::map<std::string, double>>();
    parts.store.Restore(state.at("values"));
  } catch (const nlohmann::json::exception& error) {
    Fail("{}: is damaged ({}); start again with --force", path.string(), error.what());
  }
  for (const int number : mine)
    if (number != done) fs::remove(StatePath(number));
  saved_ = true;
  return done;
}

void RunState::SaveNewParams(int done, const ParameterStore& params) {
  ParameterStore fresh;
  nlohmann::json order = nlohmann::json::array();
  for (; params_saved_ < params.Size(); ++params_saved_) {
    const std::string& name = params.Names()[params_saved_];
    fresh.Set(*params.Find(name));
    order.push_back(name);
  }
  if (fresh.Size() == 0) return;
  params_files_.push_back(fmt::format("params.{}.json", done));
  fresh.Save(directory_ / params_files_.back(), {{"order", order}});
}

void RunState::Save(int done, RunParts& parts) {
  const auto now = std::chrono::steady_clock::now();
  if (now - last_save_ < interval_ && world_.Size() == 1) return;
  if (!parts.calibration.Frozen()) SaveNewParams(done, parts.calibration.Params());
  nlohmann::json errors = nlohmann::json::array(), observers = nlohmann::json::object();
  for (const StageError& error : parts.errors) errors.push_back(SaveError(error));
  for (const auto& [name, observer] : parts.calibration.Observers()) observers[name] = observer->State();
  WriteJson(StatePath(done), {{"identity", identity_},
                              {"params", params_files_},
                              {"observers", observers},
                              {"units", parts.units.Save()},
                              {"errors", errors},
                              {"change", parts.change ? SaveChange(*parts.change) : nlohmann::json()},
                              {"head", parts.head ? SaveHead(*parts.head) : nlohmann::json()},
                              {"seconds", parts.seconds},
                              {"values", parts.store.Save()}});
  world_.Barrier();
  parts.store.Forget();
  for (const int number : Numbers())
    if (number != done) fs::remove(StatePath(number));
  last_save_ = std::chrono::steady_clock::now();
  saved_ = true;
}

}  // namespace circlet
