#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/common/key_tiles_launch.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "kernels/rows/rows.h"
#include "kernels/sm80/backward_keys/wide.cuh"
#include "kernels/sm80/query_tiles/launch.cuh"
#include "plan/lists.h"

namespace hbsattn::kernels {

template <class Config>
using Sm80BackwardKeysTraits = std::conditional_t<(Config::kHeldColumns > 0), sm80::WideBackwardKeysTraits<Config>,
                                                  sm80::BackwardKeysTraits<Config>>;

template <class Config>
int sm80_backward_keys_shared_bytes() {
  return sm80_shared_bytes<Config, typename Sm80BackwardKeysTraits<Config>::Storage>();
}

// For kByKeysAndQueries, run_sm80_grad_queries follows.
template <class Config>
Status run_sm80_backward_keys(const BackwardParams& params, Stream stream) {
  using Traits = Sm80BackwardKeysTraits<Config>;
  const ForwardParams& problem = params.problem;
  const DevicePolicy policy = current_policy(params);
  const BackwardMethod method = choose_backward_method(params, policy);
  const BackwardWorkspace workspace = lay_out_backward(params, Config::kHeadDim, method, policy);
  sm80::BackwardKeysArguments args{};
  fill_key_tiles(params, workspace, policy, Config::kTileM, args);
  args.q = tensor_rows(problem, problem.q);
  args.grad_out = tensor_rows(problem, params.grad_out);
  args.k = tensor_rows(problem, problem.k);
  args.v = tensor_rows(problem, problem.v);

  // A list may have room for more, which has no tiles.
  args.num_items = static_cast<int>(
      std::min<int64_t>(params.num_key_items,
                        size_key_list(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim,
                                      policy.element_size, params.deterministic, problem.rows_k, problem.packed, policy)
                            .items()));

  HBSATTN_RETURN_IF_ERROR(prepare_rows(params, workspace, stream));
  void (*kernel)(sm80::BackwardKeysArguments) = nullptr;
  if constexpr (Config::kHeldColumns > 0) {
    kernel = alters_weights(problem) ? sm80::wide_backward_keys_kernel<Config, true>
                                     : sm80::wide_backward_keys_kernel<Config, false>;
  } else {
    kernel =
        alters_weights(problem) ? sm80::backward_keys_kernel<Config, true> : sm80::backward_keys_kernel<Config, false>;
  }
  // At least one CTA writes the keys that belong to no tile.
  const auto ctas = static_cast<unsigned>(std::max(args.num_items, 1) * Traits::kCtasOfTile);
  return launch("the launch of the kernel for grad_k and grad_v", kernel, ctas, Traits::kThreads,
                sm80_backward_keys_shared_bytes<Config>(), stream, args);
}

}  // namespace hbsattn::kernels
