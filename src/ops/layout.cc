#include "circlet/ops/layout.h"

#include <cstring>
#include <numeric>
#include <optional>

#include "circlet/base/threads.h"
#include "ops/codes.h"
#include "ops/internal.h"
#include "ops/joins.h"
#include "ops/strided_copy.h"
#include "ops/table.h"

namespace circlet {
namespace {

int64_t ElementBytes(std::string_view op, const TensorType& type) {
  if (BitWidth(type.dtype) < 8)
    Fail("{}: {} is packed below a byte; values are moved only in types of whole bytes", op, type.ToString());
  return BitWidth(type.dtype) / 8;
}

std::vector<int64_t> Wide(const Shape& shape) { return {shape.Sizes().begin(), shape.Sizes().end()}; }

// The product of the sizes in front of and behind an axis.
struct Around {
  int64_t outer, inner;
};
Around AroundAxis(const Shape& shape, int axis) {
  return {Product(shape.Sizes().first(static_cast<size_t>(axis))),
          Product(shape.Sizes().subspan(static_cast<size_t>(axis) + 1))};
}

// Copies `rows` runs of `bytes` between two arrays of rows.
void CopyRuns(const std::byte* from, int64_t from_step, std::byte* to, int64_t to_step, int64_t rows, int64_t bytes) {
  if (bytes == 0) return;
  ParallelFor(rows, RowGrain(bytes / 4), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row)
      std::memcpy(to + row * to_step, from + row * from_step, static_cast<size_t>(bytes));
  });
}

// Parts of `sizes` along `axis`, one output each.
template <typename T>
std::vector<TensorType> InferParts(std::string_view op, Types in, int32_t axis, const std::vector<T>& sizes) {
  const int resolved = ResolveAxis(op, in, axis, in[0].shape.Rank());
  int64_t total = 0;
  std::vector<TensorType> out;
  for (const int64_t size : sizes) {
    if (size < 0) ShapeError(op, in, fmt::format("part {} has size {}; sizes must not be negative", out.size(), size));
    total += size;
    out.push_back(in[0]);
    out.back().shape[resolved] = size;
  }
  if (total != in[0].shape[resolved])
    ShapeError(op, in,
               fmt::format("the parts sum to {} but axis {} has size {}; they must be equal", total, axis,
                           in[0].shape[resolved]));
  return out;
}

void EvalParts(std::string_view op, const EvalContext& context, int32_t axis) {
  const Tensor& x = context.in[0];
  const int resolved = axis < 0 ? axis + x.GetShape().Rank() : axis;
  const Around around = AroundAxis(x.GetShape(), resolved);
  const int64_t bytes = around.inner * ElementBytes(op, x.Type());
  int64_t offset = 0;
  for (const Tensor& out : context.out) {
    const int64_t run = out.GetShape()[resolved] * bytes;
    CopyRuns(x.Raw() + offset, x.GetShape()[resolved] * bytes, out.Raw(), run, around.outer, run);
    offset += run;
  }
}

void ExpectOutputs(std::string_view op, const CircleNode& node, size_t count) {
  if (node.outputs.size() != count)
    Fail("{}: num_splits is {} but the operator has {} outputs; they must be equal", op, count, node.outputs.size());
}

// Where the one -1 of `sizes` stands, or nothing.
template <typename T>
std::optional<size_t> OpenSize(std::string_view op, const std::vector<T>& sizes) {
  const auto at = std::find(sizes.begin(), sizes.end(), -1);
  if (at == sizes.end()) return std::nullopt;
  if (std::find(at + 1, sizes.end(), -1) != sizes.end())
    Fail("{}: more than one of the sizes is -1; only one can be derived", op);
  return static_cast<size_t>(at - sizes.begin());
}

