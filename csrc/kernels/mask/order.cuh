#pragma once

// Puts a work list in order: heaviest items first, within sections whose data fit the L2 cache. Items that would hold
// up the end may go before all sections; items that have no tile end the list, or lie before those that are taken from
// its end.

#include <algorithm>

#include "kernels/common/launch.cuh"
#include "plan/layout.h"
#include "plan/workspace.h"

namespace hbsattn::kernels {

constexpr int kOrderThreads = 256;
constexpr int kLanes = 4;  // threads that rank one item together
constexpr int kOrderItems = kOrderThreads / kLanes;
constexpr int kChunk = 1024;  // weights in shared memory at a time

constexpr int64_t kSectionItems = 8192;  // ranking costs this many comparisons an item

// Items of a section: a run of the list that is put in order by itself. As many as wanted, or the list cut evenly.
inline int32_t limit_section_items(int64_t wanted, int64_t num_items) {
  const int64_t items = std::min(wanted, num_items);
  return static_cast<int32_t>(mask::ceil_div(items, mask::ceil_div(items, kSectionItems)));
}

// Items of some kind: in the sections before one, in this one, and in all. kLanes threads count them together.
struct KindPlace {
  int64_t before = 0, all = 0;
  int here;

  __device__ KindPlace(const int32_t* counts, int64_t section, int64_t sections, int lane) : here(counts[section]) {
    for (int64_t i = lane; i < sections; i += kLanes) {
      all += counts[i];
      if (i < section) before += counts[i];
    }
#pragma unroll
    for (int delta = kLanes / 2; delta > 0; delta /= 2) {
      all += __shfl_xor_sync(~0u, all, delta);
      before += __shfl_xor_sync(~0u, before, delta);
    }
  }
};

// A record of a work list, as it lies in memory. One that is dead begins with -1.
struct alignas(64) PackedRecord {
  int4 parts[kLanes];
};

// Where the counters of a list lie, of `count` ints: they are 0 once this has run. A kernel, not a memset, as kernels
// may start before it ends.
static __global__ void __launch_bounds__(kOrderThreads) clear_counters_kernel(int32_t* counters, int64_t count) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = int64_t{blockIdx.x} * kOrderThreads + threadIdx.x;
  if (index < count) counters[index] = 0;
}

inline Status clear_counters(int32_t* counters, int64_t count, Stream stream) {
  const auto ctas = static_cast<unsigned>(mask::ceil_div(count, kOrderThreads));
  return launch("the launch of clear_counters", clear_counters_kernel, ctas, kOrderThreads, 0, stream, counters, count);
}

// What order_items puts in order, and where.
struct OrderArguments {
  int64_t num_items;      // that are ranked
  int64_t room;           // records of the list; those behind what is ranked are dead
  int32_t section_items;  // of all sections but the last
  bool in_halves;         // the lighter half of each section lies behind the heavier halves of all; no item is dead
  int32_t sections, ctas_per_section;
  const int32_t* weights;
  const int32_t* live;
  const int32_t* heavy;
  const int32_t* last;
  PackedRecord* items;
  int32_t* tickets;  // kForwardTickets, cleared as well; null: there are none

  __device__ void clear_tickets() const {
    if (tickets == nullptr || blockIdx.x > 0 || threadIdx.x >= kForwardTickets) return;
    tickets[threadIdx.x] = 0;
  }
};

// What a CTA ranks: up to kOrderItems items of one section.
struct OrderPlace {
  int section;    // the number of sections or more: none, the CTA ends the list
  int64_t begin;  // of the section
  int count;      // items of the section
  int first;      // of those of this CTA, in the section

  __device__ explicit OrderPlace(const OrderArguments& args)
      : section(static_cast<int>(blockIdx.x) / args.ctas_per_section),
        begin(int64_t{section} * args.section_items),
        count(static_cast<int>(mask::smaller<int64_t>(args.section_items, args.num_items - begin))),
        first(static_cast<int>(blockIdx.x) % args.ctas_per_section * kOrderItems) {}
};

// Where the item of some rank in its section goes. In halves, what is left when multiprocessors run out of work are
// light items of all sections, not heavy ones of the last.
__device__ inline int64_t place_of_rank(const OrderArguments& args, const OrderPlace& own, int rank) {
  if (!args.in_halves) return own.begin + rank;
  const int heavier = args.section_items / 2;
  const int64_t last_count = args.num_items - (args.sections - 1) * int64_t{args.section_items};
  const int own_heavier = own.count / 2;
  if (rank < own_heavier) return int64_t{own.section} * heavier + rank;
  const int64_t all_heavier = int64_t{args.sections - 1} * heavier + last_count / 2;
  return all_heavier + own.section * int64_t{args.section_items - heavier} + rank - own_heavier;
}

// Ends the list with dead records: those of this CTA's kOrderItems places that lie behind `end`.
__device__ inline void write_dead(const OrderArguments& args, int64_t end) {
  const int64_t first =
      args.num_items + (int64_t{blockIdx.x} - int64_t{args.sections} * args.ctas_per_section) * kOrderItems;
  const int lane = threadIdx.x % kLanes, number = threadIdx.x / kLanes;
  const int64_t place = first + number;
  if (number >= kOrderItems || place < end || place >= args.room) return;
  args.items[place].parts[lane] = make_int4(lane == 0 ? -1 : 0, 0, 0, 0);
}

inline constexpr int32_t kNoWeight = INT32_MIN;  // lighter than any

