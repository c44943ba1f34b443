#pragma once

// Puts a work list in order: heaviest items first, within sections whose data fit the L2 cache. Items that would hold
// up the end may go before all sections; items that have no tile end the list.

#include <algorithm>

#include "kernels/common/cuda_status.h"
#include "plan/layout.h"

namespace hbsattn::kernels {

constexpr int kOrderThreads = 256;
constexpr int kLanes = 4;  // threads that rank one item together
constexpr int kOrderItems = kOrderThreads / kLanes;
constexpr int kChunk = 1024;  // keys in shared memory at a time

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

// A record of a work list, as it lies in memory.
struct alignas(64) PackedRecord {
  int4 parts[kLanes];
};

// Ranks kOrderItems items of one section, by the number of its items that are heavier, or as heavy and earlier, and
// writes their records where they belong: list.make_record(index, weight). Weights are 0 or more; -1 is an item without
// a tile. Those go to the end of the list, section by section. `live` counts the others of each section; null: all have
// a tile. `heavy` counts the items of each section, its heaviest, that go before all sections, where `list` says, and
// in parts; null: none do.
template <class List>
__global__ void __launch_bounds__(kOrderThreads)
    order_items_kernel(const List list, int64_t num_items, int64_t section_items, int ctas_per_section,
                       const int32_t* weights, const int32_t* live, const int32_t* heavy, PackedRecord* items) {
  __shared__ int4 keys[kChunk / 4];
  const int64_t section = blockIdx.x / ctas_per_section, begin = section * section_items;
  const int count = static_cast<int>(mask::smaller(section_items, num_items - begin));
  const int mine = static_cast<int>(blockIdx.x % ctas_per_section) * kOrderItems + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int weight = mine < count ? weights[begin + mine] : 0;

  int rank = 0;
  for (int first = 0; first < count; first += kChunk) {
    __syncthreads();
    for (int i = threadIdx.x; i < kChunk; i += kOrderThreads) {
      // Behind the last item, -1: as light as an item without a tile, but later than any.
      reinterpret_cast<int32_t*>(keys)[i] = first + i < count ? weights[begin + first + i] : -1;
    }
    __syncthreads();
    for (int i = lane; 4 * i < mask::smaller(kChunk, count - first); i += kLanes) {
      const int4 key = keys[i];
      const int position = first + 4 * i;
      rank += key.x > weight - (position < mine);
      rank += key.y > weight - (position + 1 < mine);
      rank += key.z > weight - (position + 2 < mine);
      rank += key.w > weight - (position + 3 < mine);
    }
  }
#pragma unroll
  for (int delta = kLanes / 2; delta > 0; delta /= 2) rank += __shfl_xor_sync(~0u, rank, delta);
  int64_t place = begin + rank;
  if (live != nullptr) {
    const KindPlace live_place(live, section, gridDim.x / ctas_per_section, lane);
    if (rank < live_place.here) {
      place = live_place.before + rank;
    } else {
      place = live_place.all + (begin - live_place.before) + rank - live_place.here;
    }
  }
  int parts = 1;
  if constexpr (List::kHeavyFirst) {
    const KindPlace heavy_place(heavy, section, gridDim.x / ctas_per_section, lane);
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
      if (lane == i) items[place + part].parts[i] = record.parts[i];
    }
  }
}

template <class List>
Status order_items(const List& list, int64_t num_items, int32_t section_items, const int32_t* weights,
                   const int32_t* live, const int32_t* heavy, void* items, Stream stream) {
  const int64_t ctas_per_section = mask::ceil_div(section_items, kOrderItems);
  const auto ctas = static_cast<unsigned>(mask::ceil_div(num_items, section_items) * ctas_per_section);
  order_items_kernel<<<ctas, kOrderThreads, 0, stream>>>(list, num_items, section_items,
                                                         static_cast<int>(ctas_per_section), weights, live, heavy,
                                                         static_cast<PackedRecord*>(items));
  return cuda_status(cudaGetLastError(), "the launch of order_items");
}

}  // namespace hbsattn::kernels
