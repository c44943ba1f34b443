#include "core/select.h"

#include <string>

#include "core/dispatch.h"
#include "hbsattn/hbsattn.h"

namespace hbsattn {
namespace {

constexpr int kSm90 = 90;
constexpr int kVectorBytes = 16;  // what the copy engine moves at least

int64_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
    case DType::kBFloat16:
      return 2;
    case DType::kFloat32:
      return 4;
    case DType::kFloat64:
      return 8;
  }
  return 8;
}

// "float16 or bfloat16"
std::string compiled_dtypes() {
  std::string names;
  for (DType dtype : {DType::kFloat16, DType::kBFloat16}) {
    const bool compiled = Sm90ForwardKernels::any([&](auto config) { return decltype(config)::kDType == dtype; });
    if (compiled) names += (names.empty() ? "" : " or ") + std::string(name_of(dtype));
  }
  return names;
}

Status check_view(const char* name, const TensorView& view, DType dtype) {
  if (addressable(view, dtype)) return Status::Ok();
  return Status::NotSupported(std::string(name) + " has strides (" + std::to_string(view.batch_stride) + ", " +
                              std::to_string(view.row_stride) + ", " + std::to_string(view.head_stride) +
                              ", 1) or an address that the copy engine cannot use; expected 16-byte aligned data and "
                              "strides, and a batch stride that is a multiple of the row stride");
}

}  // namespace

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
  }
  return "unknown";
}

bool addressable(const TensorView& view, DType dtype) {
  // A tensor map's strides fit 40 bits; those of rows must also leave room for the wrap of kernels/common/tensor_map.h.
  constexpr int64_t kRowLimit = int64_t{1} << 31, kHeadLimit = int64_t{1} << 40;
  const int64_t row_bytes = view.row_stride * size_of(dtype), head_bytes = view.head_stride * size_of(dtype);
  return reinterpret_cast<uintptr_t>(view.data) % kVectorBytes == 0 && row_bytes > 0 && row_bytes < kRowLimit &&
         row_bytes % kVectorBytes == 0 && head_bytes > 0 && head_bytes < kHeadLimit && head_bytes % kVectorBytes == 0 &&
         view.batch_stride >= 0 && view.batch_stride % view.row_stride == 0;
}

Status check_addressable(const ForwardParams& params) {
  if (params.head_dim % kHeadDimMultiple != 0) {
    return Status::NotSupported("head_dim is " + std::to_string(params.head_dim) + "; expected a multiple of " +
                                std::to_string(kHeadDimMultiple) + "; copies with zeros behind each row do");
  }
  HBSATTN_RETURN_IF_ERROR(check_view("q", params.q, params.dtype));
  HBSATTN_RETURN_IF_ERROR(check_view("k", params.k, params.dtype));
  HBSATTN_RETURN_IF_ERROR(check_view("v", params.v, params.dtype));
  return check_view("out", params.out, params.dtype);
}

Status check_device() {
  int capability = 0, multiprocessors = 0;
  HBSATTN_RETURN_IF_ERROR(kernels::current_device(&capability, &multiprocessors));
  if (HBSATTN_SM90 && capability == kSm90) return Status::Ok();
  return Status::NotSupported("the device has compute capability " + std::to_string(capability / 10) + "." +
                              std::to_string(capability % 10) + "; expected " +
                              (HBSATTN_SM90 ? "9.0 (Hopper)" : "none, as this build of hbsattn has no kernels"));
}

Status select_forward(const ForwardParams& params, KernelKey* key) {
  HBSATTN_RETURN_IF_ERROR(check_device());
  const int tile_rows =
      shape_tiles(params.mask.shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads).tile_rows;
  int chosen = 0, largest = 0;
  Sm90ForwardKernels::any([&](auto config) {
    using Config = decltype(config);
    if (Config::kDType != params.dtype || Config::kTileM != tile_rows) return false;
    if (chosen == 0 && params.head_dim <= Config::kHeadDim) chosen = Config::kHeadDim;
    largest = Config::kHeadDim;
    return false;
  });
  if (largest == 0) {
    return Status::NotSupported(std::string("the dtype of q is ") + name_of(params.dtype) + "; expected " +
                                compiled_dtypes() + " on CUDA");
  }
  if (chosen == 0) {
    return Status::NotSupported("head_dim is " + std::to_string(params.head_dim) + "; expected 1 to " +
                                std::to_string(largest) + " on CUDA");
  }
  *key = {params.dtype, chosen, tile_rows};
  return Status::Ok();
}

}  // namespace hbsattn
