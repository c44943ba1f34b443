#pragma once

#include "kernels/common/launch.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/sm80/backward_keys/add_queries.cuh"
#include "kernels/sm80/backward_keys/store.cuh"
#include "kernels/sm80/backward_keys/stream.cuh"
#include "kernels/sm80/pairs.cuh"

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

// Hides what a key of a strip is not seen by, of some granules of a stage that is masked, from `first_granule` on.
// `key`: the first of the strip, in the tile.
template <bool kPartial, class Info, class Scores>
__device__ __forceinline__ void mask_scores(const BackwardKeysArguments& args, const KeyItem& item, const Info& info,
                                            int first_granule, const QueryLimits& limits, int key, int lane,
                                            Scores& scores) {
  mask_queries(args, scores, info, first_granule, limits, lane);
  if constexpr (kPartial) {
    if (args.partial.words != nullptr) mask_partial(args, PartialKeys(item, key), scores, info, first_granule, lane);
  }
}

// From the products of some granules of a stage, from `first_granule` on, to weights. Those that are dropped are
// negative.
template <bool kAltered, class Info, class Statistics, class Scores>
__device__ __forceinline__ void weigh(const BackwardKeysArguments& args, const KeyItem& item, const Info& info,
                                      int first_granule, const QueryLimits& limits, int key, KeyDropout& dropout,
                                      const Statistics& lse, int lane, Scores& scores) {
  if constexpr (kAltered) {
    if (args.cap.scale > 0.f) cap_scores(scores, args.cap);
  }
  if (info.masked) mask_scores<kAltered>(args, item, info, first_granule, limits, key, lane, scores);
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

template <bool kPositive>
__device__ __forceinline__ uint32_t round_word(float value) {
  return __float_as_uint(kPositive && value < 0.f ? 0.f : value);
}

// As to_operand().
template <class Element, bool kPositive, class Sum>
__device__ __forceinline__ void round_operand(const Sum& sum, int step, uint32_t (&words)[4]) {
  CUTE_UNROLL
  for (int i = 0; i < 4; ++i) {
    if constexpr (std::is_same_v<Element, float>) {
      words[i] = round_word<kPositive>(sum(4 * step + i % 2 * 2 + i / 2));
    } else {
      words[i] = round_pair<Element, kPositive>(sum(8 * step + 2 * i), sum(8 * step + 2 * i + 1));
    }
  }
}

// A CTA computes the gradients of a tile's keys and values. With S the scaled scores of its keys and the queries of a
// stage, and rows of keys (everything is transposed):
//
//   P = exp(S - lse)      dP = V dO^T      dS = P o (dP - delta)      dV += P dO      dK += dS Q
//
// Each warp has strips of 16 keys; P and dS are first operands out of registers. One warp sums what a key gets, stage
// after stage: the same in every run. No product sums over keys, so whatever keys hold that nobody sees, others do not
// meet it. kAltered: for altered calls (is_altered).
//
// kAdds, of float32: it also adds up gradients of queries, dQ += dS^T K, in global memory.
template <class Config, bool kAltered, bool kAdds = false>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm) backward_keys_kernel(
    const __grid_constant__ std::conditional_t<kAdds, BackwardByKeysArguments, BackwardKeysArguments> args) {
  using Traits = typename std::conditional_t<kAdds, AddingBackwardKeysTraits<Config>, BackwardKeysTraits<Config>>;
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
  if (warp == Traits::kWarps - 1) write_key_gaps(args, lane, sizeof(Element));
  const QueryStream<Traits> stream(args, storage);
  const KeyItem& item = storage.item;
  if (threadIdx.x == 0) {
    storage.item = read_key_item<Traits::kTileRows>(args, static_cast<int>(blockIdx.x) / Traits::kCtasOfTile);
    stream.open();
  }
  __syncthreads();
  const int first_key = static_cast<int>(blockIdx.x) % Traits::kCtasOfTile * Traits::kTileN;  // of the tile
  if (item.column < 0 || first_key >= item.keys) return;
  load_keys<Traits>(args, item, first_key, args.v, storage.values);
  if constexpr (kAdds) {
    if (warp == Traits::kWarps - 1) leave_seen_keys(args, item, storage.seen, lane);
    __syncthreads();
    load_seen_keys<Traits>(args, item, first_key, storage.seen, storage.keys);
  } else {
    load_keys<Traits>(args, item, first_key, args.k, storage.keys);
  }
  stream.begin();

  constexpr int kGroups = Traits::kWarps / Traits::kShare;
  const int half = warp / kGroups, warp_key = warp % kGroups * Traits::kWarpKeys;
  QueryLimits limits[kStrips];
  KeyDropout dropouts[kStrips];
  Accumulator<Traits::kColumns> grad_keys[kStrips], grad_values[kStrips];
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    limits[i] = QueryLimits(args, item, first_key + warp_key + 16 * i, lane);
    if constexpr (kAltered) dropouts[i] = KeyDropout(item, first_key + warp_key + 16 * i);
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
      multiply_rows<Element, true>(weights, keys, 0, PatchReader<Queries, Operand::kByRows>(queries, lane),
                                   args.allow_tf32);
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) {
        weigh<kAltered>(args, item, info, 0, limits[i], first_key + warp_key + 16 * i, dropouts[i], lse, lane,
                        weights[i]);
      }
      multiply_rows<Element, true>(grads, values, 0, PatchReader<Queries, Operand::kByRows>(grad_out, lane),
                                   args.allow_tf32);
      const Statistics delta(storage.delta[buffer], lane);
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) differentiate<kAltered>(args, info.masked, weights[i], lse, delta, grads[i]);
      if constexpr (kAdds) leave_grad_scores<Traits>(storage.grad_scores, warp_key, grads[0], lane);
    }
    using Columns = std::conditional_t<Traits::kShare == 1, Queries, HalfColumns<Queries>>;
    PatchReader<Columns, Operand::kByColumns> rows(queries, lane), grad_rows(grad_out, lane);
    if constexpr (Traits::kShare > 1) {
      rows.address ^= half * Columns::kHalfBytes;
      grad_rows.address ^= half * Columns::kHalfBytes;
    }
    const auto read_weights = [&](int step, uint32_t (&words)[kStrips][4]) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) round_operand<Element, kAltered>(weights[i], step, words[i]);
    };
    const auto read_grads = [&](int step, uint32_t (&words)[kStrips][4]) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) round_operand<Element, false>(grads[i], step, words[i]);
    };
    multiply_columns<Element>(grad_values, read_weights, grad_rows, args.allow_tf32);
    multiply_columns<Element>(grad_keys, read_grads, rows, args.allow_tf32);
    if constexpr (kAdds) {
      __syncthreads();
      add_split_queries<Traits>(args, storage, info, warp, lane);
    }
  }

  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    const int key = warp_key + 16 * i;
    leave_keys<Traits, Traits::kShare>(storage.keys, key, args.scale, grad_keys[i], lane, half);
    leave_keys<Traits, Traits::kShare>(storage.values, key, kAltered ? args.dropout.scale : 1.f, grad_values[i], lane,
                                       half);
  }
  if constexpr (Traits::kShare == 1) {
    __syncwarp();
  } else {
    __syncthreads();
  }
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    const int key = warp_key + 16 * i;
    // Of two warps with the same keys, each stores one of the gradients.
    if (Traits::kShare == 1 || half == 0) {
      store_keys<Traits>(args, item, storage.keys, key, first_key + key, args.grad_k, args.grad_k_batch_stride,
                         args.grad_k_row_stride, args.grad_k_head_stride, args.grad_k_columns, lane);
    }
    if (Traits::kShare == 1 || half == 1) {
      store_keys<Traits>(args, item, storage.values, key, first_key + key, args.grad_v, args.grad_v_batch_stride,
                         args.grad_v_row_stride, args.grad_v_head_stride, args.grad_v_columns, lane);
    }
  }
}

}  // namespace hbsattn::sm80
