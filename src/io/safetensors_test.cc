#include "circlet/io/safetensors.h"

#include <gmock/gmock.h>

#include <cstring>
#include <fstream>
#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "circlet/io/json.h"
#include "error_text.h"
#include "golden.h"
#include "temp_directory.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::StartsWith;

std::string FileBytes(std::string_view header, std::string_view data) {
  const uint64_t length = header.size();
  return std::string(reinterpret_cast<const char*>(&length), 8) + std::string(header) + std::string(data);
}

class SafetensorsTest : public ::testing::Test {
 protected:
  fs::path Path() const { return directory_.Path() / "m.safetensors"; }
  void Put(std::string_view header, std::string_view data) { WriteFile(Path(), FileBytes(header, data)); }
  // The error without the file's path in front.
  std::string OpenError() {
    const std::string text = ErrorText([&] { SafetensorsFile::Open(Path()); });
    EXPECT_THAT(text, StartsWith(Path().string() + ": "));
    return text.substr(std::min(text.size(), Path().string().size() + 2));
  }
  std::string OpenError(std::string_view header, std::string_view data) {
    Put(header, data);
    return OpenError();
  }

  TempDirectory directory_;
};

TEST_F(SafetensorsTest, ReadsTypesShapesBytesAndMetadata) {
  Put(R"({"__metadata__":{"format":"pt"},"b":{"dtype":"I32","shape":[2],"data_offsets":[0,8]},)"
      R"("a":{"dtype":"BF16","shape":[1,2],"data_offsets":[8,12]},"s":{"dtype":"U8","shape":[],"data_offsets":[12,13]},)"
      R"("z":{"dtype":"F32","shape":[0,3],"data_offsets":[13,13]}})",
      std::string_view("\1\0\0\0\2\0\0\0\x80\x3f\0\x40\7", 13));
  const SafetensorsFile file = SafetensorsFile::Open(Path());
  EXPECT_EQ(file.Tensors().size(), 4);
  EXPECT_EQ(file.Metadata().at("format"), "pt");
  EXPECT_THAT(file.Get("b").As<int32_t>(), ElementsAre(1, 2));
  EXPECT_EQ(file.Get("a").GetShape(), Shape({1, 2}));
  EXPECT_THAT(ToF32(file.Get("a")).F32(), ElementsAre(1.0f, 2.0f));
  EXPECT_EQ(file.Get("s").As<uint8_t>()[0], 7);
  EXPECT_EQ(file.Get("z").Bytes(), 0);
  EXPECT_EQ(file.Find("nope"), nullptr);
}

TEST_F(SafetensorsTest, TensorsOutliveTheFileObject) {
  Put(R"({"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}})", "hi");
  const Tensor tensor = SafetensorsFile::Open(Path()).Get("a");
  fs::remove(Path());
  EXPECT_THAT(tensor.As<uint8_t>(), ElementsAre('h', 'i'));
}

TEST_F(SafetensorsTest, BytesThatTheFileDoesNotAlignAreCopied) {
  const std::string header = R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}})";
  for (size_t spaces = 0; spaces < 8; ++spaces) {
    Put(header + std::string(spaces, ' '), std::string_view("\0\0\x80\x3f", 4));
    EXPECT_THAT(SafetensorsFile::Open(Path()).Get("a").F32(), ElementsAre(1.0f)) << spaces;
  }
}

