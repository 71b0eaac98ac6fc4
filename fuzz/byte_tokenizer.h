#pragma once

#include <fmt/core.h>

#include <string>

// tokenizer.json of a vocabulary of bytes and the control tokens of a chat, nothing else.
inline std::string ByteTokenizer() {
  std::string vocab;
  for (int byte = 0; byte < 256; ++byte) vocab += fmt::format("\"<0x{:02X}>\":{},", byte, byte);
  std::string added;
  int id = 256;
  for (const char* content : {"<bos>", "<|image>", "<|image|>", "<image|>", "<|video|>", "<|audio|>"})
    added +=
        fmt::format("{}{{\"id\":{},\"content\":\"{}\",\"special\":true}}", added.empty() ? "" : ",", id++, content);
  vocab.pop_back();
  return fmt::format(
      "{{\"added_tokens\":[{}],\"model\":{{\"type\":\"BPE\",\"byte_fallback\":true,\"vocab\":{{{}}},"
      "\"merges\":[]}}}}",
      added, vocab);
}
