#include "ops/onednn_product.h"

#include <sys/mman.h>

#include <array>
#include <map>
#include <new>
#include <optional>
#include <string_view>
#include <tuple>

#include "circlet/base/error.h"
#include "circlet/base/threads.h"

namespace circlet::gemm {
namespace {

// oneDNN does not look at what its allocations return while it makes a product, and crashes where memory is limited
// (ulimit -v). What it takes there, code included, stays far below this.
void RequireMemoryForOneDnn() {
  constexpr size_t kBytes = size_t{16} << 20;
  void* const room = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (room == MAP_FAILED) throw std::bad_alloc();
  munmap(room, kBytes);
}

}  // namespace

OneDnnProduct::OneDnnProduct(const ProductShape& shape, bool with_bias) {
  RequireMemoryForOneDnn();
  // In a parallel region of the calling program oneDNN would make it for more threads than it then gets.
  std::optional<SingleThreadScope> alone;
  if (Threads() == 1) alone.emplace();
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
    dnnl::primitive_attr exact;  // the environment may have another default (ONEDNN_DEFAULT_FPMATH_MODE)
    exact.set_fpmath_mode(dnnl::fpmath_mode::strict);
    const dnnl::matmul::primitive_desc chosen(
        with_bias ? dnnl::matmul::desc(a, b, bias, y) : dnnl::matmul::desc(a, b, y), exact, engine_);
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
    if (error.status == dnnl_out_of_memory) throw std::bad_alloc();
    CIRCLET_CHECK(false, "oneDNN refuses the product {}x{}x{}: {}", m, n, k, error.what());
  }
}

void OneDnnProduct::Run(const void* a, const void* b, const float* bias, void* y) {
  const std::array<const void*, 4> operands{a, b, y, bias};
  for (size_t i = 0; i < memory_.size(); ++i) memory_[i].set_data_handle(const_cast<void*>(operands[i]));
  const dnnl_status_t status =
      dnnl_primitive_execute(product_.get(), stream_.get(), static_cast<int>(args_.size()), args_.data());
  if (status == dnnl_out_of_memory) throw std::bad_alloc();
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
