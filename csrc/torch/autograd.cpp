// The autograd rules of the attention operators: what `forward` keeps for `backward`, and that there is no second
// derivative.

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "torch/arguments.h"

namespace hbsattn {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using FourTensors = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using TracedCall = CallArguments<c10::SymIntArrayRef>;

// Plans are for the kernels that were chosen when they were made.
std::string describe_choice() {
  const int32_t limit = shared_memory_limit();
  return used_kernels() + (limit == 0 ? "" : " in " + std::to_string(limit) + " KB");
}

void check_same_kernels(const std::string& of_forward) {
  const std::string kernels = describe_choice();
  TORCH_CHECK_VALUE(kernels == of_forward, describe("use_kernels is ", kernels, "; expected ", of_forward,
                                                    ", as it was for the forward of these gradients"));
}

// Calls the operator that has this autograd rule.
template <auto rule, class... Own>
auto call_operator(const char* name, const TracedCall& call, const Own&... own) {
  using Schema = decltype(Operator<rule>::run);
  static const auto found = c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
  return call.apply([](const auto&... arguments) { return found.call(arguments...); }, own...);
}

// The same without the rule.
template <auto rule, class... Own>
auto call_below(const char* name, const TracedCall& call, const Own&... own) {
  const at::AutoDispatchBelowADInplaceOrView guard;
  return call_operator<rule>(name, call, own...);
}

OptionalTensor if_defined(const Tensor& tensor) { return tensor.defined() ? OptionalTensor(tensor) : std::nullopt; }

// Refuses derivatives in forward mode, and those that a function transform asks for.
void check_reverse_mode(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) {
    if (!tensor->_fw_grad(0).defined()) continue;
    C10_THROW_ERROR(
        NotImplementedError,
        "block_sparse_attention has no forward-mode derivative (torch.func.jvp, torch.autograd.forward_ad); "
        "expected backward() or torch.autograd.grad");
  }
}
void check_no_transform() {
  const auto& transforms = at::functorch::functorchTLSAccessor();
  if (!transforms) return;
  try {
    transforms->checkSupportsCppAutogradFunction();
  } catch (const c10::Error&) {
    C10_THROW_ERROR(NotImplementedError,
                    "block_sparse_attention has no derivatives inside the transforms of torch.func (grad, vjp, jacrev "
                    "and others); expected backward() or torch.autograd.grad");
  }
}

bool requires_grad(const OptionalTensor& tensor) { return tensor && tensor->requires_grad(); }

// Whether autograd has to know of a call.
bool is_differentiated(std::initializer_list<const Tensor*> tensors) {
  check_reverse_mode(tensors);
  if (!at::GradMode::is_enabled()) return false;
  for (const Tensor* tensor : tensors) {
    if (!tensor->requires_grad()) continue;
    check_no_transform();
    return true;
  }
  return false;
}

bool is_differentiated(const TracedCall& call) {
  const bool by_sinks = call.sinks && is_differentiated({&*call.sinks});
  return is_differentiated({&call.q, &call.k, &call.v}) || by_sinks;
}

// Stands for the second derivative where one is asked for.
struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  // The tensors are what the gradients that `compute` returns depend on.
  template <class Compute>
  static variable_list forward(AutogradContext*, const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& sinks, const Tensor& grad_out, const OptionalTensor& grad_lse,
                               const Tensor& out, const Tensor& lse, const Compute& compute) {
    const auto [grad_q, grad_k, grad_v, grad_sinks] = compute();
    return {grad_q, grad_k, grad_v, grad_sinks};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    C10_THROW_ERROR(NotImplementedError,
                    "block_sparse_attention has no second derivative: call backward without create_graph=True");
  }
};

FourTensors differentiable_backward(const TracedCall& call, const Tensor& grad_out, const OptionalTensor& grad_lse,
                                    const Tensor& out, const Tensor& lse, const OptionalTensor& plan,
                                    bool deterministic, std::array<bool, 4> needs) {
  const auto compute = [&] {
    return call_below<differentiable_backward>("hbsattn::backward", call, grad_out, grad_lse, out, lse, plan,
                                               deterministic, needs);
  };
  if (!is_differentiated({&grad_out, &call.q, &call.k, &call.v, &out, &lse}) &&
      !(grad_lse && is_differentiated({&*grad_lse})) && !(call.sinks && is_differentiated({&*call.sinks}))) {
    return compute();
  }
  const variable_list grads =
      NoSecondDerivative::apply(call.q, call.k, call.v, call.sinks, grad_out, grad_lse, out, lse, compute);
  return {grads[0], grads[1], grads[2], grads[3]};
}

TwoTensors differentiable_forward(const TracedCall& call, const OptionalTensor& items,
                                  const OptionalTensor& backward_plan, bool deterministic);

