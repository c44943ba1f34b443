#pragma once

#include "kernels/common/row_sums.cuh"
#include "kernels/sm80/backward_keys/by_keys_traits.cuh"
#include "kernels/sm80/backward_keys/kernel.cuh"

namespace hbsattn::sm80 {

// Weights go from one warp to another in half precision: so many times as large, they are as precise as products need
// them wherever they are not too small to count, and leave room for a log-sum-exp that is not quite theirs.
inline constexpr int kWeightScaleLog2 = 12;
inline constexpr float kWeightScale = 1 << kWeightScaleLog2;

// Named barriers, behind that of __syncthreads. The third, of two stages by turns, is followed by one for each group.
inline constexpr int kGradsBarrier = 1, kWeightsBarrier = 2, kGroupBarrier = 4;

__device__ __forceinline__ void arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ __forceinline__ void wait_for(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// Half the threads of a CTA start copies of one of a stage's tensors, rows that do not exist being zeros, and of the
// statistics that go with it. Ends a group. `first_row`: of the sequence, of the first head.
template <class Traits>
__device__ __forceinline__ void load_stage(const BackwardKeysArguments& args, const typename Traits::Storage& storage,
                                           int stage, const TensorRows& tensor, const uint8_t* first_row,
                                           const void* matrix, const float* statistics, const float* of_stage,
                                           uint32_t thread) {
  using Rows = typename Traits::Queries;
  constexpr uint32_t kRowThreads = Rows::kChunkVectors, kPassRows = Traits::kThreads / 2 / kRowThreads;
  constexpr int kPasses = Traits::kTileM / kPassRows;
  static_assert(kPasses * kPassRows == Traits::kTileM && kPassRows % 8 == 0);
  const auto& info = storage.infos[stage & (Traits::kInfos - 1)];
  if (info.of_stack >= 0) {
    const HeadStack& stack = args.chunks.stack;
    const uint32_t row = thread / kRowThreads, vector = thread % kRowThreads;
    const uint8_t* first = first_row + info.of_stack * stack.heads * tensor.head_stride + vector * 16;
    const uint32_t destination = shared_address(matrix) + Rows::offset(row, vector);
    // All that is looked up comes before the copies, which it would wait for else.
    int queries[kPasses];
    bool exists[kPasses];
    int64_t heads[kPasses];
    CUTE_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      // A granule is whole passes, or a pass whole granules.
      const uint32_t of_pass = pass * kPassRows;
      const uint32_t granule = of_pass / kGranule + (kPassRows > kGranule ? row / kGranule : 0);
      const int query = info.queries[granule], end = info.ends[granule];
      queries[pass] = query + of_pass % kGranule + (kPassRows > kGranule ? row % kGranule : row);
      exists[pass] = (query >= 0) & (queries[pass] < end);
      heads[pass] = 0;
    }
    if (stack.heads > 1) {
      CUTE_UNROLL
      for (int pass = 0; pass < kPasses; ++pass) {
        const int head = args.chunks.head_of_row(queries[pass]);
        exists[pass] = exists[pass] & (head < stack.heads);
        heads[pass] = exists[pass] ? head * tensor.head_stride : 0;
        queries[pass] >>= stack.rows_log2;
      }
    }
    CUTE_UNROLL
    for (int pass = 0; pass < kPasses; ++pass) {
      // What is not read is an address of the tensor nevertheless. Unsigned: one instruction.
      const uint32_t query = exists[pass] ? queries[pass] : 0;
      const uint8_t* source = first + heads[pass] + uint64_t{query} * static_cast<uint32_t>(tensor.row_stride);
      CUTE_UNROLL
      for (int chunk = 0; chunk < Rows::kChunks; ++chunk) {
        copy_async(destination + pass * kPassRows * Rows::kRowBytes + chunk * Rows::kChunkBytes,
                   source + chunk * Rows::kRowBytes,
                   exists[pass] & (static_cast<int>(vector) * 8 < tensor.columns - chunk * Rows::kChunkVectors * 8));
      }
    }
    // Four rows a thread. Of a granule that is padding there are statistics, too, which make its weights 0.
    const uint32_t first_of_four = 4 * thread;
    if (first_of_four < Traits::kTileM) {
      const int64_t chunk = info.chunks[first_of_four / kGranule];
      copy_async(shared_address(of_stage + first_of_four), statistics + chunk * kGranule + first_of_four % kGranule,
                 true);
    }
  }
  commit_copies();
}

// Where a lane's pair of numbers lies of those that a warp leaves of weights, and of gradients of scores.
template <class Traits>
struct PairPlace {
  using Rows = typename Traits::GradScores;
  uint32_t address;

