#pragma once

// How gradients are computed, and what the backward pass keeps in its workspace.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/head_sets.h"
#include "plan/rows.h"
#include "plan/tiles.h"

namespace hbsattn {

// How gradients are computed.
enum class BackwardMethod {
  kByKeys,            // by tiles of keys; those of queries are added up in global memory
  kByQueries,         // by tiles of queries; those of keys and values are added up
  kByKeysAndQueries,  // those of keys and values by tiles of keys, those of queries by tiles of queries
  kKeysOnly,          // of these, the former alone: nobody needs those of queries
  kQueriesOnly,       // the latter alone
};

// The greatest head dim whose kernels of kSm80 add up gradients of queries.
inline constexpr int32_t kSm80AddingHeadDim = 128;

// Tiles of keys compute scores of whole tiles. Where several key blocks share one, tiles of queries compute only those
// that are wanted; as many additions to global memory as tiles of 64 keys need make them slower else.
constexpr BackwardMethod choose_backward_method(const MaskShape& shape, int32_t heads_q, int32_t heads_k,
                                                int32_t head_dim, bool pack_heads, bool deterministic, bool alters,
                                                bool needs_q, bool needs_keys, const DevicePolicy& policy) {
  if (!needs_keys) return BackwardMethod::kQueriesOnly;
  if (!needs_q) return BackwardMethod::kKeysOnly;
  if (deterministic) return BackwardMethod::kByKeysAndQueries;
  if (policy.family == KernelFamily::kSm80) {
    // No kernel that adds is for altered calls, and tiles of small blocks are not full.
    const bool adds = head_dim <= kSm80AddingHeadDim && !alters && !shape.partial && shape.k_block_size >= 64 &&
                      policy.has_room_to_add(head_dim, shape_key_tiles(shape, head_dim).tile_keys) &&
                      !has_few_keys(shape, policy);
    return adds ? BackwardMethod::kByKeys : BackwardMethod::kByKeysAndQueries;
  }
  // Sizes yet to be checked.
  if (heads_k < 1 || heads_q < heads_k || shape.q_block_size < 1) return BackwardMethod::kByKeys;
  const TileShape tiles = shape_tiles(shape, heads_q, heads_k, head_dim, pack_heads, true);
  if (head_dim <= 128 && shape.k_block_size < 64 && tiles.tile_rows == 128) {
    // Whose kernel is not for altered calls.
    return alters || shape.partial ? BackwardMethod::kByKeysAndQueries : BackwardMethod::kByQueries;
  }
  // Key blocks that share tiles of 64 with full tiles of queries, too (H200, 64x16: 0.72 to 0.85 of the time).
  const bool shared = shape.k_block_size < 64 && shape.k_block_size % kGranule == 0 && tiles.block_rows >= 64;
  const bool two_kernels =
      prefers_two_kernels(shape, heads_q, heads_k, head_dim, policy) || (head_dim <= 128 && shared);
  return two_kernels ? BackwardMethod::kByKeysAndQueries : BackwardMethod::kByKeys;
}

constexpr BackwardMethod choose_backward_method(const BackwardParams& params, const DevicePolicy& policy) {
  const ForwardParams& problem = params.problem;
  return choose_backward_method(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim,
                                problem.pack_heads, params.deterministic, alters_weights(problem), params.needs_q,
                                params.needs_k || params.needs_v, policy);
}

// Ints of a forward's workspace: the tickets of the persistent CTAs of up to two kernels.
inline constexpr int64_t kForwardTickets = 2;

// What the backward pass keeps in its workspace: for each query row, in chunks, its log-sum-exp and the dot product of
// output and output gradient, and, by keys, its gradient in float32. Byte offsets.
struct BackwardWorkspace {
  QueryChunks chunks;
  int64_t stacks;        // of query heads, see QueryChunks
  int64_t rows;          // of a stack's chunks
  int64_t tickets;       // of the persistent CTAs of up to kTickets kernels, and behind them a counter for each
                         // warpgroup's half of each slot
  int64_t set_counters;  // (heads_k, batch * rows_k), twice above head dim 128, if sets of queries pass sums on
  int64_t sums;          // that tiles add to: by keys, (stacks, chunks) of 16 x padded head_dim floats, in the
                         // order of accumulators; by queries, (2, heads_k, batch * rows_k, padded head_dim) floats
  int64_t zeroed;        // bytes from `tickets` on that are to be 0, a multiple of 16
  int64_t statistics;    // two arrays (stacks, rows) of float, each followed by kPaddingRows for rows that do not exist
  int64_t parts;         // gradients of keys and values in parts of tiles, slot after slot
  int64_t slots;         // that there is room for
  int64_t set_sums;      // (heads_k, batch * rows_k, 2 x padded head_dim) floats, if sets of queries pass sums on
  int64_t bytes;

  static constexpr int64_t kTickets = 2;
  static constexpr int64_t kPaddingRows = 64;
  static constexpr int64_t kAlignment = 128;
};

// `padded_head_dim` is the kernel's.
constexpr BackwardWorkspace lay_out_backward(const BackwardParams& params, int32_t padded_head_dim,
                                             BackwardMethod method, const DevicePolicy& policy) {
  const auto align = [](int64_t bytes) {
    return (bytes + BackwardWorkspace::kAlignment - 1) / BackwardWorkspace::kAlignment * BackwardWorkspace::kAlignment;
  };
  const ForwardParams& problem = params.problem;
  const MaskShape& shape = problem.mask.shape;
  const KeyTileShape tiles = shape_key_tiles(shape, problem.head_dim);
  const bool by_keys = method == BackwardMethod::kByKeys, by_queries = method == BackwardMethod::kByQueries;
  const bool key_tiles = !by_queries && method != BackwardMethod::kQueriesOnly;
  const QuerySets sets = cut_queries(shape, problem.heads_q, problem.heads_k, problem.head_dim, policy.element_size,
                                     params.deterministic, policy);
  const bool passes_sets = key_tiles && sets.count(problem.heads_q) > problem.heads_k;
  const int64_t all_tiles = int64_t{sets.count(problem.heads_q)} * shape.batch * tiles.count(shape);
  const int64_t keys = problem.heads_k * problem.rows_k * (problem.packed ? 1 : shape.batch);
  const int64_t key_bytes = 2 * 4 * keys * padded_head_dim;
  const int64_t slots = key_tiles ? count_part_slots(all_tiles, tiles.tile_keys, problem.head_dim, policy) : 0;
  BackwardWorkspace workspace{};
  workspace.chunks = chunk_queries(problem);
  workspace.slots = slots;
  workspace.stacks = problem.heads_q / workspace.chunks.stack.heads;
  workspace.rows = workspace.chunks.count * kGranule;
  const int64_t query_bytes = 4 * workspace.stacks * workspace.rows * padded_head_dim;
  workspace.set_counters = workspace.tickets + align(4 * (BackwardWorkspace::kTickets + 2 * slots));
  workspace.sums = workspace.set_counters + align(passes_sets ? 4 * keys * (padded_head_dim > 128 ? 2 : 1) : 0);
  workspace.zeroed = workspace.sums + (by_queries ? key_bytes : by_keys ? query_bytes : 0);
  workspace.statistics = align(workspace.zeroed);
  workspace.parts =
      workspace.statistics + align(2 * 4 * (workspace.stacks * workspace.rows + BackwardWorkspace::kPaddingRows));
  workspace.set_sums = workspace.parts + align(slots * 2 * 4 * tiles.tile_keys * padded_head_dim);
  workspace.bytes = workspace.set_sums + (passes_sets ? key_bytes : 0);
  return workspace;
}

}  // namespace hbsattn