// Gradients of out and lse with respect to q, k, v and sinks. Those that required none at the forward are not computed.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static constexpr int kInputs = 8;  // of forward, beside the context

  // Autograd sees q, k, v and sinks, which are those of the call, as arguments of their own.
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                               const OptionalTensor& sinks, const TracedCall& call, const OptionalTensor& items,
                               const OptionalTensor& backward_plan, bool deterministic) {
    const auto [out, lse] =
        call_below<differentiable_forward>("hbsattn::forward", call, items, backward_plan, deterministic);
    const auto keep = [](const OptionalTensor& tensor) { return tensor.value_or(Tensor()); };
    context->save_for_backward({q, k, v, call.bits, call.sequences, out, lse, keep(backward_plan), keep(call.rules),
                                keep(call.partial), keep(call.matrices), keep(call.elements), keep(sinks),
                                keep(call.dropout_seed)});
    context->saved_data["layout"] = call.layout;
    context->saved_data["pack_heads"] = call.pack_heads.value;
    context->saved_data["softmax_scale"] = call.softmax_scale.value;
    context->saved_data["dropout_p"] = call.dropout_p.value;
    context->saved_data["softcap"] = call.softcap.value;
    context->saved_data["allow_tf32"] = call.allow_tf32.value;
    context->saved_data["deterministic"] = deterministic;
    context->saved_data["kernels"] = describe_choice();
    context->saved_data["needs"] =
        std::vector<bool>{q.requires_grad(), k.requires_grad(), v.requires_grad(), requires_grad(sinks)};
    context->set_materialize_grads(false);  // log-sum-exps are seldom used: no zeros for their gradients
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    auto& data = context->saved_data;
    if (saved[0].is_cuda()) check_same_kernels(data["kernels"].toStringRef());
    const std::vector<c10::SymInt> layout = data["layout"].toSymIntVector();
    const bool pack_heads = data["pack_heads"].toBool();
    const double softmax_scale = data["softmax_scale"].toDouble(), dropout_p = data["dropout_p"].toDouble();
    const double softcap = data["softcap"].toDouble();
    const bool allow_tf32 = data["allow_tf32"].toBool();
    const OptionalTensor rules = if_defined(saved[8]), partial = if_defined(saved[9]);
    const OptionalTensor matrices = if_defined(saved[10]), elements = if_defined(saved[11]);
    const OptionalTensor sinks = if_defined(saved[12]), seed = if_defined(saved[13]);
    const TracedCall call{saved[0],   saved[1],      saved[2],  saved[3], saved[4],  rules,
                          partial,    matrices,      elements,  sinks,    seed,      layout,
                          pack_heads, softmax_scale, dropout_p, softcap,  allow_tf32};
    const Tensor &out = saved[5], &lse = saved[6];
    const c10::List<bool> needed = data["needs"].toBoolList();
    const std::array<bool, 4> needs{needed[0], needed[1], needed[2], needed[3]};
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(out);
    const auto [grad_q, grad_k, grad_v, grad_sinks] =
        call_operator<differentiable_backward>("hbsattn::backward", call, grad_out, if_defined(grads[1]), out, lse,
                                               if_defined(saved[7]), data["deterministic"].toBool(), needs);
    variable_list results(kInputs);
    if (needs[0]) results[0] = grad_q;
    if (needs[1]) results[1] = grad_k;
    if (needs[2]) results[2] = grad_v;
    if (needs[3]) results[3] = grad_sinks;
    return results;
  }
};

TwoTensors differentiable_forward(const TracedCall& call, const OptionalTensor& items,
                                  const OptionalTensor& backward_plan, bool deterministic) {
  if (!is_differentiated(call)) {
    return call_below<differentiable_forward>("hbsattn::forward", call, items, backward_plan, deterministic);
  }
  const variable_list results =
      AttentionFunction::apply(call.q, call.k, call.v, call.sinks, call, items, backward_plan, deterministic);
  return {results[0], results[1]};
}

// block_sparse_attention calls `forward`, with plans, where it sees that gradients are asked for.
ThreeTensors differentiable_plan_and_forward(const TracedCall& call) {
  if (is_differentiated(call)) {
    C10_THROW_ERROR(NotImplementedError, "hbsattn::plan_and_forward has no derivative; expected hbsattn::forward");
  }
  return call_below<differentiable_plan_and_forward>("hbsattn::plan_and_forward", call);
}

}  // namespace

TORCH_LIBRARY_IMPL(hbsattn, Autograd, m) {
  m.impl("forward", Operator<differentiable_forward>::run);
  m.impl("plan_and_forward", Operator<differentiable_plan_and_forward>::run);
  m.impl("backward", Operator<differentiable_backward>::run);
}

}  // namespace hbsattn