  __device__ __forceinline__ PairPlace(const void* matrix, int warp_key, int lane)
      : address(shared_address(matrix) + Rows::offset(warp_key + lane / 4, 0) + lane % 4 * 4) {}
  // Of the pair that begins with number `i` of an accumulator of a strip.
  __device__ __forceinline__ uint32_t of(int strip, int i) const {
    return (address ^ (i / 4 * 16)) + (16 * strip + (i >> 1 & 1) * 8) * Rows::kRowBytes;
  }
};

__device__ __forceinline__ void store_word(uint32_t address, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// First operands of products that sum over a stage's queries, which have a step for each granule, as multiply_columns()
// asks for them.
template <int kStrips, int kSteps>
__device__ __forceinline__ auto select_step(const uint32_t (&operands)[kStrips][kSteps][4]) {
  return [&](int step, uint32_t (&words)[kStrips][4]) {
    CUTE_UNROLL
    for (int i = 0; i < 4 * kStrips; ++i) words[i / 4][i % 4] = operands[i / 4][step][i % 4];
  };
}

// The weights of a stage, times kWeightScale, and gradients of values.
template <class Traits, class Sums>
__device__ __forceinline__ void add_values(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                           int stage, int group, int lane, Sums& grad_values) {
  using Element = typename Traits::Element;
  using Queries = typename Traits::Queries;
  constexpr int kStrips = Traits::kStrips;
  const int buffer = stage % Traits::kStages, warp_key = group * Traits::kWarpKeys;
  const auto& info = storage.infos[stage & (Traits::kInfos - 1)];
  uint32_t weights[kStrips][Traits::kGranules][4];
  {
    Accumulator<Traits::kTileM> scores[kStrips];
    const PatchReader<typename Traits::Keys> keys(shared_address(storage.keys) + warp_key * Traits::Keys::kRowBytes,
                                                  lane);
    multiply_rows<Element>(scores, keys, 0,
                           PatchReader<Queries, Operand::kByRows>(shared_address(storage.queries[buffer]), lane));
    if (info.masked) {
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) {
        const int key = warp_key + 16 * i;
        mask_queries(args, scores[i], info, 0, QueryLimits(args, storage.item, key, lane), lane);
      }
    }
    const PairPlace<Traits> place(storage.grad_scores[stage % Traits::kGradBuffers], warp_key, lane);
    const QueryStatistics<Traits::kTileM> lse(storage.lse[buffer], lane);
    CUTE_UNROLL
    for (int i = 0; i < kStrips; ++i) {
      CUTE_UNROLL
      for (int j = 0; j < cute::size(scores[i]); j += 2) {
        const float low = exp2_approx(scores[i](j) * args.scale_log2 + (kWeightScaleLog2 - lse[j]));
        const float high = exp2_approx(scores[i](j + 1) * args.scale_log2 + (kWeightScaleLog2 - lse[j + 1]));
        store_word(place.of(i, j), pack_pair<cutlass::half_t>(low, high));
        weights[i][j / 8][j / 2 % 4] = pack_pair<Element>(low, high);
      }
    }
  }
  arrive(kGroupBarrier + group, 64);
  wait_copies<0>();
  arrive(kWeightsBarrier + (stage + 1) % 2, Traits::kThreads);
  const PatchReader<Queries, Operand::kByColumns> grad_out(shared_address(storage.grad_out[buffer]), lane);
  multiply_columns<Element>(grad_values, select_step(weights), grad_out);
}

// The gradients of a stage's scores, which replace the weights, and those of keys.
template <class Traits, class Sums>
__device__ __forceinline__ void add_keys(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                         int stage, int group, int lane, Sums& grad_keys) {
  using Element = typename Traits::Element;
  using Queries = typename Traits::Queries;
  constexpr int kStrips = Traits::kStrips;
  const int buffer = stage % Traits::kStages, warp_key = group * Traits::kWarpKeys;
  uint32_t of_scores[kStrips][Traits::kGranules][4];
  {
    Accumulator<Traits::kTileM> grads[kStrips];
    const PatchReader<typename Traits::Keys> values(shared_address(storage.values) + warp_key * Traits::Keys::kRowBytes,
                                                    lane);
    multiply_rows<Element>(grads, values, 0,
                           PatchReader<Queries, Operand::kByRows>(shared_address(storage.grad_out[buffer]), lane));
    const PairPlace<Traits> place(storage.grad_scores[stage % Traits::kGradBuffers], warp_key, lane);
    const QueryStatistics<Traits::kTileM> delta(storage.delta[buffer], lane);
    wait_for(kGroupBarrier + group, 64);
    // Weights are read some pairs before theirs are overwritten.
    constexpr int kPairs = Traits::kTileM / 4, kAhead = Traits::kTileM / 16;
    uint32_t ahead[kAhead];
    const auto place_of = [&](int n) { return place.of(n / kPairs, n % kPairs * 2); };
    CUTE_UNROLL
    for (int n = 0; n < kAhead; ++n) ahead[n] = load_word(place_of(n));
    CUTE_UNROLL
    for (int n = 0; n < kStrips * kPairs; ++n) {
      const int i = n / kPairs, j = n % kPairs * 2;
      const uint32_t shared = ahead[n % kAhead];
      if (n + kAhead < kStrips * kPairs) ahead[n % kAhead] = load_word(place_of(n + kAhead));
      const float2 weight = __half22float2(reinterpret_cast<const __half2&>(shared));
      constexpr float kScale = 1.f / kWeightScale;
      const uint32_t product = pack_pair<Element>(weight.x * (grads[i](j) * kScale - delta[j] * kScale),
                                                  weight.y * (grads[i](j + 1) * kScale - delta[j + 1] * kScale));
      // A weight of 0 does not silence a NaN.
      const uint32_t pair = product & __hneu2_mask(reinterpret_cast<const __half2&>(shared), __half2{});
      store_word(place_of(n), pair);
      of_scores[i][j / 8][j / 2 % 4] = pair;
    }
  }
  wait_copies<0>();
  arrive(kGradsBarrier, Traits::kThreads);
  const PatchReader<Queries, Operand::kByColumns> queries(shared_address(storage.queries[buffer]), lane);
  multiply_columns<Element>(grad_keys, select_step(of_scores), queries);
}

// Adds what a warp has of the gradients of a stage's queries to the sums in global memory.
template <class Traits>
__device__ __forceinline__ void add_queries(const BackwardByKeysArguments& args, typename Traits::Storage& storage,
                                            int stage, int warp, int lane) {
  using Element = typename Traits::Element;
  constexpr int kStrips = Traits::kQueryStrips, kPatches = Traits::kQueryColumns / 16;
  const int first_strip = warp % Traits::kQueryGroups * kStrips, first_patch = warp / Traits::kQueryGroups * kPatches;
  const auto& info = storage.infos[stage & (Traits::kInfos - 1)];
  const PatchReader<typename Traits::GradScores, Operand::kFirstByColumns> grads(
      shared_address(storage.grad_scores[stage % Traits::kGradBuffers]), lane);
  const PatchReader<typename Traits::Keys, Operand::kByColumns> keys(shared_address(storage.keys), lane);
  Accumulator<Traits::kQueryColumns> sums[kStrips];
  const auto multiply = [&](auto first, int step) {
    uint32_t of_a[kStrips][4];
    CUTE_UNROLL
    for (int i = 0; i < kStrips; ++i) grads.read(16 * step, first_strip + i, of_a[i]);
    CUTE_UNROLL
    for (int patch = 0; patch < kPatches; ++patch) {
      uint32_t of_b[4];
      keys.read(16 * step, first_patch + patch, of_b);
      CUTE_UNROLL
      for (int i = 0; i < kStrips; ++i) {
        multiply_add<Element, first.value>(sums[i], 2 * patch, of_a[i], of_b[0], of_b[1]);
        multiply_add<Element, first.value>(sums[i], 2 * patch + 1, of_a[i], of_b[2], of_b[3]);
      }
    }
  };
  multiply(std::true_type{}, 0);
  CUTE_UNROLL
  for (int step = 1; step < Traits::kTileN / 16; ++step) multiply(std::false_type{}, step);
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    const int granule = first_strip + i;
    if (info.queries[granule] < 0) continue;
    float* destination =
        args.grad_q + int64_t{info.chunks[granule]} * (kGranule * Traits::kHeadDim) + first_patch * (16 * kGranule);
    CUTE_UNROLL
    for (int column = 0; column < Traits::kQueryColumns; column += 8) {
      const int j = column / 2;
      add_to_group(destination + column * kGranule, sums[i](j), sums[i](j + 1), sums[i](j + 2), sums[i](j + 3), lane);
    }
  }
}

