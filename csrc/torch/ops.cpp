// The operators: schemas, and the way from tensors to the plain parameters of the core. The CPU implementations of most
// operators and the fake kernels are in Python (hbsattn/_cpu.py, hbsattn/_ops.py).

#include <ATen/core/Tensor.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <optional>
#include <tuple>
#include <vector>

#include "hbsattn/hbsattn.h"
#include "torch/checks.h"

#if HBSATTN_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace hbsattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

constexpr int64_t kSequenceInts = sizeof(Sequence) / sizeof(int32_t);
constexpr int64_t kItemInts = sizeof(WorkItem) / sizeof(int32_t);
constexpr int64_t kKeyItemInts = sizeof(KeyItem) / sizeof(int32_t);

Tensor empty_ints(at::IntArrayRef shape, at::Device device) {
  return at::empty(shape, at::TensorOptions(at::kInt).device(device));
}

MaskShape make_shape(int64_t batch, int64_t heads, int64_t rows, int64_t cols, int64_t q_block_size,
                     int64_t k_block_size, bool causal) {
  MaskShape shape;
  shape.batch = to_int32("batch", batch);
  shape.heads = to_int32("the mask's number of heads", heads);
  shape.rows = rows;
  shape.cols = cols;
  shape.q_block_size = to_int32("q_block_size", q_block_size);
  shape.k_block_size = to_int32("k_block_size", k_block_size);
  shape.causal = causal;
  return shape;
}

const Sequence* read_sequences(const Tensor& sequences, at::Device device) {
  check_table("sequences", sequences, 2, device);
  check_shape("sequences", sequences, {sequences.size(0), kSequenceInts});
  return static_cast<const Sequence*>(sequences.const_data_ptr());
}

MaskView read_mask(const Tensor& bits, const Tensor& sequences, int64_t cols, int64_t q_block_size,
                   int64_t k_block_size, bool causal, at::Device device) {
  check_table("bits", bits, 3, device);
  MaskView mask;
  mask.sequences = read_sequences(sequences, device);
  mask.shape = make_shape(sequences.size(0), bits.size(0), bits.size(1), cols, q_block_size, k_block_size, causal);
  raise_if_error(validate_mask(mask.shape));
  check_shape("bits", bits, {bits.size(0), bits.size(1), mask.shape.words()});
  mask.bits = static_cast<const uint32_t*>(bits.const_data_ptr());
  return mask;
}

void check_mask(int64_t batch, int64_t heads, int64_t rows, int64_t cols, int64_t q_block_size, int64_t k_block_size) {
  raise_if_error(validate_mask(make_shape(batch, heads, rows, cols, q_block_size, k_block_size, false)));
}

#if HBSATTN_WITH_CUDA
Stream current_stream(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }
#else
// The core of this build answers every call for a device with the same sentence.
void refuse_cuda() { raise_if_error(pack_mask({}, nullptr)); }

Stream current_stream(at::Device) {
  refuse_cuda();
  return nullptr;
}
#endif

// On a CPU, too: without cu_seqlens there is no tensor to dispatch on.
Tensor make_sequences_op(const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, at::Device device,
                         int64_t batch, int64_t seqlen_q, int64_t seqlen_k, int64_t q_block_size, int64_t k_block_size,
                         int64_t row_stride) {
  TORCH_CHECK_VALUE(device.is_cpu() || device.is_cuda(), describe("device is ", device, "; expected cpu or cuda"));
  const Stream stream = device.is_cuda() ? current_stream(device) : nullptr;
  if (device.is_cuda() && !device.has_index()) device = c10::impl::VirtualGuardImpl(device.type()).getDevice();
  const c10::DeviceGuard guard(device);
  TORCH_CHECK_VALUE(batch >= 0, describe("batch is ", batch, "; expected at least 0"));
  SequencesParams params;
  params.shape = make_shape(batch, 1, 0, 0, q_block_size, k_block_size, false);
  params.seqlen_q = seqlen_q;
  params.seqlen_k = seqlen_k;
  params.row_stride = row_stride;
  auto read = [&](const char* name, const OptionalTensor& cu_seqlens) -> const int32_t* {
    if (!cu_seqlens) return nullptr;
    check_table(name, *cu_seqlens, 1, device);
    check_shape(name, *cu_seqlens, {batch + 1});
    return cu_seqlens->const_data_ptr<int32_t>();
  };
  params.cu_seqlens_q = read("cu_seqlens_q", cu_seqlens_q);
  params.cu_seqlens_k = read("cu_seqlens_k", cu_seqlens_k);
  Tensor sequences = empty_ints({batch, kSequenceInts}, device);
  params.sequences = static_cast<Sequence*>(sequences.mutable_data_ptr());
  raise_if_error(device.is_cuda() ? make_sequences(params, stream) : make_sequences_on_host(params));
  return sequences;
}

