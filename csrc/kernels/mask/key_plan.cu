#include <algorithm>
#include <cstddef>

#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "kernels/mask/order.cuh"
#include "plan/head_sets.h"
#include "plan/layout.h"

namespace hbsattn::kernels {
namespace {

using mask::KeyGrid;

constexpr int kCountWarps = 4;
constexpr int kHeavyThreads = 256;

// Items of a section: those of as many sequences and sets as have queries, output gradients and sums of query gradients
// that fit.
int32_t count_section_items(const KeyPlanParams& params, const KeyGrid& grid, int64_t section_bytes,
                            int64_t num_items) {
  const int64_t bytes =
      count_query_bytes(params.mask.shape, params.head_dim, params.element_size) * grid.sets.tile_heads;
  const int64_t pairs = std::max<int64_t>(section_bytes / (bytes / grid.sets.windows), 1);
  const int64_t of_pair = mask::ceil_div(grid.list.groups, grid.shape.batch) * grid.tiles.tiles;
  // Not so few that adding up the live items of all sections takes longer than ranking.
  return limit_section_items(std::max(pairs * of_pair, mask::ceil_div(num_items, kSectionItems)), num_items);
}

// Of all items that have a tile: their weight and numbers; of the heavy ones: parts, and slots given to them.
struct Totals {
  unsigned long long weight, wanted_slots;
  uint32_t tiles;    // of first windows
  uint32_t working;  // items with work
  int32_t heavy_parts;
  int32_t slots;

  // Whose mean weight tells what is heavy. Of a mask of few columns most tiles have no work, and all others are to be
  // cut. Where columns have work in one window each, they are not: those are like tiles of one window.
  __device__ uint32_t items(int32_t windows) const {
    if (windows > 1 && 2 * working < tiles) return tiles * windows;
    return tiles > working ? tiles : working;
  }
};

// Where the parts of a heavy item go.
struct HeavyPlace {
  int32_t first;  // in the list
  int32_t parts;
  int32_t slot;  // of the workspace, if more than one
};

// A warp counts the query blocks of one item, over the masks of its head: those that any of its columns is active with.
// An item without a tile gets -1; `live` counts the others of each section.
__global__ void __launch_bounds__(32 * kCountWarps)
    count_key_blocks_kernel(const KeyGrid grid, const uint32_t* columns, int64_t num_items, int32_t section_items,
                            int32_t* blocks, int32_t* active, int32_t* live, Totals* totals) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int lane = threadIdx.x % 32;
  const int64_t index = int64_t{blockIdx.x} * kCountWarps + threadIdx.x / 32;
  if (index >= num_items) return;
  const KeyItem item = mask::make_key_item(grid, index);
  if (item.column < 0) {
    if (lane == 0) blocks[index] = -1;
    return;
  }

  const mask::RowRange of_sequence = mask::find_rows(grid.shape, item.row_begin, item.q_len);
  const mask::RowRange rows = mask::cut_rows(of_sequence, grid.sets, item.query_set);
  const auto end_word = static_cast<int>(mask::ceil_div(rows.end, 32));
  const int64_t row_words = grid.shape.row_words();
  int count = 0;
  uint32_t active_columns = 0;
  const int mask_heads = mask::count_mask_heads(grid);
  for (int head = 0; head < mask_heads; ++head) {
    const int64_t mask_head = mask::first_mask_head(grid, item.query_set) + head;
    const uint32_t* column = columns + (mask_head * grid.shape.cols + item.column) * row_words;
    for (int word = rows.begin / 32 + lane; word < end_word; word += 32) {
      const uint32_t inside = mask::bits_before(rows.end, word) & ~mask::bits_before(rows.begin, word);
      uint32_t any = 0;
      for (int i = 0; i < item.united; ++i) {
        const uint32_t bits = column[i * row_words + word] & inside;
        any |= bits;
        active_columns |= bits != 0 ? 1u << i : 0;
      }
      count += __popc(any);
    }
  }
#pragma unroll
  for (int delta = 16; delta > 0; delta /= 2) {
    count += __shfl_xor_sync(~0u, count, delta);
    active_columns |= __shfl_xor_sync(~0u, active_columns, delta);
  }
  if (lane == 0) {
    blocks[index] = count * (grid.sets.tile_heads / mask_heads);
    active[index] = static_cast<int32_t>(active_columns);
    atomicAdd(live + static_cast<int32_t>(index) / section_items, 1);
    atomicAdd(&totals->weight, static_cast<unsigned long long>(blocks[index]));
    if (item.query_set % grid.sets.windows == 0) atomicAdd(&totals->tiles, 1u);
    if (blocks[index] > 0) atomicAdd(&totals->working, 1u);
  }
}

// Counts the heavy items of each section, and the slots that the parts of all would take.
__global__ void __launch_bounds__(kHeavyThreads)
    count_heavy_kernel(const MaskShape shape, int32_t windows, int32_t units, const int32_t* blocks, int64_t num_tiles,
                       int32_t section_items, Totals* totals, int32_t* heavy) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = int64_t{blockIdx.x} * kHeavyThreads + threadIdx.x;
  if (index >= num_tiles || !mask::is_heavy(units, blocks[index], totals->weight, totals->items(windows))) return;
  atomicAdd(heavy + static_cast<int32_t>(index) / section_items, 1);
  const int32_t parts = mask::count_parts(shape, units, blocks[index], totals->weight);
  if (parts > 1) atomicAdd(&totals->wanted_slots, static_cast<unsigned long long>(parts));
}

