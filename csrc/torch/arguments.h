#pragma once

// What several operators are given alike: the layout of a mask, the numbers of heads, an attention call.

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <utility>
#include <vector>

#include "hbsattn/hbsattn.h"
#include "torch/checks.h"

#if HBSATTN_WITH_CUDA
#include <c10/cuda/CUDACachingAllocator.h>
#include <c10/cuda/CUDAStream.h>
#endif

namespace hbsattn {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline constexpr int64_t kSequenceInts = sizeof(Sequence) / sizeof(int32_t);
inline constexpr int64_t kRuleInts = sizeof(HeadRule) / sizeof(int32_t);
inline constexpr int64_t kPartialInts = sizeof(PartialWord) / sizeof(int32_t);
inline constexpr int64_t kItemInts = sizeof(WorkItem) / sizeof(int32_t);
inline constexpr int64_t kKeyItemInts = sizeof(KeyItem) / sizeof(int32_t);

// `SymInt[] layout` of the operators: what a mask is beside its bits and its table of sequences. hbsattn/_layout.py
// spells it as MaskLayout.
struct MaskLayout {
  int64_t cols, q_block_size, k_block_size;
  bool causal;
  bool partial = false;  // of the operators that make bits, which know no partial blocks, never
};

inline MaskLayout read_layout(at::IntArrayRef values) {
  TORCH_CHECK_VALUE(values.size() == 5,
                    describe("layout has ", static_cast<int64_t>(values.size()),
                             " numbers; expected 5: cols, q_block_size, k_block_size, causal, partial"));
  return {values[0], values[1], values[2], values[3] != 0, values[4] != 0};
}

// `int[] heads` of the operators that plan: what a call has beside its mask. hbsattn/_layout.py spells it as CallShape.
struct CallShape {
  int32_t heads_q, heads_k, head_dim, element_size;
  bool pack_heads;
};

inline CallShape read_call_shape(at::IntArrayRef values) {
  TORCH_CHECK_VALUE(values.size() == 5,
                    describe("heads has ", static_cast<int64_t>(values.size()),
                             " numbers; expected 5: heads_q, heads_k, head_dim, element_size, pack_heads"));
  return {to_int32("heads_q", values[0]), to_int32("heads_k", values[1]), to_int32("head_dim", values[2]),
          to_int32("element_size", values[3]), values[4] != 0};
}

// A member without a default: the compiler tells whoever leaves it out of an aggregate.
template <class T>
struct Required {
  T value;

  Required(T value) : value(value) {}
  operator T() const { return value; }
};

// What each operator of an attention call takes first, in the order of schemas.cpp; hbsattn/_layout.py spells it as
// Call. `Ints` is at::IntArrayRef, or c10::SymIntArrayRef where a program may be traced.
template <class Ints>
struct CallArguments {
  const Tensor &q, &k, &v, &bits, &sequences;
  const OptionalTensor &rules, &partial, &matrices, &elements, &sinks, &dropout_seed;
  Ints layout;
  Required<bool> pack_heads;
  Required<double> softmax_scale, dropout_p, softcap;
  Required<bool> allow_tf32;

