#include "core/validate.h"

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <string>

#include "hbsattn/hbsattn.h"
#include "plan/head_sets.h"
#include "plan/lists.h"
#include "plan/rows.h"
#include "plan/tiles.h"

namespace hbsattn {
namespace {

constexpr int64_t kInt32Limit = int64_t{1} << 31;
constexpr int64_t kBlockLimit = int64_t{1} << 30;  // of block sizes and columns: their sums fit int32
constexpr int64_t kItemsLimit = int64_t{1} << 30;  // tickets count on past the last item
constexpr int64_t kColumnsLimit = int64_t{1} << 26;
constexpr int64_t kVirtualRowsLimit = kInt32Limit - 256;  // tiles, of at most 192 rows, reach past a block's last row
constexpr int kMaxHeadDim = 256;

Status wrong_text(const char* name, const std::string& value, const std::string& expected) {
  return Status::InvalidValue(std::string(name) + " is " + value + "; expected " + expected);
}

template <class T>
Status wrong_value(const char* name, T value, const std::string& expected) {
  return wrong_text(name, std::to_string(value), expected);
}

// std::to_string would show a tiny value as 0.
Status wrong_value(const char* name, float value, const std::string& expected) {
  char text[32];
  std::snprintf(text, sizeof text, "%g", static_cast<double>(value));
  return wrong_text(name, text, expected);
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Status check_range(const char* name, int64_t value, int64_t low, int64_t limit) {
  if (value >= low && value < limit) return Status::Ok();
  return wrong_value(name, value, "at least " + std::to_string(low) + " and less than " + std::to_string(limit));
}

Status check_pointer(const char* name, const void* pointer, int64_t elements) {
  if (pointer != nullptr || elements == 0) return Status::Ok();
  return Status::InvalidValue(std::string(name) + " is null; expected a pointer to " + std::to_string(elements) +
                              " elements");
}

Status check_rules(const MaskView& mask) {
  if (!mask.shape.ruled && mask.rules != nullptr) {
    return Status::InvalidValue("rules is a pointer; expected null, as shape.ruled is false");
  }
  if (reinterpret_cast<uintptr_t>(mask.rules) % alignof(HeadRule) != 0) {
    return Status::InvalidValue("rules is at an address that is no multiple of " + std::to_string(alignof(HeadRule)) +
                                "; expected one, as rows are read whole");
  }
  return check_pointer("rules", mask.rules, mask.shape.ruled ? mask.shape.heads : 0);
}

// What a mask has of partial blocks, for a call that reads them.
Status check_partial(const MaskView& mask) {
  if (!mask.shape.partial) {
    if (mask.partial == nullptr && mask.matrices == nullptr && mask.elements == nullptr) return Status::Ok();
    return Status::InvalidValue("partial, matrices or elements is a pointer; expected null, as shape.partial is false");
  }
  HBSATTN_RETURN_IF_ERROR(check_range("num_partial", mask.num_partial, 0, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("num_matrices", mask.num_matrices, 0, kInt32Limit));
  if (reinterpret_cast<uintptr_t>(mask.partial) % alignof(PartialWord) != 0) {
    return Status::InvalidValue("partial is at an address that is no multiple of " +
                                std::to_string(alignof(PartialWord)) + "; expected one, as words are read whole");
  }
  const int64_t words = mask.shape.heads * mask.shape.rows * mask.shape.words();
  HBSATTN_RETURN_IF_ERROR(check_pointer("partial", mask.partial, words));
  HBSATTN_RETURN_IF_ERROR(check_pointer("matrices", mask.matrices, mask.num_partial));
  return check_pointer("elements", mask.elements, mask.num_matrices * mask.shape.q_block_size * mask.shape.granules());
}

Status check_heads(const MaskShape& shape, int32_t heads_q, int32_t heads_k) {
  HBSATTN_RETURN_IF_ERROR(check_range("heads_q", heads_q, 1, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("heads_k", heads_k, 1, kInt32Limit));
  if (heads_q % heads_k != 0) {
    return wrong_value("heads_q", heads_q, "a multiple of heads_k, " + std::to_string(heads_k));
  }
  if (shape.heads != 1 && shape.heads != heads_k && shape.heads != heads_q) {
    return wrong_value("the mask's number of heads", shape.heads,
                       "1, heads_k = " + std::to_string(heads_k) + " or heads_q = " + std::to_string(heads_q));
  }
  return check_range("heads_q * q_block_size", int64_t{heads_q} * shape.q_block_size, 1, kVirtualRowsLimit);
}

// Of the work list; heads are valid.
Status check_num_items(int64_t items) { return check_range("the number of tiles", items, 0, kItemsLimit); }

// The length of a list that must hold `needed` records; more are dead. `made_for`: what decides that.
Status check_room(const char* name, int64_t room, int64_t needed, const std::string& made_for) {
  if (room < needed) return wrong_value(name, room, "at least " + std::to_string(needed) + ", " + made_for);
  return check_range(name, room, 0, kItemsLimit);
}

Status check_dropout(const ForwardParams& problem) {
  return check_pointer("dropout_seed", problem.dropout_seed, problem.dropout_p > 0. ? 2 : 0);
}

// Items that a call has.
int64_t count_items(const ForwardParams& problem, bool for_backward) {
  return num_items(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim, problem.pack_heads,
                   for_backward, element_size_of(problem.dtype));
}
int64_t count_items(const PlanParams& plan) {
  return num_items(plan.mask.shape, plan.heads_q, plan.heads_k, plan.head_dim, plan.pack_heads, plan.for_backward,
                   plan.element_size);
}

// Of the work list of the backward pass; heads are valid.
Status check_num_key_items(const KeyPlanParams& params) {
  HBSATTN_RETURN_IF_ERROR(check_range("the number of key tiles", num_key_items(params), 0, kItemsLimit));
  return check_range("the mask's number of query block rows over the query heads of a key head",
                     params.heads_q / params.heads_k * params.mask.shape.rows, 0, kInt32Limit);
}

// Whether a mask of this shape can belong to packed tensors. Its rows are those of each sequence without gaps, or as
// many for every sequence.
Status check_packed_sizes(const ForwardParams& params) {
  const MaskShape& shape = params.mask.shape;
  const int64_t at_least = ceil_div(params.rows_q, shape.q_block_size);
  const int64_t at_most = params.rows_q / shape.q_block_size + shape.batch;
  const bool padded = shape.batch > 0 && shape.rows % shape.batch == 0;
  if (shape.batch == 0 && params.rows_q > 0) {
    return wrong_value("the number of rows of q", params.rows_q, "0, as the mask has no sequences");
  }
  if (shape.rows < at_least || (shape.rows > at_most && !padded)) {
    return wrong_value("the mask's number of query block rows", shape.rows,
                       std::to_string(at_least) + " to " + std::to_string(at_most) +
                           " (or a multiple of the batch) for q with " + std::to_string(params.rows_q) +
                           " packed rows in " + std::to_string(shape.batch) + " sequences, cut into blocks of " +
                           std::to_string(shape.q_block_size));
  }
  const int64_t keys = shape.cols * shape.k_block_size;
  if (keys == 0 ? params.rows_k > 0 : ceil_div(params.rows_k, keys) > shape.batch) {
    return wrong_value("the mask's number of key block columns", shape.cols,
                       "enough for k with " + std::to_string(params.rows_k) + " packed rows in " +
                           std::to_string(shape.batch) + " sequences, cut into blocks of " +
                           std::to_string(shape.k_block_size));
  }
  return Status::Ok();
}

Status check_batched_sizes(const ForwardParams& params) {
  const MaskShape& shape = params.mask.shape;
  const int64_t rows = shape.batch * ceil_div(params.rows_q, shape.q_block_size);
  if (shape.rows != rows) {
    return wrong_value("the mask's number of query block rows", shape.rows,
                       std::to_string(rows) + ", " + std::to_string(shape.batch) + " sequences of " +
                           std::to_string(params.rows_q) + " queries in blocks of " +
                           std::to_string(shape.q_block_size));
  }
  const int64_t cols = ceil_div(params.rows_k, shape.k_block_size);
  if (shape.cols != cols) {
    return wrong_value("the mask's number of key block columns", shape.cols,
                       std::to_string(cols) + ", " + std::to_string(params.rows_k) + " keys in blocks of " +
                           std::to_string(shape.k_block_size));
  }
  return Status::Ok();
}

int64_t count_query_rows(const ForwardParams& params) {
  return (params.packed ? 1 : params.mask.shape.batch) * params.rows_q * params.heads_q;
}

int64_t count_key_rows(const ForwardParams& params) {
  return (params.packed ? 1 : params.mask.shape.batch) * params.rows_k * params.heads_k;
}

// A tensor of `rows` rows over all heads that has as many columns as another.
Status check_tensor(const char* name, const ForwardParams& params, const TensorView& tensor, int64_t rows,
                    const char* like_name, const TensorView& like) {
  const int32_t columns = view_of(params, tensor).columns, expected = view_of(params, like).columns;
  if (columns != expected) {
    return wrong_value((std::string(name) + ".columns").c_str(), columns,
                       std::to_string(expected) + ", those of " + like_name);
  }
  return check_pointer(name, tensor.data, rows * columns);
}

// What forward reads and writes, and backward reads.
Status check_tensors(const ForwardParams& params) {
  const int64_t queries = count_query_rows(params), keys = count_key_rows(params);
  HBSATTN_RETURN_IF_ERROR(check_tensor("q", params, params.q, queries, "q", params.q));
  HBSATTN_RETURN_IF_ERROR(check_tensor("k", params, params.k, keys, "q", params.q));
  HBSATTN_RETURN_IF_ERROR(check_tensor("v", params, params.v, keys, "v", params.v));
  HBSATTN_RETURN_IF_ERROR(check_tensor("out", params, params.out, queries, "v", params.v));
  return check_pointer("lse", params.lse, queries);
}

}  // namespace

Status validate_mask(const MaskShape& shape) {
  HBSATTN_RETURN_IF_ERROR(check_range("batch", shape.batch, 0, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("q_block_size", shape.q_block_size, 1, kBlockLimit));
  HBSATTN_RETURN_IF_ERROR(check_range("k_block_size", shape.k_block_size, 1, kBlockLimit));
  HBSATTN_RETURN_IF_ERROR(check_range("the mask's number of heads", shape.heads, 1, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("the mask's number of query block rows", shape.rows, 0, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("the mask's number of key block columns", shape.cols, 0, kColumnsLimit));
  HBSATTN_RETURN_IF_ERROR(
      check_range("the keys that the mask's columns span", shape.cols * shape.k_block_size, 0, 2 * kInt32Limit));
  return check_range("the mask's number of rows over all heads", shape.heads * shape.rows, 0, kInt32Limit);
}

KeyPlanParams key_plan_of(const BackwardParams& params) {
  const ForwardParams& problem = params.problem;
  KeyPlanParams plan;
  plan.mask = problem.mask;
  plan.heads_q = problem.heads_q;
  plan.heads_k = problem.heads_k;
  plan.head_dim = problem.head_dim;
  plan.element_size = element_size_of(problem.dtype);
  plan.deterministic = params.deterministic;
  plan.packed = problem.packed;
  plan.rows_k = problem.rows_k;
  return plan;
}

Status validate_sequences(const SequencesParams& params) {
  const MaskShape& shape = params.shape;
  HBSATTN_RETURN_IF_ERROR(check_range("batch", shape.batch, 0, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("q_block_size", shape.q_block_size, 1, kBlockLimit));
  HBSATTN_RETURN_IF_ERROR(check_range("k_block_size", shape.k_block_size, 1, kBlockLimit));
  HBSATTN_RETURN_IF_ERROR(check_range("seqlen_q", params.seqlen_q, 0, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("seqlen_k", params.seqlen_k, 0, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("row_stride", params.row_stride, -1, kInt32Limit));
  if ((params.cu_seqlens_q == nullptr) != (params.cu_seqlens_k == nullptr)) {
    return Status::InvalidValue(std::string("cu_seqlens_") + (params.cu_seqlens_q == nullptr ? "q" : "k") +
                                " is null and the other is not; expected both or neither");
  }
  return check_pointer("sequences", params.sequences, shape.batch);
}

// The table that is made is the one that is read, and fits the mask.
Status check_same_table(const PackParams& params) {
  const MaskShape& shape = params.shape;
  const MaskShape& table = params.table.shape;
  HBSATTN_RETURN_IF_ERROR(validate_sequences(params.table));
  if (params.table.sequences != params.sequences) {
    return Status::InvalidValue("table.sequences is not sequences; expected null or the same pointer");
  }
  if (table.batch != shape.batch) return wrong_value("table.shape.batch", table.batch, std::to_string(shape.batch));
  if (table.q_block_size != shape.q_block_size) {
    return wrong_value("table.shape.q_block_size", table.q_block_size, std::to_string(shape.q_block_size));
  }
  if (table.k_block_size != shape.k_block_size) {
    return wrong_value("table.shape.k_block_size", table.k_block_size, std::to_string(shape.k_block_size));
  }
  return Status::Ok();
}

Status validate_pack(const PackParams& params) {
  const MaskShape& shape = params.shape;
  const PackSource& source = params.source;
  HBSATTN_RETURN_IF_ERROR(validate_mask(shape));
  HBSATTN_RETURN_IF_ERROR(check_pointer("sequences", params.sequences, shape.batch));
  if (params.table.sequences != nullptr) HBSATTN_RETURN_IF_ERROR(check_same_table(params));
  HBSATTN_RETURN_IF_ERROR(check_pointer("bits", params.bits, shape.heads * shape.rows * shape.words()));
  if (!source.flat && source.form != PackSource::Form::kCsr && shape.rows > 0 &&
      (shape.batch == 0 || shape.rows % shape.batch != 0)) {
    return wrong_value("the mask's number of query block rows", shape.rows,
                       "a multiple of the batch, " + std::to_string(shape.batch));
  }
  switch (source.form) {
    case PackSource::Form::kDense: {
      const int64_t rows = source.flat || shape.batch == 0 ? shape.rows : shape.rows / shape.batch;
      if (source.dense_rows != rows && shape.rows > 0) {
        return wrong_value("block_mask's number of rows", source.dense_rows, std::to_string(rows));
      }
      if (!source.flat && source.dense_cols < shape.cols) {
        return wrong_value("block_mask's number of columns", source.dense_cols,
                           "at least " + std::to_string(shape.cols));
      }
      return check_pointer("block_mask", source.dense, shape.rows * source.dense_cols);
    }
    case PackSource::Form::kIndices:
      HBSATTN_RETURN_IF_ERROR(check_range("the width of indices", source.width, 0, kInt32Limit));
      HBSATTN_RETURN_IF_ERROR(check_pointer("counts", source.counts, shape.heads * shape.rows));
      return check_pointer("indices", source.indices, shape.heads * shape.rows * source.width);
    case PackSource::Form::kCsr:
      HBSATTN_RETURN_IF_ERROR(check_range("the number of indices", source.nnz, 0, kInt32Limit));
      HBSATTN_RETURN_IF_ERROR(check_pointer("indptr", source.indptr, shape.heads * (shape.rows + 1)));
      return check_pointer("indices", source.indices, source.nnz);
  }
  return wrong_value("source.form", static_cast<int>(source.form), "kDense, kIndices or kCsr");
}

Status validate_plan(const PlanParams& params) {
  const MaskShape& shape = params.mask.shape;
  HBSATTN_RETURN_IF_ERROR(validate_mask(shape));
  HBSATTN_RETURN_IF_ERROR(check_heads(shape, params.heads_q, params.heads_k));
  HBSATTN_RETURN_IF_ERROR(check_range("head_dim", params.head_dim, 1, kMaxHeadDim + 1));
  HBSATTN_RETURN_IF_ERROR(check_range("element_size", params.element_size, 1, 9));
  return check_num_items(count_items(params));
}

Status check_pointers(const PlanParams& params) {
  const MaskShape& shape = params.mask.shape;
  const int64_t items = count_items(params);
  HBSATTN_RETURN_IF_ERROR(check_rules(params.mask));
  HBSATTN_RETURN_IF_ERROR(check_pointer("bits", params.mask.bits, shape.heads * shape.rows * shape.words()));
  HBSATTN_RETURN_IF_ERROR(check_pointer("sequences", params.mask.sequences, shape.batch));
  HBSATTN_RETURN_IF_ERROR(check_pointer("scratch", params.scratch, items));
  HBSATTN_RETURN_IF_ERROR(check_room("num_items", params.num_items, items, "as num_items() says"));
  return check_pointer("items", params.items, params.num_items);
}

Status validate_transpose(const TransposeParams& params) {
  const MaskShape& shape = params.mask.shape;
  HBSATTN_RETURN_IF_ERROR(validate_mask(shape));
  HBSATTN_RETURN_IF_ERROR(check_pointer("bits", params.mask.bits, shape.heads * shape.rows * shape.words()));
  return check_pointer("columns", params.columns, shape.heads * shape.cols * shape.row_words());
}

Status validate_key_plan(const KeyPlanParams& params) {
  const MaskShape& shape = params.mask.shape;
  HBSATTN_RETURN_IF_ERROR(validate_mask(shape));
  HBSATTN_RETURN_IF_ERROR(check_heads(shape, params.heads_q, params.heads_k));
  HBSATTN_RETURN_IF_ERROR(check_range("head_dim", params.head_dim, 1, kMaxHeadDim + 1));
  HBSATTN_RETURN_IF_ERROR(check_range("element_size", params.element_size, 1, 9));
  HBSATTN_RETURN_IF_ERROR(check_range("rows_k", params.rows_k, 0, kInt32Limit));
  return check_num_key_items(params);
}

Status check_pointers(const KeyPlanParams& params) {
  const MaskShape& shape = params.mask.shape;
  const int64_t items = num_key_items(params);
  HBSATTN_RETURN_IF_ERROR(check_pointer("columns", params.columns, shape.heads * shape.cols * shape.row_words()));
  HBSATTN_RETURN_IF_ERROR(check_pointer("sequences", params.mask.sequences, shape.batch));
  HBSATTN_RETURN_IF_ERROR(check_pointer("scratch", params.scratch, items));
  HBSATTN_RETURN_IF_ERROR(check_room("num_items", params.num_items, items, "as num_key_items() says"));
  return check_pointer("items", params.items, params.num_items);
}

Status validate_problem(const ForwardParams& params) {
  const MaskShape& shape = params.mask.shape;
  HBSATTN_RETURN_IF_ERROR(validate_mask(shape));
  HBSATTN_RETURN_IF_ERROR(check_heads(shape, params.heads_q, params.heads_k));
  const int32_t columns = view_of(params, params.q).columns, value_columns = view_of(params, params.v).columns;
  const char* whose = columns < params.head_dim ? "the head dim of v" : "head_dim";
  HBSATTN_RETURN_IF_ERROR(check_range(whose, params.head_dim, 1, kMaxHeadDim + 1));
  HBSATTN_RETURN_IF_ERROR(check_range("q.columns", columns, 1, params.head_dim + 1));
  HBSATTN_RETURN_IF_ERROR(check_range("v.columns", value_columns, 1, params.head_dim + 1));
  if (columns < params.head_dim && value_columns < params.head_dim) {
    return wrong_value(
        "head_dim", params.head_dim,
        "the greater of q.columns = " + std::to_string(columns) + " and v.columns = " + std::to_string(value_columns));
  }
  HBSATTN_RETURN_IF_ERROR(check_range("the number of rows of q", params.rows_q, 0, kInt32Limit));
  HBSATTN_RETURN_IF_ERROR(check_range("the number of rows of k", params.rows_k, 0, kInt32Limit));
  if (!std::isfinite(params.softmax_scale) || params.softmax_scale <= 0.f) {
    return wrong_value("softmax_scale", params.softmax_scale, "a finite number above 0");
  }
  if (!(params.dropout_p >= 0. && params.dropout_p < 1.)) {
    return wrong_value("dropout_p", static_cast<float>(params.dropout_p), "a number from 0 to below 1");
  }
  if (params.softcap != 0.f && !(params.softcap >= kLeastSoftcap && params.softcap <= kMostSoftcap)) {
    return wrong_value("softcap", params.softcap, "0, or a number from 0.01 to 1e6");
  }
  // What coefficients of ScoreCap hold.
  constexpr double kLeastRatio = 3e-8, kMostRatio = 1e7;
  const double ratio = double{params.softmax_scale} / double{params.softcap};
  if (params.softcap > 0.f && !(ratio >= kLeastRatio && ratio <= kMostRatio)) {
    return wrong_value("softmax_scale / softcap", static_cast<float>(ratio), "a number from 3e-8 to 1e7");
  }
  HBSATTN_RETURN_IF_ERROR(params.packed ? check_packed_sizes(params) : check_batched_sizes(params));
  return Status::Ok();
}

// The work list of query tiles. `for_backward`: how it was made.
Status validate_items(const ForwardParams& params, bool for_backward) {
  if (params.items == nullptr) {
    // What has no list may be a call on a CPU, which asks for no device.
    return check_num_items(count_query_items(params.mask.shape, params.heads_q, params.heads_k, params.head_dim,
                                             params.pack_heads, for_backward));
  }
  const int64_t items = count_items(params, for_backward);
  HBSATTN_RETURN_IF_ERROR(check_num_items(items));
  return check_room("the number of work items", params.num_items, items,
                    "as plan_items makes for this mask, heads_q = " + std::to_string(params.heads_q) +
                        " and heads_k = " + std::to_string(params.heads_k) + (for_backward ? ", for a backward" : ""));
}

Status validate_forward(const ForwardParams& params) {
  HBSATTN_RETURN_IF_ERROR(validate_problem(params));
  return validate_items(params, alters_weights(params));
}

Status check_pointers(const ForwardParams& params) {
  const MaskShape& shape = params.mask.shape;
  HBSATTN_RETURN_IF_ERROR(check_tensors(params));
  HBSATTN_RETURN_IF_ERROR(check_pointer("bits", params.mask.bits, shape.heads * shape.rows * shape.words()));
  HBSATTN_RETURN_IF_ERROR(check_rules(params.mask));
  HBSATTN_RETURN_IF_ERROR(check_partial(params.mask));
  HBSATTN_RETURN_IF_ERROR(check_dropout(params));
  HBSATTN_RETURN_IF_ERROR(check_pointer("items", params.items, params.num_items));
  return check_pointer("workspace", params.workspace, static_cast<int64_t>(forward_workspace_size()));
}

Status validate_backward(const BackwardParams& params) {
  const ForwardParams& problem = params.problem;
  HBSATTN_RETURN_IF_ERROR(validate_problem(problem));
  if (params.grad_sinks != nullptr && problem.sinks == nullptr) {
    return Status::InvalidValue("grad_sinks is given and sinks is null; expected sinks, too");
  }
  const BackwardLists lists = backward_lists(params);
  if (lists.items) HBSATTN_RETURN_IF_ERROR(validate_items(problem, true));
  if (!lists.keys) return Status::Ok();
  const KeyPlanParams plan = key_plan_of(params);
  const int64_t items = num_key_items(plan);
  HBSATTN_RETURN_IF_ERROR(check_num_key_items(plan));
  if (params.key_items == nullptr) return Status::Ok();
  return check_room(
      "the number of key work items", params.num_key_items, items,
      "as plan_keys makes for this mask, " + std::to_string(problem.rows_k) +
          " keys, heads_q = " + std::to_string(problem.heads_q) + ", heads_k = " + std::to_string(problem.heads_k) +
          ", head_dim = " + std::to_string(problem.head_dim) + (params.deterministic ? " and deterministic" : ""));
}

Status check_pointers(const BackwardParams& params) {
  constexpr uintptr_t kAlignment = 128;
  const ForwardParams& problem = params.problem;
  const MaskShape& shape = problem.mask.shape;
  const int64_t queries = count_query_rows(problem), keys = count_key_rows(problem);
  HBSATTN_RETURN_IF_ERROR(check_tensors(problem));
  const auto check = [&](const char* name, const TensorView& tensor, int64_t rows, const char* like_name,
                         const TensorView& like) { return check_tensor(name, problem, tensor, rows, like_name, like); };
  HBSATTN_RETURN_IF_ERROR(check("grad_out", params.grad_out, queries, "v", problem.v));
  if (params.needs_q) HBSATTN_RETURN_IF_ERROR(check("grad_q", params.grad_q, queries, "q", problem.q));
  if (params.needs_k) HBSATTN_RETURN_IF_ERROR(check("grad_k", params.grad_k, keys, "q", problem.q));
  if (params.needs_v) HBSATTN_RETURN_IF_ERROR(check("grad_v", params.grad_v, keys, "v", problem.v));
  HBSATTN_RETURN_IF_ERROR(check_pointer("sequences", problem.mask.sequences, shape.batch));
  HBSATTN_RETURN_IF_ERROR(check_rules(problem.mask));
  HBSATTN_RETURN_IF_ERROR(check_partial(problem.mask));
  HBSATTN_RETURN_IF_ERROR(check_dropout(problem));
  const BackwardLists lists = backward_lists(params);
  if (lists.keys) {
    HBSATTN_RETURN_IF_ERROR(check_pointer("columns", params.columns, shape.heads * shape.cols * shape.row_words()));
    HBSATTN_RETURN_IF_ERROR(check_pointer("key_items", params.key_items, num_key_items(key_plan_of(params))));
  }
  if (lists.items) {
    HBSATTN_RETURN_IF_ERROR(check_pointer("bits", problem.mask.bits, shape.heads * shape.rows * shape.words()));
    HBSATTN_RETURN_IF_ERROR(check_pointer("items", problem.items, count_items(problem, true)));
  }
  HBSATTN_RETURN_IF_ERROR(
      check_pointer("workspace", params.workspace, static_cast<int64_t>(backward_workspace_size(params))));
  const auto misaligned = reinterpret_cast<uintptr_t>(params.workspace) % kAlignment;
  if (misaligned == 0) return Status::Ok();
  return Status::InvalidValue("workspace lies " + std::to_string(misaligned) + " bytes past a multiple of " +
                              std::to_string(kAlignment) + "; expected a multiple");
}

}  // namespace hbsattn
