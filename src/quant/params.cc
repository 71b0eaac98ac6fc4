#include "circlet/quant/params.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "circlet/io/names.h"
#include "circlet/quant/affine.h"

namespace circlet {
namespace {

using nlohmann::json;

// The shortest decimal of a float32, always with a point or an exponent. json::dump prints some numbers longer.
std::string Decimal(float value) {
  if (!std::isfinite(value)) return F32(value).dump();
  std::string text = fmt::format("{}", value);
  if (text.find_first_of(".e") == text.npos) text += ".0";
  return text;
}

void AppendFloats(std::string& text, std::string_view key, const std::vector<float>& values) {
  text += fmt::format(",\"{}\":[", key);
  for (size_t i = 0; i < values.size(); ++i) {
    if (i > 0) text += ',';
    text += Decimal(values[i]);
  }
  text += ']';
}

void AppendPoint(std::string& text, const PointParams& params) {
  const PointSpec& spec = params.spec;
  text += fmt::format("  {}:{{\"observer\":\"{}\"", json(spec.point).dump(), spec.ObserverName());
  if (spec.kind != QuantKind::kAffine) {
    text += fmt::format(",\"spec\":{}}}", ToJson(QuantSpec{.kind = spec.kind, .mx = spec.mx}).dump());
    return;
  }
  text += fmt::format(",\"dtype\":\"{}\",\"qscheme\":\"{}\",\"channel_axis\":{}", Name(spec.dtype), Name(spec.scheme),
                      spec.axis < 0 ? "null" : std::to_string(spec.axis));
  AppendFloats(text, "min", params.min);
  AppendFloats(text, "max", params.max);
  AppendFloats(text, "scale", params.qparams.scale);
  text += ",\"zero_point\":[";
  for (size_t i = 0; i < params.qparams.zero_point.size(); ++i) {
    if (i > 0) text += ',';
    text += std::to_string(params.qparams.zero_point[i]);
  }
  text += ']';
  if (params.Given()) text += fmt::format(",\"values\":{},\"beyond\":{}", params.beyond.values, params.beyond.beyond);
  text += '}';
}

std::vector<float> ReadFloats(const JsonObject& object, std::string_view key) {
  const json& list = object.Raw(key);
  if (!list.is_array() || list.empty())
    object.FailAt(key, fmt::format("expected a list of numbers, found {}", list.is_null() ? "nothing" : list.dump()));
  std::vector<float> values;
  values.reserve(list.size());
  for (const json& value : list) values.push_back(F32(value, object.Where(key)));
  return values;
}

ObserverSpec ObserverFromName(const JsonObject& object, const std::string& name) {
  if (name == "MinMaxObserver") return {};
  if (name == "EMAObserver") return {.kind = ObserverSpec::Kind::kEma};
  if (name == "GivenObserver") return {.kind = ObserverSpec::Kind::kGiven};
  if (name == "PercentileObserver") return {.kind = ObserverSpec::Kind::kPercentile};
  object.FailAt("observer", fmt::format("unknown observer \"{}\"; known are MinMaxObserver, EMAObserver, "
                                        "PercentileObserver, MXObserver, IdentityObserver",
                                        name));
}

void CheckNumbers(const JsonObject& object, const PointParams& params) {
  const QParams& qparams = params.qparams;
  const size_t channels = qparams.scale.size();
  if (params.min.size() != channels || params.max.size() != channels || qparams.zero_point.size() != channels)
    object.FailAt("", fmt::format("min, max, scale and zero_point hold {}, {}, {} and {} values; they must be as many",
                                  params.min.size(), params.max.size(), channels, qparams.zero_point.size()));
  if (params.spec.axis < 0 && channels != 1)
    object.FailAt("scale", fmt::format("{} values, but channel_axis is null; one is needed", channels));
  const CodeRange codes = CodesOf(params.spec.dtype);
  for (size_t c = 0; c < channels; ++c) {
    const bool unobserved = params.min[c] > params.max[c];
    if (!(qparams.scale[c] > 0) || (std::isinf(qparams.scale[c]) && !unobserved))
      object.FailAt("scale", fmt::format("value {} is {}; scales are positive and finite", c, qparams.scale[c]));
    if (qparams.zero_point[c] < codes.min || qparams.zero_point[c] > codes.max)
      object.FailAt("zero_point", fmt::format("value {} is {}, outside the codes of {} ({} to {})", c,
                                              qparams.zero_point[c], Name(params.spec.dtype), codes.min, codes.max));
  }
}

PointParams ReadPoint(const JsonObject& object, const std::string& name) {
  PointParams params;
  PointSpec& spec = params.spec;
  spec.point = name;
  const auto observer = object.Required<std::string>("observer");
  if (observer == "MXObserver" || observer == "IdentityObserver") {
    const QuantSpec written = QuantSpecFromJson(object.Raw("spec"), object.Where("spec"));
    spec.kind = written.kind;
    spec.mx = written.mx;
    return params;
  }
  spec.observer = ObserverFromName(object, observer);
  const QuantSpec type = QuantSpecFromJson(object.Required<std::string>("dtype"), object.Where("dtype"));
  spec.dtype = *type.dtype;
  spec.scheme =
      Within(object.Where("qscheme"), [&] { return SchemeFromName(object.Required<std::string>("qscheme")); });
  spec.axis = object.Optional<int>("channel_axis", -1);
  params.min = ReadFloats(object, "min");
  params.max = ReadFloats(object, "max");
  params.qparams.dtype = spec.dtype;
  params.qparams.axis = spec.axis;
  params.qparams.scale = ReadFloats(object, "scale");
  params.qparams.zero_point = object.Required<std::vector<int>>("zero_point");
  CheckNumbers(object, params);
  if (!params.Given()) return params;
  spec.observer.step = params.qparams.scale.front();
  spec.observer.zero_point = params.qparams.zero_point.front();
  params.beyond = {object.Required<int64_t>("values"), object.Required<int64_t>("beyond")};
  return params;
}

}  // namespace

PointParams ParamsOfWeight(const Tensor& weight, const PointSpec& spec) {
  PointParams params{.spec = spec};
  if (spec.kind != QuantKind::kAffine) return params;
  WeightRange range = Within(spec.point, [&] { return RangeOfWeight(weight, spec.axis); });
  params.min = std::move(range.min);
  params.max = std::move(range.max);
  if (spec.axis >= 0) {
    params.qparams = ComputeQParams(params.min, params.max, spec.dtype, spec.scheme.symmetric, spec.axis);
  } else if (spec.observer.kind == ObserverSpec::Kind::kPercentile) {
    const std::unique_ptr<Observer> observer = Observer::Make(spec);
    observer->BeginSample(0, weight.Elements());
    VisitWeight(weight, [&](std::span<const float> values, int64_t first) { observer->Visit(values, first); });
    observer->EndSample();
    params.qparams = observer->Freeze(spec, 0);
  } else {
    params.qparams = ComputeQParams(params.min.front(), params.max.front(), spec.dtype, spec.scheme.symmetric);
  }
  return params;
}

PointParams ParamsOf(const Observer& observer, const PointSpec& spec, float headroom_below) {
  PointParams params{.spec = spec, .qparams = observer.Freeze(spec, headroom_below)};
  if (spec.kind != QuantKind::kAffine) return params;
  params.min = {observer.Min()};
  params.max = {observer.Max()};
  params.beyond = observer.CountBeyond();
  return params;
}

void ParameterStore::Set(PointParams params) {
  const std::string& name = params.spec.point;
  const auto [at, added] = params_.try_emplace(name);
  if (added) names_.push_back(name);
  at->second = std::move(params);
}

const PointParams* ParameterStore::Find(std::string_view point) const {
  const auto at = params_.find(point);
  return at == params_.end() ? nullptr : &at->second;
}

const PointParams& ParameterStore::Get(std::string_view point) const {
  const PointParams* params = Find(point);
  if (params == nullptr)
    Fail(
        "{}: this point has no quantization parameters{}; calibrate with this recipe, or give the qparams file that "
        "belongs to it",
        point, NearestHint(point, names_));
  if (params->spec.kind == QuantKind::kAffine && !params->Observed())
    Fail(
        "{}: no calibration data reached this point; calibrate again with samples that reach it (an image, for vision)",
        point);
  return *params;
}

std::string ToText(const ParameterStore& store, const json& header) {
  json members = header.is_null() ? json::object() : header;
  std::vector<const PointParams*> written;
  for (const std::string& name : store.Names())
    if (const PointParams* const params = store.Find(name); !params->GivenWithCodes()) written.push_back(params);
  members["points"] = written.size();
  std::string text = members.dump(1, ' ', false, nlohmann::json::error_handler_t::replace);  // names of files
  text.resize(text.size() - 2);  // without "\n}"
  text += ",\n \"quant_points\":{\n";
  for (size_t i = 0; i < written.size(); ++i) {
    AppendPoint(text, *written[i]);
    text += i + 1 < written.size() ? ",\n" : "\n";
  }
  text += " }\n}\n";
  return text;
}

ParameterStore ParseParameters(std::string_view text, std::string_view file) {
  const json root = ParseJson(text, file);
  const JsonObject object(root, std::string(file));
  const auto points = object.OptionalObject("quant_points");
  if (!points) Fail("{}: there is no \"quant_points\"; is this a file of quantization parameters?", file);
  ParameterStore store;
  // Grids that a run took from a file are those of that file's recipe.
  const auto frozen = object.OptionalObject("grids");
  store.SetRecipeName(frozen ? frozen->Optional<std::string>("recipe", "")
                             : object.Optional<std::string>("recipe", ""));
  if (object.Has("widening"))
    store.SetWidening(WideningFromJson(object.Raw("widening"), fmt::format("{}: widening", file)));
  for (const std::string& name : points->Keys()) store.Set(ReadPoint(points->Object(name), name));
  return store;
}

void ParameterStore::Save(const std::filesystem::path& path, const json& header) const {
  WriteFile(path, ToText(*this, header));
}

ParameterStore ParameterStore::Load(const std::filesystem::path& path) {
  return ParseParameters(ReadFile(path), path.string());
}

}  // namespace circlet