// A CTA computes the gradients of a tile's keys and values, and adds up those of the queries that attend to it. With S
// the scaled scores of its keys and the queries of a stage, and rows of keys (everything is transposed):
//
//   P = exp(S - lse)      dP = V dO^T      dS = P o (dP - delta)
//   dV += P dO            dK += dS Q       dQ += dS^T K
//
// Of two warps with the same 32 keys, one computes S, P and dV, the other dP, dS and dK, so that the first operands of
// dV and dK never leave registers. P goes from one to the other, and dS a stage later to all warps for dQ, through the
// same place in shared memory, of which there are two. The former warps load output gradients, the latter queries. They
// are half a stage ahead: while one kind computes exponentials, or gradients of scores, the other has products.
//
// In a stage, warps of the former kind wait on kGradsBarrier until the latter have the gradients of the scores before:
// queries are there, and nobody needs the oldest scores' gradients, nor output gradients. Those wait on
// kWeightsBarrier, until the former have the weights before: output gradients are there, and nobody needs older
// queries.
template <class Config>
__global__ void __launch_bounds__(32 * Config::kWarps, Config::kCtasPerSm)
    backward_by_keys_kernel(const __grid_constant__ BackwardByKeysArguments args) {
  using Traits = BackwardByKeysTraits<Config>;
  constexpr int kStrips = Traits::kStrips;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32);
  wait_for_earlier_kernels();
  let_next_kernel_start();
  if (warp == Traits::kWarps - 1) write_key_gaps(args, threadIdx.x % 32);
  const QueryStream<Traits> stream(args, storage);
  const KeyItem& item = storage.item;
  if (threadIdx.x == 0) {
    storage.item = read_key_item<Traits::kTileN>(args, static_cast<int>(blockIdx.x));
    if (item.column >= 0) {
      storage.first_rows[0] = args.grad_out.head_of(item.sequence, 0, item.q_begin);
      storage.first_rows[1] = args.q.head_of(item.sequence, 0, item.q_begin);
    }
    stream.open();
  }
  __syncthreads();
  if (item.column < 0) return;
  load_keys<Traits>(args, item, 0, args.v, storage.values);
  if (warp == Traits::kWarps - 1) leave_seen_keys(args, item, storage.seen, threadIdx.x % 32);
  stream.list(Traits::kStages + 1);
  __syncthreads();
  load_seen_keys<Traits>(args, item, 0, storage.seen, storage.keys);

  const int group = warp % Traits::kGroups;
  const bool of_values = warp < Traits::kGroups;
  const auto load = [&](int stage, uint32_t thread) {
    const int buffer = stage % Traits::kStages;
    if (of_values) {
      load_stage<Traits>(args, storage, stage, args.grad_out, storage.first_rows[0], storage.grad_out[buffer], args.lse,
                         storage.lse[buffer], thread);
    } else {
      load_stage<Traits>(args, storage, stage, args.q, storage.first_rows[1], storage.queries[buffer], args.delta,
                         storage.delta[buffer], thread - Traits::kThreads / 2);
    }
  };
  load(0, threadIdx.x);
  wait_copies<0>();
  __syncthreads();

  Accumulator<Traits::kHeadDim> grads[kStrips];  // of values, or of keys
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) cute::clear(grads[i]);
  int stage = 0;
