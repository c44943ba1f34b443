#pragma once

#include <cutlass/arch/barrier.h>

#include <cute/arch/copy_sm90.hpp>
#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/atom/copy_traits_sm90.hpp>
#include <cute/tensor.hpp>

#include "kernels/common/ptx.cuh"
#include "kernels/sm90/backward_keys/mainloop.cuh"
#include "kernels/sm90/backward_keys/traits.cuh"
#include "kernels/sm90/operand.cuh"

// The same as mainloop.cuh for head dims above 128, where two consumer warpgroups share the tile's 64 keys.
// Each computes the scores of half the stage's queries, and all gradients in half the columns: P and dS both go through
// shared memory, where they are first operands of dV, dK and (dS transposed) dQ. kWithQueries: dQ is wanted.
//
// The tensor cores have work queued while a warpgroup computes: dP while it computes P, dV while it computes dS and the
// warpgroups exchange it, the next stage's scores while dQ leaves, which goes to global memory straight from registers.
//
// P and dS have two buffers each. A warpgroup shares P of a stage when its products of the stage before are complete.
// Who has waited for P of both warpgroups may therefore write dS of this stage, and P of the next, where those of the
// stage before lay.

namespace hbsattn::sm90 {

template <class Traits, bool kWithQueries>
struct BackwardKeysMainloopWide {
  using Element = typename Traits::Element;
  using Storage = typename Traits::Storage;
  using MmaScores = typename Traits::MmaScores;
  using MmaKeys = typename Traits::template MmaHalf<Traits::kHeadDim>;
  using MmaValues = typename Traits::template MmaHalf<Traits::kValueDim>;
  using MmaQueries = typename Traits::MmaQueries;

  // Of half the queries, and of half the columns.
  using Scores = decltype(cute::partition_fragment_C(
      MmaScores{}, cute::Shape<cute::Int<kUnitKeys>, cute::Int<Traits::kScoreQueries>>{}));
  using GradKeys = decltype(cute::partition_fragment_C(
      MmaKeys{}, cute::Shape<cute::Int<kUnitKeys>, cute::Int<Traits::kGradColumns>>{}));
  using GradValues = decltype(cute::partition_fragment_C(
      MmaValues{}, cute::Shape<cute::Int<kUnitKeys>, cute::Int<Traits::kValueDim / 2>>{}));
  using GradQueries = decltype(cute::partition_fragment_C(
      MmaQueries{}, cute::Shape<cute::Int<Traits::kTileM>, cute::Int<Traits::kGradColumns>>{}));

  static_assert(Traits::kTileN == kUnitKeys && Traits::kUnits == 2);
  static_assert(Traits::kScoreQueries % kGranule == 0);
  // Buffers of gradients of scores, and behind them as many of weights.
  static constexpr int kBuffers = Traits::kGradBuffers / 2;

  const BackwardKeysArguments& args;
  Storage& storage;
  int unit;      // which consumer warpgroup: which half of the queries, and of the columns
  int zero = 0;  // which the compiler must not know
  const int warp, lane;
  uint32_t position = 0;  // stages before this one, over all tiles: where all rings are, in one register
  uint32_t tiles = 0;     // with stages, before this one
  GradKeys grad_keys;
  GradValues grad_values;
  KeyDropout dropout;  // of the tile, if the kernel is for altered calls, as is the next
  PartialKeys partial_keys;

  __device__ __forceinline__ BackwardKeysMainloopWide(const BackwardKeysArguments& args, Storage& storage, int unit,
                                                      int warp, int lane)
      : args(args), storage(storage), unit(unit), warp(warp), lane(lane) {}

  __device__ __forceinline__ int stage() const { return position % Traits::kStages; }
  __device__ __forceinline__ auto info() const { return InfoReader(storage.infos[stage()], lane); }
  __device__ __forceinline__ int buffer() const { return position % kBuffers; }
  __device__ __forceinline__ int weights_buffer() const { return kBuffers + buffer(); }
  __device__ __forceinline__ void wait_shared(int index) const {
    mbarrier_wait(&storage.grad_scores_full[0][index], position / kBuffers & 1);
  }
  __device__ __forceinline__ void wait_stage() const {
    mbarrier_wait(&storage.full[stage()], position / Traits::kStages & 1);
  }

