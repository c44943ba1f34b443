#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/tensor.hpp>

#include "kernels/common/key_dropout.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/common/query_limits.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/sm90/altered.cuh"
#include "kernels/sm90/backward_keys/traits.cuh"
#include "kernels/sm90/operand.cuh"
#include "kernels/sm90/turn.cuh"

// What one consumer warpgroup does with the stages of a tile. With S the scaled scores of its 64 keys and the 64
// queries of a stage, and rows of keys (everything is transposed):
//
//   P = exp(S - lse)      dP = V dO^T      dS = P o (dP - delta)
//   dV += P dO            dK += dS Q       dQ += dS^T K
//
// (FlashAttention-2, algorithm 2). P and dS are operands out of registers for dV and dK, and dS goes through shared
// memory for dQ, which is added to float32 in global memory. The tensor cores have work queued at every wait: dV and dK
// while gradients of scores are exchanged, the next stage's scores while dQ leaves.

namespace hbsattn::sm90 {

template <class Traits>
struct BackwardKeysMainloop {
  using Element = typename Traits::Element;
  using Storage = typename Traits::Storage;
  using MmaScores = typename Traits::MmaScores;
  using MmaKeys = typename Traits::MmaKeys;
  using MmaQueries = typename Traits::MmaQueries;

  using Scores =
      decltype(cute::partition_fragment_C(MmaScores{}, cute::Shape<cute::Int<kUnitKeys>, cute::Int<Traits::kTileM>>{}));
  using GradKeys =
      decltype(cute::partition_fragment_C(MmaKeys{}, cute::Shape<cute::Int<kUnitKeys>, cute::Int<Traits::kHeadDim>>{}));
  using GradQueries = decltype(cute::partition_fragment_C(
      MmaQueries{}, cute::Shape<cute::Int<Traits::kTileM>, cute::Int<Traits::kGradColumns>>{}));
  // The scores' registers, in order, are those of a first operand.
  using Operand = decltype(cute::make_tensor<Element>(
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<Traits::kTileM / 16>>{}));

  const BackwardKeysArguments& args;
  Storage& storage;
  int unit;  // which consumer warpgroup
  const int warp, lane;
  const Turn<Traits::kUnits> turn;
  uint32_t position = 0;  // stages before this one, over all tiles: where all rings are, in one register
  uint32_t tiles = 0;     // with stages, before this one
  GradKeys grad_keys, grad_values;
  KeyDropout dropout;  // of the tile, if the kernel is for altered calls, as is the next
  PartialKeys partial_keys;

  __device__ __forceinline__ BackwardKeysMainloop(const BackwardKeysArguments& args, Storage& storage, int unit,
                                                  int warp, int lane)
      : args(args), storage(storage), unit(unit), warp(warp), lane(lane), turn(unit) {}

  __device__ __forceinline__ int stage() const { return position % Traits::kStages; }
  __device__ __forceinline__ auto info() const { return InfoReader(storage.infos[stage()], lane); }
  // The buffer, and the phase, of the gradients of scores of the stage at some position.
  static __device__ __forceinline__ int buffer(uint32_t position) { return position % Traits::kGradBuffers; }
  static __device__ __forceinline__ uint32_t parity(uint32_t position) { return position / Traits::kGradBuffers & 1; }
  __device__ __forceinline__ void wait_stage() const {
    mbarrier_wait(&storage.full[stage()], position / Traits::kStages & 1);
  }

  // One operand out of keys or values, the other out of queries or output gradients of the current stage; asynchronous.
  __device__ __forceinline__ void issue_scores(Scores& scores, const Element* keys, const Element* rows) const {
    using namespace cute;
    MmaScores mma;
    auto thread_mma = mma.get_thread_slice(_0{});
    // A single warpgroup's number is 0, which the compiler does not know: descriptors of keys are made anew here, too.
    Tensor sA = make_tensor(make_smem_ptr(keys + (Traits::kUnits == 1 ? unit : 0)),
                            typename Traits::template SmemLayout<Traits::kTileN, 1>{});
    Tensor sB =
        make_tensor(make_smem_ptr(rows), typename Traits::template SmemLayout<Traits::kTileM, Traits::kStages>{});
    Tensor rA = thread_mma.partition_fragment_A(sA);
    Tensor rB = thread_mma.partition_fragment_B(sB);
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int step = 0; step < size<2>(rA); ++step) {
      cute::gemm(mma, rA(_, unit, step, _0{}), rB(_, _0{}, step, stage()), scores(_, _0{}, _0{}));
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(scores);
  }

