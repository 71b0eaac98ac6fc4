#include "circlet/preprocess/image.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <png.h>

#include <cstdio>
// jpeglib.h needs FILE.
#include <jpeglib.h>

#include <cmath>
#include <cstring>
#include <functional>
#include <numeric>

#include "circlet/base/error.h"
#include "circlet/io/file.h"
#include "golden.h"
#include "temp_directory.h"

namespace circlet {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;

template <typename Body>
std::string ErrorOf(Body&& body) {
  try {
    body();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

Image Decode(const std::string& bytes) { return DecodeImage(std::as_bytes(std::span(bytes)), "picture"); }

// A PNG whose rows are given as they are stored; `extra` may add chunks before the pixels.
std::string MakePng(int color_type, int depth, int64_t width, int64_t height, std::vector<uint8_t> rows,
                    const std::function<void(png_structp, png_infop)>& extra = nullptr,
                    int interlace = PNG_INTERLACE_NONE) {
  std::string bytes;
  png_structp png = png_create_write_struct(PNG_LIBPNG_VER_STRING, nullptr, nullptr, nullptr);
  png_infop info = png_create_info_struct(png);
  png_set_write_fn(
      png, &bytes,
      [](png_structp p, png_bytep data, size_t size) {
        static_cast<std::string*>(png_get_io_ptr(p))->append(reinterpret_cast<char*>(data), size);
      },
      nullptr);
  png_set_IHDR(png, info, width, height, depth, color_type, interlace, PNG_COMPRESSION_TYPE_DEFAULT,
               PNG_FILTER_TYPE_DEFAULT);
  if (extra) extra(png, info);
  png_write_info(png, info);
  std::vector<png_bytep> pointers;
  for (int64_t y = 0; y < height; ++y) pointers.push_back(rows.data() + y * png_get_rowbytes(png, info));
  png_write_image(png, pointers.data());
  png_write_end(png, info);
  png_destroy_write_struct(&png, &info);
  return bytes;
}

// A JPEG of one colour at full quality; `exif` becomes its APP1 marker.
std::string MakeJpeg(J_COLOR_SPACE space, std::vector<uint8_t> color, int64_t width, int64_t height,
                     const std::string& exif = "", bool progressive = false) {
  jpeg_compress_struct info{};
  jpeg_error_mgr errors{};
  info.err = jpeg_std_error(&errors);
  jpeg_create_compress(&info);
  unsigned char* memory = nullptr;
  unsigned long size = 0;
  jpeg_mem_dest(&info, &memory, &size);
  info.image_width = width;
  info.image_height = height;
  info.input_components = static_cast<int>(color.size());
  info.in_color_space = space;
  jpeg_set_defaults(&info);
  jpeg_set_quality(&info, 100, TRUE);
  if (progressive) jpeg_simple_progression(&info);
  jpeg_start_compress(&info, TRUE);
  if (!exif.empty())
    jpeg_write_marker(&info, JPEG_APP0 + 1, reinterpret_cast<const uint8_t*>(exif.data()), exif.size());
  std::vector<uint8_t> row;
  for (int64_t x = 0; x < width; ++x) row.insert(row.end(), color.begin(), color.end());
  JSAMPROW pointer = row.data();
  for (int64_t y = 0; y < height; ++y) jpeg_write_scanlines(&info, &pointer, 1);
  jpeg_finish_compress(&info);
  jpeg_destroy_compress(&info);
  std::string bytes(reinterpret_cast<char*>(memory), size);
  std::free(memory);
  return bytes;
}

std::string Exif(int orientation, bool little) {
  const auto number = [&](int value, int length) {
    std::string text(length, '\0');
    for (int i = 0; i < length; ++i) text[little ? i : length - 1 - i] = static_cast<char>(value >> (8 * i));
    return text;
  };
  return std::string(little ? "II" : "MM") + number(42, 2) + number(8, 4) + number(2, 2) + number(0x100, 2) +
         number(4, 2) + number(1, 4) + number(7, 4) + number(0x112, 2) + number(3, 2) + number(1, 4) +
         number(orientation, 2) + number(0, 2) + number(0, 4);
}

// model.md 11.1.
Image Formula(int64_t width, int64_t height) {
  Image image{{width, height}, {}};
  for (int64_t y = 0; y < height; ++y)
    for (int64_t x = 0; x < width; ++x)
      for (int64_t c = 0; c < 3; ++c) image.rgb.push_back(static_cast<uint8_t>((7 * y + 13 * x + 29 * c) % 256));
  return image;
}

struct Difference {
  int largest = 0;
  double equal = 0;  // share of the values
};
Difference Compare(std::span<const uint8_t> golden, const ImagePatches& patches, std::span<const int64_t> rows) {
  Difference result;
  const Tensor pixel_values = PixelValues(patches.pixel_values);
  const std::span<const float> values = pixel_values.F32();
  const int64_t width = patches.pixel_values.GetShape()[-1];
  int64_t equal = 0;
  for (size_t r = 0; r < rows.size(); ++r) {
    for (int64_t i = 0; i < width; ++i) {
      const int ours = static_cast<int>(std::lround(values[rows[r] * width + i] * 255));
      const int difference = std::abs(ours - golden[r * width + i]);
      result.largest = std::max(result.largest, difference);
      equal += difference == 0;
    }
  }
  result.equal = static_cast<double>(equal) / static_cast<double>(golden.size());
  return result;
}

struct Photo {
  const char* name;
  const char* extension;
  int64_t budget;
  int tolerance;  // codes; a JPEG also depends on the decoder
};

class PhotoTest : public ::testing::TestWithParam<Photo> {};

TEST_P(PhotoTest, PatchesAreThoseOfTheReference) {
  const auto [name, extension, budget, tolerance] = GetParam();
  const Image image = LoadImage(TestData(fmt::format("golden/preprocess/{}.{}", name, extension)));
  const ImagePatches patches = PrepareImage(image, ImageRules{.max_soft_tokens = budget});
  const SafetensorsFile golden = OpenGolden(fmt::format("golden/preprocess/{}.{}.safetensors.xz", name, budget));

  const Tensor& positions = golden.Get("image_position_ids");
  EXPECT_THAT(patches.position_ids.I64(), ElementsAreArray(positions.Clone().I64()));
  EXPECT_EQ(patches.pixel_values.GetShape(), (Shape{1, 9 * budget, 768}));
  EXPECT_EQ(patches.soft_tokens, *golden.Get("num_soft_tokens").Clone().I64().begin());

  std::vector<int64_t> rows(patches.patches);
  std::iota(rows.begin(), rows.end(), 0);
  if (const Tensor* stored = golden.Find("u8_patch_rows")) {
    const Tensor copy = stored->Clone();
    rows.assign(copy.I64().begin(), copy.I64().end());
  }
  const Tensor values = golden.Get("pixel_values_u8").Clone();
  const Difference difference = Compare(values.As<uint8_t>(), patches, rows);
  EXPECT_LE(difference.largest, tolerance);
  EXPECT_GE(difference.equal, 0.995);  // the reference's weights have 16 bits, ours 22
  const Tensor* pillow = golden.Find("pil.pixel_values_u8");
  // Pillow resizes the cat's height first, since that is less work there; the other photos it treats as we do.
  if (pillow == nullptr || std::string_view(name).starts_with("cat")) return;
  EXPECT_EQ(Compare(pillow->Clone().As<uint8_t>(), patches, rows).largest, 0);
}

INSTANTIATE_TEST_SUITE_P(Photos, PhotoTest,
                         ::testing::Values(Photo{"cat_451x300", "png", 70, 2}, Photo{"cat_451x300", "png", 280, 2},
                                           Photo{"coffee_240x360", "png", 70, 2},
                                           Photo{"coffee_240x360", "png", 280, 2},
                                           Photo{"rocket_480x320", "jpg", 70, 4},
                                           Photo{"rocket_480x320", "jpg", 280, 4}),
                         [](const auto& info) { return fmt::format("{}_{}", info.param.name, info.param.budget); });

TEST(ImageTest, DecodedPngsHaveTheHashOfTheReference) {
  const auto hash = [](const char* file) {
    const Image image = LoadImage(TestData(std::string("golden/preprocess/") + file));
    return Sha256(std::as_bytes(std::span(image.rgb)));
  };
  EXPECT_EQ(hash("cat_451x300.png"), "416b729128bfb2c3d1eb69bf9b1734a796293abc17939267b2dc94f8a5784031");
  EXPECT_EQ(hash("coffee_240x360.png"), "dabafdaf6e73e83c28448544dfa6489b8b227b92884c81307e00488787c7d6cd");
}

// model.md 11.4.
TEST(ImageTest, TheSampleOfTheSpecificationIsReproduced) {
  const ImagePatches patches = PrepareImage(Formula(640, 480), ImageRules{});
  EXPECT_EQ(patches.patches, 2394);
  EXPECT_EQ(patches.soft_tokens, 266);
  const Tensor pixel_values = PixelValues(patches.pixel_values);
  const std::span<const float> values = pixel_values.F32();
  const auto codes = [&](int64_t patch, int64_t count) {
    std::vector<int> result;
    for (int64_t i = 0; i < count; ++i) result.push_back(static_cast<int>(std::lround(values[768 * patch + i] * 255)));
    return result;
  };
  EXPECT_THAT(codes(0, 12), ElementsAre(0, 28, 57, 6, 35, 64, 16, 45, 74, 25, 54, 83));
  const std::vector<int> expected{210, 242, 0, 219, 234, 22};
  const std::vector<int> found = codes(100, 6);
  for (size_t i = 0; i < 6; ++i) EXPECT_NEAR(found[i], expected[i], 1);
  EXPECT_EQ(patches.position_ids.I64()[200], 43);
  EXPECT_EQ(patches.position_ids.I64()[201], 1);
  double sum = 0;
  for (const float value : values) sum += value;
  EXPECT_NEAR(sum, 919323.54, 0.5);
}

TEST(ImageTest, PaddingPatchesAreZeroAtMinusOne) {
  const ImagePatches patches = PrepareImage(Formula(512, 512), ImageRules{.max_soft_tokens = 70});
  ASSERT_EQ(patches.patches, 576);
  EXPECT_EQ(patches.pixel_values.GetShape(), (Shape{1, 630, 768}));
  const Tensor pixel_values = PixelValues(patches.pixel_values);
  const auto values = pixel_values.F32().subspan(576 * 768);
  EXPECT_TRUE(std::ranges::all_of(values, [](float v) { return v == 0; }));
  const auto positions = patches.position_ids.I64().subspan(576 * 2);
  EXPECT_TRUE(std::ranges::all_of(positions, [](int64_t v) { return v == -1; }));
}

struct SizeRow {
  ImageSize size;
  ImageSize target[5];
};

// The table of model.md 6.1 for budgets of 70, 140, 280, 560, 1120 soft tokens.
TEST(ImageTest, TargetSizesFollowTheTable) {
  const ImageSize landscape[5] = {{432, 336}, {624, 480}, {912, 672}, {1296, 960}, {1824, 1344}};
  const ImageSize square[5] = {{384, 384}, {528, 528}, {768, 768}, {1104, 1104}, {1584, 1584}};
  std::vector<SizeRow> table;
  const auto add = [&](ImageSize size, const ImageSize(&target)[5]) {
    table.push_back({size, {target[0], target[1], target[2], target[3], target[4]}});
  };
  add({640, 480}, landscape);
  add({1024, 768}, landscape);
  add({480, 640}, {{336, 432}, {480, 624}, {672, 912}, {960, 1296}, {1344, 1824}});
  add({224, 224}, square);
  add({512, 512}, square);
  add({4000, 4000}, square);
  add({1920, 1080}, {{528, 288}, {720, 384}, {1056, 576}, {1488, 816}, {2112, 1200}});
  add({3000, 200}, {{1536, 96}, {2160, 144}, {3072, 192}, {4368, 288}, {6192, 384}});
  add({10000, 50}, {{3360, 48}, {6720, 48}, {11328, 48}, {16032, 48}, {22704, 96}});
  for (const SizeRow& row : table) {
    int64_t budget = 70;
    for (const ImageSize& target : row.target) {
      EXPECT_EQ(TargetSize(row.size, ImageRules{.max_soft_tokens = budget}), target)
          << row.size.width << "x" << row.size.height << " in " << budget;
      budget *= 2;
    }
  }
  EXPECT_EQ(TargetSize({1, 100000}, ImageRules{}), (ImageSize{48, 13440}));
}

TEST(ImageTest, ImagesWithoutATargetSizeAreRefused) {
  EXPECT_THAT(ErrorOf([] { TargetSize({0, 5}, ImageRules{}); }), HasSubstr("0x5 pixels do not fit a budget of 280"));
  EXPECT_THAT(ErrorOf([] { Patchify(Formula(50, 48), ImageRules{}); }), HasSubstr("50x48 pixels do not cut"));
  EXPECT_THAT(ErrorOf([] { Patchify(Formula(480, 480), ImageRules{.max_soft_tokens = 70}); }),
              HasSubstr("within a budget of 70; scale the image"));
}

TEST(ImageTest, ResizingToTheSameSizeChangesNothing) {
  const Image image = Formula(31, 17);
  EXPECT_EQ(ResizeBicubic(image, {31, 17}).rgb, image.rgb);
}

TEST(ImageTest, ResizingKeepsAColourAndMirrorsWithItsInput) {
  Image plain{{37, 23}, std::vector<uint8_t>(37 * 23 * 3, 201)};
  for (const ImageSize size : {ImageSize{5, 3}, ImageSize{80, 91}, ImageSize{37, 8}, ImageSize{9, 23}}) {
    const Image resized = ResizeBicubic(plain, size);
    EXPECT_EQ(resized.rgb, std::vector<uint8_t>(3 * size.width * size.height, 201));
  }
  Image image = Formula(40, 2);
  Image mirrored = image;
  for (int64_t y = 0; y < 2; ++y)
    for (int64_t x = 0; x < 40; ++x) std::copy_n(&image.rgb[3 * (40 * y + x)], 3, &mirrored.rgb[3 * (40 * y + 39 - x)]);
  const Image a = ResizeBicubic(image, {11, 2}), b = ResizeBicubic(mirrored, {11, 2});
  for (int64_t x = 0; x < 11; ++x)
    for (int64_t c = 0; c < 3; ++c) EXPECT_NEAR(a.rgb[3 * x + c], b.rgb[3 * (10 - x) + c], 1);
}

// Pillow 13's and transformers 5.24's values, which differ from the libraries' in some places: test data are files that
// hold each kind of pixel, with what the image processor makes of them.
TEST(ImageTest, EveryKindOfPictureIsWhatTheReferenceSees) {
  const SafetensorsFile golden = OpenGolden("golden/preprocess/pictures.safetensors.xz");
  int compared = 0;
  for (const auto& [name, tensor] : golden.Tensors()) {
    if (name.ends_with(".rgb")) continue;
    const Tensor& expected = golden.Get(name + ".rgb");
    const std::span<const std::byte> bytes(tensor.Raw(), static_cast<size_t>(tensor.Bytes()));
    Image image;
    EXPECT_EQ(ErrorOf([&] { image = DecodeImage(bytes, name); }), "no error") << name;
    EXPECT_EQ(expected.GetShape(), (Shape{image.size.height, image.size.width, 3})) << name;
    if (expected.Bytes() != static_cast<int64_t>(image.rgb.size())) continue;
    EXPECT_EQ(std::memcmp(image.rgb.data(), expected.Raw(), image.rgb.size()), 0) << name;
    ++compared;
  }
  EXPECT_EQ(compared, 202);
}

// Of each picture every cut, or some thirty for larger files.
TEST(ImageTest, CutPicturesAreErrorsThatNameThem) {
  const SafetensorsFile golden = OpenGolden("golden/preprocess/pictures.safetensors.xz");
  for (const auto& [name, tensor] : golden.Tensors()) {
    if (name.ends_with(".rgb")) continue;
    const std::string whole(reinterpret_cast<const char*>(tensor.Raw()), static_cast<size_t>(tensor.Bytes()));
    for (size_t length = 0; length < whole.size(); length += std::max<size_t>(1, whole.size() / 30)) {
      const std::string error = ErrorOf([&] { Decode(whole.substr(0, length)); });
      if (length >= whole.size() / 2) continue;  // what is behind the pixels may be missing
      EXPECT_THAT(error, HasSubstr("picture: ")) << name << ", " << length;
    }
  }
}

TEST(PngTest, PixelFormatsBecomeRgb) {
  const auto rgb = [](int type, int depth, std::vector<uint8_t> pixel) {
    return Decode(MakePng(type, depth, 1, 1, std::move(pixel))).rgb;
  };
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_GRAY, 8, {77}), ElementsAre(77, 77, 77));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_GRAY_ALPHA, 8, {77, 10}), ElementsAre(248, 248, 248));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_RGB, 8, {1, 2, 3}), ElementsAre(1, 2, 3));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_RGB_ALPHA, 8, {10, 20, 30, 255}), ElementsAre(10, 20, 30));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_RGB_ALPHA, 8, {10, 20, 30, 0}), ElementsAre(255, 255, 255));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_RGB_ALPHA, 8, {0, 100, 255, 128}), ElementsAre(127, 177, 255));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_GRAY, 16, {40000 >> 8, 40000 & 255}), ElementsAre(255, 255, 255));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_GRAY, 16, {0, 200}), ElementsAre(200, 200, 200));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_GRAY, 16, {255, 255}), ElementsAre(255, 255, 255));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_RGB, 16, {40000 >> 8, 40000 & 255, 20000 >> 8, 20000 & 255, 300 >> 8, 300 & 255}),
              ElementsAre(156, 78, 1));
  EXPECT_THAT(Decode(MakePng(PNG_COLOR_TYPE_GRAY, 1, 3, 1, {0x40})).rgb, ElementsAre(0, 0, 0, 255, 255, 255, 0, 0, 0));
  EXPECT_THAT(rgb(PNG_COLOR_TYPE_GRAY, 2, {0x80}), ElementsAre(170, 170, 170));
}

