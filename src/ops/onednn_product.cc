#include "ops/onednn_product.h"

#include <array>
#include <map>
#include <string_view>
#include <tuple>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet::gemm {

OneDnnProduct::OneDnnProduct(const ProductShape& shape, bool with_bias) {
  const auto [m, n, k, transposed, operand, y_stride] = shape;
  using Type = dnnl::memory::data_type;
  const bool bytes = operand == Operand::kBytes;
  const auto desc = [](int64_t rows, int64_t columns, Type type, dnnl::memory::dims strides) {
    return dnnl::memory::desc({rows, columns}, type, std::move(strides));
  };
  constexpr std::array kTypes{Type::f32, Type::bf16, Type::u8};
  const Type a_type = kTypes[static_cast<size_t>(operand)], b_type = bytes ? Type::s8 : a_type;
  const auto a = desc(m, k, a_type, {k, 1});
  const auto y = desc(m, n, bytes ? Type::s32 : Type::f32, {y_stride == 0 ? n : y_stride, 1});
  const auto bias = desc(1, n, Type::f32, {n, 1});
  const auto b = desc(k, n, b_type, transposed ? dnnl::memory::dims{1, k} : dnnl::memory::dims{n, 1});
  try {
    const dnnl::matmul::primitive_desc chosen(
        with_bias ? dnnl::matmul::desc(a, b, bias, y) : dnnl::matmul::desc(a, b, y), engine_);
    product_ = dnnl::matmul(chosen);
    // brgemm (AVX-512) never cuts k between threads; the kernel of older processors does, except for a single row.
    one_order_ = m == 1 || std::string_view(chosen.impl_info_str()).starts_with("brg");
    const auto add = [&](int index, const dnnl::memory::desc& type) {
      memory_.push_back(dnnl::memory(type, engine_, DNNL_MEMORY_NONE));
      args_.push_back({index, memory_.back().get()});
    };
    add(DNNL_ARG_SRC, a);
    add(DNNL_ARG_WEIGHTS, b);
    add(DNNL_ARG_DST, y);
    if (with_bias) add(DNNL_ARG_BIAS, bias);
  } catch (const dnnl::error& error) {
    CIRCLET_CHECK(false, "oneDNN refuses the product {}x{}x{}: {}", m, n, k, error.what());
  }
}

void OneDnnProduct::Run(const void* a, const void* b, const float* bias, void* y) {
  const std::array<const void*, 4> operands{a, b, y, bias};
  for (size_t i = 0; i < memory_.size(); ++i) memory_[i].set_data_handle(const_cast<void*>(operands[i]));
  const dnnl_status_t status =
      dnnl_primitive_execute(product_.get(), stream_.get(), static_cast<int>(args_.size()), args_.data());
  CIRCLET_CHECK(status == dnnl_success, "oneDNN's product fails with status {}", static_cast<int>(status));
  stream_.wait();
}

OneDnnProduct& ProductOf(const ProductShape& shape, bool with_bias) {
  thread_local std::map<std::tuple<ProductShape, bool, int>, OneDnnProduct> products;
  const std::tuple key(shape, with_bias, Threads());
  if (const auto it = products.find(key); it != products.end()) return it->second;
  // Prompts of many lengths must not collect products for ever.
  if (products.size() >= 1024) products.clear();
  return products.try_emplace(key, shape, with_bias).first->second;
}

}  // namespace circlet::gemm
