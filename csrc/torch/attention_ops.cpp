// The attention operators: guard, checks, allocation, and the way to the plain parameters of the core.

#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <c10/core/DeviceGuard.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "plan/tiles.h"
#include "torch/arguments.h"
#include "torch/plan_parts.h"

#if HBSATTN_WITH_CUDA
#include <c10/cuda/CUDAException.h>
#endif

namespace hbsattn {
namespace {

using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;

// The checks of a call that has no work list yet.
void check_forward(const Call& call) {
  const c10::DeviceGuard guard(call.q.device());
  const ForwardParams params = read_problem(call);
  raise_if_error(call.q.is_cuda() ? supported(params) : validate_forward(params));
}

// Those of a backward call on a CPU, which has no plan.
void check_backward(const Call& call, const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out,
                    const Tensor& lse) {
  const ForwardParams problem = read_problem(call);
  check_gradients(call, grad_out, grad_lse, out, lse, problem);
  raise_if_error(validate_forward(problem));
}

#if HBSATTN_WITH_CUDA

// The tensor, or a copy where the kernels cannot address it: a copy costs less than a second kind of kernel.
Tensor make_addressable(const char* name, const Tensor& tensor, DType dtype, TensorView& view, bool by_rows = false) {
  if (addressable(view, dtype, by_rows)) return tensor;
  Tensor copy = tensor.clone(at::MemoryFormat::Contiguous);
  view = to_view(name, copy);
  return copy;
}

// Where the kernels cannot take its head dim: a copy with zeros behind each row, and what belongs to the rows of such
// a result.
Tensor pad_head_dim(const Tensor& tensor) {
  const int64_t extra = tensor.size(-1) % kHeadDimMultiple;
  return extra == 0 ? tensor : at::constant_pad_nd(tensor, {0, kHeadDimMultiple - extra});
}

Tensor cut_head_dim(const Tensor& tensor, int64_t head_dim) {
  // A gradient that nobody needs has one dimension.
  return tensor.dim() == 1 || tensor.size(-1) == head_dim ? tensor : tensor.narrow(-1, 0, head_dim).contiguous();
}

bool needs_padding(const Call& call) {
  return call.q.size(-1) % kHeadDimMultiple != 0 || call.v.size(-1) % kHeadDimMultiple != 0;
}

const Tensor& check_given(const char* name, const OptionalTensor& tensor, const char* maker) {
  TORCH_CHECK_VALUE(tensor.has_value(), describe(name, " is None; expected what ", maker, " makes, on CUDA"));
  return *tensor;
}

// `cleared`: a workspace that plan_items has cleared for this call; null: there is none.
TwoTensors run_forward(const Call& call, const OptionalTensor& items, int64_t* cycles, void* cleared = nullptr) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  const at::Device device = q.device();
  ForwardParams params = read_problem(call);
  read_items(check_given("items", items, "plan_items"), device, params);
  if (needs_padding(call)) {
    raise_if_error(supported(params));
    const Tensor padded_q = pad_head_dim(q), padded_k = pad_head_dim(k), padded_v = pad_head_dim(v);
    const auto [out, lse] = run_forward(with_tensors(call, padded_q, padded_k, padded_v), items, cycles, cleared);
    return {cut_head_dim(out, v.size(-1)), lse};
  }
  const bool copies = !addressable(params.q, params.dtype) || !addressable(params.k, params.dtype) ||
                      !addressable(params.v, params.dtype);
  if (copies) raise_if_error(supported(params));  // before the copies
  const Tensor q_read = make_addressable("q", q, params.dtype, params.q);
  const Tensor k_read = make_addressable("k", k, params.dtype, params.k);
  const Tensor v_read = make_addressable("v", v, params.dtype, params.v);

