#include "kernels/sm90/grad_queries_launch.cuh"

namespace hbsattn::kernels {

using Config = Sm90GradQueries<DType::kFloat16, 64, 128>;

template Status run_grad_queries<Config>(const BackwardParams& params, Stream stream);
template int grad_queries_shared_bytes<Config>();

}  // namespace hbsattn::kernels