TEST(PngTest, TransparentPaletteColoursLieOverWhite) {
  const auto palette = [](png_structp png, png_infop info) {
    const png_color colors[3] = {{9, 8, 7}, {1, 2, 3}, {200, 100, 50}};
    png_byte alpha[2] = {255, 0};
    png_set_PLTE(png, info, colors, 3);
    png_set_tRNS(png, info, alpha, 2, nullptr);
  };
  EXPECT_THAT(Decode(MakePng(PNG_COLOR_TYPE_PALETTE, 2, 3, 1, {0b00011000}, palette)).rgb,
              ElementsAre(9, 8, 7, 255, 255, 255, 200, 100, 50));
  EXPECT_THAT(Decode(MakePng(PNG_COLOR_TYPE_PALETTE, 8, 2, 1, {2, 1}, palette)).rgb,
              ElementsAre(200, 100, 50, 255, 255, 255));
  EXPECT_THAT(ErrorOf([&] {
                Decode(MakePng(PNG_COLOR_TYPE_PALETTE, 8, 2, 1, {2, 3}, palette));
              }),
              HasSubstr("picture: a pixel has palette index 3, but the palette has 3 colours"));
}

TEST(PngTest, InterlacedImagesAreTheSame) {
  const Image image = Formula(13, 11);
  const std::string png = MakePng(PNG_COLOR_TYPE_RGB, 8, 13, 11, image.rgb, nullptr, PNG_INTERLACE_ADAM7);
  EXPECT_EQ(Decode(png).rgb, image.rgb);
}

