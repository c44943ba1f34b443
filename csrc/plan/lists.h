#pragma once

// How long work lists are.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/head_sets.h"
#include "plan/policy.h"
#include "plan/tiles.h"

namespace hbsattn {

// What larger numbers of items are taken for. No list is that long; sums of a few such numbers do not overflow.
inline constexpr int64_t kEndlessList = INT64_MAX / 8;

// Of numbers that are not negative.
constexpr int64_t multiply_items(int64_t a, int64_t b) { return b > 0 && a > kEndlessList / b ? kEndlessList : a * b; }

// Tiles of queries.
constexpr int64_t count_query_items(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                                    bool pack_heads, bool for_backward) {
  const TileShape tiles = shape_tiles(shape, heads_q, heads_k, head_dim, pack_heads, for_backward);
  return multiply_items(multiply_items(heads_q / tiles.packed_heads, shape.rows), tiles.tiles);
}

// At least as many as count_query_items, for every head dim, in both directions and on every card: tiles have 64 rows
// or more.
constexpr int64_t max_items(const MaskShape& shape, int32_t heads_q, int32_t heads_k, bool pack_heads) {
  const int32_t packed_heads = count_packed_heads(shape, heads_q, heads_k, pack_heads);
  const int64_t tiles = (int64_t{packed_heads} * shape.q_block_size + 63) / 64;
  return multiply_items(multiply_items(heads_q / packed_heads, shape.rows), tiles);
}

// The places of tiles of keys, for one set of queries: for each sequence, groups of united key blocks, and for each
// group its tiles.
//
// In batched tensors every sequence has as many groups. In packed ones, those of a sequence begin at
// Sequence::col_begin / united + its index: one place more than its blocks fill may stay empty, so that rounding never
// makes two sequences meet. Places are as many as keys, not as sequences times the longest of them.
struct KeyListShape {
  bool packed;
  int64_t columns;             // where packed, key blocks of all sequences, at most
  int64_t groups_of_sequence;  // where batched
  int64_t groups;              // of all sequences
};

constexpr KeyListShape shape_key_list(const MaskShape& shape, const KeyTileShape& tiles, int64_t rows_k, bool packed) {
  KeyListShape list{packed, 0, 0, 0};
  if (packed) {
    // Each sequence may end with a part of a block. Sequence::col_begin also counts blocks that the mask has no column
    // for.
    list.columns = (rows_k + shape.k_block_size - 1) / shape.k_block_size + shape.batch;
    list.groups = list.columns / tiles.united + shape.batch;
  } else {
    list.groups_of_sequence = (shape.cols + tiles.united - 1) / tiles.united;
    list.groups = multiply_items(shape.batch, list.groups_of_sequence);
  }
  return list;
}

// The work list of tiles of keys.
struct KeyListSize {
  QuerySets sets;
  int64_t tiles;
  int64_t slots;  // for parts of tiles; as many items may follow the tiles

  constexpr int64_t items() const { return tiles + slots; }
};

// `rows_k` matters to the number of tiles alone: a list for more keys serves fewer.
constexpr KeyListSize size_key_list(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                                    int32_t element_size, bool deterministic, int64_t rows_k, bool packed,
                                    const DevicePolicy& policy) {
  const KeyTileShape tiles = shape_key_tiles(shape, head_dim);
  const QuerySets sets = cut_queries(shape, heads_q, heads_k, head_dim, element_size, deterministic, policy);
  const int32_t count = sets.count(heads_q);
  const int64_t groups = shape_key_list(shape, tiles, rows_k, packed).groups;
  const int64_t longest = multiply_items(multiply_items(count, shape.batch), tiles.count(shape));
  return {sets, multiply_items(multiply_items(count, groups), tiles.tiles),
          count_part_slots(longest, tiles.tile_keys, head_dim, policy)};
}

// At least as many as size_key_list says, for every head dim, in both modes and on every card: there are no more sets
// than heads, and a tile has at least 64 keys.
constexpr int64_t max_key_items(const MaskShape& shape, int32_t heads_q, int64_t rows_k, bool packed) {
  constexpr int64_t kMostSlots = 512;
  static_assert(count_part_slots(INT64_MAX, 64, 1, DevicePolicy{}) <= kMostSlots);
  const KeyTileShape tiles = cut_key_blocks(shape.k_block_size, 64);
  const int64_t groups = shape_key_list(shape, tiles, rows_k, packed).groups;
  return multiply_items(multiply_items(heads_q, groups), tiles.tiles) + kMostSlots;
}

}  // namespace hbsattn
