#pragma once

#include <cutlass/numeric_types.h>

#include <type_traits>

#include "kernels/common/dropout.cuh"
#include "kernels/common/key_limits.cuh"
#include "kernels/common/query_tiles.cuh"
#include "kernels/sm80/config.h"
#include "kernels/sm80/shared_rows.cuh"

namespace hbsattn::sm80 {

template <DType kDType>
using ElementOf =
    std::conditional_t<kDType == DType::kFloat32, float,
                       std::conditional_t<kDType == DType::kBFloat16, cutlass::bfloat16_t, cutlass::half_t>>;

// Where rows of a tensor lie. Strides in bytes.
struct TensorRows {
  const uint8_t* data;
  int64_t batch_stride, head_stride;
  int row_stride;
  int columns;

  // Row `begin` of a head.
  __device__ __forceinline__ const uint8_t* head_of(int sequence, int head, int begin) const {
    return data + sequence * batch_stride + head * head_stride + int64_t{begin} * row_stride;
  }
  // The columns from `column` on.
  template <class Element>
  __device__ __forceinline__ TensorRows from(int column) const {
    TensorRows rows = *this;
    rows.data += column * sizeof(Element);
    rows.columns -= column;
    return rows;
  }
};

// What kernels get that stream keys and values past tiles of query rows.
struct QueryTileArguments : QueryTiles {
  TensorRows q, k, v;
};

// What all threads look up of a tile. In shared memory, as registers are scarce.
struct TileState {
  WorkItem item;  // clamped
  TileStages stages;
  int key_end;                   // keys from here on, in the sequence, are visible to no row of the CTA
  TileRule rule;                 // where heads have rules
  const uint8_t *keys, *values;  // the first rows of the sequence, of the key head
};

template <class Config_>
struct QueryTileTraits {
  using Config = Config_;
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTileM = Config::kTileM;
  static constexpr int kTileN = Config::kTileN;
  static constexpr int kTileNLog2 = cutlass::log2_down<kTileN>::value;
  static constexpr int kStages = Config::kStages;
  static constexpr int kStrips = Config::kStrips;
  static constexpr int kWarps = Config::kWarps;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kCtasOfTile = Config::kTileRows / kTileM;
  static constexpr int kGranules = kTileN / kGranule;
  static constexpr int kColumnEntries = 256;
  using Blocks = BitRow<4, kColumnEntries>;
  using Queries = SharedRows<Element, kTileM, kHeadDim>;
  // What registers hold of queries, and what is read for each stage.
  static constexpr int kHeldColumns = Config::kHeldColumns;
  using ReadQueries = SharedRows<Element, kTileM, kHeadDim - kHeldColumns>;
  using Keys = SharedRows<Element, kTileN, kHeadDim>;
  static_assert(kTileM * Config::kShare == 16 * kStrips * kWarps && kTileN <= 32 * kGranule);

  struct alignas(128) Storage {
    Element queries[kTileM * ReadQueries::kColumns];  // the output leaves from here too
    Element keys[kStages][kTileN * kHeadDim];
    Element values[kStages][kTileN * kHeadDim];
    int32_t columns[kColumnEntries];  // active blocks, as the first warp expands them
    typename Blocks::State blocks;
    TileState tile;
    Segment segments[2][32];  // the slots of stages at hand, and of those after them
    // Where the mask has partial blocks: of each segment, the united blocks that are partial with it, one bit each; and
    // the segments that have any.
    uint32_t partial[2][32], with_partial[2];
    KeyLimits<true> limits[kStrips][kThreads];
    DropoutRow dropout_rows[kTileM];  // where weights are dropped
  };
};

}  // namespace hbsattn::sm80
