#include <algorithm>

#include "kernels/common/cuda_status.h"
#include "kernels/instances.h"
#include "kernels/mask/layout.h"

namespace hbsattn::kernels {
namespace {

using mask::Item;
using mask::ItemGrid;

constexpr int kCountThreads = 64;
constexpr int kOrderThreads = 256;
constexpr int kLanes = 4;  // threads that rank one item together
constexpr int kOrderItems = kOrderThreads / kLanes;
constexpr int kChunk = 1024;  // keys in shared memory at a time

// Tiles that run at the same time should find their keys and values in L2 (50 MB, of which queries, outputs and the
// far partition take a share).
constexpr int64_t kSectionBytes = int64_t{32} << 20;
constexpr int64_t kSectionItems = 8192;  // ranking costs this many comparisons an item

// Items of a section: a run of the list that is put in order by itself. As many (sequence, key head) pairs as fit.
int64_t count_section_items(const PlanParams& params, int32_t tiles, int32_t packed_heads, int64_t num_items) {
  const MaskShape& shape = params.mask.shape;
  const int64_t longest = std::max<int64_t>(shape.cols * shape.k_block_size, 1);
  const int64_t bytes = 2 * longest * params.head_dim * params.element_size;
  const int64_t pairs = std::max<int64_t>(kSectionBytes / bytes, 1);
  const int64_t batch = std::max(shape.batch, 1);
  const int64_t row_groups = params.heads_q / packed_heads / params.heads_k;  // that read one key head
  const int64_t wanted = pairs >= batch ? pairs / batch * row_groups * shape.rows * tiles
                                        : pairs * mask::ceil_div(shape.rows, batch) * tiles;
  const int64_t items = std::min(wanted, num_items);
  return mask::ceil_div(items, mask::ceil_div(items, kSectionItems));
}

// kThreads threads count the blocks of one item: all of them, and those that need element masks.
template <int kThreads>
__global__ void __launch_bounds__(kCountThreads)
    count_blocks_kernel(const ItemGrid grid, const uint32_t* bits, int64_t num_items, int32_t* blocks,
                        int32_t* masked) {
  const int64_t index = (int64_t{blockIdx.x} * kCountThreads + threadIdx.x) / kThreads;
  if (index >= num_items) return;
  const int lane = threadIdx.x % kThreads;
  const Item item = mask::make_item(grid, index);
  const uint32_t* row = bits + item.record.bit_row * grid.shape.words();
  int all = 0, clean = 0;
  for (int word = lane; 32 * word < item.record.col_end; word += kThreads) {
    const uint32_t active = row[word];
    all += __popc(active & mask::bits_before(item.record.col_end, word));
    clean += __popc(active & mask::bits_before(item.clean_end, word));
  }
#pragma unroll
  for (int delta = kThreads / 2; delta > 0; delta /= 2) {
    all += __shfl_xor_sync(~0u, all, delta);
    clean += __shfl_xor_sync(~0u, clean, delta);
  }
  if (lane == 0) {
    blocks[index] = all;
    masked[index] = all - clean;
  }
}

// Ranks kOrderItems items of one section, by the number of its items that are heavier, or as heavy and earlier, and
// writes their records where they belong.
__global__ void __launch_bounds__(kOrderThreads)
    order_items_kernel(const ItemGrid grid, int64_t num_items, int64_t section_items, int ctas_per_section,
                       const int32_t* blocks, const int32_t* masked, WorkItem* items) {
  __shared__ int4 keys[kChunk / 4];
  const int64_t begin = blockIdx.x / ctas_per_section * section_items;
  const int count = static_cast<int>(mask::smaller(section_items, num_items - begin));
  const int mine = static_cast<int>(blockIdx.x % ctas_per_section) * kOrderItems + threadIdx.x / kLanes;
  const int lane = threadIdx.x % kLanes;
  const int weight = mine < count ? blocks[begin + mine] : 0;

  int rank = 0;
  for (int first = 0; first < count; first += kChunk) {
    __syncthreads();
    for (int i = threadIdx.x; i < kChunk; i += kOrderThreads) {
      // -1 is not heavier than anything.
      reinterpret_cast<int32_t*>(keys)[i] = first + i < count ? blocks[begin + first + i] : -1;
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
  if (mine >= count) return;

  const WorkItem record = mask::make_item(grid, begin + mine).record;
  int4* destination = reinterpret_cast<int4*>(items + begin + rank);
  if (lane == 0) destination[0] = make_int4(record.bit_row, record.sequence, record.head, record.block_row);
  if (lane == 1) destination[1] = make_int4(record.first_row, weight, masked[begin + mine], record.col_end);
  if (lane == 2) destination[2] = make_int4(record.q_begin, record.q_len, record.k_begin, record.k_len);
}
static_assert(sizeof(WorkItem) == 3 * sizeof(int4) && offsetof(WorkItem, first_row) == 16 &&
              offsetof(WorkItem, q_begin) == 32);

}  // namespace

Status plan_items(const PlanParams& params, int64_t num_items, Stream stream) {
  if (num_items == 0) return Status::Ok();
  const MaskShape& shape = params.mask.shape;
  const int32_t packed_heads = count_packed_heads(shape, params.heads_q, params.heads_k, params.pack_heads);
  const int64_t block_rows = int64_t{packed_heads} * shape.q_block_size;
  const int32_t tile_rows = choose_tile_rows(block_rows, params.head_dim);
  const auto tiles = static_cast<int32_t>(mask::ceil_div(block_rows, tile_rows));
  const ItemGrid grid{shape, params.mask.sequences, params.heads_q, packed_heads, tile_rows, tiles};
  int32_t* blocks = static_cast<int32_t*>(params.scratch);
  int32_t* masked = blocks + num_items;

  // Up to eight words, 32 bytes, come in one sector: more threads would only wait for each other.
  const int threads = shape.words() <= 8 ? 1 : 32;
  const auto count_ctas = static_cast<unsigned>(mask::ceil_div(num_items * threads, kCountThreads));
  auto* count_blocks = threads == 1 ? count_blocks_kernel<1> : count_blocks_kernel<32>;
  count_blocks<<<count_ctas, kCountThreads, 0, stream>>>(grid, params.mask.bits, num_items, blocks, masked);
  HBSATTN_RETURN_IF_ERROR(cuda_status(cudaGetLastError(), "the launch of count_blocks"));

  const int64_t section_items = count_section_items(params, tiles, packed_heads, num_items);
  const int64_t ctas_per_section = mask::ceil_div(section_items, kOrderItems);
  const auto order_ctas = static_cast<unsigned>(mask::ceil_div(num_items, section_items) * ctas_per_section);
  order_items_kernel<<<order_ctas, kOrderThreads, 0, stream>>>(
      grid, num_items, section_items, static_cast<int>(ctas_per_section), blocks, masked, params.items);
  return cuda_status(cudaGetLastError(), "the launch of order_items");
}

}  // namespace hbsattn::kernels
