#include "circlet/quant/spec.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "error_text.h"

namespace circlet {
namespace {

using nlohmann::json;
using testing::HasSubstr;

QuantSpec Read(const char* text) { return QuantSpecFromJson(json::parse(text), "quant.yaml:7: activation"); }

std::string ReadError(const char* text) {
  return ErrorText([&] { Read(text); });
}

TEST(QuantSpecTest, ANameOrABitCountIsAnAffineGrid) {
  EXPECT_EQ(Read("\"int16\""), QuantSpec::Affine(DType::kI16));
  EXPECT_EQ(Read("8"), QuantSpec::Affine(DType::kU8));
  EXPECT_EQ(Read("4"), QuantSpec::Affine(DType::kU4));
  EXPECT_EQ(Read(R"({"dtype": 4})"), QuantSpec::Affine(DType::kU4));
}

TEST(QuantSpecTest, MappingsNameSchemeAndObserver) {
  const QuantSpec spec = Read(
      R"({"kind": "affine", "dtype": "uint8", "qscheme": "per_tensor_asymm", "observer": "Percentile",
          "lower_percentile": 0.5, "upper_percentile": 99, "max_samples": 100, "samples_per_batch": 10, "seed": 3})");
  EXPECT_EQ(spec.dtype, DType::kU8);
  EXPECT_EQ(spec.scheme, (Scheme{.per_channel = false, .symmetric = false}));
  EXPECT_EQ(*spec.observer, (ObserverSpec{.kind = ObserverSpec::Kind::kPercentile,
                                          .lower = 0.5,
                                          .upper = 99,
                                          .max_samples = 100,
                                          .samples_per_batch = 10,
                                          .seed = 3}));
  EXPECT_EQ(Read(R"({"observer": "ema", "momentum": 0.95})").observer->momentum, 0.95);
  EXPECT_EQ(Read(R"({"kind": "no_quant"})"), QuantSpec::None());
}

TEST(QuantSpecTest, MxTakesFormatAxisAndRounding) {
  const QuantSpec spec =
      Read(R"({"kind": "mx", "elem_format": "fp4", "axis": 1, "shared_exp_method": "none", "round": "even"})");
  EXPECT_EQ(spec.kind, QuantKind::kMx);
  EXPECT_EQ(spec.mx, (MxSpec{MxFormat::kFp4, 1, false, MxRounding::kEven}));
  EXPECT_EQ(Read(R"({"kind": "mx"})").mx, MxSpec{});
}

TEST(QuantSpecTest, WhatIsWrittenReadsBack) {
  for (const char* text :
       {R"({"dtype": "int8", "qscheme": "per_channel_symm", "channel_axis": 0})",
        R"({"observer": "percentile", "percentile": 99.9, "lower_percentile": 1, "upper_percentile": 98.5})",
        R"({"dtype": "uint4", "observer": "ema", "momentum": 0.25})",
        R"({"kind": "mx", "elem_format": "fp6_e2m3", "round": "floor"})", R"({"kind": "no_quant"})"}) {
    const QuantSpec spec = Read(text);
    EXPECT_EQ(QuantSpecFromJson(ToJson(spec), "again"), spec) << text;
  }
}

TEST(QuantSpecTest, WhatCannotBeNamesPlaceValueAndRemedy) {
  EXPECT_THAT(
      ReadError("\"int32\""),
      HasSubstr("quant.yaml:7: activation: \"int32\" is no grid type; choose int4, uint4, int8, uint8 or int16"));
  EXPECT_THAT(ReadError("16"), HasSubstr("16 bits are no grid; choose 4 or 8 (unsigned), or a name such as int16"));
  EXPECT_THAT(ReadError("[1]"), HasSubstr("expected a type such as int16 or a mapping with kind and dtype, found [1]"));
  EXPECT_THAT(ReadError(R"({"dtype": "uint8", "qscheme": "per_tensor_symm"})"),
              HasSubstr("per_tensor_symm with uint8: an unsigned grid cannot be symmetric; use per_tensor_asymm"));
  EXPECT_THAT(ReadError(R"({"dtype": "int8", "qscheme": "symmetric"})"), HasSubstr("known are per_tensor_asymm"));
  EXPECT_THAT(ReadError(R"({"kind": "afine"})"), HasSubstr("unknown kind \"afine\"; known are affine, mx, no_quant"));
  EXPECT_THAT(ReadError(R"({"dtype": "int8", "obsever": "ema"})"),
              HasSubstr("obsever: is no known key; nearest: \"observer\""));
  EXPECT_THAT(ReadError(R"({"dtype": "int8", "observer": "mse"})"), HasSubstr("known are minmax, ema, percentile"));
  EXPECT_THAT(ReadError(R"({"dtype": "int8", "observer": "minmax", "momentum": 0.5})"),
              HasSubstr("momentum: is no known key"));
  EXPECT_THAT(ReadError(R"({"observer": "ema", "momentum": 1})"), HasSubstr("momentum: 1 is outside (0, 1)"));
  EXPECT_THAT(ReadError(R"({"observer": "percentile", "percentile": 0})"), HasSubstr("0 is outside (0, 100]"));
  EXPECT_THAT(ReadError(R"({"observer": "percentile", "lower_percentile": 1})"), HasSubstr("give both or neither"));
  EXPECT_THAT(ReadError(R"({"observer": "percentile", "lower_percentile": 9, "upper_percentile": 3})"),
              HasSubstr("9 and upper_percentile 3 must satisfy 0 <= lower < upper <= 100"));
  EXPECT_THAT(ReadError(R"({"observer": "percentile", "max_samples": 0})"),
              HasSubstr("max_samples: 0 must be positive"));
  EXPECT_THAT(ReadError(R"({"kind": "mx", "observer": "ema"})"), HasSubstr("observer: an mx grid has no statistics"));
  EXPECT_THAT(ReadError(R"({"kind": "mx", "shared_exp_method": "min"})"), HasSubstr("known are max, none"));
  EXPECT_THAT(ReadError(R"({"kind": "no_quant", "dtype": "int8"})"), HasSubstr("dtype: is no known key"));
}

// ---- quantization.md 4.4
// -----------------------------------------------------------------------------------------------------

Point Activation(const std::string& name) { return {.name = name}; }
Point Parameter(const std::string& name, WeightKind kind) {
  return {.name = name, .role = PointRole::kWeight, .kind = kind};
}

PointSpec Resolve(const Point& point, const QuantSpec* override, WrapperDefault wrapper, const QuantSpec& role,
                  const Dialect& dialect = kTico) {
  return ResolveSpec(point, override, wrapper, role, dialect);
}

const QuantSpec kI16 = QuantSpec::Affine(DType::kI16);
const QuantSpec kU8 = QuantSpec::Affine(DType::kU8);
const QuantSpec kI8 = QuantSpec::Affine(DType::kI8);

std::string SchemeOf(const PointSpec& spec) {
  return fmt::format("{} {} {}", Name(spec.dtype), Name(spec.scheme), spec.axis);
}

TEST(ResolveSpecTest, TheSchemeFollowsFromTypeAndKind) {
  EXPECT_EQ(SchemeOf(Resolve(Activation("a.act_in"), nullptr, WrapperDefault::kNone, kI16)),
            "int16 per_tensor_symm -1");
  EXPECT_EQ(SchemeOf(Resolve(Activation("a.act_in"), nullptr, WrapperDefault::kNone, kU8)),
            "uint8 per_tensor_asymm -1");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("norm.weight", WeightKind::kNorm), nullptr, WrapperDefault::kNone, kU8)),
            "uint8 per_channel_asymm -1");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("norm.weight", WeightKind::kNorm), nullptr, WrapperDefault::kNone, kI16)),
            "int16 per_tensor_symm -1");
  // Whatever their names.
  EXPECT_EQ(SchemeOf(Resolve(Activation("mix.weight"), nullptr, WrapperDefault::kNone, kU8)),
            "uint8 per_tensor_asymm -1");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("q.kernel", WeightKind::kLinear), nullptr, WrapperDefault::kNone, kU8)),
            "uint8 per_channel_asymm -1");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("weight", WeightKind::kLayerScalar), nullptr, WrapperDefault::kNone, kU8)),
            "uint8 per_tensor_asymm -1");
}

