#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace hbsattn::sm90 {

// Named barriers (CUTLASS keeps the first eight of the sixteen for itself).
enum TurnBarrier : uint32_t {
  kTurn0 = 0,  // the tensor cores are consumer warpgroup 0's
  kTurn1 = 1,  //                              warpgroup 1's
};

// Ping-pong between two consumer warpgroups: one computes its softmax while the other has the tensor cores. With one
// warpgroup, the other CTA of the multiprocessor fills the gaps.
template <int kUnits>
struct Turn {
  static constexpr uint32_t kThreads = 128 * kUnits;
  uint32_t mine, others;

  __device__ __forceinline__ explicit Turn(int unit)
      : mine(unit == 0 ? kTurn0 : kTurn1), others(unit == 0 ? kTurn1 : kTurn0) {
    // The first turn is unit 0's.
    if (kUnits > 1 && unit == 1) cutlass::arch::NamedBarrier::arrive(kThreads, kTurn0);
  }
  __device__ __forceinline__ void take() const {
    if constexpr (kUnits > 1) cutlass::arch::NamedBarrier::sync(kThreads, mine);
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (kUnits > 1) cutlass::arch::NamedBarrier::arrive(kThreads, others);
  }
};

}  // namespace hbsattn::sm90