// What each EXIF orientation makes of the row A B over the row C D.
TEST(ImageTest, ExifOrientationsTurnTheImage) {
  const std::vector<uint8_t> stored{'A', 'B', 'E', 'C', 'D', 'F'};  // 3 wide, 2 high
  const char* upright[9] = {"", "ABECDF", "EBAFDC", "FDCEBA", "CDFABE", "ACBDEF", "CADBFE", "FEDBCA", "EFBDAC"};
  for (int orientation = 1; orientation <= 8; ++orientation) {
    std::string exif = Exif(orientation, orientation % 2 == 0);
    const Image image = Decode(MakePng(PNG_COLOR_TYPE_GRAY, 8, 3, 2, stored, [&](png_structp png, png_infop info) {
      png_set_eXIf_1(png, info, exif.size(), reinterpret_cast<png_bytep>(exif.data()));
    }));
    std::string letters;
    for (size_t i = 0; i < image.rgb.size(); i += 3) letters += static_cast<char>(image.rgb[i]);
    EXPECT_EQ(letters, upright[orientation]) << orientation;
    EXPECT_EQ(image.size, orientation < 5 ? (ImageSize{3, 2}) : (ImageSize{2, 3})) << orientation;
  }
}

TEST(ImageTest, ALargeImageIsTurnedLikeASmallOne) {
  const Image image = Formula(100, 70);
  std::string exif = Exif(6, true);
  const Image turned = Decode(MakePng(PNG_COLOR_TYPE_RGB, 8, 100, 70, image.rgb, [&](png_structp png, png_infop info) {
    png_set_eXIf_1(png, info, exif.size(), reinterpret_cast<png_bytep>(exif.data()));
  }));
  ASSERT_EQ(turned.size, (ImageSize{70, 100}));
  for (int64_t y = 0; y < 100; ++y)
    for (int64_t x = 0; x < 70; ++x)
      for (int64_t c = 0; c < 3; ++c)
        ASSERT_EQ(turned.rgb[3 * (70 * y + x) + c], image.rgb[3 * (100 * (69 - x) + y) + c]) << x << "," << y;
}

