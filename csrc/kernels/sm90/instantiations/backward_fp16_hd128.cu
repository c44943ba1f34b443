#include "kernels/sm90/backward_launch.cuh"

namespace hbsattn::kernels {

template Status run_backward<Sm90Backward<DType::kFloat16, 128, 128>>(const BackwardParams&, Stream);
template int backward_shared_bytes<Sm90Backward<DType::kFloat16, 128, 128>>();

}  // namespace hbsattn::kernels
