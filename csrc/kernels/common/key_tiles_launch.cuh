#pragma once

#include <algorithm>

#include "kernels/common/key_tiles.cuh"
#include "plan/workspace.h"

namespace hbsattn::kernels {

// Fills what kernels of every family get of a call. `stage_rows`: queries of a stage.
inline void fill_key_tiles(const BackwardParams& params, const BackwardWorkspace& workspace, const DevicePolicy& policy,
                           int stage_rows, KeyTiles& args) {
  const ForwardParams& problem = params.problem;
  const MaskShape& shape = problem.mask.shape;
  args.mask = shape;
  args.sequences = problem.packed ? problem.mask.sequences : nullptr;
  args.columns = params.columns;
  args.rules = shape.ruled ? problem.mask.rules : nullptr;
  args.items = params.key_items;
  args.num_items = static_cast<int>(params.num_key_items);
  args.slots = static_cast<int>(workspace.slots);
  args.row_words = static_cast<int>(shape.row_words());
  args.grad_k = params.needs_k ? params.grad_k.data : nullptr;
  args.grad_k_batch_stride = view_of(problem, params.grad_k).batch_stride;
  args.grad_k_row_stride = params.grad_k.row_stride;
  args.grad_k_head_stride = params.grad_k.head_stride;
  args.grad_k_columns = view_of(problem, params.grad_k).columns;
  args.grad_v = params.needs_v ? params.grad_v.data : nullptr;
  args.grad_v_batch_stride = view_of(problem, params.grad_v).batch_stride;
  args.grad_v_row_stride = params.grad_v.row_stride;
  args.grad_v_head_stride = params.grad_v.head_stride;
  args.grad_v_columns = view_of(problem, params.grad_v).columns;
  args.lse = reinterpret_cast<float*>(static_cast<uint8_t*>(params.workspace) + workspace.statistics);
  args.delta = args.lse + workspace.stacks * workspace.rows + BackwardWorkspace::kPaddingRows;
  args.chunks = workspace.chunks;
  args.padding_chunk = static_cast<int>(workspace.stacks * workspace.chunks.count);
  args.rows_q = static_cast<int>(problem.rows_q);
  args.rows_k = static_cast<int>(problem.rows_k);
  args.heads_q = problem.heads_q;
  args.heads_k = problem.heads_k;
  args.united = shape_key_tiles(shape, problem.head_dim).united;
  args.sets = cut_queries(shape, problem.heads_q, problem.heads_k, problem.head_dim, policy.element_size,
                          params.deterministic, policy);
  args.sets_per_key_head = args.sets.count(problem.heads_q) / problem.heads_k;
  args.heads_of_mask = count_heads_of_mask(shape, problem.heads_q);
  const HeadStack stack = workspace.chunks.stack;
  const bool by_position = workspace.chunks.per_block == 0;
  const int segment = by_position ? std::min(kGranule << workspace.chunks.segment_log2, stage_rows) : kGranule;
  while ((1 << args.segment_log2) < segment) ++args.segment_log2;
  // Blocks may be longer than all sequences.
  const int64_t block_rows = std::clamp<int64_t>(problem.rows_q, 1, shape.q_block_size) * stack.rows();
  args.segments_per_block = static_cast<int>((block_rows + segment - 1) / segment);
  args.dropout = make_dropout(problem);
  args.scale = problem.softmax_scale * args.dropout.scale;
  const ScoreScale scale = make_score_scale(problem);
  args.scale_log2 = scale.log2;
  args.cap = scale.cap;
  args.inverse_scale_log2 = 1.f / scale.log2;
  args.partial = partial_blocks_of(problem.mask);
}

}  // namespace hbsattn::kernels