TEST(JpegTest, ColourSpacesBecomeRgb) {
  EXPECT_THAT(Decode(MakeJpeg(JCS_GRAYSCALE, {99}, 1, 1)).rgb, ElementsAre(99, 99, 99));
  const Image color = Decode(MakeJpeg(JCS_RGB, {200, 50, 25}, 1, 1));
  const std::vector<int> expected{200, 50, 25};
  for (int c = 0; c < 3; ++c) EXPECT_NEAR(color.rgb[c], expected[c], 2);
  // Ink 10, 20, 30, 40, stored inverted.
  EXPECT_THAT(Decode(MakeJpeg(JCS_CMYK, {245, 235, 225, 215}, 1, 1)).rgb, ElementsAre(207, 198, 190));
  EXPECT_THAT(Decode(MakeJpeg(JCS_GRAYSCALE, {99}, 1, 1, "", true)).rgb, ElementsAre(99, 99, 99));
}

TEST(JpegTest, ExifOrientationIsApplied) {
  for (const bool little : {false, true}) {
    const std::string exif = std::string("Exif\0\0", 6) + Exif(6, little);
    EXPECT_EQ(Decode(MakeJpeg(JCS_GRAYSCALE, {50}, 30, 20, exif)).size, (ImageSize{20, 30}));
    EXPECT_EQ(Decode(MakeJpeg(JCS_GRAYSCALE, {50}, 30, 20, exif.substr(0, 25))).size, (ImageSize{30, 20}));
  }
}

