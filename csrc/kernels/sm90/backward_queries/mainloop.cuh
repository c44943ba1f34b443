#pragma once

#include "kernels/sm90/add_rows.cuh"
#include "kernels/sm90/backward_queries/traits.cuh"
#include "kernels/sm90/grad_queries/mainloop.cuh"
#include "kernels/sm90/turn.cuh"

// What one consumer warpgroup does with the stages of a tile of 128 queries, of which it has 64:
//
//   P = exp(S - lse)      dP = dO V^T      dS = P o (dP - delta)      dQ += dS K
//   dV += P^T dO  (warpgroup 0)            dK += dS^T Q  (warpgroup 1)
//
// The gradient of the queries stays in registers. Those of a stage's keys and values are products over all queries of
// the tile: P and dS go through shared memory, each warpgroup makes one of the two a stage late, so that neither waits
// for the other, and adds it to float32 in global memory. They take turns with the tensor cores, as in
// backward_keys/mainloop.cuh.

namespace hbsattn::sm90 {

template <class Traits, bool kGeneral>
struct BackwardQueriesMainloop : GradQueriesMainloop<Traits, kGeneral> {
  using Base = GradQueriesMainloop<Traits, kGeneral>;
  using Base::grad_queries;
  using Base::key_stage;
  using Base::lane;
  using Base::last_key_stage;
  using Base::storage;
  using Base::value_stage;
  using typename Base::Element;
  using typename Base::Operand;
  using typename Base::Scores;
  using typename Base::Storage;
  using MmaKeys = typename Traits::MmaKeys;

  using GradKeys = decltype(cute::partition_fragment_C(
      MmaKeys{}, cute::Shape<cute::Int<Traits::kTileN>, cute::Int<Traits::kHeadDim>>{}));

  int unit;  // which consumer warpgroup
  const int warp;
  const Turn<Traits::kUnits> turn;
  uint32_t position = 0;  // stages before this one, over all tiles: which buffer they share

  // Of the tile at hand.
  float* sums;      // of gradients of its sequence's first key, or value
  int key_end;      // keys that its sequence has
  int query_index;  // of this warpgroup's rows in the buffers of queries

  __device__ __forceinline__ BackwardQueriesMainloop(const GradQueriesArguments& args, Storage& storage, int unit,
                                                     int warp, int lane)
      : Base(args, storage, lane), unit(unit), warp(warp), turn(unit) {}

  static __device__ __forceinline__ int buffer(uint32_t position) { return position % Traits::kSharedBuffers; }
  static __device__ __forceinline__ uint32_t parity(uint32_t position) { return position / Traits::kSharedBuffers & 1; }

  // Leaves this warpgroup's weights and gradients of scores where the products over all queries read them.
  __device__ __forceinline__ void share(const Operand& weights, const Operand& grads) const {
    using namespace cute;
    mbarrier_wait(&storage.shared_empty[buffer(position)], parity(position) ^ 1);
    auto tiled_copy = make_tiled_copy_C(Copy_Atom<SM90_U32x4_STSM_N, Element>{}, typename Traits::MmaQK{});
    auto thread_copy = tiled_copy.get_thread_slice(warp * 32 + lane);
    const auto put = [&](const Operand& operand, Element* to) {
      Tensor source = make_tensor(operand.data(), Scores{}.layout());
      Tensor sS = make_tensor(make_smem_ptr(to), typename Traits::SmemLayoutShared{});
      Tensor mine =
          local_tile(sS, Shape<Int<kUnitRows>, Int<Traits::kTileN>>{}, make_coord(unit, _0{}, buffer(position)));
      copy(tiled_copy, thread_copy.retile_S(source), thread_copy.partition_D(mine));
    };
    put(weights, storage.weights[0]);
    put(grads, storage.grad_scores[0]);
    cutlass::arch::fence_view_async_shared();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(&storage.shared_full[buffer(position)]);
  }

  __device__ __forceinline__ void wait_shared(uint32_t position) const {
    mbarrier_wait(&storage.shared_full[buffer(position)], parity(position));
  }
  // Lets what the warpgroups share of the stage at `position` be overwritten.
  __device__ __forceinline__ void release_shared(uint32_t position) const {
    if (lane == 0) mbarrier_arrive(&storage.shared_empty[buffer(position)]);
  }
  // Until both have.
  __device__ __forceinline__ void wait_released(uint32_t position) const {
    mbarrier_wait(&storage.shared_empty[buffer(position)], parity(position));
  }

  // grad = the gradient of the values, or keys, of the stage at `position`; asynchronous.
  __device__ __forceinline__ void issue_keys(GradKeys& grad, uint32_t position) const {
    using namespace cute;
    MmaKeys mma;
    auto thread_mma = mma.get_thread_slice(_0{});
    const Element* shared = unit == 0 ? storage.weights[0] : storage.grad_scores[0];
    const Element* rows = unit == 0 ? storage.grad_out[0][0] : storage.queries[0][0];
    Tensor sA = make_tensor(make_smem_ptr(shared), typename Traits::SmemLayoutSharedTransposed{});
    Tensor sB = make_tensor(make_smem_ptr(rows), typename Traits::SmemLayoutQt{});
    Tensor rA = thread_mma.partition_fragment_A(sA);
    Tensor rB = thread_mma.partition_fragment_B(sB);
    constexpr int kSteps = kUnitRows / 16;
    warpgroup_fence_operand(grad);
    warpgroup_arrive();
    mma.accumulate_ = GMMA::ScaleOut::Zero;
    CUTE_UNROLL
    for (int step = 0; step < Traits::kUnits * kSteps; ++step) {
      cute::gemm(mma, rA(_, _0{}, step, buffer(position)),
                 rB(_, _0{}, step % kSteps, query_index - unit + step / kSteps), grad(_, _0{}, _0{}));
      mma.accumulate_ = GMMA::ScaleOut::One;
    }
    warpgroup_commit_batch();
    warpgroup_fence_operand(grad);
  }