  // grad += operand x rows of the current stage; asynchronous.
  __device__ __forceinline__ void issue_keys(GradKeys& grad, Operand& operand, const Element* rows) const {
    using namespace cute;
    MmaKeys mma;
    auto thread_mma = mma.get_thread_slice(_0{});
    Tensor sB = make_tensor(make_smem_ptr(rows),
                            typename Traits::template SmemLayoutTransposed<Traits::kTileM, Traits::kStages>{});
    Tensor rB = thread_mma.partition_fragment_B(sB);
    warpgroup_fence_operand(grad);
    fence_operand(operand);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::One;
    CUTE_UNROLL
    for (int step = 0; step < Traits::kTileM / 16; ++step) {
      cute::gemm(mma, operand(_, _, step), rB(_, _, step, stage()), grad);
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(grad);
    fence_operand(operand);
  }

  // grad = some columns of the gradient of the queries of the stage at `position`, or of the part of it that comes from
  // this warpgroup's keys; asynchronous.
  __device__ __forceinline__ void issue_queries(GradQueries& grad, uint32_t position, int part) const {
    using namespace cute;
    MmaQueries mma;
    auto thread_mma = mma.get_thread_slice(_0{});
    Tensor sA =
        make_tensor(make_smem_ptr(&storage.grad_scores[0][0]), typename Traits::SmemLayoutGradScoresTransposed{});
    Tensor sB = make_tensor(make_smem_ptr(&storage.keys[0]),
                            typename Traits::template SmemLayoutTransposed<Traits::kTileN, 1>{});
    Tensor rA = thread_mma.partition_fragment_A(sA);
    Tensor rB = thread_mma.partition_fragment_B(sB);
    constexpr int kSteps = Traits::kGradKeys / 16;
    const int first_step = Traits::kJoint ? 0 : unit * kSteps;
    warpgroup_fence_operand(grad);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      cute::gemm(mma, rA(_, _0{}, first_step + step, buffer(position)), rB(_, part, first_step + step, _0{}),
                 grad(_, _0{}, _0{}));
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(grad);
  }

  // What the statistics of a stage's queries are for a thread's columns. Read before they are waited for.
  struct Statistics {
    float2 of_columns[Traits::kTileM / 8];

    __device__ __forceinline__ Statistics(const float* of_queries, int lane) {
      CUTE_UNROLL
      for (int group = 0; group < Traits::kTileM / 8; ++group) {
        of_columns[group] = *reinterpret_cast<const float2*>(of_queries + 8 * group + 2 * (lane & 3));
      }
    }
    __device__ __forceinline__ float operator[](int i) const {
      return i & 1 ? of_columns[i / 4].y : of_columns[i / 4].x;
    }
  };

  // From the products of the current stage to its weights. Those that are dropped are negative.
  __device__ __forceinline__ void weigh(Scores& scores, const Statistics& lse, const QueryLimits& limits, bool masked) {
    if (caps_scores<Traits>(args)) cap_scores(scores, args.cap);
    if (masked) mask_queries(args, scores, info(), 0, limits, lane);
    if constexpr (Traits::kPartial) {
      if (masked) mask_partial(args, partial_keys, scores, info(), 0, lane);
    }
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) scores(i) = exp2_approx(scores(i) * args.scale_log2 - lse[i]);
    if (drops_weights<Traits>(args)) dropout.drop(args, scores, info(), 0, lane);
  }