TEST(ImageTest, EveryCutOfAFileIsAnErrorThatNamesIt) {
  const Image image = Formula(24, 16);
  const std::string png = MakePng(PNG_COLOR_TYPE_RGB, 8, 24, 16, image.rgb);
  const std::string jpeg = MakeJpeg(JCS_RGB, {200, 50, 25}, 24, 16);
  for (const std::string* file : {&png, &jpeg}) {
    for (size_t length = 0; length < file->size(); ++length) {
      const std::string error = ErrorOf([&] { Decode(file->substr(0, length)); });
      EXPECT_THAT(error, HasSubstr("picture: ")) << length << " of " << file->size();
    }
  }
}

TEST(ImageTest, FlippedBitsEndInAnImageOrAnError) {
  const std::string png = MakePng(PNG_COLOR_TYPE_RGB, 8, 24, 16, Formula(24, 16).rgb);
  const std::string jpeg = MakeJpeg(JCS_RGB, {200, 50, 25}, 24, 16, std::string("Exif\0\0", 6) + Exif(3, true));
  int errors = 0;
  for (const std::string* file : {&png, &jpeg}) {
    for (size_t i = 0; i < 8 * file->size(); ++i) {
      std::string damaged = *file;
      damaged[i / 8] = static_cast<char>(damaged[i / 8] ^ 1 << i % 8);
      errors += ErrorOf([&] { Decode(damaged); }) != "no error";
    }
  }
  EXPECT_GT(errors, 500);
}