int32_t OneAxis(std::string_view op, const CircleNode& node, int input) {
  const std::vector<int32_t> axis = Narrow(op, node.Constant(input));
  if (axis.size() != 1) Fail("{}: input {} has {} elements; it must be one axis", op, input, axis.size());
  return axis[0];
}

}  // namespace

// ---- Reshape ------------------------------------------------------------------------------------------------------

std::vector<TensorType> Reshape::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  if (shape.Elements() != in[0].shape.Elements())
    ShapeError(
        kName, in,
        fmt::format("{} has {} elements; it must have {}", shape.ToString(), shape.Elements(), in[0].shape.Elements()));
  return {{in[0].dtype, shape}};
}

void Reshape::Eval(const EvalContext& context) const {
  const Tensor& in = context.in[0];
  if (in.Raw() != context.out[0].Raw()) std::memcpy(context.out[0].Raw(), in.Raw(), static_cast<size_t>(in.Bytes()));
}

CircleOp Reshape::Emit(Types, Types) const {
  const std::vector<int32_t> sizes = Narrow(kName, shape.Sizes());
  return {kCircleCode, {{"new_shape", sizes}}, {CircleArg::In(0), CircleArg::Ints(sizes)}};
}

Parsed<Reshape> Reshape::Parse(const CircleNode& node) {
  const TensorType& in = ArgType(kName, node, 0);
  std::vector<int64_t> sizes;
  if (node.Has(1)) {
    sizes = node.Constant(1);
  } else {
    for (const CircleOption& option : node.options)
      if (const auto* ints = std::get_if<std::vector<int32_t>>(&option.value);
          ints != nullptr && option.name == "new_shape")
        sizes.assign(ints->begin(), ints->end());
  }
  if (const auto open = OpenSize(kName, sizes)) {
    sizes[*open] = 1;
    const int64_t known = Shape(sizes).Elements(), total = in.shape.Elements();
    if (known == 0 || total % known != 0)
      Fail("{}: -1 cannot be derived: {} elements over {}; the sizes must divide the element count", kName, total,
           known);
    sizes[*open] = total / known;
  }
  return {{Shape(std::move(sizes))}, {0}};
}

// ---- Transpose ----------------------------------------------------------------------------------------------------

std::vector<TensorType> Transpose::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  const size_t rank = static_cast<size_t>(in[0].shape.Rank());
  std::vector<char> seen(rank, 0);
  std::vector<int64_t> sizes;
  for (const int32_t axis : perm) {
    if (axis < 0 || axis >= static_cast<int32_t>(rank) || seen[static_cast<size_t>(axis)] || perm.size() != rank)
      ShapeError(kName, in,
                 fmt::format("perm {} must name each of the {} axes once", Shape({perm.begin(), perm.end()}).ToString(),
                             rank));
    seen[static_cast<size_t>(axis)] = 1;
    sizes.push_back(in[0].shape[axis]);
  }
  if (perm.size() != rank) ShapeError(kName, in, fmt::format("perm has {} axes; it must have {}", perm.size(), rank));
  return {{in[0].dtype, Shape(std::move(sizes))}};
}

void Transpose::Eval(const EvalContext& context) const {
  const Shape& from = context.in[0].GetShape();
  const std::vector<int64_t> strides = RowMajorStrides(from);
  StridedCopy copy{ElementBytes(kName, context.in[0].Type()), Wide(context.out[0].GetShape()), {}};
  for (const int32_t axis : perm) copy.strides.push_back(strides[static_cast<size_t>(axis)]);
  copy.Run(context.in[0].Raw(), context.out[0].Raw());
}

CircleOp Transpose::Emit(Types, Types) const { return {kCircleCode, {}, {CircleArg::In(0), CircleArg::Ints(perm)}}; }

Parsed<Transpose> Transpose::Parse(const CircleNode& node) {
  const int rank = ArgType(kName, node, 0).shape.Rank();
  std::vector<int64_t> perm = node.Constant(1);
  for (int64_t& axis : perm)
    if (axis < 0) axis += rank;
  return {{Narrow(kName, perm)}, {0}};
}

