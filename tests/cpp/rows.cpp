// Where rows lie, on random tables of sequences, true ones and ones that lie: every row of a packed tensor is a tile's
// or a gap's, and once; no two rows share a place in the workspace; whatever a table says, nothing lies outside.

#include "plan/rows.h"

#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "plan/workspace.h"

namespace {

using namespace hbsattn;

// How gradients that may vary are computed, by block sizes, head dim and the heads that share a mask and a key head.
constexpr BackwardMethod method_of(int32_t q_block, int32_t k_block, int32_t head_dim, int32_t group = 1,
                                   int64_t rows = 1) {
  MaskShape shape;
  shape.batch = shape.heads = shape.cols = 1;
  shape.rows = rows;
  shape.q_block_size = q_block;
  shape.k_block_size = k_block;
  return choose_backward_method(shape, group, 1, head_dim, true, false, false, true, true, DevicePolicy{});
}
static_assert(method_of(128, 128, 128) == BackwardMethod::kByKeys);
static_assert(method_of(128, 128, 128, 1, 128) == BackwardMethod::kByKeysAndQueries);  // of many short sequences
// How short depends on the memory: of an H200, and of an H100.
constexpr int64_t few_keys_at(int64_t memory_rate, int32_t multiprocessors = 132) {
  DevicePolicy policy;
  policy.memory_rate = memory_rate;
  policy.multiprocessors = multiprocessors;
  return policy.few_keys();
}
static_assert(DevicePolicy{}.few_keys() == 386 && few_keys_at(3'352'320) == 566 && few_keys_at(0) == 386);
static_assert(few_keys_at(4'916'736 / 2, 66) == 386);  // half a card
static_assert(method_of(64, 64, 128) == BackwardMethod::kByKeysAndQueries);
static_assert(method_of(1, 64, 128, 16) == BackwardMethod::kByKeys);
static_assert(method_of(1, 64, 128, 4) == BackwardMethod::kByKeys);
static_assert(method_of(1, 64, 128) == BackwardMethod::kByKeysAndQueries);
static_assert(method_of(4, 64, 128, 16) == BackwardMethod::kByKeysAndQueries);

// Heads that are streamed as one, and the rows that each query has then, by the heads that share a key head and the
// masks that these have.
constexpr bool stacks(int32_t q_block, int32_t group, int32_t masks, int32_t heads, int32_t rows, int64_t blocks = 1) {
  MaskShape shape;
  shape.batch = shape.cols = 1;
  shape.heads = masks;
  shape.rows = blocks;
  shape.q_block_size = q_block;
  shape.k_block_size = 64;
  const HeadStack stack = stack_heads(shape, group, 1);
  return stack.heads == heads && stack.rows() == rows;
}
static_assert(stacks(1, 16, 1, 16, 16) && stacks(1, 64, 1, 64, 64) && stacks(2, 8, 1, 8, 8) && stacks(100, 8, 1, 8, 8));
static_assert(stacks(2, 24, 1, 8, 8) && stacks(1, 24, 1, 24, 32) && stacks(1, 12, 1, 12, 16));
static_assert(stacks(1, 8, 1, 8, 16) && stacks(1, 2, 1, 2, 16) && stacks(2, 4, 1, 4, 8) && stacks(6, 4, 1, 4, 8));
static_assert(stacks(1, 1, 1, 1, 1) && stacks(16, 16, 1, 1, 1) && stacks(1, 16, 16, 1, 1) && stacks(1, 32, 2, 1, 1));
static_assert(stacks(5, 4, 1, 1, 1) && stacks(9, 2, 1, 1, 1));  // would take more rows
static_assert(stacks(1, 16, 1, 16, 16, (1 << 26) - 1) && stacks(1, 16, 1, 1, 1, 1 << 26));

std::mt19937 random_bits(1);

int32_t draw(int64_t low, int64_t high) {
  return static_cast<int32_t>(std::uniform_int_distribution<int64_t>(low, high)(random_bits));
}

void check(bool holds, const char* what) {
  if (holds) return;
  std::printf("FAILED: %s\n", what);
  std::exit(1);
}

struct Table {
  ForwardParams problem;
  std::vector<Sequence> sequences;
};

// Sequences one after another, some of them empty, with rows behind the last one, and in some masks too few blocks.
Table make_table() {
  Table table;
  ForwardParams& problem = table.problem;
  MaskShape& shape = problem.mask.shape;
  const int32_t blocks[] = {1, 5, 16, 24, 32, 48, 64, 128, 1024};
  shape.batch = draw(1, 12);
  shape.q_block_size = blocks[draw(0, 8)];
  shape.k_block_size = blocks[draw(0, 8)];
  problem.packed = draw(0, 3) > 0;
  const int32_t groups[] = {1, 2, 4, 8, 12, 16, 24};
  problem.heads_q = groups[draw(0, 6)];
  problem.heads_k = shape.heads = 1;
  problem.head_dim = 64;
  const int32_t longest = draw(1, 200);
  std::vector<int32_t> cu_q{draw(0, 3) == 0 ? draw(0, 40) : 0}, cu_k{draw(0, 3) == 0 ? draw(0, 40) : 0};
  int64_t q_blocks = 0, k_blocks = 0, most_q_blocks = 0;
  for (int32_t b = 0; b < shape.batch; ++b) {
    const int32_t q_len = problem.packed ? draw(0, 3) == 0 ? 0 : draw(0, longest) : longest;
    const int32_t k_len = problem.packed ? draw(0, 3) == 0 ? 0 : draw(0, longest) : longest;
    cu_q.push_back(cu_q.back() + q_len);
    cu_k.push_back(cu_k.back() + k_len);
    q_blocks += mask::ceil_div(q_len, shape.q_block_size);
    most_q_blocks = mask::larger(most_q_blocks, mask::ceil_div(q_len, shape.q_block_size));
    k_blocks = mask::larger(k_blocks, mask::ceil_div(k_len, shape.k_block_size));
  }
  SequencesParams lengths;
  if (problem.packed) {
    lengths.cu_seqlens_q = cu_q.data();
    lengths.cu_seqlens_k = cu_k.data();
  }
  lengths.seqlen_q = lengths.seqlen_k = longest;
  const bool too_few = problem.packed && draw(0, 3) == 0;
  if (!problem.packed || draw(0, 1) == 0) {
    lengths.row_stride = too_few ? draw(1, most_q_blocks + 1) : most_q_blocks + (problem.packed ? draw(0, 2) : 0);
    shape.rows = shape.batch * lengths.row_stride;
  } else {
    shape.rows = too_few ? draw(0, q_blocks) : q_blocks + draw(0, 3);
  }
  shape.cols = too_few ? draw(0, k_blocks) : k_blocks;
  lengths.shape = shape;
  int64_t q_before = 0, k_before = 0;
  for (int32_t b = 0; b < shape.batch; ++b) {
    Sequence sequence = mask::read_lengths(lengths, b);
    mask::place_blocks(lengths, b, q_before, k_before, sequence);
    q_before += mask::count_q_blocks(sequence, shape);
    k_before += mask::count_k_blocks(sequence, shape);
    table.sequences.push_back(sequence);
  }
  problem.rows_q = problem.packed ? cu_q.back() + (draw(0, 1) == 0 ? 0 : draw(0, 70)) : longest;
  problem.rows_k = problem.packed ? cu_k.back() + (draw(0, 1) == 0 ? 0 : draw(0, 70)) : longest;
  // As many columns as the call asks for: those of all sequences together hold the keys.
  shape.cols = mask::larger(shape.cols, mask::ceil_div(problem.rows_k, int64_t{shape.batch} * shape.k_block_size));
  return table;
}

void count_gaps(const Table& table, std::vector<int>& of_q, std::vector<int>& of_k) {
  const ForwardParams& problem = table.problem;
  const MaskShape& shape = problem.mask.shape;
  const auto count = [](RowGap gap, std::vector<int>& rows) {
    check(gap.begin >= 0 && gap.begin <= gap.end && gap.end <= static_cast<int64_t>(rows.size()), "gaps lie inside");
    for (int32_t row = gap.begin; row < gap.end; ++row) ++rows[row];
  };
  for (int32_t index = -1; index < shape.batch; ++index) {
    count(find_query_gap(shape, table.sequences.data(), index, static_cast<int32_t>(problem.rows_q)), of_q);
    count(find_key_gap(shape, table.sequences.data(), index, static_cast<int32_t>(problem.rows_k)), of_k);
  }
}

// Rows of query tiles are those of the mask's rows; tiles of keys are those of their list.
void check_gaps(const Table& table) {
  const ForwardParams& problem = table.problem;
  const MaskShape& shape = problem.mask.shape;
  std::vector<int> of_q(problem.rows_q), of_k(problem.rows_k);
  count_gaps(table, of_q, of_k);
  for (int64_t bit_row = 0; bit_row < shape.rows; ++bit_row) {
    const mask::RowPlace place = mask::locate_row(shape, table.sequences.data(), bit_row);
    if (!place.used) continue;
    const int64_t begin = place.block * shape.q_block_size;
    for (int64_t row = begin; row < begin + shape.q_block_size && row < place.sequence.q_len; ++row) {
      ++of_q[place.sequence.q_begin + row];
    }
  }
  KeyPlanParams plan;
  plan.mask = problem.mask;
  plan.mask.sequences = table.sequences.data();
  plan.heads_q = plan.heads_k = 1;
  plan.head_dim = problem.head_dim;
  plan.packed = problem.packed;
  plan.rows_k = problem.rows_k;
  const KeyListSize size = size_key_list(shape, 1, 1, plan.head_dim, plan.element_size, plan.deterministic, plan.rows_k,
                                         plan.packed, DevicePolicy{});
  const mask::KeyGrid grid = mask::make_key_grid(plan, size.sets, DevicePolicy{});
  for (int64_t index = 0; shape.cols > 0 && index < size.tiles; ++index) {
    const KeyItem item = mask::make_key_item(grid, index);
    for (int32_t key = 0; item.column >= 0 && key < item.keys; ++key) ++of_k[item.k_begin + item.first_key + key];
  }
  for (int count : of_q) check(count == 1, "each query is a tile's or a gap's");
  for (int count : of_k) check(count == 1, "each key is a tile's or a gap's");
}

// Where kernels find a query that they have, the passes over all rows see the same one.
void check_chunks(const Table& table) {
  const ForwardParams& problem = table.problem;
  const MaskShape& shape = problem.mask.shape;
  const QueryChunks chunks = chunk_queries(problem);
  const int32_t heads = chunks.stack.heads;
  if (chunks.per_block == 0) {
    const int64_t runs = problem.packed ? 1 : shape.batch,
                  segment = segment_rows(chunks.stack.rows() * shape.q_block_size);
    check(chunks.count <=
              (runs * (chunks.stack.rows() * problem.rows_q / segment + 1) + shape.batch) * (segment / kGranule),
          "hardly more chunks than segments need");
    for (int32_t b = 0; b < shape.batch; ++b) {
      check(chunks.first(b, problem.packed ? table.sequences[b].q_begin : 0) % (1 << chunks.segment_log2) == 0,
            "no segment has chunks of two sequences");
    }
  }
  std::vector<int> seen(chunks.count * kGranule);
  for (int64_t bit_row = 0; bit_row < shape.rows; ++bit_row) {
    const mask::RowPlace place = mask::locate_row(shape, table.sequences.data(), bit_row);
    if (!place.used) continue;
    const int64_t begin = place.block * shape.q_block_size;
    const int64_t end = mask::smaller<int64_t>(begin + shape.q_block_size, place.sequence.q_len);
    for (int64_t row = begin * heads; row < end * heads; ++row) {
      const int64_t query = row / heads;
      const auto head = static_cast<int32_t>(row % heads);
      const int64_t first = int64_t{chunks.first(place.index, place.sequence.q_begin)} * kGranule;
      const int64_t position = chunks.per_block > 0 ? bit_row * chunks.per_block * kGranule + query - begin
                                                    : first + chunks.row_of_query(static_cast<int32_t>(query), head);
      check(position >= 0 && position < chunks.count * kGranule, "chunks lie in the workspace");
      check(++seen[position] == 1, "no two queries share a place");
      const QueryPlace found =
          locate_query(shape, table.sequences.data(), chunks, problem.rows_q, static_cast<int32_t>(position / kGranule),
                       static_cast<int32_t>(position % kGranule));
      check(found.exists && found.sequence == place.index && found.row == place.sequence.q_begin + query &&
                found.head == head,
            "a chunk's row is found again");
      // What a chunk holds behind the end of a sequence does not exist.
      if (row + 1 == int64_t{place.sequence.q_len} * heads && (position + 1) % kGranule != 0) {
        check(!locate_query(shape, table.sequences.data(), chunks, problem.rows_q,
                            static_cast<int32_t>(position / kGranule), static_cast<int32_t>((position + 1) % kGranule))
                   .exists,
              "rows behind the end of a sequence do not exist");
      }
    }
  }
}

int32_t draw_lie() {
  const int32_t lies[] = {0, 1, -1, -5, 300, 1000000, INT32_MAX, INT32_MIN};
  return draw(0, 3) == 0 ? lies[draw(0, 7)] : draw(-100, 400);
}

void check_lies(Table& table) {
  for (Sequence& sequence : table.sequences) {
    sequence = {draw_lie(), draw_lie(), draw_lie(), draw_lie(), draw_lie(), draw_lie(), draw_lie()};
  }
  const ForwardParams& problem = table.problem;
  const MaskShape& shape = problem.mask.shape;
  std::vector<int> of_q(problem.rows_q), of_k(problem.rows_k);
  count_gaps(table, of_q, of_k);
  const QueryChunks chunks = chunk_queries(problem);
  for (int32_t chunk = 0; chunk < chunks.count; ++chunk) {
    for (int32_t row = 0; row < kGranule; ++row) {
      const QueryPlace found = locate_query(shape, table.sequences.data(), chunks, problem.rows_q, chunk, row);
      check(!found.exists || (found.row >= 0 && found.row < problem.rows_q), "rows lie in the tensor");
      check(found.sequence >= 0 && found.sequence < shape.batch, "sequences lie in the batch");
      check(found.head >= 0 && (!found.exists || found.head < chunks.stack.heads), "heads lie in the stack");
    }
  }
  // As kernels cut what an item says.
  for (int32_t index = 0; chunks.per_block == 0 && index < shape.batch; ++index) {
    const int64_t q_begin = mask::clamp<int64_t>(table.sequences[index].q_begin, 0, problem.rows_q);
    const int64_t q_len = mask::clamp<int64_t>(table.sequences[index].q_len, 0, problem.rows_q - q_begin);
    const int64_t first = chunks.first(index, static_cast<int32_t>(q_begin));
    const int64_t last = first + ((q_len << chunks.stack.rows_log2) - 1) / kGranule;
    check(q_len == 0 || (first >= 0 && last < chunks.count), "chunks lie in the workspace");
  }
}

// Short sequences in long blocks take about a segment each, as the workspace has them.
void check_size() {
  BackwardParams params;
  ForwardParams& problem = params.problem;
  MaskShape& shape = problem.mask.shape;
  shape.batch = 4096;
  shape.heads = problem.heads_q = problem.heads_k = 1;
  shape.rows = 4096;
  shape.cols = 1;
  shape.q_block_size = shape.k_block_size = 128;
  problem.packed = true;
  problem.rows_q = problem.rows_k = 4096 * 8;
  problem.head_dim = 128;
  const BackwardWorkspace workspace = lay_out_backward(params, 128, BackwardMethod::kByKeys, DevicePolicy{});
  check(workspace.rows == 4096 * 8 + 4096 * 64, "sums of short sequences are padded to segments, not to blocks");
  // Blocks of one query are not padded at all, where heads share their mask.
  shape.rows = 4096 * 8;
  shape.q_block_size = 1;
  problem.heads_q = 16;
  const BackwardWorkspace stacked = lay_out_backward(params, 128, BackwardMethod::kByKeys, DevicePolicy{});
  check(stacked.stacks == 1 && stacked.rows == (4096 * 8 + 4096) * 16, "a stack of heads fills chunks");
}

}  // namespace

int main() {
  for (int round = 0; round < 20000; ++round) {
    Table table = make_table();
    if (table.problem.packed) check_gaps(table);
    check_chunks(table);
    if (table.problem.rows_q > 0) check_lies(table);
  }
  check_size();
  std::printf("rows: passed\n");
  return 0;
}
