#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/forward/mainloop.cuh"
#include "kernels/sm90/query_tiles/barriers.cuh"
#include "kernels/sm90/query_tiles/producer.cuh"
#include "kernels/sm90/query_tiles/store.cuh"

namespace hbsattn::sm90 {

template <class Traits, bool kGeneral>
__device__ __forceinline__ void finish_tile(const QueryTileArguments& args, typename Traits::Storage& storage,
                                            ForwardMainloop<Traits, kGeneral>& mainloop, const WorkItem& item,
                                            int buffer, int warp) {
  const int unit = mainloop.unit, lane = mainloop.lane;

  float lse[2];
  mainloop.softmax.finish(mainloop.output, args.scale, Traits::kAltered ? args.dropout.scale : 1.f, lse);
  // Unless a box holds several heads, the rows of a warp lie in one, and one place tells them all. Found outside the
  // branch, it is computed while the last product still runs.
  const int warp_row = unit * kUnitRows + warp * 16;
  const RowPlace first = place_row<kSeveralBlocks<Traits, kGeneral>>(args, item, warp_row);
  if ((lane & 3) == 0) {
    float* destination = lse_of_row(args, item, first);
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const int in_warp = lane / 4 + 8 * row;
      if (kGeneral && args.box_heads > 1) {
        const RowPlace place = place_row<kGeneral>(args, item, warp_row + in_warp);
        if (place.count > 0) *lse_of_row(args, item, place) = lse[row];
      } else if (in_warp < first.count) {
        destination[in_warp] = lse[row];
      }
    }
  }

  leave_output<Traits, typename Traits::MmaPV>(storage, mainloop.output, unit, buffer, warp, lane);
}

template <class Traits, bool kGeneral>
__device__ __forceinline__ void run_consumer(const QueryTileArguments& args, typename Traits::Storage& storage,
                                             int unit, int warp, int lane) {
  ForwardMainloop<Traits, kGeneral> mainloop(args, storage, unit, lane);
  RingPosition<Traits::kTileSlots> slot(0);
  RingPosition<Traits::kQueryBuffers> buffer(0);
  [[maybe_unused]] int ring_begin = 0;  // of a pair's stages, in the rings of keys and values
  while (true) {
    const WorkItem item = wait_tile(storage, slot).item;
    const int stages = uniform(storage.tiles[slot.index].stages);
    [[maybe_unused]] const int masked_stages = uniform(storage.tiles[slot.index].masked_stages);
    [[maybe_unused]] const int clean_end = uniform(storage.tiles[slot.index].clean_end);
    const TileRule rule = storage.tiles[slot.index].rule;
    [[maybe_unused]] PairStages pair;
    if constexpr (Traits::kPairs) {
      const PairStages& announced = storage.tiles[slot.index].pair;
      pair.order = {uniform(announced.order.both),
                    {uniform(announced.order.alone[0]), uniform(announced.order.alone[1])}};
      for (int owner = 0; owner < Traits::kOwners; ++owner) pair.masked[owner] = uniform(announced.masked[owner]);
    }
    release_tile(storage, slot, lane);
    if (uniform(item.bit_row) < 0) break;
    if (stages == 0) {
      write_empty_tile<Traits, kGeneral>(args, item, unit, warp, lane);
      continue;
    }
    const typename ForwardMainloop<Traits, kGeneral>::Limits limits(args, item, rule, buffer.index,
                                                                    unit * kUnitRows + warp * 16, lane);
    if (drops_weights<Traits>(args)) {
      const int warp_row = unit * kUnitRows + warp * 16;
      leave_rows(args, item, warp_row, lane, &storage.dropout_rows[warp_row]);
    }
    if constexpr (Traits::kPartial) mainloop.partial.rows = PartialRows(args, item, limits);
    mbarrier_wait(&storage.queries_full[buffer.index][unit], buffer.parity);
    if constexpr (Traits::kPairs) {
      mainloop.run_pair(limits, item, pair, ring_begin, buffer.index * Traits::kUnits + unit);
      ring_begin = (ring_begin + stages) % Traits::kKeyStages;
    } else {
      mainloop.run(limits, item, stages, masked_stages, clean_end, buffer.index * Traits::kUnits + unit);
    }
    finish_tile<Traits, kGeneral>(args, storage, mainloop, item, buffer.index, warp);
    buffer.advance();
  }
}

// A persistent CTA: four producer warps and one to three consumer warpgroups, which meet at the barriers of Storage
// only. kGeneral: for ragged blocks, boxes of several heads and united blocks, which the fast path has no code for.
template <class Config, bool kGeneral>
__global__ void __launch_bounds__(QueryTileTraits<Config>::kThreads, Config::kCtasPerSm)
    forward_kernel(const __grid_constant__ QueryTileArguments args) {
  using Traits = QueryTileTraits<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    init_barriers<Traits, kGeneral>(storage);
    prefetch_tensor_maps(args);
  }
  wait_for_earlier_kernels();
  if (args.cycles != nullptr && threadIdx.x == 0) record_cycles(args, false);
  __syncthreads();

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    run_producer<Traits, kGeneral>(args, storage, warp, lane);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    choose_consumer<Traits>(args, [&](auto traits) __attribute__((always_inline)) {
      run_consumer<decltype(traits), kGeneral>(args, storage, warpgroup - 1, warp % 4, lane);
    });
    if (args.cycles != nullptr && threadIdx.x % 128 == 0) record_cycles(args, true);
  }
}

}  // namespace hbsattn::sm90
