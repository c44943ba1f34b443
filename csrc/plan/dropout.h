#pragma once

// Which weights dropout leaves: what the host knows of it.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "hbsattn/params.h"
#include "plan/tiles.h"

namespace hbsattn {

// A weight is dropped by a random number of kDropoutBits bits of its own.
inline constexpr int kDropoutBits = 15;

// Of a call. Numbers are compared as halves of the same bits, whose order is that of integers up to infinity, which
// lies above half of them: so what is rarer, being dropped or being kept, is what small numbers mean.
struct Dropout {
  const int64_t* seed = nullptr;  // (2), on the device: seed and offset; null: nothing is dropped
  uint32_t limit = 0;             // the numbers below it
  bool below_are_kept = false;
  bool aligned = false;  // granules of rows and of keys begin at multiples of 16 in their sequence, and have one head
  float kept = 1.f;      // the share of weights that are kept
  float scale = 1.f;     // of those: 1 / kept
};

inline Dropout make_dropout(const ForwardParams& params) {
  Dropout dropout;
  if (params.dropout_p <= 0.) return dropout;
  constexpr int kNumbers = 1 << kDropoutBits;
  const int dropped = std::min(static_cast<int>(std::nearbyint(params.dropout_p * kNumbers)), kNumbers - 1);
  dropout.seed = params.dropout_seed;
  dropout.below_are_kept = 2 * dropped > kNumbers;
  dropout.limit = static_cast<uint32_t>(dropout.below_are_kept ? kNumbers - dropped : dropped);
  dropout.aligned = params.mask.shape.q_block_size % kGranule == 0 && params.mask.shape.k_block_size % kGranule == 0;
  dropout.kept = static_cast<float>(kNumbers - dropped) / kNumbers;
  dropout.scale = static_cast<float>(kNumbers) / static_cast<float>(kNumbers - dropped);
  return dropout;
}

}  // namespace hbsattn
