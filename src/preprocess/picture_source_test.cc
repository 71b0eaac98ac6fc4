#include "preprocess/picture_source.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <nlohmann/json.hpp>

#include "circlet/io/file.h"
#include "error_text.h"
#include "golden.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::HasSubstr;
using ::testing::Not;

std::string Base64(std::string_view bytes) {
  constexpr char kDigits[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
  std::string text;
  for (size_t i = 0; i < bytes.size(); i += 3) {
    uint32_t bits = 0;
    const size_t count = std::min<size_t>(3, bytes.size() - i);
    for (size_t k = 0; k < 3; ++k) bits = bits << 8 | (k < count ? static_cast<uint8_t>(bytes[i + k]) : 0);
    for (size_t k = 0; k < 4; ++k) text += k <= count ? kDigits[bits >> (18 - 6 * k) & 63] : '=';
  }
  return text;
}

class PictureSourceTest : public ::testing::Test {
 protected:
  PictureSourceTest() {
    std::filesystem::create_directory(directory_.Path() / "a b");
    WriteFile(directory_.Path() / "a b/p.png", bytes_);
  }
  std::vector<uint8_t> Load(std::string_view source) const { return LoadPicture(source, directory_.Path()).rgb; }
  std::string Error(std::string_view source) const {
    return ErrorText([&] { Load(source); });
  }

  TempDirectory directory_;
  std::string bytes_ = ReadFile(TestData("golden/preprocess/coffee_240x360.png"));
  std::vector<uint8_t> rgb_ = DecodeImage(std::as_bytes(std::span(bytes_)), "coffee").rgb;
};

TEST_F(PictureSourceTest, PathsUrlsAndBase64NameTheSamePicture) {
  const std::string absolute = (directory_.Path() / "a b/p.png").string();
  EXPECT_EQ(Load("a b/p.png"), rgb_);
  EXPECT_EQ(Load(absolute), rgb_);
  EXPECT_EQ(Load("file://" + absolute), rgb_);
  EXPECT_EQ(Load("file://localhost" + directory_.Path().string() + "/a%20b/p.png"), rgb_);
  EXPECT_EQ(Load("file:a%20b/p.png"), rgb_);
  EXPECT_EQ(Load("data:image/png;base64," + Base64(bytes_)), rgb_);
  EXPECT_EQ(Load("DATA:;base64,\n" + Base64(bytes_)), rgb_);
  EXPECT_EQ(Load(Base64(bytes_)), rgb_);
}

TEST_F(PictureSourceTest, WhatCannotBeReadIsShownWithoutItsContent) {
  EXPECT_THAT(Error("https://example.org/cat.png"),
              HasSubstr("https://example.org/cat.png: circlet downloads nothing; fetch the picture"));
  EXPECT_THAT(Error("data:image/png,%89PNG"), HasSubstr("expected data:image/...;base64"));
  EXPECT_THAT(Error("data:image/png;base64,iVBO!"),
              HasSubstr("data:image/png;base64, 27 characters: its base64 has a "));
  EXPECT_THAT(Error("data:image/png;base64,iVBOR"), HasSubstr("ends in the middle of a byte"));
  const std::string cut = "data:image/png;base64," + Base64(bytes_.substr(0, 3000));
  EXPECT_THAT(Error(cut), AllOf(HasSubstr("data:image/png;base64, 4022 characters: damaged PNG"),
                                Not(HasSubstr(cut.substr(22, 20)))));
  EXPECT_LT(Error(std::string(100000, '!')).size(), 300u);
  EXPECT_LT(Error(Base64(std::string(9000, 'x'))).size(), 300u);
  EXPECT_THAT(Error("file://server/p.png"), HasSubstr("is on the host server"));
  EXPECT_THAT(Error("file:///a%2"), HasSubstr("two hexadecimal digits"));
  EXPECT_THAT(Error(std::string_view("a b/p.png\0.txt", 14)), HasSubstr("a b/p.png?.txt: a path cannot hold a NUL"));
  EXPECT_THAT(Error("file:a%20b/p.png%00"), HasSubstr("cannot hold a NUL"));
}

TEST_F(PictureSourceTest, APartNamesItsPictureInOneOfSeveralKeys) {
  const auto picture = [](const json& part) { return PictureOf(JsonObject(part, "part")); };
  for (const char* key : {"path", "image", "url", "base64", "image_url"}) {
    EXPECT_EQ(picture({{"type", "image"}, {key, "p.png"}}), "p.png");
    EXPECT_EQ(picture({{key, {{"url", "p.png"}, {"detail", "low"}}}}), "p.png");
  }
  EXPECT_EQ(picture({{"image", {{"path", "p.png"}, {"bytes", nullptr}}}, {"url", nullptr}}), "p.png");
  EXPECT_THAT(ErrorText([&] {
                picture({{"path", "a"}, {"url", "b"}});
              }),
              HasSubstr("url: names a picture, and so does \"path\""));
  EXPECT_THAT(ErrorText([&] { picture({{"type", "image"}}); }), HasSubstr("path: is missing"));
  EXPECT_THAT(ErrorText([&] { picture({{"url", 7}}); }), HasSubstr("url: expected a string, found 7"));
}

}  // namespace
}  // namespace circlet
