#pragma once

// What only a tensor knows: device, dtype, rank, strides. Checks of the problem itself are the core's.

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <string>

#include "hbsattn/params.h"
#include "hbsattn/status.h"

namespace hbsattn {

inline void raise_if_error(const Status& status) {
  switch (status.code) {
    case StatusCode::kOk:
      return;
    case StatusCode::kInvalidType:
      TORCH_CHECK_TYPE(false, status.message);
    case StatusCode::kCudaError:
      TORCH_CHECK(false, status.message);
    case StatusCode::kInvalidValue:
    case StatusCode::kNotSupported:
      break;
  }
  TORCH_CHECK_VALUE(false, status.message);
}

// Messages are put together without streams: an extension that is linked to a static C++ library cannot use the
// stream operators that PyTorch's headers would instantiate in it.
inline std::string text(const char* part) { return part; }
inline std::string text(const std::string& part) { return part; }
inline std::string text(int64_t part) { return std::to_string(part); }
inline std::string text(at::Device part) { return part.str(); }
inline std::string text(at::IntArrayRef part) {
  std::string list;
  for (const int64_t size : part) list += (list.empty() ? "" : ", ") + std::to_string(size);
  return "[" + list + "]";
}

template <class... Parts>
std::string describe(const Parts&... parts) {
  return (std::string() + ... + text(parts));
}

inline std::string dtype_name(at::ScalarType dtype) { return c10::getDtypeNames(dtype).first; }

inline constexpr const char* kThatOfQ = ", that of q";

// `whose`: whose dtype it has to be, where it follows from another tensor.
inline void check_dtype(const char* name, const at::Tensor& tensor, at::ScalarType dtype, const char* whose = "") {
  TORCH_CHECK_TYPE(tensor.scalar_type() == dtype, describe(name, " has dtype ", dtype_name(tensor.scalar_type()),
                                                           "; expected ", dtype_name(dtype), whose));
}

inline void check_device(const char* name, const at::Tensor& tensor, at::Device device) {
  TORCH_CHECK_VALUE(tensor.device() == device,
                    describe(name, " is on ", tensor.device(), "; expected ", device, ", where the other tensors are"));
}

inline void check_dims(const char* name, const at::Tensor& tensor, int64_t dims) {
  TORCH_CHECK_VALUE(tensor.dim() == dims,
                    describe(name, " has ", tensor.dim(), " dimensions, shape ", tensor.sizes(), "; expected ", dims));
}

inline void check_shape(const char* name, const at::Tensor& tensor, at::IntArrayRef shape) {
  TORCH_CHECK_VALUE(tensor.sizes() == shape, describe(name, " has shape ", tensor.sizes(), "; expected ", shape));
}

// A table of the library's own making, or one that looks like it.
inline void check_table(const char* name, const at::Tensor& tensor, int64_t dims, at::Device device,
                        at::ScalarType dtype = at::kInt) {
  check_dtype(name, tensor, dtype);
  check_device(name, tensor, device);
  check_dims(name, tensor, dims);
  TORCH_CHECK_VALUE(tensor.is_contiguous(),
                    describe(name, " has strides ", tensor.strides(), "; expected a contiguous tensor"));
}

inline int32_t to_int32(const char* name, int64_t value) {
  TORCH_CHECK_VALUE(value >= std::numeric_limits<int32_t>::min() && value <= std::numeric_limits<int32_t>::max(),
                    describe(name, " is ", value, "; expected less than 2^31"));
  return static_cast<int32_t>(value);
}

inline DType to_dtype(const char* name, const at::Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case at::kHalf:
      return DType::kFloat16;
    case at::kBFloat16:
      return DType::kBFloat16;
    case at::kFloat:
      return DType::kFloat32;
    case at::kDouble:
      return DType::kFloat64;
    default:
      TORCH_CHECK_TYPE(false, describe(name, " has dtype ", dtype_name(tensor.scalar_type()),
                                       "; expected float16, bfloat16, float32 or float64"));
  }
}

// A tensor (batch, rows, heads, head_dim) or (rows, heads, head_dim). Strides of dimensions of one, which are
// arbitrary in PyTorch, are those of a contiguous tensor.
inline TensorView to_view(const char* name, const at::Tensor& tensor) {
  TORCH_CHECK_VALUE(tensor.stride(-1) == 1 || tensor.size(-1) <= 1,
                    describe(name, " has strides ", tensor.strides(), "; expected a contiguous last dimension"));
  TensorView view;
  view.data = tensor.data_ptr();
  view.columns = static_cast<int32_t>(std::min<int64_t>(tensor.size(-1), std::numeric_limits<int32_t>::max()));
  view.head_stride = tensor.size(-2) > 1 ? tensor.stride(-2) : tensor.size(-1);
  view.row_stride = tensor.size(-3) > 1 ? tensor.stride(-3) : tensor.size(-2) * view.head_stride;
  if (tensor.dim() == 4 && tensor.size(0) > 1) {
    view.batch_stride = tensor.stride(0);
    if (tensor.size(1) == 1) view.row_stride = view.batch_stride;
  }
  return view;
}

}  // namespace hbsattn
