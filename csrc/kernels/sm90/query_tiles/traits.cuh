#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cutlass/fast_math.h>
#include <cutlass/numeric_types.h>

#include <algorithm>
#include <climits>
#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "hbsattn/params.h"
#include "kernels/common/dropout.cuh"
#include "kernels/common/query_tiles.cuh"
#include "kernels/sm90/config.h"
#include "plan/pairs.h"
#include "plan/score_scale.h"

namespace hbsattn::sm90 {

// Warps of the producer warpgroup. Keys and values are issued by different warps: one warp alone cannot issue
// 16-row boxes fast enough for both.
enum ProducerWarp : int { kKeyWarp = 0, kTileWarp = 1, kValueWarp = 2, kBufferWarp = 3 };

// Named barriers beside those of turn.cuh.
enum ForwardBarrier : uint32_t {
  kUnit0 = 3,  // the four warps of consumer warpgroup 0
  kUnit1 = 4,  //                                      1
  kUnit2 = 5,  //                                      2
};

inline constexpr int kUnitRows = 64;  // query rows of one consumer warpgroup
// A CTA takes its next tile off the work list when this many keys of the current one are still to be loaded: enough to
// hide the three dependent loads that it takes, and late enough that work goes to whoever is free.
inline constexpr int kTileLeadKeys = 512;

// Row coordinate that lies outside every tensor: the box is zero-filled and still counts its bytes.
inline constexpr int kOutOfBounds = kSm90RowLimit;
// How the stages of a pair of query blocks are filled.
struct PairStages {
  PairOrder order;
  int masked[3];  // by owner, of its stages the first ones that need element masks, the first always among them
  int first_end;  // keys from here on, in the sequence, are visible to no row of the first block

  __device__ __forceinline__ int masked_of(int owner) const { return pick(owner, masked[0], masked[1], masked[2]); }
};

// Beside the united blocks that are active with a segment: those that are partial with it.
inline constexpr int kPartialShift = 16;
// Beside the owner of a stage: it is a masked one.
inline constexpr uint32_t kMaskedStage = 4;

// A tile as the tile warp announces it to the other warps.
struct TileSlot {
  WorkItem item;      // bit_row < 0: no more tiles
  int stages;         // key stages
  int masked_stages;  // of these, the first ones that need element masks, the first stage always among them
  int clean_end;      // stages from here on need them, too
  TileRule rule;      // where heads have rules
  int key_end;        // keys from here on, in the sequence, are visible to no row of the tile
  PairStages pair;    // if tiles have pairs; masked_stages is not used then
};

template <class Config_>
struct QueryTileTraits {
  using Config = Config_;
  using Element = std::conditional_t<Config::kDType == DType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kValueDim = Config::kValueDim;
  static constexpr int kTileN = Config::kTileN;
  static constexpr int kTileNLog2 = cutlass::log2_down<kTileN>::value;
  static constexpr int kKeyStages = Config::kKeyStages;
  static constexpr int kValueStages = Config::kValueStages;
  static constexpr int kTileM = Config::kTileM;
  static constexpr int kUnits = kTileM / kUnitRows;  // consumer warpgroups
  static constexpr int kConsumerWarps = 4 * kUnits;
  static constexpr int kTileReaders = kConsumerWarps + 3;  // warps that read what the tile warp announces
  static constexpr int kThreads = 128 * (1 + kUnits);
  static constexpr int kQueryBuffers = Config::kQueryBuffers;
  static constexpr int kChunkColumns = Config::kChunkColumns;  // of a row, what one swizzle atom spans
  static constexpr int kChunks = kHeadDim / kChunkColumns;
  static constexpr int kValueChunks = kValueDim / kChunkColumns;
  static constexpr int kGranules = kTileN / kGranule;
  // Blocks that a tile may unite, at most: up to head dim 128, small blocks get tiles of 64 rows.
  static constexpr int kUnited = kTileM >= 128 && kHeadDim <= 128 ? 1 : std::min(kTileM / kGranule, 32 / kGranules);
  static constexpr bool kPairs = Config::kPairs;
  static constexpr bool kAltered = Config::kAltered;
  static constexpr bool kCaps = false, kPartial = false;  // of consumers, see altered.cuh
  // Stages that both blocks of a pair attend to, and those of each alone, have barriers of their own that tell that
  // they are full: so nobody waits for what the other alone gets, and still meets each phase of its barriers.
  static constexpr int kOwners = kPairs ? 3 : 1;
  static_assert(kUnited <= kPartialShift && kUnited * kGranules <= 32,
                "the granules of a stage, for each united block, are written by a warp");
  // In stages. Most of a pair's are computed by one unit, and last half as long.
  static constexpr int kTileLead = kTileLeadKeys / kTileN * (kPairs ? 2 : 1);
  static constexpr int kTileSlots = 4;     // a ring; readers may be some tiles behind
  static constexpr int kSegmentSlots = 4;  // a ring
  static constexpr int kSlotStages = 8;    // at most
  // A ring of columns; a pair has two.
  static constexpr int kColumnEntries = kTileM >= 128 && !kPairs ? 512 : 256;
  using Blocks = BitRow<kColumnEntries == 512 ? 8 : 4, kColumnEntries, std::conditional_t<kPairs, PairRows, BitRows>>;
  static constexpr bool kForGradients = false;  // tiles have output gradients beside their queries
  static constexpr bool kAddsKeys = false;      // consumers need to know where all keys lie
  static_assert(kTileM == kUnits * kUnitRows);
  static_assert(kHeadDim % kChunkColumns == 0 && kValueDim % kChunkColumns == 0 && kValueDim <= kHeadDim);

