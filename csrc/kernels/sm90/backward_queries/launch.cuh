#pragma once

#include "kernels/rows/rows.h"
#include "kernels/sm90/backward_queries/kernel.cuh"
#include "kernels/sm90/grad_queries/launch.cuh"

namespace hbsattn::kernels {

template <class Config>
int backward_queries_shared_bytes() {
  return static_cast<int>(sizeof(typename sm90::BackwardQueriesTraits<Config>::Storage));
}

template <class Config>
Status run_backward_queries(const BackwardParams& params, Stream stream) {
  using Traits = sm90::BackwardQueriesTraits<Config>;
  const ForwardParams& problem = params.problem;
  const BackwardWorkspace workspace =
      lay_out_backward(params, Config::kHeadDim, BackwardMethod::kByQueries, current_policy(params));
  sm90::BackwardQueriesArguments args{};
  bool general = false;
  HBSATTN_RETURN_IF_ERROR(set_query_arguments<Config>(params, workspace, args, general));
  args.all_rows_k = problem.rows_k * (problem.packed ? 1 : problem.mask.shape.batch);
  args.sum_batch_rows = problem.packed ? 0 : static_cast<int>(problem.rows_k);
  args.key_sums = reinterpret_cast<float*>(static_cast<uint8_t*>(params.workspace) + workspace.sums);
  args.value_sums = args.key_sums + problem.heads_k * args.all_rows_k * Config::kHeadDim;

  HBSATTN_RETURN_IF_ERROR(prepare_rows(params, workspace, stream));
  auto* kernel = general ? sm90::backward_queries_kernel<Config, true> : sm90::backward_queries_kernel<Config, false>;
  HBSATTN_RETURN_IF_ERROR(launch_tiles(kernel, args, Traits::kThreads, Config::kCtasPerSm,
                                       backward_queries_shared_bytes<Config>(),
                                       "the launch of the backward kernel by queries", stream));
  return finish_keys(params, workspace, Config::kHeadDim, stream);
}

}  // namespace hbsattn::kernels
