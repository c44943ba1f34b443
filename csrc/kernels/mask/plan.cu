#include <algorithm>
#include <cstddef>

#include "kernels/common/launch.cuh"
#include "kernels/instances.h"
#include "kernels/mask/order.cuh"
#include "plan/head_sets.h"
#include "plan/layout.h"
#include "plan/mask_heads.h"

namespace hbsattn::kernels {
namespace {

using mask::Item;
using mask::ItemGrid;

constexpr int kCountThreads = 64;
constexpr int64_t kUnitedSectionItems = 1024, kPairSectionItems = 256;
// For a multiprocessor, so few that the last tiles have a say in when all are done: halves pay with 16; with 62, a call
// took no less time.
constexpr int64_t kFewItems = 32;

// Items of a section: those of as many (sequence, key head) pairs as fit.
int32_t count_section_items(const PlanParams& params, const TileShape& tiles, int64_t num_items, bool some_dead) {
  const MaskShape& shape = params.mask.shape;
  const int64_t longest = std::max<int64_t>(shape.cols * shape.k_block_size, 1);
  const int64_t column_bytes = params.element_size + (params.for_backward ? sizeof(float) : 0);
  const int64_t bytes = 2 * longest * params.head_dim * column_bytes;
  const int64_t pairs = std::max<int64_t>(current_policy(params).section_bytes() / bytes, 1);
  const int64_t batch = std::max(shape.batch, 1);
  const int64_t row_groups = params.heads_q / tiles.packed_heads / params.heads_k;  // that read one key head
  int64_t wanted = pairs >= batch ? pairs / batch * row_groups * shape.rows * tiles.tiles
                                  : pairs * mask::ceil_div(shape.rows, batch) * tiles.tiles;
  // Not so few that adding up the live items of all sections takes long.
  if (tiles.united > 1) wanted = std::max(wanted, tiles.pairs ? kPairSectionItems : kUnitedSectionItems);
  if (some_dead) wanted = std::max(wanted, mask::ceil_div(num_items, kSectionItems));
  return limit_section_items(wanted, num_items);
}

// What uniting the tiles of a neighbourhood would give.
struct UnitedCounts {
  int blocks = 0;  // that any of them is active with
  bool pays = false;
};

template <int kThreads>
__device__ UnitedCounts count_united(const ItemGrid& grid, const uint32_t* bits, const mask::Neighbours& neighbours,
                                     int lane) {
  const Item last = mask::make_item(grid, neighbours.first + neighbours.count - 1);
  const int64_t words = grid.shape.words();
  const uint32_t* row = bits + (last.record.bit_row - (neighbours.count - 1)) * words;
  int together = 0, apart = 0;
  uint32_t active_blocks = 0;  // one bit for each block that has something to attend
  for (int word = lane; 32 * word < last.record.col_end; word += kThreads) {
    uint32_t any = 0;
    for (int block = 0; block < neighbours.count; ++block) {
      const uint32_t active = row[block * words + word] & mask::bits_before(last.record.col_end, word);
      any |= active;
      apart += __popc(active);
      active_blocks |= active != 0 ? 1u << block : 0;
    }
    together += __popc(any);
  }
#pragma unroll
  for (int delta = kThreads / 2; delta > 0; delta /= 2) {
    together += __shfl_xor_sync(~0u, together, delta);
    apart += __shfl_xor_sync(~0u, apart, delta);
    active_blocks |= __shfl_xor_sync(~0u, active_blocks, delta);
  }
  return {together, mask::pays_to_unite(grid.shape, together, apart, __popc(active_blocks))};
}

// What is known of an item, for the lists.
struct ItemCounts {
  int32_t weight;      // blocks of the record, by which items are put in order; -1: the item is dead
  int32_t details[3];  // the record's masked, united and tail; of a pair its alone
};

// The weight of a tile that is taken from the list's end, by its blocks, and back.
__device__ int32_t weigh_last(int32_t blocks) { return -2 - blocks; }

// kThreads threads count the blocks of a pair, whose second block has the item `last`.
template <int kThreads>
__device__ PairCounts count_pair(const ItemGrid& grid, const uint32_t* bits, const Item& last, int lane) {
  const int64_t words = grid.shape.words();
  const uint32_t* second = bits + last.record.bit_row * words;
  const uint32_t* first = second - words;
  PairCounts counts{};
  for (int word = lane; 32 * word < last.record.col_end; word += kThreads) {
    const uint32_t visible = mask::bits_before(last.record.col_end, word);
    const uint32_t of_first = first[word] & visible, of_second = second[word] & visible;
    counts.both += __popc(of_first & of_second);
    counts.alone[0] += __popc(of_first & ~of_second);
    counts.alone[1] += __popc(of_second & ~of_first);
  }
#pragma unroll
  for (int delta = kThreads / 2; delta > 0; delta /= 2) {
    counts.both += __shfl_xor_sync(~0u, counts.both, delta);
    counts.alone[0] += __shfl_xor_sync(~0u, counts.alone[0], delta);
    counts.alone[1] += __shfl_xor_sync(~0u, counts.alone[1], delta);
  }
  return counts;
}

// kThreads threads count the blocks of one item. The first of united items, or of a pair, gets the blocks of all, the
// others are dead, and so are tiles without queries of blocks that have several. Each item decides for itself, so that
// every item is decided, whatever the table of sequences says.
template <int kThreads>
__device__ ItemCounts count_item(const ItemGrid& grid, const uint32_t* bits, int64_t index, int lane) {
  constexpr ItemCounts kDead{-1, {}};
  if (grid.united > 1) {
    const mask::Neighbours neighbours = mask::find_neighbours(grid, index);
    const bool first = index == neighbours.first;
    if (!grid.pairs) {
      const UnitedCounts united = count_united<kThreads>(grid, bits, neighbours, lane);
      if (united.pays) return first ? ItemCounts{united.blocks, {united.blocks, neighbours.count}} : kDead;
    } else if (neighbours.count > 1) {
      const int32_t k_block_size = grid.shape.k_block_size;
      const Item last = mask::make_item(grid, neighbours.first + 1);
      if (has_keys_for_pairs(last.record.k_len, k_block_size)) {
        const PairCounts pair = count_pair<kThreads>(grid, bits, last, lane);
        if (pays_to_pair(pair, k_block_size)) {
          return first ? ItemCounts{pair.weight(), {pair.alone[0], pair.alone[1]}} : kDead;
        }
      }
    }
  }

  const Item item = mask::make_item(grid, index);
  if (grid.tiles > 1 && !item.has_queries) return kDead;
  const uint32_t* row = bits + item.record.bit_row * grid.shape.words();
  int all = 0, clean = 0, tail = 0;
  for (int word = lane; 32 * word < item.record.col_end; word += kThreads) {
    const uint32_t active = row[word];
    all += __popc(active & mask::bits_before(item.record.col_end, word));
    clean += __popc(active & mask::bits_before(item.clean_end, word));
    tail += __popc(active & mask::bits_before(item.tail_end, word));
  }
#pragma unroll
  for (int delta = kThreads / 2; delta > 0; delta /= 2) {
    all += __shfl_xor_sync(~0u, all, delta);
    clean += __shfl_xor_sync(~0u, clean, delta);
    tail += __shfl_xor_sync(~0u, tail, delta);
  }
  return {grid.pairs ? weigh_last(all) : all, {all - clean, 1, tail}};
}

// Counts the blocks of each item and, if `live` is not null, the items of each section that are not dead; behind those
// counts, where there may be pairs, the tiles that are taken from the list's end.
template <int kThreads>
__global__ void __launch_bounds__(kCountThreads)
    count_blocks_kernel(const ItemGrid grid, const uint32_t* bits, int64_t num_items, int32_t section_items,
                        int32_t sections, int32_t* weights, int32_t* details, int32_t* live) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t index = (int64_t{blockIdx.x} * kCountThreads + threadIdx.x) / kThreads;
  const int lane = threadIdx.x % kThreads;
  const bool exists = index < num_items;
  ItemCounts counts{-1, {}};
  if (exists) counts = count_item<kThreads>(grid, bits, index, lane);
  if (exists && lane == 0) {
    weights[index] = counts.weight;
    for (int i = 0; i < 3; ++i) details[i * num_items + index] = counts.details[i];
  }
  if (live == nullptr) return;
  // One addition for all items of a warp that have one counter.
  int32_t counter = -1;
  if (counts.weight != -1) counter = static_cast<int32_t>(index) / section_items + (counts.weight < 0 ? sections : 0);
  const unsigned some = __ballot_sync(~0u, lane == 0 && counter >= 0);
  const unsigned mine = some & __match_any_sync(~0u, counter);
  if (mine != 0 && threadIdx.x % 32 == __ffs(mine) - 1) atomicAdd(live + counter, __popc(mine));
}

// The record of an item of the list.
__device__ PackedRecord make_item_record(const ItemGrid& grid, int64_t index, ItemCounts counts) {
  WorkItem record = mask::make_item(grid, index).record;
  if (counts.weight == -1) {
    record.bit_row = -1;
    record.united = 0;
  } else if (grid.pairs && counts.weight >= 0) {
    record.blocks = counts.weight;
    record.united = 2;
    record.alone[0] = counts.details[0];
    record.alone[1] = counts.details[1];
  } else {
    record.blocks = grid.pairs ? weigh_last(counts.weight) : counts.weight;
    record.masked = counts.details[0];
    record.united = counts.details[1];
    record.alone[0] = counts.details[2];
  }
  // The last block sees farthest.
  if (record.united > 1) record.col_end = mask::make_item(grid, index + record.united - 1).record.col_end;
  return {make_int4(record.bit_row, record.sequence, record.head, record.block_row),
          make_int4(record.first_row, record.blocks, record.masked, record.col_end),
          make_int4(record.q_begin, record.q_len, record.k_begin, record.k_len),
          make_int4(record.diagonal, record.united, record.alone[0], record.alone[1])};
}
static_assert(sizeof(WorkItem) == sizeof(PackedRecord) && offsetof(WorkItem, first_row) == 16 &&
              offsetof(WorkItem, q_begin) == 32 && offsetof(WorkItem, diagonal) == 48);

// The records of the list, from what count_blocks_kernel found.
struct ItemList {
  static constexpr bool kHeavyFirst = false;
  ItemGrid grid;
  const int32_t* details;
  int64_t num_items;