  Tensor out = at::empty(shape_out(q, v), q.options());
  Tensor lse = at::empty(shape_lse(params), q.options().dtype(at::kFloat));
  params.out = to_view("out", out);
  params.lse = lse.mutable_data_ptr<float>();
  params.cycles = cycles;
  c10::DataPtr workspace;
  if (cleared == nullptr) workspace = allocate_scratch(forward_workspace_size());
  params.workspace = cleared == nullptr ? workspace.get() : cleared;
  params.workspace_is_clear = cleared != nullptr;
  raise_if_error(forward(params, current_stream(device)));
  return {out, lse};
}

// `backward_plan` and `deterministic` are for the autograd rule alone.
TwoTensors forward_op(const Call& call, const OptionalTensor& items, const OptionalTensor& backward_plan,
                      bool deterministic) {
  const c10::DeviceGuard guard(call.q.device());
  return run_forward(call, items, nullptr);
}

// The first call with a mask: the work list comes back beside the results, for later calls.
ThreeTensors plan_and_forward(const Call& call) {
  const at::Device device = call.q.device();
  const c10::DeviceGuard guard(device);
  const ForwardParams params = read_problem(call);
  raise_if_error(supported(params));  // before anything is launched
  PlanParams plan;
  plan.mask = params.mask;
  plan.heads_q = params.heads_q;
  plan.heads_k = params.heads_k;
  plan.head_dim = params.head_dim;
  plan.element_size = static_cast<int32_t>(call.q.element_size());
  plan.pack_heads = params.pack_heads;
  plan.for_backward = alters_weights(params);
  const c10::DataPtr workspace = allocate_scratch(forward_workspace_size());
  plan.workspace = workspace.get();
  const Tensor items = make_items(plan, device);
  const auto [out, lse] = run_forward(call, items, nullptr, workspace.get());
  return {out, lse, items};
}

// The forward, and the clock of each multiprocessor where its first CTA begins and its last one ends, in the row of its
// number: (2 x multiprocessors, 2). The others are 0.
ThreeTensors profile_forward(const Call& call, const Tensor& items) {
  const at::Device device = call.q.device();
  const c10::DeviceGuard guard(device);
  int multiprocessors = 0;
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device.index()));
  Tensor cycles = at::zeros({2 * multiprocessors, 2}, call.q.options().dtype(at::kLong));
  const auto [out, lse] = run_forward(call, items, cycles.mutable_data_ptr<int64_t>());
  return {out, lse, cycles};
}

// Points `params` at the parts of a plan that plan_backward made.
void read_plan(const Tensor& plan, at::Device device, BackwardParams& params) {
  ForwardParams& problem = params.problem;
  check_table("plan", plan, 1, device);
  const PlanParts parts(problem.mask.shape, problem.heads_q, problem.heads_k, problem.pack_heads, problem.rows_k,
                        problem.packed);
  check_shape("plan", plan, {parts.ints});
  const int32_t* ints = plan.const_data_ptr<int32_t>();
  params.columns = reinterpret_cast<const uint32_t*>(ints + parts.columns);
  params.key_items = reinterpret_cast<const KeyItem*>(ints + parts.key_items);
  params.num_key_items = parts.num_key_items;
  problem.items = reinterpret_cast<const WorkItem*>(ints + parts.items);
  problem.num_items = parts.num_items;
}

// The gradient of sinks where there are no keys: a row's log-sum-exp is its head's sink, or -inf where the row belongs
// to no sequence.
Tensor add_up_sinks(const Tensor& sinks, const OptionalTensor& grad_lse, const Tensor& lse) {
  if (!grad_lse) return at::zeros_like(sinks);
  const Tensor rows = at::where(lse.isneginf(), at::zeros({}, lse.options()), *grad_lse);
  return rows.dim() == 2 ? rows.sum(1) : rows.sum(at::IntArrayRef({0, 2}));
}

