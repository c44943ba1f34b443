#include <mutex>
#include <utility>
#include <vector>

#include "kernels/common/launch.cuh"
#include "kernels/instances.h"

namespace hbsattn::kernels {
namespace {

struct Device {
  int capability = 0;  // 0: not asked for yet
  DevicePolicy policy;
  std::vector<std::pair<const void*, int>> shared_bytes;  // that kernels may have
};

// What the runtime has been asked, by device.
struct Devices {
  std::mutex mutex;
  std::vector<Device> known;

  Device& at(int index) {
    if (known.size() <= static_cast<size_t>(index)) known.resize(index + 1);
    return known[index];
  }
};

Devices& devices() {
  static Devices all;
  return all;
}

// Capability and policy of the current device.
Status find_device(int* compute_capability, DevicePolicy* policy) {
  int index = 0;
  HBSATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&index), "cudaGetDevice"));
  const std::lock_guard lock(devices().mutex);
  Device& device = devices().at(index);
  if (device.capability == 0) {
    int major = 0, minor = 0, multiprocessors = 0, l2_bytes = 0, shared_bytes = 0;
    for (auto [value, attribute] :
         {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
          std::pair{&multiprocessors, cudaDevAttrMultiProcessorCount}, std::pair{&l2_bytes, cudaDevAttrL2CacheSize},
          std::pair{&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor}}) {
      HBSATTN_RETURN_IF_ERROR(cuda_status(cudaDeviceGetAttribute(value, attribute, index), "cudaDeviceGetAttribute"));
    }
    device.policy = {multiprocessors, l2_bytes, shared_bytes};
    device.capability = major * 10 + minor;
  }
  *compute_capability = device.capability;
  *policy = device.policy;
  return Status::Ok();
}

}  // namespace

Status current_device(int* compute_capability, int* multiprocessors) {
  DevicePolicy policy;
  HBSATTN_RETURN_IF_ERROR(find_device(compute_capability, &policy));
  *multiprocessors = policy.multiprocessors;
  return Status::Ok();
}

DevicePolicy current_policy() {
  int capability = 0;
  DevicePolicy policy;
  return find_device(&capability, &policy).ok() ? policy : DevicePolicy{};
}

Status allow_shared_bytes(const void* kernel, int bytes) {
  int index = 0;
  HBSATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&index), "cudaGetDevice"));
  const std::lock_guard lock(devices().mutex);
  auto& allowed = devices().at(index).shared_bytes;
  for (const auto& [known, at_most] : allowed) {
    if (known == kernel && at_most == bytes) return Status::Ok();
  }
  HBSATTN_RETURN_IF_ERROR(cuda_status(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
                                      "cudaFuncSetAttribute"));
  allowed.emplace_back(kernel, bytes);
  return Status::Ok();
}

}  // namespace hbsattn::kernels