TEST_F(SafetensorsTest, ReleasedPagesReadBackAndCopiesAreNotWiped) {
  std::map<std::string, Tensor> tensors;
  tensors.emplace("a", Tensor({DType::kU8, {5}}));
  tensors.emplace("b", Tensor({DType::kF32, {100'000}}));  // behind 5 bytes: not aligned
  tensors.emplace("c", Tensor({DType::kU8, {100'000}}));
  for (float& value : tensors.at("b").F32()) value = 3.5f;
  std::memset(tensors.at("c").Raw(), 9, 100'000);
  WriteSafetensors(Path(), tensors);
  const SafetensorsFile file = SafetensorsFile::Open(Path());
  for (const char* name : {"a", "b", "c"}) file.Release(file.Get(name));
  EXPECT_THAT(file.Get("b").F32(), ::testing::Each(3.5f));
  EXPECT_THAT(file.Get("c").As<uint8_t>(), ::testing::Each(9));
}

TEST_F(SafetensorsTest, AMissingTensorNamesTheNearest) {
  Put(R"({"model.norm.weight":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}})", "");
  EXPECT_EQ(ErrorText([&] { SafetensorsFile::Open(Path()).Get("norm.weight"); }),
            Path().string() + ": tensor \"norm.weight\" is missing among 1; nearest: \"model.norm.weight\"");
}

// --- Damage ---

TEST_F(SafetensorsTest, AFileTooShortForItsHeaderSaysSo) {
  WriteFile(Path(), "1234567");
  EXPECT_EQ(OpenError(), "has 7 bytes, a safetensors file has at least 8; is it the right file, and complete?");
  WriteFile(Path(), "");
  EXPECT_THAT(OpenError(), StartsWith("has 0 bytes"));
  WriteFile(Path(), FileBytes(std::string(100, ' '), "").substr(0, 50));
  EXPECT_EQ(OpenError(),
            "the header's length is 100, the file has 42 bytes after it; the file is cut: copy or download it again");
}

TEST_F(SafetensorsTest, AnImpossibleHeaderLengthIsRefusedBeforeItIsUsed) {
  WriteFile(Path(), std::string(8, '\xff') + "{}");
  EXPECT_EQ(OpenError(),
            "the header's length is 18446744073709551615, at most 104857600 is allowed; is it a safetensors file?");
}

TEST_F(SafetensorsTest, AHeaderThatIsNoJsonObjectIsRefused) {
  EXPECT_EQ(OpenError("[]", ""), "header: expected an object, found array");
  EXPECT_THAT(OpenError("{\"a\":", ""), StartsWith("header: line 1, column 6: "));
  EXPECT_EQ(OpenError("{\"a\":1}", ""), "tensor \"a\": expected an object with dtype, shape and data_offsets, found 1");
}

TEST_F(SafetensorsTest, ATensorThatStandsTwiceIsNamed) {
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0]},"a":{}})", ""),
              HasSubstr("the key \"a\" stands twice in one object"));
}

TEST_F(SafetensorsTest, MissingFieldsAreNamed) {
  EXPECT_EQ(OpenError(R"({"a":{"dtype":"U8","shape":[0]}})", ""),
            "tensor \"a\": \"data_offsets\" is missing; the file is damaged");
  EXPECT_EQ(OpenError(R"({"a":{}})", ""), "tensor \"a\": \"dtype\" is missing; the file is damaged");
}

TEST_F(SafetensorsTest, TensorsOfTypesThatAreNotReadArePassedOverUntilAskedFor) {
  Put(R"({"__metadata__":null,"a":{"dtype":"F4","shape":[3],"data_offsets":[0,2]},)"
      R"("b":{"dtype":"F8_E4M3","shape":[2,2],"data_offsets":[2,6]},"c":{"dtype":"U8","shape":[1],"data_offsets":[6,7]}})",
      "xxyyyyz");
  const SafetensorsFile file = SafetensorsFile::Open(Path());
  EXPECT_EQ(file.Tensors().size(), 1u);
  EXPECT_EQ(file.Opaque().at("a"), "F4");
  EXPECT_THAT(ErrorText([&] { file.Get("b"); }),
              HasSubstr("tensor \"b\" is of type F8_E4M3, which circlet does not read; known are F64"));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F8_E4M3","shape":[3],"data_offsets":[0,2]}})", "xx"),
              HasSubstr("hold 2; the file is damaged"));
}

TEST_F(SafetensorsTest, AnUnknownTypeListsTheKnownOnes) {
  EXPECT_EQ(
      OpenError(R"({"a":{"dtype":"F3","shape":[2],"data_offsets":[0,1]}})", "x"),
      "tensor \"a\": unknown dtype \"F3\"; known are F64, F32, F16, BF16, I64, I32, I16, I8, U64, U32, U16, U8, BOOL");
  EXPECT_THAT(OpenError(R"({"a":{"dtype":7,"shape":[2],"data_offsets":[0,1]}})", "x"), HasSubstr("unknown dtype 7"));
}

TEST_F(SafetensorsTest, BadShapesAreShown) {
  for (const std::string_view shape : {"[-1]", "[1.5]", "\"x\"", "[18446744073709551615]", "[null]", "3"}) {
    EXPECT_EQ(OpenError(fmt::format(R"({{"a":{{"dtype":"U8","shape":{},"data_offsets":[0,1]}}}})", shape), "x"),
              fmt::format("tensor \"a\": shape must be a list of sizes from 0, found {}; the file is damaged", shape));
  }
}

TEST_F(SafetensorsTest, AShapeWhoseProductOverflowsIsRefused) {
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"U8","shape":[4294967296,4294967296],"data_offsets":[0,0]}})", ""),
              AllOf(StartsWith("tensor \"a\": "), HasSubstr("[4294967296,4294967296]")));
  EXPECT_THAT(OpenError(R"({"a":{"dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,0]}})", ""),
              AllOf(StartsWith("tensor \"a\": "), HasSubstr("[2305843009213693952]")));
}

