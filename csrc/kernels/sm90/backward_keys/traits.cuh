#pragma once

#include <cuda.h>
#include <cutlass/fast_math.h>
#include <cutlass/numeric_types.h>

#include <cute/atom/mma_traits_sm90_gmma.hpp>
#include <cute/tensor.hpp>

#include "hbsattn/params.h"
#include "kernels/common/bit_row.cuh"
#include "kernels/common/key_tiles.cuh"
#include "kernels/common/ptx.cuh"
#include "kernels/sm90/config.h"

namespace hbsattn::sm90 {

// Named barriers beside those of turn.cuh, each of one consumer warpgroup; mainloops have 0 to 3.
enum BackwardBarrier : uint32_t { kParts0 = 4, kParts1 = 5 };

inline constexpr int kUnitKeys = 64;  // keys of one consumer warpgroup

// What the producer tells of a stage beside its rows.
template <int kGranules>
struct StageInfo {
  int masked;              // whether some key of the tile must not see some query of the stage
  int queries[kGranules];  // first query, in the sequence, of each granule; of stacked heads, row of the stack
  int with[kGranules];     // united key blocks that are active with it, one bit each
  int chunks[kGranules];   // of the workspace, where its gradient is added up; -1: the granule is padding
  int stack;               // of query heads, that it is of; where weights are dropped
  HeadRule rule;           // if masked, and heads have rules: that of the stage's; its sink is in places of queries
};

// A word of it, for all lanes: only lane 0 tells the producer that it has read a stage.
__device__ __forceinline__ int read_info(const int& word, int lane) { return uniform(lane == 0 ? word : 0); }

// The same as masks and dropout read it.
template <class Info>
struct InfoReader {
  const Info& info;
  const int lane;

  __device__ __forceinline__ InfoReader(const Info& info, int lane) : info(info), lane(lane) {}

  __device__ __forceinline__ int query(int granule) const { return read_info(info.queries[granule], lane); }
  __device__ __forceinline__ int with(int granule) const { return read_info(info.with[granule], lane); }
  __device__ __forceinline__ int stack() const { return read_info(info.stack, lane); }
  __device__ __forceinline__ int sink() const { return read_info(info.rule.sink, lane); }
  __device__ __forceinline__ int left() const { return read_info(info.rule.left, lane); }
  __device__ __forceinline__ int right() const { return read_info(info.rule.right, lane); }
};

// A tile as the producer announces it to the other warps.
struct KeyTileSlot {
  KeyItem item;     // column < 0: no more tiles
  int first_stage;  // of those of the whole tile
  int stages;
  int hidden_segments;    // that the lists of some heads have at their end, whose queries see no key of the tile
  uint32_t hiding_heads;  // those heads, the bit head % 32 each
  bool skips;  // the last of several stages has no query that sees a key of the second warpgroup, which leaves it out
};

// A CTA takes its next tile off the work list when this many queries of the current one are still to be loaded: enough
// to hide what announcing it takes, and late enough that work goes to whoever is free.
inline constexpr int kTileLeadRows = 256;

template <class Config>
struct BackwardKeysTraits {
  using Element = std::conditional_t<Config::kDType == DType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kValueDim = Config::kValueDim;
  static constexpr int kTileN = Config::kTileN;
  static constexpr int kTileM = Config::kTileM;
  static constexpr int kTileMLog2 = cutlass::log2_down<kTileM>::value;
  static constexpr int kStages = Config::kStages;
  static constexpr bool kWide = Config::kWide;
  static constexpr bool kAltered = Config::kAltered;
  static constexpr bool kCaps = false, kPartial = false;         // of consumers, see altered.cuh
  static constexpr int kUnits = kWide ? 2 : kTileN / kUnitKeys;  // consumer warpgroups
  static constexpr int kConsumerWarps = 4 * kUnits;
  static constexpr int kThreads = 128 * (1 + kUnits);
  static constexpr int kGranules = kTileM / kGranule;
  static constexpr int kChunkColumns = Config::kChunkColumns;
  static constexpr int kChunks = kHeadDim / kChunkColumns;
  static constexpr int kValueChunks = kValueDim / kChunkColumns;
  static constexpr int kTileSlots = 2;                      // a ring
  static constexpr int kTileLead = kTileLeadRows / kTileM;  // in stages
  static constexpr int kTileReaders = kConsumerWarps + 2;   // warps
  static constexpr int kMaxPlanStages = 8;                  // that the producer plans at a time
  static constexpr int kColumnEntries = 256;
  using Blocks = BitRow<4, kColumnEntries>;

