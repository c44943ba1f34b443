#pragma once

// Where things lie: sequences, rows of the bit matrix, tiles and their limits. Every decision of the mask kernels that
// is not about threads is here, in constexpr functions, which nvcc compiles for host and device alike.
//
// Nothing here trusts what comes from the device: lengths that lie, or a table that does not fit the mask, give wrong
// places, but never places outside the buffers.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/lists.h"
#include "plan/mask_heads.h"
#include "plan/pairs.h"
#include "plan/rule.h"
#include "plan/tiles.h"

namespace hbsattn::mask {

template <class T>
constexpr T smaller(T a, T b) {
  return b < a ? b : a;
}

template <class T>
constexpr T larger(T a, T b) {
  return a < b ? b : a;
}

template <class T>
constexpr T clamp(T x, T low, T high) {
  return smaller(larger(x, low), high);
}

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int32_t saturate(int64_t x) { return static_cast<int32_t>(clamp<int64_t>(x, 0, INT32_MAX)); }

// Begins, lengths and diagonal of sequence b. row_begin and col_begin are still 0.
constexpr Sequence read_lengths(const SequencesParams& params, int64_t b) {
  int64_t q_begin = 0, q_end = params.seqlen_q, k_begin = 0, k_end = params.seqlen_k;
  if (params.cu_seqlens_q != nullptr) {
    q_begin = params.cu_seqlens_q[b], q_end = params.cu_seqlens_q[b + 1];
    k_begin = params.cu_seqlens_k[b], k_end = params.cu_seqlens_k[b + 1];
  }
  const int32_t q_len = saturate(q_end - q_begin), k_len = saturate(k_end - k_begin);
  return {saturate(q_begin), q_len, saturate(k_begin), k_len, 0, 0, k_len - q_len};
}

constexpr int64_t count_q_blocks(const Sequence& sequence, const MaskShape& shape) {
  return ceil_div(sequence.q_len, shape.q_block_size);
}

constexpr int64_t count_k_blocks(const Sequence& sequence, const MaskShape& shape) {
  return ceil_div(sequence.k_len, shape.k_block_size);
}

// Sets where the blocks of sequence b begin, given the query and key blocks of all sequences before it.
constexpr void place_blocks(const SequencesParams& params, int64_t b, int64_t q_blocks_before, int64_t k_blocks_before,
                            Sequence& sequence) {
  sequence.row_begin = saturate(params.row_stride < 0 ? q_blocks_before : b * params.row_stride);
  sequence.col_begin = saturate(k_blocks_before);
}

// What a row of the bit matrix stands for.
struct RowPlace {
  int32_t index;      // of its sequence
  Sequence sequence;  // of zeros where there are no sequences
  int64_t block;      // query block in the sequence
  bool used;          // false: padding, the sequence has no such block
};

constexpr RowPlace locate_in_sequence(const MaskShape& shape, int32_t index, const Sequence& sequence, int64_t row) {
  const int64_t block = row - sequence.row_begin;
  return {index, sequence, block, block >= 0 && block * shape.q_block_size < sequence.q_len};
}

// The last of `count` sequences, one or more, for which begins(index) holds; it holds for the first, and up to some
// one. Each step cuts what is left into kPieces: loads that do not depend on each other take no longer than one, but
// where many threads look for rows the time is that of instructions.
template <int32_t kPieces, class Begins>
constexpr int32_t find_last_sequence(int32_t count, Begins&& begins) {
  int32_t first = 0, end = count;
  while (end - first > 1) {
    const int32_t piece = (end - first - 1) / kPieces + 1;
    int32_t behind = 0;
    for (int32_t i = 1; i < kPieces; ++i) {
      const int32_t next = first + i * piece;
      if (next < end && begins(next)) ++behind;
    }
    first += behind * piece;
    end = smaller(first + piece, end);
  }
  return first;
}

constexpr RowPlace locate_row(const MaskShape& shape, const Sequence* sequences, int64_t row) {
  if (shape.batch == 0) return {0, {}, row, false};
  // One without blocks begins where the next one does.
  const int32_t index = find_last_sequence<8>(shape.batch, [&](int32_t b) { return sequences[b].row_begin <= row; });
  return locate_in_sequence(shape, index, sequences[index], row);
}

// A table of sequences that all have the same lengths, as numbers.
struct EvenSequences {
  int32_t q_len, k_len, diagonal;
  int64_t rows, columns;  // between the beginnings of two sequences