// Checks the tensors of a forward call; the problem that they pose is yet to be checked.
ForwardParams read_problem(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits,
                           const Tensor& sequences, const OptionalTensor& items, int64_t cols, int64_t q_block_size,
                           int64_t k_block_size, bool causal, bool pack_heads, double softmax_scale) {
  const at::Device device = q.device();
  TORCH_CHECK_VALUE(
      q.dim() == 3 || q.dim() == 4,
      describe("q has shape ", q.sizes(), " and ", q.dim(),
               " dimensions; expected (total_q, heads_q, head_dim) or (batch, seqlen_q, heads_q, head_dim)"));
  ForwardParams params;
  params.packed = q.dim() == 3;
  params.dtype = to_dtype("q", q);
  auto check_like_q = [&](const char* name, const Tensor& tensor) {
    check_dtype(name, tensor, q.scalar_type());
    check_device(name, tensor, device);
    check_dims(name, tensor, q.dim());
  };
  check_like_q("k", k);
  check_like_q("v", v);
  TORCH_CHECK_VALUE(k.size(-1) == q.size(-1),
                    describe("k has a head_dim of ", k.size(-1), "; expected ", q.size(-1), ", that of q"));
  TORCH_CHECK_VALUE(v.sizes() == k.sizes(),
                    describe("v has shape ", v.sizes(), "; expected ", k.sizes(), ", that of k"));
  params.mask = read_mask(bits, sequences, cols, q_block_size, k_block_size, causal, device);
  if (items) {
    check_table("items", *items, 2, device);
    check_shape("items", *items, {items->size(0), kItemInts});
  }
  if (!params.packed) {
    const int64_t batch = sequences.size(0);
    TORCH_CHECK_VALUE(q.size(0) == batch,
                      describe("q has a batch of ", q.size(0), "; expected ", batch, ", that of the mask"));
    TORCH_CHECK_VALUE(k.size(0) == batch,
                      describe("k has a batch of ", k.size(0), "; expected ", batch, ", that of the mask"));
  }
  params.q = to_view("q", q);
  params.k = to_view("k", k);
  params.v = to_view("v", v);
  params.rows_q = q.size(-3);
  params.rows_k = k.size(-3);
  params.heads_q = to_int32("heads_q", q.size(-2));
  params.heads_k = to_int32("heads_k", k.size(-2));
  params.head_dim = to_int32("head_dim", q.size(-1));
  params.softmax_scale = static_cast<float>(softmax_scale);
  params.pack_heads = pack_heads;
  if (items) {
    params.items = static_cast<const WorkItem*>(items->const_data_ptr());
    params.num_items = items->size(0);
  }
  return params;
}

