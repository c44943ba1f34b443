#pragma once

// Which query heads a tile of keys streams together, how many it streams, and what tiles that run at the same time may
// take of the L2 cache.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/mask_heads.h"
#include "plan/policy.h"
#include "plan/tiles.h"

namespace hbsattn {

// Of a row. Head dims that are padded in copies must not be planned differently from the copies.
constexpr int64_t count_row_bytes(int32_t head_dim, int32_t element_size) {
  const int64_t columns = (int64_t{head_dim} + kHeadDimMultiple - 1) / kHeadDimMultiple * kHeadDimMultiple;
  return columns * (2 * element_size + int64_t{sizeof(float)});
}

// Of one query head, for a sequence of average length.
constexpr int64_t count_query_bytes(const MaskShape& shape, int32_t head_dim, int32_t element_size) {
  constexpr int64_t kMostRows = INT32_MAX;  // of a tensor; blocks may be longer
  const int64_t rows = (shape.rows > shape.batch ? shape.rows / shape.batch : 1) * int64_t{shape.q_block_size};
  return (rows < kMostRows ? rows : kMostRows) * count_row_bytes(head_dim, element_size);
}

// Query heads whose rows follow one another where tiles of keys stream them: of each query those of all heads of such a
// stack, then those of the next query.
struct HeadStack {
  int32_t heads;
  int32_t rows_log2;  // rows that a query has; those behind the last head do not exist

  constexpr int32_t rows() const { return 1 << rows_log2; }
};

// Blocks of few queries fill granules as stacks, and are looked up once for all heads. The heads of a stack share a key
// head and a mask, and boxes bring 8 of them at a time. A group of heads is cut into stacks of the largest power of two
// that divides it, if that is 8 or more and such stacks fill granules. Others are one stack with padding, where it
// takes fewer rows than blocks of one head. `rows() * row + head` is below 2^30, for queries and keys.
constexpr HeadStack stack_heads(const MaskShape& shape, int32_t heads_q, int32_t heads_k) {
  constexpr HeadStack kNone{1, 0};
  const int64_t block = shape.q_block_size;
  if (block % kGranule == 0 || shape.heads < 1 || heads_k < 1 || heads_q % heads_k != 0) return kNone;
  const int32_t group = heads_q / heads_k, power = group & -group;
  if (group == 1 || group > 1024 || count_heads_of_mask(shape, heads_q) % group != 0) return kNone;
  const bool exact = power % 8 == 0 && power * block % kGranule == 0;
  HeadStack stack{exact ? power : group, 3};
  while (stack.rows() < stack.heads || stack.rows() * block % kGranule != 0) ++stack.rows_log2;
  constexpr int64_t kMostRows = int64_t{1} << 30;
  const int64_t padded = (block + kGranule - 1) / kGranule * kGranule;
  const int64_t queries = shape.rows * block, keys = shape.cols * shape.k_block_size;
  const bool pays = stack.rows() * block * (group / stack.heads) < group * padded;
  const bool fits = queries > 0 && queries < kMostRows / stack.rows() && keys < kMostRows / stack.rows();
  return pays && fits ? stack : kNone;
}

// Whether queries have so few keys that passes over the sums of their gradients take longer than two more products:
// with 128x128 blocks, all true and causal, two kernels took 0.92 of the time at 512 keys, 1.0 at 1024 (H200; H100 0.92
// at 1024). Where there are few queries in all, it is launches that take the time; blocks may be far longer than
// sequences.
constexpr bool has_few_keys(const MaskShape& shape, const DevicePolicy& policy) {
  constexpr int64_t kManyQueries = 16384;
  const int64_t keys = shape.cols * shape.k_block_size;
  const int64_t queries = shape.rows * (shape.q_block_size < keys ? shape.q_block_size : keys);
  return keys <= policy.few_keys() * (shape.causal ? 2 : 1) && queries >= kManyQueries && shape.q_block_size % 64 == 0;
}

// Whether two kernels take less time for gradients than one that adds up those of queries in global memory, though they
// compute seven products instead of five, and whichever heads share tiles. Tiles of 64 keys add as much as L2 takes at
// two thirds of the tensor cores' rate: the two took 0.49 to 0.87 of the time (H100; H200 0.82 to 0.96), but at head
// dim 64, where exponentials take as long as products and two kernels have them twice (up to 1.11). Above head dim 128
// they take 0.82 to 0.88, if query blocks fill their tiles of 128 rows, and up to 1.17 if not (H200). Blocks that are
// short even over stacked heads fill tiles of keys, but no tiles of queries.
constexpr bool prefers_two_kernels(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                                   const DevicePolicy& policy) {
  if (shape.k_block_size % kGranule != 0) return false;  // not measured
  const int32_t stack = stack_heads(shape, heads_q, heads_k).heads;
  if (stack > 1 && int64_t{stack} * shape.q_block_size < 64) return false;
  if (head_dim > 128) return shape.q_block_size % 128 == 0;
  if (head_dim <= 64 || shape.k_block_size < 64) return false;
  return shape_key_tiles(shape, head_dim).tile_keys == 64 || has_few_keys(shape, policy);
}

// Query heads that one tile of the backward pass streams: those that read its key head, so that the gradients of its
// keys never leave registers. Where the queries of that many outgrow L2 before they are used again, as many as fit, and
// the tiles of a key head pass on the sum of what they have: the sums of four or more heads take less than half the
// memory of those of the queries. Causal tiles have different numbers of stages and are soon at different heads.
constexpr int32_t count_tile_heads(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                                   int32_t element_size, bool deterministic, const DevicePolicy& policy) {
  const int32_t group = heads_q / heads_k;
  // Without sums of queries, whole groups are faster (GQA 8, H100: 1.57 ms where sets took 2.07).
  if (policy.keeps_groups(deterministic) || group < 4 || shape.batch < 1) return group;
  if (prefers_two_kernels(shape, heads_q, heads_k, head_dim, policy)) return group;
  const int64_t of_head = count_query_bytes(shape, head_dim, element_size);
  if (of_head <= policy.together_bytes() / group) return group;
  const int64_t running = policy.running_keys() * count_row_bytes(head_dim, element_size);
  const int64_t fit = policy.running_bytes() / (of_head > running ? of_head : running) / (shape.causal ? 2 : 1);
  const int32_t stack = stack_heads(shape, heads_q, heads_k).heads;
  int32_t heads = group;
  while (heads > stack && (heads > fit || group % heads != 0)) heads -= stack;
  return heads;
}

// How the queries that read a key head are cut into sets, of which each has tiles of its own.
struct QuerySets {
  int32_t tile_heads;     // query heads of a set
  int32_t windows;        // runs of query blocks of a sequence; a set has one of them
  int32_t window_blocks;  // of a run; the last goes on to the end of the sequence

