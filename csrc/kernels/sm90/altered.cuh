#pragma once

#include <utility>

// Kernels of altered calls. Their consumers come in two forms, as loops with code for more than a call needs are
// slower: one caps scores. Either may drop weights, and have partial blocks.

namespace hbsattn::sm90 {

template <class Traits>
struct CappingTraits : Traits {
  static constexpr bool kCaps = true;
};

template <class Traits, class Arguments>
__device__ __forceinline__ bool drops_weights(const Arguments& args) {
  return Traits::kAltered && args.dropout.seed != nullptr;
}
template <class Traits, class Arguments>
__device__ __forceinline__ bool has_partial_blocks(const Arguments& args) {
  return Traits::kAltered && args.partial.words != nullptr;
}

// Calls run(Traits{}) with the traits of the consumers that a call needs.
template <class Traits, class Arguments, class Run>
__device__ __forceinline__ void choose_consumer(const Arguments& args, Run&& run) {
  if constexpr (Traits::kAltered) {
    if (args.cap.scale > 0.f) {
      run(CappingTraits<Traits>{});
      return;
    }
  }
  run(Traits{});
}

}  // namespace hbsattn::sm90