TEST(ResolveSpecTest, ASignedRoleIsAsymmetricPerRowButTheSameOverrideIsSymmetricPerTensor) {
  EXPECT_EQ(SchemeOf(Resolve(Parameter("q.weight", WeightKind::kLinear), nullptr, WrapperDefault::kPerRow, kI16)),
            "int16 per_channel_asymm 0");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("q.weight", WeightKind::kLinear), &kI16, WrapperDefault::kPerRow, kU8)),
            "int16 per_tensor_symm -1");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("q.weight", WeightKind::kLinear), &kU8, WrapperDefault::kPerRow, kI16)),
            "uint8 per_channel_asymm 0");
}

TEST(ResolveSpecTest, TheDefaultDialectKeepsSignedWeightsSymmetricPerRow) {
  EXPECT_EQ(
      SchemeOf(Resolve(Parameter("q.weight", WeightKind::kLinear), nullptr, WrapperDefault::kPerRow, kI16, kDefault)),
      "int16 per_channel_symm 0");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("q.weight", WeightKind::kLinear), &kI8, WrapperDefault::kPerRow, kU8, kDefault)),
            "int8 per_channel_symm 0");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("q.weight", WeightKind::kLinear), &kU8, WrapperDefault::kPerRow, kU8, kDefault)),
            "uint8 per_channel_asymm 0");
  const QuantSpec written = QuantSpec::Affine(DType::kI8, Scheme{.per_channel = false, .symmetric = true});
  EXPECT_EQ(
      SchemeOf(Resolve(Parameter("q.weight", WeightKind::kLinear), &written, WrapperDefault::kPerRow, kU8, kDefault)),
      "int8 per_tensor_symm -1");
}

