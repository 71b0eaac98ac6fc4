// What was simulated is what the files compute; and that a difference would be found. Same bytes on every run.

#include "circlet/pipeline/verify.h"

#include <gmock/gmock.h>

#include <cstring>

#include "circlet/base/threads.h"
#include "circlet/circle/export.h"
#include "circlet/io/file.h"
#include "error_text.h"
#include "golden_run.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

class ExactFilesTest : public testing::TestWithParam<GoldenCase> {};

std::vector<GoldenCase> AllRecipes() {
  std::vector<GoldenCase> cases;
  for (const char* model : {"seed_example", "tiny_e2b", "tiny_wide"})
    for (const char* recipe : {"default", "w4a16", "w8a8", "w8a16", "mixed8"}) cases.push_back({model, recipe});
  return cases;
}
INSTANTIATE_TEST_SUITE_P(All, ExactFilesTest, testing::ValuesIn(AllRecipes()), CaseName);

TEST_P(ExactFilesTest, EveryFileComputesWhatWasSimulatedToTheLastCode) {
  const GoldenRun run(GetParam(), "default");
  const VerifyResult result = Verify({.directory = run.Output()});
  EXPECT_EQ(result.dialect, "default");
  EXPECT_TRUE(result.exact) << VerifyText(result);
  EXPECT_TRUE(result.within_bounds);
  EXPECT_THAT(result.broken_boundaries, testing::IsEmpty());
  EXPECT_EQ(result.units.size(), run.Result().units.size());
  std::vector<std::string> names;
  for (const UnitVerdict& unit : result.units) {
    EXPECT_GT(unit.values, 0) << unit.unit << " was not compared";
    EXPECT_GT(unit.largest_code, 1) << unit.unit << " computes nothing but zeros";
    names.push_back(unit.unit);
  }
  EXPECT_THAT(names, testing::IsSupersetOf({"token_embedding", "decoder_layer_prefill_0", "decoder_layer_decode_0",
                                            "lm_head", "gemma4_model"}));
}

Tensor StoredCodes(const SafetensorsFile& codes, const std::string& name) {
  if (const Tensor* tensor = codes.Find(name); tensor != nullptr) return *tensor;
  return codes.Get(codes.Metadata().at(name));
}

// The decode units are verified on the last position of the sample that the prefill units are verified on. The order of
// a sum does not depend on the number of rows, so both find the same codes.
TEST_P(ExactFilesTest, DecodingTheLastPositionGivesThePrefillsCodes) {
  const GoldenRun run(GetParam(), "default");
  const SafetensorsFile codes = SafetensorsFile::Open(run.Output() / "verify.safetensors");
  int layers = 0;
  for (const UnitFile& unit : run.Result().units) {
    if (!unit.name.starts_with("decoder_layer_prefill_")) continue;
    const std::string index = unit.name.substr(unit.name.rfind('_') + 1);
    const Tensor prefill = StoredCodes(codes, unit.name + ".out.0");
    const Tensor decode = StoredCodes(codes, "decoder_layer_decode_" + index + ".out.0");
    const size_t tail_bytes = static_cast<size_t>(decode.Bytes());
    ASSERT_EQ(prefill.GetDType(), decode.GetDType());
    ASSERT_EQ(prefill.GetShape()[2], decode.GetShape()[2]);
    EXPECT_EQ(std::memcmp(prefill.Raw() + prefill.Bytes() - tail_bytes, decode.Raw(), tail_bytes), 0)
        << "layer " << index;
    ++layers;
  }
  EXPECT_GE(layers, 1);
}

class ReferenceFilesTest : public testing::TestWithParam<GoldenCase> {};
INSTANTIATE_TEST_SUITE_P(All, ReferenceFilesTest,
                         testing::Values(GoldenCase{"seed_example", "w4a16"}, GoldenCase{"tiny_e2b", "default"},
                                         GoldenCase{"tiny_wide", "w4a16"}),
                         CaseName);

TEST_P(ReferenceFilesTest, TheReferencesDialectDiffersWithinItsBoundsAndSaysWhere) {
  const GoldenRun run(GetParam(), "tico");
  const VerifyResult result = Verify({.directory = run.Output()});
  EXPECT_EQ(result.dialect, "tico");
  EXPECT_FALSE(result.exact) << "rounding half to even of a product with 1/s never met a tie?";
  EXPECT_TRUE(result.within_bounds) << VerifyText(result);
  for (const UnitVerdict& unit : result.units)
    EXPECT_EQ(unit.first_difference.empty(), unit.different == 0) << unit.unit;
}

