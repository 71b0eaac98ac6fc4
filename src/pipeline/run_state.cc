#include "pipeline/run_state.h"

#include <algorithm>
#include <array>
#include <bit>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "ops/integer_product.h"
#include "pipeline/exchange.h"

namespace circlet {
namespace fs = std::filesystem;
namespace {

// Figures as bits, since JSON has no infinities.
template <typename Figures>
using BitsOf = std::array<uint64_t, sizeof(Figures) / sizeof(uint64_t)>;

template <typename Figures>
nlohmann::json SaveBits(const Figures& figures) {
  return std::bit_cast<BitsOf<Figures>>(figures);
}
template <typename Figures>
nlohmann::json SaveBits(const std::optional<Figures>& figures) {
  return figures ? SaveBits(*figures) : nlohmann::json();
}

template <typename Figures>
void RestoreBits(const nlohmann::json& json, Figures& figures) {
  figures = std::bit_cast<Figures>(json.get<BitsOf<Figures>>());
}
template <typename Figures>
void RestoreBits(const nlohmann::json& json, std::optional<Figures>& figures) {
  if (!json.is_null()) RestoreBits(json, figures.emplace());
}

nlohmann::json SaveError(const StageError& error) {
  return {{"stage", error.stage},
          {"alone", {SaveBits(error.alone), SaveBits(error.alone_by_position)}},
          {"accumulated", {SaveBits(error.accumulated), SaveBits(error.accumulated_by_position)}}};
}

StageError RestoreError(const nlohmann::json& json) {
  StageError error{.stage = json.at("stage")};
  RestoreBits(json.at("alone").at(0), error.alone);
  RestoreBits(json.at("alone").at(1), error.alone_by_position);
  RestoreBits(json.at("accumulated").at(0), error.accumulated);
  RestoreBits(json.at("accumulated").at(1), error.accumulated_by_position);
  return error;
}

nlohmann::json SaveLinear(const RoundedLinear& linear) {
  const auto bits = [](double value) { return std::bit_cast<int64_t>(value); };
  return {linear.name,          linear.rows,         linear.columns,    linear.positions,
          linear.dead_columns,  bits(linear.damping), bits(linear.loss), bits(linear.nearest_loss),
          linear.rows_to_nearest, linear.rows_corrected};
}

RoundedLinear RestoreLinear(const nlohmann::json& json) {
  const auto number = [&](size_t i) { return json.at(i).get<int64_t>(); };
  const auto real = [&](size_t i) { return std::bit_cast<double>(number(i)); };
  return {.name = json.at(0),
          .rows = number(1),
          .columns = number(2),
          .positions = number(3),
          .dead_columns = number(4),
          .damping = real(5),
          .loss = real(6),
          .nearest_loss = real(7),
          .rows_to_nearest = number(8),
          .rows_corrected = number(9)};
}

nlohmann::json SaveHead(const HeadResult& head) {
  nlohmann::json scatter = nlohmann::json::array();
  for (const auto& [f, q] : head.scatter) scatter.push_back({std::bit_cast<uint32_t>(f), std::bit_cast<uint32_t>(q)});
  return {{"error", SaveError(head.error)},        {"shape", head.shape.Sizes()},
          {"scatter", std::move(scatter)},         {"perplexity", SaveBits(head.perplexity)},
          {"agreement", SaveBits(head.agreement)}, {"captions", SaveBits(head.captions)}};
}

HeadResult RestoreHead(const nlohmann::json& json) {
  HeadResult head{.error = RestoreError(json.at("error")),
                  .shape = Shape(json.at("shape").get<std::vector<int64_t>>())};
  for (const auto& pair : json.at("scatter"))
    head.scatter.emplace_back(std::bit_cast<float>(pair.at(0).get<uint32_t>()),
                              std::bit_cast<float>(pair.at(1).get<uint32_t>()));
  RestoreBits(json.at("perplexity"), head.perplexity);
  RestoreBits(json.at("agreement"), head.agreement);
  RestoreBits(json.at("captions"), head.captions);
  return head;
}

std::string HashOf(const nlohmann::json& json) {
  const std::string text = json.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);  // names of files
  return Sha256(std::as_bytes(std::span(text)));
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

// A pipe of the shell, <(command), has another number each time; what came out of it is known by its hash.
std::string NameOf(const fs::path& path) {
  const fs::path folder = path.parent_path();
  return folder == "/dev/fd" || folder == "/proc/self/fd" ? "pipe" : path.filename().string();
}

}  // namespace

nlohmann::json SaveChange(const ComputeChange& change) {
  return {{"sample", change.sample},
          {"points", change.points},
          {"changes", {SaveBits(change.mean_range_change), SaveBits(change.max_range_change)}},
          {"max_point", change.max_point},
          {"logits", SaveBits(change.logits)}};
}

ComputeChange RestoreChange(const nlohmann::json& json) {
  ComputeChange change{.sample = json.at("sample"), .points = json.at("points"), .max_point = json.at("max_point")};
  RestoreBits(json.at("changes").at(0), change.mean_range_change);
  RestoreBits(json.at("changes").at(1), change.max_range_change);
  RestoreBits(json.at("logits"), change.logits);
  return change;
}

nlohmann::json IdentityOf(const QuantizeOptions& options, const Recipe& recipe, int processes,
                          const std::string& samples_hash, const nlohmann::json& inputs) {
  nlohmann::json files = nlohmann::json::object();
  for (const nlohmann::json& input : inputs) {
    std::string name = input.at("file");
    while (files.contains(name)) name += " of another folder";
    files[name] = input.at("sha256");
  }
  return {{"circlet version", CIRCLET_VERSION},
          {"instruction set", InstructionSets()},
          {"file", files},
          {"recipe", recipe.EffectiveYaml()},
          {"number of processes", processes},
          {kSamplesIdentity, samples_hash},
          {"option",
           {{"--dialect", options.dialect},
            {"--random-samples", options.random_samples},
            {"--random-images", options.random_images},
            {"--max-seq-len", options.max_seq_len.value_or(0)},
            {"--eval-windows", options.eval_windows.value_or(0)},
            {"--eval-data", options.eval_data.filename().string()},
            {"--eval-text", options.eval_text.filename().string()},
            {"--eval-captions", options.eval_captions.filename().string()},
            {"--data", NameOf(options.data)},
            {"--samples", options.samples.filename().string()},
            {"--qparams", options.qparams.filename().string()},
            {"--units", static_cast<int>(options.units)},
            {"--text-only", options.text_only},
            {"--vision-profile", options.vision_profile},
            {"--widen", options.widen},
            {"--requantize", options.requantize},
            {"--int16-twin", options.int16_twin},
            {"--kv-scales", options.kv_scales},
            {"--compute", options.compute == Compute::kBf16 ? "bf16" : "float32"}}}};
}

RunState::RunState(fs::path directory, nlohmann::json identity, double save_seconds, Communicator& world)
    : directory_(std::move(directory)), identity_(std::move(identity)), interval_(save_seconds), world_(world) {
  CreateDirectories(directory_);
}

std::vector<int> RunState::Numbers() const {
  std::vector<int> numbers;
  for (const fs::path& entry : EntriesOf(directory_)) {
    int number = 0;
    const std::string name = entry.filename();
    if (std::sscanf(name.c_str(), "state.%d.", &number) == 1 && name == StatePath(number).filename())
      numbers.push_back(number);
  }
  return numbers;
}

// A state that stays is only in the way: the newest counts.
void RunState::RemoveOthers(int kept) const {
  std::error_code ignored;
  for (const int number : Numbers())
    if (number != kept) fs::remove(StatePath(number), ignored);
}

int RunState::Load(RunParts& parts, const std::function<PointSpec(const std::string&)>& specs, int phases) {
  // A process may have been killed before it saved what another had saved: the newest that all have.
  const std::vector<int> mine = Numbers();
  std::vector<int> common = mine;
  for (const std::vector<int>& others : AllGather<int>(world_, mine))
    std::erase_if(common, [&](int number) { return std::ranges::find(others, number) == others.end(); });
  if (common.empty()) {
    for (const int number : mine) RemoveFile(StatePath(number));
    return 0;
  }
  const int done = *std::ranges::max_element(common);
  const nlohmann::json state = Read(done, phases);
  RequireSameRun(state);
  try {
    Restore(state, parts, specs);
    if (parts.head.has_value() != (done == phases))
      Fail("has {} head; start again with --force", parts.head ? "a" : "no");
  } catch (const nlohmann::json::exception& error) {
    Fail("{}: is damaged ({}); start again with --force", StatePath(done).string(), error.what());
  } catch (const Error& error) {
    throw error.Within(StatePath(done).string());
  }
  RemoveOthers(done);
  return done;
}

void RunState::RequireSameRun(const nlohmann::json& state) const {
  if (state.at("identity") != identity_)
    Fail("cannot go on with the unfinished run: {}; put it back, or start again with --force",
         FirstChange(state.at("identity"), identity_, ""));
}

nlohmann::json RunState::ReadHashed(const fs::path& path) const {
  nlohmann::json state;
  try {
    state = ReadJson(path, int64_t{1} << 32);
  } catch (const Error& error) {
    Fail("{}; start again with --force", error.what());
  }
  const auto refuse = [&](const std::string& what) {
    Fail("{}: is damaged ({}); start again with --force", path.string(), what);
  };
  if (!state.is_object() || !state.contains("sha256")) refuse("it has no SHA-256");
  const nlohmann::json hash = state["sha256"];
  state.erase("sha256");
  if (hash != HashOf(state)) refuse("its SHA-256 is another");
  if (!state.contains("identity")) refuse("it has no identity");
  return state;
}

nlohmann::json RunState::LoadPreparation() const {
  nlohmann::json state;
  if (std::error_code missing; world_.Rank() == 0 && fs::is_regular_file(PreparationPath(), missing)) {
    state = ReadHashed(PreparationPath());
    RequireSameRun(state);
    if (!state.contains("made"))
      Fail("{}: is damaged (it says nothing); start again with --force", PreparationPath().string());
  }
  return nlohmann::json::parse(world_.AllGather(state.is_null() ? "null" : state.at("made").dump()).front());
}

void RunState::SavePreparation(const nlohmann::json& made) const {
  if (world_.Rank() != 0) return;
  nlohmann::json state{{"identity", identity_}, {"made", made}};
  state["sha256"] = HashOf(state);
  WriteJson(PreparationPath(), state);
}

// A number in a file's name is anybody's; the one inside is under the hash.
nlohmann::json RunState::Read(int number, int phases) const {
  const fs::path path = StatePath(number);
  nlohmann::json state = ReadHashed(path);
  if (state.value("done", nlohmann::json()) != number || number < 1 || number > phases)
    Fail("{}: is damaged (it says that {} of {} stages are done, its name says {}); start again with --force",
         path.string(), state.value("done", nlohmann::json()).dump(), phases, number);
  return state;
}

void RunState::Restore(const nlohmann::json& state, RunParts& parts,
                       const std::function<PointSpec(const std::string&)>& specs) {
  params_files_ = state.at("params").get<decltype(params_files_)>();
  RestoreParams(parts.calibration, specs);
  params_saved_ = parts.calibration.Params().Size();
  for (const auto& [name, observer] : state.at("observers").items())
    parts.calibration.Observers()[name] = Observer::FromState(observer);
  parts.units.Restore(state.at("units"));
  for (const nlohmann::json& error : state.at("errors")) parts.errors.push_back(RestoreError(error));
  for (const nlohmann::json& linear : state.at("linears")) parts.linears.push_back(RestoreLinear(linear));
  for (const nlohmann::json& again : state.value("second_roundings", nlohmann::json::array()))
    parts.second_roundings.push_back({again.at(0), again.at(1), std::bit_cast<double>(again.at(2).get<int64_t>())});
  if (!state.at("head").is_null()) parts.head = RestoreHead(state.at("head"));
  if (!state.at("change").is_null()) parts.change = RestoreChange(state.at("change"));
  parts.seconds = state.at("seconds").get<std::map<std::string, double>>();
  parts.store.Restore(state.at("values"));
}

// Frozen grids come from their file, whose hash is part of the identity.
void RunState::RestoreParams(Calibration& calibration, const std::function<PointSpec(const std::string&)>& specs) {
  for (const auto& [file, hash] : params_files_) {
    const fs::path path = directory_ / fs::path(file).filename();
    std::error_code missing;
    if (!fs::is_regular_file(path, missing) || Sha256File(path) != hash)
      Fail("{}: is not what the unfinished run saved (SHA-256); start again with --force", path.string());
    const nlohmann::json json = ReadJson(path, int64_t{1} << 32);
    const ParameterStore saved = ParseParameters(json.dump(), path.string());
    ParameterStore ordered;
    for (const auto& name : json.at("order")) {
      PointParams params = saved.Get(name.get<std::string>());
      params.spec = specs(params.spec.point);
      ordered.Set(std::move(params));
    }
    calibration.Resume(ordered);
  }
}

void RunState::SaveNewParams(int done, const ParameterStore& params) {
  ParameterStore fresh;
  nlohmann::json order = nlohmann::json::array();
  for (; params_saved_ < params.Size(); ++params_saved_) {
    const std::string& name = params.Names()[params_saved_];
    if (params.Find(name)->GivenWithCodes()) continue;
    fresh.Set(*params.Find(name));
    order.push_back(name);
  }
  if (fresh.Size() == 0) return;
  const std::string file = fmt::format("params.{}.json", done);
  fresh.Save(directory_ / file, {{"order", order}});
  params_files_.emplace_back(file, Sha256File(directory_ / file));
}

bool RunState::Save(int done, RunParts& parts) {
  const auto now = std::chrono::steady_clock::now();
  if (now - last_save_ < interval_ && world_.Size() == 1) return false;
  if (!parts.calibration.Frozen()) SaveNewParams(done, parts.calibration.Params());
  nlohmann::json errors = nlohmann::json::array(), linears = nlohmann::json::array(), observers = nlohmann::json::object();
  for (const StageError& error : parts.errors) errors.push_back(SaveError(error));
  for (const RoundedLinear& linear : parts.linears) linears.push_back(SaveLinear(linear));
  for (const auto& [name, observer] : parts.calibration.Observers()) observers[name] = observer->State();
  nlohmann::json again = nlohmann::json::array();
  for (const SecondRounding& rounding : parts.second_roundings)
    again.push_back({rounding.parameter, rounding.form, std::bit_cast<int64_t>(rounding.relative_error)});
  nlohmann::json state{{"done", done},
                       {"identity", identity_},
                       {"params", params_files_},
                       {"observers", observers},
                       {"units", parts.units.Save()},
                       {"errors", errors},
                       {"linears", linears},
                       {"second_roundings", again},
                       {"change", parts.change ? SaveChange(*parts.change) : nlohmann::json()},
                       {"head", parts.head ? SaveHead(*parts.head) : nlohmann::json()},
                       {"seconds", parts.seconds},
                       {"values", parts.store.Save()}};
  state["sha256"] = HashOf(state);
  WriteJson(StatePath(done), state);
  world_.Barrier();
  parts.store.Forget();
  RemoveOthers(done);
  last_save_ = std::chrono::steady_clock::now();
  return true;
}

}  // namespace circlet