  __device__ PackedRecord make_record(int64_t index, int weight, int) const {
    return make_item_record(grid, index,
                            {weight, {details[index], details[num_items + index], details[2 * num_items + index]}});
  }
};

// Both of these kernels in one, for short sections: each CTA counts the blocks of a whole section for itself, which
// takes less time than another kernel. The records of the items that it ranks wait in shared memory for their places.
constexpr int kShortLanes = 8;  // threads that rank one item together
constexpr int kShortThreads = kOrderItems * kShortLanes;
constexpr int kShortItems = 2048;  // of a section, and that a multiprocessor counts in one or two microseconds

__global__ void __launch_bounds__(kShortThreads)
    plan_short_sections_kernel(const ItemGrid grid, const uint32_t* bits, const OrderArguments args) {
  __shared__ int4 weights[kShortItems / 4];
  __shared__ PackedRecord records[kOrderItems];
  let_next_kernel_start();
  const OrderPlace own(args);
  const int number = threadIdx.x / kShortLanes, lane = threadIdx.x % kShortLanes;
  wait_for_earlier_kernels();
  args.clear_tickets();
  if (own.section >= args.sections) {
    write_dead(args, args.num_items);
    return;
  }
  for (int i = threadIdx.x; i < mask::ceil_div(own.count, 4) * 4; i += kShortThreads) {
    int32_t weight = kNoWeight;
    if (i < own.count) {
      const ItemCounts counts = count_item<1>(grid, bits, own.begin + i, 0);
      weight = counts.weight;
      const int in_cta = i - own.first;
      if (in_cta >= 0 && in_cta < kOrderItems) records[in_cta] = make_item_record(grid, own.begin + i, counts);
    }
    reinterpret_cast<int32_t*>(weights)[i] = weight;
  }
  __syncthreads();

  const int mine = own.first + number;
  const int weight = mine < own.count ? reinterpret_cast<const int32_t*>(weights)[mine] : 0;
  const int rank = add_lanes<kShortLanes>(count_before<kShortLanes>(weights, 0, own.count, weight, mine, lane));
  if (mine < own.count && lane < kLanes) {
    args.items[place_of_rank(args, own, rank)].parts[lane] = records[number].parts[lane];
  }
}

// Whether that kernel takes less time: where a multiprocessor counts few items, and each of them in a few loads.
bool has_short_sections(const ItemGrid& grid, const OrderArguments& args, int64_t ctas, int32_t multiprocessors) {
  const int64_t rounds = mask::ceil_div(ctas, int64_t{multiprocessors});
  return args.live == nullptr && grid.shape.words() <= 8 && rounds * args.section_items * grid.united <= kShortItems;
}

}  // namespace

