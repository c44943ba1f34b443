#pragma once

#include "kernels/common/launch.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/sm80/backward_keys/store.cuh"
#include "kernels/sm80/backward_keys/stream.cuh"

namespace hbsattn::sm80 {

// What the statistics of queries are for a thread's columns of scores.
template <int kQueries>
struct QueryStatistics {
  float2 of_columns[kQueries / 8];

  __device__ __forceinline__ QueryStatistics(const float* of_queries, int lane) {
    CUTE_UNROLL
    for (int group = 0; group < kQueries / 8; ++group) {
      of_columns[group] = *reinterpret_cast<const float2*>(of_queries + 8 * group + 2 * (lane & 3));
    }
  }
  __device__ __forceinline__ float operator[](int i) const { return i & 1 ? of_columns[i / 4].y : of_columns[i / 4].x; }
};

// From the products of some granules of a stage, from `first_granule` on, to weights. Those that are dropped are
// negative.
template <bool kAltered, class Info, class Statistics, class Scores>
__device__ __forceinline__ void weigh(const BackwardKeysArguments& args, const Info& info, int first_granule,
                                      const QueryLimits& limits, KeyDropout& dropout, const Statistics& lse, int lane,
                                      Scores& scores) {
  if constexpr (kAltered) {
    if (args.cap.scale > 0.f) cap_scores(scores, args.cap);
  }
  if (info.masked) mask_queries(args, scores, info, first_granule, limits, lane);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) scores(i) = exp2_approx(scores(i) * args.scale_log2 - lse[i]);
  if constexpr (kAltered) {
    if (args.dropout.seed != nullptr) dropout.drop(args, scores, info, first_granule, lane);
  }
}

// Turns the gradients of the weights into those of the scores. A weight that was dropped is negative, and its own
// gradient is 0.
template <bool kAltered, class Statistics, class Weights, class Scores>
__device__ __forceinline__ void differentiate(const BackwardKeysArguments& args, bool masked, const Weights& weights,
                                              const Statistics& lse, const Statistics& delta, Scores& grads) {
  CUTE_UNROLL
  for (int i = 0; i < cute::size(grads); ++i) {
    const bool dropped = kAltered && signbit(weights(i));
    grads(i) = weights(i) * (dropped ? delta[i] : grads(i) - delta[i]);
  }
  if constexpr (kAltered) {
    if (args.cap.scale > 0.f) {
      CUTE_UNROLL
      for (int i = 0; i < cute::size(grads); ++i) {
        grads(i) *= slope_of_cap(weights(i), lse[i], args.inverse_scale_log2);
      }
    }
  }
  if (!masked) return;
  // A weight of 0 does not silence a NaN.
  CUTE_UNROLL
  for (int i = 0; i < cute::size(grads); ++i) grads(i) = weights(i) == 0.f ? 0.f : grads(i);
}

// Weights, or gradients of scores, rounded. kPositive: with 0 for those that are negative.
template <class Element, bool kPositive>
__device__ __forceinline__ uint32_t round_pair(float low, float high) {
  return kPositive ? pack_positive<Element>(low, high) : pack_pair<Element>(low, high);
}

// As to_operand().
template <class Element, bool kPositive, class Sum>
__device__ __forceinline__ void round_operand(const Sum& sum, int step, uint32_t (&words)[4]) {
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    words[i] = round_pair<Element, kPositive>(sum(8 * step + 2 * i), sum(8 * step + 2 * i + 1));
  }
}