  // The gradient of a stage's queries is a product over all keys of the tile. Two warpgroups share it by columns, if
  // half the columns are a whole swizzle pattern: each then needs what the other computed. Otherwise each makes the
  // part that comes from its own keys.
  static constexpr bool kJoint = kWide || (kUnits == 2 && kHeadDim / 2 % kChunkColumns == 0);
  // Columns that registers have room for while the next scores are computed, and how often that many.
  static constexpr int kGradColumns = kJoint || kHeadDim % 128 == 0 ? kHeadDim / 2 : kHeadDim;
  static constexpr int kGradParts = kJoint ? 1 : kHeadDim / kGradColumns;
  // From where a part leaves for global memory: a buffer of its own for each warp or, where there is no room for these,
  // the stage that it is the gradient of. Warpgroups that share keys send it from registers, which no stage waits for.
  static constexpr bool kGradLeavesFromStage = kGradParts == 2;
  static constexpr int kGradFloats = kWide || kGradLeavesFromStage ? 4 : kGranule * kGradColumns;
  // Whether gradients of keys and values leave from there, too.
  static constexpr bool kSendsKeys = kUnits == 2 && !kWide;
  static_assert(!kSendsKeys || kGradFloats * sizeof(float) >= kGranule * kHeadDim * sizeof(Element));
  // Whether a part is sent before the next products are queued: where registers do not suffice for both.
  static constexpr bool kSendsFirst = kGradParts == 2 || kGradColumns > 64;
  static constexpr int kGradKeys = kJoint ? kTileN : kUnitKeys;
  static constexpr int kGradGroups = kJoint ? 1 : kUnits;
  // Two warpgroups take turns with the tensor cores. The product for the queries of a stage then comes a stage late,
  // when both have left their gradients of scores; those of three stages are in use. A single warpgroup does not wait
  // for another, and its slowest warp is waited for before the one buffer is written again.
  static constexpr bool kLate = kUnits == 2;
  // Warpgroups that share keys have two, and two for weights.
  static constexpr int kGradBuffers = kWide ? 4 : kLate ? 3 : 1;
  // Whether the second warpgroup may leave out a stage. Not measured at other head dims.
  static constexpr bool kSkips = kUnits == 2 && kHeadDim == 128 && !kAltered;
  static constexpr int kScoreQueries = kWide ? kTileM / 2 : kTileM;  // whose scores a warpgroup computes

  // 8 rows x kChunkColumns columns, and the same bytes transposed.
  using AtomK = std::conditional_t<kChunkColumns == 64, cute::GMMA::Layout_K_SW128_Atom<Element>,
                                   cute::GMMA::Layout_K_SW64_Atom<Element>>;
  using AtomMN = std::conditional_t<kChunkColumns == 64, cute::GMMA::Layout_MN_SW128_Atom<Element>,
                                    cute::GMMA::Layout_MN_SW64_Atom<Element>>;

  // Rows of keys, values, queries and output gradients lie alike: [group of 8 rows][chunk][8 rows][columns].
  template <int kRows, int kCount, int kColumns = kHeadDim>
  using SmemLayout =
      decltype(cute::tile_to_shape(AtomK{}, cute::Shape<cute::Int<kRows>, cute::Int<kColumns>, cute::Int<kCount>>{},
                                   cute::Step<cute::_2, cute::_1, cute::_3>{}));
  template <int kRows, int kCount, int kColumns = kHeadDim>
  using SmemLayoutTransposed =
      decltype(cute::tile_to_shape(AtomMN{}, cute::Shape<cute::Int<kColumns>, cute::Int<kRows>, cute::Int<kCount>>{},
                                   cute::Step<cute::_1, cute::_2, cute::_3>{}));

