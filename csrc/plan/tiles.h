#pragma once

// How the query blocks and the key blocks of a problem are cut into tiles.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/pairs.h"
#include "plan/policy.h"

namespace hbsattn {

// Block sizes that are multiples of this run at full rate: one warp's rows of the tensor core, one 16-key step of the
// second product.
inline constexpr int kGranule = 16;

// Keys where key blocks are no whole granules: what tells where a block ends takes the bits above.
inline constexpr int kRaggedKeyLimit = 1 << 27;

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

// Whether a sequence has enough keys for pairs: the forward of others is so short that one more launch would tell. One
// that a single block holds has none: how long such blocks are taken to be depends on what else a mask has.
constexpr bool has_keys_for_pairs(int64_t keys, int32_t k_block_size) { return keys >= 512 && keys > k_block_size; }

// Whether the forward looks for query blocks to take in pairs: neighbours of 64 rows each, one for each of two consumer
// warpgroups of a tile of 128, which reads once what both attend to and computes of the rest what each does. Their
// kernel is for key blocks of whole granules, for boxes of one head, and for heads without rules. It is one more
// launch, whether there are such pairs or not, so no sequence of few keys has any, and masks of such sequences alone do
// without. What else a mask has does not decide: results of a sequence must not depend on what lies beside it.
constexpr bool takes_pairs(const MaskShape& shape, int64_t block_rows, int32_t head_dim) {
  return block_rows == 64 && shape.q_block_size % kGranule == 0 && shape.k_block_size % kGranule == 0 &&
         head_dim <= 128 && !shape.ruled && shape.rows > 1 &&
         has_keys_for_pairs(shape.cols * shape.k_block_size, shape.k_block_size);
}

// How the query blocks of a problem are cut into tiles, for the forward or for gradients: the one place that tells
// planner, checks and launcher.
struct TileShape {
  int32_t packed_heads;  // query heads that share tiles
  int64_t block_rows;    // of a query block, over those heads
  int32_t tile_rows;
  int32_t tiles;   // of a query block
  int32_t united;  // neighbouring query blocks that one tile may hold
  // Two neighbours that attend alike share a tile of kPairRows in a kernel of their own, in which each has a consumer
  // warpgroup. `tile_rows` are those of all other tiles. The list has pairs first, heaviest first; the others last,
  // heaviest last, as they are taken from its end; between them the dead, no fewer than pairs.
  bool pairs;
};

inline constexpr int32_t kPairRows = 128;

constexpr TileShape shape_tiles(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                                bool pack_heads, bool for_backward) {
  const int32_t packed_heads = count_packed_heads(shape, heads_q, heads_k, pack_heads);
  const int64_t block_rows = int64_t{packed_heads} * shape.q_block_size;
  const bool pairs = !for_backward && takes_pairs(shape, block_rows, head_dim);
  const int32_t tile_rows = for_backward ? choose_tile_rows(block_rows, head_dim)
                                         : choose_forward_tile_rows(block_rows, head_dim, shape.k_block_size);
  return {packed_heads,
          block_rows,
          tile_rows,
          static_cast<int32_t>((block_rows + tile_rows - 1) / tile_rows),
          pairs ? 2 : count_united_blocks(block_rows, tile_rows),
          pairs};
}

// Whether a call alters scores or weights on their way, which kernels of their own do.
constexpr bool alters_weights(const ForwardParams& params) { return params.dropout_p > 0. || params.softcap > 0.f; }

// Whether a call does, or has a mask with partial blocks: kernels of kSm90 have code for either apart from others.
constexpr bool is_altered(const ForwardParams& params) { return alters_weights(params) || params.mask.shape.partial; }

// Whether a forward has the tiles, and the list, of gradients, whatever else is asked: of pairs and of 192 rows, no
// kernel is for altered calls.
constexpr bool takes_gradient_tiles(const MaskShape& shape, const DevicePolicy& policy) {
  return shape.partial || policy.shares_lists();
}
constexpr bool takes_gradient_tiles(const ForwardParams& params, const DevicePolicy& policy) {
  return alters_weights(params) || takes_gradient_tiles(params.mask.shape, policy);
}

// Rows of the tiles of the backward pass: how the key blocks of a problem are cut, the one place that tells.
struct KeyTileShape {
  int32_t tile_keys;
  int32_t tiles;   // of a key block
  int32_t united;  // neighbouring key blocks of a tile; the last tile of a sequence may have fewer

  // Tiles of one sequence and key head.
  constexpr int64_t count(const MaskShape& shape) const { return (shape.cols + united - 1) / united * tiles; }
};

constexpr KeyTileShape cut_key_blocks(int32_t k_block_size, int32_t tile_keys) {
  const bool unite = k_block_size % kGranule == 0 && k_block_size < tile_keys;
  return {tile_keys, static_cast<int32_t>((int64_t{k_block_size} + tile_keys - 1) / tile_keys),
          unite ? tile_keys / k_block_size : 1};
}

constexpr KeyTileShape shape_key_tiles(const MaskShape& shape, int32_t head_dim) {
  return cut_key_blocks(shape.k_block_size, head_dim <= 128 ? choose_tile_rows(shape.k_block_size, head_dim) : 64);
}

}  // namespace hbsattn
