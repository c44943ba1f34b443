#pragma once

#include <cmath>

namespace hbsattn {

// The sink of a query head. What a product with log2(e) could not hold is as good as none: -inf.
__device__ __forceinline__ float read_sink(const float* sinks, int head) {
  const float sink = __ldg(sinks + head);
  return sink < -1e38f ? -INFINITY : sink;
}

}  // namespace hbsattn