  // Adds the gradient of the 16 keys, or values, that this warp has of a stage.
  __device__ __forceinline__ void add(const GradKeys& grad, int granule) const {
    if (granule == kNoKey) return;
    const int first = kGeneral ? granule_first_key(granule) : granule;
    const int end = kGeneral ? min(granule_last_key(granule), key_end - 1) + 1 : key_end;
    add_rows<Traits::kHeadDim>(grad, sums + static_cast<int64_t>(first) * Traits::kHeadDim, end - first, lane);
  }

  __device__ __forceinline__ void issue_stage_scores(Scores& scores) {
    mbarrier_wait(&storage.keys_full[key_stage.index], key_stage.parity);
    Base::template issue_scores<typename Traits::SmemLayoutQ, typename Traits::SmemLayoutK>(
        scores, &storage.queries[0][0][0], query_index, &storage.keys[0][0], key_stage.index);
  }
  __device__ __forceinline__ void issue_stage_weights(Scores& grad_weights) {
    mbarrier_wait(&storage.values_full[value_stage.index], value_stage.parity);
    Base::template issue_scores<typename Traits::SmemLayoutGradOut, typename Traits::SmemLayoutV>(
        grad_weights, &storage.grad_out[0][0][0], query_index, &storage.values[0][0], value_stage.index);
  }
  __device__ __forceinline__ void release_values() {
    if (lane == 0) mbarrier_arrive(&storage.values_empty[value_stage.index]);
    value_stage.advance();
  }

  __device__ __forceinline__ void differentiate(const Scores& weights, Scores& grads, const RowStatistics& rows,
                                                bool masked) const {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) grads(i) = weights(i) * (grads(i) - rows.delta[(i >> 1) & 1]);
    if (!masked) return;
    // A weight of 0 does not silence a NaN.
    CUTE_UNROLL
    for (int i = 0; i < cute::size(grads); ++i) grads(i) = weights(i) == 0.f ? 0.f : grads(i);
  }

  // The products of the current stage, whose weights and gradients of scores are given, and of the keys of the one
  // before; with kNext, weights and gradients of scores of the next.
  template <bool kNext>
  __device__ __forceinline__ void step(Scores& weights, Scores& grads, int& late_granule,
                                       const KeyLimits<kGeneral>& limits, const RowStatistics& rows, bool first,
                                       bool masked) {
    // Made anew each time, descriptors of the tile's queries do not take registers from the loop.
    unit = uniform(opaque(unit));
    query_index = uniform(opaque(query_index));
    Operand weights_operand, grads_operand;
    // Declared here, or their last values would count as inputs of the products that overwrite them.
    [[maybe_unused]] Scores next_weights, next_grads;
    GradKeys grad_keys;
    convert_scores(grads, grads_operand);
    convert_scores(weights, weights_operand);
    const int granule = uniform(lane == 0 ? storage.granules[key_stage.index][warp] : 0);
    share(weights_operand, grads_operand);
    turn.take();
    last_key_stage = key_stage.index;
    this->issue_queries(grads_operand, true);
    // Before the first stage there is none, and its product is of whatever lies there: ptxas wants the same products
    // in flight on every path.
    if (!first) wait_shared(position - 1);
    issue_keys(grad_keys, position - 1);
    key_stage.advance();
    if constexpr (kNext) {
      issue_stage_scores(next_weights);
    } else {
      turn.pass();
    }
    cute::warpgroup_wait<kNext ? 2 : 1>();
    this->finish_queries(grads_operand);
    cute::warpgroup_wait<kNext ? 1 : 0>();
    cute::warpgroup_fence_operand(grad_keys);
    if (!first) release_shared(position - 1);
    add(grad_keys, late_granule);
    late_granule = granule;
    ++position;
    if constexpr (kNext) {
      issue_stage_weights(next_grads);
      turn.pass();
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(next_weights);
      this->weigh(next_weights, rows, limits, masked);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(next_grads);
      release_values();
      differentiate(next_weights, next_grads, rows, masked);
      weights = next_weights;
      grads = next_grads;
    }
  }

  // All stages of a tile. Masked stages come first; those from `clean_end` on are masked again.
  __device__ __forceinline__ void run(const KeyLimits<kGeneral>& limits, const RowStatistics& rows, int stages,
                                      int masked_stages, int clean_end) {
    cute::clear(grad_queries);
    Scores weights, grads;
    issue_stage_scores(weights);
    issue_stage_weights(grads);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(weights);
    cute::warpgroup_fence_operand(grads);
    this->weigh(weights, rows, limits, true);
    release_values();
    differentiate(weights, grads, rows, true);
    int late_granule = kNoKey, stage = 1;
#pragma unroll 1
    for (; stage < stages; ++stage) {
      const bool masked = stage < masked_stages || stage >= clean_end;
      step<true>(weights, grads, late_granule, limits, rows, stage == 1, masked);
    }
    step<false>(weights, grads, late_granule, limits, rows, stage == 1, false);
    GradKeys grad_keys;
    wait_shared(position - 1);
    issue_keys(grad_keys, position - 1);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(grad_keys);
    release_shared(position - 1);
    add(grad_keys, late_granule);
  }
};

}  // namespace hbsattn::sm90
