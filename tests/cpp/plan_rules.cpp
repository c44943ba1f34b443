// Rules of planning against their definitions, for shapes and tables drawn at random: lists are never longer than the
// bounds that know no card, and hold every tile once.

#include <algorithm>
#include <cinttypes>
#include <cstdio>
#include <map>
#include <random>
#include <set>
#include <tuple>
#include <vector>

#include "plan/layout.h"
#include "plan/lists.h"
#include "plan/pairs.h"
#include "plan/workspace.h"

namespace {

using namespace hbsattn;

// The limits that were measured hold on the card that they were measured on.
constexpr DevicePolicy kH200{132, int64_t{60} << 20, int64_t{228} << 10};
static_assert(kH200.section_bytes() == 32 << 20 && kH200.running_bytes() == 36 << 20);
static_assert(kH200.together_bytes() == 5 << 20 && kH200.running_keys() == 132 * 128 && kH200.units() == 128);
constexpr DevicePolicy kDefaults;
static_assert(kDefaults.multiprocessors == kH200.multiprocessors && kDefaults.l2_bytes == kH200.l2_bytes);

// Thousands of short sequences, whose flat mask has as many columns as all have blocks: a list of megabytes.
constexpr MaskShape many_sequences() {
  MaskShape shape;
  shape.batch = 4096;
  shape.heads = 8;
  shape.rows = shape.cols = 4 * shape.batch;
  shape.q_block_size = shape.k_block_size = 32;
  return shape;
}
static_assert(max_key_items(many_sequences(), 8, 128 * 4096, true) * sizeof(KeyItem) < 16 << 20);

std::mt19937_64 generator(1);

int64_t draw(int64_t low, int64_t high) { return std::uniform_int_distribution<int64_t>(low, high)(generator); }

// Small numbers as often as large ones.
int64_t draw_size(int64_t high) { return draw(0, std::min<int64_t>(high, (int64_t{1} << draw(0, 62)) - 1)); }

template <class T>
T choose(std::initializer_list<T> values) {
  return values.begin()[draw(0, static_cast<int64_t>(values.size()) - 1)];
}

struct Problem {
  MaskShape shape;
  int32_t heads_q, heads_k, head_dim;
  bool pack_heads, deterministic, packed;
  int64_t rows_k;
  DevicePolicy policy;
};

int32_t draw_block() {
  return static_cast<int32_t>(draw(0, 2) == 0 ? 16 * draw(1, 16) : 1 + draw_size((int64_t{1} << 30) - 2));
}

// Any problem whose sizes the core accepts one by one; `valid` says whether its lists are short enough as well.
Problem draw_problem() {
  Problem problem{};
  problem.heads_k = static_cast<int32_t>(1 + draw_size(63));
  const auto group = static_cast<int32_t>(1 + draw_size(31));
  problem.heads_q = problem.heads_k * group;
  problem.head_dim = static_cast<int32_t>(choose({draw(1, 256), draw(1, 128), int64_t{64}, int64_t{128}}));
  problem.pack_heads = draw(0, 3) != 0;
  problem.deterministic = draw(0, 2) == 0;
  problem.packed = draw(0, 1) == 0;
  problem.rows_k = draw_size(INT32_MAX);
  MaskShape& shape = problem.shape;
  shape.batch = static_cast<int32_t>(draw_size(INT32_MAX));
  shape.heads = choose({1, problem.heads_k, problem.heads_q});
  shape.rows = draw_size(INT32_MAX / shape.heads);
  shape.q_block_size = static_cast<int32_t>(std::min<int64_t>(draw_block(), INT32_MAX / problem.heads_q));
  shape.k_block_size = draw_block();
  shape.cols = draw_size(std::min<int64_t>((1 << 26) - 1, (int64_t{1} << 32) / shape.k_block_size - 1));
  shape.causal = draw(0, 1) == 0;
  if (draw(0, 3) != 0) {
    problem.policy = {static_cast<int32_t>(draw(1, 300)), draw(1, 400) << 18, draw(64, 256) << 10, draw(1, 20'000'000)};
  }
  problem.policy.family = draw(0, 2) == 0 ? KernelFamily::kSm80 : KernelFamily::kSm90;
  return problem;
}

KeyListSize size_list(const Problem& problem, int64_t rows_k) {
  return size_key_list(problem.shape, problem.heads_q, problem.heads_k, problem.head_dim, 2, problem.deterministic,
                       rows_k, problem.packed, problem.policy);
}

int fail(const char* what, const Problem& problem, int64_t got, int64_t bound) {
  const MaskShape& shape = problem.shape;
  std::printf("FAILED: %s: %" PRId64 ", against %" PRId64 "\n", what, got, bound);
  std::printf("batch %d heads %d rows %" PRId64 " cols %" PRId64 " blocks %d x %d causal %d\n", shape.batch,
              shape.heads, shape.rows, shape.cols, shape.q_block_size, shape.k_block_size, shape.causal);
  std::printf("heads_q %d heads_k %d head_dim %d pack %d deterministic %d packed %d rows_k %" PRId64 " SMs %d\n",
              problem.heads_q, problem.heads_k, problem.head_dim, problem.pack_heads, problem.deterministic,
              problem.packed, problem.rows_k, problem.policy.multiprocessors);
  return 1;
}

int check_lengths(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const Problem problem = draw_problem();
    const int64_t most = max_items(problem.shape, problem.heads_q, problem.heads_k, problem.pack_heads);
    for (const bool for_backward : {false, true}) {
      const int64_t items = count_query_items(problem.shape, problem.heads_q, problem.heads_k, problem.head_dim,
                                              problem.pack_heads, for_backward);
      if (items < 0 || items > most) return fail("tiles of queries", problem, items, most);
      const TileShape tiles = shape_tiles(problem.shape, problem.heads_q, problem.heads_k, problem.head_dim,
                                          problem.pack_heads, for_backward);
      const bool may_have_pairs = !for_backward && tiles.block_rows == 64 && problem.head_dim <= 128 &&
                                  problem.shape.cols * problem.shape.k_block_size >= 512;
      if (tiles.pairs && (!may_have_pairs || tiles.tile_rows != 64 || tiles.tiles != 1 || tiles.united != 2)) {
        return fail("tiles of pairs", problem, tiles.tile_rows, items);
      }
    }
    const KeyListSize size = size_list(problem, problem.rows_k);
    const int64_t most_keys = max_key_items(problem.shape, problem.heads_q, problem.rows_k, problem.packed);
    if (size.items() < 0 || size.items() > most_keys) return fail("tiles of keys", problem, size.items(), most_keys);
    const KeyListSize longer = size_list(problem, problem.rows_k + draw_size(INT32_MAX - problem.rows_k));
    if (longer.tiles < size.tiles || longer.slots != size.slots ||
        longer.sets.count(problem.heads_q) != size.sets.count(problem.heads_q)) {
      return fail("a list for more keys", problem, longer.tiles, size.tiles);
    }
  }
  return 0;
}