TEST(ImageTest, PixelBombsAreRefusedBeforeMemoryIsTaken) {
  const auto with_size = [](uint32_t width, uint32_t height) {
    std::string png = MakePng(PNG_COLOR_TYPE_GRAY, 8, 1, 1, {0});
    for (int i = 0; i < 4; ++i) {
      png[16 + i] = static_cast<char>(width >> (24 - 8 * i));
      png[20 + i] = static_cast<char>(height >> (24 - 8 * i));
    }
    // The check sum of IHDR, so that only the size is at fault.
    uint32_t crc = ~0u;
    for (int i = 12; i < 29; ++i) {
      crc ^= static_cast<uint8_t>(png[i]);
      for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
    }
    for (int i = 0; i < 4; ++i) png[29 + i] = static_cast<char>(~crc >> (24 - 8 * i));
    return ErrorOf([&] { Decode(png); });
  };
  EXPECT_THAT(with_size(70000, 1), HasSubstr("picture: 70000x1 pixels are more than circlet decodes"));
  EXPECT_THAT(with_size(20000, 20000), HasSubstr("20000x20000 pixels are more than circlet decodes"));
  EXPECT_THAT(with_size(16000, 16000), HasSubstr("16000x16000 pixels cannot come out of"));
  EXPECT_THAT(with_size(0, 3), HasSubstr("damaged PNG"));
  std::string jpeg = MakeJpeg(JCS_GRAYSCALE, {99}, 1, 1);
  const size_t frame = jpeg.find("\xff\xc0");
  for (const size_t i : {5, 7}) {
    jpeg[frame + i] = '\x3e';
    jpeg[frame + i + 1] = '\x80';
  }
  EXPECT_THAT(ErrorOf([&] { Decode(jpeg); }), HasSubstr("16000x16000 pixels cannot come out of"));
}

