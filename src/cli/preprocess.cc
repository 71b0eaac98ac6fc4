#include <fmt/core.h>
#include <fmt/ranges.h>

#include <memory>
#include <nlohmann/json.hpp>

#include "circlet/base/error.h"
#include "circlet/io/json.h"
#include "circlet/io/safetensors.h"
#include "circlet/preprocess/image.h"
#include "circlet/preprocess/tokenizer.h"
#include "cli/commands.h"
#include "cli/flags.h"
#include "preprocess/data_lines.h"

namespace circlet {

void AddTokenize(CLI::App& app, std::function<int()>& command) {
  struct Options {
    std::string directory, file;
    std::optional<std::string> text;
    bool bare = false, json = false;
  };
  auto options = std::make_shared<Options>();
  CLI::App* tokenize = app.add_subcommand("tokenize", "Print the token ids of texts, a line each");
  tokenize->footer("Example:\n  circlet tokenize out/ --text 'It is a truth'");
  tokenize->add_option("DIR", options->directory, "Output directory of quantize, or a checkpoint")->required();
  tokenize->add_option("--text", options->text, "One text");
  tokenize->add_option("--file", options->file, "Texts, JSON lines {\"text\": ...}")->type_name("FILE");
  tokenize->add_flag("--no-special", options->bare, "No <bos> in front");
  tokenize->add_flag("--json", options->json, "Ids and pieces as JSON, a line each");
  tokenize->callback([options, &command] {
    command = [options] {
      if (options->text && !options->file.empty()) Fail("--text and --file: give one of them");
      if (!options->text && options->file.empty()) Fail("give a --text or a --file");
      const Tokenizer tokenizer = Tokenizer::Load(options->directory);
      const auto tell = [&](const std::string& text) {
        const std::vector<int64_t> ids = tokenizer.Encode(text, /*add_special=*/!options->bare);
        if (!options->json) return fmt::print("{}\n", fmt::join(ids, " "));
        nlohmann::json pieces = nlohmann::json::array();
        for (const int64_t id : ids) pieces.push_back(tokenizer.Piece(id));
        fmt::print("{}\n", nlohmann::json{{"ids", ids}, {"pieces", pieces}}.dump());
      };
      if (options->text) {
        Within("--text", [&] { tell(*options->text); });
        return 0;
      }
      constexpr LineForm kTextLine{R"({"text": "..."})", "text"};
      ForEachLine(
          ReadDataFile(options->file),
          [&](const JsonObject& object, const DataLine& line) {
            const auto text = object.Required<std::string>("text");
            object.Raw("type");
            object.RejectUnknownKeys();
            Within(line.place, [&] { tell(text); });
          },
          kTextLine);
      return 0;
    };
  });
}

void AddPreprocess(CLI::App& app, std::function<int()>& command) {
  struct Options {
    std::string directory, picture, output;
  };
  auto options = std::make_shared<Options>();
  CLI::App* preprocess = app.add_subcommand(
      "preprocess", "Write what the vision units take of a picture: pixel_values, image_position_ids");
  preprocess->footer("Example:\n  circlet preprocess out/ cat.png --output in.safetensors");
  preprocess->add_option("DIR", options->directory, "Output directory of quantize, or a checkpoint")->required();
  preprocess->add_option("PICTURE", options->picture, "PNG, JPEG, BMP ... (docs/data.md)")->required();
  preprocess->add_option("--output,-o", options->output, "Safetensors file")
      ->check(WritableFile())
      ->type_name("FILE")
      ->required();
  preprocess->callback([options, &command] {
    command = [options] {
      const ImageRules rules = LoadImageRules(options->directory);
      const Image picture = LoadImage(options->picture);
      const ImagePatches patches = PrepareImage(picture, rules);
      const ImageSize size = TargetSize(picture.size, rules);
      WriteSafetensors(options->output, {{"pixel_values", PixelValues(patches.pixel_values)},
                                         {"image_position_ids", patches.position_ids}});
      fmt::print("{}x{} pixels, scaled to {}x{}: {} patches, {} soft tokens; written to {}\n", picture.size.width,
                 picture.size.height, size.width, size.height, patches.patches, patches.soft_tokens, options->output);
      return 0;
    };
  });
}

}  // namespace circlet
