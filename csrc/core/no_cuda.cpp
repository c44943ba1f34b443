// What stands for the kernels in a build without CUDA: every call fails with one sentence.

#if !HBSATTN_WITH_CUDA

#include "kernels/instances.h"

namespace hbsattn::kernels {
namespace {

Status no_cuda() {
  return Status::NotSupported(
      "this build of hbsattn has no CUDA kernels; expected one built with nvcc (set CUDA_HOME to a CUDA toolkit)");
}

}  // namespace

Status current_device(int*, int*) { return no_cuda(); }
DevicePolicy current_policy(int32_t) { return {}; }
int block_shared_bytes() { return 0; }
void limit_shared_bytes(int) {}
int shared_bytes_limit() { return 0; }
void force_family(std::optional<KernelFamily>) {}
std::optional<KernelFamily> forced_family() { return {}; }
Status make_sequences(const SequencesParams&, Stream) { return no_cuda(); }
Status pack_mask(const PackParams&, Stream) { return no_cuda(); }
Status plan_items(const PlanParams&, Stream) { return no_cuda(); }
Status transpose_mask(const TransposeParams&, Stream) { return no_cuda(); }
Status plan_keys(const KeyPlanParams&, Stream) { return no_cuda(); }
Status prepare_rows(const BackwardParams&, const BackwardWorkspace&, Stream) { return no_cuda(); }
Status sum_sinks(const BackwardParams&, const BackwardWorkspace&, Stream) { return no_cuda(); }

}  // namespace hbsattn::kernels

#endif