  constexpr Sequence operator[](int64_t b) const {
    return {0, q_len, 0, k_len, saturate(b * rows), saturate(b * columns), diagonal};
  }
};

// What read_lengths and place_blocks say of a batch without cumulative lengths.
constexpr EvenSequences make_even_sequences(const SequencesParams& params) {
  const Sequence sequence = read_lengths(params, 0);
  const int64_t q_blocks = count_q_blocks(sequence, params.shape);
  return {sequence.q_len, sequence.k_len, sequence.diagonal, params.row_stride < 0 ? q_blocks : params.row_stride,
          count_k_blocks(sequence, params.shape)};
}

constexpr RowPlace locate_row(const MaskShape& shape, const EvenSequences& sequences, int64_t row) {
  if (shape.batch == 0) return {0, {}, row, false};
  int32_t index = shape.batch - 1;
  if (sequences.rows > 0) {
    // Not a 64-bit division: that is a subroutine on a GPU.
    const uint32_t before = static_cast<uint32_t>(row) / static_cast<uint32_t>(sequences.rows);
    index = static_cast<int32_t>(smaller<int64_t>(before, index));
  }
  return locate_in_sequence(shape, index, sequences[index], row);
}

// Whole key blocks in `keys` keys. Not a 64-bit division: that is a subroutine on a GPU.
constexpr int32_t whole_blocks(const MaskShape& shape, int64_t keys) {
  if (keys <= 0) return 0;
  return static_cast<int32_t>(smaller<int64_t>(static_cast<uint32_t>(keys) / shape.k_block_size, shape.cols));
}

// Key blocks that hold keys before this one.
constexpr int32_t columns_before(const MaskShape& shape, int64_t key) {
  return key <= 0 ? 0 : whole_blocks(shape, key - 1 + shape.k_block_size);
}

// Key blocks, from the first on, that some query of the row can see.
constexpr int32_t visible_columns(const MaskShape& shape, const RowPlace& place) {
  if (!place.used) return 0;
  const int64_t last_query = smaller<int64_t>((place.block + 1) * shape.q_block_size, place.sequence.q_len) - 1;
  return columns_before(shape, rule_of(shape, place.sequence).visible_end(last_query, place.sequence.k_len));
}

// The work list before it is put in order: groups of packed heads, their bit rows, the tiles of a row.
struct ItemGrid {
  MaskShape shape;
  const Sequence* sequences;
  int32_t heads_of_mask;  // query heads that share a mask
  int32_t packed_heads;
  int32_t tile_rows;
  int32_t tiles;          // of one row
  int32_t united;         // neighbouring query blocks that a tile may unite, 1: none
  bool pairs;             // as in TileShape
  const HeadRule* rules;  // null: no head has one
};

struct Item {
  WorkItem record;    // without counts of blocks
  int32_t clean_end;  // columns before this one are visible to all rows of the tile, to their last key
  int32_t tail_end;   // but for those before this one, which a window may hide from some row
  bool has_queries;   // false: the tile lies behind the end of its sequence, or the sequence has no such block
};

constexpr Item make_item(const ItemGrid& grid, int64_t index) {
  const MaskShape& shape = grid.shape;
  const int32_t item_row = static_cast<int32_t>(index) / grid.tiles;
  const int32_t tile = static_cast<int32_t>(index) % grid.tiles;
  const int32_t rows = static_cast<int32_t>(shape.rows);
  const int32_t row = item_row % rows;
  const int32_t head = item_row / rows * grid.packed_heads;
  const int32_t mask_head = mask_of_head(head, grid.heads_of_mask);
  const RowPlace place = locate_row(shape, grid.sequences, row);
  const Sequence& sequence = place.sequence;

  Item item{};
  WorkItem& record = item.record;
  record.bit_row = mask_head * rows + row;
  record.sequence = place.index;
  record.head = head;
  // Tensors have fewer than 2^30 rows, so this is past every end, and still leaves room for sums.
  constexpr int64_t kPastEnd = 1 << 30;
  int64_t block_row = smaller(larger<int64_t>(place.block, 0) * shape.q_block_size, kPastEnd);
  if (!place.used) block_row = larger(block_row, smaller<int64_t>(sequence.q_len, kPastEnd));
  record.block_row = static_cast<int32_t>(block_row);
  record.first_row = tile * grid.tile_rows;
  record.q_begin = sequence.q_begin;
  record.q_len = sequence.q_len;
  record.k_begin = sequence.k_begin;
  record.k_len = sequence.k_len;
  record.diagonal = sequence.diagonal;
  record.united = 1;
  if (!place.used) return item;

  // First and last query of the tile, in the block. A tile that goes on into the next head of its group starts over at
  // the block's first query and covers [start, block size) and [0, end - block size).
  const int64_t block_size = shape.q_block_size;
  const int64_t queries = smaller<int64_t>(block_size, sequence.q_len - block_row);
  const int64_t start = record.first_row % shape.q_block_size;
  const int64_t end = start + smaller<int64_t>(grid.tile_rows, grid.packed_heads * block_size - record.first_row);
  int64_t first = start, last = smaller(end, queries) - 1;
  if (end > block_size) {
    first = 0;
    last = start < queries ? queries - 1 : smaller(end - block_size, queries) - 1;
  }
  if (first > last) return item;

  item.has_queries = true;
  const WindowRule<int64_t> rule = rule_of(shape, sequence, read_rule(grid.rules, mask_head));
  record.col_end = columns_before(shape, rule.visible_end(block_row + last, sequence.k_len));
  item.clean_end = whole_blocks(shape, rule.clean_end(block_row + first, sequence.k_len));
  item.tail_end = columns_before(shape, rule.clean_begin(block_row + last));
  return item;
}

// The blocks that may share a tile with the block of item `index`: `count` of them from item `first` on. Whoever asks
// for one of them gets the same answer, if the rows of sequences follow each other.
struct Neighbours {
  int64_t first;
  int32_t count;
};

constexpr Neighbours find_neighbours(const ItemGrid& grid, int64_t index) {
  const MaskShape& shape = grid.shape;
  // Not 64-bit divisions: those are subroutines on a GPU.
  const int32_t row = static_cast<int32_t>(index) % static_cast<int32_t>(shape.rows);
  const RowPlace place = locate_row(shape, grid.sequences, row);
  if (grid.united == 1 || !place.used) return {index, 1};
  const int64_t before = smaller(static_cast<int32_t>(static_cast<uint32_t>(place.block) % grid.united), row);
  int64_t end_row = shape.rows;
  if (place.index + 1 < shape.batch) {
    const int64_t next = grid.sequences[place.index + 1].row_begin;
    if (next > row) end_row = smaller(end_row, next);
  }
  const int64_t blocks = (place.sequence.q_len - 1) / shape.q_block_size + 1 - place.block;
  return {index - before, static_cast<int32_t>(smaller<int64_t>(before + smaller(blocks, end_row - row), grid.united))};
}

// Whether a tile that streams the `together` blocks that any of `tiles` blocks is active with takes less time than
// tiles of their own, which stream `apart` blocks. A tile costs about as much as 192 more keys; those of a united tile
// need element masks, which makes them a fifth dearer.
constexpr bool pays_to_unite(const MaskShape& shape, int64_t together, int64_t apart, int32_t tiles) {
  constexpr int64_t kTileKeys = 192;
  return tiles > 1 &&
         6 * together * shape.k_block_size + 5 * kTileKeys < 5 * (apart * shape.k_block_size + tiles * kTileKeys);
}

// Rows of the bit matrix that are a sequence's query blocks.
struct RowRange {
  int32_t begin, end;
};

constexpr RowRange find_rows(const MaskShape& shape, int32_t row_begin, int32_t q_len) {
  const int32_t blocks = q_len <= 0 ? 0 : (q_len - 1) / shape.q_block_size + 1;
  const int64_t begin = clamp<int64_t>(row_begin, 0, shape.rows);
  const int64_t end = clamp(int64_t{row_begin} + blocks, begin, shape.rows);
  return {static_cast<int32_t>(begin), static_cast<int32_t>(end)};
}

// Of a sequence's rows, those that a set has.
constexpr RowRange cut_rows(const RowRange& rows, const QuerySets& sets, int32_t set) {
  const int32_t window = set % sets.windows;
  const int32_t begin = smaller(rows.begin + window * sets.window_blocks, rows.end);
  return {begin, window + 1 == sets.windows ? rows.end : smaller(begin + sets.window_blocks, rows.end)};
}

// The work list of the backward pass before it is put in order: sets of queries, groups of united columns of all
// sequences (KeyListShape), tiles of a group.
struct KeyGrid {
  MaskShape shape;
  const Sequence* sequences;
  KeyTileShape tiles;
  KeyListShape list;
  QuerySets sets;
  int32_t heads_of_mask;  // query heads that share a mask
  int32_t units;          // DevicePolicy::units
};

constexpr KeyGrid make_key_grid(const KeyPlanParams& params, const QuerySets& sets, const DevicePolicy& policy) {
  const MaskShape& shape = params.mask.shape;
  const KeyTileShape tiles = shape_key_tiles(shape, params.head_dim);
  return {shape,         params.mask.sequences,
          tiles,         shape_key_list(shape, tiles, params.rows_k, params.packed),
          sets,          count_heads_of_mask(shape, params.heads_q),
          policy.units()};
}

// Masks that the heads of a set have. The first is that of the first head.
constexpr int32_t count_mask_heads(const KeyGrid& grid) {
  return count_masks_of_heads(grid.sets.tile_heads, grid.heads_of_mask);
}
constexpr int32_t first_mask_head(const KeyGrid& grid, int32_t query_set) {
  return mask_of_head(grid.sets.first_head(query_set), grid.heads_of_mask);
}

// Groups of united columns before those of sequence b. Ascends with b where the table is honest.
constexpr int64_t groups_before(const KeyGrid& grid, int64_t b) {
  if (!grid.list.packed) return b * grid.list.groups_of_sequence;
  const int64_t columns = clamp<int64_t>(grid.sequences[b].col_begin, 0, grid.list.columns);
  return static_cast<uint32_t>(columns) / grid.tiles.united + b;
}

// The last sequence whose groups begin at this one or before. Where the table lies, some sequence.
constexpr int32_t find_sequence_of_group(const KeyGrid& grid, int32_t group) {
  if (!grid.list.packed) return group / static_cast<int32_t>(grid.list.groups_of_sequence);
  return find_last_sequence<2>(grid.shape.batch, [&](int32_t b) { return groups_before(grid, b) <= group; });
}

// Without what is active. A place that no tile of its sequence falls on, or whose tile has no keys, has column -1.
// Whatever the table says, no two places have the same tile, as a group of a sequence has one place.
constexpr KeyItem make_key_item(const KeyGrid& grid, int64_t index) {
  const MaskShape& shape = grid.shape;
  // Not 64-bit divisions: those are subroutines on a GPU.
  const int32_t line = static_cast<int32_t>(index) / grid.tiles.tiles;
  const int32_t tile = static_cast<int32_t>(index) % grid.tiles.tiles;
  const int32_t groups = static_cast<int32_t>(grid.list.groups);
  const int32_t group = line % groups;

  KeyItem item{};
  item.column = -1;
  item.sequence = find_sequence_of_group(grid, group);
  item.query_set = line / groups;
  const Sequence& sequence = grid.sequences[item.sequence];
  item.row_begin = sequence.row_begin;
  item.q_begin = sequence.q_begin;
  item.q_len = sequence.q_len;
  item.k_begin = sequence.k_begin;
  item.diagonal = sequence.diagonal;
  const int64_t column = (group - groups_before(grid, item.sequence)) * grid.tiles.united;
  if (column < 0 || column >= shape.cols) return item;
  const int64_t block_begin = column * shape.k_block_size;
  const int64_t first_key = block_begin + int64_t{tile} * grid.tiles.tile_keys;
  if (first_key >= sequence.k_len) return item;
  const int64_t blocks_end =
      block_begin + smaller<int64_t>(grid.tiles.united, shape.cols - column) * shape.k_block_size;
  const int64_t end = smaller(smaller(first_key + grid.tiles.tile_keys, blocks_end), int64_t{sequence.k_len});
  item.column = static_cast<int32_t>(column);
  item.first_key = static_cast<int32_t>(first_key);
  item.keys = static_cast<int32_t>(end - first_key);
  item.united = (item.keys - 1) / shape.k_block_size + 1;
  return item;
}

// Whether an item is so much heavier than the mean of `items` items, which weigh `total` together, that a
// multiprocessor which came to it late would still compute it when all others are done: more than a 32nd of what each
// of `units` multiprocessors computes in all.
constexpr bool is_heavy(int32_t units, int32_t weight, uint64_t total, uint32_t items) {
  const uint64_t positive = larger(weight, 0);
  return positive * items > 3 * total && positive * 32 * static_cast<uint32_t>(units) > total;
}

// Parts that a heavy item is cut into: none much longer than a quarter of what a multiprocessor computes in all, or
// than what pays for adding them up again.
constexpr int32_t count_parts(const MaskShape& shape, int32_t units, int32_t weight, uint64_t total) {
  constexpr int32_t kMostParts = 32, kQueries = 2048;
  // A 64-bit division, a subroutine on a GPU: few items are heavy.
  const auto quarter = static_cast<uint32_t>(smaller<uint64_t>(total / (4 * static_cast<uint32_t>(units)), INT32_MAX));
  const uint32_t longest = larger<uint32_t>(quarter, (kQueries - 1) / shape.q_block_size + 1);
  return smaller<int32_t>((static_cast<uint32_t>(weight) - 1) / longest + 1, kMostParts);
}

// Bits of word w of a bit row that belong to columns before `end`.
constexpr uint32_t bits_before(int32_t end, int32_t word) {
  const int32_t count = end - 32 * word;
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1u;
}

// One bit for each of eight bytes, the lowest for the first: whether it is not 0.
constexpr uint32_t nonzero_bytes(uint64_t bytes) {
  constexpr uint64_t kLow = 0x7f7f7f7f7f7f7f7full;
  const uint64_t flags = ((((bytes & kLow) + kLow) | bytes) >> 7) & 0x0101010101010101ull;
  return static_cast<uint32_t>((flags * 0x0102040810204080ull) >> 56);
}

}  // namespace hbsattn::mask