TEST(ImageTest, BombsOfTheOtherFormatsAreRefusedBeforeMemoryIsTaken) {
  const SafetensorsFile golden = OpenGolden("golden/preprocess/pictures.safetensors.xz");
  const auto error = [&](const char* name, size_t at, std::string_view patch) {
    const Tensor& tensor = golden.Get(name);
    std::string bytes(reinterpret_cast<const char*>(tensor.Raw()), static_cast<size_t>(tensor.Bytes()));
    return ErrorOf([&] { Decode(bytes.replace(at, patch.size(), patch)); });
  };
  using namespace std::string_view_literals;
  EXPECT_THAT(error("plain.gif", 6, "\xff\xff\xff\xff"sv),
              HasSubstr("65535x65535 pixels are more than circlet decodes"));
  EXPECT_THAT(error("plain.gif", 6, "\x80\x3e\x80\x3e"sv), HasSubstr("16000x16000 pixels cannot come out of"));
  EXPECT_THAT(error("part.webp", 24, "\xff\xff\xff"sv), HasSubstr("picture: "));
  EXPECT_THAT(error("part.webp", 24, "\x7f\x3e\0\x7f\x3e\0"sv), HasSubstr("16000x16000 pixels cannot come out of"));
  EXPECT_THAT(error("rgb.bmp", 18, "\x80\x3e\0\0\x80\x3e\0\0"sv), HasSubstr("16000x16000 pixels cannot come out of"));
  EXPECT_THAT(error("rgb.bmp", 22, "\0\0\0\x80"sv), HasSubstr("pixels are more than circlet decodes"));
  EXPECT_THAT(error("rgb.bmp", 28, "\x05"sv), HasSubstr("a BMP with 5 bits a pixel is not read; convert it to PNG"));
}