// What the kernels of kSm80 are planned with: they share no tiles of keys, have no lists of their own for the forward,
// and add up gradients of queries only where a kernel for that is there.
int check_sm80(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    Problem problem = draw_problem();
    problem.policy.family = KernelFamily::kSm80;
    const KeyListSize size = size_list(problem, problem.rows_k);
    if (size.sets.count(problem.heads_q) != problem.heads_k || size.sets.windows != 1 || size.slots != 0) {
      return fail("tiles that share keys", problem, size.sets.count(problem.heads_q), problem.heads_k);
    }
    BackwardParams params;
    params.deterministic = problem.deterministic;
    ForwardParams& forward = params.problem;
    forward.mask.shape = problem.shape;
    forward.heads_q = problem.heads_q;
    forward.heads_k = problem.heads_k;
    forward.head_dim = problem.head_dim;
    forward.softcap = draw(0, 1) == 0 ? 0.f : 1.f;
    if (!takes_gradient_tiles(forward, problem.policy)) return fail("a forward's own tiles", problem, 0, 1);
    for (const auto& [needs_q, needs_k, method] :
         {std::tuple(true, false, BackwardMethod::kQueriesOnly), std::tuple(false, true, BackwardMethod::kKeysOnly)}) {
      params.needs_q = needs_q;
      params.needs_k = params.needs_v = needs_k;
      if (choose_backward_method(params, problem.policy) != method) return fail("a method", problem, needs_q, needs_k);
    }
    params.needs_q = true;
    const BackwardMethod method = choose_backward_method(params, problem.policy);
    const bool may_add = !problem.deterministic && forward.softcap == 0.f && problem.head_dim <= 128;
    if (method != BackwardMethod::kByKeysAndQueries && !(may_add && method == BackwardMethod::kByKeys)) {
      return fail("a method", problem, may_add, static_cast<int>(method));
    }
  }
  return 0;
}

