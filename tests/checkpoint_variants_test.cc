// Edited copies of a small checkpoint load to what transformers loads: same float logits, same token ids, or a refusal.
// The edits and the recorded values are in tests/data/golden/checkpoint_variants.json
// (scripts/record_checkpoint_variants.py).

#include <gmock/gmock.h>

#include <bit>
#include <cctype>
#include <cmath>
#include <cstring>
#include <fstream>
#include <functional>
#include <map>
#include <nlohmann/json.hpp>

#include "circlet/io/json.h"
#include "circlet/preprocess/samples.h"
#include "circlet/preprocess/tokenizer.h"
#include "circlet/runtime/session.h"
#include "golden.h"
#include "paths.h"
#include "program.h"

namespace circlet {
namespace {

namespace fs = std::filesystem;
using nlohmann::json;
using ::testing::HasSubstr;

const json& Recorded() {
  static const json recorded = json::parse(ReadFile(TestData("golden/checkpoint_variants.json")));
  return recorded;
}

// ---- Edits ----------------------------------------------------------------------------------------------------------

struct RawTensor {
  std::string dtype;
  json shape;
  std::string bytes;
};
using RawTensors = std::map<std::string, RawTensor>;

RawTensors ReadRaw(const fs::path& path) {
  const std::string file = ReadFile(path);
  uint64_t size = 0;
  std::memcpy(&size, file.data(), sizeof size);
  const json header = json::parse(file.substr(8, size));
  RawTensors tensors;
  for (const auto& [name, entry] : header.items()) {
    if (name == "__metadata__") continue;
    const size_t begin = entry["data_offsets"][0], end = entry["data_offsets"][1];
    tensors[name] = {entry["dtype"], entry["shape"], file.substr(8 + size + begin, end - begin)};
  }
  return tensors;
}

void WriteRaw(const fs::path& path, const RawTensors& tensors, bool null_metadata) {
  json header{{"__metadata__", null_metadata ? json() : json{{"format", "pt"}}}};
  std::string data;
  for (const auto& [name, tensor] : tensors) {
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {data.size(), data.size() + tensor.bytes.size()}}};
    data += tensor.bytes;
  }
  const std::string text = header.dump();
  const uint64_t size = text.size();
  std::ofstream(path, std::ios::binary) << std::string_view(reinterpret_cast<const char*>(&size), 8) << text << data;
}

std::string Replaced(std::string text, const std::string& from, const std::string& to) {
  for (size_t at = text.find(from); at != text.npos; at = text.find(from, at + to.size()))
    text.replace(at, from.size(), to);
  return text;
}

RawTensor Cast(const RawTensor& tensor, const std::string& dtype) {
  CIRCLET_CHECK(tensor.dtype == "BF16", "{}", tensor.dtype);
  RawTensor result{dtype, tensor.shape, {}};
  for (size_t i = 0; i < tensor.bytes.size(); i += 2) {
    uint16_t half = 0;
    std::memcpy(&half, tensor.bytes.data() + i, 2);
    const float value = std::bit_cast<float>(static_cast<uint32_t>(half) << 16);
    const double wide = value;
    if (dtype == "F32")
      result.bytes.append(reinterpret_cast<const char*>(&value), sizeof value);
    else
      result.bytes.append(reinterpret_cast<const char*>(&wide), sizeof wide);
  }
  return result;
}

RawTensors Renamed(const RawTensors& tensors, const std::function<std::string(const std::string&)>& name) {
  RawTensors renamed;
  for (const auto& [old, tensor] : tensors) renamed[name(old)] = tensor;
  return renamed;
}

