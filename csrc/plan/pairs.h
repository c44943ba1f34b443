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

// The order in which a pair's stages lie in its list: those that both attend to, then those of each alone, which take
// turns until one block has no more. So both have work until the list is at an end, and no more than one stage of the
// other lies between two of a block: what holds stages waits for no stage far behind them.
struct PairOrder {
  int32_t both;      // stages
  int32_t alone[2];  // those of each block

  constexpr int32_t count_alone() const { return alone[0] + alone[1]; }
  constexpr int32_t stages() const { return both + count_alone(); }
  constexpr int32_t stages_of(int32_t owner) const { return pick(owner, both, alone[0], alone[1]); }

  // Of the first `place` stages that blocks attend to alone, those of one, 0 or 1.
  constexpr int32_t count_before(int32_t place, int32_t block) const {
    const int32_t in_turn = (place + 1 - block) / 2;
    const int32_t most = block == 0 ? alone[0] : alone[1], others = block == 0 ? alone[1] : alone[0];
    return in_turn < place - others ? place - others : in_turn > most ? most : in_turn;
  }

  // Whose stage lies at a place among those that blocks attend to alone.
  constexpr int32_t owner_at(int32_t place) const {
    return count_before(place + 1, 0) > count_before(place, 0) ? kOfFirst : kOfSecond;
  }

  // The place in the list of stage `index` of those that an owner has.
  constexpr int32_t place_of(int32_t owner, int32_t index) const {
    const int32_t in_turn = index + owner - kOfFirst, others = pick(owner, 0, alone[1], alone[0]);
    return owner == kOfBoth ? index : both + index + (in_turn < others ? in_turn : others);
  }
};

// What two query blocks attend to, counted in key blocks.
struct PairCounts {
  int32_t both, alone[2];

  // What a tile of the pair computes: a block that both are active with counts twice.
  constexpr int32_t weight() const { return 2 * both + alone[0] + alone[1]; }
};

// Whether a tile of the pair takes less time than a tile of 64 rows for each block. By measurements on an H100: what
// both attend to runs at a fifth more than the rate of such tiles, the rest at a fourteenth less, as a stage of it is
// computed by one of two warpgroups; what one attends to beyond the other's share leaves the other idle; and a pair's
// start, which no other CTA hides, takes what kPairKeys that both attend to gain. Two thirds of the lists are to be
// alike, so that no pairs are so by chance: a few would run by themselves, behind all other tiles.
inline constexpr int64_t kPairKeys = 288;

constexpr bool pays_to_pair(const PairCounts& blocks, int32_t k_block_size) {
  const int64_t alone = int64_t{blocks.alone[0]} + blocks.alone[1];
  const int64_t surplus = blocks.alone[0] > blocks.alone[1] ? int64_t{blocks.alone[0]} - blocks.alone[1]
                                                            : int64_t{blocks.alone[1]} - blocks.alone[0];
  return blocks.both >= alone && (5 * int64_t{blocks.both} - alone - 5 * surplus) * k_block_size > 5 * kPairKeys;
}

}  // namespace hbsattn
