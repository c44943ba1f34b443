// The autograd rules of the attention operators: what `forward` keeps for `backward`, and that there is no second
// derivative.

#include <ATen/FuncTorchTLS.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/custom_function.h>
#include <torch/library.h>

#include <array>
#include <optional>
#include <tuple>

namespace hbsattn {
namespace {

using at::Tensor;
using OptionalTensor = std::optional<Tensor>;
using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

using TwoTensors = std::tuple<Tensor, Tensor>;
using ThreeTensors = std::tuple<Tensor, Tensor, Tensor>;
using Forward = TwoTensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                           const OptionalTensor&, const OptionalTensor&, c10::SymIntArrayRef, bool, double, bool);
using PlanAndForward = ThreeTensors(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                    c10::SymIntArrayRef, bool, double);
using Backward = ThreeTensors(const Tensor&, const OptionalTensor&, const Tensor&, const Tensor&, const Tensor&,
                              const Tensor&, const Tensor&, const Tensor&, const Tensor&, const OptionalTensor&,
                              c10::SymIntArrayRef, bool, double, bool, std::array<bool, 3>);

template <class Schema>
c10::TypedOperatorHandle<Schema> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

const c10::TypedOperatorHandle<Forward>& forward_operator() {
  static const auto found = find<Forward>("hbsattn::forward");
  return found;
}

const c10::TypedOperatorHandle<PlanAndForward>& plan_and_forward_operator() {
  static const auto found = find<PlanAndForward>("hbsattn::plan_and_forward");
  return found;
}

const c10::TypedOperatorHandle<Backward>& backward_operator() {
  static const auto found = find<Backward>("hbsattn::backward");
  return found;
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

// Gradients of out and lse with respect to q, k and v. Those that required none at the forward are not computed.
struct AttentionFunction : torch::autograd::Function<AttentionFunction> {
  static variable_list forward(AutogradContext* context, const Tensor& q, const Tensor& k, const Tensor& v,
                               const Tensor& bits, const Tensor& sequences, const OptionalTensor& items,
                               const OptionalTensor& backward_plan, c10::SymIntArrayRef layout, bool pack_heads,
                               double softmax_scale, bool deterministic) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    const auto [out, lse] = forward_operator().call(q, k, v, bits, sequences, items, backward_plan, layout, pack_heads,
                                                    softmax_scale, deterministic);
    context->save_for_backward({q, k, v, out, lse, bits, sequences, backward_plan.value_or(Tensor())});
    context->saved_data["layout"] = layout;
    context->saved_data["pack_heads"] = pack_heads;
    context->saved_data["softmax_scale"] = softmax_scale;
    context->saved_data["deterministic"] = deterministic;
    context->saved_data["needs"] = std::vector<bool>{q.requires_grad(), k.requires_grad(), v.requires_grad()};
    context->set_materialize_grads(false);  // log-sum-exps are seldom used: no zeros for their gradients
    return {out, lse};
  }

  static variable_list backward(AutogradContext* context, const variable_list& grads) {
    const variable_list saved = context->get_saved_variables();
    const Tensor &q = saved[0], &k = saved[1], &v = saved[2], &out = saved[3], &lse = saved[4];
    auto& data = context->saved_data;
    const c10::List<bool> needed = data["needs"].toBoolList();
    const std::array<bool, 3> needs{needed[0], needed[1], needed[2]};
    const Tensor grad_out = grads[0].defined() ? grads[0] : at::zeros_like(out);
    const std::vector<c10::SymInt> layout = data["layout"].toSymIntVector();
    const auto [grad_q, grad_k, grad_v] = backward_operator().call(
        grad_out, if_defined(grads[1]), q, k, v, out, lse, saved[5], saved[6], if_defined(saved[7]), layout,
        data["pack_heads"].toBool(), data["softmax_scale"].toDouble(), data["deterministic"].toBool(), needs);
    variable_list results(11);
    if (needs[0]) results[0] = grad_q;
    if (needs[1]) results[1] = grad_k;
    if (needs[2]) results[2] = grad_v;
    return results;
  }
};

TwoTensors forward_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits,
                            const Tensor& sequences, const OptionalTensor& items, const OptionalTensor& backward_plan,
                            c10::SymIntArrayRef layout, bool pack_heads, double softmax_scale, bool deterministic) {
  if (!is_differentiated({&q, &k, &v})) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return forward_operator().call(q, k, v, bits, sequences, items, backward_plan, layout, pack_heads, softmax_scale,
                                   deterministic);
  }
  const variable_list results = AttentionFunction::apply(q, k, v, bits, sequences, items, backward_plan, layout,
                                                         pack_heads, softmax_scale, deterministic);
  return {results[0], results[1]};
}