// A CTA computes the gradients of a tile's keys and values. With S the scaled scores of its keys and the queries of a
// stage, and rows of keys (everything is transposed):
//
//   P = exp(S - lse)      dP = V dO^T      dS = P o (dP - delta)      dV += P dO      dK += dS Q
//
// Each warp has strips of 16 keys; P and dS are first operands out of registers. One warp sums what a key gets, stage
// after stage: the same in every run. No product sums over keys, so whatever keys hold that nobody sees, others do not
// meet it. kAltered: for calls that drop weights or cap scores.
template <class Config, bool kAltered>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm)
    backward_keys_kernel(const __grid_constant__ BackwardKeysArguments args) {
  using Traits = BackwardKeysTraits<Config>;
  using Element = typename Traits::Element;
  using Keys = typename Traits::Keys;
  using Queries = typename Traits::Queries;
  using Scores = Accumulator<Traits::kTileM>;
  using Statistics = QueryStatistics<Traits::kTileM>;
  constexpr int kStrips = Traits::kStrips;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (warp == Traits::kWarps - 1) write_key_gaps(args, lane);
  const QueryStream<Traits> stream(args, storage);
  const KeyItem& item = storage.item;
  if (threadIdx.x == 0) {
    storage.item = read_key_item<Traits::kTileN>(args, static_cast<int>(blockIdx.x));
    stream.open();
  }
  __syncthreads();
  if (item.column < 0) return;
  load_keys<Traits>(args, item, args.k, storage.keys);
  load_keys<Traits>(args, item, args.v, storage.values);
  stream.begin();

  const int warp_key = warp * Traits::kWarpKeys;
  QueryLimits limits[kStrips];
  KeyDropout dropouts[kStrips];
  Accumulator<Traits::kHeadDim> grad_keys[kStrips], grad_values[kStrips];
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    limits[i] = QueryLimits(args, item, warp_key + 16 * i, lane);
    if constexpr (kAltered) dropouts[i] = KeyDropout(item, warp_key + 16 * i);
    cute::clear(grad_keys[i]);
    cute::clear(grad_values[i]);
  }
  const PatchReader<Keys> keys(shared_address(storage.keys) + warp_key * Keys::kRowBytes, lane);
  const PatchReader<Keys> values(shared_address(storage.values) + warp_key * Keys::kRowBytes, lane);

#pragma unroll 1
  for (int stage = 0; stream.next(stage); ++stage) {
    const int buffer = stage % Traits::kStages;
    const auto& info = stream.info_of(stage);
    const uint32_t queries = shared_address(storage.queries[buffer]),
                   grad_out = shared_address(storage.grad_out[buffer]);
    Scores weights[kStrips], grads[kStrips];
    {
      const Statistics lse(storage.lse[buffer], lane);
      multiply_rows<Element>(weights, keys, 0, PatchReader<Queries, true>(queries, lane));
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) {
        weigh<kAltered>(args, info, 0, limits[i], dropouts[i], lse, lane, weights[i]);
      }
      multiply_rows<Element>(grads, values, 0, PatchReader<Queries, true>(grad_out, lane));
      const Statistics delta(storage.delta[buffer], lane);
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) differentiate<kAltered>(args, info.masked, weights[i], lse, delta, grads[i]);
    }
    uint32_t of_weights[kStrips][4], of_grads[kStrips][4];
    const PatchReader<Queries> rows(queries, lane), grad_rows(grad_out, lane);
    CUTE_UNROLL
    for (int granule = 0; granule < Traits::kGranules; ++granule) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) {
        round_operand<Element, kAltered>(weights[i], granule, of_weights[i]);
        round_operand<Element, false>(grads[i], granule, of_grads[i]);
      }
      multiply_step<Element>(grad_values, of_weights, grad_rows, granule);
      multiply_step<Element>(grad_keys, of_grads, rows, granule);
    }
  }

  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    leave_keys<Traits>(storage.keys, warp_key + 16 * i, args.scale, grad_keys[i], lane);
    leave_keys<Traits>(storage.values, warp_key + 16 * i, kAltered ? args.dropout.scale : 1.f, grad_values[i], lane);
  }
  __syncwarp();
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    const int key = warp_key + 16 * i;
    store_keys<Traits>(args, item, storage.keys, key, args.grad_k, args.grad_k_batch_stride, args.grad_k_row_stride,
                       args.grad_k_head_stride, args.grad_k_columns, lane);
    store_keys<Traits>(args, item, storage.values, key, args.grad_v, args.grad_v_batch_stride, args.grad_v_row_stride,
                       args.grad_v_head_stride, args.grad_v_columns, lane);
  }
}

}  // namespace hbsattn::sm80
