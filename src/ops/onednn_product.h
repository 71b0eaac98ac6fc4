#pragma once

#include <oneapi/dnnl/dnnl.hpp>
#include <vector>

#include "ops/tally.h"

namespace circlet::gemm {

// One product in oneDNN, made for Threads() threads. It uses scratch memory of the thread that made it, so that thread
// alone may run it.
class OneDnnProduct {
 public:
  OneDnnProduct(const ProductShape& shape, bool with_bias);

  // Whether an element's sum runs in one order whatever the thread count.
  bool OneOrder() const { return one_order_; }
  // a and b are float32 or bf16 as the shape says; bias [n] is null without.
  void Run(const void* a, const void* b, const float* bias, float* y);

 private:
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::matmul product_;
  bool one_order_;
  std::vector<dnnl::memory> memory_;  // a, b, y and perhaps the bias; their bytes come with each run
  std::vector<dnnl_exec_arg_t> args_;
};

}  // namespace circlet::gemm
