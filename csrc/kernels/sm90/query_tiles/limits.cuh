#pragma once

#include "kernels/common/key_limits.cuh"
#include "kernels/sm90/query_tiles/traits.cuh"

namespace hbsattn::sm90 {

// What partial blocks say of a stage of keys.
template <class Traits>
struct PartialLimits {
  PartialRows rows;  // of the tile
  bool any = false;  // of the stage's granules is of such a block
  PartialStage<Traits::kGranules> stage;

  // Looks it up. Keys of the stage are there, and have not been released.
  template <class Storage>
  __device__ __forceinline__ void read(const QueryTileArguments& args, const Storage& storage, int index,
                                       const KeyLimits<true>& limits, int lane) {
    const uint32_t partial = storage.partial[index] >> (limits.granules * Traits::kGranules);
    const int code = storage.granules[index][limits.granules * Traits::kGranules + lane % Traits::kGranules];
    __syncwarp();  // lane 0 lets the producer overwrite them
    const uint32_t mine = uniform(partial) & ((1u << Traits::kGranules) - 1);
    any = mine != 0;
    if (any) stage = PartialStage<Traits::kGranules>(args.partial, rows, limits, mine, code, lane);
  }
  template <class Scores>
  __device__ __forceinline__ void mask(Scores& scores, int lane) const {
    if (any) stage.mask(scores, lane);
  }
};

// Masks the scores of a stage of keys.
template <class Traits, bool kGeneral, bool kPairs, class Scores, class Storage>
__device__ __forceinline__ void mask_scores(const QueryTileArguments& args, Scores& scores, const Storage& storage,
                                            int stage, const KeyLimits<kGeneral, kPairs>& limits, int lane) {
  const int32_t* granules = storage.granules[stage];
  if (kGeneral) granules += limits.granules * Traits::kGranules;
  // Lane 0 alone reads, because its arrival at keys_empty is what lets the producer overwrite them.
  const auto code_of = [&](int i) { return __shfl_sync(0xffffffffu, lane == 0 ? granules[i] : 0, 0); };
  if constexpr (!kPairs) {
    if (args.mask.ruled) {
      mask_by_rule(args, scores, code_of, limits, storage.rules[limits.buffer], lane);
      return;
    }
  }
  mask_by_limits(scores, code_of, limits, lane);
}

}  // namespace hbsattn::sm90
