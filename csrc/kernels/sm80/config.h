#pragma once

// What each kernel of the family for compute capability 8.0 and up is, and why. No CuTe here: core/ reads it to choose
// a kernel, the kernels to build it.
//
// kTileRows: of the plan's tiles. kTileM: of those, query rows that a CTA computes; where it is less, several CTAs
// share a tile, and each streams the tile's blocks. kStrips: of 16 rows, that a warp has: fragments of keys and values
// are read from shared memory once for all of them. kShare: warps that share strips. kHeldColumns: of the rows that a
// CTA keeps, which registers hold; the others are read from shared memory for each stage.
//
// Choices say how they were made: "swept", by times of others on that card in that month, or "guessed".
// sm80/fits.py prints what would fit.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/tiles.h"

namespace hbsattn {

// Products of float32 take six times as long as those of 16 bits, and its rows twice the room: tiles are smaller, and a
// warp has one strip.
constexpr bool is_float32(DType dtype) { return dtype == DType::kFloat32; }

// A forward kernel. A CTA streams the keys of the active blocks in stages of kTileN, two of keys and of values where
// that costs no CTA (run_sm80_forward), else one. Tiles of 64 rows have three CTAs up to head dim 128, as registers
// hold their queries. Swept at head dims 128, 192 and 256 (H200, 2026-11), elsewhere guessed.
template <DType kDType_, int kHeadDim_, int kTileRows_>
struct Sm80Forward {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: columns past those of the tensors are zeros
  static constexpr int kTileRows = kTileRows_;
  // Above head dim 128 the output of two strips does not fit the registers of four warps.
  static constexpr int kTileM = is_float32(kDType) && kHeadDim > 128   ? 32
                                : is_float32(kDType) || kHeadDim > 128 ? 64
                                                                       : kTileRows;
  // With eight warps of one strip, which read keys and values from shared memory twice as often, tiles of 128 rows took
  // 1.3 of the time (H200).
  static constexpr int kWarps = kTileM < 64 ? 2 : 4, kShare = 1;
  static constexpr int kStrips = kTileM / (16 * kWarps);
  // As many as there are registers for. At head dim 64, for two stages in 99 KB.
  static constexpr int kHeldColumns = is_float32(kDType) ? 0
                                      : kStrips == 1     ? (kHeadDim > 192    ? 192
                                                            : kHeadDim == 128 ? 96
                                                                              : kHeadDim)
                                      : kHeadDim == 64   ? 32
                                                         : 0;
  static constexpr int kTileN = (kHeadDim > 192 ? 32 : 64) / (is_float32(kDType) && kHeadDim > 64 ? 2 : 1);
  static constexpr int kStages = is_float32(kDType) ? 1 : 2;  // at most
  static constexpr int kCtasPerSm = !is_float32(kDType) && kStrips == 1 && kHeadDim <= 128 ? 3 : 2;
};

// Whether less shared memory than 8.0 has takes a kernel of its own, as the other would have one CTA.
template <class Config>
constexpr bool kHasSmallForward =
    !is_float32(Config::kDType) && (Config::kHeadDim == 192 || (Config::kStrips == 2 && Config::kHeadDim > 64));

// Two CTAs of it have 99 KB. At head dim 96 it has room for two stages.
template <class Config>
struct Sm80SmallForward : Config {
  static constexpr int kTileN = 32;
  static constexpr int kHeldColumns = Config::kStrips == 2 ? 32 : Config::kHeldColumns;
};

// A kernel that computes the gradient of the queries, with tiles as the forward's. Up to head dim 128 guessed.
template <DType kDType_, int kHeadDim_, int kTileRows_>
struct Sm80GradQueries {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileRows = kTileRows_;
  // Of float32, at head dim 128 by shared memory of 99 KB.
  static constexpr int kTileM = is_float32(kDType) && kHeadDim > 64     ? 32
                                : is_float32(kDType) || kHeadDim >= 128 ? 64
                                                                        : kTileRows;
  // By shared memory of 99 KB, swept (H200, 2026-11). At head dim 256 two warps have 16 rows (grad_queries/wide.cuh),
  // in 1.0 of the time of four warps in 135 KB. At 192 four warps have room if registers hold a third of the queries;
  // pairs took 1.35 of the time.
  static constexpr int kShare = kHeadDim > 192 && !is_float32(kDType) ? 2 : 1;
  static constexpr int kHeldColumns = kHeadDim == 192 ? 64 : 0;
  static constexpr int kWarps = kTileM < 64 ? 2 : 4 * kShare;
  static constexpr int kStrips = kTileM > 64 ? 2 : 1;
  // Two products of this width are in registers beside the gradient.
  static constexpr int kTileN = is_float32(kDType)                 ? (kHeadDim > 64 ? 16 : 32)
                                : kHeadDim >= 128 || kTileM == 128 ? 32
                                                                   : 64;
  static constexpr int kStages = 2;
  static constexpr int kCtasPerSm = kHeadDim <= 128 && !(is_float32(kDType) && kHeadDim > 64) ? 2 : 1;
};

// A kernel that computes the gradients of keys and values. A CTA owns kTileN keys of a tile and streams the queries and
// output gradients of the active blocks in stages of kTileM.
template <DType kDType_, int kHeadDim_, int kTileRows_>
struct Sm80BackwardKeys {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;
  static constexpr int kTileRows = kTileRows_;  // keys
  static constexpr int kTileN = !is_float32(kDType) ? kTileRows : kHeadDim > 128 ? 32 : 64;
  // Two gradients of a warp's keys are in registers. Above head dim 128 those of 16 keys do not fit, so two warps share
  // keys, and each has one of the gradients (backward_keys/wide.cuh): 0.87 of the time of warps that have half the
  // columns of both (H200, 2026-11).
  static constexpr int kShare = kHeadDim > 128 ? 2 : 1;
  static constexpr int kStrips = kHeadDim <= 64 && kTileN == 128 ? 2 : 1;
  static constexpr int kWarps = kTileN / (16 * kStrips) * kShare;
  // Stages are half as long as there would be room for if there was one: the next is on its way while one is used.
  static constexpr int kTileM = is_float32(kDType) && kHeadDim > 64 ? 16 : kHeadDim == 96 && kTileN == 128 ? 64 : 32;
  static constexpr int kStages = 2;
  // As many as there are registers for, by shared memory of 99 KB. Of float32 none: two warps have half the columns of
  // both gradients each, and both compute the scores.
  static constexpr int kHeldColumns = kHeadDim > 128 && !is_float32(kDType) ? 192 : 0;
  // By registers, and shared memory of 164 KB; guessed.
  static constexpr int kCtasPerSm = is_float32(kDType) ? (kHeadDim > 64 ? 1 : 2)
                                    : kHeadDim > 128   ? 1
                                    : kTileN == 128    ? (kHeadDim <= 64 ? 2 : 1)
                                    : kHeadDim <= 96   ? 3
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

// Shared memory by class of device, in bytes: what a CTA may have, and what all of a multiprocessor share, of which
// each takes kReserved more.
struct Sm80SharedClass {
  static constexpr int kReserved = 1024;
  int of_cta, of_multiprocessor;