// One tile: its set of heads, sequence, first key, keys and key blocks.
using Tile = std::tuple<int32_t, int32_t, int32_t, int32_t, int32_t>;

// A small problem with a table of sequences; `honest`: as make_sequences makes them. Otherwise any of its numbers lies.
struct Table {
  Problem problem;
  std::vector<Sequence> sequences;
  KeyPlanParams params;
};

Table draw_table(bool honest) {
  Table table;
  Problem& problem = table.problem;
  problem = draw_problem();
  MaskShape& shape = problem.shape;
  problem.heads_k = static_cast<int32_t>(draw(1, 2));
  problem.heads_q = problem.heads_k * static_cast<int32_t>(choose({draw(1, 5), int64_t{8}, int64_t{16}}));
  shape.heads = choose({1, problem.heads_k, problem.heads_q});
  shape.batch = static_cast<int32_t>(draw(1, choose({1, 4, 40})));
  shape.q_block_size = static_cast<int32_t>(choose({draw(1, 300), 16 * draw(1, 10)}));
  shape.k_block_size = static_cast<int32_t>(choose({draw(1, 300), 16 * draw(1, 10), draw(1000, 5000)}));
  problem.packed = draw(0, 1) == 0;

  const int64_t longest = choose<int64_t>({0, 1, 40, 700});
  const int64_t even_q = draw(0, longest), even_k = draw(0, longest);
  int64_t q_begin = 0, k_begin = 0, rows = 0, columns = 0;
  for (int b = 0; b < shape.batch; ++b) {
    const int64_t q_len = problem.packed ? draw(0, longest) : even_q;
    const int64_t k_len = problem.packed ? draw(0, longest) : even_k;
    Sequence sequence{static_cast<int32_t>(q_begin),      static_cast<int32_t>(q_len), static_cast<int32_t>(k_begin),
                      static_cast<int32_t>(k_len),        static_cast<int32_t>(rows),  static_cast<int32_t>(columns),
                      static_cast<int32_t>(k_len - q_len)};
    if (problem.packed) {
      q_begin += q_len;
      k_begin += k_len;
    }
    const int64_t k_blocks = mask::count_k_blocks(sequence, shape);
    shape.cols = std::max(b == 0 ? 0 : shape.cols, k_blocks);
    rows += mask::count_q_blocks(sequence, shape);
    columns += k_blocks;
    table.sequences.push_back(sequence);
  }
  shape.rows = rows;
  shape.cols += problem.packed ? draw(0, 2) : 0;  // a bound
  problem.rows_k = problem.packed ? k_begin + choose<int64_t>({0, 0, 100}) : even_k;
  for (Sequence& sequence : table.sequences) {
    if (honest) break;
    for (int32_t* number : {&sequence.q_begin, &sequence.q_len, &sequence.k_begin, &sequence.k_len, &sequence.row_begin,
                            &sequence.col_begin, &sequence.diagonal}) {
      if (draw(0, 1) == 0) *number = static_cast<int32_t>(choose({draw(INT32_MIN, INT32_MAX), draw(-30, 300)}));
    }
  }

  KeyPlanParams& params = table.params;
  params.mask.shape = shape;
  params.mask.sequences = table.sequences.data();
  params.heads_q = problem.heads_q;
  params.heads_k = problem.heads_k;
  params.head_dim = problem.head_dim;
  params.deterministic = problem.deterministic;
  params.packed = problem.packed;
  params.rows_k = problem.rows_k;
  return table;
}

