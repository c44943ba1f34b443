#pragma once

#include <cmath>
#include <cute/tensor.hpp>

#include "kernels/common/ptx.cuh"
#include "plan/score_scale.h"

// Scores that end at a softcap. tanh.approx would take one instruction, but is off by 2^-11: a cap of 50 by 0.02.

namespace hbsattn {

// All roundings are spelled out, so that each place where these are compiled gives the same.
__device__ __forceinline__ float cap_near_zero(const ScoreCap& cap, float product) {
  const float square = __fmul_rn(product, product);
  return __fmul_rn(product, __fmaf_rn(square, __fmaf_rn(square, cap.fifth, cap.cubic), cap.linear));
}

// 1 - 2 / (exp(2x) + 1), which cancels near 0.
__device__ __forceinline__ float cap_away_from_zero(const ScoreCap& cap, float product) {
  const float power = exp2_approx(__fmul_rn(product, __fmul_rn(cap.scale, static_cast<float>(2 * M_LOG2E))));
  return __fmaf_rn(-2.f, reciprocal_approx(__fadd_rn(power, 1.f)), 1.f);
}

// Turns products into their tanh(cap.scale * product), to a few units in the last place. Most scores lie well below
// their cap: a warp that has no others is spared two special functions for each.
template <class Scores>
__device__ __forceinline__ void cap_scores(Scores& scores, const ScoreCap& cap) {
  float largest = 0.f;
  CUTE_UNROLL
  for (int i = 0; i < cute::size(scores); ++i) largest = fmaxf(largest, fabsf(scores(i)));
  if (__any_sync(0xffffffffu, largest >= cap.near)) {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) {
      const float near = cap_near_zero(cap, scores(i)), far = cap_away_from_zero(cap, scores(i));
      scores(i) = fabsf(scores(i)) < cap.near ? near : far;
    }
  } else {
    CUTE_UNROLL
    for (int i = 0; i < cute::size(scores); ++i) scores(i) = cap_near_zero(cap, scores(i));
  }
}

// The derivative of the cap, of a weight exp2(scale_log2 * x - lse) whose capped score is scale_log2 * x. A weight that
// was dropped is negative. Where a weight is 0, so is what it is multiplied by.
__device__ __forceinline__ float slope_of_cap(float weight, float lse, float inverse_scale_log2) {
  const float x = (log2_approx(fabsf(weight)) + lse) * inverse_scale_log2;
  return fmaxf(1.f - x * x, 0.f);
}

}  // namespace hbsattn
