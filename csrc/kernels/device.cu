#include <mutex>
#include <utility>
#include <vector>

#include "kernels/common/launch.cuh"
#include "kernels/instances.h"

namespace hbsattn::kernels {
namespace {

struct Device {
  int capability = 0;  // 0: not asked for yet
  int multiprocessors = 0;
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

}  // namespace

Status current_device(int* compute_capability, int* multiprocessors) {
  int index = 0;
  HBSATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&index), "cudaGetDevice"));
  const std::lock_guard lock(devices().mutex);
  Device& device = devices().at(index);
  if (device.capability == 0) {
    int major = 0, minor = 0;
    for (auto [value, attribute] :
         {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
          std::pair{&device.multiprocessors, cudaDevAttrMultiProcessorCount}}) {
      HBSATTN_RETURN_IF_ERROR(cuda_status(cudaDeviceGetAttribute(value, attribute, index), "cudaDeviceGetAttribute"));
    }
    device.capability = major * 10 + minor;
  }
  *compute_capability = device.capability;
  *multiprocessors = device.multiprocessors;
  return Status::Ok();
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
