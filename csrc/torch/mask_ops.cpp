// The operators that make a mask and plan work on it.

#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/empty.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "torch/arguments.h"
#include "torch/plan_parts.h"

namespace hbsattn {
namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;

void check_mask(const MaskBlocks& blocks, int64_t batch, int64_t heads) {
  raise_if_error(validate_mask(make_shape(batch, heads, blocks)));
}

// Checks what a table of sequences is made from, and allocates it. The guard of the device is the caller's.
SequencesParams allocate_sequences(const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                   at::Device device, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                                   int64_t row_stride, int64_t q_block_size, int64_t k_block_size, Tensor& sequences) {
  TORCH_CHECK_VALUE(batch >= 0, describe("batch is ", batch, "; expected at least 0"));
  SequencesParams params;
  params.shape = make_shape(batch, 1, {0, {0, q_block_size, k_block_size, false, false}});
  params.seqlen_q = seqlen_q;
  params.seqlen_k = seqlen_k;
  params.row_stride = row_stride;
  const auto read = [&](const char* name, const OptionalTensor& cu_seqlens) -> const int32_t* {
    if (!cu_seqlens) return nullptr;
    check_table(name, *cu_seqlens, 1, device);
    check_shape(name, *cu_seqlens, {batch + 1});
    return cu_seqlens->const_data_ptr<int32_t>();
  };
  params.cu_seqlens_q = read("cu_seqlens_q", cu_seqlens_q);
  params.cu_seqlens_k = read("cu_seqlens_k", cu_seqlens_k);
  sequences = empty_ints({batch, kSequenceInts}, device);
  params.sequences = static_cast<Sequence*>(sequences.mutable_data_ptr());
  return params;
}

// On a CPU, too: without cu_seqlens there is no tensor to dispatch on.
Tensor make_sequences_op(const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, at::Device device,
                         int64_t batch, int64_t seqlen_q, int64_t seqlen_k, int64_t row_stride, int64_t q_block_size,
                         int64_t k_block_size) {
  TORCH_CHECK_VALUE(device.is_cpu() || device.is_cuda(), describe("device is ", device, "; expected cpu or cuda"));
  const Stream stream = device.is_cuda() ? current_stream(device) : nullptr;
  if (device.is_cuda() && !device.has_index()) device = c10::impl::VirtualGuardImpl(device.type()).getDevice();
  const c10::DeviceGuard guard(device);
  Tensor sequences;
  const SequencesParams params = allocate_sequences(cu_seqlens_q, cu_seqlens_k, device, batch, seqlen_q, seqlen_k,
                                                    row_stride, q_block_size, k_block_size, sequences);
  raise_if_error(device.is_cuda() ? make_sequences(params, stream) : make_sequences_on_host(params));
  return sequences;
}

// Packs by the operator, as the CPU's kernel is elsewhere.
TwoTensors make_dense(const MaskBlocks& blocks, const Tensor& block_mask, const OptionalTensor& cu_seqlens_q,
                      const OptionalTensor& cu_seqlens_k, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                      int64_t row_stride) {
  using Pack = Tensor(const Tensor&, const Tensor&, bool, c10::SymInt, c10::SymInt, int64_t, int64_t, bool);
  static const auto pack = c10::Dispatcher::singleton().findSchemaOrThrow("hbsattn::pack_dense", "").typed<Pack>();
  const auto [cols, q_block_size, k_block_size, causal, partial] = blocks.layout;
  const Tensor sequences = make_sequences_op(cu_seqlens_q, cu_seqlens_k, block_mask.device(), batch, seqlen_q, seqlen_k,
                                             row_stride, q_block_size, k_block_size);
  const bool flat = block_mask.dim() == 3;
  return {pack.call(block_mask, sequences, flat, blocks.rows, cols, q_block_size, k_block_size, causal), sequences};
}

#if HBSATTN_WITH_CUDA

// Allocates the bits of a mask and packs them.
Tensor pack(PackParams& params, const Tensor& sequences, at::Device device) {
  const c10::DeviceGuard guard(device);
  params.sequences = read_sequences(sequences, device);
  params.shape.batch = to_int32("batch", sequences.size(0));
  raise_if_error(validate_mask(params.shape));
  Tensor bits = empty_ints({params.shape.heads, params.shape.rows, params.shape.words()}, device);
  params.bits = static_cast<uint32_t*>(bits.mutable_data_ptr());
  raise_if_error(pack_mask(params, current_stream(device)));
  return bits;
}

// Whether the batch dimension of a batched source stands for every sequence.
bool check_batch(const char* name, const Tensor& source, const Tensor& sequences) {
  const int64_t batch = sequences.dim() == 2 ? sequences.size(0) : 0;
  TORCH_CHECK_VALUE(source.size(0) == 1 || source.size(0) == batch,
                    describe(name, " has a batch of ", source.size(0), "; expected 1 or ", batch));
  return source.size(0) == 1;
}

PackParams read_dense(const MaskBlocks& blocks, const Tensor& block_mask, const Tensor& sequences, bool flat) {
  check_dtype("block_mask", block_mask, at::kBool);
  check_dims("block_mask", block_mask, flat ? 3 : 4);
  PackParams params;
  params.shape = make_shape(0, block_mask.size(-3), blocks);
  PackSource& source = params.source;
  source.form = PackSource::Form::kDense;
  source.flat = flat;
  source.dense = static_cast<const uint8_t*>(block_mask.const_data_ptr());
  source.dense_rows = block_mask.size(-2);
  source.dense_cols = block_mask.size(-1);
  source.batch_stride = flat || check_batch("block_mask", block_mask, sequences) ? 0 : block_mask.stride(0);
  source.head_stride = block_mask.stride(-3);
  source.row_stride = block_mask.stride(-2);
  source.col_stride = block_mask.stride(-1);
  return params;
}

Tensor pack_dense(const MaskBlocks& blocks, const Tensor& block_mask, const Tensor& sequences, bool flat) {
  PackParams params = read_dense(blocks, block_mask, sequences, flat);
  return pack(params, sequences, block_mask.device());
}

// make_dense where one kernel can make both.
TwoTensors make_dense_cuda(const MaskBlocks& blocks, const Tensor& block_mask, const OptionalTensor& cu_seqlens_q,
                           const OptionalTensor& cu_seqlens_k, int64_t batch, int64_t seqlen_q, int64_t seqlen_k,
                           int64_t row_stride) {
  const at::Device device = block_mask.device();
  const c10::DeviceGuard guard(device);
  Tensor sequences;
  const SequencesParams table =
      allocate_sequences(cu_seqlens_q, cu_seqlens_k, device, batch, seqlen_q, seqlen_k, row_stride,
                         blocks.layout.q_block_size, blocks.layout.k_block_size, sequences);
  const bool flat = block_mask.dim() == 3;
  PackParams params = read_dense(blocks, block_mask, sequences, flat);
  params.table = table;
  const Tensor bits = pack(params, sequences, device);
  return {bits, sequences};
}

Tensor pack_indices(const MaskBlocks& blocks, const Tensor& counts, const Tensor& indices, const Tensor& sequences,
                    bool flat) {
  check_table("counts", counts, flat ? 2 : 3, counts.device());
  check_table("indices", indices, counts.dim() + 1, counts.device());
  const int64_t heads = counts.size(-2), q_blocks = counts.size(-1);
  PackParams params;
  params.shape = make_shape(0, heads, blocks);
  PackSource& source = params.source;
  source.form = PackSource::Form::kIndices;
  source.flat = flat;
  source.counts = counts.const_data_ptr<int32_t>();
  source.indices = indices.const_data_ptr<int32_t>();
  source.width = indices.size(-1);
  source.batch_stride = flat || check_batch("counts", counts, sequences) ? 0 : heads * q_blocks;
  const int64_t all_rows = flat || sequences.dim() != 2 ? q_blocks : sequences.size(0) * q_blocks;
  TORCH_CHECK_VALUE(blocks.rows == all_rows,
                    describe("rows is ", blocks.rows, "; expected ", all_rows, ", the query blocks of counts"));
  std::vector<int64_t> shape = counts.sizes().vec();
  shape.push_back(source.width);
  check_shape("indices", indices, shape);
  return pack(params, sequences, counts.device());
}

Tensor pack_csr(const MaskBlocks& blocks, const Tensor& indptr, const Tensor& indices, const Tensor& sequences) {
  check_table("indptr", indptr, 2, indptr.device());
  check_table("indices", indices, 1, indptr.device());
  check_shape("indptr", indptr, {indptr.size(0), blocks.rows + 1});
  PackParams params;
  params.shape = make_shape(0, indptr.size(0), blocks);
  PackSource& source = params.source;
  source.form = PackSource::Form::kCsr;
  source.flat = true;
  source.indptr = indptr.const_data_ptr<int32_t>();
  source.indices = indices.const_data_ptr<int32_t>();
  source.nnz = indices.size(0);
  return pack(params, sequences, indptr.device());
}

PlanParams make_plan(const MaskView& mask, const CallShape& heads, bool for_backward) {
  PlanParams params;
  params.mask = mask;
  params.heads_q = heads.heads_q;
  params.heads_k = heads.heads_k;
  params.head_dim = heads.head_dim;
  params.element_size = heads.element_size;
  params.pack_heads = heads.pack_heads;
  params.for_backward = for_backward;
  raise_if_error(validate_plan(params));
  return params;
}

Tensor plan_items_op(const Tensor& bits, const Tensor& sequences, const OptionalTensor& rules, at::IntArrayRef layout,
                     at::IntArrayRef heads, bool for_backward) {
  const at::Device device = bits.device();
  const c10::DeviceGuard guard(device);
  const MaskView mask = read_mask(bits, sequences, rules, read_layout(layout), device);
  return make_items(make_plan(mask, read_call_shape(heads), for_backward), device);
}

// A backward call, as far as its work lists depend on it.
BackwardParams make_problem(const PlanParams& plan, bool deterministic, const std::array<bool, 3>& needs,
                            bool altered) {
  BackwardParams params;
  params.problem.mask = plan.mask;
  params.problem.heads_q = plan.heads_q;
  params.problem.heads_k = plan.heads_k;
  params.problem.head_dim = plan.head_dim;
  params.problem.pack_heads = plan.pack_heads;
  if (plan.element_size == element_size_of(DType::kFloat32)) params.problem.dtype = DType::kFloat32;
  params.problem.softcap = altered ? 1.f : 0.f;  // which stands for whatever alters weights
  params.deterministic = deterministic;
  params.needs_q = needs[0];
  params.needs_k = needs[1];
  params.needs_v = needs[2];
  return params;
}

Tensor plan_backward_op(const Tensor& bits, const Tensor& sequences, const OptionalTensor& rules,
                        at::IntArrayRef layout, at::IntArrayRef heads, int64_t rows_k, bool packed, bool deterministic,
                        std::array<bool, 3> needs, bool altered) {
  const at::Device device = bits.device();
  const c10::DeviceGuard guard(device);
  const CallShape call = read_call_shape(heads);
  PlanParams items = make_plan(read_mask(bits, sequences, rules, read_layout(layout), device), call, true);
  const MaskShape& shape = items.mask.shape;
  KeyPlanParams keys;
  keys.mask = items.mask;
  keys.heads_q = call.heads_q;
  keys.heads_k = call.heads_k;
  keys.head_dim = call.head_dim;
  keys.element_size = call.element_size;
  keys.deterministic = deterministic;
  keys.rows_k = rows_k;
  keys.packed = packed;
  raise_if_error(validate_key_plan(keys));

  const PlanParts parts(shape, call.heads_q, call.heads_k, call.pack_heads, rows_k, packed);
  Tensor plan = empty_ints({parts.ints}, device);
  int32_t* ints = plan.mutable_data_ptr<int32_t>();
  const BackwardLists lists = backward_lists(make_problem(items, deterministic, needs, altered));
  const Stream stream = current_stream(device);
  if (lists.keys) {
    TransposeParams transpose;
    transpose.mask = items.mask;
    transpose.columns = reinterpret_cast<uint32_t*>(ints + parts.columns);
    raise_if_error(transpose_mask(transpose, stream));
    keys.columns = transpose.columns;
    keys.items = reinterpret_cast<KeyItem*>(ints + parts.key_items);
    keys.num_items = parts.num_key_items;
    const c10::DataPtr scratch = allocate_scratch(key_plan_scratch_size(keys.num_items));
    keys.scratch = scratch.get();
    raise_if_error(plan_keys(keys, stream));
  }
  if (lists.items) {
    items.items = reinterpret_cast<WorkItem*>(ints + parts.items);
    items.num_items = parts.num_items;
    const c10::DataPtr scratch = allocate_scratch(plan_scratch_size(items.num_items));
    items.scratch = scratch.get();
    raise_if_error(plan_items(items, stream));
  }
  return plan;
}

#endif

}  // namespace