  // grad (+)= a product whose operands are given step by step; asynchronous.
  template <cute::GMMA::ScaleOut kFirst, class Mma, class A, class B, class Accumulators>
  static __device__ __forceinline__ void issue(Mma mma, const A& a, const B& b, Accumulators& grad) {
    using namespace cute;
    static_assert(decltype(size<1>(a))::value == decltype(size<1>(b))::value);
    warpgroup_fence_operand(grad);
    warpgroup_arrive();
    mma.accumulate_ = kFirst;
    CUTE_UNROLL
    for (int step = 0; step < size<1>(a); ++step) {
      cute::gemm(mma, a(_, step), b(_, step), grad(_, _0{}, _0{}));
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(grad);
  }

  // Keys or values x this warpgroup's queries or output gradients of the current stage.
  template <int kColumns>
  __device__ __forceinline__ void issue_scores(Scores& scores, const Element* keys, const Element* rows) const {
    using namespace cute;
    auto thread_mma = MmaScores{}.get_thread_slice(_0{});
    Tensor sA =
        make_tensor(make_smem_ptr(keys + zero), typename Traits::template SmemLayout<Traits::kTileN, 1, kColumns>{});
    Tensor sB = make_tensor(make_smem_ptr(rows),
                            typename Traits::template SmemLayout<Traits::kTileM, Traits::kStages, kColumns>{});
    Tensor rA = thread_mma.partition_fragment_A(sA);
    Tensor rB = thread_mma.partition_fragment_B(sB);
    issue<GMMA::ScaleOut::Zero>(MmaScores{}, rA(_, _0{}, _, _0{}), rB(_, unit, _, stage()), scores);
  }

  // grad += weights or gradients of scores x this warpgroup's columns of the current stage's rows.
  template <int kColumns, class Grad>
  __device__ __forceinline__ void issue_keys(Grad& grad, int index, const Element* rows) const {
    using namespace cute;
    using Mma = typename Traits::template MmaHalf<kColumns>;
    auto thread_mma = Mma{}.get_thread_slice(_0{});
    Tensor sA = make_tensor(make_smem_ptr(&storage.grad_scores[0][0] + zero), typename Traits::SmemLayoutGradScores{});
    Tensor sB =
        make_tensor(make_smem_ptr(rows),
                    typename Traits::template SmemLayoutTransposed<Traits::kTileM, Traits::kStages, kColumns>{});
    Tensor rA = thread_mma.partition_fragment_A(sA);
    Tensor rB = thread_mma.partition_fragment_B(sB);
    issue<GMMA::ScaleOut::One>(Mma{}, rA(_, _0{}, _, index), rB(_, unit, _, stage()), grad);
  }

  // grad = this warpgroup's columns of the gradient of the current stage's queries.
  __device__ __forceinline__ void issue_queries(GradQueries& grad) const {
    using namespace cute;
    auto thread_mma = MmaQueries{}.get_thread_slice(_0{});
    Tensor sA =
        make_tensor(make_smem_ptr(&storage.grad_scores[0][0]), typename Traits::SmemLayoutGradScoresTransposed{});
    Tensor sB = make_tensor(make_smem_ptr(&storage.keys[0]),
                            typename Traits::template SmemLayoutTransposed<Traits::kTileN, 1>{});
    Tensor rA = thread_mma.partition_fragment_A(sA);
    Tensor rB = thread_mma.partition_fragment_B(sB);
    issue<GMMA::ScaleOut::Zero>(MmaQueries{}, rA(_, _0{}, _, buffer()), rB(_, unit, _, _0{}), grad);
  }

  // Of the stage's statistics, those of this thread's first two columns.
  __device__ __forceinline__ const float* of_columns(const float* statistics) const {
    return statistics + unit * Traits::kScoreQueries + 2 * (lane & 3);
  }

  // From the products of the current stage to its weights. Those that are dropped are negative.
  __device__ __forceinline__ void weigh(Scores& scores, const QueryLimits& limits, bool masked) {
    const int first_granule = unit * (Traits::kScoreQueries / kGranule);
    if (caps_scores<Traits>(args)) cap_scores(scores, args.cap);
    if (masked) mask_queries(args, scores, info(), first_granule, limits, lane);
    if constexpr (Traits::kPartial) {
      if (masked) mask_partial(args, partial_keys, scores, info(), first_granule, lane);
    }
    const float* lse = of_columns(storage.lse[stage()]);
    CUTE_UNROLL
    for (int group = 0; group < Traits::kScoreQueries / 8; ++group) {
      const float2 pair = *reinterpret_cast<const float2*>(lse + 8 * group);
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& score = scores(4 * group + j);
        score = exp2_approx(score * args.scale_log2 - (j & 1 ? pair.y : pair.x));
      }
    }
    if (drops_weights<Traits>(args)) dropout.drop(args, scores, info(), first_granule, lane);
  }