// ---- Differences are found ------------------------------------------------------------------------------------------

// A small finished run that a test may spoil.
struct SpoiledRunTest : testing::Test {
  GoldenRun run{{"seed_example", "w8a16"}, "default"};
  fs::path out = run.Output();

  void Manifest(const std::function<void(nlohmann::json&)>& change) const {
    nlohmann::json manifest = ReadJson(out / "manifest.json");
    change(manifest);
    WriteJson(out / "manifest.json", manifest);
  }
  // Changes one constant byte of a unit's first matrix product.
  void FlipWeight(const std::string& file) const {
    circle::Model model = circle::Read(out / file);
    for (const circle::Operator& op : model.operators) {
      if (circle::OperatorName(op.code) != "FULLY_CONNECTED") continue;
      circle::Tensor& weight = model.tensors[op.inputs[1]];
      weight.data = weight.data.Clone();
      // From the middle: the first row is the pad token's, all zero.
      for (int i = 0; i < 64; ++i) weight.data.Raw()[weight.data.Bytes() / 2 + i] ^= std::byte{0x40};
      circle::Write(model, out / file);
      return;
    }
    FAIL() << file << " has no matrix product";
  }
};

std::vector<std::string> Faults(const VerifyResult& result) {
  std::vector<std::string> faults;
  for (const UnitVerdict& unit : result.units)
    if (!unit.fault.empty()) faults.push_back(unit.fault);
  return faults;
}

TEST_F(SpoiledRunTest, AChangedCodeIsNamedWithItsPlace) {
  const SafetensorsFile stored = SafetensorsFile::Open(out / "verify.safetensors");
  std::map<std::string, Tensor> codes = stored.Tensors();
  Tensor& changed = codes.at("decoder_layer_prefill_0.out.0");
  changed = changed.Clone();
  ASSERT_EQ(changed.GetShape(), (Shape{1, 16, 64}));
  ASSERT_EQ(changed.GetDType(), DType::kI16);
  int16_t& code = changed.As<int16_t>()[3 * 64 + 17];
  const std::string expectation = fmt::format("out.0[0,3,17]: code {}, expected {} (tensor \"", code, code + 5);
  code += 5;
  WriteSafetensors(out / "changed.safetensors", codes, stored.Metadata());

  const VerifyResult result = Verify({.directory = out, .codes = out / "changed.safetensors"});
  EXPECT_FALSE(result.exact);
  EXPECT_FALSE(result.within_bounds);
  for (const UnitVerdict& unit : result.units) {
    if (unit.unit != "decoder_layer_prefill_0") {
      EXPECT_EQ(unit.different, unit.unit == "gemma4_model" ? unit.different : 0) << unit.unit;
      continue;
    }
    EXPECT_EQ(unit.different, 1);
    EXPECT_EQ(unit.largest_step, 5);
    EXPECT_THAT(unit.first_difference, StartsWith(expectation));
  }
  EXPECT_THAT(VerifyText(result), AllOf(HasSubstr(expectation), HasSubstr("do not compute what was simulated")));
}

TEST_F(SpoiledRunTest, AFlippedWeightIsRefusedByItsHash) {
  FlipWeight("lm_head.q.circle");
  const VerifyResult result = Verify({.directory = out});
  EXPECT_EQ(result.verdict, VerifyResult::Verdict::kDamaged);
  EXPECT_FALSE(result.exact);
  EXPECT_THAT(Faults(result), ElementsAre(AllOf(StartsWith((out / "lm_head.q.circle").string()),
                                                HasSubstr("differs from the file that manifest.json lists"),
                                                HasSubstr("SHA-256"), HasSubstr("quantize again"))));
}

TEST_F(SpoiledRunTest, TheOtherFilesAreLookedAtAfterADamagedOne) {
  WriteFile(out / "token_embedding.q.circle", "no Circle file");
  fs::remove(out / "lm_head.q.circle");
  const VerifyResult result = Verify({.directory = out});
  EXPECT_EQ(result.verdict, VerifyResult::Verdict::kDamaged);
  EXPECT_THAT(Faults(result), ElementsAre(HasSubstr("token_embedding.q.circle: differs"),
                                          HasSubstr("lm_head.q.circle: cannot be opened")));
  for (const UnitVerdict& unit : result.units) EXPECT_EQ(unit.values > 0, unit.fault.empty()) << unit.unit;
  EXPECT_THAT(VerifyText(result), HasSubstr("files are missing or damaged"));
}

// ---- Nothing compared is no success -------------------------------------------------------------------------------