#if HBSATTN_WITH_CUDA
Tensor make_items(PlanParams plan, at::Device device) {
  plan.num_items = item_capacity(plan.mask.shape, plan.heads_q, plan.heads_k, plan.pack_heads);
  Tensor items = empty_ints({plan.num_items, kItemInts}, device);
  const c10::DataPtr scratch = allocate_scratch(plan_scratch_size(plan.num_items));
  plan.items = static_cast<WorkItem*>(items.mutable_data_ptr());
  plan.scratch = scratch.get();
  raise_if_error(plan_items(plan, current_stream(device)));
  return items;
}
#endif

// No derivatives: all results are integers. Without this, PyTorch's fallback would box each call's arguments to look.
TORCH_LIBRARY_IMPL(hbsattn, Autograd, m) {
  for (const char* name :
       {"make_sequences", "make_dense", "pack_dense", "pack_indices", "pack_csr", "plan_items", "plan_backward"}) {
    m.impl(name, torch::CppFunction::makeFallthrough());
  }
}

TORCH_LIBRARY_IMPL(hbsattn, CompositeExplicitAutograd, m) {
  m.impl("make_sequences", make_sequences_op);
  m.impl("make_dense", Operator<make_dense>::run);
  m.impl("check_mask", Operator<check_mask>::run);
}

TORCH_LIBRARY_IMPL(hbsattn, CUDA, m) {
#if HBSATTN_WITH_CUDA
  m.impl("make_dense", Operator<make_dense_cuda>::run);
  m.impl("pack_dense", Operator<pack_dense>::run);
  m.impl("pack_indices", Operator<pack_indices>::run);
  m.impl("pack_csr", Operator<pack_csr>::run);
  m.impl("plan_items", plan_items_op);
  m.impl("plan_backward", plan_backward_op);
#else
  for (const char* name : {"pack_dense", "pack_indices", "pack_csr", "plan_items", "plan_backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_operator>());
  }
#endif
}

}  // namespace hbsattn
