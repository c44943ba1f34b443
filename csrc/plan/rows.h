#pragma once

// Where rows of queries and of keys lie: in the tensors of a call, in the workspace of the backward pass, and which
// rows of packed tensors belong to no tile. As in layout.h, nothing here trusts what comes from the device.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/head_sets.h"
#include "plan/layout.h"
#include "plan/tiles.h"

namespace hbsattn {

// A tensor of a call. Packed tensors have no batch entries, whatever the stride says.
constexpr TensorView view_of(const ForwardParams& problem, TensorView view) {
  if (problem.packed) view.batch_stride = 0;
  if (view.columns == 0) view.columns = problem.head_dim;
  return view;
}

// The entries of a batched tensor are runs of rows of one long matrix, `batch_rows` apart, or, where batch entries lie
// between rows, heads of it, `batch_heads` apart. The other is 0.
struct TensorSpan {
  int64_t batch_rows, batch_heads;
  int64_t rows, heads;  // from the first of the first entry to the last of the last
};

constexpr TensorSpan span_tensor(const ForwardParams& problem, const TensorView& view, int64_t rows, int64_t heads) {
  const int64_t others = problem.packed ? 0 : mask::larger(problem.mask.shape.batch - 1, 0);
  if (others == 0) return {0, 0, rows, heads};
  const bool by_rows = view.batch_stride % view.row_stride == 0;
  const int64_t batch_rows = by_rows ? view.batch_stride / view.row_stride : 0;
  const int64_t batch_heads = by_rows ? 0 : view.batch_stride / view.head_stride;
  return {batch_rows, batch_heads, others * batch_rows + rows, others * batch_heads + heads};
}

// Rows of a packed tensor that no tile writes.
struct RowGap {
  int32_t begin, end;
};

constexpr RowGap clamp_gap(int64_t begin, int64_t end, int32_t rows) {
  const int64_t first = mask::clamp<int64_t>(begin, 0, rows);
  return {static_cast<int32_t>(first), static_cast<int32_t>(mask::clamp<int64_t>(end, first, rows))};
}

// The rows between the blocks that the mask has of sequence `index` and the next sequence; behind the last sequence, up
// to the tensor's end; index -1: before the first. Tiles and gaps of all sequences together are all rows.
constexpr RowGap find_query_gap(const MaskShape& shape, const Sequence* sequences, int32_t index, int32_t rows) {
  const bool last = index + 1 >= shape.batch;
  int64_t begin = 0;
  if (index >= 0) {
    const Sequence& sequence = sequences[index];
    int64_t end_row = mask::find_rows(shape, sequence.row_begin, sequence.q_len).end;
    if (!last) end_row = mask::smaller<int64_t>(end_row, sequences[index + 1].row_begin);  // whose row that is
    const int64_t in_mask = mask::larger<int64_t>(end_row - sequence.row_begin, 0) * shape.q_block_size;
    begin = int64_t{sequence.q_begin} + mask::clamp<int64_t>(sequence.q_len, 0, in_mask);
  }
  return clamp_gap(begin, last ? rows : sequences[index + 1].q_begin, rows);
}

// The same for keys.
constexpr RowGap find_key_gap(const MaskShape& shape, const Sequence* sequences, int32_t index, int32_t rows) {
  int64_t begin = 0;
  if (index >= 0) {
    const Sequence& sequence = sequences[index];
    begin = int64_t{sequence.k_begin} + mask::clamp<int64_t>(sequence.k_len, 0, shape.cols * shape.k_block_size);
  }
  return clamp_gap(begin, index + 1 < shape.batch ? sequences[index + 1].k_begin : rows, rows);
}

// Rows of queries that tiles of keys stream at once, at most: a segment, the largest power of two of them that divides
// a block of whole granules.
inline constexpr int32_t kMostSegmentRows = 64;

constexpr int32_t segment_rows(int32_t q_block_size) {
  const int32_t power = q_block_size & -q_block_size;
  return power < kMostSegmentRows ? power : kMostSegmentRows;
}

// How the workspace of the backward pass holds query rows: in chunks of 16, none of which has rows of two blocks or
// sequences. The heads of a stack (HeadStack) are one: its row `stack.rows() * q + i` is query q of its head i.
// Where blocks, over their stack, are whole granules, a row's chunk follows from its position, so that a stack has
// hardly more chunks than its tensor, whatever the size of blocks; the chunks of a segment are one sequence's. Other
// blocks are padded to whole chunks, block by block.
struct QueryChunks {
  int64_t count;         // of a stack
  int32_t per_block;     // 0: rows lie by position
  int32_t per_sequence;  // by position, of a batch entry; 0: packed
  int32_t segment_log2;  // by position: a segment's chunks
  HeadStack stack;

