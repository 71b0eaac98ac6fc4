#pragma once

// The values that pass from stage to stage and to the units, by their keys in the ActivationStore. pipeline.json names
// boundaries by them too.

#include <fmt/format.h>

#include <string>

namespace circlet::gemma4::key {

// Sequences.
inline constexpr char kTextEmbeddings[] = "text_embeds";  // of the tokens, placeholders as the pad id
inline constexpr char kTokenPle[] = "ple.tokens";         // token part of the per-layer inputs
inline constexpr char kPle[] = "ple";                     // the per-layer inputs of all layers
inline constexpr char kNormed[] = "last_hidden_state";    // behind the final norm
inline constexpr char kLogits[] = "logits";
// What goes into a layer; of the number of layers: what leaves the last one.
inline std::string Hidden(int layer) { return layer == 0 ? "inputs_embeds" : fmt::format("hidden.{}", layer); }
inline std::string Ple(int layer) { return fmt::format("{}.{}", kPle, layer); }
enum class Side { kKey, kValue };
inline const char* Name(Side side) { return side == Side::kKey ? "key" : "value"; }
inline std::string Kv(int layer, Side side) { return fmt::format("kv.{}.{}", layer, Name(side)); }
// The newest token's value in the verification sample's decode step.
inline std::string Decode(const std::string& key) { return "decode." + key; }

// Pictures.
inline std::string VisionHidden(int layer) { return fmt::format("vision.hidden.{}", layer); }
inline constexpr char kVisionPooled[] = "vision.pooled";
inline constexpr char kVisionProjected[] = "vision.projected";
inline constexpr char kVisionLast[] = "vision.last_hidden_state";

}  // namespace circlet::gemma4::key
