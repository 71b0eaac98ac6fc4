#include "circle/reader.h"

#include <flatbuffers/flatbuffers.h>
#include <gmock/gmock.h>

#include <fstream>
#include <functional>

#include "circle/bounds.h"
#include "circle/schema.h"
#include "circle/test_model.h"
#include "circle/writer.h"
#include "error_text.h"
#include "temp_directory.h"

namespace circlet::circle {
namespace {

using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::StartsWith;

using Bytes = std::vector<std::byte>;

std::string ErrorOf(const Bytes& file) {
  return ErrorText([&] { Parse(file, nullptr, "m.circle"); });
}
std::string ErrorOf(const Model& model) { return ErrorOf(Serialize(model)); }

// A written file whose tables are changed in place: what a faulty exporter or a damaged disk leaves.
class Editable {
 public:
  explicit Editable(const Model& model = SmallModel(), const WriteOptions& options = {})
      : bytes(Serialize(model, options)) {}

  Table& Root() { return *flatbuffers::GetMutableRoot<Table>(bytes.data()); }
  Table& Subgraph() { return Child(Root(), model_field::kSubgraphs, 0); }
  Table& TensorAt(uint32_t i) { return Child(Subgraph(), subgraph_field::kTensors, i); }
  Table& OperatorAt(uint32_t i) { return Child(Subgraph(), subgraph_field::kOperators, i); }
  Table& CodeAt(uint32_t i) { return Child(Root(), model_field::kOperatorCodes, i); }
  Table& BufferAt(uint32_t i) { return Child(Root(), model_field::kBuffers, i); }
  Table& QuantizationOf(uint32_t tensor) {
    return *TensorAt(tensor).GetPointer<Table*>(Slot(tensor_field::kQuantization));
  }

  template <typename T>
  void Set(Table& table, int field, T value) {
    ASSERT_TRUE(table.SetField<T>(Slot(field), value)) << "the field is not in the file";
  }
  template <typename T>
  void SetElement(Table& table, int field, uint32_t index, T value) {
    auto* vector = table.GetPointer<Vector<T>*>(Slot(field));
    ASSERT_NE(vector, nullptr);
    vector->Mutate(index, value);
  }
  // Claims another number of elements of a vector, string or list of tables.
  void SetCount(Table& table, int field, uint32_t count) {
    auto* vector = table.GetPointer<uint32_t*>(Slot(field));
    ASSERT_NE(vector, nullptr);
    *vector = count;
  }

  std::string Error() const { return ErrorOf(bytes); }

  Bytes bytes;

