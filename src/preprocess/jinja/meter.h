#pragma once

#include <cstdint>

#include "circlet/base/error.h"

namespace circlet::jinja {

// What one rendering may use. A published template needs some thousand steps for a conversation.
struct Limits {
  int64_t steps = 20'000'000;          // nodes evaluated and values looked at
  int64_t bytes = int64_t{512} << 20;  // of all texts and containers made, whether they are still held or not
  int depth = 1000;                    // of evaluation: nested expressions, blocks and macro calls together
};

// Counts against the limits. Everything that a template can repeat goes through it, so that time and memory are
// bounded.
class Meter {
 public:
  explicit Meter(const Limits& limits) : limits_(limits), steps_(limits.steps), bytes_(limits.bytes) {}

  void Step(int64_t count = 1) {
    if (count > steps_)
      Fail("the template takes more than {} steps; does a loop or a macro repeat itself?", limits_.steps);
    steps_ -= count;
  }
  void Bytes(int64_t count) {
    if (count > bytes_)
      Fail("the template makes more than {} bytes of values; does a text or a list double?", limits_.bytes);
    bytes_ -= count;
  }
  // `count` things of `size` bytes each, without overflow.
  void Bytes(int64_t count, int64_t size) {
    if (count > 0 && size > bytes_ / count) Bytes(bytes_ + 1);
    Bytes(count > 0 ? count * size : 0);
  }
  void Enter() {
    if (++depth_ > limits_.depth)
      Fail("nested more than {} deep; does a macro call itself without end?", limits_.depth);
  }
  void Leave() { --depth_; }

 private:
  Limits limits_;
  int64_t steps_, bytes_;
  int depth_ = 0;
};

}  // namespace circlet::jinja
