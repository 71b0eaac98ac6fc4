#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cmath>

#include "circlet/base/error.h"
#include "circlet/circle/export.h"
#include "circlet/io/file.h"
#include "circlet/report/terminal.h"
#include "smoke/session.h"
#include "smoke/sizes.h"

namespace circlet {
namespace {

// A bound that allows this many times the measured error says little about it.
constexpr double kWidestBound = 3.0;

// What padding patches compute is read by nothing, and a rounded mask changes it.
std::span<const float> Real(const SmokePart& part, const Tensor& output) {
  const std::span<const float> values = output.F32();
  return part.real == 0 ? values : values.first(values.size() / output.GetShape()[1] * part.real);
}

class Runner {
 public:
  Runner(const SmokeCase& test_case, const SmokeRun& run, SmokeResult& result)
      : case_(test_case), run_(run), result_(result) {}

  void Run() {
    std::optional<SmokeSession> session;
    const bool compared = Try("UNAVAILABLE", [&] { case_.RequireProfile(run_.size.profile); }) &&
                          Try("CONFIG", [&] { session.emplace(MakeSession()); }) &&
                          Try("CONFIG", [&] { session->Observe(run_.calibration_iters); }) &&
                          Try("SHAPE", [&] { RunFloat(*session); }) && result_.failures.empty() &&
                          Try("CONFIG", [&] { session->Freeze(); }) && Try("SHAPE", [&] { Compare(*session); });
    if (compared && run_.export_circle) Export(*session);
  }

 private:
  void Failed(const std::string& kind, const std::string& message) {
    if (std::ranges::find(result_.failures, kind) == result_.failures.end()) result_.failures.push_back(kind);
    result_.messages.push_back(fmt::format("{}: {}", kind, message));
  }
  void Warn(const std::string& message) {
    ++result_.warnings;
    result_.messages.push_back("warning: " + message);
  }
  template <typename Body>
  bool Try(const char* kind, const Body& body) {
    try {
      body();
      return true;
    } catch (const Bug& bug) {
      Failed(kind, fmt::format("this is a bug: {}", bug.what()));
    } catch (const std::bad_alloc&) {
      Failed(kind, "out of memory");
    } catch (const std::exception& error) {
      Failed(kind, error.what());
    }
    return false;
  }

  SmokeSession MakeSession() {
    const Recipe recipe = Settings::Load(run_.recipe.empty() ? case_.recipe : run_.recipe, run_.set).recipe;
    SmokeSize size = run_.size;
    if (run_.calibration_iters > 0) size.samples = run_.calibration_iters;
    std::vector<SmokePart> parts = case_.build(size);
    SmokeSession session(recipe, std::move(parts));
    const std::vector<Point> points = session.Points();
    result_.points = static_cast<int64_t>(points.size());
    for (const std::string& unused : recipe.UnusedOverrides(points)) Warn(unused);
    return session;
  }

  // A float model that is not finite has no grids, so it is told before they are asked for.
  void RunFloat(SmokeSession& session) {
    for (const SmokePart& part : session.Parts()) {
      references_.push_back(session.RunFloat(part, part.evaluation));
      const Tensor& output = references_.back().at(part.graph.Outputs().front().name);
      ErrorMetrics metrics;
      metrics.Add(output, output);
      if (!metrics.Finite()) {
        result_.metrics = metrics;
        Failed("NON-FINITE", fmt::format("the float model gives {} values that are not finite",
                                         metrics.nonfinite_reference));
      }
    }
    for (const std::string& point : session.NonFinite())
      Failed("NON-FINITE", fmt::format("{}: a calibration sample brought a NaN or an infinity", point));
  }

  void Compare(SmokeSession& session) {
    ErrorMetrics metrics;
    std::vector<float> float_values, quant_values;
    for (size_t i = 0; i < session.Parts().size(); ++i) {
      const SmokePart& part = session.Parts()[i];
      simulated_.push_back(session.RunRounded(part, part.evaluation));
      const std::string& output = part.graph.Outputs().front().name;
      const Tensor &expected = references_[i].at(output), &got = simulated_.back().at(output);
      result_.float_shape = expected.GetShape();
      result_.quant_shape = got.GetShape();
      const std::span<const float> expected_values = Real(part, expected), values = Real(part, got);
      metrics.Add(expected_values, values);
      float_values.insert(float_values.end(), expected_values.begin(), expected_values.end());
      quant_values.insert(quant_values.end(), values.begin(), values.end());
    }
    result_.metrics = metrics;
    if (metrics.nonfinite_quantized > 0)
      Failed("NON-FINITE", fmt::format("the quantized model gives {} values that are not finite",
                                       metrics.nonfinite_quantized));
    if (metrics.count == 0) return Failed("ACCURACY", "no value was compared");
    if (!metrics.Finite()) {
      if (run_.plot) Warn("no plot: there are values that are not finite");
      return;
    }
    CheckBounds(metrics);
    if (run_.plot) result_.plot = ScatterPlot(float_values, quant_values, result_.name);
  }

