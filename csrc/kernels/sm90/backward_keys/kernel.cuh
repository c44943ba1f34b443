#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include <type_traits>

#include "kernels/sm90/backward_keys/mainloop.cuh"
#include "kernels/sm90/backward_keys/mainloop_keys_only.cuh"
#include "kernels/sm90/backward_keys/mainloop_wide.cuh"
#include "kernels/sm90/backward_keys/producer.cuh"
#include "kernels/sm90/backward_keys/store.cuh"

namespace hbsattn::sm90 {

template <class Traits>
__device__ __forceinline__ void init_barriers(typename Traits::Storage& storage) {
  for (int i = 0; i < Traits::kTileSlots; ++i) {
    mbarrier_init(&storage.tile_full[i], 1);
    mbarrier_init(&storage.tile_empty[i], kWarpArrivals * Traits::kTileReaders);
  }
  mbarrier_init(&storage.tile_wanted, 1);
  mbarrier_init(&storage.keys_full, 1);
  mbarrier_init(&storage.keys_empty, Traits::kConsumerWarps);
  mbarrier_init(&storage.values_full, 1);
  mbarrier_init(&storage.values_empty, Traits::kConsumerWarps);
  for (int i = 0; i < Traits::kStages; ++i) {
    mbarrier_init(&storage.full[i], 32);  // every lane writes what it tells of a stage
    mbarrier_init(&storage.empty[i], kWarpArrivals * Traits::kConsumerWarps);
  }
  for (int group = 0; group < Traits::kGradGroups; ++group) {
    for (int i = 0; i < Traits::kGradBuffers; ++i) {
      mbarrier_init(&storage.grad_scores_full[group][i], Traits::kConsumerWarps / Traits::kGradGroups);
      mbarrier_init(&storage.grad_scores_empty[group][i], Traits::kConsumerWarps / Traits::kGradGroups);
    }
  }
  mbarrier_init_fence();
}

template <class Traits, class Mainloop>
__device__ __forceinline__ void run_key_consumer(const BackwardKeysArguments& args, typename Traits::Storage& storage,
                                                 int unit, int warp, int lane) {
  Mainloop mainloop(args, storage, unit, warp, lane);
  const int warp_key = first_key_of_warp<Traits>(unit, warp);
  RingPosition<Traits::kTileSlots> slot(0);
  while (true) {
    mbarrier_wait(&storage.tile_full[slot.index], slot.parity);
    const KeyTileSlot& tile = storage.tiles[slot.index];
    if (uniform(tile.item.column) < 0) break;
    if (drops_weights<Traits>(args)) mainloop.dropout = KeyDropout(tile.item, warp_key);
    if constexpr (Traits::kPartial) mainloop.partial_keys = PartialKeys(tile.item, warp_key);
    const QueryLimits limits(args, tile.item, warp_key, lane);
    if constexpr (Traits::kSkips) {
      mainloop.run(limits, uniform(tile.stages), unit == 1 && uniform(tile.skips));
    } else {
      mainloop.run(limits, uniform(tile.stages));
    }
    if (uniform(tile.item.parts) == 1 ||
        add_parts<Traits>(args, storage, tile.item, unit, warp, lane, mainloop.grad_keys, mainloop.grad_values)) {
      leave_keys<Traits>(args, storage, tile.item, unit, warp, lane, mainloop.grad_keys, mainloop.grad_values);
    }
    mbarrier_arrive_warp(&storage.tile_empty[slot.index], lane);
    slot.advance();
  }
  if constexpr (!Traits::kWide) bulk_wait_read(lane);
}

// A persistent CTA: four producer warps, and one or two consumer warpgroups. kWithQueries: it also adds up the
// gradient of the queries.
template <class Config, bool kWithQueries>
__global__ void __launch_bounds__(BackwardKeysTraits<Config>::kThreads, Config::kCtasPerSm)
    backward_keys_kernel(const __grid_constant__ BackwardKeysArguments args) {
  using Traits = BackwardKeysTraits<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init_barriers<Traits>(storage);
    prefetch_tensor_maps(args);
  }
  wait_for_earlier_kernels();
  __syncthreads();

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    if (warp == 0) {
      const auto run = [&](auto ruled) {
        if (args.chunks.stack.heads > 1) {
          run_query_warp<Traits, true, ruled.value>(args, storage, lane);
        } else {
          run_query_warp<Traits, false, ruled.value>(args, storage, lane);
        }
      };
      if (args.mask.ruled) {
        run(std::true_type{});
      } else {
        run(std::false_type{});
      }
    } else if (warp == 1) {
      run_key_warp<Traits>(args, storage, lane);
    } else if (warp == 2) {
      run_tile_warp<Traits>(args, storage, lane);
    } else {
      write_key_gaps(args, lane);
    }
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    choose_consumer<Traits>(args, [&](auto traits) __attribute__((always_inline)) {
      using Own = decltype(traits);
      using Narrow = std::conditional_t<kWithQueries, BackwardKeysMainloop<Own>, KeysOnlyMainloop<Own>>;
      using Mainloop = std::conditional_t<Traits::kWide, BackwardKeysMainloopWide<Own, kWithQueries>, Narrow>;
      run_key_consumer<Own, Mainloop>(args, storage, warpgroup - 1, warp % 4, lane);
    });
  }
}

}  // namespace hbsattn::sm90