TEST_F(SpoiledRunTest, CodesThatNoUnitReadsAreNoSuccess) {
  const fs::path file = out.parent_path() / "codes.safetensors";
  const auto verify = [&] { return Verify({.directory = out, .codes = file}); };
  WriteSafetensors(file, {});
  const VerifyResult nothing = verify();
  EXPECT_EQ(nothing.verdict, VerifyResult::Verdict::kNothingCompared);
  EXPECT_FALSE(nothing.exact);
  EXPECT_FALSE(nothing.within_bounds);
  EXPECT_THAT(VerifyText(nothing),
              AllOf(HasSubstr("not compared, no input codes: token_embedding"), HasSubstr("lm_head"),
                    HasSubstr(" 0 compared: nothing was compared"), Not(HasSubstr("last code"))));
  WriteSafetensors(file, {{"lm_haed.in.0", Tensor::Of<int64_t>({1}, std::vector<int64_t>{1})}});
  EXPECT_THAT(ErrorText(verify), AllOf(StartsWith(file.string()), HasSubstr("\"lm_haed.in.0\" is no end of a unit"),
                                       HasSubstr("nearest: \"lm_head.in.0\"")));
  // Inputs alone compute something, which is compared with nothing.
  const SafetensorsFile stored = SafetensorsFile::Open(out / "verify.safetensors");
  const Tensor ids = StoredCodes(stored, "token_embedding.in.0");
  WriteSafetensors(file, {{"token_embedding.in.0", ids}});
  EXPECT_EQ(verify().verdict, VerifyResult::Verdict::kNothingCompared);
  WriteSafetensors(
      file, {{"token_embedding.in.0", ids}, {"token_embedding.out.0", StoredCodes(stored, "token_embedding.out.0")}});
  const VerifyResult some = verify();
  EXPECT_EQ(some.verdict, VerifyResult::Verdict::kExact);
  EXPECT_THAT(VerifyText(some), AllOf(HasSubstr("not compared, no input codes: ple_embedding"),
                                      HasSubstr(" 1 compared: every compared file")));
  const nlohmann::json json = nlohmann::json::parse(VerifyJson(some));
  EXPECT_EQ(json.at("verdict"), "exact");
  EXPECT_EQ(json.at("units").at(0).at("uncompared"), "");
  EXPECT_EQ(json.at("units").at(1).at("uncompared"), "no input codes");
}

TEST_F(SpoiledRunTest, ValuesOutOfTheGridAreCountedAndNaNsAreRefused) {
  const SafetensorsFile stored = SafetensorsFile::Open(out / "verify.safetensors");
  const circle::Model model = circle::Read(out / "lm_head.q.circle");
  Tensor values(TensorType{DType::kF32, model.tensors[model.inputs[0]].type.shape});
  values.F32()[0] = 1e9f;
  values.F32()[5] = -1e9f;
  const fs::path file = out.parent_path() / "codes.safetensors";
  WriteSafetensors(file, {{"lm_head.in.0", values}, {"lm_head.out.0", StoredCodes(stored, "lm_head.out.0")}});
  EXPECT_THAT(VerifyText(Verify({.directory = out, .codes = file})),
              HasSubstr("lm_head.in.0: 2 of 64 values are out of the grid (-"));
  const RunOptions run{.file = out / "lm_head.q.circle", .inputs = file, .unit = "lm_head"};
  EXPECT_THAT(RunFile(run).outside, ElementsAre(HasSubstr("2 of 64 values are out of the grid")));
  values.F32()[7] = NAN;
  WriteSafetensors(file, {{"lm_head.in.0", values}});
  EXPECT_THAT(ErrorText([&] { RunFile(run); }), HasSubstr("value [0,0,7] is NaN"));
  EXPECT_THAT(Faults(Verify({.directory = out, .codes = file})),
              ElementsAre(HasSubstr("lm_head.in.0: value [0,0,7] is NaN")));
}

// An unknown size is 1 in the shape, as readers of the format take it.
TEST_F(SpoiledRunTest, UnitsOfAnyLengthAreStoredAtOnePosition) {
  for (const char* name : {"token_embedding", "ple_embedding"}) {
    const circle::Model model = circle::Read(out / fmt::format("{}.q.circle", name));
    const circle::Tensor& ids = model.tensors[static_cast<size_t>(model.inputs[0])];
    EXPECT_EQ(ids.type.shape, (Shape{1, 1})) << name;
    EXPECT_THAT(ids.signature, ElementsAre(1, -1)) << name;
  }
}