// Of `count` weights, those of items from `first` on, how many go before that of item `mine`: heavier ones, and equal
// ones of earlier items. kThreads threads count them together; each returns its share. Behind the last weight are
// kNoWeight, up to a multiple of four.
template <int kThreads>
__device__ int count_before(const int4* weights, int first, int count, int weight, int mine, int lane) {
  int before = 0;
  for (int i = lane; 4 * i < count; i += kThreads) {
    const int4 other = weights[i];
    const int position = first + 4 * i;
    before += other.x > weight - (position < mine);
    before += other.y > weight - (position + 1 < mine);
    before += other.z > weight - (position + 2 < mine);
    before += other.w > weight - (position + 3 < mine);
  }
  return before;
}

// The sum over the kThreads lanes that work on one item.
template <int kThreads>
__device__ int add_lanes(int value) {
#pragma unroll
  for (int delta = kThreads / 2; delta > 0; delta /= 2) value += __shfl_xor_sync(~0u, value, delta);
  return value;
}

// Ranks kOrderItems items of one section, by the number of its items that are heavier, or as heavy and earlier, and
// writes their records where they belong: list.make_record(index, weight). Weights are 0 or more; -1 is an item without
// a tile. Those go to the end of the list, section by section. Still lighter ones lie behind them: their list is read
// from its end, so that the lightest comes first. `live` counts items of each section that weigh 0 or more, `last`
// those below -1; null: all have a tile, or there is one section. `heavy` counts the items of each section, its
// heaviest, that go before all sections, where `list` says, and in parts; null: none do.
template <class List>
__global__ void __launch_bounds__(kOrderThreads) order_items_kernel(const List list, const OrderArguments args) {
  __shared__ int4 weights[kChunk / 4];
  let_next_kernel_start();
  const OrderPlace own(args);
  const auto [section, begin, count, first_mine] = own;
  const int mine = first_mine + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  wait_for_earlier_kernels();
  args.clear_tickets();
  if (section >= args.sections) {
    int64_t end = args.num_items;  // of what is ranked
    if constexpr (List::kHeavyFirst) {
      end += list.count_heavy_parts() - KindPlace(args.heavy, 0, args.sections, lane).all;
    }
    write_dead(args, end);
    return;
  }
  const int weight = mine < count ? args.weights[begin + mine] : 0;

  int rank = 0;
  for (int first = 0; first < count; first += kChunk) {
    __syncthreads();
    for (int i = threadIdx.x; i < kChunk; i += kOrderThreads) {
      reinterpret_cast<int32_t*>(weights)[i] = first + i < count ? args.weights[begin + first + i] : kNoWeight;
    }
    __syncthreads();
    rank += count_before<kLanes>(weights, first, mask::smaller(kChunk, count - first), weight, mine, lane);
  }
  rank = add_lanes<kLanes>(rank);
  int64_t place = place_of_rank(args, own, rank);
  if (args.live != nullptr) {
    const KindPlace live_place(args.live, section, args.sections, lane);
    if (rank < live_place.here) {
      place = live_place.before + rank;
    } else {
      place = live_place.all + (begin - live_place.before) + rank - live_place.here;
    }
    if (args.last != nullptr) {
      const KindPlace last_place(args.last, section, args.sections, lane);
      const int from_end = count - 1 - rank;
      if (from_end < last_place.here) {
        place = args.num_items - 1 - last_place.before - from_end;
      } else if (rank >= live_place.here) {
        place -= last_place.before;
      }
    }
  }
  int parts = 1;
  if constexpr (List::kHeavyFirst) {
    const KindPlace heavy_place(args.heavy, section, args.sections, lane);
    if (mine >= count) return;
    if (rank < heavy_place.here) {
      place = list.place_heavy(begin + mine, &parts);
    } else if (weight >= 0) {
      place += list.count_heavy_parts() - heavy_place.before - heavy_place.here;
    } else {
      place += list.count_heavy_parts() - heavy_place.all;
    }
  }
  if (mine >= count) return;

  for (int part = 0; part < parts; ++part) {
    const PackedRecord record = list.make_record(begin + mine, weight, part);
#pragma unroll
    for (int i = 0; i < kLanes; ++i) {
      if (lane == i) args.items[place + part].parts[i] = record.parts[i];
    }
  }
}

// A list of dead records, where there is nothing to plan.
inline Status write_dead_list(void* items, int64_t records, Stream stream) {
  if (records == 0) return Status::Ok();
  return cuda_status(cudaMemsetAsync(items, 0xff, records * sizeof(PackedRecord), stream), "cudaMemsetAsync");
}

// CTAs that put a list in order, and end it; of `args`, what tells how it is cut follows from the rest.
inline int64_t cut_list(OrderArguments& args) {
  args.sections = static_cast<int32_t>(mask::ceil_div(args.num_items, args.section_items));
  args.ctas_per_section = static_cast<int32_t>(mask::ceil_div(args.section_items, kOrderItems));
  return int64_t{args.sections} * args.ctas_per_section + mask::ceil_div(args.room - args.num_items, kOrderItems);
}

// Puts a list in order.
template <class List>
Status order_items(const List& list, OrderArguments args, Stream stream) {
  const int64_t ctas = cut_list(args);
  return launch("the launch of order_items", order_items_kernel<List>, static_cast<unsigned>(ctas), kOrderThreads, 0,
                stream, list, args);
}

}  // namespace hbsattn::kernels
