// The operators' schemas. Their CUDA kernels are in mask_ops.cpp and attention_ops.cpp, the autograd rules in
// autograd.cpp, the CPU kernels in hbsattn/_cpu, and the fake kernels, which tell shapes while a program is traced, in
// hbsattn/_ops.py. MaskLayout and CallShape of arguments.h say what `layout` and `heads` hold.

#include <torch/library.h>

#include <string>
#include <vector>

TORCH_LIBRARY(hbsattn, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  const auto define = [&](const std::string& schema) { m.def(schema.c_str(), tags); };

  // What each operator that makes bits takes last: rows, and a MaskLayout, whose numbers take less time than a list.
  const std::string blocks = "SymInt rows, SymInt cols, int q_block_size, int k_block_size, bool causal)";
  define(
      "make_sequences(Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Device device, SymInt batch, SymInt seqlen_q, "
      "SymInt seqlen_k, SymInt row_stride, int q_block_size, int k_block_size) -> Tensor");
  // make_sequences and pack_dense at once.
  define(
      "make_dense(Tensor block_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt batch, SymInt seqlen_q, "
      "SymInt seqlen_k, SymInt row_stride, " +
      blocks + " -> (Tensor bits, Tensor sequences)");
  define("pack_dense(Tensor block_mask, Tensor sequences, bool flat, " + blocks + " -> Tensor");
  define("pack_indices(Tensor counts, Tensor indices, Tensor sequences, bool flat, " + blocks + " -> Tensor");
  define("pack_csr(Tensor indptr, Tensor indices, Tensor sequences, " + blocks + " -> Tensor");
  define("check_mask(SymInt batch, int heads, " + blocks + " -> ()");

  // for_backward: the list of a forward with dropout or a softcap. altered: that of gradients of one.
  define(
      "plan_items(Tensor bits, Tensor sequences, Tensor? rules, SymInt[] layout, int[] heads, "
      "bool for_backward=False) -> Tensor");
  define(
      "plan_backward(Tensor bits, Tensor sequences, Tensor? rules, SymInt[] layout, int[] heads, SymInt rows_k, "
      "bool packed, bool deterministic, bool[3] needs, bool altered=False) -> Tensor");

  // What each operator of an attention call takes first: CallArguments of arguments.h.
  const std::string call =
      "(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor sequences, Tensor? rules, Tensor? partial, Tensor? matrices, "
      "Tensor? elements, Tensor? sinks, Tensor? dropout_seed, SymInt[] layout, bool pack_heads, float softmax_scale, "
      "float dropout_p, float softcap, bool allow_tf32";
  define("check_forward" + call + ") -> ()");
  define("forward" + call +
         ", Tensor? items, Tensor? backward_plan, bool deterministic=False) -> (Tensor out, Tensor lse)");
  // check_forward, plan_items and forward at once, for a call without gradients.
  define("plan_and_forward" + call + ") -> (Tensor out, Tensor lse, Tensor items)");
  define("profile_forward" + call + ", Tensor items) -> (Tensor out, Tensor lse, Tensor cycles)");
  const std::string results = ", Tensor grad_out, Tensor? grad_lse, Tensor out, Tensor lse";
  define("check_backward" + call + results + ") -> ()");
  define("backward" + call + results +
         ", Tensor? plan, bool deterministic, bool[4] needs) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v, "
         "Tensor grad_sinks)");
}
