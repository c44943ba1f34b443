#pragma once

// The element rule: which keys of its sequence a query may attend to, whatever the block mask says. Packing, planning
// and all kernels ask here; what masks of scores compare with the pairs of a tile is made of these answers. The CPU
// backend asks hbsattn/_layout.py.
//
// Queries and keys are numbered in their sequence. By causality (ElementRule) a query sees the keys up to its own
// place, so a later query sees no fewer keys, and a query that sees a key sees those before it. Rules of heads
// (WindowRule) leave it a window around its place and the first keys of the sequence.

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

// What windows reach that are unbounded, above all tensors.
inline constexpr int32_t kUnboundedWindow = 1 << 30;

// A row of the table of rules, whatever it holds, with windows that sums of places do not overflow by. Without a table:
// the rule that hides nothing.
constexpr HeadRule read_rule(const HeadRule* rules, int32_t mask_head) {
  if (rules == nullptr) return {kUnboundedWindow, kUnboundedWindow, 0, 0};
  const HeadRule rule = rules[mask_head];
  const auto reach = [](int32_t tokens) { return tokens < 0 || tokens > kUnboundedWindow ? kUnboundedWindow : tokens; };
  const int32_t sink = rule.sink < 0 ? 0 : rule.sink;
  return {reach(rule.left), reach(rule.right), sink < kUnboundedWindow ? sink : kUnboundedWindow, 0};
}

// Causality and the rule of a head. What queries see still begins and ends no earlier for later ones, but for the sink.
template <class Int>
struct WindowRule {
  ElementRule<Int> order;
  HeadRule head;  // as read_rule() has it

  // The window of a query begins here, maybe before all keys.
  constexpr Int first_key(Int query) const { return query + order.diagonal - head.left; }

  // The last of the first `end` keys that lie in the window of a query; negative: none.
  constexpr Int last_key(Int query, Int end) const {
    const Int last = order.last_key(query, end);
    if (head.right == kUnboundedWindow) return last;
    const Int place = query + order.diagonal;
    // A place behind all keys could overflow.
    const Int in_window = place >= end ? end : place + head.right;
    return in_window < last ? in_window : last;
  }

  // The last of the first `end` keys that a query sees if they belong to the sink.
  constexpr Int last_sink_key(Int query, Int end) const { return order.last_key(query, end); }

  // As those of ElementRule; where the window of `last_query` lies behind the end, visible_end() may be too large.
  constexpr Int visible_end(Int last_query, Int end) const {
    const Int in_window = last_key(last_query, end) + 1, visible = order.visible_end(last_query, end);
    const Int of_sink = head.sink < visible ? head.sink : visible;
    return in_window < of_sink ? of_sink : in_window;
  }
  constexpr Int clean_end(Int first_query, Int end) const { return last_key(first_query, end) + 1; }

  // No window up to that of `last_query` begins behind this key; the keys before it may be hidden from some query.
  constexpr Int clean_begin(Int last_query) const {
    const Int first = first_key(last_query);
    return first <= head.sink ? 0 : first;
  }

  // Whether all queries from `first_query` to `last_query` see all keys from `begin` to `last`, of `end` in all.
  constexpr bool is_clean(Int first_query, Int last_query, Int begin, Int last) const {
    return clean_end(first_query, last + 1) > last && (clean_begin(last_query) <= begin || last < head.sink);
  }
};

// Any diagonal, as one for which sums do not overflow; by causality the same to all queries and keys that the tensors
// have. Windows move on with it, so it is cut only where it moves them far past all tensors.
constexpr int32_t clamp_diagonal(const MaskShape& shape, int32_t diagonal, int32_t rows_q, int32_t rows_k) {
  const int32_t least = shape.ruled ? -kUnboundedWindow / 2 : -rows_q,
                most = shape.ruled ? kUnboundedWindow / 2 : rows_k;
  return diagonal < least ? least : diagonal > most ? most : diagonal;
}

constexpr ElementRule<int64_t> rule_of(const MaskShape& shape, const Sequence& sequence) {
  return {shape.causal, sequence.diagonal};
}

constexpr WindowRule<int64_t> rule_of(const MaskShape& shape, const Sequence& sequence, const HeadRule& head) {
  return {rule_of(shape, sequence), head};
}

// Of items whose diagonals are clamped.
constexpr ElementRule<int32_t> rule_of(const MaskShape& shape, const WorkItem& item) {
  return {shape.causal, item.diagonal};
}

constexpr ElementRule<int32_t> rule_of(const MaskShape& shape, const KeyItem& item) {
  return {shape.causal, item.diagonal};
}

template <class Item>
constexpr WindowRule<int32_t> rule_of(const MaskShape& shape, const Item& item, const HeadRule& head) {
  return {rule_of(shape, item), head};
}

}  // namespace hbsattn