// The tiles that hold keys, from the definition.
std::set<Tile> expected_tiles(const Table& table, int32_t query_sets) {
  const MaskShape& shape = table.params.mask.shape;
  const KeyTileShape tiles = shape_key_tiles(shape, table.params.head_dim);
  std::set<Tile> expected;
  for (int32_t set = 0; set < query_sets; ++set) {
    for (int32_t b = 0; b < shape.batch; ++b) {
      const int32_t k_len = table.sequences[b].k_len;
      // Every key belongs to the tile that begins at or before it, where united blocks begin or in one block.
      for (int32_t key = 0; key < k_len; ++key) {
        const int32_t of_group = tiles.united * shape.k_block_size;
        const int32_t group = key / of_group * of_group;
        const int32_t first = group + (key - group) / tiles.tile_keys * tiles.tile_keys;
        const int32_t end = std::min({first + tiles.tile_keys, group + of_group, k_len});
        const int32_t blocks = (end - 1) / shape.k_block_size - first / shape.k_block_size + 1;
        expected.insert({set, b, first, end - first, blocks});
      }
    }
  }
  return expected;
}

int check_key_places(int rounds, bool honest) {
  for (int round = 0; round < rounds; ++round) {
    const Table table = draw_table(honest);
    const MaskShape& shape = table.params.mask.shape;
    if (shape.cols == 0) continue;  // no list
    const KeyListSize size = size_list(table.problem, table.problem.rows_k);
    const mask::KeyGrid grid = mask::make_key_grid(table.params, size.sets, table.problem.policy);
    const int32_t query_sets = size.sets.count(table.params.heads_q);
    std::set<Tile> got;
    for (int64_t place = 0; place < size.tiles; ++place) {
      const KeyItem item = mask::make_key_item(grid, place);
      if (item.sequence < 0 || item.sequence >= shape.batch || item.query_set < 0 || item.query_set >= query_sets) {
        return fail("a place outside the table", table.problem, item.sequence, item.query_set);
      }
      if (item.column < 0) continue;
      if (item.united < 1 || item.column + item.united > shape.cols || item.keys < 1 ||
          item.keys > grid.tiles.tile_keys || item.first_key + item.keys > table.sequences[item.sequence].k_len ||
          item.column != item.first_key / shape.k_block_size) {
        return fail("a tile outside its sequence", table.problem, item.column, item.keys);
      }
      if (!got.insert({item.query_set, item.sequence, item.first_key, item.keys, item.united}).second) {
        return fail("a tile that the list has twice", table.problem, item.sequence, item.first_key);
      }
    }
    if (honest && got != expected_tiles(table, query_sets)) {
      return fail("tiles of the list", table.problem, static_cast<int64_t>(got.size()), size.tiles);
    }
    if (!table.problem.packed && size.tiles != query_sets * shape.batch * grid.tiles.count(shape)) {
      return fail("places of batched tensors", table.problem, size.tiles, grid.tiles.count(shape));
    }
  }
  return 0;
}

// The sets of a key head have every query block of a sequence once for each head that reads it, whatever a table says.
int check_query_sets(int rounds) {
  int cut = 0;
  for (int round = 0; round < rounds; ++round) {
    Table table = draw_table(draw(0, 3) != 0);
    Problem& problem = table.problem;
    if (draw(0, 1) == 0) problem.policy.l2_bytes = int64_t{1} << draw(6, 20);  // where few queries outgrow it
    const MaskShape& shape = problem.shape;
    const QuerySets sets = size_list(problem, problem.rows_k).sets;
    const int32_t count = sets.count(problem.heads_q);
    if (sets.windows > 1) ++cut;
    if (sets.windows < 1 || count > problem.heads_q || problem.heads_q / problem.heads_k % sets.tile_heads != 0 ||
        sets.tile_heads % stack_heads(shape, problem.heads_q, problem.heads_k).heads != 0) {
      return fail("sets of queries", problem, sets.tile_heads, sets.windows);
    }
    for (const Sequence& sequence : table.sequences) {
      const mask::RowRange rows = mask::find_rows(shape, sequence.row_begin, sequence.q_len);
      int32_t next = rows.begin;
      for (int32_t set = 0; set < count; ++set) {
        const mask::RowRange mine = mask::cut_rows(rows, sets, set);
        if (set % sets.windows == 0) next = rows.begin;
        if (sets.first_head(set) != set / sets.windows * sets.tile_heads || mine.begin != next || mine.end < next ||
            (set % sets.windows == sets.windows - 1 && mine.end != rows.end)) {
          return fail("windows of a sequence", problem, mine.begin, mine.end);
        }
        next = mine.end;
      }
    }
  }
  return cut < rounds / 200 ? fail("windows are hardly tested", Problem{}, cut, rounds) : 0;
}