// ---- Slice --------------------------------------------------------------------------------------------------------

std::vector<TensorType> Slice::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  const size_t rank = static_cast<size_t>(in[0].shape.Rank());
  if (begin.size() != rank || end.size() != rank)
    ShapeError(kName, in,
               fmt::format("begin has {} and end {} entries; both must have {}", begin.size(), end.size(), rank));
  TensorType out = in[0];
  for (size_t i = 0; i < rank; ++i) {
    const int axis = static_cast<int>(i);
    if (begin[i] < 0 || begin[i] > end[i] || end[i] > in[0].shape[axis])
      ShapeError(kName, in,
                 fmt::format("axis {}: [{}, {}) must lie in [0, {})", i, begin[i], end[i], in[0].shape[axis]));
    out.shape[axis] = end[i] - begin[i];
  }
  return {out};
}

void Slice::Eval(const EvalContext& context) const {
  const std::vector<int64_t> strides = RowMajorStrides(context.in[0].GetShape());
  const int64_t element = ElementBytes(kName, context.in[0].Type());
  int64_t first = 0;
  for (size_t i = 0; i < strides.size(); ++i) first += begin[i] * strides[i];
  StridedCopy{element, Wide(context.out[0].GetShape()), strides}.Run(context.in[0].Raw() + first * element,
                                                                     context.out[0].Raw());
}

CircleOp Slice::Emit(Types, Types) const {
  return {kCircleCode,
          {},
          {CircleArg::In(0), CircleArg::Ints(begin), CircleArg::Ints(end),
           CircleArg::Ints(std::vector<int32_t>(begin.size(), 1))}};
}

Parsed<Slice> Slice::Parse(const CircleNode& node) {
  for (const std::string_view option : {"ellipsis_mask", "new_axis_mask", "shrink_axis_mask", "offset"})
    ExpectOption(kName, node, option, 0, 0);
  const Shape& shape = ArgType(kName, node, 0).shape;
  std::vector<int64_t> begin = node.Constant(1), end = node.Constant(2);
  const size_t rank = static_cast<size_t>(shape.Rank());
  for (const int64_t stride : node.Constant(3))
    if (stride != 1) Fail("{}: a stride is {}; only 1 can be executed", kName, stride);
  if (begin.size() != rank || end.size() != rank)
    Fail("{}: begin has {} and end {} entries; x {} needs {}", kName, begin.size(), end.size(), shape.ToString(), rank);
  const int64_t begin_mask = node.Int("begin_mask", 0), end_mask = node.Int("end_mask", 0);
  for (size_t i = 0; i < rank; ++i) {
    const int64_t size = shape[static_cast<int>(i)];
    const auto resolve = [&](int64_t bound) { return std::clamp<int64_t>(bound < 0 ? bound + size : bound, 0, size); };
    begin[i] = (begin_mask >> std::min<size_t>(i, 63) & 1) != 0 ? 0 : resolve(begin[i]);
    end[i] = (end_mask >> std::min<size_t>(i, 63) & 1) != 0 ? size : std::max(begin[i], resolve(end[i]));
  }
  return {{Narrow(kName, begin), Narrow(kName, end)}, {0}};
}

// ---- Split, SplitV ------------------------------------------------------------------------------------------------

std::vector<TensorType> Split::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  const int64_t size = in[0].shape[ResolveAxis(kName, in, axis, in[0].shape.Rank())];
  if (parts <= 0 || size % parts != 0)
    ShapeError(kName, in, fmt::format("axis {} of size {} does not divide into {} equal parts", axis, size, parts));
  return InferParts(kName, in, axis, std::vector<int64_t>(static_cast<size_t>(parts), size / parts));
}

void Split::Eval(const EvalContext& context) const { EvalParts(kName, context, axis); }