// Gives every heavy item its place before all others, and its parts: fewer for all, if there are too few slots. How
// many does not depend on the order in which items come here, only their places do.
__global__ void __launch_bounds__(kHeavyThreads)
    place_heavy_kernel(const MaskShape shape, int32_t windows, int32_t units, const int32_t* blocks, int64_t num_tiles,
                       int32_t slots, Totals* totals, HeavyPlace* places) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = int64_t{blockIdx.x} * kHeavyThreads + threadIdx.x;
  if (index >= num_tiles || !mask::is_heavy(units, blocks[index], totals->weight, totals->items(windows))) return;
  HeavyPlace place{0, mask::count_parts(shape, units, blocks[index], totals->weight), 0};
  const auto wanted = static_cast<uint32_t>(mask::smaller<uint64_t>(totals->wanted_slots, UINT32_MAX));
  if (place.parts > 1 && wanted > static_cast<uint32_t>(slots)) {
    // Both factors are small: at most 32 parts, and slots of some megabytes.
    place.parts = mask::larger<int32_t>(static_cast<uint32_t>(place.parts * slots) / wanted, 1);
  }
  if (place.parts > 1) place.slot = atomicAdd(&totals->slots, place.parts);
  place.first = atomicAdd(&totals->heavy_parts, place.parts);
  places[index] = place;
}

// The records of the list, from what count_key_blocks_kernel found.
struct KeyItemList {
  static constexpr bool kHeavyFirst = true;
  KeyGrid grid;
  const int32_t* active;
  const Totals* totals;
  const HeavyPlace* places;

  __device__ int32_t count_heavy_parts() const { return totals->heavy_parts; }
  __device__ int32_t place_heavy(int64_t index, int* parts) const {
    *parts = places[index].parts;
    return places[index].first;
  }
  __device__ PackedRecord make_record(int64_t index, int weight, int part) const {
    KeyItem record = mask::make_key_item(grid, index);
    record.parts = 1;
    if (record.column >= 0) {
      record.active = active[index];
      record.blocks = weight;
      if (mask::is_heavy(grid.units, weight, totals->weight, totals->items(grid.sets.windows))) {
        record.part = part;
        record.parts = places[index].parts;
        record.slot = places[index].slot;
      }
    }
    return {make_int4(record.column, record.sequence, record.query_set, record.first_key),
            make_int4(record.keys, record.united, record.active, record.blocks),
            make_int4(record.row_begin, record.q_begin, record.q_len, record.k_begin),
            make_int4(record.diagonal, record.part, record.parts, record.slot)};
  }
};
static_assert(sizeof(KeyItem) == sizeof(PackedRecord) && offsetof(KeyItem, keys) == 16 &&
              offsetof(KeyItem, row_begin) == 32 && offsetof(KeyItem, diagonal) == 48);

}  // namespace

Status plan_keys(const KeyPlanParams& params, Stream stream) {
  const MaskShape& shape = params.mask.shape;
  const DevicePolicy policy = current_policy(params);
  if (shape.batch == 0 || shape.cols == 0) return write_dead_list(params.items, params.num_items, stream);
  const KeyListSize size = size_key_list(shape, params.heads_q, params.heads_k, params.head_dim, params.element_size,
                                         params.deterministic, params.rows_k, params.packed, policy);
  const KeyGrid grid = mask::make_key_grid(params, size.sets, policy);
  const int32_t section_items = count_section_items(params, grid, policy.section_bytes(), size.tiles);
  const int64_t sections = mask::ceil_div(size.tiles, section_items);
  auto* totals = static_cast<Totals*>(params.scratch);
  auto* live = reinterpret_cast<int32_t*>(totals + 1);
  int32_t* heavy = live + sections;
  int32_t* blocks = heavy + sections;
  int32_t* active = blocks + size.tiles;
  auto* places = reinterpret_cast<HeavyPlace*>(active + size.tiles);
  constexpr int64_t kTotalInts = sizeof(Totals) / sizeof(int32_t);
  HBSATTN_RETURN_IF_ERROR(clear_counters(static_cast<int32_t*>(params.scratch), kTotalInts + 2 * sections, stream));

  const auto count_ctas = static_cast<unsigned>(mask::ceil_div(size.tiles, kCountWarps));
  HBSATTN_RETURN_IF_ERROR(launch("the launch of count_key_blocks", count_key_blocks_kernel, count_ctas,
                                 32 * kCountWarps, 0, stream, grid, params.columns, size.tiles, section_items, blocks,
                                 active, live, totals));
  const auto heavy_ctas = static_cast<unsigned>(mask::ceil_div(size.tiles, kHeavyThreads));
  HBSATTN_RETURN_IF_ERROR(launch("the launch of count_heavy", count_heavy_kernel, heavy_ctas, kHeavyThreads, 0, stream,
                                 shape, grid.sets.windows, grid.units, blocks, size.tiles, section_items, totals,
                                 heavy));
  HBSATTN_RETURN_IF_ERROR(launch("the launch of place_heavy", place_heavy_kernel, heavy_ctas, kHeavyThreads, 0, stream,
                                 shape, grid.sets.windows, grid.units, blocks, size.tiles,
                                 static_cast<int32_t>(size.slots), totals, places));
  OrderArguments order{};
  order.num_items = size.tiles;
  order.room = params.num_items;
  order.section_items = section_items;
  order.weights = blocks;
  order.live = live;
  order.heavy = heavy;
  order.items = reinterpret_cast<PackedRecord*>(params.items);
  return order_items(KeyItemList{grid, active, totals, places}, order, stream);
}

}  // namespace hbsattn::kernels
