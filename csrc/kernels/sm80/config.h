#pragma once

// What each kernel of the family for compute capability 8.0 and up is, and why. No CuTe here: core/ reads it to choose
// a kernel, the kernels to build it.
//
// kTileRows: of the plan's tiles. kTileM: of those, query rows that a CTA computes; where it is less, several CTAs
// share a tile, and each streams the tile's blocks. kStrips: of 16 rows, that a warp has: fragments of keys and values
// are read from shared memory once for all of them.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/tiles.h"

namespace hbsattn {

// A forward kernel. A CTA streams the keys of the active blocks in stages of kTileN. One stage of keys and one of
// values let two CTAs share the 164 KB of an 8.0 device, and one have the 99 KB of smaller ones. With two of each,
// tiles of 128 rows took 0.94 of the time on an H200, which has room for them.
template <DType kDType_, int kHeadDim_, int kTileRows_>
struct Sm80Forward {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: columns past those of the tensors are zeros
  static constexpr int kTileRows = kTileRows_;
  // Above head dim 128 the output of two strips does not fit the registers of four warps.
  static constexpr int kTileM = kHeadDim > 128 ? 64 : kTileRows;
  // With eight warps of one strip, which read keys and values from shared memory twice as often, tiles of 128 rows took
  // 1.3 of the time (H200).
  static constexpr int kWarps = 4;
  static constexpr int kStrips = kTileM / (16 * kWarps);
  static constexpr int kTileN = kHeadDim > 192 ? 32 : 64;
  static constexpr int kStages = 1;  // of keys, and of values
  static constexpr int kCtasPerSm = 2;
};

// A kernel that computes the gradient of the queries, with tiles as the forward's. What it is was not swept.
template <DType kDType_, int kHeadDim_, int kTileRows_>
struct Sm80GradQueries {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileRows = kTileRows_;
  // At head dim 128, by shared memory of 99 KB.
  static constexpr int kTileM = kHeadDim >= 128 ? 64 : kTileRows;
  static constexpr int kWarps = 4;
  static constexpr int kStrips = kTileM / (16 * kWarps);
  // Two products of this width are in registers beside the gradient.
  static constexpr int kTileN = kHeadDim >= 128 || kTileM == 128 ? 32 : 64;
  static constexpr int kStages = 2;
  static constexpr int kCtasPerSm = kHeadDim <= 128 ? 2 : 1;
};

// A kernel that computes the gradients of keys and values. A CTA owns kTileRows keys and streams the queries and output
// gradients of the active blocks in stages of kTileM.
template <DType kDType_, int kHeadDim_, int kTileRows_>
struct Sm80BackwardKeys {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileRows = kTileRows_;  // keys
  static constexpr int kTileN = kTileRows;
  // Two gradients of a warp's keys are in registers. Above head dim 128 those of 16 keys do not fit, so two warps share
  // keys: each computes the scores of half the stage's queries, and both gradients in half the columns.
  static constexpr int kShare = kHeadDim > 128 ? 2 : 1;
  static constexpr int kStrips = kHeadDim <= 64 && kTileN == 128 ? 2 : 1;
  static constexpr int kWarps = kTileN / (16 * kStrips) * kShare;
  // Stages are half as long as there would be room for if there was one: the next is on its way while one is used.
  static constexpr int kTileM = kHeadDim == 96 && kTileN == 128 ? 64 : 32;
  static constexpr int kStages = 2;
  // By shared memory of 164 KB, and registers. Up to head dim 128 a CTA has less than 99 KB, which smaller cards have.
  static constexpr int kCtasPerSm = kHeadDim > 128   ? 1
                                    : kTileN == 128  ? (kHeadDim <= 64 ? 2 : 1)
                                    : kHeadDim <= 96 ? 3
                                                     : 2;
};

// Of the kernel below. 64 queries, which read fragments less often, where one CTA has the registers; such CTAs take the
// shared memory of 8.0. Others fit 99 KB.
constexpr int sm80_by_keys_stage_rows(int head_dim, int tile_keys) {
  return tile_keys == 128 && head_dim > 64 ? 64 : 32;
}

// The kernel of the same keys that adds up the gradients of queries, too, in global memory; for head dims up to 128. Of
// two warps that share keys one computes weights and the gradients of values, the other what follows for scores and
// keys; all compute gradients of queries, of which each has some rows and columns.
template <DType kDType_, int kHeadDim_, int kTileRows_>
struct Sm80BackwardByKeys {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileRows = kTileRows_;
  static constexpr int kTileN = kTileRows;
  static constexpr int kStrips = 2;  // of 16 keys, that two warps have
  static constexpr int kWarps = kTileN / (8 * kStrips);
  static constexpr int kTileM = sm80_by_keys_stage_rows(kHeadDim, kTileN);
  static constexpr int kStages = 2;
  static constexpr int kCtasPerSm = kTileM == 64 ? 1 : 2;
};

// Bytes of shared memory that a CTA may use where there are the fewest for which kernels are made: on 8.0. Others have
// 99 KB (8.6, 8.9, 12.0), which suffice for the forward, and for gradients up to head dim 128.
inline constexpr int kSm80SharedLimit = 163 * 1024, kSm80SmallSharedLimit = 99 * 1024;

}  // namespace hbsattn