CircleOp Split::Emit(Types, Types) const {
  return {kCircleCode, {{"num_splits", int64_t{parts}}}, {CircleArg::Int(axis), CircleArg::In(0)}};
}

Parsed<Split> Split::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 2);
  const int64_t parts = node.Int("num_splits", 0);
  ExpectOutputs(kName, node, static_cast<size_t>(parts));
  return {{.axis = OneAxis(kName, node, 0), .parts = static_cast<int32_t>(parts)}, {1}};
}

std::vector<TensorType> SplitV::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  return InferParts(kName, in, axis, sizes);
}

void SplitV::Eval(const EvalContext& context) const { EvalParts(kName, context, axis); }

CircleOp SplitV::Emit(Types, Types) const {
  return {kCircleCode,
          {{"num_splits", static_cast<int64_t>(sizes.size())}},
          {CircleArg::In(0), CircleArg::Ints(sizes), CircleArg::Int(axis)}};
}

Parsed<SplitV> SplitV::Parse(const CircleNode& node) {
  const TensorType& in = ArgType(kName, node, 0);
  std::vector<int32_t> sizes = Narrow(kName, node.Constant(1));
  const int32_t axis = OneAxis(kName, node, 2);
  ExpectOutputs(kName, node, sizes.size());
  if (const auto open = OpenSize(kName, sizes)) {
    sizes[*open] = 0;
    const int64_t known = std::accumulate(sizes.begin(), sizes.end(), int64_t{0});
    const int64_t total = in.shape[ResolveAxis(kName, {&in, 1}, axis, in.shape.Rank())];
    if (known > total) Fail("{}: the sizes sum to {} of {}; nothing is left for -1", kName, known, total);
    sizes[*open] = static_cast<int32_t>(total - known);
  }
  return {{.axis = axis, .sizes = std::move(sizes)}, {0}};
}

// ---- Concat -------------------------------------------------------------------------------------------------------

std::optional<int> JoinedAxis(const Op& op, int rank) {
  const auto* const concat = std::get_if<Concat>(&op.kind);
  if (concat == nullptr) return std::nullopt;
  return concat->axis < 0 ? concat->axis + rank : concat->axis;
}

std::vector<TensorType> Concat::Infer(Types in) const {
  if (in.empty()) ShapeError(kName, in, "it takes at least one input");
  const int resolved = ResolveAxis(kName, in, axis, in[0].shape.Rank());
  TensorType out = in[0];
  out.shape[resolved] = 0;
  for (const TensorType& type : in) {
    bool fits = type.dtype == out.dtype && type.shape.Rank() == out.shape.Rank();
    for (int i = 0; fits && i < out.shape.Rank(); ++i) fits = i == resolved || type.shape[i] == out.shape[i];
    if (!fits) ShapeError(kName, in, fmt::format("all must agree in type and, but for axis {}, in shape", axis));
    out.shape[resolved] += type.shape[resolved];
  }
  return {out};
}

void Concat::Eval(const EvalContext& context) const {
  const Tensor& out = context.out[0];
  const int resolved = axis < 0 ? axis + out.GetShape().Rank() : axis;
  const Around around = AroundAxis(out.GetShape(), resolved);
  const int64_t bytes = around.inner * ElementBytes(kName, out.Type());
  int64_t offset = 0;
  for (const Tensor& in : context.in) {
    const int64_t run = in.GetShape()[resolved] * bytes;
    if (in.Raw() != out.Raw() + offset)  // made in its place
      CopyRuns(in.Raw(), run, out.Raw() + offset, out.GetShape()[resolved] * bytes, around.outer, run);
    offset += run;
  }
}

CircleOp Concat::Emit(Types in, Types) const {
  CircleOp op{kCircleCode, {{"axis", int64_t{axis}}}, {}};
  for (size_t i = 0; i < in.size(); ++i) op.inputs.push_back(CircleArg::In(static_cast<int>(i)));
  return op;
}