  // Turns the gradients of the weights into those of the scores. A weight that was dropped is negative, and its own
  // gradient is 0.
  __device__ __forceinline__ void differentiate(const Scores& weights, Scores& grads, bool masked) const {
    const float* delta = of_columns(storage.delta[stage()]);
    CUTE_UNROLL
    for (int group = 0; group < Traits::kScoreQueries / 8; ++group) {
      const float2 pair = *reinterpret_cast<const float2*>(delta + 8 * group);
      CUTE_UNROLL
      for (int j = 0; j < 4; ++j) {
        float& grad = grads(4 * group + j);
        const float weight = weights(4 * group + j), of_row = j & 1 ? pair.y : pair.x;
        grad = weight * (Traits::kAltered && signbit(weight) ? of_row : grad - of_row);
      }
    }
    if (caps_scores<Traits>(args)) {
      const float* lse = of_columns(storage.lse[stage()]);
      CUTE_UNROLL
      for (int group = 0; group < Traits::kScoreQueries / 8; ++group) {
        const float2 pair = *reinterpret_cast<const float2*>(lse + 8 * group);
        CUTE_UNROLL
        for (int j = 0; j < 4; ++j) {
          grads(4 * group + j) *=
              slope_of_cap(weights(4 * group + j), j & 1 ? pair.y : pair.x, args.inverse_scale_log2);
        }
      }
    }
    if (!masked) return;
    // A weight of 0 does not silence a NaN.
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) grads(i) = weights(i) == 0.f ? 0.f : grads(i);
  }