  // By position: that of a sequence's first row; those of its other rows follow. Packed sequences begin at least one
  // segment behind the last of the one before, because they begin behind its last row.
  constexpr int32_t first(int32_t sequence, int32_t q_begin) const {
    if (per_sequence > 0) return sequence * per_sequence;
    constexpr int32_t kGranuleLog2 = 4;
    static_assert(1 << kGranuleLog2 == kGranule);
    const int32_t segments = (q_begin << stack.rows_log2) >> (kGranuleLog2 + segment_log2);
    return (segments + sequence) << segment_log2;
  }

  constexpr int32_t row_of_query(int32_t query, int32_t head) const {
    return (query << stack.rows_log2) + head % stack.heads;
  }
  // In its stack; from `stack.heads` on, none.
  constexpr int32_t head_of_row(int64_t row) const { return static_cast<int32_t>(row & (stack.rows() - 1)); }
};

constexpr QueryChunks chunk_queries(const ForwardParams& problem) {
  const MaskShape& shape = problem.mask.shape;
  const HeadStack stack = stack_heads(shape, problem.heads_q, problem.heads_k);
  if (stack.heads == 1 && shape.q_block_size % kGranule != 0) {
    // Blocks may be longer than all sequences.
    const int64_t rows = mask::smaller<int64_t>(shape.q_block_size, problem.rows_q);
    const int64_t per_block = mask::larger<int64_t>(mask::ceil_div(rows, kGranule), 1);
    return {shape.rows * per_block, static_cast<int32_t>(per_block), 0, 0, stack};
  }
  const int32_t rows = segment_rows(stack.rows() * shape.q_block_size), per_segment = rows / kGranule;
  int32_t segment_log2 = 0;
  while ((1 << segment_log2) < per_segment) ++segment_log2;
  const int64_t rows_q = stack.rows() * problem.rows_q;
  if (problem.packed) return {(rows_q / rows + shape.batch) * per_segment, 0, 0, segment_log2, stack};
  const int64_t per_sequence = mask::larger<int64_t>(mask::ceil_div(rows_q, rows), 1) * per_segment;
  return {shape.batch * per_sequence, 0, static_cast<int32_t>(per_sequence), segment_log2, stack};
}

// The query of a chunk's row.
struct QueryPlace {
  bool exists;
  int32_t sequence;
  int64_t row;   // of the sequence's batch entry
  int32_t head;  // in the stack
};

constexpr QueryPlace locate_query(const MaskShape& shape, const Sequence* sequences, const QueryChunks& chunks,
                                  int64_t rows_q, int32_t chunk, int32_t row_in_chunk) {
  // Not 64-bit divisions: those are subroutines on a GPU.
  const auto number = static_cast<uint32_t>(chunk);
  int32_t index = 0;
  int64_t query = 0;  // in its sequence; by position, the row of its stack
  bool in_block = true;
  if (chunks.per_block > 0) {
    const uint32_t row = number / chunks.per_block;
    const int32_t in_row = static_cast<int32_t>(number - row * chunks.per_block) * kGranule + row_in_chunk;
    const mask::RowPlace place = mask::locate_row(shape, sequences, row);
    index = place.index;
    query = place.block * shape.q_block_size + in_row;
    in_block = place.used && in_row < shape.q_block_size;
  } else if (chunks.per_sequence > 0) {
    index = static_cast<int32_t>(number / chunks.per_sequence);
    query = static_cast<int64_t>(number - static_cast<uint32_t>(index) * chunks.per_sequence) * kGranule + row_in_chunk;
  } else {
    const auto first = [&](int32_t sequence) {
      const int64_t begin = mask::clamp<int64_t>(sequences[sequence].q_begin, 0, rows_q);
      return chunks.first(sequence, static_cast<int32_t>(begin));
    };
    index = mask::find_last_sequence<2>(shape.batch, [&](int32_t b) { return first(b) <= chunk; });
    query = (int64_t{chunk} - first(index)) * kGranule + row_in_chunk;
  }
  const int32_t head = chunks.head_of_row(query);
  query >>= chunks.stack.rows_log2;
  const Sequence& sequence = sequences[index];
  const int64_t row = mask::clamp<int64_t>(sequence.q_begin, 0, rows_q) + query;
  const bool exists = in_block && head < chunks.stack.heads && query >= 0 && query < sequence.q_len && row < rows_q;
  return {exists, index, row, head};
}

}  // namespace hbsattn
