#pragma once

#include "kernels/common/ptx.cuh"
#include "kernels/sm90/query_tiles/traits.cuh"

// The barriers of a CTA that keeps query rows.

namespace hbsattn::sm90 {

template <class Traits, bool kGeneral>
__device__ __forceinline__ void init_barriers(typename Traits::Storage& storage) {
  for (int i = 0; i < Traits::kKeyStages; ++i) {
    for (int owner = 0; owner < Traits::kOwners; ++owner) {
      mbarrier_init(&storage.keys_full[owner * Traits::kKeyStages + i], kGeneral ? 32 : 1);  // those who write granules
    }
    mbarrier_init(&storage.keys_empty[i], Traits::kConsumerWarps);
    mbarrier_init(&storage.keys_landed[i], 1);
  }
  for (int i = 0; i < Traits::kValueStages; ++i) {
    for (int owner = 0; owner < Traits::kOwners; ++owner) {
      mbarrier_init(&storage.values_full[owner * Traits::kValueStages + i], 1);
    }
    mbarrier_init(&storage.values_empty[i], Traits::kConsumerWarps);
    mbarrier_init(&storage.values_landed[i], 1);
  }
  for (int i = 0; i < Traits::kQueryBuffers; ++i) {
    for (int unit = 0; unit < Traits::kUnits; ++unit) {
      mbarrier_init(&storage.queries_full[i][unit], 1);
      mbarrier_init(&storage.output_full[i][unit], kWarpArrivals * 4);
    }
  }
  for (int i = 0; i < Traits::kTileSlots; ++i) {
    mbarrier_init(&storage.tile_full[i], 1);
    mbarrier_init(&storage.tile_empty[i], kWarpArrivals * Traits::kTileReaders);
  }
  for (int i = 0; i < Traits::kSegmentSlots; ++i) {
    mbarrier_init(&storage.segments_full[i], 32);
    mbarrier_init(&storage.segments_empty[i], 2 * 32);  // the key warp and the value warp
  }
  mbarrier_init(&storage.tile_wanted, 1);
  mbarrier_init_fence();
}

}  // namespace hbsattn::sm90
