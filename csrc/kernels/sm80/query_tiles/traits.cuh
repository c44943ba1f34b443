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
  bool two_stages;  // of keys and values have room; of kernels that may have two
  bool allow_tf32;  // of float32
};

// What all threads look up of a tile. In shared memory, as registers are scarce.
struct TileState {
  WorkItem item;  // clamped
  TileStages stages;
  int key_end;                   // keys from here on, in the sequence, are visible to no row of the CTA
  TileRule rule;                 // where heads have rules
  const uint8_t *keys, *values;  // the first rows of the sequence, of the key head
};

// A segment as all threads look it up. Of one without keys, `end` is `key`.
struct alignas(16) StageSegment : Segment {
  uint32_t partial;  // united blocks that are partial with it, one bit each; where the mask has such
};

// What masks ask of a warp's strip of 16 rows, as KeyLimits has it for each lane.
struct StripLimits {
  int value[16], place[16];
  int least, granules, last_place;

  // By all lanes of a warp; there for them behind the next barrier.
  __device__ __forceinline__ void leave(const KeyLimits<true>& limits, int lane) {
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      if (lane % 4 > 0) break;
      value[lane / 4 + 8 * row] = limits.value[row];
      place[lane / 4 + 8 * row] = limits.place[row];
    }
    if (lane > 0) return;
    least = limits.least;
    granules = limits.granules;
    last_place = limits.last_place;
  }
  __device__ __forceinline__ KeyLimits<true> of_lane(int lane) const {
    KeyLimits<true> limits;
    CUTE_UNROLL
    for (int row = 0; row < 2; ++row) {
      limits.value[row] = value[lane / 4 + 8 * row] - 2 * (lane & 3);
      limits.place[row] = place[lane / 4 + 8 * row];
    }
    limits.least = least;
    limits.granules = granules;
    limits.last_place = last_place;
    limits.buffer = 0;
    return limits;
  }
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
    int32_t columns[kColumnEntries];  // active blocks, as the first warp expands them
    typename Blocks::State blocks;
    TileState tile;
    StageSegment segments[2][32];  // the slots of stages at hand, and of those after them
    uint32_t with_partial[2];      // those of them with partial blocks, one bit each; where the mask has such
    StripLimits limits[kWarps][kStrips];
    DropoutRow dropout_rows[kTileM];  // where weights are dropped
    // What all rows are copied to and leave from, as if there were no stages behind.
    alignas(128) Element queries[ReadQueries::kColumns == 0 ? 64 : kTileM * ReadQueries::kColumns];
    Element keys[kStages][kTileN * kHeadDim];
    Element values[kStages][kTileN * kHeadDim];  // last, as some launches leave room for one stage
  };
};

}  // namespace hbsattn::sm80