TEST_F(SafetensorsTest, BytesThatDoNotFitTheShapeShowBoth) {
  EXPECT_EQ(OpenError(R"({"a":{"dtype":"F32","shape":[2],"data_offsets":[0,4]}})", "1234"),
            "tensor \"a\": float32[2] takes 8 bytes, data_offsets [0, 4] hold 4; the file is damaged");
}

TEST_F(SafetensorsTest, BadOffsetsAreShown) {
  for (const std::string_view offsets :
       {"[1,0]", "[-1,0]", "[0]", "[0,1,2]", "7", "[0,18446744073709551615]", "[0,0.5]"}) {
    EXPECT_EQ(
        OpenError(fmt::format(R"({{"a":{{"dtype":"U8","shape":[1],"data_offsets":{}}}}})", offsets), "x"),
        fmt::format(
            "tensor \"a\": data_offsets must be [begin, end] with 0 <= begin <= end, found {}; the file is damaged",
            offsets));
  }
}

TEST_F(SafetensorsTest, AFileCutInItsDataNamesTheTensor) {
  EXPECT_EQ(OpenError(R"({"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}})", "123"),
            "tensor \"a\": ends at data byte 4, the file has 3; the file is cut: copy or download it again");
}

TEST_F(SafetensorsTest, OverlappingOffsetsNameBothTensors) {
  EXPECT_EQ(
      OpenError(
          R"({"a":{"dtype":"U8","shape":[3],"data_offsets":[0,3]},"b":{"dtype":"U8","shape":[2],"data_offsets":[2,4]}})",
          "1234"),
      "tensors \"a\" (bytes 0 to 3) and \"b\" (bytes 2 to 4) overlap; the file is damaged");
}

TEST_F(SafetensorsTest, BytesOfNoTensorAreRefused) {
  EXPECT_EQ(
      OpenError(
          R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"U8","shape":[1],"data_offsets":[2,3]}})",
          "123"),
      "tensor \"b\": begins at data byte 2, expected 1: bytes between belong to no tensor; the file is damaged");
  EXPECT_EQ(OpenError(R"({"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]}})", "123"),
            "2 bytes after the last tensor belong to none (tensors end at data byte 1 of 3); the file is damaged");
}

TEST_F(SafetensorsTest, BadMetadataIsRefused) {
  EXPECT_EQ(OpenError(R"({"__metadata__":{"x":1}})", ""), "__metadata__: \"x\" must be a string, found 1");
  EXPECT_EQ(OpenError(R"({"__metadata__":[]})", ""), "__metadata__: expected an object of strings, found []");
}