void Edit(const json& edit, RawTensors& tensors, bool& null_metadata) {
  const std::string op = edit[0], first = edit.size() > 1 ? edit[1] : "";
  if (op == "prefix") {
    tensors = Renamed(tensors, [&](const std::string& name) {
      return name.starts_with(first) ? edit[2].get<std::string>() + name.substr(first.size()) : name;
    });
  } else if (op == "replace") {
    tensors = Renamed(tensors, [&](const std::string& name) { return Replaced(name, first, edit[2]); });
  } else if (op == "drop") {
    std::erase_if(tensors, [&](const auto& entry) { return entry.first.find(first) != std::string::npos; });
  } else if (op == "copy") {
    tensors[edit[2]] = tensors.at(first);
  } else if (op == "reverse") {
    RawTensor& tensor = tensors.at(first);
    const size_t row = tensor.bytes.size() / tensor.shape[0].get<size_t>();
    std::string reversed;
    for (size_t end = tensor.bytes.size(); end > 0; end -= row) reversed += tensor.bytes.substr(end - row, row);
    tensor.bytes = reversed;
  } else if (op == "zeros") {
    size_t bits = edit[2] == "BF16" ? 16 : edit[2] == "F4" ? 4 : 8;
    for (const json& size : edit[3]) bits *= size.get<size_t>();
    tensors[first] = {edit[2], edit[3], std::string(bits / 8, '\0')};
  } else if (op == "cast") {
    for (auto& [name, tensor] : tensors)
      if (name.find(first) != name.npos) tensor = Cast(tensor, edit[2]);
  } else {
    CIRCLET_CHECK(op == "null_metadata", "{}", op);
    null_metadata = true;
  }
}

void Write(const fs::path& path, const json& value) { std::ofstream(path) << value.dump(); }

void MakeVariant(const json& variant, const fs::path& directory) {
  const fs::path model = TestData("golden/tiny_e2b/model");
  json config = json::parse(ReadFile(model / "config.json"));
  if (variant.contains("flatten")) {
    const json architectures = config["architectures"];
    config = config["text_config"];
    config["architectures"] = architectures;
  }
  Write(directory / "config.json", config.patch(variant["config"]));
  RawTensors tensors = ReadRaw(model / "model.safetensors");
  bool null_metadata = false;
  for (const json& edit : variant["tensors"]) Edit(edit, tensors, null_metadata);
  const size_t shards = variant.value("shards", 1);
  if (shards == 1) return WriteRaw(directory / "model.safetensors", tensors, null_metadata);
  std::vector<RawTensors> parts(shards);
  json index{{"metadata", {{"total_size", 0}}}, {"weight_map", json::object()}};
  size_t i = 0;
  for (const auto& [name, tensor] : tensors) {
    const size_t shard = i++ * shards / tensors.size();
    parts[shard][name] = tensor;
    index["weight_map"][name] = fmt::format("{}model-{}.safetensors", variant.value("shard_prefix", ""), shard + 1);
  }
  for (size_t shard = 0; shard < shards; ++shard)
    WriteRaw(directory / fmt::format("model-{}.safetensors", shard + 1), parts[shard], null_metadata);
  Write(directory / "model.safetensors.index.json", index.patch(variant.value("index", json::array())));
}

// ---- Logits ---------------------------------------------------------------------------------------------------------

// Calibration and evaluation on eval.0 (text) and, with pictures, eval.1.
fs::path WriteSamples(const fs::path& directory, bool pictures) {
  const SafetensorsFile inputs = OpenGolden("golden/tiny_e2b/inputs.safetensors.xz");
  std::map<std::string, Tensor> samples;
  for (const auto& [name, tensor] : inputs.Tensors()) {
    if (!name.starts_with("eval.0.") && !(pictures && name.starts_with("eval.1."))) continue;
    samples[name] = tensor;
    samples["calib" + name.substr(4)] = tensor;
  }
  WriteSafetensors(directory / "samples.safetensors", samples);
  return directory / "samples.safetensors";
}

// Sums of a few hundred products in another order: the reference moves by less than 1e-5 of its largest value.
void ExpectFigures(const Tensor& logits, const json& figures) {
  const std::span<const float> values = logits.F32();
  const size_t stride = values.size() / 16;
  double largest = 0, squares = 0;
  for (const json& value : figures["values"]) largest = std::max(largest, std::abs(value.get<double>()));
  for (size_t i = 0; i < 16; ++i)
    EXPECT_NEAR(values[i * stride], figures["values"][i].get<double>(), 3e-5 * largest) << i;
  for (const float value : values) squares += double{value} * value;
  EXPECT_NEAR(std::sqrt(squares), figures["norm"].get<double>(), 1e-5 * figures["norm"].get<double>());
}

// Of every position of the sample with a picture.
Tensor SessionLogits(runtime::Session& session, const fs::path& samples) {
  const SampleSet set = SamplesFromSafetensors(samples, "eval", {});
  const auto pictured = std::ranges::find_if(set.samples, [](const Sample& s) { return !s.pixel_values.Empty(); });
  session.Prefill(*pictured);
  std::vector<float> all;
  for (int64_t i = 0; i < session.Length(); ++i) {
    const std::vector<float> row = runtime::ValuesOf(session.Logits(i));
    all.insert(all.end(), row.begin(), row.end());
  }
  return Tensor::Of<float>({1, session.Length(), session.Facts().vocabulary}, all);
}

