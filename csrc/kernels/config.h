#pragma once

// What each compiled kernel is. No CuTe here: core/ reads this table to choose a kernel, kernels/ to build it.

#include <cstdint>

#include "hbsattn/params.h"

namespace hbsattn {

// Query rows of a work item: the stationary tile of every forward kernel.
inline constexpr int kTileRows = 128;

// Query heads that share a tile: those of one key head, if they have one mask.
constexpr int32_t count_packed_heads(int32_t mask_heads, int32_t heads_q, int32_t heads_k, bool pack_heads) {
  const int32_t group = heads_q / heads_k;
  return pack_heads && (mask_heads != heads_q || group == 1) ? group : 1;
}

// A forward kernel for sm_90a. A CTA owns kTileM query rows, half for each of two consumer warpgroups, and streams
// the keys of the active blocks in stages of kTileN, each filled from as many key blocks as fit.
template <DType kDType_, int kHeadDim_>
struct Sm90Forward {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps

  static constexpr int kTileM = kTileRows;
  // Above 128, the output alone takes 96 or 128 registers a thread: 64 keys a stage leave room for the scores.
  static constexpr int kTileN = kHeadDim <= 128 ? 128 : 64;
  // As many stages for keys and for values, each, as fit beside the queries. Two suffice at head dim 128 (a third is
  // within noise); smaller head dims have more to keep the same number of bytes in flight.
  static constexpr int kStages = kHeadDim <= 64 ? 4 : kHeadDim == 128 || kHeadDim == 256 ? 2 : 3;
  // Two query buffers let the next tile's queries arrive while the last output still leaves from the other.
  static constexpr int kQueryBuffers = kHeadDim <= 128 ? 2 : 1;
  // Columns that one swizzle pattern spans: 128 bytes, or 64 where the head dim is no multiple of that.
  static constexpr int kChunkColumns = kHeadDim % 64 == 0 ? 64 : 32;

  // 40 * 128 + 232 * 256 registers = 168 * 384, what a CTA of three warpgroups is launched with.
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
};

inline constexpr int kSm90SharedLimit = 232448;  // bytes of shared memory that one CTA may use

// Block sizes are multiples of this: one warp's rows of the tensor core, one 16-key step of the second product.
inline constexpr int kGranule = 16;

}  // namespace hbsattn