TEST(ResolveSpecTest, ASignedAsymmetricRoleIsMadeSymmetricUnlessTheUserOverrides) {
  const QuantSpec asymmetric = QuantSpec::Affine(DType::kI16, Scheme{.per_channel = false, .symmetric = false});
  EXPECT_EQ(SchemeOf(Resolve(Activation("a.act_in"), nullptr, WrapperDefault::kNone, asymmetric)),
            "int16 per_tensor_symm -1");
  EXPECT_EQ(SchemeOf(Resolve(Activation("a.act_in"), &asymmetric, WrapperDefault::kNone, kU8)),
            "int16 per_tensor_asymm -1");
}

TEST(ResolveSpecTest, ThePositionTableIsInt16WhateverTheRole) {
  EXPECT_EQ(SchemeOf(Resolve(Parameter("t", WeightKind::kPositionTable), nullptr, WrapperDefault::kFixedInt16, kU8)),
            "int16 per_tensor_symm -1");
  EXPECT_EQ(SchemeOf(Resolve(Parameter("t", WeightKind::kPositionTable), &kU8, WrapperDefault::kFixedInt16, kI16)),
            "uint8 per_tensor_asymm -1");
}

TEST(ResolveSpecTest, APartialOverrideChangesOnlyWhatItNames) {
  const QuantSpec role{.dtype = DType::kI16, .observer = ObserverSpec{.kind = ObserverSpec::Kind::kEma}};
  const QuantSpec partial{.observer = ObserverSpec{.kind = ObserverSpec::Kind::kPercentile}};
  const PointSpec spec = Resolve(Activation("a.act_in"), &partial, WrapperDefault::kNone, role);
  EXPECT_EQ(SchemeOf(spec), "int16 per_tensor_symm -1");
  EXPECT_EQ(spec.observer.kind, ObserverSpec::Kind::kPercentile);
  EXPECT_EQ(Resolve(Activation("a.act_in"), &kU8, WrapperDefault::kNone, role).observer.kind,
            ObserverSpec::Kind::kMinMax);
  EXPECT_EQ(Resolve(Activation("a.act_in"), nullptr, WrapperDefault::kNone, role).ObserverName(), "EMAObserver");
}

