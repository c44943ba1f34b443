#pragma once

// The list of a tile that has a pair of neighbouring query blocks: the key blocks that both are active with come first,
// then those of each alone.

#include <cstdint>

namespace hbsattn {

// Whose keys a stage, or the blocks that fill it, are.
enum PairOwner : int32_t { kOfBoth = 0, kOfFirst = 1, kOfSecond = 2 };

// One of three numbers, which stay in registers.
constexpr int32_t pick(int32_t owner, int32_t of_both, int32_t of_first, int32_t of_second) {
  return owner == kOfBoth ? of_both : owner == kOfFirst ? of_first : of_second;
}

// The order in which a pair's stages lie in its list.
//
// Stages that one block attends to alone are mixed with those of the other, so that both have work until the list is at
// an end: rounds of three, two of the block that has more and one of the other, as many as it takes to spend the
// surplus; then they take turns. Where one has more than twice as many as the other, the rest of them comes last. At
// most two stages of the other lie between two of a block: what holds stages waits for no stage far behind them.
struct PairOrder {
  int32_t both;      // stages
  int32_t alone[2];  // those of each block

  constexpr int32_t count_alone() const { return alone[0] + alone[1]; }
  constexpr int32_t stages() const { return both + count_alone(); }
  constexpr int32_t stages_of(int32_t owner) const { return pick(owner, both, alone[0], alone[1]); }

  // Which block has more to attend to alone, 0 or 1.
  constexpr int32_t longer() const { return alone[0] < alone[1] ? 1 : 0; }

  // Of the first `place` stages that blocks attend to alone, those of the block that has fewer.
  constexpr int32_t shorter_before(int32_t place) const {
    return smaller(larger(place / 3, (place - rounds_of_three()) / 2), fewer());
  }

  // Of the first `place` stages that blocks attend to alone, those of one.
  constexpr int32_t count_before(int32_t place, int32_t block) const {
    const int32_t shorter = shorter_before(place);
    return block == longer() ? place - shorter : shorter;
  }

  // Whose stage lies at a place among those that blocks attend to alone.
  constexpr int32_t owner_at(int32_t place) const {
    const bool of_shorter = shorter_before(place + 1) > shorter_before(place);
    return kOfFirst + (of_shorter ? 1 - longer() : longer());
  }

  // The place in the list of stage `index` of those that an owner has.
  constexpr int32_t place_of(int32_t owner, int32_t index) const {
    if (owner == kOfBoth) return index;
    const int32_t three = rounds_of_three();
    const int32_t others = owner - 1 == longer() ? smaller(larger(index / 2, index - three), fewer())
                                                 : index + 1 + smaller(index + 1, three);
    return both + index + others;
  }

 private:
  static constexpr int32_t smaller(int32_t a, int32_t b) { return b < a ? b : a; }
  static constexpr int32_t larger(int32_t a, int32_t b) { return a < b ? b : a; }
  constexpr int32_t fewer() const { return smaller(alone[0], alone[1]); }
  constexpr int32_t rounds_of_three() const { return smaller(larger(alone[0], alone[1]) - fewer(), fewer()); }
};

// What two query blocks attend to, counted in key blocks.
struct PairCounts {
  int32_t both, alone[2];

  // What a tile of the pair computes: a block that both are active with counts twice.
  constexpr int32_t weight() const { return 2 * both + alone[0] + alone[1]; }
};

}  // namespace hbsattn