  // Turns the gradients of the weights into those of the scores. A weight that was dropped is negative, and its own
  // gradient is 0.
  __device__ __forceinline__ void differentiate(const Scores& weights, Scores& grads, const Statistics& delta,
                                                bool masked) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) {
      const bool dropped = Traits::kAltered && signbit(weights(i));
      grads(i) = weights(i) * (dropped ? delta[i] : grads(i) - delta[i]);
    }
    if (caps_scores<Traits>(args)) {
      const Statistics lse(storage.lse[stage()], lane);
      CUTE_UNROLL
      for (int i = 0; i < cute::size(grads); ++i) {
        grads(i) *= slope_of_cap(weights(i), lse[i], args.inverse_scale_log2);
      }
    }
    if (!masked) return;
    // A weight of 0 does not silence a NaN.
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) grads(i) = weights(i) == 0.f ? 0.f : grads(i);
  }

  static constexpr bool kLate = Traits::kLate;
  __device__ __forceinline__ int group() const { return Traits::kJoint ? 0 : unit; }

  __device__ __forceinline__ void wait_shared(uint32_t position) const {
    mbarrier_wait(&storage.grad_scores_full[group()][buffer(position)], parity(position));
  }

  // Leaves this warpgroup's gradients of scores where the product for the queries reads them.
  __device__ __forceinline__ void share(const Operand& grads) const {
    using namespace cute;
    if constexpr (kLate) {
      mbarrier_wait(&storage.grad_scores_empty[group()][buffer(position)], parity(position) ^ 1);
    } else {
      cutlass::arch::NamedBarrier::sync(128, 0);
    }
    auto tiled_copy = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, MmaScores{});
    auto thread_copy = tiled_copy.get_thread_slice(warp * 32 + lane);
    Tensor source = make_tensor(grads.data(), Scores{}.layout());
    Tensor sS = make_tensor(make_smem_ptr(&storage.grad_scores[0][0]), typename Traits::SmemLayoutGradScores{});
    Tensor mine =
        local_tile(sS, Shape<Int<kUnitKeys>, Int<Traits::kTileM>>{}, make_coord(unit, _0{}, buffer(position)));
    copy(tiled_copy, thread_copy.retile_S(source), thread_copy.partition_D(mine));
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&storage.grad_scores_full[group()][buffer(position)]);
  }

  // Lets the gradients of scores of the stage at `position` be overwritten.
  __device__ __forceinline__ void release_shared(uint32_t position) const {
    if (lane == 0) mbarrier_arrive(&storage.grad_scores_empty[group()][buffer(position)]);
  }

  // Where a part of the gradient of a stage's queries leaves from. A warp has the rows of one granule.
  __device__ __forceinline__ float* leaving_queries(int part, int of_stage) const {
    if constexpr (!Traits::kGradLeavesFromStage) return storage.grad_queries[unit * 4 + warp];
    Element* rows = part == 0 ? storage.queries[of_stage] : storage.grad_out[of_stage];
    return reinterpret_cast<float*>(rows) + warp * (kGranule * Traits::kGradColumns);
  }

  __device__ __forceinline__ void put_queries(const GradQueries& grad, int part, int of_stage) const {
    if constexpr (!Traits::kGradLeavesFromStage) bulk_wait_read(lane);
    float4* buffer = reinterpret_cast<float4*>(leaving_queries(part, of_stage)) + lane;
    CUTE_UNROLL
    for (int group = 0; group < Traits::kGradColumns / 8; ++group) {
      buffer[group * 32] = make_float4(grad(4 * group), grad(4 * group + 1), grad(4 * group + 2), grad(4 * group + 3));
    }
  }

  // Has the copy engine add what was put to the gradient in global memory.
  __device__ __forceinline__ void send_queries(int chunk, int part, int of_stage) const {
    constexpr int kFloats = kGranule * Traits::kGradColumns;
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (chunk >= 0) {
      float* destination = args.grad_q + static_cast<int64_t>(chunk) * (kGranule * Traits::kHeadDim) + part * kFloats;
      bulk_add(destination, leaving_queries(part, of_stage), kFloats * sizeof(float));
    }
  }

  __device__ __forceinline__ void release_stage(int index) const { mbarrier_arrive_warp(&storage.empty[index], lane); }

  // The first stage's weights and gradients of scores. Whether it is masked.
  __device__ __forceinline__ bool start(Scores& scores, Scores& grad_weights, const QueryLimits& limits) {
    mbarrier_wait(&storage.values_full, tiles & 1);
    wait_stage();
    issue_scores(grad_weights, storage.values, storage.grad_out[0]);
    mbarrier_wait(&storage.keys_full, tiles & 1);
    issue_scores(scores, storage.keys, storage.queries[0]);
    const bool masked = read_info(storage.infos[stage()].masked, lane);
    const Statistics lse(storage.lse[stage()], lane);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(scores);
    cute::warpgroup_fence_operand(grad_weights);
    weigh(scores, lse, limits, masked);
    differentiate(scores, grad_weights, Statistics(storage.delta[stage()], lane), masked);
    return masked;
  }

  // The products of the current stage and, with kNext, the scores of the one behind it, which become `scores` and
  // `grad_weights`. `late_chunk` is the stage before's, whose dQ comes with this one. `skips`: skip_last() follows.
  template <bool kNext>
  __device__ __forceinline__ void step(Scores& scores, Scores& grad_weights, bool& masked, int& late_chunk,
                                       const QueryLimits& limits, bool first, bool skips = false) {
    const int this_stage = stage(), part = Traits::kJoint ? unit : 0;
    const int chunk = lane == 0 ? storage.infos[this_stage].chunks[warp] : -1;
    Operand weights, grads;
    // Declared here, or their last values would count as inputs of the products that overwrite them.
    [[maybe_unused]] Scores next_scores, next_grad_weights;
    GradQueries grad_queries, more_grad_queries;
    convert_scores(grad_weights, grads);
    convert_scores<Traits::kAltered>(scores, weights);
    share(grads);
    turn.take();
    issue_keys(grad_values, weights, storage.grad_out[0]);
    issue_keys(grad_keys, grads, storage.queries[0]);
    // Before the first stage there is none, and its product is of whatever lies there: ptxas wants the same products
    // in flight on every path.
    const uint32_t of_queries = kLate ? position - 1 : position;
    if (!kLate || !first) wait_shared(of_queries);
    issue_queries(grad_queries, of_queries, part);
    if constexpr (!kNext) turn.pass();

    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(grad_values);
    cute::warpgroup_fence_operand(grad_keys);
    fence_operand(weights);
    fence_operand(grads);
    if constexpr (Traits::kGradLeavesFromStage) {
      cutlass::arch::NamedBarrier::sync(128, 1);  // nobody reads the stage any more
      issue_queries(more_grad_queries, of_queries, 1);
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(grad_queries);
      put_queries(grad_queries, 0, this_stage);
      send_queries(chunk, 0, this_stage);
    } else {
      release_stage(this_stage);
    }
    if constexpr (kLate && !kNext) {
      // The last stage's own, too.
      wait_shared(position);
      issue_queries(more_grad_queries, position, part);
    }
    ++position;
    if constexpr (kNext) {
      wait_stage();
      issue_scores(next_scores, storage.keys, storage.queries[0]);
      masked = read_info(storage.infos[stage()].masked, lane);
    }
    cute::warpgroup_wait<kNext || kLate ? 1 : 0>();
    const int last_part = Traits::kGradParts == 2 ? 1 : part;
    GradQueries& last_grad_queries = Traits::kGradParts == 2 ? more_grad_queries : grad_queries;
    cute::warpgroup_fence_operand(last_grad_queries);
    put_queries(last_grad_queries, last_part, this_stage);
    if constexpr (kLate) {
      if (!first) release_shared(of_queries);
    } else if constexpr (!kNext) {
      if (lane == 0) mbarrier_arrive(&storage.keys_empty);
    }
    const int leaving_chunk = kLate ? late_chunk : chunk;
    late_chunk = chunk;
    if constexpr (!kNext) {
      send_queries(leaving_chunk, last_part, this_stage);
      if constexpr (kLate) {
        cute::warpgroup_wait<0>();
        cute::warpgroup_fence_operand(more_grad_queries);
        release_shared(position - 1);
        if (lane == 0 && !skips) mbarrier_arrive(&storage.keys_empty);
        put_queries(more_grad_queries, part, 0);
        send_queries(chunk, part, 0);
      }
      if constexpr (Traits::kGradLeavesFromStage) {
        bulk_wait_read(lane);
        release_stage(this_stage);
      }
    } else {
      if constexpr (Traits::kSendsFirst) send_queries(leaving_chunk, last_part, this_stage);
      issue_scores(next_grad_weights, storage.values, storage.grad_out[0]);
      turn.pass();
      const Statistics lse(storage.lse[stage()], lane);
      if constexpr (!Traits::kSendsFirst) send_queries(leaving_chunk, last_part, this_stage);
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(next_scores);
      weigh(next_scores, lse, limits, masked);
      const Statistics delta(storage.delta[stage()], lane);
      if constexpr (Traits::kGradLeavesFromStage) {
        bulk_wait_read(lane);
        release_stage(this_stage);
      }
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(next_grad_weights);
      differentiate(next_scores, next_grad_weights, delta, masked);
      scores = next_scores;
      grad_weights = next_grad_weights;
    }
  }

  // What is left of a last stage none of whose queries sees a key of this warpgroup: its columns of dQ.
  __device__ __forceinline__ void skip_last() {
    const int part = Traits::kJoint ? unit : 0;
    wait_stage();
    const int chunk = lane == 0 ? storage.infos[stage()].chunks[warp] : -1;
    release_stage(stage());
    Operand none;
    cute::clear(none);
    share(none);
    GradQueries grad_queries;
    turn.take();
    wait_shared(position);
    issue_queries(grad_queries, position, part);
    turn.pass();
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(grad_queries);
    release_shared(position);
    if (lane == 0) mbarrier_arrive(&storage.keys_empty);
    put_queries(grad_queries, part, 0);
    send_queries(chunk, part, 0);
    ++position;
  }

  __device__ __forceinline__ void run(const QueryLimits& limits, int stages, bool skips = false) {
    cute::clear(grad_keys);
    cute::clear(grad_values);
    if (stages == 0) return;
    stages -= skips;
    Scores scores, grad_weights;
    bool masked = start(scores, grad_weights, limits);
    int late_chunk = -1;
    bool first = true;
#pragma unroll 1
    for (; stages > 1; --stages, first = false) {
      // Made anew each time, descriptors of the tile's keys do not take registers from the loop.
      unit = uniform(opaque(unit));
      step<true>(scores, grad_weights, masked, late_chunk, limits, first);
    }
    if (lane == 0) mbarrier_arrive(&storage.values_empty);
    unit = uniform(opaque(unit));
    step<false>(scores, grad_weights, masked, late_chunk, limits, first, skips);
    if constexpr (Traits::kSkips) {
      if (skips) skip_last();
    }
    ++tiles;
  }
};

}  // namespace hbsattn::sm90
