#pragma once

// How many times each channel of a residual stream stands in a wider one that computes the same model.
//
// Channel c becomes K channels that each hold h_c / sqrt(K). The sum of squares stays, so an RMS norm of the stream
// sees what it saw, and a grid that one massive channel decides gets a step sqrt(K) finer. Channel c keeps its place;
// its K - 1 further copies stand behind the model's own channels, in the order of `channels`.

#include <cstdint>
#include <nlohmann/json_fwd.hpp>
#include <span>
#include <string>
#include <string_view>
#include <vector>

namespace circlet {

struct Widening {
  int64_t model_width = 0;  // channels of the model's own
  struct Channel {
    int64_t channel = 0, copies = 1;  // at least 2, itself included
    bool operator==(const Channel&) const = default;
  };
  std::vector<Channel> channels;  // ascending; empty: the stream stays as it is

  bool Empty() const { return channels.empty(); }
  int64_t Width() const;
  bool operator==(const Widening&) const = default;
};

// "704 channels instead of 640: 163 stands 58 times, 400 6 times".
std::string ToText(const Widening& widening);
// {"model_width": 640, "width": 704, "copies": {"163": 58, "400": 6}}
nlohmann::json ToJson(const Widening& widening);
// Throws Error "WHERE: member: ..." for one that is missing or wrong.
Widening WideningFromJson(const nlohmann::json& json, const std::string& where);

// What is asked for: channels beside the model's own, or as many as pay.
struct WideningOption {
  bool automatic = false;
  int64_t channels = 0;
  bool operator==(const WideningOption&) const = default;

  // "auto", "off", or a number of channels; throws Error "WHERE: ..." for anything else.
  static WideningOption Parse(std::string_view text, std::string_view where);
  std::string ToString() const;
  // The most channels that it may come to beside `width`: of "auto" a tenth, such that the wider stream is a multiple
  // of 16. Throws Error for a number that makes the stream none.
  int64_t MostAdded(int64_t width) const;
};

// The largest |h_c| of each channel at one point of the stream.
struct StreamPoint {
  std::string name;
  std::vector<float> maxima;
};

// One copy after the other goes to the channel that decides the coarsest grid: of all points the one whose largest
// |h_c| / sqrt(K_c) is largest against the median of its channels; the first of equals. "auto" takes as many multiples
// of 16 as have an outlier to share among them: a channel that gets more than kStreamOutlier times as large as the
// median channel of its point.
inline constexpr double kStreamOutlier = 64;
Widening ChooseCopies(std::span<const StreamPoint> points, int64_t width, const WideningOption& option);

}  // namespace circlet