#pragma unroll 1
  for (;; ++stage) {
    // Opaque, or addresses would be computed ahead of all stages, and there are no registers for so many.
    const uint32_t thread = opaque(threadIdx.x);
    const int lane = static_cast<int>(thread % 32);
    if (stage > 0) wait_for(of_values ? kGradsBarrier : kWeightsBarrier + stage % 2, Traits::kThreads);
    if (!stream.exists(stage)) break;
    load(stage + 1, thread);
    if (of_values) {
      add_values<Traits>(args, storage, stage, group, lane, grads);
      if (stage > 0) add_queries<Traits>(args, storage, stage - 1, thread / 32, lane);
      // What the other warps load in the next stage was listed in the one before, as they do not wait for this.
      stream.list(stage + Traits::kStages + 2);
    } else {
      if (stage > 0) add_queries<Traits>(args, storage, stage - 1, thread / 32, lane);
      add_keys<Traits>(args, storage, stage, group, lane, grads);
    }
  }
  const int lane = threadIdx.x % 32;
  if (stage > 0) add_queries<Traits>(args, storage, stage - 1, warp, lane);
  __syncthreads();

  typename Traits::Element* matrix = of_values ? storage.values : storage.keys;
  const float scale = of_values ? 1.f / kWeightScale : args.scale;
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    leave_keys<Traits>(matrix, group * Traits::kWarpKeys + 16 * i, scale, grads[i], lane);
  }
  __syncwarp();
  CUTE_UNROLL
  for (int i = 0; i < kStrips; ++i) {
    const int key = group * Traits::kWarpKeys + 16 * i;
    if (of_values) {
      store_keys<Traits>(args, item, matrix, key, key, args.grad_v, args.grad_v_batch_stride, args.grad_v_row_stride,
                         args.grad_v_head_stride, args.grad_v_columns, lane);
    } else {
      store_keys<Traits>(args, item, matrix, key, key, args.grad_k, args.grad_k_batch_stride, args.grad_k_row_stride,
                         args.grad_k_head_stride, args.grad_k_columns, lane);
    }
  }
}

}  // namespace hbsattn::sm80
