#pragma once

// What each kernel compiled for sm_90a is, and why. No CuTe here: core/ reads it to choose a kernel, the kernels to
// build it.

#include <cstdint>

#include "hbsattn/params.h"
#include "plan/tiles.h"

namespace hbsattn {

// The kernels. kTileRows: of what a CTA keeps while it streams the rest. kPairs: as in TileShape. kAltered: the kernel
// is for altered calls alone, whose code would cost the others registers (is_altered); kShortValues: for those
// whose values have few columns beside their keys'.

// Whether tiles of query rows need the second, general kernel: for key blocks that are no multiple of a granule, for
// query blocks whose heads come in one box, and for those that may be united, but for pairs.
constexpr bool needs_general_kernel(const MaskShape& shape, const TileShape& tiles) {
  const bool ragged = shape.k_block_size % kGranule != 0;
  return ragged || (tiles.packed_heads > 1 && shape.q_block_size % kGranule != 0) || (tiles.united > 1 && !tiles.pairs);
}

// The same for a call: kernels of altered calls are general ones.
constexpr bool needs_general_kernel(const ForwardParams& problem, const TileShape& tiles) {
  return is_altered(problem) || needs_general_kernel(problem.mask.shape, tiles);
}

inline constexpr int kShortValueDim = 128;

// A forward kernel for sm_90a. A CTA owns kTileM query rows, 64 for each consumer warpgroup, and streams the keys of
// the active blocks in stages of kTileN, each filled from as many key blocks as fit.
template <DType kDType_, int kHeadDim_, int kTileM_>
struct Sm90Forward {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kValueDim = kHeadDim;  // of values and outputs
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileRows = kTileM;
  static constexpr bool kPairs = false;
  static constexpr bool kAltered = false;
  static constexpr bool kShortValues = false;
  static constexpr int kCtasPerSm = kTileM == 64 ? 2 : 1;
  // Whether there is a second kernel for what the fast one has no code for.
  static constexpr bool kWithGeneral = kTileM != 192;

  // Above head dim 128, the output alone takes 96 or 128 registers a thread: 64 keys a stage leave room for the scores.
  // So they do where three warpgroups share the registers, but for a short output. With two CTAs it is shared memory
  // that leaves no more.
  static constexpr int kTileN = kHeadDim <= 64 || (kHeadDim <= 128 && kTileM == 128) ? 128 : 64;
  // As many as fit beside the queries. For tiles of 128 rows, two of each suffice at head dim 128 (a third is within
  // noise). Tiles of 64 rows wait for L2, and a value stage is held longer than a key stage: until after the softmax;
  // at head dim 128 a second query buffer is worth more than a third value stage.
  static constexpr int kKeyStages = kTileM == 192    ? (kHeadDim == 64   ? 4
                                                        : kHeadDim == 96 ? 5
                                                                         : 3)
                                    : kTileM == 64   ? (kHeadDim == 96 ? 3 : 2)
                                    : kHeadDim == 64 ? 4
                                                     : (kHeadDim == 128 || kHeadDim == 256 ? 2 : 3);
  static constexpr bool kMoreValues = kTileM == 192 ? kHeadDim == 128 : kTileM == 64 && kHeadDim < 128;
  static constexpr int kValueStages = kKeyStages + (kMoreValues ? 1 : 0);
  // Two query buffers let the next tile's queries arrive while the last output still leaves from the other.
  static constexpr int kQueryBuffers = kHeadDim <= 128 ? 2 : 1;
  // Columns that one swizzle pattern spans: 128 bytes, or 64 where the head dim is no multiple of that.
  static constexpr int kChunkColumns = kHeadDim % 64 == 0 ? 64 : 32;

