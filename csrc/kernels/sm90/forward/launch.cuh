#pragma once

#include "kernels/sm90/forward/kernel.cuh"
#include "kernels/sm90/query_tiles/launch.cuh"

namespace hbsattn::kernels {

template <class Config>
int forward_shared_bytes() {
  return static_cast<int>(sizeof(typename sm90::QueryTileTraits<Config>::Storage));
}

template <class Config>
Status run_forward(const ForwardParams& params, Stream stream) {
  using Traits = sm90::QueryTileTraits<Config>;
  sm90::QueryTileArguments args{};
  bool general = false;
  HBSATTN_RETURN_IF_ERROR(set_arguments<Config>(params, false, args, general));
  args.cycles = reinterpret_cast<long long*>(params.cycles);
  auto* kernel = sm90::forward_kernel<Config, false>;
  if constexpr (Config::kWithGeneral) {
    if (general) kernel = sm90::forward_kernel<Config, true>;
  } else if (general) {
    return Status::NotSupported("tiles of " + std::to_string(Config::kTileM) +
                                " rows were planned for blocks that their kernel cannot take");
  }
  int ctas = 0;
  HBSATTN_RETURN_IF_ERROR(count_ctas(args, Config::kCtasPerSm, &ctas));
  // By a memset: it costs less than a kernel of its own. Behind the kernels of a plan, it would keep this one from
  // starting before they end.
  if (!params.workspace_is_clear && args.num_items > ctas) {
    HBSATTN_RETURN_IF_ERROR(cuda_status(cudaMemsetAsync(args.ticket, 0, sizeof(int), stream), "cudaMemsetAsync"));
  }
  return launch("the launch of the forward kernel", kernel, ctas, Traits::kThreads, forward_shared_bytes<Config>(),
                stream, args);
}

}  // namespace hbsattn::kernels
