#pragma once

#include "kernels/common/query_dropout.cuh"
#include "kernels/common/row_statistics.cuh"
#include "kernels/common/softcap.cuh"
#include "kernels/sm90/altered.cuh"
#include "kernels/sm90/grad_queries/traits.cuh"
#include "kernels/sm90/operand.cuh"
#include "kernels/sm90/query_tiles/limits.cuh"

// What one consumer warpgroup does with the stages of a tile. With S the scaled scores of its 64 queries and the keys
// of a stage:
//
//   P = exp(S - lse)      dP = dO V^T      dS = P o (dP - delta)      dQ += dS K
//
// The product for dQ is that of the stage before, so that the tensor cores work on it while a stage's P and dS are
// computed. One warpgroup sums a row's gradient, stage after stage: the same in every run.

namespace hbsattn::sm90 {

template <class Traits, bool kGeneral>
struct GradQueriesMainloop {
  using Element = typename Traits::Element;
  using Storage = typename Traits::Storage;
  using MmaScores = typename Traits::MmaQK;
  using MmaQueries = typename Traits::MmaQueries;

  using Scores =
      decltype(cute::partition_fragment_C(MmaScores{}, cute::Shape<cute::Int<kUnitRows>, cute::Int<Traits::kTileN>>{}));
  using GradQueries = decltype(cute::partition_fragment_C(
      MmaQueries{}, cute::Shape<cute::Int<kUnitRows>, cute::Int<Traits::kHeadDim>>{}));
  // The scores' registers, in order, are those of a first operand.
  using Operand = decltype(cute::make_tensor<Element>(
      cute::Shape<cute::Shape<cute::_2, cute::_2, cute::_2>, cute::_1, cute::Int<Traits::kTileN / 16>>{}));

  const GradQueriesArguments& args;
  Storage& storage;
  const int lane;
  const uint32_t unread;  // address of what hold_back_waits stores to
  RingPosition<Traits::kKeyStages> key_stage{0};
  RingPosition<Traits::kValueStages> value_stage{0};
  int last_key_stage = 0;         // whose product for dQ is still to be issued
  PartialLimits<Traits> partial;  // where the mask has partial blocks
  GradQueries grad_queries;

  __device__ __forceinline__ GradQueriesMainloop(const GradQueriesArguments& args, Storage& storage, int lane)
      : args(args), storage(storage), lane(lane), unread(opaque(shared_address(&storage.unread))) {}

  // scores = rows of a buffer x those of a stage, over columns; asynchronous.
  template <class SmemLayoutRows, class SmemLayout>
  static __device__ __forceinline__ void issue_scores(Scores& scores, const Element* rows, int row_index,
                                                      const Element* stages, int stage) {
    using namespace cute;
    MmaScores mma;
    auto thread_mma = mma.get_thread_slice(_0{});
    // The descriptors of so many steps do not fit the uniform registers. Made anew each time, they are not spilled.
    if constexpr (Traits::kHeadDim > 128) row_index = uniform(opaque(row_index));
    Tensor sA = make_tensor(make_smem_ptr(rows), SmemLayoutRows{});
    Tensor sB = make_tensor(make_smem_ptr(stages), SmemLayout{});
    Tensor rA = thread_mma.partition_fragment_A(sA);
    Tensor rB = thread_mma.partition_fragment_B(sB);
    warpgroup_fence_operand(scores);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int step = 0; step < size<2>(rA); ++step) {
      cute::gemm(mma, rA(_, _, step, row_index), rB(_, _, step, stage), scores);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(scores);
  }

  // dQ (+)= dS K for the stage before; asynchronous.
  __device__ __forceinline__ void issue_queries(Operand& grads, bool accumulate) {
    using namespace cute;
    MmaQueries mma;
    auto thread_mma = mma.get_thread_slice(_0{});
    Tensor sKt = make_tensor(make_smem_ptr(&storage.keys[0][0]), typename Traits::SmemLayoutKt{});
    Tensor rK = thread_mma.partition_fragment_B(sKt);
    warpgroup_fence_operand(grad_queries);
    fence_operand(grads);
    warpgroup_arrive();
    mma.accumulate_ = accumulate ? GMMA::ScaleOut::One : GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int step = 0; step < Traits::kTileN / 16; ++step) {
      cute::gemm(mma, grads(_, _, step), rK(_, _, step, last_key_stage), grad_queries);
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(grad_queries);
    fence_operand(grads);
  }

  // Behind the wait for that product.
  __device__ __forceinline__ void finish_queries(Operand& grads) {
    cute::warpgroup_fence_operand(grad_queries);
    fence_operand(grads);
    if (lane == 0) mbarrier_arrive(&storage.keys_empty[last_key_stage]);
  }

  // From the products of the current stage to its weights, which are multiplied by the cap's derivative, if there is
  // one. Those that are dropped are negative.
  __device__ __forceinline__ void weigh(Scores& scores, const RowStatistics& rows, const KeyLimits<kGeneral>& limits,
                                        bool masked) const {
    const bool caps = caps_scores<Traits>(args);
    if (caps) cap_scores(scores, args.cap);
    if (masked) mask_scores<Traits>(args, scores, storage, key_stage.index, limits, lane);
    if constexpr (Traits::kPartial) partial.mask(scores, lane);
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      const float weight = exp2_approx(scores(i) * args.scale_log2 - rows.lse[(i >> 1) & 1]);
      if (caps) {
        // The score of a key that a query must not see is -inf, and its weight 0.
        scores(i) = weight == 0.f ? 0.f : weight * (1.f - scores(i) * scores(i));
      } else {
        scores(i) = weight;
      }
    }
    if (!drops_weights<Traits>(args)) return;
    const int32_t* granules = storage.granules[key_stage.index] + limits.granules * Traits::kGranules;
    const DropoutRow* of_rows = &storage.dropout_rows[(threadIdx.x - 128) / 32 * 16];
    drop_weights<DropAs::kNegative>(args.dropout, of_rows, scores, lane,
                                    [&](int i) { return __shfl_sync(0xffffffffu, lane == 0 ? granules[i] : 0, 0); });
  }