// The checks of a call that has no work list yet, or of one that has.
void check_forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits, const Tensor& sequences,
                   const OptionalTensor& items, int64_t cols, int64_t q_block_size, int64_t k_block_size, bool causal,
                   bool pack_heads, double softmax_scale) {
  const c10::DeviceGuard guard(q.device());
  const ForwardParams params = read_problem(q, k, v, bits, sequences, items, cols, q_block_size, k_block_size, causal,
                                            pack_heads, softmax_scale);
  raise_if_error(q.is_cuda() ? supported(params) : validate_forward(params));
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

Tensor pack_dense(const Tensor& block_mask, const Tensor& sequences, bool flat, int64_t rows, int64_t cols,
                  int64_t q_block_size, int64_t k_block_size, bool causal) {
  check_dtype("block_mask", block_mask, at::kBool);
  check_dims("block_mask", block_mask, flat ? 3 : 4);
  PackParams params;
  params.shape = make_shape(0, block_mask.size(-3), rows, cols, q_block_size, k_block_size, causal);
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
  return pack(params, sequences, block_mask.device());
}

Tensor pack_indices(const Tensor& counts, const Tensor& indices, const Tensor& sequences, bool flat, int64_t rows,
                    int64_t cols, int64_t q_block_size, int64_t k_block_size, bool causal) {
  check_table("counts", counts, flat ? 2 : 3, counts.device());
  check_table("indices", indices, counts.dim() + 1, counts.device());
  const int64_t heads = counts.size(-2), q_blocks = counts.size(-1);
  PackParams params;
  params.shape = make_shape(0, heads, rows, cols, q_block_size, k_block_size, causal);
  PackSource& source = params.source;
  source.form = PackSource::Form::kIndices;
  source.flat = flat;
  source.counts = counts.const_data_ptr<int32_t>();
  source.indices = indices.const_data_ptr<int32_t>();
  source.width = indices.size(-1);
  source.batch_stride = flat || check_batch("counts", counts, sequences) ? 0 : heads * q_blocks;
  const int64_t all_rows = flat || sequences.dim() != 2 ? q_blocks : sequences.size(0) * q_blocks;
  TORCH_CHECK_VALUE(rows == all_rows,
                    describe("rows is ", rows, "; expected ", all_rows, ", the query blocks of counts"));
  std::vector<int64_t> shape = counts.sizes().vec();
  shape.push_back(source.width);
  check_shape("indices", indices, shape);
  return pack(params, sequences, counts.device());
}

Tensor pack_csr(const Tensor& indptr, const Tensor& indices, const Tensor& sequences, int64_t rows, int64_t cols,
                int64_t q_block_size, int64_t k_block_size, bool causal) {
  check_table("indptr", indptr, 2, indptr.device());
  check_table("indices", indices, 1, indptr.device());
  check_shape("indptr", indptr, {indptr.size(0), rows + 1});
  PackParams params;
  params.shape = make_shape(0, indptr.size(0), rows, cols, q_block_size, k_block_size, causal);
  PackSource& source = params.source;
  source.form = PackSource::Form::kCsr;
  source.flat = true;
  source.indptr = indptr.const_data_ptr<int32_t>();
  source.indices = indices.const_data_ptr<int32_t>();
  source.nnz = indices.size(0);
  return pack(params, sequences, indptr.device());
}

Tensor plan_items_op(const Tensor& bits, const Tensor& sequences, int64_t cols, int64_t q_block_size,
                     int64_t k_block_size, bool causal, int64_t heads_q, int64_t heads_k, int64_t head_dim,
                     int64_t element_size, bool pack_heads, bool for_backward) {
  const at::Device device = bits.device();
  const c10::DeviceGuard guard(device);
  PlanParams params;
  params.mask = read_mask(bits, sequences, cols, q_block_size, k_block_size, causal, device);
  params.heads_q = to_int32("heads_q", heads_q);
  params.heads_k = to_int32("heads_k", heads_k);
  params.head_dim = to_int32("head_dim", head_dim);
  params.element_size = to_int32("element_size", element_size);
  params.pack_heads = pack_heads;
  params.for_backward = for_backward;
  raise_if_error(validate_plan(params));
  const int64_t count =
      num_items(params.mask.shape, params.heads_q, params.heads_k, params.head_dim, pack_heads, for_backward);
  const auto scratch_bytes = static_cast<int64_t>(plan_scratch_size(count));
  const Tensor scratch = at::empty({scratch_bytes}, bits.options().dtype(at::kByte));
  Tensor items = empty_ints({count, kItemInts}, device);
  params.scratch = scratch.mutable_data_ptr();
  params.items = static_cast<WorkItem*>(items.mutable_data_ptr());
  raise_if_error(plan_items(params, current_stream(device)));
  return items;
}

Tensor transpose_bits(const Tensor& bits, int64_t cols) {
  const at::Device device = bits.device();
  const c10::DeviceGuard guard(device);
  check_table("bits", bits, 3, device);
  TransposeParams params;
  MaskShape& shape = params.mask.shape;
  shape = make_shape(0, bits.size(0), bits.size(1), cols, 1, 1, false);  // the sizes of blocks do not matter here
  raise_if_error(validate_mask(shape));
  check_shape("bits", bits, {bits.size(0), bits.size(1), shape.words()});
  Tensor columns = empty_ints({shape.heads, shape.cols, shape.row_words()}, device);
  params.mask.bits = static_cast<const uint32_t*>(bits.const_data_ptr());
  params.columns = static_cast<uint32_t*>(columns.mutable_data_ptr());
  raise_if_error(transpose_mask(params, current_stream(device)));
  return columns;
}

Tensor plan_keys_op(const Tensor& columns, const Tensor& sequences, int64_t rows, int64_t q_block_size,
                    int64_t k_block_size, bool causal, int64_t heads_q, int64_t heads_k, int64_t head_dim,
                    int64_t element_size, bool deterministic) {
  const at::Device device = columns.device();
  const c10::DeviceGuard guard(device);
  check_table("columns", columns, 3, device);
  KeyPlanParams params;
  MaskShape& shape = params.mask.shape;
  params.mask.sequences = read_sequences(sequences, device);
  shape = make_shape(sequences.size(0), columns.size(0), rows, columns.size(1), q_block_size, k_block_size, causal);
  params.heads_q = to_int32("heads_q", heads_q);
  params.heads_k = to_int32("heads_k", heads_k);
  params.head_dim = to_int32("head_dim", head_dim);
  params.element_size = to_int32("element_size", element_size);
  params.deterministic = deterministic;
  raise_if_error(validate_key_plan(params));
  check_shape("columns", columns, {shape.heads, shape.cols, shape.row_words()});
  const int64_t count = num_key_items(params);
  const auto scratch_bytes = static_cast<int64_t>(key_plan_scratch_size(count));
  const Tensor scratch = at::empty({scratch_bytes}, columns.options().dtype(at::kByte));
  Tensor items = empty_ints({count, kKeyItemInts}, device);
  params.columns = static_cast<const uint32_t*>(columns.const_data_ptr());
  params.scratch = scratch.mutable_data_ptr();
  params.items = static_cast<KeyItem*>(items.mutable_data_ptr());
  raise_if_error(plan_keys(params, current_stream(device)));
  return items;
}

std::vector<int64_t> shape_lse(const ForwardParams& params) {
  if (params.packed) return {params.heads_q, params.rows_q};
  return {params.mask.shape.batch, params.heads_q, params.rows_q};
}

// The tensor, or a copy where the kernels cannot address it: a copy costs less than a second kind of kernel.
Tensor make_addressable(const char* name, const Tensor& tensor, DType dtype, TensorView& view) {
  if (addressable(view, dtype)) return tensor;
  Tensor copy = tensor.clone(at::MemoryFormat::Contiguous);
  view = to_view(name, copy);
  return copy;
}

// A copy with zeros behind each row, and what belongs to the rows of such a result.
Tensor pad_head_dim(const Tensor& tensor) {
  const int64_t extra = tensor.size(-1) % kHeadDimMultiple;
  return at::constant_pad_nd(tensor, {0, extra == 0 ? 0 : kHeadDimMultiple - extra});
}

Tensor cut_head_dim(const Tensor& tensor, int64_t head_dim) { return tensor.narrow(-1, 0, head_dim).contiguous(); }

// `deterministic` is for the autograd rule alone.
std::tuple<Tensor, Tensor, Tensor> forward_op(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits,
                                              const Tensor& sequences, const Tensor& items, int64_t cols,
                                              int64_t q_block_size, int64_t k_block_size, bool causal, bool pack_heads,
                                              double softmax_scale, bool deterministic, bool profile) {
  const at::Device device = q.device();
  const c10::DeviceGuard guard(device);
  ForwardParams params = read_problem(q, k, v, bits, sequences, items, cols, q_block_size, k_block_size, causal,
                                      pack_heads, softmax_scale);
  raise_if_error(supported(params));
  const int64_t head_dim = params.head_dim;
  if (head_dim % kHeadDimMultiple != 0) {
    const auto [out, lse, cycles] =
        forward_op(pad_head_dim(q), pad_head_dim(k), pad_head_dim(v), bits, sequences, items, cols, q_block_size,
                   k_block_size, causal, pack_heads, softmax_scale, deterministic, profile);
    return {cut_head_dim(out, head_dim), lse, cycles};
  }
  const Tensor q_read = make_addressable("q", q, params.dtype, params.q);
  const Tensor k_read = make_addressable("k", k, params.dtype, params.k);
  const Tensor v_read = make_addressable("v", v, params.dtype, params.v);

  Tensor out = at::empty(q.sizes(), q.options());
  Tensor lse = at::empty(shape_lse(params), q.options().dtype(at::kFloat));
  params.out = to_view("out", out);
  params.lse = lse.mutable_data_ptr<float>();

  int64_t profiled = 0;
  if (profile) {
    int multiprocessors = 0;
    C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device.index()));
    profiled = 2 * multiprocessors;
  }
  Tensor cycles =
      profile ? at::zeros({profiled, 2}, q.options().dtype(at::kLong)) : at::empty({0}, q.options().dtype(at::kLong));
  if (profile) params.cycles = cycles.mutable_data_ptr<int64_t>();

  const auto workspace_bytes = static_cast<int64_t>(forward_workspace_size());
  const Tensor workspace = at::empty({workspace_bytes}, q.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  raise_if_error(forward(params, current_stream(device)));
  return {out, lse, cycles};
}

