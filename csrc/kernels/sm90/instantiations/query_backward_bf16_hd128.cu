#include "kernels/sm90/query_backward_launch.cuh"

namespace hbsattn::kernels {

using Config = Sm90QueryBackward<DType::kBFloat16, 128>;

template Status run_query_backward<Config>(const BackwardParams& params, Stream stream);
template int query_backward_shared_bytes<Config>();

}  // namespace hbsattn::kernels
