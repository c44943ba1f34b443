#pragma once

// The element rule: which keys of its sequence a query may attend to, whatever the block mask says. Packing, planning
// and all kernels ask here, and nobody else compares a query with a key; the CPU backend asks hbsattn/_layout.py.
//
// Queries and keys are numbered in their sequence. Today the rule is causality: a query sees the keys up to its own
// place, so a later query sees no fewer keys, and a query that sees a key sees those before it.

#include <cstdint>
#include <limits>

#include "hbsattn/params.h"

namespace hbsattn {

// Int: wide enough that the sum of a query and the diagonal does not overflow.
template <class Int>
struct ElementRule {
  bool causal;
  Int diagonal;  // query i sees key i + diagonal, and the keys before it

  // The last of the first `end` keys that a query sees; negative: none.
  constexpr Int last_key(Int query, Int end) const { return cut(query + diagonal, end - 1); }

  // Of the first `end` keys, those before this one are seen by some query up to `last_query`. Not above 0: none.
  constexpr Int visible_end(Int last_query, Int end) const { return cut(last_query + diagonal + 1, end); }

  // Of the first `end` keys, those before this one are seen by every query from `first_query` on: what lies there
  // needs no element masks.
  constexpr Int clean_end(Int first_query, Int end) const { return cut(first_query + diagonal + 1, end); }

  // Whether every query from `first_query` on sees every key up to `last_key`: together they need no element masks.
  constexpr bool is_clean(Int first_query, Int last_key) const { return !causal || first_query + diagonal >= last_key; }

  // The first query that sees a key; a number below all of them, if each does.
  constexpr Int first_query(Int key) const { return causal ? key - diagonal : std::numeric_limits<Int>::min(); }

 private:
  // Of what ends at `own` by the diagonal, and at `all` by the sequence.
  constexpr Int cut(Int own, Int all) const {
#ifdef __CUDA_ARCH__
    // An instruction; a comparison would be merged with the choice before it, to the loss of the loops behind them.
    return causal ? min(own, all) : all;
#else
    return causal && own < all ? own : all;
#endif
  }
};

// Any diagonal, as one for which sums do not overflow; the same to all queries and keys that the tensors have.
constexpr int32_t clamp_diagonal(int32_t diagonal, int32_t rows_q, int32_t rows_k) {
  return diagonal < -rows_q ? -rows_q : diagonal > rows_k ? rows_k : diagonal;
}

constexpr ElementRule<int64_t> rule_of(const MaskShape& shape, const Sequence& sequence) {
  return {shape.causal, sequence.diagonal};
}

// Of items whose diagonals are clamped.
constexpr ElementRule<int32_t> rule_of(const MaskShape& shape, const WorkItem& item) {
  return {shape.causal, item.diagonal};
}

constexpr ElementRule<int32_t> rule_of(const MaskShape& shape, const KeyItem& item) {
  return {shape.causal, item.diagonal};
}

}  // namespace hbsattn
