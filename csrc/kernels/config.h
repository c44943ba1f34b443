#pragma once

// What each compiled kernel is. No CuTe here: core/ reads this table to choose a kernel, kernels/ to build it.

#include <cstdint>

#include "hbsattn/params.h"

namespace hbsattn {

// Block sizes that are multiples of this run at full rate: one warp's rows of the tensor core, one 16-key step of the
// second product.
inline constexpr int kGranule = 16;

// Query heads that share tiles: those of one key head, if they have one mask. A warp's rows must belong to one head, or
// all heads of a tile must come in one box, whose rows fit one warpgroup.
constexpr int32_t count_packed_heads(const MaskShape& shape, int32_t heads_q, int32_t heads_k, bool pack_heads) {
  const int32_t group = heads_q / heads_k;
  if (!pack_heads || (shape.heads == heads_q && group > 1)) return 1;
  if (shape.q_block_size % kGranule == 0) return group;
  int32_t packed = 1;
  for (int32_t heads = 2; int64_t{heads} * shape.q_block_size <= 64 && heads <= group; ++heads) {
    if (group % heads == 0) packed = heads;
  }
  return packed;
}

// Query rows of a tile, for query blocks that have `rows` rows over the heads that share them. A tile of 128 rows reads
// keys and values once for twice as many rows, so L2 does not hold it back; two CTAs with tiles of 64 reach about 0.8
// of its rate, which pays where a tile of 128 would be emptier than that. Above head dim 128 two CTAs do not fit.
constexpr int32_t choose_tile_rows(int64_t rows, int32_t head_dim) {
  const int64_t of_128 = (rows + 127) / 128 * 128, of_64 = (rows + 63) / 64 * 64;
  return head_dim <= 128 && 5 * of_64 < 4 * of_128 ? 64 : 128;
}

// The same for the forward, which also has tiles of 192 rows: as fast as those of 128 and, at head dim 64, where
// exponentials take as long as products, faster, as three warpgroups fill more gaps. Their kernel is for key blocks of
// whole granules; above head dim 128 three warpgroups have too few registers.
constexpr int32_t choose_forward_tile_rows(int64_t rows, int32_t head_dim, int32_t k_block_size) {
  const int64_t of_192 = (rows + 191) / 192 * 192, of_128 = (rows + 127) / 128 * 128;
  const bool better = of_192 < of_128 || (of_192 == of_128 && head_dim <= 64);
  return head_dim <= 128 && k_block_size % kGranule == 0 && better ? 192 : choose_tile_rows(rows, head_dim);
}

// Neighbouring query blocks that a tile may unite, for query blocks that have `block_rows` rows over the heads that
// share them: as many as fill the tile. The rows of a warp must belong to one block.
constexpr int32_t count_united_blocks(int64_t block_rows, int32_t tile_rows) {
  return block_rows % kGranule == 0 && tile_rows % block_rows == 0 ? static_cast<int32_t>(tile_rows / block_rows) : 1;
}

// How the query blocks of a problem are cut into tiles, for the forward or for gradients: the one place that tells
// planner, checks and launcher.
struct TileShape {
  int32_t packed_heads;  // query heads that share tiles
  int64_t block_rows;    // of a query block, over those heads
  int32_t tile_rows;
  int32_t tiles;   // of a query block
  int32_t united;  // neighbouring query blocks that one tile may hold
};

constexpr TileShape shape_tiles(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                                bool pack_heads, bool for_backward) {
  const int32_t packed_heads = count_packed_heads(shape, heads_q, heads_k, pack_heads);
  const int64_t block_rows = int64_t{packed_heads} * shape.q_block_size;
  const int32_t tile_rows = for_backward ? choose_tile_rows(block_rows, head_dim)
                                         : choose_forward_tile_rows(block_rows, head_dim, shape.k_block_size);
  return {packed_heads, block_rows, tile_rows, static_cast<int32_t>((block_rows + tile_rows - 1) / tile_rows),
          count_united_blocks(block_rows, tile_rows)};
}

// Rows of the tiles of the backward pass: how the key blocks of a problem are cut, the one place that tells.
struct KeyTileShape {
  int32_t tile_keys;
  int32_t tiles;   // of a key block
  int32_t united;  // neighbouring key blocks of a tile; the last tile of a sequence may have fewer