  void CheckBounds(const ErrorMetrics& metrics) {
    result_.bounds =
        run_.bounds ? run_.bounds : BoundsOf(case_.name, run_.size.profile, result_.recipe);
    const SmokeRun measured{.size = {.profile = run_.size.profile}};
    const bool standard = run_.set.empty() && run_.calibration_iters == measured.calibration_iters &&
                          run_.size.seed == measured.size.seed && CountsAreStandard(run_.size);
    if (!result_.bounds || (!run_.bounds && !standard)) {
      result_.bounds.reset();
      result_.messages.push_back(fmt::format("no bounds are known for {}, profile {}, recipe {}{}", case_.name,
                                             run_.size.profile, result_.recipe, standard ? "" : " with changes"));
      return;
    }
    const SmokeBounds& bounds = *result_.bounds;
    const double mean = metrics.MeanAbs(), peir = metrics.Peir();
    if (mean > bounds.max_mean)
      Failed("ACCURACY", fmt::format("mean |diff| is {:.6f}, at most {:.6f} is allowed", mean, bounds.max_mean));
    if (peir > bounds.max_peir)
      Failed("ACCURACY", fmt::format("PEIR is {:.6f} %, at most {:.6f} % is allowed", 100 * peir, 100 * bounds.max_peir));
    if (mean < bounds.min_mean)
      Failed("ACCURACY", fmt::format("mean |diff| is {:.6f}, less than the {:.6f} that rounding costs at least: some "
                                     "points are not quantized",
                                     mean, bounds.min_mean));
    if (bounds.max_mean > kWidestBound * mean)
      Warn(fmt::format("the bound of mean |diff|, {:.6f}, is more than {} times the measured {:.6f}", bounds.max_mean,
                       kWidestBound, mean));
    if (bounds.max_peir > kWidestBound * peir)
      Warn(fmt::format("the bound of PEIR, {:.6f} %, is more than {} times the measured {:.6f} %", 100 * bounds.max_peir,
                       kWidestBound, 100 * peir));
  }

  // The last part alone becomes a file: its graph takes every input of the case.
  void Export(SmokeSession& session) {
    const SmokePart& part = session.Parts().back();
    const Graph& graph = part.exported ? *part.exported : part.graph;
    const std::filesystem::path path = run_.output_dir / (case_.name + ".q.circle");
    const bool written = Try("EXPORT", [&] {
      CreateDirectories(run_.output_dir);
      const circle::Model model = circle::ToCircle(graph, CalibratedGrids(session.GetCalibration(), part.stored));
      result_.operators = static_cast<int64_t>(model.operators.size());
      result_.bytes = run_.write ? run_.write(model, path) : circle::Write(model, path);
    });
    if (!written) return;
    result_.artifacts["circle"] = path.string();
    Try("VERIFY", [&] { Verify(path, graph, part); });
  }

  void Verify(const std::filesystem::path& path, const Graph& graph, const SmokePart& part) {
    const circle::Model file = circle::Read(path);
    if (file.outputs.empty() || file.outputs.size() != graph.Outputs().size())
      Fail("{}: has {} outputs, the graph has {}", path.string(), file.outputs.size(), graph.Outputs().size());
    // By place: a clamp that is left out takes the input's name with it.
    SmokeValues inputs;
    for (size_t i = 0; i < graph.Inputs().size(); ++i)
      inputs[file.tensors[file.inputs.at(i)].name] = part.evaluation.at(graph.At(graph.Inputs()[i]).name);
    const SmokeValues computed = circle::RunModel(file, inputs);
    for (size_t i = 0; i < file.outputs.size(); ++i) {
      const circle::Tensor& tensor = file.tensors[file.outputs[i]];
      const std::string& name = graph.Outputs()[i].name;
      const std::span<const float> got = computed.at(tensor.name).F32(), expected = simulated_.back().at(name).F32();
      if (got.size() != expected.size())
        Fail("{}: output {} has {} values, the simulation {}", path.string(), name, got.size(), expected.size());
      const float scale = tensor.qparams ? tensor.qparams->scale[0] : 1.0f;
      int64_t different = 0, first = -1;
      for (size_t k = 0; k < got.size(); ++k) {
        if (got[k] == expected[k]) continue;
        if (different++ == 0) first = static_cast<int64_t>(k);
      }
      result_.verified += static_cast<int64_t>(got.size());
      if (different > 0)
        Failed("VERIFY", fmt::format("{}: {} of {} values of {} are not the simulation's; the first is value {}: {}, "
                                     "simulated {} ({} codes apart)",
                                     path.string(), different, got.size(), name, first, got[first], expected[first],
                                     std::lround((got[first] - expected[first]) / scale)));
    }
  }

  const SmokeCase& case_;
  const SmokeRun& run_;
  SmokeResult& result_;
  std::vector<SmokeValues> references_, simulated_;  // by part
};

}  // namespace

SmokeResult RunSmoke(const SmokeCase& test_case, const SmokeRun& run) {
  SmokeResult result{.name = test_case.name,
                     .profile = run.size.profile,
                     .recipe = run.recipe.empty() ? test_case.recipe : run.recipe};
  const auto begin = std::chrono::steady_clock::now();
  Runner(test_case, run, result).Run();
  if (run.strict && result.warnings > 0) result.failures.push_back("STRICT");
  result.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - begin).count();
  return result;
}

}  // namespace circlet