TEST(ResolveSpecTest, MxAndNoQuantDropTheRole) {
  const QuantSpec mx{.kind = QuantKind::kMx, .mx = {.format = MxFormat::kFp4}};
  const PointSpec spec = Resolve(Parameter("q.weight", WeightKind::kLinear), &mx, WrapperDefault::kPerRow, kI16);
  EXPECT_EQ(spec.ObserverName(), "MXObserver");
  EXPECT_EQ(spec.mx.format, MxFormat::kFp4);
  const QuantSpec none = QuantSpec::None();
  EXPECT_EQ(Resolve(Activation("a.act_in"), &none, WrapperDefault::kNone, mx).ObserverName(), "IdentityObserver");
  EXPECT_EQ(SchemeOf(Resolve(Activation("a.act_in"), &kU8, WrapperDefault::kNone, mx)), "uint8 per_tensor_asymm -1");
}

TEST(ResolveSpecTest, ContradictionsNameThePoint) {
  const auto error = [](const Point& point, const QuantSpec& override, WrapperDefault wrapper, const QuantSpec& role) {
    return ErrorText([&] { Resolve(point, &override, wrapper, role); });
  };
  const Scheme symmetric{.per_channel = false, .symmetric = true};
  EXPECT_THAT(
      error(Activation("m.act_in"), {.scheme = symmetric}, WrapperDefault::kNone, kU8),
      HasSubstr("m.act_in: per_tensor_symm with uint8: an unsigned grid cannot be symmetric; use per_tensor_asymm"));
  EXPECT_THAT(error(Activation("m.act_in"), {.observer = ObserverSpec{}}, WrapperDefault::kNone, QuantSpec::None()),
              HasSubstr("m.act_in: neither its override nor its role names a dtype"));
  EXPECT_THAT(error(Activation("m.act_in"), {.scheme = Scheme{true, true}, .axis = 2}, WrapperDefault::kNone, kI16),
              HasSubstr("m.act_in: a grid per channel (axis 2) is for weights; use per_tensor_symm"));
  EXPECT_THAT(error(Activation("m.act_in"), {.scheme = Scheme{true, true}, .axis = 0}, WrapperDefault::kNone, kI16),
              HasSubstr("m.act_in: a grid per channel (axis 0) is for weights; use per_tensor_symm"));
  EXPECT_THAT(error(Parameter("m.weight", WeightKind::kLinear), {.dtype = DType::kU8, .axis = 1},
                    WrapperDefault::kPerRow, kI16),
              HasSubstr("m.weight: weights have a grid for each index of axis 0, not 1; set channel_axis 0"));
  const ObserverSpec percentile{.kind = ObserverSpec::Kind::kPercentile};
  EXPECT_THAT(error(Parameter("m.weight", WeightKind::kLinear), {.dtype = DType::kU8, .observer = percentile},
                    WrapperDefault::kPerRow, kI16),
              HasSubstr("m.weight: a percentile observer works on whole tensors, the scheme is per_channel_asymm"));
  const ObserverSpec pair{.kind = ObserverSpec::Kind::kPercentile, .lower = 1, .upper = 99};
  EXPECT_THAT(error(Activation("m.act_in"), {.observer = pair}, WrapperDefault::kNone, kI16),
              HasSubstr("m.act_in: lower_percentile and upper_percentile need an asymmetric scheme"));
}

TEST(DialectTest, NamesFindTheTwoDialects) {
  EXPECT_EQ(DialectFromName("tico"), kTico);
  EXPECT_EQ(DialectFromName("default"), kDefault);
  EXPECT_THAT(ErrorText([] { DialectFromName("toci"); }),
              HasSubstr("unknown dialect \"toci\"; known are default, tico"));
}

}  // namespace
}  // namespace circlet
