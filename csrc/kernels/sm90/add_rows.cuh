#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/ptx.cuh"

namespace hbsattn::sm90 {

// Adds a warp's 16 rows of accumulators, of which the first `rows` exist, to those of float32 sums in global memory.
template <int kRowFloats, class Accumulators>
__device__ __forceinline__ void add_rows(const Accumulators& values, float* sums, int rows, int lane) {
  // A lane has two columns of each group of 8. Two lanes share two groups: each takes four columns of one.
  const bool odd = lane & 1;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = lane / 4 + 8 * half;
    float* destination = sums + row * kRowFloats + (odd ? 8 : 0) + 2 * (lane & 2);
#pragma unroll
    for (int group = 0; group < decltype(cute::size(values))::value / 4; group += 2) {
      const int first = 4 * group + 2 * half, second = first + 4;
      const float x = __shfl_xor_sync(0xffffffffu, odd ? values(first) : values(second), 1);
      const float y = __shfl_xor_sync(0xffffffffu, odd ? values(first + 1) : values(second + 1), 1);
      if (row >= rows) continue;
      add_quad(destination + 8 * group, odd ? x : values(first), odd ? y : values(first + 1), odd ? values(second) : x,
               odd ? values(second + 1) : y);
    }
  }
}

}  // namespace hbsattn::sm90