  // `function` of all of them, and of `own` behind them.
  template <class Function, class... Own>
  auto apply(const Function& function, const Own&... own) const {
    return function(q, k, v, bits, sequences, rules, partial, matrices, elements, sinks, dropout_seed, layout,
                    pack_heads, softmax_scale, dropout_p, softcap, allow_tf32, own...);
  }
};

using Call = CallArguments<at::IntArrayRef>;

// The same call of other q, k and v.
inline Call with_tensors(const Call& call, const Tensor& q, const Tensor& k, const Tensor& v) {
  return call.apply(
      [&](const Tensor&, const Tensor&, const Tensor&, const auto&... rest) { return Call{q, k, v, rest...}; });
}

// What each operator that makes bits takes last.
struct MaskBlocks {
  int64_t rows;
  MaskLayout layout;
};

// Operator<f>::run is f in the form that the dispatcher knows: `f` takes a call, or the blocks of a mask, and then what
// is the operator's own.
template <auto f>
struct Operator;

template <class Result, class... Own, Result (*f)(const MaskBlocks&, Own...)>
struct Operator<f> {
  static Result run(Own... own, int64_t rows, int64_t cols, int64_t q_block_size, int64_t k_block_size, bool causal) {
    return f({rows, {cols, q_block_size, k_block_size, causal}}, std::forward<Own>(own)...);
  }
};

template <class Result, class Ints, class... Own, Result (*f)(const CallArguments<Ints>&, Own...)>
struct Operator<f> {
  static Result run(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits, const Tensor& sequences,
                    const OptionalTensor& rules, const OptionalTensor& partial, const OptionalTensor& matrices,
                    const OptionalTensor& elements, const OptionalTensor& sinks, const OptionalTensor& dropout_seed,
                    Ints layout, bool pack_heads, double softmax_scale, double dropout_p, double softcap,
                    bool allow_tf32, Own... own) {
    return f({q, k, v, bits, sequences, rules, partial, matrices, elements, sinks, dropout_seed, layout, pack_heads,
              softmax_scale, dropout_p, softcap, allow_tf32},
             std::forward<Own>(own)...);
  }
};

// For a part of a mask or a plan: later calls, of any mode, save it for backward or rewrite it, which they could not do
// with a tensor of inference mode.
inline Tensor empty_ints(at::IntArrayRef shape, at::Device device) {
  const at::TensorOptions options = at::TensorOptions(at::kInt).device(device);
  if (!c10::InferenceMode::is_enabled()) return at::empty(shape, options);
  const c10::InferenceMode normal(false);
  return at::empty(shape, options);
}

inline MaskShape make_shape(int64_t batch, int64_t heads, const MaskBlocks& blocks) {
  const MaskLayout& layout = blocks.layout;
  MaskShape shape;
  shape.batch = to_int32("batch", batch);
  shape.heads = to_int32("the mask's number of heads", heads);
  shape.rows = blocks.rows;
  shape.cols = layout.cols;
  shape.q_block_size = to_int32("q_block_size", layout.q_block_size);
  shape.k_block_size = to_int32("k_block_size", layout.k_block_size);
  shape.causal = layout.causal;
  shape.partial = layout.partial;
  return shape;
}

inline const Sequence* read_sequences(const Tensor& sequences, at::Device device) {
  check_table("sequences", sequences, 2, device);
  check_shape("sequences", sequences, {sequences.size(0), kSequenceInts});
  return static_cast<const Sequence*>(sequences.const_data_ptr());
}

// All that plans need: of partial blocks that there are some.
inline MaskView read_mask(const Tensor& bits, const Tensor& sequences, const OptionalTensor& rules,
                          const MaskLayout& layout, at::Device device) {
  check_table("bits", bits, 3, device);
  MaskView mask;
  mask.sequences = read_sequences(sequences, device);
  mask.shape = make_shape(sequences.size(0), bits.size(0), {bits.size(1), layout});
  raise_if_error(validate_mask(mask.shape));
  check_shape("bits", bits, {bits.size(0), bits.size(1), mask.shape.words()});
  mask.bits = static_cast<const uint32_t*>(bits.const_data_ptr());
  if (rules) {
    check_table("rules", *rules, 2, device);
    check_shape("rules", *rules, {bits.size(0), kRuleInts});
    mask.shape.ruled = true;
    mask.rules = static_cast<const HeadRule*>(rules->const_data_ptr());
  }
  return mask;
}

// The partial blocks of an attention call, if `mask`, its bits, says that it has some.
inline void read_partial(const Call& call, at::Device device, MaskView& mask) {
  const MaskShape& shape = mask.shape;
  const auto check_given = [&](const char* name, const OptionalTensor& tensor) {
    TORCH_CHECK_VALUE(
        tensor.has_value() == shape.partial,
        describe(name, tensor ? " is a tensor" : " is None", "; expected ",
                 shape.partial ? "a tensor, as layout has partial blocks" : "None, as layout has no partial blocks"));
  };
  check_given("partial", call.partial);
  check_given("matrices", call.matrices);
  check_given("elements", call.elements);
  if (!shape.partial) return;
  const Tensor &partial = *call.partial, &matrices = *call.matrices, &elements = *call.elements;
  check_table("partial", partial, 4, device);
  check_shape("partial", partial, {shape.heads, shape.rows, shape.words(), kPartialInts});
  check_table("matrices", matrices, 1, device);
  TORCH_CHECK_VALUE(matrices.size(0) > 0, "matrices has shape [0]; expected the number of a matrix, or more");
  check_table("elements", elements, 3, device, at::kShort);
  TORCH_CHECK_VALUE(elements.size(0) > 0,
                    describe("elements has shape ", elements.sizes(), "; expected a matrix, or more"));
  check_shape("elements", elements, {elements.size(0), shape.q_block_size, shape.granules()});
  mask.partial = static_cast<const PartialWord*>(partial.const_data_ptr());
  mask.matrices = matrices.const_data_ptr<int32_t>();
  mask.num_partial = to_int32("the length of matrices", matrices.size(0));
  mask.elements = static_cast<const uint16_t*>(elements.const_data_ptr());
  mask.num_matrices = to_int32("the number of matrices in elements", elements.size(0));
}

#if HBSATTN_WITH_CUDA
// Memory of the current device for work on its current stream, until the end of its scope: what is enqueued on that
// stream later may reuse it. Lighter than a tensor.
inline c10::DataPtr allocate_scratch(size_t bytes) { return c10::cuda::CUDACachingAllocator::get()->allocate(bytes); }

// The work list of queries of a valid call, (records, 16). `plan` has its mask and heads.
Tensor make_items(PlanParams plan, at::Device device);

inline Stream current_stream(at::Device device) { return c10::cuda::getCurrentCUDAStream(device.index()).stream(); }
#else
// The core of this build answers every call for a device with the same sentence.
inline void refuse_cuda() { raise_if_error(pack_mask({}, nullptr)); }
inline void refuse_operator(const c10::OperatorHandle&, torch::jit::Stack*) { refuse_cuda(); }

inline Stream current_stream(at::Device) {
  refuse_cuda();
  return nullptr;
}
#endif

// That of log-sum-exps, and of sinks, which are scores too.
inline at::ScalarType dtype_of_lse(const Tensor& q) {
  return q.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// Checks the tensors of a call; the problem that they pose is yet to be checked.
inline ForwardParams read_problem(const Call& call) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  const at::Device device = q.device();
  TORCH_CHECK_VALUE(
      q.dim() == 3 || q.dim() == 4,
      describe("q has shape ", q.sizes(), " and ", q.dim(),
               " dimensions; expected (total_q, heads_q, head_dim) or (batch, seqlen_q, heads_q, head_dim)"));
  ForwardParams params;
  params.packed = q.dim() == 3;
  params.dtype = to_dtype("q", q);
  const auto check_like_q = [&](const char* name, const Tensor& tensor) {
    check_dtype(name, tensor, q.scalar_type(), kThatOfQ);
    check_device(name, tensor, device);
    check_dims(name, tensor, q.dim());
  };
  check_like_q("k", k);
  check_like_q("v", v);
  TORCH_CHECK_VALUE(k.size(-1) == q.size(-1),
                    describe("k has a head_dim of ", k.size(-1), "; expected ", q.size(-1), ", that of q"));
  TORCH_CHECK_VALUE(v.sizes().slice(0, v.dim() - 1) == k.sizes().slice(0, k.dim() - 1),
                    describe("v has shape ", v.sizes(), "; expected ", k.sizes(), ", that of k, but for the head_dim"));
  // A view of no columns has those of the problem.
  const int64_t head_dim = std::max(q.size(-1), v.size(-1));
  TORCH_CHECK_VALUE(head_dim == 0 || std::min(q.size(-1), v.size(-1)) > 0,
                    describe(q.size(-1) == 0 ? "q" : "v", " has a head_dim of 0; expected at least 1"));
  params.mask = read_mask(call.bits, call.sequences, call.rules, read_layout(call.layout), device);
  read_partial(call, device, params.mask);
  if (!params.packed) {
    const int64_t batch = call.sequences.size(0);
    TORCH_CHECK_VALUE(q.size(0) == batch,
                      describe("q has a batch of ", q.size(0), "; expected ", batch, ", that of the mask",
                               batch == 1 ? describe(": build it with batch_size=", q.size(0)) : ""));
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
  params.head_dim = to_int32("head_dim", head_dim);
  params.softmax_scale = static_cast<float>(call.softmax_scale);
  params.pack_heads = call.pack_heads;
  if (call.sinks) {
    check_dtype("sinks", *call.sinks, dtype_of_lse(q), "");
    check_device("sinks", *call.sinks, device);
    check_shape("sinks", *call.sinks, {params.heads_q});
    TORCH_CHECK_VALUE(call.sinks->is_contiguous(), "sinks is not contiguous; expected a contiguous tensor");
    if (device.is_cuda()) params.sinks = call.sinks->const_data_ptr<float>();
  }
  params.softcap = static_cast<float>(call.softcap);
  TORCH_CHECK_VALUE(
      params.softcap != 0.f || call.softcap == 0.,
      describe("softcap is ", c10::str(call.softcap.value), "; expected 0, or a number from 0.01 to 1e6"));
  params.allow_tf32 = call.allow_tf32;
  params.dropout_p = call.dropout_p;
  TORCH_CHECK_VALUE(
      call.dropout_p == 0. || call.dropout_seed,
      describe("dropout_seed is None and dropout_p is ", std::to_string(call.dropout_p.value), "; expected a tensor"));
  if (call.dropout_seed) {
    const Tensor& seed = *call.dropout_seed;
    check_dtype("dropout_seed", seed, at::kLong, "");
    check_device("dropout_seed", seed, device);
    check_shape("dropout_seed", seed, {2});
    TORCH_CHECK_VALUE(seed.is_contiguous(), "dropout_seed is not contiguous; expected a contiguous tensor");
    params.dropout_seed = seed.const_data_ptr<int64_t>();
  }
  return params;
}

inline void read_items(const Tensor& items, at::Device device, ForwardParams& params) {
  check_table("items", items, 2, device);
  check_shape("items", items, {items.size(0), kItemInts});
  params.items = static_cast<const WorkItem*>(items.const_data_ptr());
  params.num_items = items.size(0);
}

// Rows of q with the columns of v.
inline std::vector<int64_t> shape_out(const Tensor& q, const Tensor& v) {
  std::vector<int64_t> shape = q.sizes().vec();
  shape.back() = v.size(-1);
  return shape;
}

inline std::vector<int64_t> shape_lse(const ForwardParams& params) {
  if (params.packed) return {params.heads_q, params.rows_q};
  return {params.mask.shape.batch, params.heads_q, params.rows_q};
}

// What a backward call is given beside its problem: gradients and results in the shapes of the forward's.
inline void check_gradients(const Call& call, const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out,
                            const Tensor& lse, const ForwardParams& problem) {
  const Tensor& q = call.q;
  const auto check = [&](const char* name, const Tensor& tensor, at::ScalarType dtype, at::IntArrayRef sizes) {
    check_dtype(name, tensor, dtype, dtype == q.scalar_type() ? kThatOfQ : "");
    check_device(name, tensor, q.device());
    check_shape(name, tensor, sizes);
  };
  const at::ScalarType lse_dtype = dtype_of_lse(q);
  const std::vector<int64_t> lse_shape = shape_lse(problem);
  const std::vector<int64_t> out_shape = shape_out(q, call.v);
  check("grad_out", grad_out, q.scalar_type(), out_shape);
  check("out", out, q.scalar_type(), out_shape);
  check("lse", lse, lse_dtype, lse_shape);
  if (grad_lse) check("grad_lse", *grad_lse, lse_dtype, lse_shape);
}

}  // namespace hbsattn
