// The operators' schemas. Their CUDA kernels are in mask_ops.cpp and attention_ops.cpp, the autograd rules in
// autograd.cpp, the CPU kernels in hbsattn/_cpu, and the fake kernels, which tell shapes while a program is traced, in
// hbsattn/_ops.py. MaskLayout and CallShape of arguments.h say what `layout` and `heads` hold.

#include <torch/library.h>

#include <vector>

TORCH_LIBRARY(hbsattn, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "make_sequences(Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, Device device, SymInt batch, SymInt seqlen_q, "
      "SymInt seqlen_k, int q_block_size, int k_block_size, SymInt row_stride) -> Tensor",
      tags);
  // make_sequences and pack_dense at once.
  m.def(
      "make_dense(Tensor block_mask, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, SymInt batch, SymInt seqlen_q, "
      "SymInt seqlen_k, SymInt rows, SymInt cols, int q_block_size, int k_block_size, SymInt row_stride, bool causal) "
      "-> (Tensor bits, Tensor sequences)",
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
  m.def("check_mask(SymInt batch, int heads, SymInt rows, SymInt cols, int q_block_size, int k_block_size) -> ()",
        tags);

  m.def("plan_items(Tensor bits, Tensor sequences, SymInt[] layout, int[] heads) -> Tensor", tags);
  m.def(
      "plan_backward(Tensor bits, Tensor sequences, SymInt[] layout, int[] heads, SymInt rows_k, bool packed, "
      "bool deterministic, bool[3] needs) -> Tensor",
      tags);

  m.def(
      "check_forward(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor sequences, SymInt[] layout, bool pack_heads, "
      "float softmax_scale) -> ()",
      tags);
  m.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor sequences, Tensor? items, Tensor? backward_plan, "
      "SymInt[] layout, bool pack_heads, float softmax_scale, bool deterministic=False) -> (Tensor out, Tensor lse)",
      tags);
  // check_forward, plan_items and forward at once, for a call without gradients.
  m.def(
      "plan_and_forward(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor sequences, SymInt[] layout, bool pack_heads, "
      "float softmax_scale) -> (Tensor out, Tensor lse, Tensor items)",
      tags);
  m.def(
      "profile_forward(Tensor q, Tensor k, Tensor v, Tensor bits, Tensor sequences, Tensor items, int[] layout, "
      "bool pack_heads, float softmax_scale) -> (Tensor out, Tensor lse, Tensor cycles)");
  m.def(
      "check_backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
      "Tensor bits, Tensor sequences, SymInt[] layout, bool pack_heads, float softmax_scale) -> ()",
      tags);
  m.def(
      "backward(Tensor grad_out, Tensor? grad_lse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor bits, "
      "Tensor sequences, Tensor? plan, SymInt[] layout, bool pack_heads, float softmax_scale, bool deterministic, "
      "bool[3] needs) -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)",
      tags);
}