 private:
  static Table& Child(Table& table, int field, uint32_t index) {
    const auto* tables = table.GetPointer<const Tables*>(Slot(field));
    return *const_cast<Table*>(tables->Get(index));
  }
};

TEST(CircleReaderTest, MissingFilesAndFoldersAreErrorsThatNameThem) {
  const TempDirectory directory;
  EXPECT_THAT(ErrorText([&] { Read(directory.Path() / "none.circle"); }), HasSubstr("none.circle"));
  EXPECT_THAT(ErrorText([&] { Read(directory.Path()); }), HasSubstr(directory.Path().string()));
}

TEST(CircleReaderTest, ForeignFilesAreNamedForWhatTheyAre) {
  Editable file;
  std::memcpy(file.bytes.data() + 4, "TFL3", 4);
  EXPECT_THAT(file.Error(), AllOf(StartsWith("m.circle: this is a TFLite file"), HasSubstr("CIR0")));
  std::memcpy(file.bytes.data() + 4, "PK\x03\x04", 4);
  EXPECT_THAT(file.Error(), AllOf(StartsWith("m.circle: no Circle file"), HasSubstr("50 4b 03 04")));
  EXPECT_THAT(ErrorOf(Bytes(7)), HasSubstr("7 bytes are too few"));
  EXPECT_THAT(ErrorOf(Bytes{}), HasSubstr("0 bytes are too few"));
}

TEST(CircleReaderTest, VectorsThatLeaveTheFileNameTheirPlace) {
  Editable shape;
  shape.SetCount(shape.TensorAt(3), tensor_field::kShape, 1u << 28);
  EXPECT_THAT(shape.Error(), AllOf(HasSubstr("Model.subgraphs[0].tensors[3].shape: reaches outside the file"),
                                   HasSubstr("export it again")));
  Editable tensors;
  tensors.SetCount(tensors.Subgraph(), subgraph_field::kTensors, 1u << 20);
  EXPECT_THAT(tensors.Error(), HasSubstr("Model.subgraphs[0].tensors"));
  Editable options;
  options.SetCount(*options.OperatorAt(2).GetPointer<Table*>(Slot(operator_field::kOptions)), 0, 1u << 29);
  EXPECT_THAT(options.Error(), HasSubstr("operator 2 RESHAPE: ReshapeOptions.new_shape: reaches outside the file"));
}

TEST(CircleReaderTest, OffsetsThatReferToOneListAgainAndAgainDoNotMultiplyIt) {
  // 300 tensors with one name of 2 MB are 600 MB.
  flatbuffers::FlatBufferBuilder fbb;
  const auto name = fbb.CreateString(std::string(2 << 20, 'n'));
  std::vector<Offset<Table>> tensors;
  for (int i = 0; i < 300; ++i) {
    const auto start = fbb.StartTable();
    fbb.AddOffset(Slot(tensor_field::kName), name);
    tensors.emplace_back(fbb.EndTable(start));
  }
  const auto tensor_vector = fbb.CreateVector(tensors);
  auto start = fbb.StartTable();
  fbb.AddOffset(Slot(subgraph_field::kTensors), tensor_vector);
  const Offset<Table> subgraph(fbb.EndTable(start));
  const auto subgraphs = fbb.CreateVector(&subgraph, 1);
  const Offset<Table> buffer(fbb.EndTable(fbb.StartTable()));
  const auto buffers = fbb.CreateVector(&buffer, 1);
  start = fbb.StartTable();
  fbb.AddOffset(Slot(model_field::kSubgraphs), subgraphs);
  fbb.AddOffset(Slot(model_field::kBuffers), buffers);
  fbb.Finish(Offset<Table>(fbb.EndTable(start)), kIdentifier);
  const auto bytes = std::as_bytes(std::span(fbb.GetBufferPointer(), fbb.GetSize()));
  EXPECT_THAT(ErrorOf(Bytes(bytes.begin(), bytes.end())), HasSubstr("refer to the same bytes again and again"));
}

TEST(CircleReaderTest, UnsupportedElementTypesNameTensorAndType) {
  Editable file;
  file.Set<int8_t>(file.TensorAt(1), tensor_field::kType, -2);
  EXPECT_THAT(file.Error(), StartsWith("m.circle: tensor 1 \"w\": element type GGML_Q4_0 is not supported"));
  file.Set<int8_t>(file.TensorAt(1), tensor_field::kType, 99);
  EXPECT_THAT(file.Error(), HasSubstr("element type TYPE_99"));
}

TEST(CircleReaderTest, PayloadOfWrongSizeNamesTensorAndBothSizes) {
  Editable file;
  file.SetElement<int32_t>(file.TensorAt(3), tensor_field::kShape, 0, 5);
  EXPECT_THAT(file.Error(), StartsWith("m.circle: tensor 3 \"gamma\": its buffer holds 6 bytes, int16[5] takes 10"));
  file.SetElement<int32_t>(file.TensorAt(3), tensor_field::kShape, 0, 2);
  EXPECT_THAT(file.Error(), HasSubstr("its buffer holds 6 bytes, int16[2] takes 4"));
  file.SetElement<int32_t>(file.TensorAt(3), tensor_field::kShape, 0, -5);
  EXPECT_THAT(file.Error(), HasSubstr("shape [-5] has the negative size -5"));
}

TEST(CircleReaderTest, BuffersOutOfRangeOrOnBufferZeroAreErrors) {
  Editable file;
  file.Set<uint32_t>(file.TensorAt(1), tensor_field::kBuffer, 5);
  EXPECT_THAT(file.Error(), HasSubstr("tensor 1 \"w\": buffer 5, but the file has buffers 0 to 4"));
  // Buffer 1 put in the place of buffer 0.
  Editable swapped;
  auto* offsets = swapped.Root().GetPointer<uint32_t*>(Slot(model_field::kBuffers));
  offsets[1] = offsets[2] + 4;
  EXPECT_THAT(swapped.Error(), HasSubstr("buffer 0 has a payload"));
}

TEST(CircleReaderTest, ExternalRangesMustLieInsideTheFileAndApart) {
  Editable file(SmallModel(), {0});
  const auto size = static_cast<uint64_t>(file.bytes.size());
  file.Set<uint64_t>(file.BufferAt(4), buffer_field::kOffset, size - 1);
  EXPECT_THAT(file.Error(), AllOf(HasSubstr("buffer 4: 2 bytes at offset"), HasSubstr("are not inside the file"),
                                  HasSubstr("cut off while copying")));
  file.Set<uint64_t>(file.BufferAt(4), buffer_field::kOffset, ~uint64_t{0});
  EXPECT_THAT(file.Error(), HasSubstr("are not inside the file"));
  const auto third = file.BufferAt(3).GetField<uint64_t>(Slot(buffer_field::kOffset), 0);
  file.Set<uint64_t>(file.BufferAt(4), buffer_field::kOffset, third + 6);
  EXPECT_THAT(file.Error(), AllOf(HasSubstr("buffer 4 (2 bytes"), HasSubstr("overlaps buffer 3 (8 bytes")));
  file.Set<uint64_t>(file.BufferAt(4), buffer_field::kOffset, third + 8);
  EXPECT_NO_THROW(Parse(file.bytes, nullptr, "m.circle"));
}

TEST(CircleReaderTest, OperatorCodesThatDisagreeAreAnError) {
  Editable file;
  file.Set<int8_t>(file.CodeAt(0), code_field::kDeprecatedBuiltinCode, 18);
  EXPECT_THAT(file.Error(),
              HasSubstr("operator code 0: deprecated_builtin_code is 18, builtin_code 9 (FULLY_CONNECTED)"));
  // A file from before the wide field existed.
  file.Set<int8_t>(file.CodeAt(0), code_field::kDeprecatedBuiltinCode, 9);
  file.Set<int32_t>(file.CodeAt(0), code_field::kBuiltinCode, 0);
  EXPECT_EQ(Parse(file.bytes, nullptr, "m.circle").operators[0].code, 9);
}

TEST(CircleReaderTest, CustomAndUnknownOperatorsAreNamed) {
  Editable file;
  file.Set<int8_t>(file.CodeAt(0), code_field::kDeprecatedBuiltinCode, 32);
  file.Set<int32_t>(file.CodeAt(0), code_field::kBuiltinCode, 32);
  EXPECT_THAT(file.Error(), HasSubstr("operator code 0: custom operator \"\""));
  file.Set<int8_t>(file.CodeAt(0), code_field::kDeprecatedBuiltinCode, 127);
  file.Set<int32_t>(file.CodeAt(0), code_field::kBuiltinCode, 200);
  EXPECT_THAT(file.Error(), HasSubstr("operator code 0: builtin operator 200 is unknown"));
}

TEST(CircleReaderTest, OptionsOfAnotherOperatorAreAnError) {
  Editable file;
  file.Set<uint8_t>(file.OperatorAt(0), operator_field::kOptionsType, 21);
  EXPECT_THAT(file.Error(),
              HasSubstr("operator 0 FULLY_CONNECTED: options of type 21, expected 8 (FullyConnectedOptions)"));
  file.Set<uint8_t>(file.OperatorAt(0), operator_field::kOptionsType, 0);
  EXPECT_THAT(file.Error(), HasSubstr("operator 0 FULLY_CONNECTED: its FullyConnectedOptions are missing"));
}

TEST(CircleReaderTest, OperatorsThatRunOtherGraphsAreRefused) {
  Editable file;
  file.Set<int8_t>(file.CodeAt(3), code_field::kDeprecatedBuiltinCode, 31);
  file.Set<int32_t>(file.CodeAt(3), code_field::kBuiltinCode, 31);
  file.Set<uint8_t>(file.OperatorAt(3), operator_field::kOptionsType, 16);
  EXPECT_THAT(file.Error(), HasSubstr("operator 3 CALL: runs another graph"));
}

TEST(CircleReaderTest, MoreThanOneSubgraphIsAnError) {
  Editable file;
  file.SetCount(file.Root(), model_field::kSubgraphs, 0);
  EXPECT_THAT(file.Error(), HasSubstr("0 subgraphs; circlet reads files of exactly one"));
}

TEST(CircleReaderTest, ZeroPointsMustMatchTheScalesAndFitTheirType) {
  Editable file;
  file.SetElement<int64_t>(file.QuantizationOf(1), quantization_field::kZeroPoint, 2, int64_t{1} << 40);
  EXPECT_THAT(file.Error(), HasSubstr("tensor 1 \"w\": zero point 2 is 1099511627776, which leaves int32"));
  file.SetElement<int64_t>(file.QuantizationOf(1), quantization_field::kZeroPoint, 2, 16);
  EXPECT_THAT(file.Error(), HasSubstr("tensor 1 \"w\": zero point 2 is 16, outside 0..15 of uint4"));
  file.SetCount(file.QuantizationOf(1), quantization_field::kZeroPoint, 2);
  EXPECT_THAT(file.Error(), HasSubstr("tensor 1 \"w\": 3 scales, but 2 zero points"));
}

TEST(CircleReaderTest, FaultsOfTheModelNameFilePlaceAndCount) {
  Model model = SmallModel();
  model.operators[1].inputs[0] = 99;
  EXPECT_THAT(ErrorOf(model), AllOf(StartsWith("m.circle: operator 1 RMS_NORM: input 0 is tensor 99 of 9"),
                                    HasSubstr("export it again")));
  model.outputs[0] = 100;
  EXPECT_THAT(ErrorOf(model), HasSubstr("(and 1 more faults)"));
}

TEST(CircleReaderTest, MisalignedPayloadsAreReadFromACopy) {
  // One byte in front of the payload of "shape" (int32) moves it to an odd address, as packers without alignment do.
  Model model = SmallModel();
  Editable file(model, {0});
  const auto offset = file.BufferAt(3).GetField<uint64_t>(Slot(buffer_field::kOffset), 0);
  std::memmove(file.bytes.data() + offset + 1, file.bytes.data() + offset, 8);
  file.Set<uint64_t>(file.BufferAt(3), buffer_field::kOffset, offset + 1);
  const Model again = Parse(file.bytes, nullptr, "m.circle");
  EXPECT_THAT(again.tensors[5].data.As<int32_t>(), ::testing::ElementsAre(-1, 3));
  EXPECT_TRUE(SameModel(model, again));
}

TEST(CircleReaderTest, ConstantsPointIntoTheBytesAndKeepTheirOwner) {
  auto bytes = std::make_shared<Bytes>(Serialize(SmallModel()));
  const Model model = Parse(*bytes, bytes, "m.circle");
  const std::byte* data = model.tensors[3].data.Raw();
  EXPECT_TRUE(data >= bytes->data() && data < bytes->data() + bytes->size());
  const std::weak_ptr<Bytes> watch = bytes;
  bytes.reset();
  EXPECT_FALSE(watch.expired());
  EXPECT_THAT(model.tensors[3].data.As<int16_t>(), ::testing::ElementsAre(1, -2, 32767));
}

TEST(CircleReaderTest, BytesAtAnyAddressAreRead) {
  const Bytes file = Serialize(SmallModel());
  Bytes shifted(file.size() + 1);
  std::ranges::copy(file, shifted.begin() + 1);
  EXPECT_TRUE(SameModel(SmallModel(), Parse(std::span(shifted).subspan(1), nullptr, "m.circle")));
}

// Reads everything a caller may look at.
int64_t Touch(const Model& model) {
  int64_t sum = static_cast<int64_t>(Dump(model).size());
  for (const Tensor& tensor : model.tensors) {
    for (int64_t i = 0; !tensor.data.Empty() && i < tensor.data.Bytes(); ++i)
      sum += static_cast<int64_t>(tensor.data.Raw()[i]);
  }
  return sum;
}

TEST(CircleReaderTest, AFileCutAnywhereIsAnError) {
  for (const int64_t limit : {int64_t{1} << 30, int64_t{0}}) {
    const Bytes file = Serialize(SmallModel(), {limit});
    for (size_t length = 0; length < file.size(); ++length) {
      // Memory of exactly this length, so that the address sanitizer sees the first byte too many.
      const auto cut = std::make_shared<Bytes>(file.begin(), file.begin() + static_cast<ptrdiff_t>(length));
      EXPECT_THROW(Parse(*cut, cut, "m.circle"), Error) << length;
    }
  }
}

TEST(CircleReaderTest, AnyChangedByteIsAnErrorOrAnotherValidModel) {
  int refused = 0;
  for (const int64_t limit : {int64_t{1} << 30, int64_t{0}}) {
    const Bytes file = Serialize(SmallModel(), {limit});
    for (size_t at = 0; at < file.size(); ++at) {
      for (const int flip : {0x01, 0x04, 0x80, 0xff}) {
        const auto damaged = std::make_shared<Bytes>(file);
        (*damaged)[at] ^= static_cast<std::byte>(flip);
        try {
          Touch(Parse(*damaged, damaged, "m.circle"));
        } catch (const Error& error) {
          EXPECT_THAT(error.what(), StartsWith("m.circle: "));
          ++refused;
        }
      }
    }
  }
  // Most bytes of so small a file are structure.
  EXPECT_GT(refused, 2000);
}

}  // namespace
}  // namespace circlet::circle