  // Gradients of the scores: a row for each key, with the stage's queries.
  using SmemLayoutGradScores =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_K_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<kTileN>, cute::Int<kTileM>, cute::Int<kGradBuffers>>{},
                                   cute::Step<cute::_2, cute::_1, cute::_3>{}));
  using SmemLayoutGradScoresTransposed =
      decltype(cute::tile_to_shape(cute::GMMA::Layout_MN_SW128_Atom<Element>{},
                                   cute::Shape<cute::Int<kTileM>, cute::Int<kTileN>, cute::Int<kGradBuffers>>{},
                                   cute::Step<cute::_1, cute::_2, cute::_3>{}));

  // Keys x queries: the transpose of the scores, and of the gradient of the weights.
  using MmaScores = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kUnitKeys>, cute::Int<kScoreQueries>, cute::Int<kHeadDim>>>()));
  // Keys x columns, over queries: gradients of keys and values.
  using MmaKeys = decltype(cute::make_tiled_mma(
      cute::GMMA::rs_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kUnitKeys>, cute::Int<kHeadDim>, cute::Int<kTileM>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  // The same for half of them, where the weights are not this warpgroup's alone.
  template <int kColumns>
  using MmaHalf = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kUnitKeys>, cute::Int<kColumns / 2>, cute::Int<kTileM>>,
                                 cute::GMMA::Major::K, cute::GMMA::Major::MN>()));
  // Queries x columns, over keys: gradient of the queries.
  using MmaQueries = decltype(cute::make_tiled_mma(
      cute::GMMA::ss_op_selector<Element, Element, float,
                                 cute::Shape<cute::Int<kTileM>, cute::Int<kGradColumns>, cute::Int<kGradKeys>>,
                                 cute::GMMA::Major::MN, cute::GMMA::Major::MN>()));

  static constexpr uint32_t kStageBytes = kTileM * (kHeadDim + kValueDim) * sizeof(Element);
  static constexpr uint32_t kStatisticBytes = kTileM * sizeof(float);
  static constexpr uint32_t kChunkBytes = kChunkColumns * sizeof(Element);
  static constexpr uint32_t kAtomBytes = 8 * kChunkBytes;

  struct alignas(1024) Storage {
    Element keys[kTileN * kHeadDim];
    Element values[kTileN * kValueDim];
    Element queries[kStages][kTileM * kHeadDim];
    Element grad_out[kStages][kTileM * kValueDim];
    Element grad_scores[kGradBuffers][kTileN * kTileM];
    alignas(kSendsKeys ? 1024 : 128) float grad_queries[kConsumerWarps][kGradFloats];
    float lse[kStages][kTileM];    // times log2(e); +inf: the row does not exist or attends to nothing
    float delta[kStages][kTileM];  // what each row of P o dP sums to
    int32_t columns[kColumnEntries];
    StageInfo<kGranules> infos[kStages];
    int parts_before[kUnits];  // of the tile at hand, that were done before this one
    KeyTileSlot tiles[kTileSlots];
    uint64_t tile_full[kTileSlots], tile_empty[kTileSlots];
    uint64_t tile_wanted;
    uint64_t keys_full, keys_empty, values_full, values_empty;
    uint64_t full[kStages], empty[kStages];
    uint64_t grad_scores_full[kGradGroups][kGradBuffers], grad_scores_empty[kGradGroups][kGradBuffers];
  };
  static_assert(sizeof(Storage) <= sm90_shared_limit(Config::kCtasPerSm), "a CTA's shared memory");
  static_assert(kTileM == 64, "a row of gradients of scores is one swizzle pattern");
};

// What the kernel gets, by value. Coordinates of batched tensors are batch * *_batch_rows + row and
// batch * *_batch_heads + head.
struct BackwardKeysArguments : KeyTiles {
  // Whole rows: (columns of a chunk, rows, chunks, groups of 8 rows, heads), box of one segment. Of stacked heads these
  // are the rows, and queries the heads.
  CUtensorMap map_q, map_grad_out;
  CUtensorMap map_k, map_v;            // the same, box of a tile
  CUtensorMap map_grad_k, map_grad_v;  // (columns, rows, heads), box of a chunk of 16 rows
  int grad_k_batch_rows, grad_v_batch_rows, grad_k_batch_heads, grad_v_batch_heads;
  // 8 rows of a chunk that end at any row, see tensor_map.h: (columns, rows before the end, wrap, end, heads). Those
  // of stacked heads: 8 heads of a query, (columns, heads of a stack, stacks, 1, queries).
  CUtensorMap map_q_clipped, map_grad_out_clipped, map_k_clipped, map_v_clipped;

  int* ticket;
  int* parts_done;  // (slots, warpgroups): parts of a tile that are done, counted in its first slot
  float4*
      part_sums;  // (slots, warpgroups): gradients of keys and values that parts leave, in the order of accumulators
  float* grad_q;

  int q_batch_rows, grad_out_batch_rows, k_batch_rows, v_batch_rows;
  int k_batch_heads, v_batch_heads;
  // If a key head has several sets of queries, their tiles of the same keys pass on:
  float* set_sums;  // (heads_k, all_rows_k, 2 x head dim of the kernel), see SetSum
  // (heads_k, all_rows_k, warps that share a row), of which those of each warp's first row count.
  uint32_t* set_counters;
  int64_t all_rows_k;  // over the batch
  int sum_batch_rows;  // between batch entries; 0 when packed
  bool whole_rows;     // maps of whole rows can be used; otherwise all rows come through the clipped maps
  bool whole_queries;  // the same for queries
};

}  // namespace hbsattn::sm90
