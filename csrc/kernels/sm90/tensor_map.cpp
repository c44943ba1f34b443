#include "kernels/sm90/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

namespace hbsattn {
namespace {

using Encode = decltype(&cuTensorMapEncodeTiled);

// The driver's function through the runtime, so that nothing links to libcuda.
Encode find_encode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error =
      cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result);
  return error == cudaSuccess && result == cudaDriverEntryPointSuccess ? reinterpret_cast<Encode>(function) : nullptr;
}

Status find_data_type(DType dtype, CUtensorMapDataType* type) {
  switch (dtype) {
    case DType::kFloat16:
      *type = CU_TENSOR_MAP_DATA_TYPE_FLOAT16;
      return Status::Ok();
    case DType::kBFloat16:
      *type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
      return Status::Ok();
    case DType::kFloat32:
    case DType::kFloat64:
      break;
  }
  return Status::NotSupported("the dtype is number " + std::to_string(static_cast<int>(dtype)) +
                              ", for which there are no tensor maps; expected float16 or bfloat16");
}

constexpr int kElementSize = 2;

// The driver wants the device's context to be the thread's own, which it is not before the thread's first call of the
// runtime: that may be the one that this map is for.
cudaError_t bind_context() {
  int device = 0;
  const cudaError_t error = cudaGetDevice(&device);
  return error == cudaSuccess ? cudaSetDevice(device) : error;
}

template <int kRank>
Status encode(const MatrixRows& tensor, const cuuint64_t (&sizes)[kRank], const cuuint64_t (&byte_strides)[kRank - 1],
              const cuuint32_t (&box)[kRank], CUtensorMap* map) {
  static const Encode encode_tiled = find_encode();
  if (encode_tiled == nullptr) {
    return Status::CudaError("the CUDA driver has no cuTensorMapEncodeTiled; expected a driver for CUDA 12 or newer");
  }
  CUtensorMapDataType type;
  HBSATTN_RETURN_IF_ERROR(find_data_type(tensor.dtype, &type));
  cuuint32_t element_strides[kRank];
  for (cuuint32_t& stride : element_strides) stride = 1;
  const auto run = [&] {
    const auto swizzle = box[0] == 64 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B;
    return encode_tiled(map, type, kRank, tensor.data, sizes, byte_strides, box, element_strides,
                        CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                        CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  };
  CUresult result = run();
  if (result == CUDA_ERROR_INVALID_CONTEXT) {
    if (bind_context() == cudaSuccess) result = run();
    cudaGetLastError();  // or the next launch would report it
  }
  if (result != CUDA_SUCCESS) {
    return Status::CudaError("cuTensorMapEncodeTiled failed with code " + std::to_string(result));
  }
  return Status::Ok();
}

}  // namespace

Status encode_rows(const MatrixRows& tensor, int chunk, int box_rows, int box_heads, CUtensorMap* map) {
  const cuuint64_t row = tensor.row_stride * kElementSize, head = tensor.head_stride * kElementSize;
  return encode<3>(
      tensor,
      {static_cast<cuuint64_t>(tensor.columns), static_cast<cuuint64_t>(tensor.rows),
       static_cast<cuuint64_t>(tensor.heads)},
      {row, head},
      {static_cast<cuuint32_t>(chunk), static_cast<cuuint32_t>(box_rows), static_cast<cuuint32_t>(box_heads)}, map);
}

Status encode_whole_rows(const MatrixRows& tensor, int chunk, int chunks, int box_rows, CUtensorMap* map,
                         int box_heads) {
  const cuuint64_t row = tensor.row_stride * kElementSize, head = tensor.head_stride * kElementSize;
  const cuuint64_t columns = chunk, groups = box_rows / 8;
  return encode<5>(tensor,
                   {columns, static_cast<cuuint64_t>(tensor.rows), static_cast<cuuint64_t>(tensor.chunks(chunk)),
                    groups, static_cast<cuuint64_t>(tensor.heads)},
                   {row, columns * kElementSize, 8 * row, head},
                   {static_cast<cuuint32_t>(chunk), 8, static_cast<cuuint32_t>(chunks), static_cast<cuuint32_t>(groups),
                    static_cast<cuuint32_t>(box_heads)},
                   map);
}

Status encode_eight_heads(const MatrixRows& tensor, int chunk, int group, CUtensorMap* map) {
  const cuuint64_t row = tensor.row_stride * kElementSize, head = tensor.head_stride * kElementSize;
  return encode<5>(tensor,
                   {static_cast<cuuint64_t>(tensor.columns), static_cast<cuuint64_t>(group),
                    static_cast<cuuint64_t>(tensor.heads / group), 1, static_cast<cuuint64_t>(tensor.rows)},
                   {head, group * head, row, row}, {static_cast<cuuint32_t>(chunk), 8, 1, 1, 1}, map);
}

Status encode_clipped_rows(const MatrixRows& tensor, int chunk, CUtensorMap* map) {
  const cuuint64_t row = tensor.row_stride * kElementSize, head = tensor.head_stride * kElementSize;
  constexpr cuuint64_t kAny = cuuint64_t{1} << 31;
  return encode<5>(
      tensor, {static_cast<cuuint64_t>(tensor.columns), kRunEnd, kAny, kAny, static_cast<cuuint64_t>(tensor.heads)},
      {row, (cuuint64_t{1} << 34) - row, row, head}, {static_cast<cuuint32_t>(chunk), 8, 1, 1, 1}, map);
}

}  // namespace hbsattn