// The unit hands its ids through beside what it computes.
TEST_F(SpoiledRunTest, IntegerOutputsAreComparedAsIntegers) {
  circle::Model model = circle::Read(out / "token_embedding.q.circle");
  model.outputs.push_back(model.inputs[0]);
  circle::Write(model, out / "token_embedding.q.circle");
  nlohmann::json pipeline = ReadJson(out / "pipeline.json");
  for (auto& unit : pipeline.at("units"))
    if (unit.at("name") == "token_embedding") unit.at("outputs").push_back({{"dtype", "int64"}});
  WriteJson(out / "pipeline.json", pipeline);
  Manifest([](nlohmann::json& manifest) { manifest.erase("outputs"); });
  const SafetensorsFile stored = SafetensorsFile::Open(out / "verify.safetensors");
  std::map<std::string, Tensor> codes{{"token_embedding.in.0", StoredCodes(stored, "token_embedding.in.0")},
                                      {"token_embedding.out.0", StoredCodes(stored, "token_embedding.out.0")}};
  codes["token_embedding.out.1"] = codes.at("token_embedding.in.0");
  const fs::path file = out.parent_path() / "codes.safetensors";
  WriteSafetensors(file, codes);
  const VerifyResult same = Verify({.directory = out, .codes = file});
  EXPECT_EQ(same.verdict, VerifyResult::Verdict::kExact) << VerifyText(same);
  EXPECT_THAT(same.notes, testing::Contains(HasSubstr("token_embedding.q.circle is not listed in manifest.json")));
  Tensor& ids = codes.at("token_embedding.out.1");
  ids = ids.Clone();
  ids.I64()[3] += 2;
  WriteSafetensors(file, codes);
  const VerifyResult other = Verify({.directory = out, .codes = file});
  EXPECT_EQ(other.verdict, VerifyResult::Verdict::kDifferent);
  EXPECT_THAT(other.units.at(0).first_difference, StartsWith("out.1[0,3]: code "));
  EXPECT_EQ(other.units.at(0).largest_step, 2);
}

TEST_F(SpoiledRunTest, TheListedGridsAreThoseOfTheFiles) {
  nlohmann::json pipeline = ReadJson(out / "pipeline.json");
  // Both ends of every boundary agree, with each other only.
  for (auto& unit : pipeline.at("units"))
    for (const char* side : {"inputs", "outputs"})
      for (auto& end : unit.at(side))
        if (end.at("key") == "hidden.1") end["scale"] = 0.5;
  WriteJson(out / "pipeline.json", pipeline);
  Manifest([](nlohmann::json& manifest) { manifest.erase("outputs"); });
  const VerifyResult result = Verify({.directory = out});
  EXPECT_EQ(result.verdict, VerifyResult::Verdict::kDifferent);
  EXPECT_THAT(result.broken_boundaries, testing::Contains(AllOf(StartsWith("lm_head.in.0: the file has int16 scale "),
                                                                HasSubstr("pipeline.json says int16 scale 0.5"))));
}

TEST_F(SpoiledRunTest, OtherInstructionsAreJudgedByABound) {
  Manifest([](nlohmann::json& manifest) { manifest["instruction_set"] = "OTHER"; });
  const SafetensorsFile stored = SafetensorsFile::Open(out / "verify.safetensors");
  std::map<std::string, Tensor> codes = stored.Tensors();
  Tensor& changed = codes.at("decoder_layer_prefill_0.out.0");
  changed = changed.Clone();
  const fs::path file = out.parent_path() / "codes.safetensors";
  changed.As<int16_t>()[17] += 2;
  WriteSafetensors(file, codes, stored.Metadata());
  const VerifyResult near = Verify({.directory = out, .codes = file});
  EXPECT_EQ(near.verdict, VerifyResult::Verdict::kWithinBounds);
  EXPECT_THAT(VerifyText(near), HasSubstr("made with OTHER, this is "));
  for (int16_t& code : changed.As<int16_t>()) code = static_cast<int16_t>(code / 2 + 9000);
  WriteSafetensors(file, codes, stored.Metadata());
  EXPECT_EQ(Verify({.directory = out, .codes = file}).verdict, VerifyResult::Verdict::kDifferent);
}

TEST_F(SpoiledRunTest, WhatIsNoOutputOfQuantizeIsSaid) {
  const auto said = [](const fs::path& path) { return ErrorText([&] { Verify({.directory = path}); }); };
  EXPECT_THAT(said(out / "lm_head.q.circle"), HasSubstr("is a file; give the directory that quantize wrote"));
  EXPECT_THAT(said(out / "absent"), HasSubstr("there is no such directory"));
  EXPECT_THAT(said(TestData("golden/seed_example/model")), HasSubstr("is a checkpoint"));
  EXPECT_THAT(said(out.parent_path()), HasSubstr("is no output of quantize, it has no manifest.json"));
  fs::create_directory(out.string() + ".partial");
  EXPECT_THAT(said(out.string() + ".partial"), HasSubstr("is an unfinished run of quantize; go on with it (--resume)"));
}

