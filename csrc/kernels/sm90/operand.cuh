#pragma once

#include <cute/arch/mma_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "kernels/common/convert.cuh"

// First operands of products that lie in registers: what accumulators hold, rounded, in the same order.

namespace hbsattn::sm90 {

// Makes a first operand of scores. kPositive: with 0 for those that are negative.
template <bool kPositive = false, class Scores, class Operand>
__device__ __forceinline__ void convert_scores(const Scores& scores, Operand& operand) {
  using Element = typename Operand::value_type;
  auto registers = cute::recast<uint32_t>(operand);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(registers); ++i) {
    const float low = scores(2 * i), high = scores(2 * i + 1);
    registers(i) = kPositive ? pack_positive<Element>(low, high) : pack_pair<Element>(low, high);
  }
}

template <class Operand>
__device__ __forceinline__ void fence_operand(Operand& operand) {
  auto registers = cute::recast<uint32_t>(operand);
  CUTE_UNROLL
  for (int i = 0; i < cute::size(registers); ++i) cute::warpgroup_fence_operand(registers(i));
}

}  // namespace hbsattn::sm90
