#pragma once

// What the rules of planning know of a card, and the limits that follow from it. What decides the length of a list or
// the size of a workspace must be the same in planning, validation and launch: all take the policy of the current
// device and the call's dtype (kernels::current_policy).

#include <cstdint>

namespace hbsattn {

// Kernels that are chosen together, as they read the same plans.
enum class KernelFamily {
  kSm90,  // for compute capability 9.0
  kSm80,  // for 8.0 and newer; float32 on 9.0, too
};

// The limits were swept on one H200, by the times of whole forward and backward passes; its numbers are the defaults,
// which hold where there is no device. That limits of bytes grow with the L2 cache, and those of tiles with the number
// of multiprocessors, is a guess for other cards. few_keys() was measured on an H100, too.
struct DevicePolicy {
  int32_t multiprocessors = 132;
  int64_t l2_bytes = int64_t{60} << 20;
  int64_t shared_bytes = int64_t{228} << 10;  // of a multiprocessor
  int64_t memory_rate = 4'916'736;            // bytes a microsecond
  KernelFamily family = KernelFamily::kSm90;  // of the kernels that calls on this device use
  int32_t element_size = 2;                   // of their tensors, in bytes

  // Whether the forward takes the list of gradients: the kernels of kSm80 have no pairs, and no tiles of 192 rows.
  constexpr bool shares_lists() const { return family == KernelFamily::kSm80; }

  // Whether a tile of keys streams all queries that read its key head: what tiles of some of them pass on to others is
  // added up in the kernels of kSm90 alone. `deterministic`: whether gradients are to be the same in every run.
  constexpr bool keeps_groups(bool deterministic) const { return deterministic || family == KernelFamily::kSm80; }

  // Whether the kernels of kSm80 that add up gradients of queries by tiles of keys find the shared memory for their
  // stages: the largest take that of 8.0, the others have room everywhere.
  constexpr bool has_room_to_add(int32_t head_dim, int32_t tile_keys) const {
    const bool fits = head_dim <= 64 || (tile_keys <= 64 && element_size == 2);
    return fits || shared_bytes >= int64_t{164} << 10;
  }

  // Whether tiles of keys with far more to do than others are cut into parts.
  constexpr bool cuts_tiles() const { return family == KernelFamily::kSm90; }

  // What the items of a section of a work list may read and add to, so that tiles which run at the same time find it in
  // L2: 32 MB of an H200's 60. What tiles keep and write, and the far partition, take a share of the rest.
  constexpr int64_t section_bytes() const { return l2_bytes * 8 / 15; }

  // What the queries of all tiles of keys that run at the same time may take of L2: 36 MB of an H200's 60.
  constexpr int64_t running_bytes() const { return l2_bytes * 3 / 5; }

  // What a key head's queries may take until it pays to stream fewer of its query heads: 5 MB of an H200's 60.
  constexpr int64_t together_bytes() const { return l2_bytes / 12; }

  // Keys of a query up to which passes over sums of gradients, which wait for memory, take longer than two more
  // products: 386 on an H200, by times at 256 and 512 keys. The same on an H100 says 541, where this gives 566. With
  // fewer multiprocessors products take longer, which is a guess.
  constexpr int64_t few_keys() const {
    constexpr int64_t kMeasured = 386, kMultiprocessors = 132, kMemoryRate = 4'916'736;
    return memory_rate > 0 ? kMeasured * multiprocessors * kMemoryRate / (kMultiprocessors * memory_rate) : kMeasured;
  }

  // Keys of all tiles that run at the same time: two CTAs with 64 or one with 128 to each multiprocessor.
  constexpr int64_t running_keys() const { return int64_t{multiprocessors} * 128; }

  // Multiprocessors as the rules for heavy tiles count them, in whole 32s: they were swept with 128 for an H200's 132.
  constexpr int32_t units() const { return multiprocessors < 64 ? 32 : multiprocessors / 32 * 32; }
};

}  // namespace hbsattn
