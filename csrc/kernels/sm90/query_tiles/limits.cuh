#pragma once

#include "kernels/common/key_limits.cuh"
#include "kernels/sm90/query_tiles/traits.cuh"

namespace hbsattn::sm90 {

// Hides of the scores of a stage of keys what its partial blocks say.
template <class Traits, class Scores, class Storage>
__device__ __forceinline__ void mask_partial_blocks(const QueryTileArguments& args, Scores& scores,
                                                    const Storage& storage, int stage, const KeyLimits<true>& limits,
                                                    const PartialRows& rows, int lane) {
  // Lane 0 alone reads, as below.
  const uint32_t of_stage = __shfl_sync(0xffffffffu, lane == 0 ? storage.partial[stage] : 0, 0);
  const uint32_t partial = of_stage >> (limits.granules * Traits::kGranules) & ((1u << Traits::kGranules) - 1);
  if (partial == 0) return;
  const int32_t* granules = storage.granules[stage] + limits.granules * Traits::kGranules;
  mask_partial(
      args.partial, rows, limits, scores, [&](int i) { return partial >> i & 1; },
      [&](int i) { return __shfl_sync(0xffffffffu, lane == 0 ? granules[i] : 0, 0); }, lane);
}

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