// Rows belong to the last sequence that begins at or before them, whatever way they are looked for.
int check_places_of_rows(int rounds) {
  const auto same = [](const Sequence& a, const Sequence& b) {
    return a.q_begin == b.q_begin && a.q_len == b.q_len && a.k_begin == b.k_begin && a.k_len == b.k_len &&
           a.row_begin == b.row_begin && a.col_begin == b.col_begin;
  };
  for (int round = 0; round < rounds; ++round) {
    Table table = draw_table(draw(0, 3) != 0);
    MaskShape& shape = table.problem.shape;
    SequencesParams params;
    params.shape = shape;
    params.seqlen_q = draw(0, 1) == 0 ? table.sequences[0].q_len : draw_size(INT32_MAX);
    params.seqlen_k = draw(0, 1) == 0 ? table.sequences[0].k_len : draw_size(INT32_MAX);
    params.row_stride = choose<int64_t>({-1, 0, 1, draw(0, 20), draw_size(INT32_MAX)});
    const mask::EvenSequences even = mask::make_even_sequences(params);
    const bool is_even = draw(0, 1) == 0;
    int64_t q_blocks = 0, k_blocks = 0;
    bool sorted = true;
    for (int32_t b = 0; b < shape.batch; ++b) {
      Sequence& sequence = table.sequences[b];
      if (is_even) {
        sequence = mask::read_lengths(params, b);
        mask::place_blocks(params, b, q_blocks, k_blocks, sequence);
        q_blocks += mask::count_q_blocks(sequence, shape);
        k_blocks += mask::count_k_blocks(sequence, shape);
        if (!same(sequence, even[b])) return fail("an even sequence", table.problem, b, even[b].row_begin);
      }
      sorted = sorted && (b == 0 || table.sequences[b - 1].row_begin <= sequence.row_begin);
    }
    const int64_t end = std::min<int64_t>(int64_t{table.sequences.back().row_begin} + 40, INT32_MAX);
    for (int i = 0; i < 200; ++i) {
      const int64_t row = draw(0, std::max<int64_t>(end, 1) - 1);
      const mask::RowPlace place = mask::locate_row(shape, table.sequences.data(), row);
      if (place.index < 0 || place.index >= shape.batch || !same(place.sequence, table.sequences[place.index])) {
        return fail("a row outside the table", table.problem, place.index, row);
      }
      int32_t last = 0;
      for (int32_t b = 0; b < shape.batch; ++b) last = table.sequences[b].row_begin <= row ? b : last;
      if (sorted && place.index != last) return fail("the sequence of a row", table.problem, place.index, last);
      if (!is_even) continue;
      const mask::RowPlace other = mask::locate_row(shape, even, row);
      if (other.index != place.index || other.block != place.block || other.used != place.used ||
          !same(other.sequence, place.sequence)) {
        return fail("a row of even sequences", table.problem, other.index, place.index);
      }
    }
  }
  return 0;
}

// Tiles of queries without a query are those that hold none.
int check_empty_tiles(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const Table table = draw_table(true);
    const Problem& problem = table.problem;
    const MaskShape& shape = problem.shape;
    if (shape.rows == 0) continue;
    const TileShape tiles =
        shape_tiles(shape, problem.heads_q, problem.heads_k, problem.head_dim, problem.pack_heads, draw(0, 1) == 0);
    const mask::ItemGrid grid{shape,
                              table.sequences.data(),
                              count_heads_of_mask(shape, problem.heads_q),
                              tiles.packed_heads,
                              tiles.tile_rows,
                              tiles.tiles,
                              tiles.united,
                              tiles.pairs,
                              nullptr};
    const int64_t items = problem.heads_q / tiles.packed_heads * shape.rows * tiles.tiles;
    for (int64_t index = 0; index < std::min<int64_t>(items, 3000); ++index) {
      const mask::Item item = mask::make_item(grid, index);
      const WorkItem& record = item.record;
      int64_t queries = 0;
      for (int64_t row = record.first_row;
           row < std::min<int64_t>(record.first_row + tiles.tile_rows, tiles.block_rows); ++row) {
        queries += record.block_row + row % shape.q_block_size < record.q_len;
      }
      if (record.bit_row / shape.rows != int64_t{record.head} * shape.heads / problem.heads_q) {
        return fail("the mask of a head", problem, record.bit_row, record.head);
      }
      if (item.has_queries != (queries > 0)) return fail("queries of a tile", problem, item.has_queries, queries);
    }
  }
  return 0;
}

