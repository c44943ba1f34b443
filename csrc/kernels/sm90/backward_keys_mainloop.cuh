#pragma once

#include "kernels/sm90/backward_mainloop.cuh"

// The mainloop without dQ, for calls that compute it elsewhere. What remains needs no other warpgroup.

namespace hbsattn::sm90 {

template <class Traits>
struct KeysMainloop : BackwardMainloop<Traits> {
  using Base = BackwardMainloop<Traits>;
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

  __device__ __forceinline__ void run(const QueryLimits& limits, int stages) {
    cute::clear(grad_keys);
    cute::clear(grad_values);
    if (stages == 0) return;
    Scores scores, grad_weights;
    mbarrier_wait(&storage.keys_full, this->tiles & 1);
    this->wait_stage();
    this->issue_scores(scores, storage.keys, storage.queries[0]);
    this->issue_scores(grad_weights, storage.values, storage.grad_out[0]);
    bool masked = read_info(storage.infos[stage()].masked, lane);
    const Statistics first_lse(storage.lse[stage()], lane);
    cute::warpgroup_wait<1>();
    cute::warpgroup_fence_operand(scores);
    if (masked) mask_queries(scores, storage.infos[stage()], 0, limits, lane);
    this->exponentiate(scores, first_lse);
    const Statistics first_delta(storage.delta[stage()], lane);
    cute::warpgroup_wait<0>();
    cute::warpgroup_fence_operand(grad_weights);
    this->differentiate(scores, grad_weights, first_delta, masked);
#pragma unroll 1
    while (true) {
      // Made anew each time, descriptors of the tile's keys do not take registers from the loop.
      unit = uniform(opaque(unit));
      const int this_stage = stage();
      Operand weights, grads;
      // Declared here, or their last values would count as inputs of the products that overwrite them.
      Scores next_scores, next_grad_weights;
      convert_scores(grad_weights, grads);
      convert_scores(scores, weights);
      this->issue_keys(grad_values, weights, storage.grad_out[0]);
      this->issue_keys(grad_keys, grads, storage.queries[0]);
      ++position;
      // Behind the last stage, products of whatever lies there: ptxas wants the same products in flight on every path.
      if (--stages > 0) this->wait_stage();
      this->issue_scores(next_scores, storage.keys, storage.queries[0]);
      masked = read_info(storage.infos[this->info_stage(stages)].masked, lane);
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(grad_values);
      cute::warpgroup_fence_operand(grad_keys);
      fence_operand(weights);
      fence_operand(grads);
      this->release_stage(this_stage);
      if (stages == 0 && lane == 0) mbarrier_arrive(&storage.keys_empty);
      this->issue_scores(next_grad_weights, storage.values, storage.grad_out[0]);
      const Statistics lse(storage.lse[this->info_stage(stages)], lane);
      cute::warpgroup_wait<1>();
      cute::warpgroup_fence_operand(next_scores);
      if (masked) mask_queries(next_scores, storage.infos[this->info_stage(stages)], 0, limits, lane);
      this->exponentiate(next_scores, lse);
      const Statistics delta(storage.delta[this->info_stage(stages)], lane);
      cute::warpgroup_wait<0>();
      cute::warpgroup_fence_operand(next_grad_weights);
      this->differentiate(next_scores, next_grad_weights, delta, masked);
      scores = next_scores;
      grad_weights = next_grad_weights;
      if (stages == 0) break;
    }
    ++this->tiles;
  }
};

}  // namespace hbsattn::sm90
