#include <utility>

#include "kernels/common/cuda_status.h"
#include "kernels/instances.h"

namespace hbsattn::kernels {

Status current_device(int* compute_capability, int* multiprocessors) {
  int device = 0, major = 0, minor = 0;
  HBSATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
  for (auto [value, attribute] :
       {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
        std::pair{multiprocessors, cudaDevAttrMultiProcessorCount}}) {
    HBSATTN_RETURN_IF_ERROR(cuda_status(cudaDeviceGetAttribute(value, attribute, device), "cudaDeviceGetAttribute"));
  }
  *compute_capability = major * 10 + minor;
  return Status::Ok();
}

}  // namespace hbsattn::kernels