// The order of a pair's stages: each once, those of an owner in order, and what is said of any place.
int check_pair_order() {
  constexpr int32_t kMost = 40, kMostBetween = 1;
  for (int32_t round = 0; round < 3 * kMost * kMost; ++round) {
    const PairOrder order{round % 3, {round / 3 % kMost, round / 3 / kMost}};
    std::vector<int32_t> owners(static_cast<size_t>(order.stages()), -1);
    bool good = order.stages() == order.both + order.alone[0] + order.alone[1];
    for (const int32_t owner : {kOfBoth, kOfFirst, kOfSecond}) {
      // A block's last stage before its own is the last that both attend to.
      int32_t last = owner == kOfBoth ? -1 : order.both - 1;
      for (int32_t stage = 0; stage < order.stages_of(owner); ++stage) {
        const int32_t place = order.place_of(owner, stage);
        good = good && place > last && place < order.stages() && owners[static_cast<size_t>(place)] == -1;
        good = good && (last < 0 || place - last <= kMostBetween + 1);
        if (!good) break;
        owners[static_cast<size_t>(place)] = owner;
        last = place;
      }
    }
    int32_t before[2] = {0, 0};
    for (int32_t place = 0; good && place < order.count_alone(); ++place) {
      const int32_t owner = owners[static_cast<size_t>(order.both + place)];
      good = order.owner_at(place) == owner && order.count_before(place, 0) == before[0] &&
             order.count_before(place, 1) == before[1];
      if (good) ++before[owner - kOfFirst];
    }
    if (!good) {
      std::printf("FAILED: the order of a pair's stages: %d of both, %d and %d alone\n", order.both, order.alone[0],
                  order.alone[1]);
      return 1;
    }
  }
  return 0;
}

// Which pairs have a tile: those that attend to much alike, whichever of the two blocks is called the first.
int check_paying_pairs(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const auto k_block_size = static_cast<int32_t>(choose<int64_t>({16 * draw(1, 16), 16 * (1 + draw_size(1 << 26))}));
    const int64_t cols = std::min(draw_size((1 << 26) - 1), ((int64_t{1} << 32) - 1) / k_block_size);
    const auto both = static_cast<int32_t>(draw(0, cols)), first = static_cast<int32_t>(draw(0, cols - both));
    const auto second = static_cast<int32_t>(draw(0, cols - both - first));
    const bool pays = pays_to_pair({both, {first, second}}, k_block_size);
    const int64_t keys = int64_t{both} * k_block_size;
    bool good = pays == pays_to_pair({both, {second, first}}, k_block_size);
    good = good && (!pays || (keys > kPairKeys && int64_t{both} >= int64_t{first} + second));
    good = good && pays_to_pair({both, {0, 0}}, k_block_size) == (keys > kPairKeys);
    // More alike never pays less.
    good =
        good && (!pays || first == 0 || second == 0 || pays_to_pair({both + 1, {first - 1, second - 1}}, k_block_size));
    if (!good) {
      std::printf("FAILED: whether a pair pays: %d of both, %d and %d alone, of %d keys\n", both, first, second,
                  k_block_size);
      return 1;
    }
  }
  return 0;
}

// The rule's answers about ranges, from what each query sees.
template <class Int>
bool check_rule(const ElementRule<Int>& rule, Int end, Int first_query, Int last_query, Int key) {
  const auto sees = [&](Int query, Int key) { return !rule.causal || key <= query + rule.diagonal; };
  Int visible = 0, clean = 0, last_seen = -1;
  for (Int k = 0; k < end; ++k) {
    bool any = false, all = true;
    for (Int query = first_query; query <= last_query; ++query) {
      any = any || sees(query, k);
      all = all && sees(query, k);
    }
    if (any) visible = k + 1;
    if (all && clean == k) clean = k + 1;
    if (sees(first_query, k)) last_seen = k;
  }
  bool all_up_to_key = true, first = true;
  for (Int query = first_query; query <= last_query; ++query) {
    for (Int k = 0; k <= key; ++k) all_up_to_key = all_up_to_key && sees(query, k);
    first = first && sees(query, key) == (query >= rule.first_query(key));
  }
  return std::max<Int>(rule.visible_end(last_query, end), 0) == visible &&
         std::max<Int>(rule.clean_end(first_query, end), 0) == clean &&
         std::max<Int>(rule.last_key(first_query, end), -1) == last_seen &&
         rule.is_clean(first_query, key) == all_up_to_key && first;
}

