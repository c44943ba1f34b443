#include "kernels/sm90/backward_launch.cuh"

namespace hbsattn::kernels {

template Status run_backward<Sm90Backward<DType::kBFloat16, 96, 64>>(const BackwardParams&, Stream);
template int backward_shared_bytes<Sm90Backward<DType::kBFloat16, 96, 64>>();

}  // namespace hbsattn::kernels