  constexpr int32_t count(int32_t heads) const { return heads / tile_heads * windows; }
  constexpr int32_t first_head(int32_t set) const { return set / windows * tile_heads; }
};

// Queries of a stack outgrow L2, and cannot be cut by heads. Tiles that run at the same time would be at different ones
// (token rows, 16 heads, s 32768: sums of dQ left and came back 24 times), so they go through the sequence window by
// window. No more windows than heads: work lists have room for that many sets.
constexpr QuerySets cut_queries(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                                int32_t element_size, bool deterministic, const DevicePolicy& policy) {
  const int32_t heads = count_tile_heads(shape, heads_q, heads_k, head_dim, element_size, deterministic, policy);
  const HeadStack stack = stack_heads(shape, heads_q, heads_k);
  // Two kernels, which small key blocks have, too, if tiles of queries are full, add nothing up.
  const bool full = head_dim <= 128 && shape.k_block_size < 64 && int64_t{stack.heads} * shape.q_block_size >= 64;
  const bool two_kernels =
      policy.keeps_groups(deterministic) || full || prefers_two_kernels(shape, heads_q, heads_k, head_dim, policy);
  if (two_kernels || shape.batch < 1 || stack.heads == 1) return {heads, 1, 0};
  const int64_t bytes = heads / stack.heads * stack.rows() * count_query_bytes(shape, head_dim, element_size);
  const int64_t wanted = (bytes - 1) / policy.running_bytes() + 1, most = wanted < heads ? wanted : heads;
  const int64_t blocks = shape.rows > shape.batch ? shape.rows / shape.batch : 1;
  const int64_t window_blocks = (blocks + most - 1) / most;
  const int64_t windows = (blocks + window_blocks - 1) / window_blocks;
  return {heads, static_cast<int32_t>(windows), static_cast<int32_t>(window_blocks)};
}

// Parts of tiles that the backward pass has room for: 10 MB of float32 gradients of keys and values. As many items may
// follow those of whole tiles in its work list.
constexpr int64_t count_part_slots(int64_t tiles, int32_t tile_keys, int32_t head_dim, const DevicePolicy& policy) {
  if (!policy.cuts_tiles()) return 0;
  const int64_t slots = (int64_t{10} << 20) / (2 * 4 * int64_t{tile_keys} * ((head_dim + 63) / 64 * 64));
  return tiles < slots ? tiles : slots;
}

}  // namespace hbsattn
