#include <algorithm>

#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "plan/layout.h"

namespace hbsattn::kernels {
namespace {

constexpr int kWarps = 32;

// Sums of query blocks and key blocks.
struct Blocks {
  long long q = 0;
  long long k = 0;

  __device__ Blocks operator+(Blocks other) const { return {q + other.q, k + other.k}; }
};

__device__ Blocks shuffle_up(Blocks value, int delta) {
  return {__shfl_up_sync(~0u, value.q, delta), __shfl_up_sync(~0u, value.k, delta)};
}

// The sum over the lanes up to and including this one.
__device__ Blocks sum_of_warp(Blocks value, int lane) {
  for (int delta = 1; delta < 32; delta *= 2) {
    const Blocks below = shuffle_up(value, delta);
    if (lane >= delta) value = value + below;
  }
  return value;
}

// One CTA takes as many sequences at a time as it has threads and carries the sums from one round to the next.
__global__ void __launch_bounds__(32 * kWarps) make_sequences_kernel(const SequencesParams params) {
  __shared__ long long warp_q[kWarps], warp_k[kWarps];
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int warps = blockDim.x / 32;
  Blocks carry;
  for (int64_t first = 0; first < params.shape.batch; first += blockDim.x) {
    const int64_t b = first + threadIdx.x;
    const bool live = b < params.shape.batch;
    Sequence sequence{};
    Blocks own;
    if (live) {
      sequence = mask::read_lengths(params, b);
      own = {mask::count_q_blocks(sequence, params.shape), mask::count_k_blocks(sequence, params.shape)};
    }
    const Blocks up_to_lane = sum_of_warp(own, lane);
    if (lane == 31) {
      warp_q[warp] = up_to_lane.q;
      warp_k[warp] = up_to_lane.k;
    }
    __syncthreads();
    Blocks before = carry;
    for (int w = 0; w < warps; ++w) {
      const Blocks sum{warp_q[w], warp_k[w]};
      if (w < warp) before = before + sum;
      carry = carry + sum;
    }
    __syncthreads();
    if (live) {
      mask::place_blocks(params, b, before.q + up_to_lane.q - own.q, before.k + up_to_lane.k - own.k, sequence);
      params.sequences[b] = sequence;
    }
  }
}

}  // namespace

Status make_sequences(const SequencesParams& params, Stream stream) {
  if (params.shape.batch == 0) return Status::Ok();
  const int threads = std::min((params.shape.batch + 31) / 32, kWarps) * 32;
  return launch("the launch of make_sequences", make_sequences_kernel, 1, threads, 0, stream, params);
}

}  // namespace hbsattn::kernels