  // Turns the gradients of the weights into those of the scores. A weight that was dropped is negative, and its own
  // gradient is 0.
  template <bool kMasked>
  static __device__ __forceinline__ void differentiate(const Scores& weights, Scores& grads,
                                                       const RowStatistics& rows) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) {
      const bool dropped = Traits::kAltered && signbit(weights(i));
      const float delta = rows.delta[(i >> 1) & 1], grad = weights(i) * (dropped ? delta : grads(i) - delta);
      // A weight of 0 does not silence a NaN.
      grads(i) = kMasked && weights(i) == 0.f ? 0.f : grad;
    }
  }

  // Left alone, ptxas waits for all products before it computes from the first: this keeps it from moving a later wait
  // above the computation of `values`.
  __device__ __forceinline__ void hold_back(const Scores& values) const {
    auto words = cute::recast<uint32_t>(values);
    uint32_t any = words(0);
    CUTE_UNROLL
    for (int i = 1; i < cute::size(words); ++i) any ^= words(i);
    hold_back_waits(any, unread);
  }

  // From a stage's rows to `grads`, its gradients of scores, while those of the stage before are multiplied.
  template <bool kFirst, bool kMasked>
  __device__ __forceinline__ void step(Operand& grads, const KeyLimits<kGeneral>& limits, const RowStatistics& rows,
                                       int query_index, bool accumulate, bool masked = true) {
    // Declared here, or their last values would count as inputs of the products that overwrite them.
    Scores scores, grad_weights;
    mbarrier_wait(&storage.keys_full[key_stage.index], key_stage.parity);
    issue_scores<typename Traits::SmemLayoutQ, typename Traits::SmemLayoutK>(
        scores, &storage.queries[0][0][0], query_index, &storage.keys[0][0], key_stage.index);
    mbarrier_wait(&storage.values_full[value_stage.index], value_stage.parity);
    issue_scores<typename Traits::SmemLayoutGradOut, typename Traits::SmemLayoutV>(
        grad_weights, &storage.grad_out[0][0][0], query_index, &storage.values[0][0], value_stage.index);
    if constexpr (!kFirst) issue_queries(grads, accumulate);
    if constexpr (Traits::kPartial) partial.read(args, storage, key_stage.index, limits, lane);

    cute::warpgroup_wait<kFirst ? 1 : 2>();
    cute::warpgroup_fence_operand(scores);
    weigh(scores, rows, limits, kMasked && masked);
    hold_back(scores);
    cute::warpgroup_wait<kFirst ? 0 : 1>();
    cute::warpgroup_fence_operand(grad_weights);
    if (lane == 0) mbarrier_arrive(&storage.values_empty[value_stage.index]);
    value_stage.advance();
    differentiate<kMasked>(scores, grad_weights, rows);
    if constexpr (!kFirst) {
      hold_back(grad_weights);
      cute::warpgroup_wait<0>();
      finish_queries(grads);
    }
    convert_scores(grad_weights, grads);
    last_key_stage = key_stage.index;
    key_stage.advance();
  }

  // All stages of a tile. Masked stages come first, and the loop after them has no mask code; those from `clean_end` on
  // are masked again. Where weights are altered, the first loop takes all.
  __device__ __forceinline__ void run(const KeyLimits<kGeneral>& limits, const RowStatistics& rows, int stages,
                                      int masked_stages, int clean_end, int query_index) {
    Operand grads;
    bool accumulate = false;
    step<true, true>(grads, limits, rows, query_index, accumulate);
    int stage = 1;
#pragma unroll 1
    for (; stage < (Traits::kAltered ? stages : masked_stages); ++stage) {
      const bool masked = !Traits::kAltered || stage < masked_stages || stage >= clean_end;
      step<false, true>(grads, limits, rows, query_index, accumulate, masked);
      accumulate = true;
    }
    if constexpr (!Traits::kAltered) {
#pragma unroll 1
      for (; stage < clean_end; ++stage) {
        step<false, false>(grads, limits, rows, query_index, accumulate);
        accumulate = true;
      }
#pragma unroll 1
      for (; stage < stages; ++stage) {
        step<false, true>(grads, limits, rows, query_index, accumulate);
        accumulate = true;
      }
    }
    issue_queries(grads, accumulate);
    cute::warpgroup_wait<0>();
    finish_queries(grads);
  }

  // The gradient is that of unscaled scores so far.
  __device__ __forceinline__ void scale(const RowStatistics& rows) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grad_queries); ++i) {
      // A select, not a product with 0: keys that only other rows of the tile attend to may be NaN.
      grad_queries(i) = rows.lse[(i >> 1) & 1] == INFINITY ? 0.f : args.scale * grad_queries(i);
    }
  }
};

}  // namespace hbsattn::sm90