  // CTAs of so many bytes that a multiprocessor has room for.
  constexpr int count(int bytes) const { return bytes > of_cta ? 0 : of_multiprocessor / (bytes + kReserved); }
};

inline constexpr Sm80SharedClass kSm80Shared99{99 << 10, 100 << 10};    // 8.6, 8.9, 12.0
inline constexpr Sm80SharedClass kSm80Shared163{163 << 10, 164 << 10};  // 8.0, 8.7
inline constexpr Sm80SharedClass kSm80Shared227{227 << 10, 228 << 10};  // 9.0, 10.0

// What a CTA of a kernel takes. All devices run all kernels but those of float32 gradients above head dim 128.
template <class Config, int kBytes>
constexpr int sm80_least_shared_bytes() {
  constexpr Sm80SharedClass kLeast =
      is_float32(Config::kDType) && Config::kHeadDim > 128 ? kSm80Shared163 : kSm80Shared99;
  static_assert(kLeast.count(kBytes) >= 1, "a CTA's shared memory, where there is least");
  static_assert(kSm80Shared227.count(kBytes) >= Config::kCtasPerSm, "of CTAs that share a multiprocessor's registers");
  return kBytes;
}

template <class Config, class Storage>
constexpr int sm80_shared_bytes() {
  return sm80_least_shared_bytes<Config, static_cast<int>(sizeof(Storage))>();
}

}  // namespace hbsattn