Parsed<Concat> Concat::Parse(const CircleNode& node) {
  ExpectNoActivation(kName, node);
  const int count = static_cast<int>(node.types.size());
  ExpectArgs(kName, node, count);
  Parsed<Concat> parsed{{.axis = static_cast<int32_t>(node.Int("axis", 0))}, {}};
  for (int i = 0; i < count; ++i) parsed.inputs.push_back(i);
  return parsed;
}

// ---- BroadcastTo --------------------------------------------------------------------------------------------------

std::vector<TensorType> BroadcastTo::Infer(Types in) const {
  ExpectInputs(kName, in, 1);
  if (Broadcast(kName, in[0].shape, shape) != shape)
    ShapeError(kName, in, fmt::format("x must broadcast to {} and not beyond", shape.ToString()));
  return {{in[0].dtype, shape}};
}

void BroadcastTo::Eval(const EvalContext& context) const {
  const Shape& from = context.in[0].GetShape();
  const std::vector<int64_t> strides = RowMajorStrides(from);
  StridedCopy copy{ElementBytes(kName, context.in[0].Type()), Wide(shape), {}};
  for (int i = 0; i < shape.Rank(); ++i) {
    const int axis = i - (shape.Rank() - from.Rank());
    copy.strides.push_back(axis < 0 || from[axis] == 1 ? 0 : strides[static_cast<size_t>(axis)]);
  }
  copy.Run(context.in[0].Raw(), context.out[0].Raw());
}

CircleOp BroadcastTo::Emit(Types, Types) const {
  return {kCircleCode, {}, {CircleArg::In(0), CircleArg::Ints(Narrow(kName, shape.Sizes()))}};
}

Parsed<BroadcastTo> BroadcastTo::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 2);
  return {{Shape(node.Constant(1))}, {0}};
}

// ---- Gather -------------------------------------------------------------------------------------------------------

std::vector<TensorType> Gather::Infer(Types in) const {
  ExpectInputs(kName, in, 2);
  if (in[0].shape.Rank() != 2) ShapeError(kName, in, "the table must be [rows, width]");
  if (in[1].dtype != DType::kI32 && in[1].dtype != DType::kI64) ShapeError(kName, in, "ids must be int32 or int64");
  std::vector<int64_t> sizes = Wide(in[1].shape);
  sizes.push_back(in[0].shape[1]);
  return {{in[0].dtype, Shape(std::move(sizes))}};
}

void Gather::Eval(const EvalContext& context) const {
  const Tensor& table = context.in[0];
  const Tensor& ids = context.in[1];
  const int64_t rows = table.GetShape()[0], width = table.GetShape()[1];
  const int64_t bytes = width * ElementBytes(kName, context.out[0].Type());
  const bool wide = ids.GetDType() == DType::kI64;
  const bool of_codes = table.GetDType() != context.out[0].GetDType();
  ParallelFor(ids.Elements(), RowGrain(bytes / 4), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t id = wide ? ids.As<int64_t>()[static_cast<size_t>(i)] : ids.As<int32_t>()[static_cast<size_t>(i)];
      RequireRow(id, i, rows);
      if (of_codes)
        Dequantize(table, *table.Grid(), id * width, context.out[0].F32().subspan(i * width, width));
      else
        std::memcpy(context.out[0].Raw() + i * bytes, table.Raw() + id * bytes, static_cast<size_t>(bytes));
    }
  });
}

CircleOp Gather::Emit(Types, Types) const {
  return {kCircleCode, {{"axis", int64_t{0}}}, {CircleArg::In(0), CircleArg::In(1)}};
}

Parsed<Gather> Gather::Parse(const CircleNode& node) {
  ExpectArgs(kName, node, 2);
  ExpectOption(kName, node, "axis", 0, 0);
  ExpectOption(kName, node, "batch_dims", 0, 0);
  return {{}, {0, 1}};
}

}  // namespace circlet
