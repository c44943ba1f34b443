#pragma once

#include "kernels/sm80/forward/kernel.cuh"
#include "kernels/sm80/query_tiles/launch.cuh"

namespace hbsattn::kernels {

// What a CTA takes, with stages of keys and values of that number.
template <class Config>
constexpr int sm80_forward_bytes(int stages) {
  using Storage = typename sm80::QueryTileTraits<Config>::Storage;
  constexpr int kStage = 2 * sizeof(Storage::keys[0]);
  return static_cast<int>(sizeof(Storage)) - (Config::kStages - stages) * kStage;
}

template <class Config>
int sm80_forward_shared_bytes() {
  return sm80_least_shared_bytes<Config, sm80_forward_bytes<Config>(1)>();
}

template <class Config>
Status launch_sm80_forward(const ForwardParams& params, Sm80SharedClass device, Stream stream) {
  constexpr int kOne = sm80_forward_bytes<Config>(1), kTwo = sm80_forward_bytes<Config>(2);
  const auto ctas = [&](int bytes) { return std::min(device.count(bytes), Config::kCtasPerSm); };
  sm80::QueryTileArguments args{};
  fill_arguments<Config>(params, args);
  args.two_stages = Config::kStages == 2 && ctas(kTwo) == ctas(kOne);
  HBSATTN_RETURN_IF_ERROR(record_cycles_of(params, args));
  auto* kernel = is_altered(params) ? sm80::forward_kernel<Config, true> : sm80::forward_kernel<Config, false>;
  return launch_query_tiles<Config>("the launch of the forward kernel", kernel, args, args.two_stages ? kTwo : kOne,
                                    stream);
}

template <class Config>
Status run_sm80_forward(const ForwardParams& params, Stream stream) {
  const int most = block_shared_bytes();
  const Sm80SharedClass device{most, most + Sm80SharedClass::kReserved};
  if constexpr (kHasSmallForward<Config>) {
    static_assert(kSm80Shared99.count(sm80_forward_bytes<Sm80SmallForward<Config>>(1)) >= Config::kCtasPerSm);
    if (device.count(sm80_forward_bytes<Config>(1)) < Config::kCtasPerSm) {
      return launch_sm80_forward<Sm80SmallForward<Config>>(params, device, stream);
    }
  }
  return launch_sm80_forward<Config>(params, device, stream);
}

}  // namespace hbsattn::kernels