  // 40 * 128 + 232 * 256 registers = 168 * 384, what a CTA of three warpgroups is launched with; 40 + 216 = 2 * 128,
  // what one of two warpgroups is, and 56 + 3 * 152 = 32 + 3 * 160 = 4 * 128, what one of four is. Scores of 128 keys
  // need the latter, though a producer warp then spills a few.
  static constexpr bool kTight = kTileM == 192 && kTileN == 128;
  static constexpr int kProducerRegisters = kTight ? 32 : kTileM == 192 ? 56 : 40;
  static constexpr int kConsumerRegisters = kTight ? 160 : kTileM == 192 ? 152 : kTileM == 128 ? 232 : 216;
};

// The same for calls that alter weights.
template <DType kDType_, int kHeadDim_, int kTileM_>
struct Sm90ForwardAltered : Sm90Forward<kDType_, kHeadDim_, kTileM_> {
  static constexpr bool kAltered = true;
  static_assert(kTileM_ != 192, "what has a general kernel");
};

// The same for values of up to 128 columns beside keys of up to 192, as in multi-head latent attention: so short an
// output leaves registers for the scores of 128 keys.
template <DType kDType_, int kHeadDim_, int kTileM_>
struct Sm90ForwardShortValues : Sm90Forward<kDType_, kHeadDim_, kTileM_> {
  static constexpr bool kShortValues = true;
  static constexpr bool kWithGeneral = false;
  static constexpr int kValueDim = kShortValueDim;
  static constexpr int kTileN = 128;
  static constexpr int kKeyStages = 2;
  static constexpr int kValueStages = 2;
  static_assert(kHeadDim_ == 192 && kTileM_ == 128, "what fits");
};

// A forward kernel for sm_90a, up to head dim 128. A CTA owns a pair of query blocks of 64 rows, one for each consumer
// warpgroup, and streams first the keys that both attend to, then those of each. The plan chooses pairs that attend
// alike (pays_to_pair); the kernel of tiles of 64 rows takes the others.
template <DType kDType_, int kHeadDim_>
struct Sm90ForwardPairs {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kValueDim = kHeadDim;  // of values and outputs
  static constexpr int kTileM = kPairRows;
  static constexpr int kTileRows = kTileM;
  static constexpr bool kPairs = true;
  static constexpr bool kAltered = false;
  static constexpr bool kShortValues = false;
  static constexpr int kCtasPerSm = 1;
  static constexpr bool kWithGeneral = false;
  // Each of the three lists fills whole stages, so half of one is lost for each that is not empty. At head dim 96, the
  // loop over stages of 128 keys spills.
  static constexpr int kTileN = kHeadDim == 96 ? 64 : 128;
  // 192 KB with the queries. A unit uses every second stage of what blocks attend to alone.
  static constexpr int kKeyStages = kHeadDim == 64 ? 5 : kHeadDim == 96 ? 6 : 2;
  static constexpr int kValueStages = kKeyStages;
  static constexpr int kQueryBuffers = 2;
  static constexpr int kChunkColumns = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
  static_assert(kHeadDim <= 128);
};

// A backward kernel for sm_90a. A CTA owns kTileN keys and streams the queries and output gradients of the active
// blocks in stages of kTileM. A consumer warpgroup has 64 of the keys; above head dim 128, where the gradients of that
// many do not fit its registers, two warpgroups share them.
template <DType kDType_, int kHeadDim_, int kTileN_>
struct Sm90BackwardKeys {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kValueDim = kHeadDim;  // of values and outputs
  static constexpr int kTileN = kTileN_;
  static constexpr int kTileRows = kTileN;
  static constexpr bool kPairs = false;
  static constexpr bool kAltered = false;
  static constexpr bool kShortValues = false;
  static constexpr bool kWide = kHeadDim > 128;
  static constexpr int kCtasPerSm = kWide ? 1 : 128 / kTileN;
  static constexpr int kTileM = 64;
  // As many as fit: short ones are over before the next are there. At head dim 192 a third brings nothing.
  static constexpr int kStages = kHeadDim == 64 ? 4 : kHeadDim == 96 && kTileN == 128 ? 3 : 2;
  // Columns that one swizzle pattern spans. Two warpgroups that share columns have half of them each: whole patterns.
  static constexpr int kChunkColumns = kHeadDim % (kTileN == 128 || kWide ? 128 : 64) == 0 ? 64 : 32;
  // What ptxas needs for the mainloop without spills, and what is left.
  static constexpr int kConsumerRegisters = kHeadDim == 256 ? 240 : kHeadDim < 128 && kTileN == 64 ? 216 : 232;
  static constexpr int kProducerRegisters = kHeadDim == 256 || (kHeadDim == 128 && kTileN == 64) ? 24 : 40;
  static_assert(!kWide || kTileN == 64);
};

// The same for calls that alter weights.
template <DType kDType_, int kHeadDim_, int kTileN_>
struct Sm90BackwardKeysAltered : Sm90BackwardKeys<kDType_, kHeadDim_, kTileN_> {
  static constexpr bool kAltered = true;
};

// The same for values of up to 128 columns beside keys of up to 192.
template <DType kDType_, int kHeadDim_, int kTileN_>
struct Sm90BackwardKeysShortValues : Sm90BackwardKeys<kDType_, kHeadDim_, kTileN_> {
  static constexpr bool kShortValues = true;
  static constexpr int kValueDim = kShortValueDim;
  static_assert(kHeadDim_ == 192 && kTileN_ == 64, "what fits");
};

// A kernel for sm_90a that computes the gradient of the queries alone, the same in every run. It has tiles as
// the forward's and streams keys and values as that does, but in narrower stages: two products of their width are in
// registers.
template <DType kDType_, int kHeadDim_, int kTileM_>
struct Sm90GradQueries {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kValueDim = kHeadDim;  // of values and outputs
  static constexpr int kTileM = kTileM_;
  static constexpr int kTileRows = kTileM;
  static constexpr bool kPairs = false;
  static constexpr bool kAltered = false;
  static constexpr bool kShortValues = false;
  static constexpr int kCtasPerSm = 128 / kTileM;
  static constexpr int kTileN = kHeadDim <= 64 && kTileM == 128 ? 128 : kHeadDim <= 192 ? 64 : 32;
  // A key stage is held until the scores of the next one are there and the product behind them is done.
  static constexpr int kKeyStages = kHeadDim == 64 || (kHeadDim == 96 && kTileM == 128) ? 4 : 3;
  static constexpr int kValueStages = kTileM == 64 && kHeadDim == 128 ? 1 : kKeyStages - 1;
  static constexpr int kQueryBuffers = kHeadDim <= 96 || (kHeadDim == 128 && kTileM == 128) ? 2 : 1;
  static constexpr int kChunkColumns = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = kTileM == 128 ? 232 : 216;
};

// The same for calls that alter weights.
template <DType kDType_, int kHeadDim_, int kTileM_>
struct Sm90GradQueriesAltered : Sm90GradQueries<kDType_, kHeadDim_, kTileM_> {
  static constexpr bool kAltered = true;
  static constexpr int kTileN = kHeadDim_ <= 192 ? 64 : 32;  // scores of 128 keys leave no registers for more
};

// The same for values of up to 128 columns beside keys of up to 192.
template <DType kDType_, int kHeadDim_, int kTileM_>
struct Sm90GradQueriesShortValues : Sm90GradQueries<kDType_, kHeadDim_, kTileM_> {
  static constexpr bool kShortValues = true;
  static constexpr int kValueDim = kShortValueDim;
  static_assert(kHeadDim_ == 192 && kTileM_ == 128, "what fits");
};

// A kernel for sm_90a that computes all gradients by tiles of queries. It has tiles as the forward's, and streams, in
// stages of 64 keys: as many accumulators of their gradients fit beside those of the queries.
template <DType kDType_, int kHeadDim_>
struct Sm90BackwardQueries {
  static constexpr DType kDType = kDType_;
  static constexpr int kHeadDim = kHeadDim_;  // padded: smaller head dims are zero-filled by the tensor maps
  static constexpr int kValueDim = kHeadDim;  // of values and outputs
  static constexpr int kTileM = 128;
  static constexpr int kTileRows = kTileM;
  static constexpr bool kPairs = false;
  static constexpr bool kAltered = false;
  static constexpr bool kShortValues = false;
  static constexpr int kCtasPerSm = 1;
  static constexpr int kTileN = 64;
  static constexpr int kKeyStages = kHeadDim == 128 ? 3 : 4;
  static constexpr int kValueStages = kKeyStages - 1;
  static constexpr int kQueryBuffers = kHeadDim == 64 ? 2 : 1;
  static constexpr int kChunkColumns = kHeadDim % 64 == 0 ? 64 : 32;
  static constexpr int kProducerRegisters = 40;
  static constexpr int kConsumerRegisters = 232;
};

// Rows that a tensor may span over its batch: a coordinate from here on lies outside every tensor.
inline constexpr int kSm90RowLimit = 1 << 30;

// Bytes of shared memory that a CTA may use when that many share a multiprocessor, of which each CTA costs 1 KB more.
constexpr int sm90_shared_limit(int ctas) { return 228 * 1024 / ctas - 1024; }

}  // namespace hbsattn