TEST_F(SafetensorsTest, EveryCutAndEveryFlippedHeaderByteIsAnErrorOrAFile) {
  std::map<std::string, Tensor> tensors;
  tensors.emplace("a", Tensor({DType::kF32, {3}}));
  tensors.emplace("b", Tensor({DType::kU8, {5}}));
  WriteSafetensors(Path(), tensors, {{"format", "pt"}});
  const std::string whole = ReadFile(Path());
  // Not WriteFile(), which waits for the disk; nor over the old file, for which some file systems wait too.
  const auto put = [&](const std::string& bytes) {
    fs::remove(Path());
    std::ofstream(Path(), std::ios::binary) << bytes;
  };
  for (size_t size = 0; size < whole.size(); ++size) {
    put(whole.substr(0, size));
    EXPECT_THROW(SafetensorsFile::Open(Path()), Error) << size;
  }
  int opened = 0;
  for (size_t at = 0; at + 17 < whole.size(); ++at) {
    for (const char flip : {'\x01', '\x20', '\x80'}) {
      std::string damaged = whole;
      damaged[at] ^= flip;
      put(damaged);
      try {
        const SafetensorsFile file = SafetensorsFile::Open(Path());
        for (const auto& [name, tensor] : file.Tensors()) EXPECT_EQ(tensor.Clone().Bytes(), tensor.Bytes());
        ++opened;  // a letter of a name
      } catch (const Error& error) {
        EXPECT_THAT(error.what(), StartsWith(Path().string()));
      }
    }
  }
  EXPECT_GT(opened, 0);
}

// --- Writer ---

TEST_F(SafetensorsTest, WritesADeterministicHeaderInTheOrderOfDeclaration) {
  SafetensorsWriter writer(Path(), {{"k", "v"}});
  writer.Declare("z", {DType::kI32, {1}});
  writer.Declare("a\"b", {DType::kU8, {2, 1}});
  EXPECT_FALSE(fs::exists(Path()));
  const int32_t one = 1;
  const uint8_t bytes[] = {7, 8};
  writer.Write(Tensor::Of<int32_t>({1}, {&one, 1}));
  writer.Write(Tensor::Of<uint8_t>({2, 1}, bytes));
  writer.Finish();
  std::string header = R"({"__metadata__":{"k":"v"},"z":{"dtype":"I32","shape":[1],"data_offsets":[0,4]},)"
                       R"("a\"b":{"dtype":"U8","shape":[2,1],"data_offsets":[4,6]}})";
  header.resize((header.size() + 7) / 8 * 8, ' ');
  EXPECT_EQ(ReadFile(Path()), FileBytes(header, std::string_view("\1\0\0\0\7\x8", 6)));
}

TEST_F(SafetensorsTest, EveryTypeComesBackBitForBit) {
  std::map<std::string, Tensor> tensors;
  for (const DType type : {DType::kF32, DType::kF16, DType::kBF16, DType::kF64, DType::kI8, DType::kU8, DType::kI16,
                           DType::kU16, DType::kI32, DType::kU32, DType::kI64, DType::kU64, DType::kBool}) {
    Tensor tensor({type, {2, 3}});
    for (int64_t i = 0; i < tensor.Bytes(); ++i) tensor.Raw()[i] = static_cast<std::byte>(i * 37 + 1);
    tensors.emplace(Name(type), tensor);
  }
  tensors.emplace("scalar", Tensor::Scalar(2.5f));
  tensors.emplace("empty", Tensor({DType::kF32, {0, 4}}));
  WriteSafetensors(Path(), tensors, {{"a", "é"}});
  const SafetensorsFile file = SafetensorsFile::Open(Path());
  EXPECT_EQ(file.Metadata().at("a"), "é");
  ASSERT_EQ(file.Tensors().size(), tensors.size());
  for (const auto& [name, tensor] : tensors) {
    const Tensor& read = file.Get(name);
    EXPECT_EQ(read.Type(), tensor.Type());
    EXPECT_EQ(std::memcmp(read.Raw(), tensor.Raw(), tensor.Bytes()), 0) << name;
  }
}

TEST_F(SafetensorsTest, AnEmptyFileIsAFile) {
  WriteSafetensors(Path(), {});
  EXPECT_TRUE(SafetensorsFile::Open(Path()).Tensors().empty());
}

TEST_F(SafetensorsTest, AnUnfinishedFileLeavesNothing) {
  {
    SafetensorsWriter writer(Path());
    writer.Declare("a", {DType::kU8, {1}});
  }
  EXPECT_TRUE(fs::is_empty(directory_.Path()));
}

TEST_F(SafetensorsTest, FourBitTensorsAreRefusedByName) {
  SafetensorsWriter writer(Path());
  EXPECT_THAT(ErrorText([&] {
                writer.Declare("w", {DType::kU4, {2}});
              }),
              StartsWith(Path().string() + ": tensor \"w\": safetensors has no uint4; known are F64"));
}