// block_sparse_attention calls `forward`, with plans, where it sees that gradients are asked for.
ThreeTensors plan_and_forward_autograd(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& bits,
                                       const Tensor& sequences, c10::SymIntArrayRef layout, bool pack_heads,
                                       double softmax_scale) {
  if (is_differentiated({&q, &k, &v})) {
    C10_THROW_ERROR(NotImplementedError, "hbsattn::plan_and_forward has no derivative; expected hbsattn::forward");
  }
  const at::AutoDispatchBelowADInplaceOrView guard;
  return plan_and_forward_operator().call(q, k, v, bits, sequences, layout, pack_heads, softmax_scale);
}

// Stands for the second derivative where one is asked for.
struct NoSecondDerivative : torch::autograd::Function<NoSecondDerivative> {
  static variable_list forward(AutogradContext*, const Tensor& grad_out, const OptionalTensor& grad_lse,
                               const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& out, const Tensor& lse,
                               const Tensor& bits, const Tensor& sequences, const OptionalTensor& plan,
                               c10::SymIntArrayRef layout, bool pack_heads, double softmax_scale, bool deterministic,
                               std::array<bool, 3> needs) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    auto [grad_q, grad_k, grad_v] =
        backward_operator().call(grad_out, grad_lse, q, k, v, out, lse, bits, sequences, plan, layout, pack_heads,
                                 softmax_scale, deterministic, needs);
    return {grad_q, grad_k, grad_v};
  }

  static variable_list backward(AutogradContext*, const variable_list&) {
    C10_THROW_ERROR(NotImplementedError,
                    "block_sparse_attention has no second derivative: call backward without create_graph=True");
  }
};

ThreeTensors backward_autograd(const Tensor& grad_out, const OptionalTensor& grad_lse, const Tensor& q, const Tensor& k,
                               const Tensor& v, const Tensor& out, const Tensor& lse, const Tensor& bits,
                               const Tensor& sequences, const OptionalTensor& plan, c10::SymIntArrayRef layout,
                               bool pack_heads, double softmax_scale, bool deterministic, std::array<bool, 3> needs) {
  if (!is_differentiated({&grad_out, &q, &k, &v, &out, &lse}) && !(grad_lse && is_differentiated({&*grad_lse}))) {
    const at::AutoDispatchBelowADInplaceOrView guard;
    return backward_operator().call(grad_out, grad_lse, q, k, v, out, lse, bits, sequences, plan, layout, pack_heads,
                                    softmax_scale, deterministic, needs);
  }
  const variable_list grads = NoSecondDerivative::apply(grad_out, grad_lse, q, k, v, out, lse, bits, sequences, plan,
                                                        layout, pack_heads, softmax_scale, deterministic, needs);
  return {grads[0], grads[1], grads[2]};
}

}  // namespace

TORCH_LIBRARY_IMPL(hbsattn, Autograd, m) {
  m.impl("forward", forward_autograd);
  m.impl("plan_and_forward", plan_and_forward_autograd);
  m.impl("backward", backward_autograd);
}

}  // namespace hbsattn