  // 8 rows x kChunkColumns columns, and the same bytes transposed.
  using AtomK = std::conditional_t<kChunkColumns == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                   cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using AtomMN = std::conditional_t<kChunkColumns == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                    cute::GMMA::Layout_MN_SW64_Atom<Element>>;

  // Queries, and later the output: [unit and buffer][chunk][64 rows][columns].
  using SmemLayoutQ = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kUnitRows>, cute::Int<kHeadDim>, cute::Int<kUnits * kQueryBuffers>>{}));

  // Keys and values: [stage][group of 8 keys][chunk][8 keys][columns], so that one box brings whole rows.
  using SmemLayoutK = decltype(cute::tile_to_shape(
      AtomK{}, cute::Shape<cute::Int<kTileN>, cute::Int<kHeadDim>, cute::Int<kKeyStages>>{},
      cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using SmemLayoutVt = decltype(cute::tile_to_shape(
      AtomMN{}, cute::Shape<cute::Int<kValueDim>, cute::Int<kTileN>, cute::Int<kValueStages>>{},
      cute::Step<cute::_1, cute::_2, cute::_3>{}));

  using MmaQK = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kUnitRows>, cute::Int<kTileN>, cute::Int<kHeadDim>>>()));
  using MmaPV = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kUnitRows>, cute::Int<kValueDim>, cute::Int<kTileN>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));

  static constexpr uint32_t kKeyBytes = kTileN * kHeadDim * sizeof(Element);  // of a stage
  static constexpr uint32_t kValueBytes = kTileN * kValueDim * sizeof(Element);
  static constexpr uint32_t kUnitBytes = kUnitRows * kHeadDim * sizeof(Element);
  static constexpr uint32_t kChunkBytes = kChunkColumns * sizeof(Element);
  static constexpr uint32_t kAtomBytes = 8 * kChunkBytes;

  struct alignas(1024) Storage {
    Element keys[kKeyStages][kTileN * kHeadDim];
    Element values[kValueStages][kTileN * kValueDim];
    Element queries[kQueryBuffers][kUnits][kUnitRows * kHeadDim];  // the output leaves from here too
    int32_t columns[kColumnEntries * (kPairs ? 2 : 1)];            // active blocks, as the tile warp expands them
    int32_t segment_keys[kSegmentSlots][32];                       // first keys of segments; -1: none
    // The general kernel's: where keys of a segment end, and the united blocks that are active with it, one bit each.
    // For pairs, the second has the owner of a segment's stage, and whether it is a masked one.
    int32_t segment_ends[kSegmentSlots][32];
    uint32_t segment_with[kSegmentSlots][32];
    // encode_granule for those of a key stage, for each united block.
    alignas(16) int32_t granules[kKeyStages][32];
    uint32_t partial[kAltered ? kKeyStages : 1];  // those of them that are of partial blocks, one bit each
    TileSlot tiles[kTileSlots];
    WorkItem held_items[kQueryBuffers];  // whose queries, or output, the buffers hold
    TileRule rules[kQueryBuffers];       // of the heads of these, where heads have rules
    DropoutRow dropout_rows[kTileM];     // of the tile at hand, where weights are dropped
    uint64_t unread;                     // where hold_back_waits stores; with it begin the barriers
    uint64_t keys_full[kOwners * kKeyStages], keys_empty[kKeyStages];
    uint64_t values_full[kOwners * kValueStages], values_empty[kValueStages];
    // Where boxes bring columns past the head dim: a stage is there, and those columns are yet to be cleared.
    uint64_t keys_landed[kKeyStages], values_landed[kValueStages];
    uint64_t queries_full[kQueryBuffers][kUnits], output_full[kQueryBuffers][kUnits];
    uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
    uint64_t segments_full[kSegmentSlots], segments_empty[kSegmentSlots];
    uint64_t tile_wanted;
  };
  static_assert(sizeof(Storage) <= sm90_shared_limit(Config::kCtasPerSm), "a CTA's shared memory");
};

