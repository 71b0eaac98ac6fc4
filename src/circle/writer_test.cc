#include "circle/writer.h"

#include <flatbuffers/flatbuffers.h>
#include <gmock/gmock.h>
#include <sys/mman.h>

#include <fstream>

#include "circle/bounds.h"
#include "circle/reader.h"
#include "circle/schema.h"
#include "circle/test_model.h"
#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "temp_directory.h"

namespace circlet::circle {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Pair;

Model ParseBytes(const std::vector<std::byte>& bytes) { return Parse(bytes, nullptr, "m.circle"); }

// The tables of one kind below the root or the subgraph of a written file.
std::vector<const Table*> TablesOf(const std::vector<std::byte>& file, int model_field, int subgraph_field = -1) {
  const Table* table = flatbuffers::GetRoot<Table>(file.data());
  const auto* tables = table->GetPointer<const Tables*>(Slot(model_field));
  if (subgraph_field >= 0) tables = tables->Get(0)->GetPointer<const Tables*>(Slot(subgraph_field));
  return {tables->begin(), tables->end()};
}

TEST(CircleWriterTest, WhatIsWrittenIsReadBackEqual) {
  const TempDirectory directory;
  const auto path = directory.Path() / "m.circle";
  const Model model = SmallModel();
  const int64_t bytes = Write(model, path);
  EXPECT_EQ(bytes, static_cast<int64_t>(std::filesystem::file_size(path)));
  EXPECT_TRUE(SameModel(model, Read(path))) << Dump(Read(path));
  EXPECT_EQ(ReadFile(path),
            std::string(reinterpret_cast<const char*>(Serialize(model).data()), Serialize(model).size()));
}

TEST(CircleWriterTest, EveryElementTypeComesBackFromConstants) {
  Model model;
  for (int k = 0; k <= static_cast<int>(DType::kBool); ++k) {
    const auto dtype = static_cast<DType>(k);
    if (dtype == DType::kBF16) continue;
    circlet::Tensor data(TensorType{dtype, {3, 5}});
    for (int64_t i = 0; i < data.Bytes(); ++i) data.Raw()[i] = static_cast<std::byte>(i & 1);
    std::optional<QParams> qparams;
    if (BitWidth(dtype) == 4) qparams = QParams{dtype, 1, {1, 2, 3, 4, 5}, {0, 1, 2, 3, 7}};
    model.tensors.push_back(ConstantTensor(std::string(Name(dtype)), data, qparams));
    model.outputs.push_back(static_cast<int32_t>(model.tensors.size()) - 1);
  }
  EXPECT_THAT(Verify(model), ::testing::IsEmpty());
  EXPECT_TRUE(SameModel(model, ParseBytes(Serialize(model))));
}

TEST(CircleWriterTest, ConstantsWithoutElementsStayConstants) {
  Model model = SmallModel();
  model.tensors.push_back(ConstantTensor("none", circlet::Tensor(TensorType{DType::kI32, {0}})));
  for (const int64_t limit : {int64_t{1} << 30, int64_t{0}}) {
    const Model again = ParseBytes(Serialize(model, {limit}));
    EXPECT_FALSE(again.tensors.back().data.Empty());
    EXPECT_EQ(again.tensors.back().data.Bytes(), 0);
  }
}

// Other values than the defaults in every field, so that a swapped id or kind shows.
std::vector<CircleOption> DistinctOptions(const TableSchema& table) {
  std::vector<CircleOption> options;
  int64_t next = 3;
  for (const FieldSchema& field : table.fields) {
    const std::string name(field.name);
    if (field.kind == FieldKind::kBool)
      options.push_back({name, int64_t{field.default_value == 0}});
    else if (field.kind == FieldKind::kFloat)
      options.push_back({name, static_cast<double>(next++) + 0.5});
    else if (field.kind == FieldKind::kInt32s)
      options.push_back({name, std::vector<int32_t>{-1, static_cast<int32_t>(next++)}});
    else if (field.kind == FieldKind::kString)
      options.push_back({name, "text " + std::to_string(next++)});
    else
      options.push_back({name, next++});
  }
  return options;
}

TEST(CircleWriterTest, OptionsOfEveryOperatorComeBack) {
  for (const OperatorSchema& schema : Operators()) {
    if (IsControlFlow(schema.code)) continue;
    Model model;
    model.tensors = {Activation("x", {DType::kI16, {2}}, 1), Activation("y", {DType::kI16, {2}}, 1)};
    model.inputs = {0};
    model.outputs = {1};
    model.operators = {{schema.code, DistinctOptions(schema.options), {0}, {1}}};
    const Model again = ParseBytes(Serialize(model));
    EXPECT_EQ(again.operators[0].code, schema.code) << schema.name;
    EXPECT_EQ(again.operators[0].options, model.operators[0].options) << schema.name;
  }
}

TEST(CircleWriterTest, AnOptionIsHeldToTheRangeOfItsField) {
  struct Range {
    FieldKind kind;
    int64_t least, most;
  };
  for (const auto& [kind, least, most] : {Range{FieldKind::kBool, 0, 1},
                                          {FieldKind::kInt8, -128, 127},
                                          {FieldKind::kInt32, INT32_MIN, INT32_MAX},
                                          {FieldKind::kUint32, 0, UINT32_MAX}}) {
    const FieldSchema field{0, "field", kind};
    for (const int64_t inside : {least, most}) EXPECT_TRUE(Fits({"field", inside}, field)) << inside;
    for (const int64_t outside : {least - 1, most + 1}) EXPECT_FALSE(Fits({"field", outside}, field)) << outside;
    EXPECT_FALSE(Fits({"field", 0.5}, field));
  }
}

TEST(CircleWriterTest, OptionsLeftOutAreReadAsTheSchemasDefaults) {
  Model model = SmallModel();
  model.operators[0].options.clear();
  model.operators[3].code = 0;  // ADD, whose pot_scale_int16 is true unless it is written
  const Model again = ParseBytes(Serialize(model));
  EXPECT_THAT(again.operators[0].options, ::testing::Contains(CircleOption{"keep_num_dims", int64_t{0}}));
  EXPECT_THAT(again.operators[3].options, ElementsAre(CircleOption{"fused_activation_function", int64_t{0}},
                                                      CircleOption{"pot_scale_int16", int64_t{1}}));
}

TEST(CircleWriterTest, OptionsTableIsThereEvenWhenItIsEmpty) {
  Model model = SmallModel();
  model.operators[3] = {55, {}, {6, 7}, {8}};  // MAXIMUM
  const std::vector<std::byte> file = Serialize(model);
  const Table* op = TablesOf(file, model_field::kSubgraphs, subgraph_field::kOperators)[3];
  EXPECT_EQ(op->GetField<uint8_t>(Slot(operator_field::kOptionsType), 0), 39);
  EXPECT_NE(op->GetPointer<const Table*>(Slot(operator_field::kOptions)), nullptr);
}

TEST(CircleWriterTest, OperatorCodesFollowTheNarrowFieldRuleInOrderOfFirstUse) {
  Model model = SmallModel();
  model.operators[2] = {150, {}, {4}, {6}};
  model.operators[3] = {9, {}, {6, 7, -1}, {8}};
  std::vector<std::pair<int, int>> codes;
  const std::vector<std::byte> file = Serialize(model);
  for (const Table* code : TablesOf(file, model_field::kOperatorCodes)) {
    codes.emplace_back(code->GetField<int8_t>(Slot(code_field::kDeprecatedBuiltinCode), 0),
                       code->GetField<int32_t>(Slot(code_field::kBuiltinCode), 0));
    EXPECT_EQ(code->GetField<int32_t>(Slot(code_field::kVersion), 1), 1);
  }
  EXPECT_THAT(codes, ElementsAre(Pair(9, 9), Pair(-6, -6), Pair(127, 150)));
}

TEST(CircleWriterTest, EqualConstantsShareOneBufferAndBufferZeroIsEmpty) {
  Model model = SmallModel();
  model.tensors.push_back(model.tensors[3]);
  model.tensors.back().name = "gamma of another layer";
  const std::vector<std::byte> file = Serialize(model);
  const auto buffers = TablesOf(file, model_field::kBuffers);
  EXPECT_EQ(buffers.size(), 5);  // none, w, gamma, shape, factor
  EXPECT_FALSE(buffers[0]->CheckField(Slot(buffer_field::kData)));
  const auto tensors = TablesOf(file, model_field::kSubgraphs, subgraph_field::kTensors);
  EXPECT_EQ(tensors[9]->GetField<uint32_t>(Slot(tensor_field::kBuffer), 0),
            tensors[3]->GetField<uint32_t>(Slot(tensor_field::kBuffer), 0));
  EXPECT_EQ(tensors[0]->GetField<uint32_t>(Slot(tensor_field::kBuffer), 0), 0);
  EXPECT_TRUE(SameModel(model, ParseBytes(file)));
}

// Counts upwards; `calls` holds the pieces that were asked for.
struct CountingConstant final : LazyConstant {
  void Fill(int64_t first, std::span<std::byte> out) const override {
    for (size_t i = 0; i < out.size(); ++i) out[i] = static_cast<std::byte>((first + static_cast<int64_t>(i)) % 251);
    calls.emplace_back(first, out.size());
  }
  mutable std::vector<std::pair<int64_t, size_t>> calls;
};

TEST(CircleWriterTest, LazyConstantsAreMadeInPiecesAndGiveTheSameFile) {
  constexpr int64_t kBytes = (int64_t{9} << 20) + 3;
  const auto lazy = std::make_shared<CountingConstant>();
  Model model = SmallModel(), eager = SmallModel();
  for (const char* name : {"table", "the same"}) {
    model.tensors.push_back(Activation(name, {DType::kI8, {kBytes}}, 0.5f));
    model.tensors.back().lazy = lazy;
  }
  circlet::Tensor data(TensorType{DType::kI8, {kBytes}});
  lazy->Fill(0, {data.Raw(), static_cast<size_t>(kBytes)});
  lazy->calls.clear();
  for (const char* name : {"table", "the same"})
    eager.tensors.push_back(ConstantTensor(name, data, model.tensors.back().qparams));
  EXPECT_THAT(Verify(model), ::testing::IsEmpty());
  EXPECT_EQ(Dump(model), Dump(eager));

  const TempDirectory directory;
  for (const int64_t limit : {int64_t{1} << 30, int64_t{0}}) {
    lazy->calls.clear();
    Write(model, directory.Path() / "lazy.circle", {limit});
    EXPECT_THAT(lazy->calls, ElementsAre(Pair(0, 4 << 20), Pair(4 << 20, 4 << 20), Pair(8 << 20, (1 << 20) + 3)));
    Write(eager, directory.Path() / "eager.circle", {limit});
    EXPECT_TRUE(ReadFile(directory.Path() / "lazy.circle") == ReadFile(directory.Path() / "eager.circle"));
    EXPECT_EQ(Serialize(model, {limit}), Serialize(eager, {limit}));
  }
}

TEST(CircleWriterTest, OnlyDynamicTensorsHaveASignatureAndScalarsHaveARank) {
  const std::vector<std::byte> file = Serialize(SmallModel());
  const auto tensors = TablesOf(file, model_field::kSubgraphs, subgraph_field::kTensors);
  EXPECT_TRUE(tensors[0]->CheckField(Slot(tensor_field::kShapeSignature)));
  EXPECT_FALSE(tensors[1]->CheckField(Slot(tensor_field::kShapeSignature)));
  EXPECT_EQ(tensors[7]->GetField<uint8_t>(Slot(tensor_field::kHasRank), 0), 1);
  EXPECT_FALSE(tensors[5]->CheckField(Slot(tensor_field::kQuantization)));
}

TEST(CircleWriterTest, RepeatedAndEmptyNamesBecomeUnique) {
  Model model = SmallModel();
  for (const int i : {1, 2, 3}) model.tensors[static_cast<size_t>(i)].name = "x";
  model.tensors[4].name = "x_1";
  model.tensors[5].name = model.tensors[6].name = "";
  const Model again = ParseBytes(Serialize(model));
  std::vector<std::string> names;
  for (const Tensor& tensor : again.tensors) names.push_back(tensor.name);
  EXPECT_THAT(names, ElementsAre("x", "x_2", "x_3", "x_4", "x_1", "tensor", "tensor_1", "factor", "z"));
}

TEST(CircleWriterTest, PayloadsStartAtMultiplesOfSixteen) {
  for (const int64_t limit : {int64_t{1} << 30, int64_t{0}}) {
    const FilePlan plan = Plan(SmallModel(), {limit});
    ASSERT_EQ(plan.payloads.size(), 4);
    int64_t end = static_cast<int64_t>(plan.head.size());
    for (const Payload& payload : plan.payloads) {
      EXPECT_EQ(payload.offset % 16, 0);
      EXPECT_GE(payload.offset, end + (payload.inline_vector ? 4 : 0));
      end = payload.offset + payload.bytes;
    }
    EXPECT_EQ(plan.file_bytes, end);
  }
}

TEST(CircleWriterTest, ConstantsGoBehindTheFlatBufferJustPastTheLimit) {
  const int64_t bytes = 12 + 6 + 8 + 2;  // w, gamma, shape, factor
  const TempDirectory directory;
  const auto path = directory.Path() / "m.circle";
  Write(SmallModel(), path, {bytes});
  EXPECT_EQ(OpenFile(path).external_bytes, 0);
  Write(SmallModel(), path, {bytes - 1});
  const FileView file = OpenFile(path);
  EXPECT_EQ(file.external_bytes, bytes);
  EXPECT_TRUE(SameModel(SmallModel(), file.model));
  const std::string text = ReadFile(path);
  const std::vector<std::byte> copy(reinterpret_cast<const std::byte*>(text.data()),
                                    reinterpret_cast<const std::byte*>(text.data()) + text.size());
  const auto buffers = TablesOf(copy, model_field::kBuffers);
  EXPECT_FALSE(buffers[1]->CheckField(Slot(buffer_field::kData)));
  EXPECT_GE(buffers[1]->GetField<uint64_t>(Slot(buffer_field::kOffset), 0), 8);
  EXPECT_EQ(buffers[1]->GetField<uint64_t>(Slot(buffer_field::kSize), 0), 12);
}

// 2.5 GiB of zero pages with marks at the ends, so that neither memory nor disk of that size is needed: the file is
// laid out as Plan says, with holes for the zeros.
TEST(CircleWriterTest, OneConstantOfMoreThanTwoGiBIsWrittenAndReadBack) {
  constexpr int64_t kRows = 5 << 10;
  constexpr int64_t kColumns = 512 << 10;
  void* pages =
      mmap(nullptr, kRows * kColumns, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  ASSERT_NE(pages, MAP_FAILED);
  const std::shared_ptr<const void> owner(pages, [](const void* p) { munmap(const_cast<void*>(p), kRows * kColumns); });
  const circlet::Tensor large(TensorType{DType::kI8, {kRows, kColumns}}, pages, owner);
  large.Raw()[0] = std::byte{1};
  large.Raw()[large.Bytes() - 1] = std::byte{2};
  Model model = SmallModel();
  model.tensors.push_back(ConstantTensor("table", large, QParams{DType::kI8, -1, {0.5f}, {0}}));
  model.tensors.push_back(ConstantTensor("after", ConstantOf<int32_t, 2>({2}, {77, 78})));
  EXPECT_THAT(Verify(model), ::testing::IsEmpty());

  const FilePlan plan = Plan(model, {});
  EXPECT_GT(plan.file_bytes, int64_t{5} << 29);
  const TempDirectory directory;
  const auto path = directory.Path() / "large.circle";
  {
    std::ofstream file(path, std::ios::binary);
    const auto put = [&](int64_t offset, const std::byte* data, int64_t bytes) {
      file.seekp(offset).write(reinterpret_cast<const char*>(data), bytes);
    };
    put(0, plan.head.data(), static_cast<int64_t>(plan.head.size()));
    for (const Payload& payload : plan.payloads) {
      const int64_t part = std::min<int64_t>(payload.bytes, 4096);
      put(payload.offset, payload.data, part);
      put(payload.offset + payload.bytes - part, payload.data + payload.bytes - part, part);
    }
    ASSERT_TRUE(file.good());
  }
  const FileView file = OpenFile(path);
  EXPECT_EQ(file.file_bytes, plan.file_bytes);
  EXPECT_GT(file.external_bytes, large.Bytes());
  const circlet::Tensor& again = file.model.tensors[9].data;
  EXPECT_EQ(again.Type(), large.Type());
  EXPECT_EQ(again.Raw()[0], std::byte{1});
  EXPECT_EQ(again.Raw()[again.Bytes() - 1], std::byte{2});
  EXPECT_THAT(file.model.tensors[10].data.As<int32_t>(), ElementsAre(77, 78));
}

TEST(CircleWriterTest, AFaultyModelIsRefusedAndNothingIsWritten) {
  const TempDirectory directory;
  const auto path = directory.Path() / "m.circle";
  Model model = SmallModel();
  model.operators[1].inputs[0] = 99;
  try {
    Write(model, path);
    FAIL() << "no Bug was thrown";
  } catch (const Bug& bug) {
    EXPECT_THAT(bug.what(), HasSubstr("operator 1 RMS_NORM: input 0 is tensor 99 of 9"));
  }
  EXPECT_TRUE(std::filesystem::is_empty(directory.Path()));
}

TEST(CircleWriterTest, APathThatCannotBeWrittenIsAnError) {
  const TempDirectory directory;
  try {
    Write(SmallModel(), directory.Path() / "no such folder" / "m.circle");
    FAIL() << "no Error was thrown";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("no such folder/m.circle"));
  }
}

}  // namespace
}  // namespace circlet::circle