TEST(ImageTest, OtherFilesAreNamed) {
  const TempDirectory directory;
  const auto error = [&](const char* name, std::string_view bytes) {
    WriteFile(directory.Path() / name, bytes);
    return ErrorOf([&] { LoadImage(directory.Path() / name); });
  };
  using namespace std::string_view_literals;
  EXPECT_THAT(
      error("photo.avif", "\0\0\0 ftypavif"sv),
      HasSubstr("photo.avif: is an AVIF picture; PNG, JPEG, WebP, GIF, BMP and TIFF are read: convert it to PNG"));
  EXPECT_THAT(error("a.svg", "<svg xmlns"), HasSubstr("a.svg: is an SVG drawing"));
  EXPECT_THAT(error("page.png", "<!DOCTYPE html>"), HasSubstr("page.png: is a web page"));
  EXPECT_THAT(error("pointer.png", "version https://git-lfs.github.com/spec/v1"), HasSubstr("git lfs pull fetches"));
  EXPECT_THAT(error("a.txt", "hello"), HasSubstr("a.txt: is no picture of a known format; PNG, JPEG"));
  EXPECT_THAT(error("photo.gif", "GIF89a..."), HasSubstr("photo.gif: "));
  EXPECT_THAT(ErrorOf([&] { LoadImage(directory.Path() / "none.png"); }), HasSubstr("none.png"));
  EXPECT_THAT(ErrorOf([] { Decode(""); }), HasSubstr("the file is empty"));
}

TEST(ImageRulesTest, TheyComeFromTheCheckpointAndRefuseWhatIsNotImplemented) {
  const TempDirectory directory;
  EXPECT_THAT(ErrorOf([&] { PrepareImage({}, LoadImageRules(directory.Path())); }),
              HasSubstr("has neither processor_config.json with an image_processor nor preprocessor_config.json"));
  const auto load = [&](const char* file, const char* text) {
    WriteFile(directory.Path() / file, text);
    return LoadImageRules(directory.Path());
  };
  const ImageRules old = load("preprocessor_config.json", R"({"max_soft_tokens": 140, "patch_size": 14})");
  EXPECT_EQ(old.max_soft_tokens, 140);
  EXPECT_EQ(old.patch_size, 14);
  EXPECT_EQ(old.source, "preprocessor_config.json");
  const ImageRules rules =
      load("processor_config.json", R"({"image_processor": {"max_soft_tokens": 70, "do_normalize": true,
    "image_mean": [0, 0, 0], "image_std": [1, 1, 1], "pooling_kernel_size": 2}})");
  EXPECT_EQ(rules.max_soft_tokens, 70);
  EXPECT_EQ(rules.pooling, 2);
  const auto error = [&](const std::string& fields) {
    return ErrorOf([&] { load("processor_config.json", ("{\"image_processor\": {" + fields + "}}").c_str()); });
  };
  EXPECT_THAT(error(R"("resample": 2)"), HasSubstr("image_processor.resample: 2 is not implemented; circlet needs 3"));
  EXPECT_THAT(error(R"("do_normalize": true, "image_mean": [0.5, 0, 0])"), HasSubstr("do_normalize: true is not"));
  EXPECT_THAT(error(R"("do_resize": false)"), HasSubstr("do_resize: false is not implemented"));
  EXPECT_THAT(error(R"("rescale_factor": 0.1)"),
              HasSubstr("rescale_factor: 0.1 is not implemented; circlet needs 1/255"));
  EXPECT_THAT(error(R"("max_soft_tokens": 100)"), HasSubstr("max_soft_tokens: 100"));
  EXPECT_THAT(error(R"("patch_size": 0)"), HasSubstr("patch_size: 0"));
  EXPECT_THAT(error(R"("image_processor_type": "SiglipImageProcessor")"),
              HasSubstr("circlet needs Gemma4ImageProcessor"));
}

}  // namespace
}  // namespace circlet
