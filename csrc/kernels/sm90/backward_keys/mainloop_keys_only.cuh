#pragma once

#include "kernels/sm90/backward_keys/mainloop.cuh"

// The mainloop without dQ, for calls that compute it elsewhere. What remains needs no other warpgroup.

namespace hbsattn::sm90 {

template <class Traits>
struct KeysOnlyMainloop : BackwardKeysMainloop<Traits> {
  using Base = BackwardKeysMainloop<Traits>;
  using Base::Base;
  using Base::grad_keys;
  using Base::grad_values;
  using Base::lane;
  using Base::position;
  using Base::stage;
  using Base::storage;
  using Base::unit;
  using typename Base::Operand;
  using typename Base::Scores;
  using typename Base::Statistics;

  // The products of the current stage and, with kNext, the scores of the one behind it.
  template <bool kNext>
  __device__ __forceinline__ void step(Scores& scores, Scores& grad_weights, bool& masked, const QueryLimits& limits) {
    const int this_stage = stage();
    Operand weights, grads;
    // Declared here, or their last values would count as inputs of the products that overwrite them.
    [[maybe_unused]] Scores next_scores, next_grad_weights;
    convert_scores(grad_weights, grads);
    convert_scores<Traits::kAltered>(scores, weights);
    this->issue_keys(grad_values, weights, storage.grad_out[0]);
    this->issue_keys(grad_keys, grads, storage.queries[0]);
    ++position;
    if constexpr (kNext) {
      this->wait_stage();
      this->issue_scores(next_scores, storage.keys, storage.queries[0]);
      masked = read_info(storage.infos[stage()].masked, lane);
    }
    cute::warpgroup_wait<kNext ? 1 : 0>();
    cute::warpgroup_fence_operand(grad_values);
    cute::warpgroup_fence_operand(grad_keys);
    fence_operand(weights);
    fence_operand(grads);
    this->release_stage(this_stage);
    if constexpr (kNext) {
      this->issue_scores(next_grad_weights, storage.values, storage.grad_out[0]);
      const Statistics lse(storage.lse[stage()], lane);
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(next_scores);
      this->weigh(next_scores, lse, limits, masked);
      const Statistics delta(storage.delta[stage()], lane);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(next_grad_weights);
      this->differentiate(next_scores, next_grad_weights, delta, masked);
      scores = next_scores;
      grad_weights = next_grad_weights;
    }
  }

  // `skips`: the last stage is left out.
  __device__ __forceinline__ void run(const QueryLimits& limits, int stages, bool skips = false) {
    cute::clear(grad_keys);
    cute::clear(grad_values);
    if (stages == 0) return;
    stages -= skips;
    Scores scores, grad_weights;
    bool masked = this->start(scores, grad_weights, limits);
#pragma unroll 1
    for (; stages > 1; --stages) {
      // Made anew each time, descriptors of the tile's keys do not take registers from the loop.
      unit = uniform(opaque(unit));
      step<true>(scores, grad_weights, masked, limits);
    }
    if (lane == 0) {
      mbarrier_arrive(&storage.values_empty);
      mbarrier_arrive(&storage.keys_empty);
    }
    step<false>(scores, grad_weights, masked, limits);
    if (skips) {
      this->wait_stage();
      this->release_stage(stage());
      ++position;
    }
    ++this->tiles;
  }
};

}  // namespace hbsattn::sm90