  // Tiles of one sequence and key head.
  constexpr int64_t count(const MaskShape& shape) const { return (shape.cols + united - 1) / united * tiles; }
};

constexpr KeyTileShape shape_key_tiles(const MaskShape& shape, int32_t head_dim) {
  const int32_t tile_keys = head_dim <= 128 ? choose_tile_rows(shape.k_block_size, head_dim) : 64;
  const bool unite = shape.k_block_size % kGranule == 0 && shape.k_block_size < tile_keys;
  return {tile_keys, static_cast<int32_t>((int64_t{shape.k_block_size} + tile_keys - 1) / tile_keys),
          unite ? tile_keys / shape.k_block_size : 1};
}

// Queries, output gradients and sums of query gradients that tiles which run at the same time should find in L2 (50 MB,
// of which what they keep and write and the far partition take a share).
inline constexpr int64_t kSectionBytes = int64_t{32} << 20;

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

inline constexpr int32_t kElementSize = 2;  // bytes, of every dtype that kernels are compiled for

// Keys of all tiles that run at the same time: two CTAs or one to each of 132 multiprocessors. Shorter sequences have
// as many tiles in flight, of several key heads.
inline constexpr int64_t kRunningKeys = 132 * 128;
// What their queries may take of L2, and of what a key head's queries may take until it pays to add gradients of keys
// up.
inline constexpr int64_t kRunningBytes = int64_t{36} << 20, kTogetherBytes = int64_t{5} << 20;

// Query heads that one tile of the backward pass streams: those that read its key head, so that the gradients of its
// keys never leave registers. Where the queries of that many outgrow L2 before they are used again, as many as fit, and
// the tiles of a key head pass on the sum of what they have: the sums of four or more heads take less than half the
// memory of those of the queries. Causal tiles have different numbers of stages and are soon at different heads.
constexpr int32_t count_tile_heads(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                                   int32_t element_size, bool deterministic) {
  const int32_t group = heads_q / heads_k;
  if (deterministic || group < 4 || shape.batch < 1) return group;
  const int64_t of_head = count_query_bytes(shape, head_dim, element_size);
  if (of_head <= kTogetherBytes / group) return group;
  const int64_t running = kRunningKeys * count_row_bytes(head_dim, element_size);
  const int64_t fit = kRunningBytes / (of_head > running ? of_head : running) / (shape.causal ? 2 : 1);
  int32_t heads = group;
  while (heads > 1 && (heads > fit || group % heads != 0)) --heads;
  return heads;
}

// Parts of tiles that the backward pass has room for: 10 MB of float32 gradients of keys and values. As many items may
// follow those of whole tiles in its work list.
constexpr int64_t count_part_slots(int64_t tiles, int32_t tile_keys, int32_t head_dim) {
  const int64_t slots = (int64_t{10} << 20) / (2 * 4 * int64_t{tile_keys} * ((head_dim + 63) / 64 * 64));
  return tiles < slots ? tiles : slots;
}

// The kernels. kTileRows: of what a CTA keeps while it streams the rest.

// A forward kernel for sm_90a. A CTA owns kTileM query rows, 64 for each consumer warpgroup, and streams the keys of
// the active blocks in stages of kTileN, each filled from as many key blocks as fit.
template <DType kDType_, int kHeadDim_, int kTileM_>
struct Sm90Forward {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileRows = kTileM;
  static constexpr int kCtasPerSm = kTileM == 64 ? 2 : 1;
  // Whether there is a second kernel for what the fast one has no code for.
  static constexpr bool kWithGeneral = kTileM != 192;

  // Above head dim 128, the output alone takes 96 or 128 registers a thread: 64 keys a stage leave room for the scores.
  // So they do where three warpgroups share the registers, but for a short output. With two CTAs it is shared memory
  // that leaves no more.
  static constexpr int kTileN = kHeadDim <= 64 || (kHeadDim <= 128 && kTileM == 128) ? 128 : 64;
  // As many as fit beside the queries. For tiles of 128 rows, two of each suffice at head dim 128 (a third is within
  // noise). Tiles of 64 rows wait for L2, and a value stage is held longer than a key stage: until after the softmax;
  // at head dim 128 a second query buffer is worth more than a third value stage.
  static constexpr int kKeyStages = kTileM == 192    ? (kHeadDim == 64   ? 4
                                                        : kHeadDim == 96 ? 5
                                                                         : 3)
                                    : kTileM == 64   ? (kHeadDim == 96 ? 3 : 2)
                                    : kHeadDim == 64 ? 4
                                                     : (kHeadDim == 128 || kHeadDim == 256 ? 2 : 3);
  static constexpr bool kMoreValues = kTileM == 192 ? kHeadDim == 128 : kTileM == 64 && kHeadDim < 128;
  static constexpr int kValueStages = kKeyStages + (kMoreValues ? 1 : 0);
  // Two query buffers let the next tile's queries arrive while the last output still leaves from the other.
  static constexpr int kQueryBuffers = kHeadDim <= 128 ? 2 : 1;
  // Columns that one swizzle pattern spans: 128 bytes, or 64 where the head dim is no multiple of that.
  static constexpr int kChunkColumns = kHeadDim % 64 == 0 ? 64 : 32;

