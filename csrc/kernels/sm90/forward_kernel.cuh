#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/forward_epilogue.cuh"
#include "kernels/sm90/forward_mainloop.cuh"
#include "kernels/sm90/forward_producer.cuh"

namespace hbsattn::sm90 {

template <class Traits, bool kGeneral>
__device__ __forceinline__ void init_barriers(typename Traits::Storage& storage) {
  for (int i = 0; i < Traits::kKeyStages; ++i) {
    mbarrier_init(&storage.keys_full[i], kGeneral ? 32 : 1);  // those who write granules
    mbarrier_init(&storage.keys_empty[i], Traits::kConsumerWarps);
  }
  for (int i = 0; i < Traits::kValueStages; ++i) {
    mbarrier_init(&storage.values_full[i], 1);
    mbarrier_init(&storage.values_empty[i], Traits::kConsumerWarps);
  }
  for (int i = 0; i < Traits::kQueryBuffers; ++i) {
    for (int unit = 0; unit < Traits::kUnits; ++unit) {
      mbarrier_init(&storage.queries_full[i][unit], 1);
      mbarrier_init(&storage.output_full[i][unit], 4);
    }
  }
  for (int i = 0; i < Traits::kTileSlots; ++i) {
    mbarrier_init(&storage.tile_full[i], 1);
    mbarrier_init(&storage.tile_empty[i], kWarpArrivals * Traits::kTileReaders);
  }
  for (int i = 0; i < Traits::kSegmentSlots; ++i) {
    mbarrier_init(&storage.segments_full[i], 32);
    mbarrier_init(&storage.segments_empty[i], 2 * 32);  // the key warp and the value warp
  }
  mbarrier_init(&storage.tile_wanted, 1);
  mbarrier_init_fence();
}

template <class Traits, bool kGeneral>
__device__ __forceinline__ void run_consumer(const ForwardArguments& args, typename Traits::Storage& storage, int unit,
                                             int warp, int lane) {
  ForwardMainloop<Traits, kGeneral> mainloop(args, storage, unit, lane);
  RingPosition<Traits::kTileSlots> slot(0);
  RingPosition<Traits::kQueryBuffers> buffer(0);
  while (true) {
    const WorkItem item = wait_tile(storage, slot).item;
    const int stages = uniform(storage.tiles[slot.index].stages);
    const int masked_stages = uniform(storage.tiles[slot.index].masked_stages);
    release_tile(storage, slot, lane);
    if (uniform(item.bit_row) < 0) break;
    if (stages == 0) {
      write_empty_tile<Traits, kGeneral>(args, item, unit, warp, lane);
      continue;
    }
    const KeyLimits<kGeneral> limits(args, item, unit * kUnitRows + warp * 16, lane);
    mbarrier_wait(&storage.queries_full[buffer.index][unit], buffer.parity);
    mainloop.run(limits, stages, masked_stages, buffer.index * Traits::kUnits + unit);
    finish_tile<Traits, kGeneral>(args, storage, mainloop, item, buffer.index, warp);
    buffer.advance();
  }
}

// A persistent CTA: four producer warps and one to three consumer warpgroups, which meet at the barriers of Storage
// only. kGeneral: for ragged blocks, boxes of several heads and united blocks, which the fast path has no code for.
template <class Config, bool kGeneral>
__global__ void __launch_bounds__(ForwardTraits<Config>::kThreads, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ ForwardArguments args) {
  using Traits = ForwardTraits<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    if (args.cycles != nullptr) args.cycles[2 * blockIdx.x] = clock64();
    init_barriers<Traits, kGeneral>(storage);
  }
  __syncthreads();

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    run_producer<Traits, kGeneral>(args, storage, warp, lane);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    run_consumer<Traits, kGeneral>(args, storage, warpgroup - 1, warp % 4, lane);
    if (args.cycles != nullptr && threadIdx.x == 128) args.cycles[2 * blockIdx.x + 1] = clock64();
  }
}

}  // namespace hbsattn::sm90
