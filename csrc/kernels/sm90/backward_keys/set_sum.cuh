#pragma once

#include <cute/tensor.hpp>

#include "kernels/common/ptx.cuh"
#include "kernels/sm90/backward_keys/traits.cuh"

namespace hbsattn::sm90 {

// First key, in the tile, of the 16 whose gradients a warp has; two warpgroups of wide kernels have half the columns
// each.
template <class Traits>
__device__ __forceinline__ int first_key_of_warp(int unit, int warp) {
  return (Traits::kWide ? 0 : unit * kUnitKeys) + warp * kGranule;
}

// How gradients of keys are summed over the sets of queries that read them, of which each has a tile of its own:
// one warp after the other, in the order in which they come, adds what those before it have, and leaves the sum in the
// workspace. The last keeps it.
template <class Traits>
struct SetSum {
  static constexpr int kLeftShift = 16;
  static constexpr uint32_t kComeMask = (1u << kLeftShift) - 1;
  static constexpr int kRowFloats = 2 * Traits::kHeadDim;

  uint32_t* counter;  // of those that have come, and, from kLeftShift on, of those that have left their sum
  float* sums;        // of the warp's first row and its columns: of keys, then of values
  int rows;           // of the warp, that exist
  uint32_t sets;

  __device__ __forceinline__ SetSum(const BackwardKeysArguments& args, const KeyItem& item, int unit, int warp_key)
      : rows(uniform(item.keys) - warp_key), sets(args.sets_per_key_head) {
    const int64_t head = item.query_set / args.sets_per_key_head;
    const int64_t row = head * args.all_rows_k + int64_t{item.sequence} * args.sum_batch_rows + item.k_begin +
                        item.first_key + warp_key;
    counter = args.set_counters + (Traits::kWide ? row * Traits::kUnits + unit : row);
    sums = args.set_sums + row * kRowFloats + (Traits::kWide ? unit * Traits::kHeadDim : 0);
  }

  // Whether this warp is the last; its gradients are the sum of all then.
  template <class GradKeys, class GradValues>
  __device__ __forceinline__ bool add(int lane, GradKeys& grad_keys, GradValues& grad_values) const {
    if (rows <= 0) return false;
    const uint32_t turn = uniform(lane == 0 ? add_acquire(counter, 1) : 0);
    const uint32_t before = turn & kComeMask;
    if (before >= sets) return false;  // lengths lie: sequences share keys
    if (before > 0) {
      for (uint32_t left = turn >> kLeftShift; left < before;) left = uniform(load_acquire(counter)) >> kLeftShift;
      __syncwarp();  // each lane reads behind what lane 0 has acquired
      visit(lane, grad_keys, grad_values, [](const float4* theirs, float& a, float& b, float& c, float& d) {
        const float4 sum = __ldcg(theirs);
        a += sum.x;
        b += sum.y;
        c += sum.z;
        d += sum.w;
      });
    }
    if (before + 1 == sets) return true;
    visit(lane, grad_keys, grad_values,
          [](float4* mine, float a, float b, float c, float d) { __stcg(mine, make_float4(a, b, c, d)); });
    __syncwarp();
    if (lane == 0) add_release(counter, 1u << kLeftShift);
    return false;
  }

 private:
  // Four columns of a lane, of two groups of 8, lie side by side.
  template <class GradKeys, class GradValues, class Each>
  __device__ __forceinline__ void visit(int lane, GradKeys& grad_keys, GradValues& grad_values, Each&& each) const {
    constexpr int kGroups = decltype(cute::size(grad_keys))::value / 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = lane / 4 + 8 * half;
      if (row >= rows) continue;
      float* place = sums + row * kRowFloats + lane % 4 * 4;
      const auto visit_groups = [&](auto& grad, int first_group) {
#pragma unroll
        for (int group = 0; group < decltype(cute::size(grad))::value / 4; group += 2) {
          const int first = 4 * group + 2 * half;
          each(reinterpret_cast<float4*>(place + 8 * (first_group + group)), grad(first), grad(first + 1),
               grad(first + 4), grad(first + 5));
        }
      };
      visit_groups(grad_keys, 0);
      visit_groups(grad_values, kGroups);
    }
  }
};

}  // namespace hbsattn::sm90