  // 40 * 128 + 232 * 256 registers = 168 * 384, what a CTA of three warpgroups is launched with; 40 + 216 = 2 * 128,
  // what one of two warpgroups is, and 56 + 3 * 152 = 32 + 3 * 160 = 4 * 128, what one of four is. Scores of 128 keys
  // need the latter, though a producer warp then spills a few.
  static constexpr bool kTight = kTileM == 192 && kTileN == 128;
  static constexpr int kProducerRegisters = kTight ? 32 : kTileM == 192 ? 56 : 40;
  static constexpr int kConsumerRegisters = kTight ? 160 : kTileM == 192 ? 152 : kTileM == 128 ? 232 : 216;
};

// A backward kernel for sm_90a. A CTA owns kTileN keys and streams the queries and output gradients of the active
// blocks in stages of kTileM. A consumer warpgroup has 64 of the keys; above head dim 128, where the gradients of that
// many do not fit its registers, two warpgroups share them.
template <DType kDType_, int kHeadDim_, int kTileN_>
struct Sm90Backward {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kTileN = kTileN_;
  static constexpr int kTileRows = kTileN;
  static constexpr bool kWide = kHeadDim > 128;
  static constexpr int kCtasPerSm = kWide ? 1 : 128 / kTileN;
  static constexpr int kTileM = 64;
  // As many as fit: short ones are over before the next are there. At head dim 192 a third brings nothing.
  static constexpr int kStages = kHeadDim == 64 ? 4 : kHeadDim == 96 && kTileN == 128 ? 3 : 2;
  // Columns that one swizzle pattern spans. Two warpgroups that share columns have half of them each: whole patterns.
  static constexpr int kChunkColumns = kHeadDim % (kTileN == 128 || kWide ? 128 : 64) == 0 ? 64 : 32;
  // What ptxas needs for the mainloop without spills, and what is left.
  static constexpr int kConsumerRegisters = kHeadDim == 256 ? 240 : kHeadDim < 128 && kTileN == 64 ? 216 : 232;
  static constexpr int kProducerRegisters = kHeadDim == 256 || (kHeadDim == 128 && kTileN == 64) ? 24 : 40;
  static_assert(!kWide || kTileN == 64);
};

// A kernel for sm_90a that computes the gradient of the queries alone, the same in every run. It has tiles as
// the forward's and streams keys and values as that does, but in narrower stages: two products of their width are in
// registers.
template <DType kDType_, int kHeadDim_, int kTileM_>
struct Sm90GradQueries {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileRows = kTileM;
  static constexpr int kCtasPerSm = 128 / kTileM;
  static constexpr int kTileN = kHeadDim <= 64 && kTileM == 128 ? 128 : kHeadDim <= 192 ? 64 : 32;
  // A key stage is held until the scores of the next one are there and the product behind them is done.
  static constexpr int kKeyStages = kHeadDim == 64 || (kHeadDim == 96 && kTileM == 128) ? 4 : 3;
  static constexpr int kValueStages = kTileM == 64 && kHeadDim == 128 ? 1 : kKeyStages - 1;
  static constexpr int kQueryBuffers = kHeadDim <= 96 || (kHeadDim == 128 && kTileM == 128) ? 2 : 1;
  static constexpr int kChunkColumns = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = kTileM == 128 ? 232 : 216;
};

// A kernel for sm_90a that computes all gradients by tiles of queries. It has tiles as the forward's, and streams, in
// stages of 64 keys: as many accumulators of their gradients fit beside those of the queries.
template <DType kDType_, int kHeadDim_>
struct Sm90QueryBackward {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kTileM = 128;
  static constexpr int kTileRows = kTileM;
  static constexpr int kCtasPerSm = 1;
  static constexpr int kTileN = 64;
  static constexpr int kKeyStages = kHeadDim == 128 ? 3 : 4;
  static constexpr int kValueStages = kKeyStages - 1;
  static constexpr int kQueryBuffers = kHeadDim == 64 ? 2 : 1;
  static constexpr int kChunkColumns = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
};

// How gradients are computed.
enum class BackwardMethod {
  kByKeys,         // by tiles of keys; those of queries are added up in global memory
  kByQueries,      // by tiles of queries; those of keys and values are added up
  kDeterministic,  // those of keys and values by tiles of keys, those of queries by tiles of queries
};

// Tiles of keys compute scores of whole tiles. Where several key blocks share one, tiles of queries compute only those
// that are wanted; as many additions to global memory as tiles of 64 keys need make them slower else.
constexpr BackwardMethod choose_backward_method(const MaskShape& shape, int32_t heads_q, int32_t heads_k,
                                                int32_t head_dim, bool pack_heads, bool deterministic) {
  if (deterministic) return BackwardMethod::kDeterministic;
  // Sizes yet to be checked.
  if (heads_k < 1 || heads_q < heads_k || shape.q_block_size < 1) return BackwardMethod::kByKeys;
  const bool by_queries = head_dim <= 128 && shape.k_block_size < 64 &&
                          shape_tiles(shape, heads_q, heads_k, head_dim, pack_heads, true).tile_rows == 128;
  return by_queries ? BackwardMethod::kByQueries : BackwardMethod::kByKeys;
}

// What the backward pass keeps in its workspace: for each query row, padded to whole granules in each block, its
// log-sum-exp and the dot product of output and output gradient, and, by keys, its gradient in float32. Byte offsets.
struct BackwardWorkspace {
  int64_t block_rows;    // of a query block, padded
  int64_t rows;          // of a head
  int64_t ticket;        // of the persistent CTAs, and behind it a counter for each warpgroup's half of each slot
  int64_t set_counters;  // (heads_k, batch * rows_k), twice above head dim 128, if sets of heads pass sums on
  int64_t sums;        // that tiles add to: by keys, (heads_q, rows / 16) chunks of 16 x padded head_dim floats, in the
                       // order of accumulators; by queries, (2, heads_k, batch * rows_k, padded head_dim) floats
  int64_t zeroed;      // bytes from `ticket` on that are to be 0
  int64_t statistics;  // two arrays (heads_q, rows) of float, each followed by kPaddingRows for rows that do not exist
  int64_t parts;       // gradients of keys and values in parts of tiles, slot after slot
  int64_t set_sums;    // (heads_k, batch * rows_k, 2 x padded head_dim) floats, if sets of heads pass sums on
  int64_t bytes;

