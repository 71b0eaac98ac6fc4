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
  // a, b and y are of the types that the shape says; bias [n] is null without.
  void Run(const void* a, const void* b, const float* bias, void* y);

 private:
  dnnl::engine engine_{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream_{engine_};
  dnnl::matmul product_;
  bool one_order_;
  std::vector<dnnl::memory> memory_;  // a, b, y and perhaps the bias; their bytes come with each run
  std::vector<dnnl_exec_arg_t> args_;
};

// The calling thread's, made at the first call: creating one costs more than a small product. Valid until the next
// call.
OneDnnProduct& ProductOf(const ProductShape& shape, bool with_bias = false);

}  // namespace circlet::gemm
