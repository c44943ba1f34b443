#include "kernels/sm90/forward_launch.cuh"

namespace hbsattn::kernels {

using Config = Sm90Forward<DType::kFloat16, 64, 192>;

template Status run_forward<Config>(const ForwardParams& params, Stream stream);
template int forward_shared_bytes<Config>();

}  // namespace hbsattn::kernels
