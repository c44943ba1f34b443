#pragma once

#include <cutlass/arch/barrier.h>

#include <cstdint>

namespace hbsattn::sm90 {

// Named barriers (CUTLASS keeps the first eight of the sixteen for itself).
enum TurnBarrier : uint32_t {
  kTurn0 = 0,  // the tensor cores are consumer warpgroup 0's
  kTurn1 = 1,  //                              warpgroup 1's
  kTurn2 = 2,  //                              warpgroup 2's
};

// Consumer warpgroups take turns: one has the tensor cores while others compute their softmax. With one, there is
// nobody to take turns with: the other CTA of the multiprocessor fills the gaps.
template <int kUnits>
struct Turn {
  static constexpr uint32_t kThreads = 2 * 128;  // of who waits for a turn and who passes it on
  uint32_t mine, next;

  __device__ __forceinline__ explicit Turn(int unit)
      : mine(kTurn0 + unit), next(unit == kUnits - 1 ? kTurn0 : kTurn0 + unit + 1) {
    // The first turn is unit 0's.
    if (kUnits > 1 && unit == kUnits - 1) cutlass::arch::NamedBarrier::arrive(kThreads, kTurn0);
  }
  __device__ __forceinline__ void take() const {
    if constexpr (kUnits > 1) cutlass::arch::NamedBarrier::sync(kThreads, mine);
  }
  __device__ __forceinline__ void pass() const {
    if constexpr (kUnits > 1) cutlass::arch::NamedBarrier::arrive(kThreads, next);
  }
};

}  // namespace hbsattn::sm90
