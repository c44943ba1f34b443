#pragma once

#include "kernels/sm80/backward_keys/traits.cuh"

namespace hbsattn::sm80 {

template <class Config_>
struct BackwardByKeysTraits {
  using Config = Config_;
  using Element = ElementOf<Config::kDType>;
  static constexpr int kHeadDim = Config::kHeadDim;
  static constexpr int kTileRows = Config::kTileRows;
  static constexpr int kTileN = Config::kTileN;
  static constexpr int kCtasOfTile = 1;
  static constexpr int kTileM = Config::kTileM;
  static constexpr int kTileMLog2 = cutlass::log2_down<kTileM>::value;
  static constexpr int kStages = Config::kStages;
  static constexpr int kGradBuffers = 2;  // of weights and gradients of scores
  static constexpr int kStrips = Config::kStrips;
  static constexpr int kWarpKeys = 16 * kStrips;
  static constexpr int kWarps = Config::kWarps;
  static constexpr int kGroups = kWarps / 2;  // of two warps, which have the same keys
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kGranules = kTileM / kGranule;
  static constexpr int kColumnEntries = 64;
  using Blocks = BitRow<1, kColumnEntries>;
  static constexpr int kListWarp = 0;  // that lists stages; of those that compute weights
  static constexpr int kListed = 8;    // at a time, at most
  static constexpr int kInfos = 16;    // a ring: the stage before, those in use, loaded ahead, and listed

  // Of the gradients of a stage's queries, what a warp computes: 32 rows, if columns for all warps are whole patches
  // then, or 16.
  static constexpr int kQueryStrips = kHeadDim * kTileM / 32 % (16 * kWarps) == 0 ? 2 : 1;
  static constexpr int kQueryGroups = kTileM / (16 * kQueryStrips);  // of warps with the same columns
  static constexpr int kQueryColumns = kHeadDim * kQueryGroups / kWarps;

  using Keys = SharedRows<Element, kTileN, kHeadDim>;
  using Queries = SharedRows<Element, kTileM, kHeadDim>;
  using GradScores = SharedRows<Element, kTileN, kTileM>;
  static_assert(kTileN == kWarpKeys * kGroups && kQueryColumns % 16 == 0);
  static_assert(kStages == 2 && kInfos > kListed + 2 * kStages && (kInfos & (kInfos - 1)) == 0);
  static_assert(kTileM <= 32 * kGranule && kTileM / 2 <= kThreads);

  struct alignas(128) Storage {
    Element keys[kTileN * kHeadDim];  // their gradients leave from here, those of values from below
    Element values[kTileN * kHeadDim];
    Element queries[kStages][kTileM * kHeadDim];
    Element grad_out[kStages][kTileM * kHeadDim];
    // Before that, weights as half precision floats, times kWeightScale.
    Element grad_scores[kGradBuffers][kTileN * kTileM];
    alignas(16) float lse[kStages][kTileM];    // times log2(e); +inf: the row does not exist or attends to nothing
    alignas(16) float delta[kStages][kTileM];  // what each row of P o dP sums to
    int32_t columns[kColumnEntries];           // active blocks, as they are expanded
    typename Blocks::State blocks;
    StageInfo<kGranules> infos[kInfos];
    StageCursor cursor;
    KeyItem item;
    const uint8_t* first_rows[2];  // of the sequence's output gradients, and of its queries, of the first head
    int seen[kTileN / kGranule];   // keys of the tile up to the last one that some query sees, of each united block
  };
  static_assert((kTileM > 32 ? kSm80Shared163 : kSm80Shared99).count(sizeof(Storage)) >= 1, "a CTA's shared memory");
  static_assert(kSm80Shared163.count(sizeof(Storage)) >= Config::kCtasPerSm, "a multiprocessor's, on 8.0");
};

}  // namespace hbsattn::sm80