// Whether a tile may have rows of several query blocks.
template <class Traits, bool kGeneral>
inline constexpr bool kSeveralBlocks = kGeneral || Traits::kPairs;

// Columns of a row past its tensor's, up to the end of their chunk, in vectors of 16 bytes.
struct RowTail {
  int first, count;
};

// What the kernel gets, by value. Coordinates of batched tensors are batch * *_batch_rows + row and
// batch * *_batch_heads + head.
struct QueryTileArguments : QueryTiles {
  CUtensorMap map_q;    // (columns, rows, heads), box kChunkColumns x box_rows x box_heads
  CUtensorMap map_out;  // the same
  // Whole rows: (columns of a chunk, rows, chunks, groups of 8 rows, heads), box of one segment.
  CUtensorMap map_k, map_v;
  // 8 rows of a chunk that end at any row, see tensor_map.h: (columns, rows before the end, wrap, end, heads).
  CUtensorMap map_k_clipped, map_v_clipped;
  CUtensorMap map_q_clipped;  // the same, for boxes of one head

  int item_step;  // to the next record. -1: behind pairs, the list is read from its end, at which `items` points
  int* ticket;    // not read where every item has a CTA

  int q_batch_rows, k_batch_rows, v_batch_rows, out_batch_rows;
  int q_batch_heads, k_batch_heads, v_batch_heads, out_batch_heads;
  int query_piece;  // virtual rows that one query or output box moves: box_rows of each of box_heads heads
  int box_rows, box_heads;
  uint32_t query_bytes;  // that arrive for a unit
  bool whole_rows;       // map_k and map_v can be used; otherwise every stage goes through the clipped maps
  // Boxes of whole rows bring there what follows in memory; behind the last row of a tensor, which whole_k_rows and
  // whole_v_rows leave out, that may be nobody's.
  RowTail k_tail, v_tail;
  int whole_k_rows, whole_v_rows;
  float zero;  // 0, unknown to the compiler
};

// Stages that a slot of segments holds. With many segments a stage, a lane's worth of them each; with few, no more than
// a tile can wait for at its start.
template <class Traits>
__device__ __forceinline__ int slot_stages(const QueryTileArguments& args) {
  return min(32 >> (Traits::kTileNLog2 - args.segment_log2), Traits::kSlotStages);
}

}  // namespace hbsattn::sm90