std::tuple<Tensor, Tensor, Tensor> backward_op(const Tensor& grad_out, const std::optional<Tensor>& grad_lse,
                                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out,
                                               const Tensor& lse, const Tensor& bits, const Tensor& sequences,
                                               const Tensor& items, const Tensor& columns, const Tensor& key_items,
                                               int64_t cols, int64_t q_block_size, int64_t k_block_size, bool causal,
                                               bool pack_heads, double softmax_scale, bool deterministic) {
  const at::Device device = q.device();
  const c10::DeviceGuard guard(device);
  BackwardParams params;
  ForwardParams& problem = params.problem;
  problem = read_problem(q, k, v, bits, sequences, items, cols, q_block_size, k_block_size, causal, pack_heads,
                         softmax_scale);
  const MaskShape& shape = problem.mask.shape;
  auto check = [&](const char* name, const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes) {
    check_dtype(name, tensor, dtype);
    check_device(name, tensor, device);
    check_shape(name, tensor, sizes);
  };
  check("grad_out", grad_out, q.scalar_type(), q.sizes());
  check("out", out, q.scalar_type(), q.sizes());
  const std::vector<int64_t> lse_shape = shape_lse(problem);
  check("lse", lse, at::kFloat, lse_shape);
  if (grad_lse) check("grad_lse", *grad_lse, at::kFloat, lse_shape);
  check_table("columns", columns, 3, device);
  params.deterministic = deterministic;
  if (backward_lists(params).keys) {
    check_shape("columns", columns, {shape.heads, shape.cols, shape.row_words()});
  }
  check_table("key_items", key_items, 2, device);
  check_shape("key_items", key_items, {key_items.size(0), kKeyItemInts});
  params.columns = static_cast<const uint32_t*>(columns.const_data_ptr());
  params.key_items = static_cast<const KeyItem*>(key_items.const_data_ptr());
  params.num_key_items = key_items.size(0);
  raise_if_error(supported(params));

  if (q.numel() == 0 || k.numel() == 0) {
    const auto zeros = [](const Tensor& like) { return at::zeros(like.sizes(), like.options()); };
    return {zeros(q), zeros(k), zeros(v)};
  }
  const int64_t head_dim = problem.head_dim;
  if (head_dim % kHeadDimMultiple != 0) {
    const auto [grad_q, grad_k, grad_v] =
        backward_op(pad_head_dim(grad_out), grad_lse, pad_head_dim(q), pad_head_dim(k), pad_head_dim(v),
                    pad_head_dim(out), lse, bits, sequences, items, columns, key_items, cols, q_block_size,
                    k_block_size, causal, pack_heads, softmax_scale, deterministic);
    return {cut_head_dim(grad_q, head_dim), cut_head_dim(grad_k, head_dim), cut_head_dim(grad_v, head_dim)};
  }

  // Autograd may bring an expanded tensor: that of a sum has no strides at all.
  const Tensor grad_out_rows = grad_out.stride(-1) == 1 ? grad_out : grad_out.contiguous();
  problem.out = to_view("out", out);
  params.grad_out = to_view("grad_out", grad_out_rows);
  const Tensor q_read = make_addressable("q", q, problem.dtype, problem.q);
  const Tensor k_read = make_addressable("k", k, problem.dtype, problem.k);
  const Tensor v_read = make_addressable("v", v, problem.dtype, problem.v);
  const Tensor out_read = make_addressable("out", out, problem.dtype, problem.out);
  const Tensor grad_out_read = make_addressable("grad_out", grad_out_rows, problem.dtype, params.grad_out);
  const Tensor lse_read = lse.contiguous(), grad_lse_read = grad_lse ? grad_lse->contiguous() : Tensor();
  problem.lse = lse_read.data_ptr<float>();
  if (grad_lse) params.grad_lse = grad_lse_read.const_data_ptr<float>();

  Tensor grad_q = at::empty(q.sizes(), q.options());
  Tensor grad_k = at::empty(k.sizes(), k.options());
  Tensor grad_v = at::empty(v.sizes(), v.options());
  params.grad_q = to_view("grad_q", grad_q);
  params.grad_k = to_view("grad_k", grad_k);
  params.grad_v = to_view("grad_v", grad_v);

  const auto workspace_bytes = static_cast<int64_t>(backward_workspace_size(params));
  const Tensor workspace = at::empty({workspace_bytes}, q.options().dtype(at::kByte));
  params.workspace = workspace.mutable_data_ptr();
  raise_if_error(backward(params, current_stream(device)));
  return {grad_q, grad_k, grad_v};
}

