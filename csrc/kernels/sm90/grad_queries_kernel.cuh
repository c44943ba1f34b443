#pragma once

#include "kernels/sm90/forward_kernel.cuh"
#include "kernels/sm90/grad_queries_mainloop.cuh"

namespace hbsattn::sm90 {

template <class Traits, bool kGeneral>
__device__ __forceinline__ void run_query_consumer(const GradQueriesArguments& args, typename Traits::Storage& storage,
                                                   int unit, int warp, int lane) {
  GradQueriesMainloop<Traits, kGeneral> mainloop(args, storage, lane);
  const int warp_row = unit * kUnitRows + warp * 16;
  for_each_tile<Traits, kGeneral>(
      args, storage, unit, warp, lane, [&](const WorkItem& item, int stages, int masked_stages, const auto& buffer) {
        const KeyLimits<kGeneral> limits(args, item, warp_row, lane);
        const auto rows = RowStatistics::load<kGeneral>(args, item, warp_row, lane);
        mbarrier_wait(&storage.queries_full[buffer.index][unit], buffer.parity);
        mainloop.run(limits, rows, stages, masked_stages, buffer.index * Traits::kUnits + unit);
        mainloop.scale(rows);
        leave_output<Traits>(storage, mainloop.grad_queries, unit, buffer.index, warp, lane);
      });
}

// The forward's CTA with other consumers.
template <class Config, bool kGeneral>
__global__ void __launch_bounds__(GradQueriesTraits<Config>::kThreads, Config::kCtasPerSm)
    grad_queries_kernel(const __grid_constant__ GradQueriesArguments args) {
  using Traits = GradQueriesTraits<Config>;
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& storage = *reinterpret_cast<typename Traits::Storage*>(shared);
  if (threadIdx.x == 0) init_barriers<Traits, kGeneral>(storage);
  run_roles<Config, Traits, kGeneral>(args, storage, [&](int unit, int warp, int lane) {
    run_query_consumer<Traits, kGeneral>(args, storage, unit, warp, lane);
  });
}

}  // namespace hbsattn::sm90