TEST_F(SafetensorsTest, WritingSomethingElseThanDeclaredIsABug) {
  SafetensorsWriter writer(Path());
  writer.Declare("a", {DType::kU8, {1}});
  EXPECT_THROW(writer.Write(Tensor::Scalar(1)), Bug);
  EXPECT_THROW(writer.Finish(), Bug);
  EXPECT_THROW(writer.Declare("a", {DType::kU8, {1}}), Bug);
}

TEST_F(SafetensorsTest, ATensorMayBeWrittenInPieces) {
  const std::vector<uint8_t> bytes = {1, 2, 3, 4, 5};
  const auto piece = [&](size_t begin, size_t count) { return std::as_bytes(std::span(bytes).subspan(begin, count)); };
  SafetensorsWriter writer(Path());
  writer.Declare("a", {DType::kU8, {5}});
  writer.Declare("b", {DType::kU8, {2}});
  writer.Append(piece(0, 3));
  EXPECT_THROW(writer.Append(piece(0, 3)), Bug) << "2 bytes are left";
  EXPECT_THROW(writer.Finish(), Bug);
  writer.Append(piece(3, 2));
  writer.Write(Tensor::Of<uint8_t>({2}, std::span(bytes).first(2)));
  writer.Finish();
  const SafetensorsFile file = SafetensorsFile::Open(Path());
  EXPECT_THAT(file.Get("a").As<uint8_t>(), ::testing::ElementsAreArray(bytes));
  EXPECT_THAT(file.Get("b").As<uint8_t>(), ::testing::ElementsAre(1, 2));
}

// --- Checkpoint ---

class CheckpointTest : public ::testing::Test {
 protected:
  void PutShard(const std::string& name, std::initializer_list<std::pair<const char*, Shape>> tensors) {
    std::map<std::string, Tensor> content;
    for (const auto& [tensor, shape] : tensors) content.emplace(tensor, Tensor({DType::kF32, shape}));
    WriteSafetensors(Path() / name, content);
  }
  void PutIndex(const json& weight_map) {
    WriteJson(Path() / "model.safetensors.index.json", {{"weight_map", weight_map}});
  }
  fs::path Path() const { return directory_.Path(); }
  std::string OpenError() {
    return ErrorText([&] { Checkpoint::Open(Path()); });
  }

  TempDirectory directory_;
};

TEST_F(CheckpointTest, OneFileNeedsNoIndex) {
  PutShard("model.safetensors", {{"a", {2}}, {"b", {3}}});
  const Checkpoint checkpoint = Checkpoint::Open(Path());
  EXPECT_THAT(checkpoint.Names(), ElementsAre("a", "b"));
  EXPECT_EQ(checkpoint.Get("b", {3}).Elements(), 3);
  EXPECT_EQ(checkpoint.FileOf("a"), "model.safetensors");
  checkpoint.Release("a");
}

TEST_F(CheckpointTest, ShardsAreFoundThroughTheIndex) {
  PutShard("model-00001-of-00002.safetensors", {{"a", {2}}, {"unlisted", {1}}});
  PutShard("model-00002-of-00002.safetensors", {{"b", {3}}});
  PutIndex({{"a", "model-00001-of-00002.safetensors"}, {"b", "./model-00002-of-00002.safetensors"}});
  const Checkpoint checkpoint = Checkpoint::Open(Path());
  EXPECT_THAT(checkpoint.Names(), ElementsAre("a", "b", "unlisted"));
  EXPECT_EQ(checkpoint.FileOf("b"), "model-00002-of-00002.safetensors");
}

TEST_F(CheckpointTest, AMissingShardIsNamed) {
  PutShard("model-00001-of-00002.safetensors", {{"a", {2}}});
  PutIndex({{"a", "model-00001-of-00002.safetensors"}, {"b", "model-00002-of-00002.safetensors"}});
  EXPECT_EQ(OpenError(), Path().string() +
                             ": shard \"model-00002-of-00002.safetensors\" of model.safetensors.index.json "
                             "is missing; download it");
}