Status plan_items(const PlanParams& params, Stream stream) {
  const MaskShape& shape = params.mask.shape;
  const TileShape tiles =
      shape_tiles(shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads, params.for_backward);
  const int64_t num_items =
      count_query_items(shape, params.heads_q, params.heads_k, params.head_dim, params.pack_heads, params.for_backward);
  if (num_items == 0) {
    if (params.workspace != nullptr) {
      HBSATTN_RETURN_IF_ERROR(cuda_status(
          cudaMemsetAsync(params.workspace, 0, kForwardTickets * sizeof(int32_t), stream), "cudaMemsetAsync"));
    }
    return write_dead_list(params.items, params.num_items, stream);
  }
  const ItemGrid grid{shape,
                      params.mask.sequences,
                      count_heads_of_mask(shape, params.heads_q),
                      tiles.packed_heads,
                      tiles.tile_rows,
                      tiles.tiles,
                      tiles.united,
                      tiles.pairs,
                      params.mask.rules};
  int32_t* weights = static_cast<int32_t*>(params.scratch);
  int32_t* details = weights + num_items;
  const bool some_dead = tiles.united > 1 || tiles.tiles > 1;
  const int32_t section_items = count_section_items(params, tiles, num_items, some_dead);
  // The dead items of a section are its last ones: nobody has to count them where there is one section.
  int32_t* live = some_dead && section_items < num_items ? details + 3 * num_items : nullptr;
  const int32_t multiprocessors = current_policy(params).multiprocessors;
  OrderArguments order{};
  order.num_items = num_items;
  order.room = params.num_items;
  order.section_items = section_items;
  order.weights = weights;
  order.live = live;
  order.in_halves = live == nullptr && num_items <= kFewItems * multiprocessors;
  order.items = reinterpret_cast<PackedRecord*>(params.items);
  order.tickets = static_cast<int32_t*>(params.workspace);
  const int64_t order_ctas = cut_list(order);
  if (has_short_sections(grid, order, order_ctas, multiprocessors)) {
    return launch("the launch of plan_short_sections", plan_short_sections_kernel, static_cast<unsigned>(order_ctas),
                  kShortThreads, 0, stream, grid, params.mask.bits, order);
  }
  if (live != nullptr) {
    // A section has at least two items, so that both counters of each fit behind the details.
    if (tiles.pairs) order.last = live + order.sections;
    HBSATTN_RETURN_IF_ERROR(clear_counters(live, (tiles.pairs ? 2 : 1) * int64_t{order.sections}, stream));
  }

  // Up to eight words, 32 bytes, come in one sector: more threads would only wait for each other.
  const int threads = shape.words() <= 8 ? 1 : 32;
  const auto count_ctas = static_cast<unsigned>(mask::ceil_div(num_items * threads, kCountThreads));
  HBSATTN_RETURN_IF_ERROR(launch("the launch of count_blocks",
                                 threads == 1 ? count_blocks_kernel<1> : count_blocks_kernel<32>, count_ctas,
                                 kCountThreads, 0, stream, grid, params.mask.bits, num_items, section_items,
                                 order.sections, weights, details, live));
  return order_items(ItemList{grid, details, num_items}, order, stream);
}

}  // namespace hbsattn::kernels
