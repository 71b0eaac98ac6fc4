// Any pipeline.json (and, in front of a line "====", any manifest.json) beside the files of a small model is a session
// that runs or an Error.

#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "../tests/fnv_checkpoint.h"
#include "circlet/base/error.h"
#include "circlet/pipeline/quantize.h"
#include "circlet/runtime/session.h"
#include "temporary.h"

namespace {

using namespace circlet;

// Sliding and full attention, a layer that shares keys and values, per-layer embeddings; 8 positions.
constexpr char kConfig[] = R"({
  "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4", "image_token_id": 15,
  "text_config": {
    "model_type": "gemma4_text", "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 3,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "global_head_dim": 4, "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention", "full_attention"], "num_kv_shared_layers": 1,
    "hidden_size_per_layer_input": 2, "vocab_size_per_layer_input": 16
  }
})";

std::filesystem::path Exported(const Temporary& directory) {
  const std::filesystem::path model = directory.Path() / "model";
  std::filesystem::create_directory(model);
  WriteFile(model / "config.json", kConfig);
  std::map<std::string, Tensor> tensors;
  for (const Parameter& parameter : Parameters(ReadConfig(model)))
    tensors.emplace(parameter.name, FnvTensor(parameter));
  WriteSafetensors(model / "model.safetensors", tensors);
  const QuantizeOptions options{.model = model,
                                .output = directory.Path() / "out",
                                .random_samples = "1x6",
                                .recipe = "w8a8",
                                .max_seq_len = 8,
                                .units = QuantizeOptions::Units::kDeployment};
  Quantize(options);
  return options.output;
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  static const Temporary directory;
  static const std::filesystem::path out = Exported(directory);
  const std::string_view text = View(data, size);
  constexpr std::string_view kBetween = "\n====\n";
  const size_t at = text.find(kBetween);
  directory.Write("out/manifest.json", at == text.npos ? R"({"outputs":[]})" : text.substr(0, at));
  directory.Write("out/pipeline.json", at == text.npos ? text : text.substr(at + kBetween.size()));
  try {
    const auto session = runtime::OpenSession(out);
    Sample prompt;
    prompt.input_ids = {2, 5, 6};
    session->Prefill(prompt);
    session->Logits();
    session->Decode(7);
    if (session->Length() != 4 || runtime::ValuesOf(session->Logits()).empty()) std::abort();
  } catch (const Error&) {
  }
  return 0;
}