TEST_F(CheckpointTest, OfTheIndexOnlyTheNamesOfShardsCount) {
  PutShard("s.safetensors", {{"a", {2}}});
  PutShard("stray.safetensors", {{"a", {3}}});
  PutIndex({{"b", "s.safetensors"}});
  EXPECT_THAT(Checkpoint::Open(Path()).Names(), ElementsAre("a"));
  EXPECT_THAT(Checkpoint::FilesOf(Path()), ElementsAre("s.safetensors"));
}

TEST_F(CheckpointTest, ATensorInTwoShardsMayNotDiffer) {
  PutShard("1.safetensors", {{"a", {2}}});
  PutShard("2.safetensors", {{"a", {2}}});
  PutIndex({{"a", "1.safetensors"}, {"b", "2.safetensors"}});
  EXPECT_THAT(Checkpoint::Open(Path()).Names(), ElementsAre("a"));
  PutShard("2.safetensors", {{"a", {3}}});
  EXPECT_EQ(OpenError(), (Path() / "2.safetensors").string() +
                             ": tensor \"a\" is also in 1.safetensors, with other values; are the files of one download?");
}

TEST_F(CheckpointTest, AShardOutsideTheDirectoryIsRefused) {
  fs::create_directory(Path() / "sub");
  PutShard("sub/s.safetensors", {{"a", {2}}});
  for (const std::string shard : {"../s.safetensors", "/etc/passwd", "..", "sub/s.safetensors", "", "a\\b"}) {
    PutIndex({{"a", shard}});
    EXPECT_EQ(OpenError(), (Path() / "model.safetensors.index.json").string() + ": weight_map.a: the shard \"" + shard +
                               "\" is no plain file name; shards lie beside the index");
  }
}

TEST_F(CheckpointTest, ADamagedIndexSaysWhere) {
  const std::string index = (Path() / "model.safetensors.index.json").string();
  WriteFile(index, "{\"weight_map\": 3}");
  EXPECT_EQ(OpenError(), index + ": weight_map: expected an object, found 3");
  WriteFile(index, "{}");
  EXPECT_EQ(OpenError(), index + ": weight_map: is missing; expected an object");
  PutIndex({{"a", 1}});
  EXPECT_EQ(OpenError(), index + ": weight_map.a: expected a string, found 1");
  PutIndex(json::object());
  EXPECT_EQ(OpenError(), index + ": weight_map: lists no tensors; the index is damaged: download it again");
}

TEST_F(CheckpointTest, ADirectoryWithoutWeightsSaysWhatWasLookedFor) {
  EXPECT_EQ(OpenError(), Path().string() +
                             ": holds neither model.safetensors nor model.safetensors.index.json; is it a "
                             "checkpoint directory, downloaded completely?");
  EXPECT_EQ(ErrorText([&] { Checkpoint::Open(Path() / "no"); }),
            (Path() / "no").string() + ": is no directory; name the checkpoint's directory");
}

TEST_F(CheckpointTest, WrongShapesShowExpectedAndFound) {
  PutShard("model.safetensors", {{"model.norm.weight", {2, 3}}});
  const Checkpoint checkpoint = Checkpoint::Open(Path());
  EXPECT_EQ(ErrorText([&] {
              checkpoint.Get("model.norm.weight", {3, 2});
            }),
            (Path() / "model.safetensors").string() +
                ": tensor \"model.norm.weight\" has shape [2,3], config.json asks for [3,2]; are the files of one "
                "checkpoint?");
  EXPECT_EQ(ErrorText([&] {
              checkpoint.Get("model.norm.wieght", {2, 3});
            }),
            Path().string() +
                ": tensor \"model.norm.wieght\" [2,3] is missing; nearest: \"model.norm.weight\"; was a shard "
                "left out of the download, or is config.json of another model?");
}

TEST_F(CheckpointTest, TheShardedGoldenModelOpens) {
  const Checkpoint checkpoint = Checkpoint::Open(TestData("golden/tiny_wide/model"));
  ASSERT_NE(checkpoint.Find("model.language_model.embed_tokens.weight"), nullptr);
  EXPECT_EQ(checkpoint.Find("model.language_model.embed_tokens.weight")->GetDType(), DType::kBF16);
}

}  // namespace
}  // namespace circlet
