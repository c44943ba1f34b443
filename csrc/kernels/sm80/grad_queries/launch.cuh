#pragma once

#include <type_traits>

#include "kernels/rows/rows.h"
#include "kernels/sm80/grad_queries/wide.cuh"
#include "kernels/sm80/query_tiles/launch.cuh"
#include "plan/workspace.h"

namespace hbsattn::kernels {

template <class Config>
using Sm80GradQueriesTraits =
    std::conditional_t<(Config::kShare > 1), sm80::WideGradQueriesTraits<Config>, sm80::GradQueriesTraits<Config>>;

template <class Config>
int sm80_grad_queries_shared_bytes() {
  return sm80_shared_bytes<Config, typename Sm80GradQueriesTraits<Config>::Storage>();
}

// Follows run_sm80_backward_keys, which prepares the workspace, unless gradients of keys are not needed.
template <class Config>
Status run_sm80_grad_queries(const BackwardParams& params, Stream stream) {
  const DevicePolicy policy = current_policy(params);
  const BackwardMethod method = choose_backward_method(params, policy);
  const BackwardWorkspace workspace = lay_out_backward(params, Config::kHeadDim, method, policy);
  ForwardParams problem = params.problem;
  problem.out = params.grad_q;
  problem.lse = nullptr;
  sm80::GradQueriesArguments args{};
  fill_arguments<Config>(problem, args);
  args.grad_out = tensor_rows(problem, params.grad_out);
  args.statistics_lse = reinterpret_cast<const float*>(static_cast<uint8_t*>(params.workspace) + workspace.statistics);
  args.delta = args.statistics_lse + workspace.stacks * workspace.rows + BackwardWorkspace::kPaddingRows;
  args.chunks = workspace.chunks;
  args.scale = problem.softmax_scale * args.dropout.scale;
  if (method == BackwardMethod::kQueriesOnly) HBSATTN_RETURN_IF_ERROR(prepare_rows(params, workspace, stream));
  void (*kernel)(sm80::GradQueriesArguments) = nullptr;
  if constexpr (Config::kShare > 1) {
    kernel = is_altered(problem) ? sm80::wide_grad_queries_kernel<Config, true>
                                 : sm80::wide_grad_queries_kernel<Config, false>;
  } else {
    kernel = is_altered(problem) ? sm80::grad_queries_kernel<Config, true> : sm80::grad_queries_kernel<Config, false>;
  }
  return launch_query_tiles<Config>("the launch of the kernel for grad_q", kernel, args,
                                    sm80_grad_queries_shared_bytes<Config>(), stream);
}

}  // namespace hbsattn::kernels
