#pragma once

#include <cutlass/arch/reg_reconfig.h>

#include "kernels/sm90/backward_queries/mainloop.cuh"
#include "kernels/sm90/query_tiles/barriers.cuh"
#include "kernels/sm90/query_tiles/producer.cuh"
#include "kernels/sm90/query_tiles/store.cuh"

namespace hbsattn::sm90 {

// Rows of a box of several heads that do not exist arrive as whatever follows; as 0, as others do, they add nothing to
// gradients of keys and values.
template <class Traits, bool kGeneral>
__device__ __forceinline__ void clear_absent_rows(const GradQueriesArguments& args, typename Traits::Storage& storage,
                                                  const WorkItem& item, int buffer, int unit, int warp, int lane) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = warp * 16 + lane / 4 + 8 * i;
    if (place_row<kGeneral>(args, item, unit * kUnitRows + row).count > 0) continue;
    for (int vector = lane & 3; vector < Traits::kHeadDim / 8; vector += 4) {
      constexpr int kVectors = Traits::kChunkBytes / 16;
      const int offset = (vector / kVectors * kUnitRows + row) * kVectors + vector % kVectors;
      reinterpret_cast<uint4*>(storage.queries[buffer][unit])[offset] = make_uint4(0, 0, 0, 0);
      reinterpret_cast<uint4*>(storage.grad_out[buffer][unit])[offset] = make_uint4(0, 0, 0, 0);
    }
  }
  cutlass::arch::fence_view_async_shared();
  cutlass::arch::NamedBarrier::sync(128, kUnit0 + unit);
}

template <class Traits, bool kGeneral>
__device__ __forceinline__ void run_backward_queries_consumer(const BackwardQueriesArguments& args,
                                                              typename Traits::Storage& storage, int unit, int warp,
                                                              int lane) {
  BackwardQueriesMainloop<Traits, kGeneral> mainloop(args, storage, unit, warp, lane);
  const int warp_row = unit * kUnitRows + warp * 16;
  float* all_sums = unit == 0 ? args.value_sums : args.key_sums;
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
    mainloop.key_end = item.k_len;
    mainloop.query_index = buffer.index * Traits::kUnits + unit;
    mainloop.sums = all_sums + (args.heads_per_key_head.div(item.head) * args.all_rows_k +
                                int64_t{item.sequence} * args.sum_batch_rows + item.k_begin) *
                                   Traits::kHeadDim;
    // The products over all queries read the other warpgroup's rows, too.
    mbarrier_wait(&storage.queries_full[buffer.index][0], buffer.parity);
    mbarrier_wait(&storage.queries_full[buffer.index][1], buffer.parity);
    if (kGeneral && args.box_heads > 1) {
      clear_absent_rows<Traits, kGeneral>(args, storage, item, buffer.index, unit, warp, lane);
    }
    mainloop.run(limits, rows, stages, masked_stages, clean_end);
    mainloop.scale(rows);
    // The output comes to lie over the queries.
    mainloop.wait_released(mainloop.position - 1);
    leave_output<Traits, typename Traits::MmaQueries>(storage, mainloop.grad_queries, unit, buffer.index, warp, lane);
    buffer.advance();
  }
}

// The forward's CTA with other consumers.
template <class Config, bool kGeneral>
__global__ void __launch_bounds__(BackwardQueriesTraits<Config>::kThreads, Config::kCtasPerSm)
    backward_queries_kernel(const __grid_constant__ BackwardQueriesArguments args) {
  using Traits = BackwardQueriesTraits<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  const int warp = uniform(threadIdx.x / 32), lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int i = 0; i < Traits::kSharedBuffers; ++i) {
      mbarrier_init(&storage.shared_full[i], Traits::kConsumerWarps);
      mbarrier_init(&storage.shared_empty[i], Traits::kConsumerWarps);
    }
    init_barriers<Traits, kGeneral>(storage);
    prefetch_tensor_maps(args);
    cute::prefetch_tma_descriptor(&args.map_grad_out);
  }
  wait_for_earlier_kernels();
  __syncthreads();

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == 0) {
    cutlass::arch::warpgroup_reg_dealloc<Config::kProducerRegisters>();
    run_producer<Traits, kGeneral>(args, storage, warp, lane);
  } else {
    cutlass::arch::warpgroup_reg_alloc<Config::kConsumerRegisters>();
    run_backward_queries_consumer<Traits, kGeneral>(args, storage, warpgroup - 1, warp % 4, lane);
  }
}

}  // namespace hbsattn::sm90