std::string NameOf(const json& variant) {
  std::string name;
  bool upper = true;
  for (const char c : variant["name"].get<std::string>()) {
    if (std::isalnum(static_cast<unsigned char>(c)) != 0) name += upper ? static_cast<char>(std::toupper(c)) : c;
    upper = std::isalnum(static_cast<unsigned char>(c)) == 0;
  }
  return name;
}

class CheckpointVariantTest : public testing::TestWithParam<json> {};

TEST_P(CheckpointVariantTest, LoadsToWhatTheReferenceLoads) {
  const json& variant = GetParam();
  const TempDirectory directory;
  const fs::path model = directory.Path() / "model", out = directory.Path() / "out";
  fs::create_directory(model);
  MakeVariant(variant, model);
  const bool pictures = variant.value("pictures", false);
  const fs::path samples = WriteSamples(directory.Path(), pictures);
  std::vector<std::string> arguments{"--threads",     "1",        "quantize", model,     "--samples",
                                     samples,         "--recipe", "default",  "--units", "deployment",
                                     "--save-stages", "--quiet",  "--output", out};
  for (const json& argument : variant.value("arguments", json::array())) arguments.push_back(argument);
  const ProgramResult result = RunProgram(arguments);
  if (variant.contains("refused")) {
    EXPECT_EQ(result.exit_code, 2) << result.err;
    EXPECT_THAT(result.err, HasSubstr(variant["refused"].get<std::string>()));
    return;
  }
  ASSERT_EQ(result.exit_code, 0) << result.err;
  for (const json& text : variant.value("says", json::array()))
    EXPECT_THAT(result.out, HasSubstr(text.get<std::string>()));
  const SafetensorsFile stages = SafetensorsFile::Open(out / "stages.safetensors");
  const json* reference = &variant;
  for (const json& other : Recorded()["variants"])
    if (variant.contains("like") && other["name"] == variant["like"]) reference = &other;
  ExpectFigures(stages.Get("float.eval.0.logits"), (*reference)["text"]);
  if (!pictures) return;
  ExpectFigures(stages.Get("float.eval.1.logits"), (*reference)["picture"]);
  // A session over the checkpoint computes the same, and one over the files what was simulated.
  ExpectFigures(SessionLogits(*runtime::OpenSession(model), samples), (*reference)["picture"]);
  const Tensor from_files = SessionLogits(*runtime::OpenSession(out), samples),
               simulated = stages.Get("quant.eval.1.logits");
  EXPECT_TRUE(std::ranges::equal(from_files.F32(), simulated.F32()));
}

INSTANTIATE_TEST_SUITE_P(Checkpoint, CheckpointVariantTest,
                         testing::ValuesIn(Recorded()["variants"].get<std::vector<json>>()),
                         [](const auto& info) { return NameOf(info.param); });

// ---- Tokens ---------------------------------------------------------------------------------------------------------

class TokenVariantTest : public testing::TestWithParam<json> {};

TEST_P(TokenVariantTest, TextHasTheIdsOfTheReference) {
  const json& variant = GetParam();
  const fs::path example = SourcePath("examples/tiny-gemma4");
  const TempDirectory directory;
  Write(directory.Path() / "tokenizer.json",
        json::parse(ReadFile(example / "tokenizer.json")).patch(variant["tokenizer"]));
  Write(directory.Path() / "tokenizer_config.json",
        json::parse(ReadFile(example / "tokenizer_config.json")).patch(variant["config"]));
  for (const auto& [name, content] : variant["files"].items()) Write(directory.Path() / name, content);
  const Tokenizer tokenizer = Tokenizer::Load(directory.Path());
  for (size_t i = 0; i < variant["ids"].size(); ++i) {
    const std::string text = Recorded()["texts"][i];
    EXPECT_EQ(tokenizer.Encode(text, false), variant["ids"][i].get<std::vector<int64_t>>()) << text;
  }
}

INSTANTIATE_TEST_SUITE_P(Tokenizer, TokenVariantTest,
                         testing::ValuesIn(Recorded()["tokenizers"].get<std::vector<json>>()),
                         [](const auto& info) { return NameOf(info.param); });

}  // namespace
}  // namespace circlet
