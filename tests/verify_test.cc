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
using ::testing::HasSubstr;
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
  EXPECT_THAT(ErrorText([&] { Verify({.directory = out}); }),
              AllOf(StartsWith((out / "lm_head.q.circle").string()),
                    HasSubstr("differs from the file that manifest.json lists"), HasSubstr("SHA-256"),
                    HasSubstr("quantize again")));
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

TEST_F(SpoiledRunTest, AMissingFileIsNamed) {
  fs::remove(out / "token_embedding.q.circle");
  EXPECT_THAT(ErrorText([&] { Verify({.directory = out}); }),
              AllOf(StartsWith((out / "token_embedding.q.circle").string()), HasSubstr("No such file")));
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