FourTensors backward_op(const Call& call, const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& out,
                        const Tensor& lse, const OptionalTensor& plan, bool deterministic, std::array<bool, 4> needs) {
  const Tensor &q = call.q, &k = call.k, &v = call.v;
  const at::Device device = q.device();
  const c10::DeviceGuard guard(device);
  BackwardParams params;
  ForwardParams& problem = params.problem;
  problem = read_problem(call);
  check_gradients(call, grad_out, grad_lse, out, lse, problem);
  params.deterministic = deterministic;
  params.needs_q = needs[0];
  params.needs_k = needs[1];
  params.needs_v = needs[2];
  if (needs[0] || needs[1] || needs[2]) read_plan(check_given("plan", plan, "plan_backward"), device, params);
  TORCH_CHECK_VALUE(!needs[3] || call.sinks, "sinks is None, and its gradient is needed; expected a tensor");
  Tensor grad_sinks = needs[3] ? at::empty_like(*call.sinks) : at::empty({0}, lse.options());
  if (needs[3]) params.grad_sinks = grad_sinks.mutable_data_ptr<float>();
  raise_if_error(supported(params));

  if (q.numel() == 0 || k.numel() == 0) {
    const auto zeros = [](const Tensor& like, bool needed) {
      return needed ? at::zeros(like.sizes(), like.options()) : at::empty({0}, like.options());
    };
    if (needs[3]) grad_sinks = add_up_sinks(*call.sinks, grad_lse, lse);
    return {zeros(q, needs[0]), zeros(k, needs[1]), zeros(v, needs[2]), grad_sinks};
  }
  if (needs_padding(call)) {
    const Tensor padded_q = pad_head_dim(q), padded_k = pad_head_dim(k), padded_v = pad_head_dim(v);
    const auto [grad_q, grad_k, grad_v, padded_grad_sinks] =
        backward_op(with_tensors(call, padded_q, padded_k, padded_v), pad_head_dim(grad_out), grad_lse,
                    pad_head_dim(out), lse, plan, deterministic, needs);
    return {cut_head_dim(grad_q, q.size(-1)), cut_head_dim(grad_k, q.size(-1)), cut_head_dim(grad_v, v.size(-1)),
            padded_grad_sinks};
  }

  // Autograd may bring an expanded tensor: that of a sum has no strides at all.
  const Tensor grad_out_rows = grad_out.stride(-1) == 1 ? grad_out : grad_out.contiguous();
  problem.out = to_view("out", out);
  params.grad_out = to_view("grad_out", grad_out_rows);
  const Tensor q_read = make_addressable("q", q, problem.dtype, problem.q, true);
  const Tensor k_read = make_addressable("k", k, problem.dtype, problem.k);
  const Tensor v_read = make_addressable("v", v, problem.dtype, problem.v);
  const Tensor out_read = make_addressable("out", out, problem.dtype, problem.out);
  const Tensor grad_out_read = make_addressable("grad_out", grad_out_rows, problem.dtype, params.grad_out, true);
  const Tensor lse_read = lse.contiguous(), grad_lse_read = grad_lse ? grad_lse->contiguous() : Tensor();
  problem.lse = lse_read.data_ptr<float>();
  if (grad_lse) params.grad_lse = grad_lse_read.const_data_ptr<float>();

  const auto allocate = [](const char* name, const Tensor& like, bool needed, TensorView& view) {
    Tensor grad = at::empty(needed ? like.sizes() : at::IntArrayRef({0}), like.options());
    if (needed) view = to_view(name, grad);
    return grad;
  };
  Tensor grad_q = allocate("grad_q", q, needs[0], params.grad_q);
  Tensor grad_k = allocate("grad_k", k, needs[1], params.grad_k);
  Tensor grad_v = allocate("grad_v", v, needs[2], params.grad_v);
  const c10::DataPtr workspace = allocate_scratch(backward_workspace_size(params));
  params.workspace = workspace.get();
  raise_if_error(backward(params, current_stream(device)));
  return {grad_q, grad_k, grad_v, grad_sinks};
}

#endif

}  // namespace

TORCH_LIBRARY_IMPL(hbsattn, CompositeExplicitAutograd, m) {
  m.impl("check_forward", Operator<check_forward>::run);
  m.impl("check_backward", Operator<check_backward>::run);
}

TORCH_LIBRARY_IMPL(hbsattn, CUDA, m) {
#if HBSATTN_WITH_CUDA
  m.impl("forward", Operator<forward_op>::run);
  m.impl("plan_and_forward", Operator<plan_and_forward>::run);
  m.impl("profile_forward", Operator<profile_forward>::run);
  m.impl("backward", Operator<backward_op>::run);
#else
  for (const char* name : {"forward", "plan_and_forward", "profile_forward", "backward"}) {
    m.impl(name, torch::CppFunction::makeFromBoxedFunction<&refuse_operator>());
  }
#endif
}

}  // namespace hbsattn
