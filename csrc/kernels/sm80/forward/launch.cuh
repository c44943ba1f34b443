#pragma once

#include "kernels/sm80/forward/kernel.cuh"
#include "kernels/sm80/query_tiles/launch.cuh"

namespace hbsattn::kernels {

template <class Config>
int sm80_forward_shared_bytes() {
  return sm80_shared_bytes<Config, typename sm80::QueryTileTraits<Config>::Storage>();
}

template <class Config>
Status run_sm80_forward(const ForwardParams& params, Stream stream) {
  sm80::QueryTileArguments args{};
  fill_arguments<Config>(params, args);
  HBSATTN_RETURN_IF_ERROR(record_cycles_of(params, args));
  auto* kernel = alters_weights(params) ? sm80::forward_kernel<Config, true> : sm80::forward_kernel<Config, false>;
  return launch_query_tiles<Config>("the launch of the forward kernel", kernel, args,
                                    sm80_forward_shared_bytes<Config>(), stream);
}

}  // namespace hbsattn::kernels
