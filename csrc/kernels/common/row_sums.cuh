#pragma once

#include "kernels/common/ptx.cuh"

// The order of sums of gradients of queries in global memory: chunks of 16 rows, groups of 8 columns, and in a group
// what each lane has of an accumulator, four floats. Additions of a warp take the fewest cycles where they are of
// neighbours: a lane's four from 9.0 on, which can add four at once, and else the lanes' first ones, their second ones
// and so on. Whoever adds and whoever reads is code for the same device.

namespace hbsattn {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
inline constexpr bool kAddsQuads = false;
#else
inline constexpr bool kAddsQuads = true;
#endif

// Adds a lane's floats to a group.
__device__ __forceinline__ void add_to_group(float* group, float a, float b, float c, float d, int lane) {
  if constexpr (kAddsQuads) {
    add_quad(group + 4 * lane, a, b, c, d);
  } else {
    atomicAdd(group + lane, a);
    atomicAdd(group + 32 + lane, b);
    atomicAdd(group + 64 + lane, c);
    atomicAdd(group + 96 + lane, d);
  }
}

// Reads what add_to_group() has added, for the last time.
__device__ __forceinline__ float4 read_group(const float* group, int lane) {
  if constexpr (kAddsQuads) return __ldcs(reinterpret_cast<const float4*>(group) + lane);
  return make_float4(__ldcs(group + lane), __ldcs(group + 32 + lane), __ldcs(group + 64 + lane),
                     __ldcs(group + 96 + lane));
}

}  // namespace hbsattn