// What the tensors have sees the same by a diagonal and by the clamped one.
bool check_clamped(int32_t diagonal, int32_t rows_q, int32_t rows_k) {
  const ElementRule<int64_t> all{true, diagonal};
  const ElementRule<int32_t> clamped{true, clamp_diagonal(MaskShape{}, diagonal, rows_q, rows_k)};
  for (int32_t query = 0; query < rows_q; ++query) {
    const int64_t want = std::max<int64_t>(all.last_key(query, rows_k), -1);
    if (std::max<int64_t>(clamped.last_key(query, rows_k), -1) != want) return false;
  }
  return true;
}

// The same for causality and the rule of a head.
template <class Int>
bool check_window(const WindowRule<Int>& rule, Int end, Int first_query, Int last_query, Int begin, Int last) {
  const auto sees = [&](Int query, Int key) {
    const Int place = query + rule.order.diagonal;
    if (rule.order.causal && key > place) return false;
    return key < rule.head.sink || (key >= place - rule.head.left && key <= place + rule.head.right);
  };
  const Int clean_begin = rule.clean_begin(last_query), clean_end = rule.clean_end(first_query, end);
  Int visible = 0;
  bool between = true, clean = true;
  for (Int k = 0; k < end; ++k) {
    bool any = false, all = true;
    for (Int query = first_query; query <= last_query; ++query) {
      any = any || sees(query, k);
      all = all && sees(query, k);
      const bool by_limits = k < rule.head.sink ? k <= rule.last_sink_key(query, end)
                                                : k >= rule.first_key(query) && k <= rule.last_key(query, end);
      if (by_limits != sees(query, k)) return false;
    }
    if (any) visible = k + 1;
    if (k >= clean_begin && k < clean_end) between = between && all;
    if (k >= begin && k <= last) clean = clean && all;
  }
  // A pair of ranges may be called unclean though it is clean, but not the other way round.
  const bool says_clean = rule.is_clean(first_query, last_query, begin, last);
  const Int visible_end = std::max<Int>(rule.visible_end(last_query, end), 0);
  // Where the last window lies behind all keys, nobody looks which earlier ones do not.
  const bool is_visible = visible == visible_end || (visible < visible_end && rule.first_key(last_query) >= end);
  return is_visible && between && (clean || !says_clean);
}

// Tiles of query blocks whose heads have rules: blocks between the tail and the masked ones need no element masks.
int check_window_items(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    MaskShape shape;
    shape.batch = shape.heads = 1;
    shape.q_block_size = static_cast<int32_t>(draw(1, 40));
    shape.k_block_size = static_cast<int32_t>(draw(1, 40));
    shape.causal = draw(0, 1) == 0;
    shape.ruled = true;
    const auto q_len = static_cast<int32_t>(draw(1, 120)), k_len = static_cast<int32_t>(draw(1, 120));
    shape.rows = (q_len - 1) / shape.q_block_size + 1;
    shape.cols = (k_len - 1) / shape.k_block_size + 1;
    const Sequence sequence{0, q_len, 0, k_len, 0, 0, k_len - q_len};
    const auto reach = [] { return static_cast<int32_t>(draw(0, 3) == 0 ? -1 : draw(0, 90)); };
    const HeadRule given{reach(), reach(), static_cast<int32_t>(draw(0, 2) == 0 ? draw(0, 60) : 0), 0};
    const mask::ItemGrid grid{shape, &sequence, 1, 1, 64, (shape.q_block_size + 63) / 64, 1, false, &given};
    const WindowRule<int64_t> rule = rule_of(shape, sequence, read_rule(&given, 0));
    for (int64_t index = 0; index < shape.rows; ++index) {
      const mask::Item item = mask::make_item(grid, index);
      const int64_t first = index * shape.q_block_size;
      const int64_t last = std::min<int64_t>(first + shape.q_block_size, q_len) - 1;
      for (int64_t column = 0; column < shape.cols; ++column) {
        const int64_t begin = column * shape.k_block_size;
        const int64_t end = std::min<int64_t>(begin + shape.k_block_size, k_len);
        bool any = false, all = end == begin + shape.k_block_size;
        for (int64_t query = first; query <= last; ++query) {
          for (int64_t key = begin; key < end; ++key) {
            const bool sees = key < rule.head.sink ? key <= rule.last_sink_key(query, k_len)
                                                   : key >= rule.first_key(query) && key <= rule.last_key(query, k_len);
            any = any || sees;
            all = all && sees;
          }
        }
        const bool says_clean = column >= item.tail_end && column < item.clean_end;
        if ((any && column >= item.record.col_end) || (says_clean && !all)) {
          std::printf("FAILED: a tile by a rule: column %" PRId64 ", tail %d, clean %d, visible %d\n", column,
                      item.tail_end, item.clean_end, item.record.col_end);
          return 1;
        }
      }
    }
  }
  return 0;
}

