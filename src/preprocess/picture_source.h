#pragma once

#include <filesystem>
#include <string>
#include <string_view>

#include "circlet/io/json.h"
#include "circlet/preprocess/image.h"

namespace circlet {

// The picture that a part of a message names: exactly one of "path", "image", "url", "base64" and "image_url", each a
// text or an object with one of them (null = not given). Throws Error naming the part for none or several.
std::string PictureOf(const JsonObject& part);
// Whether it names any.
bool NamesPicture(const JsonObject& part);

// Reads a picture: a path (relative to `directory`), a file: URL, a data: URI or bare base64. Throws Error for anything
// else, for http and https, and for a picture that cannot be read.
Image LoadPicture(std::string_view source, const std::filesystem::path& directory);

// How errors call it: a path as it is, "data:image/png;base64, 1234 characters" without its content.
std::string PictureName(std::string_view source);

}  // namespace circlet
