#include <algorithm>
#include <atomic>
#include <mutex>
#include <utility>
#include <vector>

#include "kernels/common/launch.cuh"
#include "kernels/instances.h"

namespace hbsattn::kernels {
namespace {

struct Device {
  int capability = 0;  // major * 10 + minor; 0: not asked for yet
  DevicePolicy policy;
  int block_shared_bytes = 0;                             // that a CTA may have
  std::vector<std::pair<const void*, int>> shared_bytes;  // that kernels may have
};

// What the runtime has been asked, by device.
struct Devices {
  std::mutex mutex;
  std::vector<Device> known;
};

Devices& devices() {
  static Devices all;
  return all;
}

constexpr int kNoFamily = -1;
std::atomic<int> forced{kNoFamily};
std::atomic<int> shared_limit{0};

// Whether a device runs what was compiled for 9.0. Others run what was compiled for 8.0, however new they are.
constexpr bool runs_sm90_code(int capability) { return HBSATTN_SM90 && capability == 90; }

Status ask_runtime(int index, Device& device) {
  int major = 0, minor = 0, multiprocessors = 0, l2_bytes = 0, shared_bytes = 0, memory_khz = 0, memory_bits = 0;
  for (auto [value, attribute] :
       {std::pair{&major, cudaDevAttrComputeCapabilityMajor}, std::pair{&minor, cudaDevAttrComputeCapabilityMinor},
        std::pair{&multiprocessors, cudaDevAttrMultiProcessorCount}, std::pair{&l2_bytes, cudaDevAttrL2CacheSize},
        std::pair{&shared_bytes, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
        std::pair{&device.block_shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin},
        std::pair{&memory_khz, cudaDevAttrMemoryClockRate}, std::pair{&memory_bits, cudaDevAttrGlobalMemoryBusWidth}}) {
    HBSATTN_RETURN_IF_ERROR(cuda_status(cudaDeviceGetAttribute(value, attribute, index), "cudaDeviceGetAttribute"));
  }
  // Twice in each clock.
  const int64_t memory_rate = int64_t{memory_khz} * memory_bits / 4 / 1000;
  device.capability = major * 10 + minor;
  device.policy = {multiprocessors, l2_bytes, shared_bytes, memory_rate,
                   runs_sm90_code(device.capability) ? KernelFamily::kSm90 : KernelFamily::kSm80};
  return Status::Ok();
}

// Calls use(device) with what is known of the current device, while nobody else uses it.
template <class Use>
Status with_current_device(Use&& use) {
  int index = 0;
  HBSATTN_RETURN_IF_ERROR(cuda_status(cudaGetDevice(&index), "cudaGetDevice"));
  const std::lock_guard lock(devices().mutex);
  auto& known = devices().known;
  if (known.size() <= static_cast<size_t>(index)) known.resize(index + 1);
  if (known[index].capability == 0) HBSATTN_RETURN_IF_ERROR(ask_runtime(index, known[index]));
  return use(known[index]);
}

}  // namespace

Status current_device(int* compute_capability, int* multiprocessors) {
  return with_current_device([&](const Device& device) {
    *compute_capability = device.capability;
    *multiprocessors = device.policy.multiprocessors;
    return Status::Ok();
  });
}

DevicePolicy current_policy(int32_t element_size) {
  DevicePolicy policy;
  const Status status = with_current_device([&](const Device& device) {
    policy = device.policy;
    return Status::Ok();
  });
  if (!status.ok()) policy = DevicePolicy{};
  policy.element_size = element_size;
  // Multiprocessors have a kilobyte beside what one CTA may take.
  if (const int limit = shared_limit; limit > 0)
    policy.shared_bytes = std::min<int64_t>(policy.shared_bytes, limit + 1024);
  if (element_size == element_size_of(DType::kFloat32)) policy.family = KernelFamily::kSm80;
  policy.family = forced_family().value_or(policy.family);
  return policy;
}

int block_shared_bytes() {
  int bytes = 0;
  const Status status = with_current_device([&](const Device& device) {
    bytes = device.block_shared_bytes;
    return Status::Ok();
  });
  const int limit = shared_limit;
  return !status.ok() ? 0 : limit > 0 ? std::min(bytes, limit) : bytes;
}

void limit_shared_bytes(int bytes) { shared_limit = bytes; }

int shared_bytes_limit() { return shared_limit; }

void force_family(std::optional<KernelFamily> family) { forced = family ? static_cast<int>(*family) : kNoFamily; }

std::optional<KernelFamily> forced_family() {
  const int family = forced;
  return family == kNoFamily ? std::nullopt : std::optional(static_cast<KernelFamily>(family));
}

// Code for 8.0 does not wait for earlier kernels, on devices that could overlap them either.
bool overlaps_kernels() {
  int capability = 0, multiprocessors = 0;
  return current_device(&capability, &multiprocessors).ok() && runs_sm90_code(capability);
}

int give_shared_bytes(int bytes) {
  // What the runtime has of each CTA's, and multiprocessors have beside what one CTA may take.
  constexpr int kReserved = 1024, kStep = 128;
  const int limit = shared_limit;
  if (limit == 0) return bytes;
  const Status status = with_current_device([&](const Device& device) {
    const int ctas = std::max((limit + kReserved) / (bytes + kReserved), 1);
    const int too_little = static_cast<int>(device.policy.shared_bytes) / (ctas + 1) - kReserved;  // ctas + 1 have it
    bytes = std::clamp(too_little / kStep * kStep + kStep, bytes, std::max(bytes, device.block_shared_bytes));
    return Status::Ok();
  });
  return bytes;
}

Status allow_shared_bytes(const void* kernel, int bytes) {
  return with_current_device([&](Device& device) {
    auto& all = device.shared_bytes;
    auto known = std::find_if(all.begin(), all.end(), [&](const auto& allowed) { return allowed.first == kernel; });
    if (known != all.end() && known->second >= bytes) return Status::Ok();
    HBSATTN_RETURN_IF_ERROR(cuda_status(
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes), "cudaFuncSetAttribute"));
    if (known == all.end()) known = all.insert(all.end(), {kernel, 0});
    known->second = bytes;
    return Status::Ok();
  });
}

}  // namespace hbsattn::kernels
