#include <map>
#include <mutex>
#include <utility>

#include "kernels/common/cuda_status.h"
#include "kernels/instances.h"

namespace hbsattn::kernels {
namespace {

struct DeviceFacts {
  int compute_capability = 0;  // major * 10 + minor
  DevicePolicy policy;
};

Status ask_runtime(int device, DeviceFacts* facts) {
  int major = 0, minor = 0, multiprocessors = 0, l2_bytes = 0, shared_bytes = 0;
  for (auto [value, attribute] :
       {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
        std::pair{&multiprocessors, cudaDevAttrMultiProcessorCount}, std::pair{&l2_bytes, cudaDevAttrL2CacheSize},
        std::pair{&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor}}) {
    HBSATTN_RETURN_IF_ERROR(cuda_status(cudaDeviceGetAttribute(value, attribute, device), "cudaDeviceGetAttribute"));
  }
  *facts = {major * 10 + minor, {multiprocessors, l2_bytes, shared_bytes}};
  return Status::Ok();
}

// The runtime is asked once for each device.
Status find_facts(DeviceFacts* facts) {
  static std::mutex mutex;
  static std::map<int, DeviceFacts> known;
  int device = 0;
  HBSATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&device), "cudaGetDevice"));
  const std::lock_guard<std::mutex> lock(mutex);
  auto found = known.find(device);
  if (found == known.end()) {
    DeviceFacts fresh;
    HBSATTN_RETURN_IF_ERROR(ask_runtime(device, &fresh));
    found = known.emplace(device, fresh).first;
  }
  *facts = found->second;
  return Status::Ok();
}

}  // namespace

Status current_device(int* compute_capability, int* multiprocessors) {
  DeviceFacts facts;
  HBSATTN_RETURN_IF_ERROR(find_facts(&facts));
  *compute_capability = facts.compute_capability;
  *multiprocessors = facts.policy.multiprocessors;
  return Status::Ok();
}

DevicePolicy current_policy() {
  DeviceFacts facts;
  return find_facts(&facts).ok() ? facts.policy : DevicePolicy{};
}

}  // namespace hbsattn::kernels
