#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/grad_queries/mainloop.cuh"
#include "kernels/sm90/query_tiles/barriers.cuh"
#include "kernels/sm90/query_tiles/producer.cuh"
#include "kernels/sm90/query_tiles/store.cuh"

namespace hbsattn::sm90 {

template <class Traits, bool kGeneral>
__device__ __forceinline__ void run_query_consumer(const GradQueriesArguments& args, typename Traits::Storage& storage,
                                                   int unit, int warp, int lane) {
  GradQueriesMainloop<Traits, kGeneral> mainloop(args, storage, lane);
  const int warp_row = unit * kUnitRows + warp * 16;
  RingPosition<Traits::kTileSlots> slot(0);
  RingPosition<Traits::kQueryBuffers> buffer(0);
  while (true) {
    const WorkItem item = wait_tile(storage, slot).item;
    const int stages = uniform(storage.tiles[slot.index].stages);
    const int masked_stages = uniform(storage.tiles[slot.index].masked_stages);
    const int clean_end = uniform(storage.tiles[slot.index].clean_end);
    const TileRule rule = storage.tiles[slot.index].rule;
    release_tile(storage, slot, lane);
    if (uniform(item.bit_row) < 0) break;
    if (stages == 0) {
      write_empty_tile<Traits, kGeneral>(args, item, unit, warp, lane);
      continue;
    }
    const KeyLimits<kGeneral> limits(args, item, rule, buffer.index, warp_row, lane);
    const auto rows = RowStatistics::load<kGeneral>(args, item, warp_row, lane);
    if (drops_weights<Traits>(args)) {
      leave_rows(args, item, warp_row, lane, &storage.dropout_rows[warp_row]);
    }
    if constexpr (Traits::kPartial) mainloop.partial.rows = PartialRows(args, item, limits);
    mbarrier_wait(&storage.queries_full[buffer.index][unit], buffer.parity);
    mainloop.run(limits, rows, stages, masked_stages, clean_end, buffer.index * Traits::kUnits + unit);
    mainloop.scale(rows);
    leave_output<Traits, typename Traits::MmaQueries>(storage, mainloop.grad_queries, unit, buffer.index, warp, lane);
    buffer.advance();
  }
}

// The forward's CTA with other consumers.
template <class Config, bool kGeneral>
__global__ void __launch_bounds__(GradQueriesTraits<Config>::kThreads, Config::kCtasPerSm)
    grad_queries_kernel(const __grid_constant__ GradQueriesArguments args) {
  using Traits = GradQueriesTraits<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init_barriers<Traits, kGeneral>(storage);
    prefetch_tensor_maps(args);
    cute::prefetch_tma_descriptor(&args.map_grad_out);
  }
  if (!args.beside_keys) wait_for_earlier_kernels();
  __syncthreads();

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    run_producer<Traits, kGeneral>(args, storage, warp, lane);
    if (args.beside_keys) wait_for_earlier_kernels();
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    choose_consumer<Traits>(args, [&](auto traits) __attribute__((always_inline)) {
      run_query_consumer<decltype(traits), kGeneral>(args, storage, warpgroup - 1, warp % 4, lane);
    });
  }
}

}  // namespace hbsattn::sm90