void register_cuda(torch::Library& m) {
  m.impl("pack_dense", pack_dense);
  m.impl("pack_indices", pack_indices);
  m.impl("pack_csr", pack_csr);
  m.impl("plan_items", plan_items_op);
  m.impl("forward", forward_op);
  m.impl("transpose_bits", transpose_bits);
  m.impl("plan_keys", plan_keys_op);
  m.impl("backward", backward_op);
}

#else

void refuse_operator(const c10::OperatorHandle&, torch::jit::Stack*) { refuse_cuda(); }

void register_cuda(torch::Library& m) {
  for (const char* name :
       {"pack_dense", "pack_indices", "pack_csr", "plan_items", "forward", "transpose_bits", "plan_keys", "backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_operator>());
  }
}

#endif

}  // namespace

TORCH_LIBRARY(hbsattn, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "make_sequences(Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Device device, SymInt batch, SymInt seqlen_q, "
      "SymInt seqlen_k, int q_block_size, int k_block_size, SymInt row_stride) -> Tensor",
      tags);
  m.def(
      "pack_dense(Tensor block_mask, Tensor sequences, bool flat, SymInt rows, SymInt cols, int q_block_size, "
      "int k_block_size, bool causal) -> Tensor",
      tags);
  m.def(
      "pack_indices(Tensor counts, Tensor indices, Tensor sequences, bool flat, SymInt rows, SymInt cols, "
      "int q_block_size, int k_block_size, bool causal) -> Tensor",
      tags);
  m.def(
      "pack_csr(Tensor indptr, Tensor indices, Tensor sequences, SymInt rows, SymInt cols, int q_block_size, "
      "int k_block_size, bool causal) -> Tensor",
      tags);
  m.def(
      "plan_items(Tensor bits, Tensor sequences, SymInt cols, int q_block_size, int k_block_size, bool causal, "
      "int heads_q, int heads_k, int head_dim, int element_size, bool pack_heads, bool for_backward=False) -> Tensor",
      tags);
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor sequences, Tensor items, SymInt cols, "
      "int q_block_size, int k_block_size, bool causal, bool pack_heads, float softmax_scale, "
      "bool deterministic=False, bool profile=False) -> (Tensor out, Tensor lse, Tensor cycles)",
      tags);
  m.def("transpose_bits(Tensor bits, SymInt cols) -> Tensor", tags);
  m.def(
      "plan_keys(Tensor columns, Tensor sequences, SymInt rows, int q_block_size, int k_block_size, bool causal, "
      "int heads_q, int heads_k, int head_dim, int element_size, bool deterministic) -> Tensor",
      tags);
  m.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bits, "
      "Tensor sequences, Tensor items, Tensor columns, Tensor key_items, SymInt cols, int q_block_size, "
      "int k_block_size, bool causal, bool pack_heads, float softmax_scale, bool deterministic) "
      "-> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
      tags);
  m.def(
      "check_forward(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor sequences, Tensor? items, SymInt cols, "
      "int q_block_size, int k_block_size, bool causal, bool pack_heads, float softmax_scale) -> ()",
      tags);
  m.def("check_mask(SymInt batch, int heads, SymInt rows, SymInt cols, int q_block_size, int k_block_size) -> ()",
        tags);
}

TORCH_LIBRARY_IMPL(hbsattn, CompositeExplicitAutograd, m) {
  m.impl("make_sequences", make_sequences_op);
  m.impl("check_forward", check_forward);
  m.impl("check_mask", check_mask);
}

TORCH_LIBRARY_IMPL(hbsattn, CUDA, m) { register_cuda(m); }

}  // namespace hbsattn
