#include "kernels/sm90/grad_queries_launch.cuh"

namespace hbsattn::kernels {

using Config = Sm90GradQueries<DType::kBFloat16, 256, 128>;

template Status run_grad_queries<Config>(const BackwardParams& params, Stream stream);
template int grad_queries_shared_bytes<Config>();

}  // namespace hbsattn::kernels
