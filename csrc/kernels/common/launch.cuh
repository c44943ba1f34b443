#pragma once

// How every kernel is launched: so that it may start while the one before it in the stream still runs.

#include <cuda_runtime.h>

#include "hbsattn/params.h"
#include "kernels/common/cuda_status.h"

namespace hbsattn {

// Waits until all kernels before this one in its stream are complete; what they wrote is visible then. All threads of a
// kernel that `launch` starts call this, and none touches global memory before: neither reads, as what it reads may
// still be written, nor writes, as what it overwrites may still be read. What needs no global memory, such as barriers
// and prefetches of tensor maps in the arguments, comes before. A kernel that never waited would be complete before
// those before it are, and the next would not wait for these. A kernel that depends on nothing of the one before it may
// call this at its end, if that one calls let_next_kernel_start() behind its own wait: what that waited for is there.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900  // before, a kernel starts when those before it are complete
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Lets the next kernel's CTAs start where there is room, once all CTAs of this one have called this, by any thread, or
// ended. It is a hint: the next kernel waits for the end of this one wherever this is called. Its CTAs hold registers
// and shared memory while they wait, so a kernel of many CTAs calls this at once, as all its CTAs have started when the
// last one does, and a persistent one where it knows that its work list is at an end.
__device__ __forceinline__ void let_next_kernel_start() {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

namespace kernels {

// What a CTA is given that asks for so many bytes of dynamic shared memory: under a limit more, so that no more of them
// share a multiprocessor than where it has that little.
int give_shared_bytes(int bytes);

// Lets a kernel have that many bytes of dynamic shared memory on the current device. The runtime is asked once for each
// kernel and device.
Status allow_shared_bytes(const void* kernel, int bytes);

// Whether the current device can start a kernel while the one before it still runs.
bool overlaps_kernels();

// Launches a kernel that keeps the rules above. `what`: for an error, e.g. "the launch of the forward kernel". An empty
// grid launches nothing. Works in a capture: the edge between two such kernels is a programmatic one there.
template <class... Parameters, class... Arguments>
Status launch(const char* what, void (*kernel)(Parameters...), dim3 grid, dim3 block, int shared_bytes, Stream stream,
              const Arguments&... arguments) {
  constexpr int kAlwaysAllowed = 48 * 1024;
  if (shared_bytes > 0) shared_bytes = give_shared_bytes(shared_bytes);
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return Status::Ok();
  if (shared_bytes > kAlwaysAllowed) {
    HBSATTN_RETURN_IF_ERROR(allow_shared_bytes(reinterpret_cast<const void*>(kernel), shared_bytes));
  }
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  config.attrs = &overlap;
  config.numAttrs = overlaps_kernels() ? 1 : 0;
  return cuda_status(cudaLaunchKernelEx(&config, kernel, arguments...), what);
}

}  // namespace kernels
}  // namespace hbsattn
