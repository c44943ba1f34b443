#pragma once

#include <cstddef>
#include <cstdint>

struct CUstream_st;

namespace hbsattn {

// The type of cudaStream_t, declared here so that no CUDA header is needed to include this one.
using Stream = CUstream_st*;

enum class DType : int32_t { kFloat16 = 0, kBFloat16 = 1, kFloat32 = 2, kFloat64 = 3 };

// Bytes.
constexpr int32_t element_size_of(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

// Where one sequence of the batch lies. Row of an int32 (batch, 7) device table.
//
// Packed (varlen) tensors: q_begin and k_begin are rows of the packed tensors. Batched tensors: both are 0, and
// the position in the table is the batch index.
struct Sequence {
  int32_t q_begin;
  int32_t q_len;
  int32_t k_begin;
  int32_t k_len;
  int32_t row_begin;  // first row of the bit matrix: that of query block 0
  int32_t col_begin;  // first column of a flat dense mask: key blocks of all sequences before this one
  // Of a causal mask: query i attends to keys up to i + diagonal. make_sequences() has k_len - q_len here, so that the
  // last query attends to the last key; of lengths past the tensors those that are claimed, as what is cut off them
  // must not move the others. A table of a part of the queries may have another.
  int32_t diagonal;
};

// Sizes that the host knows without waiting for the device.
struct MaskShape {
  int32_t batch = 0;         // sequences
  int32_t heads = 0;         // mask heads: 1, heads_k or heads_q
  int64_t rows = 0;          // query blocks of all sequences (an upper bound where padded)
  int64_t cols = 0;          // key blocks of the longest sequence (an upper bound)
  int32_t q_block_size = 0;  // queries in a block
  int32_t k_block_size = 0;  // keys in a block
  bool causal = false;       // key j counts for query i if j <= i + Sequence::diagonal
  bool ruled = false;        // each mask head also has a rule of its own, in MaskView::rules
  bool partial = false;      // active blocks may be partial: MaskView::partial

  constexpr int64_t words() const { return (cols + 31) / 32; }             // of a bit row
  constexpr int64_t row_words() const { return (rows + 31) / 32; }         // of a column
  constexpr int64_t granules() const { return (k_block_size + 15) / 16; }  // of 16 keys, in a block
};

// The element rule of a mask head. On top of the block mask and of causality, key j counts for query i if j < sink or
// i + Sequence::diagonal - left <= j <= i + Sequence::diagonal + right. Row of an int32 (heads, 4) device table.
struct alignas(16) HeadRule {
  int32_t left;   // negative: unbounded
  int32_t right;  // the same
  int32_t sink;   // first keys of a sequence, which the window does not hide
  int32_t unused;
};

// 32 columns of a bit row. Of a block that is active and has its bit here, a matrix says which pairs of a query and a
// key count: that at place `first` and following of MaskView::matrices, in the order of columns.
struct alignas(8) PartialWord {
  uint32_t bits;
  int32_t first;
};

// A packed mask. Bit c % 32 of bits[h][row][c / 32] says whether the query block of this row attends to key block
// c of its own sequence; columns past the sequence's end and, if causal, past the diagonal are 0. Where rules let no
// query of the block see a key of c, the bit should be 0: results are the same, but such blocks would be streamed.
struct MaskView {
  MaskShape shape;
  const uint32_t* bits = nullptr;       // (heads, rows, words), contiguous
  const Sequence* sequences = nullptr;  // (batch)
  const HeadRule* rules = nullptr;      // (heads), if shape.ruled

  // If shape.partial. Places and numbers of matrices that lie are cut to those that there are.
  const PartialWord* partial = nullptr;  // (heads, rows, words)
  const int32_t* matrices = nullptr;     // (num_partial), the number of each partial block's matrix
  int64_t num_partial = 0;
  // Bit k % 16 of elements[n][q][k / 16] says whether query q of a block counts for key k of it.
  const uint16_t* elements = nullptr;  // (num_matrices, q_block_size, ceil(k_block_size / 16))
  int64_t num_matrices = 0;
};

// Packed: cu_seqlens_* point to int32 (batch + 1) on the device. Batched: they are null and seqlen_* hold.
struct SequencesParams {
  MaskShape shape;
  const int32_t* cu_seqlens_q = nullptr;
  const int32_t* cu_seqlens_k = nullptr;
  int64_t seqlen_q = 0;
  int64_t seqlen_k = 0;
  // Rows of the bit matrix between two sequences; -1: rows lie without gaps.
  int64_t row_stride = -1;
  Sequence* sequences = nullptr;  // out, (batch)
};

// Any of the three forms of a block mask, as the user has it. Two layouts. Flat: no batch dimension, rows of all
// sequences one after another. Batched: (batch or 1, heads, blocks per sequence, ...).
struct PackSource {
  enum class Form : int32_t { kDense, kIndices, kCsr };
  Form form = Form::kDense;
  bool flat = false;

  // kDense: bool. flat (heads, rows, columns of all sequences, on the block diagonal); batched (batch or 1, heads,
  // q blocks, k blocks). Strides in elements; batch_stride is 0 for a mask that all sequences share.
  const uint8_t* dense = nullptr;
  int64_t dense_rows = 0;  // rows of one head: the extent of the row dimension
  int64_t dense_cols = 0;  // the extent of the column dimension
  int64_t batch_stride = 0, head_stride = 0, row_stride = 0, col_stride = 0;

  // kIndices: int32, contiguous. flat: counts (heads, rows), indices (heads, rows, width); batched: counts
  // (batch or 1, heads, q blocks), indices (batch or 1, heads, q blocks, width). Entries are key blocks of the row's
  // own sequence; entries past the count are not read, those out of range are dropped. Of the strides above only
  // batch_stride matters: counts of one sequence (heads * q blocks), or 0 for lists that all sequences share.
  const int32_t* counts = nullptr;
  int64_t width = 0;

  // kCsr: int32, contiguous. indptr (heads, rows + 1) holds positions in indices (nnz).
  const int32_t* indptr = nullptr;
  int64_t nnz = 0;

  const int32_t* indices = nullptr;  // kIndices and kCsr
};

struct PackParams {
  MaskShape shape;
  const Sequence* sequences = nullptr;  // (batch)
  // If table.sequences is not null, it is the same memory, and pack_mask fills it before it packs, as
  // make_sequences(table) would, in less time.
  SequencesParams table;
  PackSource source;
  uint32_t* bits = nullptr;  // out, (heads, rows, words)
};

// Records of work lists have 64 bytes, which four lanes write and a tile warp reads at once, and hold what belongs to
// one tile. What belongs to a head, such as its rule, is no field but a row of a table in device memory: a tile of keys
// streams queries of several heads. A query tile that is split over its keys needs to know its part, of how many, and
// where sums lie: KeyItem has these, and WorkItem room for them where tiles have no pairs, part and parts in one int.

// One stationary tile of the forward kernel: up to 64 or 128 "virtual rows" of one query block. When `packed_heads`
// query heads share the mask, virtual row v of a query block stands for row v % q_block_size of head v / q_block_size.
// Small neighbouring blocks of a sequence that attend alike may be united: one tile has the rows of all, one after
// another, and reads each key block that any of them is active with. Where blocks of 64 rows may come in pairs
// (TileShape::pairs), so do neighbours that attend alike: one tile has both, and each computes what it attends to.
struct alignas(64) WorkItem {
  int32_t bit_row;    // row of the bit matrix over all heads: mask head * rows + row; of the first block, if united
  int32_t sequence;   // batch index
  int32_t head;       // first query head of the tile's group
  int32_t block_row;  // first query of the block, in its sequence
  int32_t first_row;  // first virtual row of the tile within the block
  int32_t blocks;     // active key blocks; of a pair, those of its two blocks added up
  int32_t masked;     // of these, the last ones (largest columns), which need element masks; of a pair 0: it finds them
  int32_t col_end;    // columns from here on are not visible to any row of the tile
  int32_t q_begin;    // copied from Sequence
  int32_t q_len;
  int32_t k_begin;
  int32_t k_len;
  int32_t diagonal;
  int32_t united;    // query blocks of the tile. 0: a dead item, as the tile of another has this block, or the tile no
                     // query; such items end the list, or part it (TileShape::pairs), and their bit_row is -1
  int32_t alone[2];  // of a pair, the key blocks that one of its blocks is active with and the other not. Otherwise
                     // alone[0] is `tail`: of the blocks, the first ones (smallest columns), which a rule's window may
                     // hide from some row, and which need element masks, too

  constexpr int32_t tail() const { return alone[0]; }
};

// The work list of one mask for one (heads_q, heads_k, head_dim, element size): a record per tile, heaviest first
// within sections whose keys and values fit the L2 cache; where there may be pairs, in two parts (TileShape::pairs).
struct PlanParams {
  MaskView mask;
  int32_t heads_q = 0;
  int32_t heads_k = 0;
  int32_t head_dim = 0;       // as in the ForwardParams of the calls that use the list
  int32_t element_size = 2;   // of q, in bytes
  bool pack_heads = true;     // let query heads that share a mask and a key head share tiles
  bool for_backward = false;  // a list for gradients, whose tiles may have fewer rows, and add to gradients of keys
  void* scratch = nullptr;    // plan_scratch_size(num_items) bytes, aligned to 4
  WorkItem* items = nullptr;  // out, (num_items)
  int64_t num_items = 0;      // that there is room for, num_items() or more; those left over end the list, as dead ones
  // Of a forward call that comes behind on the same stream, which takes less time if its workspace is cleared here.
  void* workspace = nullptr;  // out, forward_workspace_size() bytes; may be null
};

// The mask as the keys see it: the transpose of its bits. Bit r % 32 of columns[h][c][r / 32] is bit c of row r; the
// query blocks of a sequence are bits Sequence::row_begin and following of the columns that are its key blocks.
struct TransposeParams {
  MaskView mask;
  uint32_t* columns = nullptr;  // out, (heads, cols, row_words)
};

// One stationary tile of the backward kernel: up to 64 or 128 keys of one key block and key head, and the set of
// queries that it streams. Where blocks are smaller, neighbouring blocks share a tile, which then streams each query
// block that is active with any of them.
struct alignas(64) KeyItem {
  int32_t column;     // key block, in its sequence; the first, if united. -1: no tile; such items end the list
  int32_t sequence;   // batch index
  int32_t query_set;  // of the queries, cut into sets that read one key head each: by heads, and by windows of each
                      // sequence
  int32_t first_key;  // of the tile, in its sequence
  int32_t keys;       // of the tile; fewer than its rows where its blocks or the sequence end before
  int32_t united;     // key blocks of the tile
  int32_t active;     // which of them some query block is active with, one bit each
  int32_t blocks;     // active query blocks, added up over the query heads of the set
  int32_t row_begin;  // copied from Sequence, as are the following
  int32_t q_begin;
  int32_t q_len;
  int32_t k_begin;
  int32_t diagonal;
  int32_t part;   // a far heavier tile than others is cut: this item streams one of `parts` equal parts of its queries,
  int32_t parts;  // and adds what it has to what the others left in the workspace, if it is the last to end
  int32_t slot;   // of the workspace, that of part 0
};

// The work list of the backward pass: a record per tile, heaviest first within sections whose queries and gradients fit
// the L2 cache; tiles far heavier than the others come before all, in parts.
struct KeyPlanParams {
  MaskView mask;                      // of which bits are not read
  const uint32_t* columns = nullptr;  // (heads, cols, row_words)
  int32_t heads_q = 0;
  int32_t heads_k = 0;
  int32_t head_dim = 0;        // as in the ForwardParams of the calls that use the list
  int32_t element_size = 2;    // of q, in bytes
  bool deterministic = false;  // as in the BackwardParams of the calls that use the list
  bool packed = false;         // likewise
  int64_t rows_k = 0;          // keys of the packed tensor, or more: a list for more keys serves fewer
  void* scratch = nullptr;     // key_plan_scratch_size(num_items) bytes, aligned to 8
  KeyItem* items = nullptr;    // out, (num_items)
  int64_t num_items = 0;       // that there is room for, num_key_items() or more; those left over end the list
};

// A tensor of (batch, rows, heads, head_dim) or, packed, (rows, heads, head_dim). Strides in elements; the last
// dimension is contiguous.
struct TensorView {
  void* data = nullptr;
  int64_t batch_stride = 0;  // not read when packed
  int64_t row_stride = 0;
  int64_t head_stride = 0;
  int32_t columns = 0;  // its head dim, where that is below the problem's; 0: it is the same
};

// forward() takes head dims that are multiples of this: the copy engine addresses rows by 16 bytes. Others need copies
// with zeros behind each row.
inline constexpr int32_t kHeadDimMultiple = 8;

// Below, gradients lose the slope of the cap, which they find from weights; beyond, scores may leave float32.
inline constexpr float kLeastSoftcap = 0.01f, kMostSoftcap = 1e6f;

struct ForwardParams {
  TensorView q;          // (batch, seqlen_q, heads_q, head_dim) or (total_q, heads_q, head_dim)
  TensorView k;          // (batch, seqlen_k, heads_k, head_dim) or (total_k, heads_k, head_dim)
  TensorView v;          // as k; its columns may be others, those of out
  TensorView out;        // as q, but for that
  float* lse = nullptr;  // natural log; (batch, heads_q, seqlen_q) or (heads_q, total_q), contiguous

  bool packed = false;
  int64_t rows_q = 0;  // seqlen_q, or total_q when packed
  int64_t rows_k = 0;  // seqlen_k, or total_k when packed
  int32_t heads_q = 0;
  int32_t heads_k = 0;
  int32_t head_dim = 0;  // of q and k, or of v and out, if theirs is greater: views of the others have `columns`
  DType dtype = DType::kBFloat16;
  float softmax_scale = 0.f;
  // Of each query head a score, in natural units, that counts in the sum of every query's weights and has no value;
  // -inf or below -1e38: none. (heads_q), or null: no head has one.
  const float* sinks = nullptr;
  // The probability with which a weight is dropped, from 0 to below 1, rounded to a multiple of 2^-15; the others are
  // divided by what is left of 1. Which are dropped is a function of two numbers on the device, seed and offset, and of
  // a weight's sequence, query head, query and key. Not read where the probability is 0. lse is that of all weights.
  double dropout_p = 0.;
  const int64_t* dropout_seed = nullptr;  // (2)
  // Where a scaled score s ends: it becomes softcap * tanh(s / softcap). 0: nowhere; else kLeastSoftcap to
  // kMostSoftcap. Sinks are not capped.
  float softcap = 0.f;
  // Of float32: products may be those of single numbers in TF32, which has 11 digits, instead of sums of three that are
  // about as exact as float32's own. A backward call takes what the forward took, whose weights it computes again.
  bool allow_tf32 = false;

  MaskView mask;
  bool pack_heads = true;           // as in PlanParams
  const WorkItem* items = nullptr;  // (num_items); with dropout or a softcap, of a list `for_backward`
  int64_t num_items = 0;            // num_items() or more, as planned

  void* workspace = nullptr;  // device, forward_workspace_size() bytes; not shared by concurrent calls
  // plan_items has cleared the workspace (PlanParams::workspace), and no call has used it since.
  bool workspace_is_clear = false;
  // Optional, (2 x multiprocessors, 2), of zeros: the clock of each SM at the start of its first CTA and the end of its
  // last one, in the row of the SM's number.
  int64_t* cycles = nullptr;
};

// Gradients of forward(). `problem` is that of the forward call, with its results in `out` and `lse`; its workspace and
// cycles are not used. hbsattn.h says which work lists are; its items, if they are, come from a list `for_backward`.
struct BackwardParams {
  ForwardParams problem;
  TensorView grad_out;              // as out
  const float* grad_lse = nullptr;  // as lse; null: zeros
  TensorView grad_q;                // out, as q
  TensorView grad_k;                // out, as k
  TensorView grad_v;                // out, as v
  // Which of the three are computed. The others are not written, and their views may be empty. Without grad_q, or
  // without both grad_k and grad_v, a call takes less time and workspace; one of grad_k and grad_v costs what both do.
  bool needs_q = true, needs_k = true, needs_v = true;
  float* grad_sinks = nullptr;  // out, (heads_q); null: not needed. Takes a pass over 8 bytes a row

  const uint32_t* columns = nullptr;   // (heads, cols, row_words)
  const KeyItem* key_items = nullptr;  // (num_key_items)
  int64_t num_key_items = 0;           // num_key_items() or more, as planned
  bool deterministic = false;          // gradients are the same in every run; without, nothing promises it

  void* workspace = nullptr;  // device, backward_workspace_size() bytes, aligned to 128; not shared by concurrent calls
};

}  // namespace hbsattn
