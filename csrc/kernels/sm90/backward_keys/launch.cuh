#pragma once

#include <cuda_runtime_api.h>

#include <algorithm>

#include "kernels/common/key_tiles_launch.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "kernels/rows/rows.h"
#include "kernels/sm90/backward_keys/kernel.cuh"
#include "kernels/sm90/tensor_rows.h"

namespace hbsattn::kernels {

template <class Config>
int backward_keys_shared_bytes() {
  return static_cast<int>(sizeof(typename sm90::BackwardKeysTraits<Config>::Storage));
}

// For kByKeysAndQueries, run_grad_queries follows.
template <class Config>
Status run_backward_keys(const BackwardParams& params, Stream stream) {
  using Traits = sm90::BackwardKeysTraits<Config>;
  const ForwardParams& problem = params.problem;
  const RowsOfTensor q = rows_of(problem.q, problem, problem.rows_q, problem.heads_q);
  const RowsOfTensor grad_out = rows_of(params.grad_out, problem, problem.rows_q, problem.heads_q);
  const RowsOfTensor k = rows_of(problem.k, problem, problem.rows_k, problem.heads_k);
  const RowsOfTensor v = rows_of(problem.v, problem, problem.rows_k, problem.heads_k);
  const DevicePolicy policy = current_policy(params);
  const BackwardMethod method = choose_backward_method(params, policy);
  const BackwardWorkspace workspace = lay_out_backward(params, Config::kHeadDim, method, policy);

  sm90::BackwardKeysArguments args{};
  static_assert(Config::kTileM == kMostSegmentRows);
  fill_key_tiles(params, workspace, policy, Config::kTileM, args);
  const HeadStack stack = workspace.chunks.stack;
  const int segment = 1 << args.segment_log2;
  constexpr int kChunks = Traits::kChunks, kValueChunks = Traits::kValueChunks;
  const auto encode_clipped_queries = [&](const RowsOfTensor& tensor, CUtensorMap* map) {
    return stack.heads > 1 ? encode_eight_heads(tensor.matrix, Config::kChunkColumns, stack.heads, map)
                           : encode_clipped_rows(tensor.matrix, Config::kChunkColumns, map);
  };
  HBSATTN_RETURN_IF_ERROR(encode_clipped_queries(q, &args.map_q_clipped));
  HBSATTN_RETURN_IF_ERROR(encode_clipped_queries(grad_out, &args.map_grad_out_clipped));
  HBSATTN_RETURN_IF_ERROR(encode_clipped_rows(k.matrix, Config::kChunkColumns, &args.map_k_clipped));
  HBSATTN_RETURN_IF_ERROR(encode_clipped_rows(v.matrix, Config::kChunkColumns, &args.map_v_clipped));
  // Whole rows would take the rest of their last chunk from the next head.
  const auto fills_chunks = [](const RowsOfTensor& tensor) {
    return tensor.matrix.columns % Config::kChunkColumns == 0;
  };
  args.whole_rows = fills_chunks(k) && fills_chunks(v);
  // Heads of a stack with padding come by clipped boxes.
  args.whole_queries = args.whole_rows && stack.heads == stack.rows();
  if (args.whole_queries) {
    const auto encode_queries = [&](const RowsOfTensor& tensor, int chunks, CUtensorMap* map) {
      const int heads = std::min(stack.heads, segment);
      return stack.heads > 1 ? encode_whole_rows(exchange_rows_and_heads(tensor.matrix), Config::kChunkColumns, chunks,
                                                 heads, map, segment / heads)
                             : encode_whole_rows(tensor.matrix, Config::kChunkColumns, chunks, segment, map);
    };
    HBSATTN_RETURN_IF_ERROR(encode_queries(q, kChunks, &args.map_q));
    HBSATTN_RETURN_IF_ERROR(encode_queries(grad_out, kValueChunks, &args.map_grad_out));
  }
  if (args.whole_rows) {
    HBSATTN_RETURN_IF_ERROR(encode_whole_rows(k.matrix, Config::kChunkColumns, kChunks, Config::kTileN, &args.map_k));
    HBSATTN_RETURN_IF_ERROR(
        encode_whole_rows(v.matrix, Config::kChunkColumns, kValueChunks, Config::kTileN, &args.map_v));
  }

  if constexpr (Traits::kSendsKeys) {
    if (params.needs_k) {
      const RowsOfTensor grad_k = rows_of(params.grad_k, problem, problem.rows_k, problem.heads_k);
      HBSATTN_RETURN_IF_ERROR(encode_rows(grad_k.matrix, Config::kChunkColumns, kGranule, 1, &args.map_grad_k));
      args.grad_k_batch_rows = grad_k.batch_rows;
      args.grad_k_batch_heads = grad_k.batch_heads;
    }
    if (params.needs_v) {
      const RowsOfTensor grad_v = rows_of(params.grad_v, problem, problem.rows_k, problem.heads_k);
      HBSATTN_RETURN_IF_ERROR(encode_rows(grad_v.matrix, Config::kChunkColumns, kGranule, 1, &args.map_grad_v));
      args.grad_v_batch_rows = grad_v.batch_rows;
      args.grad_v_batch_heads = grad_v.batch_heads;
    }
  }
  auto* bytes = static_cast<uint8_t*>(params.workspace);
  args.ticket = reinterpret_cast<int*>(bytes + workspace.tickets);
  args.parts_done = args.ticket + BackwardWorkspace::kTickets;
  args.part_sums = reinterpret_cast<float4*>(bytes + workspace.parts);
  args.grad_q = reinterpret_cast<float*>(bytes + workspace.sums);
  args.q_batch_rows = q.batch_rows;
  args.grad_out_batch_rows = grad_out.batch_rows;
  args.k_batch_rows = k.batch_rows;
  args.v_batch_rows = v.batch_rows;
  args.k_batch_heads = k.batch_heads;
  args.v_batch_heads = v.batch_heads;
  args.all_rows_k = problem.rows_k * (problem.packed ? 1 : problem.mask.shape.batch);
  args.sum_batch_rows = problem.packed ? 0 : static_cast<int>(problem.rows_k);
  args.set_sums = reinterpret_cast<float*>(bytes + workspace.set_sums);
  args.set_counters = reinterpret_cast<uint32_t*>(bytes + workspace.set_counters);

  HBSATTN_RETURN_IF_ERROR(prepare_rows(params, workspace, stream));
  const bool with_queries = method == BackwardMethod::kByKeys;
  auto* kernel = with_queries ? sm90::backward_keys_kernel<Config, true> : sm90::backward_keys_kernel<Config, false>;
  int capability = 0, multiprocessors = 0;
  HBSATTN_RETURN_IF_ERROR(current_device(&capability, &multiprocessors));
  // At least one writes the keys that belong to no tile.
  const auto grid = std::max<int64_t>(std::min<int64_t>(multiprocessors * Config::kCtasPerSm, params.num_key_items), 1);
  HBSATTN_RETURN_IF_ERROR(launch("the launch of the backward kernel", kernel, static_cast<unsigned>(grid),
                                 Traits::kThreads, backward_keys_shared_bytes<Config>(), stream, args));
  return with_queries ? finish_rows(params, workspace, Config::kHeadDim, stream) : Status::Ok();
}

}  // namespace hbsattn::kernels
