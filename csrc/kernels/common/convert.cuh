#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/numeric_types.h>

#include <cstdint>
#include <type_traits>

// From accumulators to rows of 16-bit numbers.

namespace hbsattn {

template <class Element>
__device__ __forceinline__ uint32_t pack_pair(float low, float high) {
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

// The same with 0 for what is negative.
template <class Element>
__device__ __forceinline__ uint32_t pack_positive(float low, float high) {
  uint32_t pair;
  if constexpr (std::is_same_v<Element, cutlass::bfloat16_t>) {
    asm("cvt.rn.relu.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  } else {
    asm("cvt.rn.relu.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  }
  return pair;
}

// Transposes a matrix of 4 x 4 numbers that the four lanes of a quad hold a row each of. In accumulators, a lane has
// two columns of every group of 8; afterwards it has all 8 of one of four groups.
__device__ __forceinline__ void transpose_quad(uint32_t (&row)[4], int lane) {
  const bool odd = lane & 1, upper = lane & 2;
#pragma unroll
  for (int i = 0; i < 4; i += 2) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, odd ? row[i] : row[i + 1], 1);
    row[i] = odd ? got : row[i];
    row[i + 1] = odd ? row[i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, upper ? row[i] : row[i + 2], 2);
    row[i] = upper ? got : row[i];
    row[i + 2] = upper ? row[i + 2] : got;
  }
}

}  // namespace hbsattn
