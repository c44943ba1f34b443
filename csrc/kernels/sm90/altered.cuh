#pragma once

#include <utility>

// Kernels of altered calls. Their consumers come in three forms, as loops with code for more than a call needs are
// slower: for calls that drop weights, for those that cap scores, and may drop weights, too, and for masks with partial
// blocks, whatever else is asked.

namespace hbsattn::sm90 {

template <class Traits>
struct CappingTraits : Traits {
  static constexpr bool kCaps = true;
};
template <class Traits>
struct PartialTraits : Traits {
  static constexpr bool kPartial = true;
};

template <class Traits, class Arguments>
__device__ __forceinline__ bool drops_weights(const Arguments& args) {
  return Traits::kAltered && ((!Traits::kCaps && !Traits::kPartial) || args.dropout.seed != nullptr);
}
template <class Traits, class Arguments>
__device__ __forceinline__ bool caps_scores(const Arguments& args) {
  return Traits::kPartial ? args.cap.scale > 0.f : Traits::kCaps;
}
// As those ask that serve consumers of all forms.
template <class Traits, class Arguments>
__device__ __forceinline__ bool has_partial_blocks(const Arguments& args) {
  return Traits::kAltered && args.partial.words != nullptr;
}

// Calls run(Traits{}) with the traits of the consumers that a call needs.
template <class Traits, class Arguments, class Run>
__device__ __forceinline__ void choose_consumer(const Arguments& args, Run&& run) {
  if constexpr (Traits::kAltered) {
    if (args.partial.words != nullptr) {
      run(PartialTraits<Traits>{});
      return;
    }
    if (args.cap.scale > 0.f) {
      run(CappingTraits<Traits>{});
      return;
    }
  }
  run(Traits{});
}

}  // namespace hbsattn::sm90
