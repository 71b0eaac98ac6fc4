#include <gmock/gmock.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "circle/reader.h"
#include "circle/schema.h"
#include "circle/test_model.h"
#include "circle/writer.h"
#include "circlet/circle/listing.h"
#include "circlet/io/file.h"
#include "golden.h"
#include "temp_directory.h"

namespace circlet::circle {
namespace {

namespace fs = std::filesystem;
using ::testing::AllOf;
using ::testing::HasSubstr;

std::vector<fs::path> GoldenFiles() {
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(TestData("golden"))) {
    if (entry.path().extension() == ".circle") files.push_back(entry.path());
  }
  std::ranges::sort(files);
  return files;
}

TEST(CircleDumpTest, ListingsOfTheReferencesFilesAreEqualToItsOwn) {
  const std::vector<fs::path> files = GoldenFiles();
  EXPECT_GE(files.size(), 60);
  for (const fs::path& file : files)
    EXPECT_EQ(Dump(Read(file)), ReadFile(fs::path(file).replace_extension(".txt"))) << file;
}

TEST(CircleDumpTest, TheReferencesFilesSurviveBeingWrittenInBothForms) {
  for (const fs::path& file : GoldenFiles()) {
    const Model model = Read(file);
    for (const int64_t limit : {int64_t{1} << 30, int64_t{0}}) {
      const std::vector<std::byte> bytes = Serialize(model, {limit});
      EXPECT_TRUE(SameModel(model, Parse(bytes, nullptr, "again"))) << file;
    }
  }
}

TEST(CircleDumpTest, OneOperatorALineWithOptionsTypesAndGrids) {
  EXPECT_EQ(Dump(SmallModel()), R"(inputs: #0:INT16[1,-1,8]:s=0.5,z=0
outputs: #8:INT16[-1,3]:s=1.0,z=0 #4:INT16[1,-1,3]:s=3.0517578e-05,z=0
0 FULLY_CONNECTED {asymmetricQuantizeInputs=False,fusedActivationFunction=0,keepNumDims=True,quantizedBiasType=0,weightsFormat=0} (#0:INT16[1,-1,8]:s=0.5,z=0, #1:UINT4[3,8]:const:perch(axis=0,n=3,s0=0.25,z0=7), -) -> #2:INT16[1,-1,3]:s=0.125,z=0
1 RMS_NORM {epsilon=9.999999974752427e-07} (#2:INT16[1,-1,3]:s=0.125,z=0, #3:INT16[3]:const:s=0.0001,z=0) -> #4:INT16[1,-1,3]:s=3.0517578e-05,z=0
2 RESHAPE {newShape=[-1, 3]} (#4:INT16[1,-1,3]:s=3.0517578e-05,z=0, #5:INT32[2]:const) -> #6:INT16[-1,3]:s=3.0517578e-05,z=0
3 MUL {fusedActivationFunction=0} (#6:INT16[-1,3]:s=3.0517578e-05,z=0, #7:INT16[]:const:s=2.0,z=0) -> #8:INT16[-1,3]:s=1.0,z=0
)");
}

TEST(CircleDumpTest, ModelsWithWrongIndicesCanStillBeListed) {
  Model model = SmallModel();
  model.operators[3].code = 77 + 123;
  model.outputs = {99};
  EXPECT_THAT(Dump(model), AllOf(HasSubstr("outputs: #99:?\n"), HasSubstr("3 OPERATOR_200 (")));
}

TEST(CircleListingTest, NamesTypesBytesAndGridsStandInTextAndJson) {
  const TempDirectory directory;
  const fs::path path = directory.Path() / "m.circle";
  Write(SmallModel(), path, {0});
  const std::string text = ListingText(path);
  EXPECT_THAT(text, AllOf(HasSubstr(fmt::format("{} bytes, of them 28 in constants", fs::file_size(path))),
                          HasSubstr("operators: 4, 1 FULLY_CONNECTED, 1 MUL, 1 RESHAPE, 1 RMS_NORM\n"),
                          HasSubstr("input 0: x  int16[1,S,8], 16 B, scale 0.5, zero point 0\n"),
                          HasSubstr("uint4[3,8] constant, 12 B, 3 scales "), HasSubstr("\n3 MUL")));
  const nlohmann::json json = nlohmann::json::parse(ListingJson(path));
  const auto& input = json.at("tensors").at(json.at("inputs").at(0).get<int>());
  EXPECT_EQ(input.at("name"), "x");
  EXPECT_EQ(input.at("shape"), nlohmann::json({1, "S", 8}));
  EXPECT_EQ(json.at("operators").at(0).at("name"), "FULLY_CONNECTED");
  EXPECT_EQ(json.at("tensors").at(1).at("scale").size(), 3);
}

TEST(CircleSchemaTest, NamesAreUniqueAndOptionsAreStatedByIdOnce) {
  for (const OperatorSchema& schema : Operators()) {
    EXPECT_EQ(std::ranges::count(Operators(), schema.name, &OperatorSchema::name), 1) << schema.name;
    EXPECT_EQ(FindOperator(schema.code), &schema);
    EXPECT_EQ(OperatorName(schema.code), schema.name);
    int id = 0;
    for (const FieldSchema& field : schema.options.fields) EXPECT_EQ(field.id, id++) << schema.name << field.name;
    EXPECT_EQ(schema.options_type == 0, schema.options.name == "none");
  }
  EXPECT_EQ(OperatorName(77 + 123), "OPERATOR_200");
}

TEST(CircleSchemaTest, ElementTypesMapBothWays) {
  for (int k = 0; k <= static_cast<int>(DType::kBool); ++k) {
    const auto dtype = static_cast<DType>(k);
    const std::optional<int8_t> type = TensorTypeOf(dtype);
    EXPECT_EQ(type.has_value(), dtype != DType::kBF16);
    if (type.has_value()) {
      EXPECT_EQ(DTypeOf(*type), dtype);
    }
  }
  EXPECT_EQ(TensorTypeName(-1), "UINT4");
  EXPECT_EQ(TensorTypeName(-7), "MXINT8");
  EXPECT_EQ(TensorTypeName(42), "TYPE_42");
}

}  // namespace
}  // namespace circlet::circle