  // Leaves this warpgroup's half of the weights, or of the gradients of scores, where both warpgroups' products read
  // them.
  template <bool kPositive = false>
  __device__ __forceinline__ void share(const Scores& values, int index) const {
    using namespace cute;
    Tensor rounded = make_tensor<Element>(Scores{}.layout());
    convert_scores<kPositive>(values, rounded);
    auto tiled_copy = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, MmaScores{});
    auto thread_copy = tiled_copy.get_thread_slice(warp * 32 + lane);
    Tensor sS = make_tensor(make_smem_ptr(&storage.grad_scores[0][0]), typename Traits::SmemLayoutGradScores{});
    Tensor mine = local_tile(sS, Shape<Int<kUnitKeys>, Int<Traits::kScoreQueries>>{}, make_coord(_0{}, unit, index));
    copy(tiled_copy, thread_copy.retile_S(rounded), thread_copy.partition_D(mine));
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&storage.grad_scores_full[0][index]);
  }

  // Adds this warpgroup's columns of the gradient of a stage's queries to those in global memory. A warp has the rows
  // of one granule.
  __device__ __forceinline__ void add_queries(const GradQueries& grad, int chunk) const {
    if (chunk < 0) return;
    constexpr int kGroups = Traits::kGradColumns / 8;
    float* destination =
        args.grad_q + static_cast<int64_t>(chunk) * (kGranule * Traits::kHeadDim) + unit * (kGroups * 128) + 4 * lane;
    CUTE_UNROLL
    for (int group = 0; group < kGroups; ++group) {
      add_quad(destination + group * 128, grad(4 * group), grad(4 * group + 1), grad(4 * group + 2),
               grad(4 * group + 3));
    }
  }

  __device__ __forceinline__ void release_stage(int index) const { mbarrier_arrive_warp(&storage.empty[index], lane); }

  // The products of the current stage and, with kNext, the scores of the one behind it: from P and dP to the next.
  template <bool kNext>
  __device__ __forceinline__ void step(Scores& weights, Scores& grads, bool& masked, const QueryLimits& limits) {
    // Made anew each time, descriptors of the tile's keys do not take registers from the loop.
    unit = uniform(opaque(unit));
    zero = uniform(opaque(zero));
    const int this_stage = stage();
    [[maybe_unused]] const int chunk = read_info(storage.infos[this_stage].chunks[warp], lane);
    // Declared here, or their last values would count as inputs of the products that overwrite them.
    [[maybe_unused]] Scores next_weights, next_grads;
    [[maybe_unused]] GradQueries grad_queries;
    wait_shared(weights_buffer());
    issue_keys<Traits::kValueDim>(grad_values, weights_buffer(), storage.grad_out[0]);
    differentiate(weights, grads, masked);
    share(grads, buffer());
    wait_shared(buffer());
    issue_keys<Traits::kHeadDim>(grad_keys, buffer(), storage.queries[0]);
    if constexpr (kWithQueries) issue_queries(grad_queries);
    ++position;
    if constexpr (kNext) {
      wait_stage();
      issue_scores<Traits::kHeadDim>(next_weights, storage.keys, storage.queries[0]);
    }
    constexpr int kScores = kNext ? 1 : 0;
    cute::warpgroup_wait<kScores + kWithQueries>();
    cute::warpgroup_fence_operand(grad_values);
    cute::warpgroup_fence_operand(grad_keys);
    release_stage(this_stage);
    if constexpr (kWithQueries) {
      cute::warpgroup_wait<kScores>();
      cute::warpgroup_fence_operand(grad_queries);
    }
    if constexpr (!kNext) {
      if (lane == 0) mbarrier_arrive(&storage.keys_empty);
    }
    if constexpr (kWithQueries) add_queries(grad_queries, chunk);
    if constexpr (kNext) {
      issue_scores<Traits::kValueDim>(next_grads, storage.values, storage.grad_out[0]);
      masked = read_info(storage.infos[stage()].masked, lane);
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(next_weights);
      weigh(next_weights, limits, masked);
      share<Traits::kAltered>(next_weights, weights_buffer());
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(next_grads);
      weights = next_weights;
      grads = next_grads;
    }
  }

  __device__ __forceinline__ void run(const QueryLimits& limits, int stages) {
    cute::clear(grad_keys);
    cute::clear(grad_values);
    if (stages == 0) return;
    Scores weights, grads;
    mbarrier_wait(&storage.values_full, tiles & 1);
    wait_stage();
    issue_scores<Traits::kValueDim>(grads, storage.values, storage.grad_out[0]);
    mbarrier_wait(&storage.keys_full, tiles & 1);
    issue_scores<Traits::kHeadDim>(weights, storage.keys, storage.queries[0]);
    bool masked = read_info(storage.infos[stage()].masked, lane);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(grads);
    cute::warpgroup_fence_operand(weights);
    weigh(weights, limits, masked);
    share<Traits::kAltered>(weights, weights_buffer());
#pragma unroll 1
    for (; stages > 1; --stages) step<true>(weights, grads, masked, limits);
    if (lane == 0) mbarrier_arrive(&storage.values_empty);
    step<false>(weights, grads, masked, limits);
    ++tiles;
  }
};

}  // namespace hbsattn::sm90
