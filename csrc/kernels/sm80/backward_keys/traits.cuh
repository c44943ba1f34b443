#pragma once

#include <cutlass/fast_math.h>
#include <cutlass/numeric_types.h>

#include <type_traits>

#include "kernels/common/key_dropout.cuh"
#include "kernels/common/key_tiles.cuh"
#include "kernels/common/query_limits.cuh"
#include "kernels/sm80/config.h"
#include "kernels/sm80/query_tiles/traits.cuh"
#include "kernels/sm80/shared_rows.cuh"

namespace hbsattn::sm80 {

// What the kernel gets, by value.
struct BackwardKeysArguments : KeyTiles {
  TensorRows q, k, v, grad_out;
  bool allow_tf32;  // of float32
};

// What the warp that lists stages tells of one. Granules have their first query, in the sequence; of stacked heads, row
// of the stack.
template <int kGranules>
struct StageInfo {
  int queries[kGranules];  // -1: the granule is padding
  int ends[kGranules];     // its queries end here, or with the granule
  int withs[kGranules];    // united key blocks that are active with it, one bit each
  int chunks[kGranules];   // of the workspace
  int of_stack;            // of query heads; -1: there is no such stage, and none behind it
  int masked;              // whether some key of the tile must not see some query of the stage
  int rule[3];             // of its heads: sink, less the diagonal, left and right

  // As mask_queries and KeyDropout ask.
  __device__ __forceinline__ int query(int granule) const { return queries[granule]; }
  __device__ __forceinline__ int with(int granule) const { return withs[granule]; }
  __device__ __forceinline__ int stack() const { return of_stack; }
  __device__ __forceinline__ int sink() const { return rule[0]; }
  __device__ __forceinline__ int left() const { return rule[1]; }
  __device__ __forceinline__ int right() const { return rule[2]; }
};

// Where listing stages goes on.
struct StageCursor {
  int stack;    // of query heads
  int segment;  // of its list
  int listed;   // stages
};

template <class Config_>
struct BackwardKeysTraits {
  using Config = Config_;
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTileRows = Config::kTileRows;
  static constexpr int kTileN = Config::kTileN;
  static constexpr int kCtasOfTile = kTileRows / kTileN;
  static constexpr int kTileM = Config::kTileM;
  static constexpr int kTileMLog2 = cutlass::log2_down<kTileM>::value;
  static constexpr int kStages = Config::kStages;
  static constexpr int kStrips = Config::kStrips;
  static constexpr int kWarps = Config::kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kGranules = kTileM / kGranule;
  static constexpr int kWarpKeys = 16 * kStrips;
  static constexpr int kShare = Config::kShare;       // warps have the same keys, and compute all scores of them;
  static constexpr int kColumns = kHeadDim / kShare;  // of both sums, each has so many columns
  static constexpr int kColumnEntries = 128;
  using Blocks = BitRow<2, kColumnEntries>;
  static constexpr int kListWarp = 0;                  // that lists stages
  static constexpr int kListed = kTileM > 32 ? 4 : 8;  // at a time, at most
  static constexpr int kInfos = 2 * kListed;           // a ring: stages in use, those loaded ahead, and those listed

  using Keys = SharedRows<Element, kTileN, kHeadDim>;
  using Queries = SharedRows<Element, kTileM, kHeadDim>;
  static_assert(kTileN == kWarpKeys * kWarps / kShare && kStages >= 2);
  static_assert(kInfos >= kListed + 2 * kStages - 1 && (kInfos & (kInfos - 1)) == 0);
  static_assert(kTileM <= 32 * kGranule && kTileM / 2 <= kThreads);

  struct alignas(128) Storage {
    Element keys[kTileN * kHeadDim];  // their gradients leave from here, those of values from below
    Element values[kTileN * kHeadDim];
    Element queries[kStages][kTileM * kHeadDim];
    Element grad_out[kStages][kTileM * kHeadDim];
    alignas(16) float lse[kStages][kTileM];    // times log2(e); +inf: the row does not exist or attends to nothing
    alignas(16) float delta[kStages][kTileM];  // what each row of P o dP sums to
    int32_t columns[kColumnEntries];           // active blocks, as they are expanded
    typename Blocks::State blocks;
    StageInfo<kGranules> infos[kInfos];
    StageCursor cursor;
    KeyItem item;
  };
};

// What kernels get that add up gradients of queries.
struct BackwardByKeysArguments : BackwardKeysArguments {
  float* grad_q;  // unscaled: (stacks, chunks) of 16 x kHeadDim floats, in the order of accumulators
};

// The same kernel of float32 where it adds those up.
template <class Config>
struct AddingBackwardKeysTraits : BackwardKeysTraits<Config> {
  using Base = BackwardKeysTraits<Config>;
  using GradScores = SharedRows<typename Base::Element, Base::kTileM, Base::kTileN>;
  static constexpr int kQueryColumns = Base::kHeadDim / Base::kWarps;  // of gradients of a stage's queries, of a warp
  static_assert(Base::kShare == 1 && Base::kStrips == 1 && kQueryColumns % 16 == 0);
  struct alignas(128) Storage : Base::Storage {
    alignas(128) typename Base::Element grad_scores[Base::kTileM * Base::kTileN];
    int seen[Base::kTileRows / kGranule];  // as in BackwardByKeysTraits
  };
  static_assert((Base::kHeadDim > 64 ? kSm80Shared163 : kSm80Shared99).count(sizeof(Storage)) >= 1, "a CTA's");
  static_assert(kSm80Shared163.count(sizeof(Storage)) >= Config::kCtasPerSm, "a multiprocessor's, on 8.0");
};

}  // namespace hbsattn::sm80
