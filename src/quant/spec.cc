#include "circlet/quant/spec.h"

#include <array>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/quant/affine.h"

namespace circlet {
namespace {

using nlohmann::json;

constexpr std::array<std::string_view, 4> kSchemes{"per_tensor_asymm", "per_tensor_symm", "per_channel_asymm",
                                                   "per_channel_symm"};
constexpr std::array<std::string_view, 3> kObservers{"minmax", "ema", "percentile"};

bool IsSigned(DType dtype) { return CodesOf(dtype).min < 0; }

DType GridTypeFromName(const std::string& name, std::string_view where) {
  for (const DType dtype : kGridTypes)
    if (Name(dtype) == name) return dtype;
  Fail("{}: \"{}\" is no grid type; choose {}", where, name, kGridTypeNames);
}

// A bare number counts bits of an unsigned grid (quantization.md 4.1).
DType GridTypeFromBits(int64_t bits, std::string_view where) {
  if (bits == 4) return DType::kU4;
  if (bits == 8) return DType::kU8;
  Fail("{}: {} bits are no grid; choose 4 or 8 (unsigned), or a name such as int16", where, bits);
}

ObserverSpec ReadObserver(const JsonObject& object) {
  ObserverSpec spec;
  std::string name = object.Optional<std::string>("observer", std::string(kObservers[0]));
  for (char& c : name) c = static_cast<char>(std::tolower(static_cast<unsigned char>(c)));
  if (name == "minmax") {
    spec.kind = ObserverSpec::Kind::kMinMax;
  } else if (name == "ema") {
    spec.kind = ObserverSpec::Kind::kEma;
    spec.momentum = object.Optional<double>("momentum", spec.momentum);
    if (!(spec.momentum > 0 && spec.momentum < 1))
      object.FailAt("momentum", fmt::format("{} is outside (0, 1); 0.9 is usual", spec.momentum));
  } else if (name == "percentile") {
    spec.kind = ObserverSpec::Kind::kPercentile;
    spec.percentile = object.Optional<double>("percentile", spec.percentile);
    if (!(spec.percentile > 0 && spec.percentile <= 100))
      object.FailAt("percentile", fmt::format("{} is outside (0, 100]; 99.99 is usual", spec.percentile));
    spec.lower = object.Optional<double>("lower_percentile");
    spec.upper = object.Optional<double>("upper_percentile");
    if (spec.lower.has_value() != spec.upper.has_value())
      object.FailAt("", "lower_percentile and upper_percentile belong together; give both or neither");
    if (spec.lower && !(*spec.lower >= 0 && *spec.lower < *spec.upper && *spec.upper <= 100))
      object.FailAt("lower_percentile", fmt::format("{} and upper_percentile {} must satisfy 0 <= lower < upper <= 100",
                                                    *spec.lower, *spec.upper));
    spec.max_samples = object.Optional<int64_t>("max_samples", spec.max_samples);
    spec.samples_per_batch = object.Optional<int64_t>("samples_per_batch", spec.samples_per_batch);
    if (spec.max_samples <= 0) object.FailAt("max_samples", fmt::format("{} must be positive", spec.max_samples));
    if (spec.samples_per_batch <= 0)
      object.FailAt("samples_per_batch", fmt::format("{} must be positive", spec.samples_per_batch));
    const int64_t seed = object.Optional<int64_t>("seed", 0);
    if (seed < 0) object.FailAt("seed", fmt::format("{} is negative; use 0 or more", seed));
    spec.seed = static_cast<uint64_t>(seed);
  } else {
    object.FailAt("observer", fmt::format("unknown observer \"{}\"; known are minmax, ema, percentile", name));
  }
  return spec;
}

QuantSpec ReadAffine(const JsonObject& object, const json& value) {
  QuantSpec spec;
  if (object.Has("dtype")) {
    const json& dtype = value.at("dtype");
    spec.dtype = dtype.is_number_integer()
                     ? GridTypeFromBits(dtype.get<int64_t>(), object.Where("dtype"))
                     : GridTypeFromName(object.Required<std::string>("dtype"), object.Where("dtype"));
  }
  if (const auto name = object.Optional<std::string>("qscheme"))
    spec.scheme = Within(object.Where("qscheme"), [&] { return SchemeFromName(*name); });
  spec.axis = object.Optional<int>("channel_axis");
  if (object.Has("observer")) spec.observer = ReadObserver(object);
  if (spec.dtype && spec.scheme && spec.scheme->symmetric && !IsSigned(*spec.dtype))
    object.FailAt("qscheme",
                  fmt::format("{} with {}: an unsigned grid cannot be symmetric; use {} or a signed type",
                              Name(*spec.scheme), Name(*spec.dtype), Name(Scheme{spec.scheme->per_channel, false})));
  if (spec.observer && spec.observer->lower && spec.scheme && spec.scheme->symmetric)
    object.FailAt("lower_percentile", "explicit quantiles need an asymmetric qscheme; use percentile alone");
  return spec;
}

QuantSpec ReadMx(const JsonObject& object) {
  QuantSpec spec{.kind = QuantKind::kMx};
  if (object.Has("observer")) object.FailAt("observer", "an mx grid has no statistics; leave observer out");
  if (const auto name = object.Optional<std::string>("elem_format"))
    spec.mx.format = Within(object.Where("elem_format"), [&] { return MxFormatFromName(*name); });
  spec.mx.axis = object.Optional<int>("axis", spec.mx.axis);
  for (const std::string_view key : {"shared_exp_method", "shared"}) {
    const auto shared = object.Optional<std::string>(key);
    if (!shared) continue;
    if (*shared != "max" && *shared != "none")
      object.FailAt(key, fmt::format("unknown method \"{}\"; known are max, none", *shared));
    spec.mx.shared_max = *shared == "max";
  }
  if (const auto name = object.Optional<std::string>("round"))
    spec.mx.rounding = Within(object.Where("round"), [&] { return MxRoundingFromName(*name); });
  return spec;
}

// What the reference calls a weight: operands and gains, not tables of positions, biases, bounds and single factors.
bool IsWeight(const Point& point) {
  if (point.role != PointRole::kWeight) return false;
  return IsLinear(point.kind) || point.kind == WeightKind::kConvolution || point.kind == WeightKind::kEmbedding ||
         point.kind == WeightKind::kNorm;
}

Scheme AutoScheme(DType dtype, bool weight) {
  if (IsSigned(dtype)) return {.per_channel = false, .symmetric = true};
  return {.per_channel = weight, .symmetric = false};
}

}  // namespace

std::string_view Name(Scheme scheme) { return kSchemes[(scheme.per_channel ? 2 : 0) + (scheme.symmetric ? 1 : 0)]; }

Scheme SchemeFromName(std::string_view name) {
  for (size_t i = 0; i < kSchemes.size(); ++i)
    if (kSchemes[i] == name) return {i >= 2, i % 2 != 0};
  Fail("unknown qscheme \"{}\"; known are per_tensor_asymm, per_tensor_symm, per_channel_asymm, per_channel_symm",
       name);
}

QuantSpec QuantSpecFromJson(const json& value, std::string_view where) {
  if (value.is_string()) return QuantSpec::Affine(GridTypeFromName(value.get<std::string>(), where));
  if (value.is_number_integer()) return QuantSpec::Affine(GridTypeFromBits(value.get<int64_t>(), where));
  if (!value.is_object())
    Fail("{}: expected a type such as int16 or a mapping with kind and dtype, found {}", where, value.dump());
  const JsonObject object(value, std::string(where));
  const std::string kind = object.Optional<std::string>("kind", "affine");
  QuantSpec spec;
  if (kind == "affine") {
    spec = ReadAffine(object, value);
  } else if (kind == "mx") {
    spec = ReadMx(object);
  } else if (kind == "no_quant") {
    spec = QuantSpec::None();
  } else {
    object.FailAt("kind", fmt::format("unknown kind \"{}\"; known are affine, mx, no_quant", kind));
  }
  object.RejectUnknownKeys();
  return spec;
}

json ToJson(const QuantSpec& spec) {
  if (spec.kind == QuantKind::kNone) return {{"kind", "no_quant"}};
  if (spec.kind == QuantKind::kMx)
    return {{"kind", "mx"},
            {"elem_format", Name(spec.mx.format)},
            {"axis", spec.mx.axis},
            {"shared_exp_method", spec.mx.shared_max ? "max" : "none"},
            {"round", Name(spec.mx.rounding)}};
  json value = {{"kind", "affine"}};
  if (spec.dtype) value["dtype"] = Name(*spec.dtype);
  if (spec.scheme) value["qscheme"] = Name(*spec.scheme);
  if (spec.axis) value["channel_axis"] = *spec.axis;
  if (!spec.observer) return value;
  const ObserverSpec& observer = *spec.observer;
  value["observer"] = kObservers[static_cast<size_t>(observer.kind)];
  if (observer.kind == ObserverSpec::Kind::kEma) value["momentum"] = observer.momentum;
  if (observer.kind == ObserverSpec::Kind::kPercentile) {
    value["percentile"] = observer.percentile;
    if (observer.lower) value["lower_percentile"] = *observer.lower;
    if (observer.upper) value["upper_percentile"] = *observer.upper;
    value["max_samples"] = observer.max_samples;
    value["samples_per_batch"] = observer.samples_per_batch;
    value["seed"] = observer.seed;
  }
  return value;
}

std::string_view PointSpec::ObserverName() const {
  if (kind == QuantKind::kMx) return "MXObserver";
  if (kind == QuantKind::kNone) return "IdentityObserver";
  switch (observer.kind) {
    case ObserverSpec::Kind::kMinMax:
      return "MinMaxObserver";
    case ObserverSpec::Kind::kEma:
      return "EMAObserver";
    case ObserverSpec::Kind::kPercentile:
      return "PercentileObserver";
    case ObserverSpec::Kind::kGiven:
      return "GivenObserver";
  }
  return "";
}

PointSpec ResolveSpec(const Point& of, const QuantSpec* override, WrapperDefault wrapper, const QuantSpec& role,
                      const Dialect& dialect) {
  const std::string& point = of.name;
  const bool weight = IsWeight(of);
  // A complete override replaces the role's specification, a partial one changes single fields of it.
  const bool replaces = override != nullptr && (override->kind != QuantKind::kAffine || override->dtype);
  const QuantSpec& base = replaces ? *override : role;
  PointSpec spec{.point = point, .kind = override != nullptr ? override->kind : role.kind};
  spec.mx = base.mx;
  if (spec.kind != QuantKind::kAffine) return spec;

  std::optional<DType> dtype = base.dtype;
  if (wrapper == WrapperDefault::kFixedInt16 && !replaces) dtype = DType::kI16;
  if (!dtype) Fail("{}: neither its override nor its role names a dtype; add dtype to the recipe", point);
  spec.dtype = *dtype;
  spec.observer = base.observer.value_or(ObserverSpec{});
  if (override != nullptr && override->observer) spec.observer = *override->observer;

  std::optional<Scheme> scheme;
  std::optional<int> axis;
  bool role_scheme = false;
  if (override != nullptr) {
    scheme = override->scheme;
    axis = override->axis;
    // The reference infers the scheme where the override is written, ahead of the wrapper's default.
    const bool infer = dialect.signed_weights_as_reference || wrapper != WrapperDefault::kPerRow;
    if (!scheme && override->dtype && infer) scheme = AutoScheme(spec.dtype, weight);
  }
  if (wrapper == WrapperDefault::kPerRow) {
    const bool symmetric = IsSigned(spec.dtype) && !dialect.signed_weights_as_reference;
    if (!scheme) scheme = Scheme{.per_channel = true, .symmetric = symmetric};
    if (!axis) axis = 0;
  } else if (wrapper == WrapperDefault::kFixedInt16 && !scheme) {
    scheme = Scheme{.per_channel = false, .symmetric = true};
  }
  if (!scheme && !replaces) {
    scheme = role.scheme;
    role_scheme = scheme.has_value();
  }
  if (!axis && !replaces) axis = role.axis;
  spec.scheme = scheme.value_or(AutoScheme(spec.dtype, weight));
  if (role_scheme && IsSigned(spec.dtype)) spec.scheme.symmetric = true;
  spec.axis = spec.scheme.per_channel ? axis.value_or(-1) : -1;

  if (spec.scheme.symmetric && !IsSigned(spec.dtype))
    Fail("{}: {} with {}: an unsigned grid cannot be symmetric; use {} or a signed type", point, Name(spec.scheme),
         Name(spec.dtype), Name(Scheme{spec.scheme.per_channel, false}));
  if (spec.axis >= 0 && !weight)
    Fail("{}: a grid per channel (axis {}) is for weights; use {}", point, spec.axis,
         Name(Scheme{false, spec.scheme.symmetric}));
  if (spec.axis > 0)
    Fail("{}: weights have a grid for each index of axis 0, not {}; set channel_axis 0", point, spec.axis);
  if (spec.observer.kind == ObserverSpec::Kind::kPercentile) {
    if (spec.axis >= 0)
      Fail("{}: a percentile observer works on whole tensors, the scheme is {}; use minmax for this weight", point,
           Name(spec.scheme));
    if (spec.observer.lower && spec.scheme.symmetric)
      Fail("{}: lower_percentile and upper_percentile need an asymmetric scheme, this one is {}; use percentile alone",
           point, Name(spec.scheme));
  }
  return spec;
}

}  // namespace circlet
