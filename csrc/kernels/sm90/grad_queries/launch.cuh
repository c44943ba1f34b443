#pragma once

#include "kernels/rows/rows.h"
#include "kernels/sm90/grad_queries/kernel.cuh"
#include "kernels/sm90/query_tiles/launch.cuh"
#include "plan/workspace.h"

namespace hbsattn::kernels {

template <class Config>
int grad_queries_shared_bytes() {
  return static_cast<int>(sizeof(typename sm90::GradQueriesTraits<Config>::Storage));
}

// Fills what a kernel gets whose tiles of query rows compute their gradient, and tells whether the general one is
// needed.
template <class Config>
Status set_query_arguments(const BackwardParams& params, const BackwardWorkspace& workspace,
                           sm90::GradQueriesArguments& args, bool& general) {
  ForwardParams problem = params.problem;
  auto* bytes = static_cast<uint8_t*>(params.workspace);
  problem.out = params.grad_q;
  problem.lse = nullptr;
  problem.workspace = bytes + workspace.tickets;
  HBSATTN_RETURN_IF_ERROR(set_arguments<Config>(problem, true, args, general));
  const RowsOfTensor grad_out = rows_of(params.grad_out, problem, problem.rows_q, problem.heads_q);
  HBSATTN_RETURN_IF_ERROR(
      encode_rows(grad_out.matrix, Config::kChunkColumns, args.box_rows, args.box_heads, &args.map_grad_out));
  HBSATTN_RETURN_IF_ERROR(encode_clipped_rows(grad_out.matrix, Config::kChunkColumns, &args.map_grad_out_clipped));
  args.grad_out_batch_rows = grad_out.batch_rows;
  args.grad_out_batch_heads = grad_out.batch_heads;
  args.query_bytes += args.query_bytes / Config::kHeadDim * Config::kValueDim;
  args.statistics_lse = reinterpret_cast<const float*>(bytes + workspace.statistics);
  args.delta = args.statistics_lse + workspace.stacks * workspace.rows + BackwardWorkspace::kPaddingRows;
  args.chunks = workspace.chunks;
  args.scale = problem.softmax_scale * args.dropout.scale;
  return Status::Ok();
}

// Follows run_backward_keys, which prepares the workspace, unless gradients of keys are not needed.
template <class Config>
Status run_grad_queries(const BackwardParams& params, Stream stream) {
  using Traits = sm90::GradQueriesTraits<Config>;
  const DevicePolicy policy = current_policy(params);
  const BackwardMethod method = choose_backward_method(params, policy);
  const BackwardWorkspace workspace = lay_out_backward(params, Config::kHeadDim, method, policy);
  const bool alone = method == BackwardMethod::kQueriesOnly;
  sm90::GradQueriesArguments args{};
  bool general = false;
  HBSATTN_RETURN_IF_ERROR(set_query_arguments<Config>(params, workspace, args, general));
  auto* kernel = sm90::grad_queries_kernel<Config, true>;
  if constexpr (!Config::kAltered) {
    if (!general) kernel = sm90::grad_queries_kernel<Config, false>;
  }
  ++args.ticket;  // the other kernel has the first
  // Two CTAs to a multiprocessor, which share it with the other kernel's last ones, gain nothing.
  args.beside_keys = !alone && Config::kCtasPerSm == 1 && Config::kHeadDim <= 128;
  if (alone) HBSATTN_RETURN_IF_ERROR(prepare_rows(params, workspace, stream));
  return launch_tiles(kernel, args, Traits::kThreads, Config::kCtasPerSm, grad_queries_shared_bytes<Config>(),
                      "the launch of the kernel for grad_q", stream);
}

}  // namespace hbsattn::kernels
