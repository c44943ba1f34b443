#pragma once

#include <cuda_runtime_api.h>

#include <string>

#include "hbsattn/status.h"

namespace hbsattn::kernels {

inline Status cuda_status(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return Status::Ok();
  cudaGetLastError();  // or the next caller who asks would be told of this one
  return Status::CudaError(std::string(what) + " failed: " + cudaGetErrorString(error));
}

}  // namespace hbsattn::kernels