  static constexpr int64_t kPaddingRows = 64;
  static constexpr int64_t kAlignment = 128;
};

// `padded_head_dim` is the kernel's.
constexpr BackwardWorkspace lay_out_backward(const ForwardParams& problem, int32_t padded_head_dim,
                                             BackwardMethod method) {
  const auto align = [](int64_t bytes) {
    return (bytes + BackwardWorkspace::kAlignment - 1) / BackwardWorkspace::kAlignment * BackwardWorkspace::kAlignment;
  };
  const MaskShape& shape = problem.mask.shape;
  const KeyTileShape tiles = shape_key_tiles(shape, problem.head_dim);
  const bool by_keys = method == BackwardMethod::kByKeys, by_queries = method == BackwardMethod::kByQueries;
  const int32_t tile_heads =
      count_tile_heads(shape, problem.heads_q, problem.heads_k, problem.head_dim, kElementSize, !by_keys);
  const bool passes_sets = !by_queries && tile_heads < problem.heads_q / problem.heads_k;
  const int64_t all_tiles = int64_t{problem.heads_q / tile_heads} * shape.batch * tiles.count(shape);
  const int64_t keys = problem.heads_k * problem.rows_k * (problem.packed ? 1 : shape.batch);
  const int64_t key_bytes = 2 * 4 * keys * padded_head_dim;
  const int64_t slots = by_queries ? 0 : count_part_slots(all_tiles, tiles.tile_keys, problem.head_dim);
  // Blocks may be longer than all sequences. Segments must not reach into the next block's rows.
  const int64_t block = (int64_t{shape.q_block_size} + kGranule - 1) / kGranule * kGranule;
  const int64_t longest = (problem.rows_q + 63) / 64 * 64;
  BackwardWorkspace workspace{};
  workspace.block_rows = block < longest ? block : longest;
  workspace.rows = shape.rows * workspace.block_rows;
  const int64_t query_bytes = 4 * problem.heads_q * workspace.rows * padded_head_dim;
  workspace.set_counters = workspace.ticket + align(4 * (1 + 2 * slots));
  workspace.sums = workspace.set_counters + align(passes_sets ? 4 * keys * (padded_head_dim > 128 ? 2 : 1) : 0);
  workspace.zeroed = workspace.sums + (by_queries ? key_bytes : by_keys ? query_bytes : 0);
  workspace.statistics = align(workspace.zeroed);
  workspace.parts =
      workspace.statistics + align(2 * 4 * (problem.heads_q * workspace.rows + BackwardWorkspace::kPaddingRows));
  workspace.set_sums = workspace.parts + align(slots * 2 * 4 * tiles.tile_keys * padded_head_dim);
  workspace.bytes = workspace.set_sums + (passes_sets ? key_bytes : 0);
  return workspace;
}

// Bytes of shared memory that a CTA may use when that many share a multiprocessor, of which each CTA costs 1 KB more.
constexpr int sm90_shared_limit(int ctas) { return 228 * 1024 / ctas - 1024; }

}  // namespace hbsattn
