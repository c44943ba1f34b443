#pragma once

#include <algorithm>
#include <type_traits>

#include "kernels/common/key_tiles_launch.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "kernels/rows/rows.h"
#include "kernels/sm80/backward_keys/by_keys_kernel.cuh"
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

// What a kernel of either form gets of a call.
template <class Config>
void fill_backward_keys(const BackwardParams& params, const BackwardWorkspace& workspace, const DevicePolicy& policy,
                        sm80::BackwardKeysArguments& args) {
  const ForwardParams& problem = params.problem;
  fill_key_tiles(params, workspace, policy, Config::kTileM, args);
  args.q = tensor_rows(problem, problem.q);
  args.grad_out = tensor_rows(problem, params.grad_out);
  args.k = tensor_rows(problem, problem.k);
  args.v = tensor_rows(problem, problem.v);
  args.allow_tf32 = problem.allow_tf32;
  // A list may have room for more, which has no tiles.
  args.num_items = static_cast<int>(
      std::min<int64_t>(params.num_key_items,
                        size_key_list(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim,
                                      policy.element_size, params.deterministic, problem.rows_k, problem.packed, policy)
                            .items()));
}

// At least one CTA writes the keys that belong to no tile.
template <class Traits, class Arguments>
Status launch_key_tiles(const char* what, void (*kernel)(Arguments), const Arguments& args, Stream stream) {
  const auto ctas = static_cast<unsigned>(std::max(args.num_items, 1) * Traits::kCtasOfTile);
  return launch(what, kernel, ctas, Traits::kThreads, static_cast<int>(sizeof(typename Traits::Storage)), stream, args);
}

template <class Config>
Status run_sm80_backward_by_keys(const BackwardParams& params, const BackwardWorkspace& workspace,
                                 const DevicePolicy& policy, Stream stream) {
  constexpr bool kSplits = is_float32(Config::kDType);
  using ByKeys =
      std::conditional_t<kSplits, Config, Sm80BackwardByKeys<Config::kDType, Config::kHeadDim, Config::kTileRows>>;
  sm80::BackwardByKeysArguments args{};
  fill_backward_keys<ByKeys>(params, workspace, policy, args);
  args.grad_q = reinterpret_cast<float*>(static_cast<uint8_t*>(params.workspace) + workspace.sums);
  constexpr const char* kWhat = "the launch of the backward kernel";
  if constexpr (kSplits) {
    HBSATTN_RETURN_IF_ERROR(launch_key_tiles<sm80::AddingBackwardKeysTraits<Config>>(
        kWhat, sm80::backward_keys_kernel<Config, false, true>, args, stream));
  } else {
    HBSATTN_RETURN_IF_ERROR(launch_key_tiles<sm80::BackwardByKeysTraits<ByKeys>>(
        kWhat, sm80::backward_by_keys_kernel<ByKeys>, args, stream));
  }
  return finish_rows(params, workspace, Config::kHeadDim, stream);
}

// For kByKeysAndQueries, run_sm80_grad_queries follows.
template <class Config>
Status run_sm80_backward_keys(const BackwardParams& params, Stream stream) {
  const DevicePolicy policy = current_policy(params);
  const BackwardMethod method = choose_backward_method(params, policy);
  const BackwardWorkspace workspace = lay_out_backward(params, Config::kHeadDim, method, policy);
  HBSATTN_RETURN_IF_ERROR(prepare_rows(params, workspace, stream));
  if constexpr (Config::kHeadDim <= kSm80AddingHeadDim) {
    if (method == BackwardMethod::kByKeys) {
      return run_sm80_backward_by_keys<Config>(params, workspace, policy, stream);
    }
  }
  sm80::BackwardKeysArguments args{};
  fill_backward_keys<Config>(params, workspace, policy, args);
  const bool altered = is_altered(params.problem);
  void (*kernel)(sm80::BackwardKeysArguments) = nullptr;
  if constexpr (Config::kHeldColumns > 0) {
    kernel = altered ? sm80::wide_backward_keys_kernel<Config, true> : sm80::wide_backward_keys_kernel<Config, false>;
  } else {
    kernel = altered ? sm80::backward_keys_kernel<Config, true> : sm80::backward_keys_kernel<Config, false>;
  }
  return launch_key_tiles<Sm80BackwardKeysTraits<Config>>("the launch of the kernel for grad_k and grad_v", kernel,
                                                          args, stream);
}

}  // namespace hbsattn::kernels