int check_windows(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const auto reach = [] { return static_cast<int32_t>(draw(0, 3) == 0 ? draw(-2, -1) : draw(0, 30)); };
    const HeadRule given{reach(), reach(), static_cast<int32_t>(draw(-3, 12)), 0};
    const HeadRule head = read_rule(&given, 0);
    const int64_t diagonal = draw(-20, 20), end = draw(0, 20), first = draw(0, 20), last = draw(first, 25);
    const int64_t begin = draw(0, 20), last_key = draw(begin, 20);
    const bool causal = draw(0, 1) == 0;
    const WindowRule<int64_t> wide{{causal, diagonal}, head};
    const WindowRule<int32_t> narrow{{causal, static_cast<int32_t>(diagonal)}, head};
    if (!check_window(wide, end, first, last, begin, std::min(last_key, end - 1)) ||
        !check_window(narrow, static_cast<int32_t>(end), static_cast<int32_t>(first), static_cast<int32_t>(last),
                      static_cast<int32_t>(begin), static_cast<int32_t>(std::min(last_key, end - 1)))) {
      std::printf("FAILED: the rule of a head: causal %d diagonal %" PRId64 " end %" PRId64 " queries %" PRId64
                  " to %" PRId64 " keys %" PRId64 " to %" PRId64 " left %d right %d sink %d\n",
                  causal, diagonal, end, first, last, begin, last_key, given.left, given.right, given.sink);
      return 1;
    }
  }
  return 0;
}

int check_rules(int rounds) {
  for (int round = 0; round < rounds; ++round) {
    const bool causal = draw(0, 1) == 0;
    const int64_t diagonal = draw(-20, 20), end = draw(0, 20), first = draw(0, 20), last = draw(first, 25);
    const int64_t key = draw(0, 20);
    const ElementRule<int64_t> wide{causal, diagonal};
    const ElementRule<int32_t> narrow{causal, static_cast<int32_t>(diagonal)};
    if (!check_rule(wide, end, first, last, key) ||
        !check_rule(narrow, static_cast<int32_t>(end), static_cast<int32_t>(first), static_cast<int32_t>(last),
                    static_cast<int32_t>(key))) {
      std::printf("FAILED: the element rule: causal %d diagonal %" PRId64 " end %" PRId64 " queries %" PRId64
                  " to %" PRId64 " key %" PRId64 "\n",
                  causal, diagonal, end, first, last, key);
      return 1;
    }
    const auto any =
        static_cast<int32_t>(choose<int64_t>({draw(INT32_MIN, INT32_MAX), draw(-30, 30), INT32_MIN, INT32_MAX}));
    if (!check_clamped(any, static_cast<int32_t>(end), static_cast<int32_t>(key))) {
      std::printf("FAILED: the clamped diagonal %d\n", any);
      return 1;
    }
  }
  return 0;
}

}  // namespace

int main() {
  if (check_rules(100000) || check_windows(100000) || check_window_items(2000)) return 1;
  if (check_pair_order() || check_paying_pairs(100000)) return 1;
  if (check_lengths(400000) || check_key_places(20000, true) || check_key_places(20000, false)) return 1;
  if (check_query_sets(20000) || check_sm80(100000) || check_places_of_rows(20000)) return 1;
  return check_empty_tiles(1000);
}