TEST_F(SpoiledRunTest, OtherChangedFilesOfTheManifestAreRefusedByTheirHashes) {
  for (const char* name : {"pipeline.json", "verify.safetensors"}) {
    const std::string before = ReadFile(out / name);
    std::string changed = before;
    changed.back() ^= 1;
    WriteFile(out / name, changed);
    EXPECT_THAT(ErrorText([&] { Verify({.directory = out}); }),
                AllOf(StartsWith((out / name).string()), HasSubstr("differs from the file that manifest.json lists")));
    WriteFile(out / name, before);
  }
  EXPECT_TRUE(Verify({.directory = out}).exact);
}

TEST_F(SpoiledRunTest, AFlippedWeightWithAFittingHashIsFoundByItsResults) {
  FlipWeight("lm_head.q.circle");
  Manifest([&](nlohmann::json& manifest) {
    for (auto& entry : manifest.at("outputs"))
      if (entry.at("file") == "lm_head.q.circle") entry["sha256"] = Sha256File(out / "lm_head.q.circle");
  });
  const VerifyResult result = Verify({.directory = out});
  EXPECT_FALSE(result.within_bounds);
  for (const UnitVerdict& unit : result.units) EXPECT_EQ(unit.different > 0, unit.unit == "lm_head") << unit.unit;
}

TEST_F(SpoiledRunTest, GridsThatDoNotMeetAreABrokenBoundary) {
  nlohmann::json pipeline = ReadJson(out / "pipeline.json");
  for (auto& unit : pipeline.at("units"))
    if (unit.at("name") == "lm_head") unit.at("inputs").at(0)["scale"] = 0.5;
  WriteJson(out / "pipeline.json", pipeline);
  Manifest([](nlohmann::json& manifest) { manifest.erase("outputs"); });
  const VerifyResult result = Verify({.directory = out});
  EXPECT_TRUE(result.exact);
  EXPECT_FALSE(result.within_bounds);
  EXPECT_THAT(result.broken_boundaries,
              testing::Contains(AllOf(StartsWith("hidden.1: decoder_layer_prefill_0.out.0 is int16 scale"),
                                      HasSubstr("lm_head.in.0 expects int16 scale 0.5"))));
}

TEST_F(SpoiledRunTest, AnUnknownDialectIsRefusedWithTheKnownOnes) {
  Manifest([](nlohmann::json& manifest) { manifest["dialect"] = "tikko"; });
  EXPECT_THAT(ErrorText([&] { Verify({.directory = out}); }),
              AllOf(StartsWith((out / "manifest.json").string()), HasSubstr("\"tikko\""), HasSubstr("tico")));
}

TEST_F(SpoiledRunTest, AMissingFileIsNamed) {
  fs::remove(out / "token_embedding.q.circle");
  EXPECT_THAT(Faults(Verify({.directory = out})),
              ElementsAre(AllOf(StartsWith((out / "token_embedding.q.circle").string()), HasSubstr("No such file"))));
}

// ---- Determinism ----------------------------------------------------------------------------------------------------

std::map<std::string, std::string> HashesIn(const fs::path& directory) {
  std::map<std::string, std::string> hashes;
  for (const auto& entry : fs::directory_iterator(directory))
    if (entry.path().filename() != "timings.json") hashes[entry.path().filename()] = Sha256File(entry.path());
  return hashes;
}

class DeterminismTest : public testing::Test {
 protected:
  void TearDown() override { SetThreads(before_); }

 private:
  int before_ = Threads();
};

TEST_F(DeterminismTest, ThreadsAndRepetitionLeaveEveryByteAlone) {
  std::map<std::string, std::string> first;
  for (const int threads : {1, 2, 2}) {
    SetThreads(threads);
    const GoldenRun run({"tiny_e2b", "w4a16"}, "default");
    const std::map<std::string, std::string> hashes = HashesIn(run.Output());
    if (first.empty()) first = hashes;
    EXPECT_THAT(hashes, testing::ContainerEq(first)) << threads << " threads";
  }
  EXPECT_THAT(first, AllOf(testing::SizeIs(testing::Ge(25u)), testing::Contains(testing::Key("manifest.json"))));
}

}  // namespace
}  // namespace circlet
