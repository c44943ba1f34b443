#pragma once

// Block-sparse attention for callers in C++17. Nothing here needs PyTorch or CUDA headers.
//
// All pointers are device pointers; all work goes to `stream` of the current device and nothing waits for it. The
// library allocates no device memory: a call says how much it needs. A mask is packed and planned once and then used
// by any number of calls:
//
//   make_sequences -> pack_mask -> plan_items -> forward, forward, ...
//                               -> transpose_mask -> plan_keys -> backward, backward, ...
//                               -> plan_items, for_backward -> backward, backward, ...
//
// Of the last two lines, backward_lists says which a backward needs. PackParams::table and PlanParams::workspace make
// the first line shorter.

#include <string>
#include <vector>

#include "hbsattn/params.h"
#include "hbsattn/status.h"

#if defined(_WIN32)
#define HBSATTN_API
#else
#define HBSATTN_API __attribute__((visibility("default")))
#endif

namespace hbsattn {

// Fills the table of sequences from cumulative lengths (packed) or from fixed lengths (batched).
HBSATTN_API Status make_sequences(const SequencesParams& params, Stream stream);

// The same in host memory, for host pointers.
HBSATTN_API Status make_sequences_on_host(const SequencesParams& params);

// Packs a bool mask, index lists or CSR into bits, trimmed to what each sequence and causality leave visible.
HBSATTN_API Status pack_mask(const PackParams& params, Stream stream);

// Records that the list of plan_items has at least; depends on shapes and on which kernels are used alone.
// `for_backward` and `element_size`: as in PlanParams.
HBSATTN_API int64_t num_items(const MaskShape& shape, int32_t heads_q, int32_t heads_k, int32_t head_dim,
                              bool pack_heads, bool for_backward = false, int32_t element_size = 2);

// Records that suffice for every list of plan_items, whatever head dim, direction and device it is for.
HBSATTN_API int64_t item_capacity(const MaskShape& shape, int32_t heads_q, int32_t heads_k, bool pack_heads);

// Bytes of `scratch` that plan_items needs.
HBSATTN_API size_t plan_scratch_size(int64_t num_items);

// Builds the work list of a mask.
HBSATTN_API Status plan_items(const PlanParams& params, Stream stream);

// Bytes of `workspace` that one forward call needs.
HBSATTN_API size_t forward_workspace_size();

// Block-sparse attention, out = softmax(scale * q k^T over the visible pairs) v, and its log-sum-exp. Rows with
// nothing to attend get 0 and -inf, or their head's sink.
HBSATTN_API Status forward(const ForwardParams& params, Stream stream);

// Transposes the bits of a mask; what the backward pass needs beside a forward plan is made from these.
HBSATTN_API Status transpose_mask(const TransposeParams& params, Stream stream);

// Records that the list of plan_keys has at least; depends on shapes, numbers of heads and the current device alone.
HBSATTN_API int64_t num_key_items(const KeyPlanParams& params);

// Records that suffice for every list of plan_keys, likewise. `rows_k`, `packed`: as in KeyPlanParams.
HBSATTN_API int64_t key_item_capacity(const MaskShape& shape, int32_t heads_q, int64_t rows_k, bool packed);

// Bytes of `scratch` that plan_keys needs.
HBSATTN_API size_t key_plan_scratch_size(int64_t num_key_items);

// Builds the work list of the backward pass.
HBSATTN_API Status plan_keys(const KeyPlanParams& params, Stream stream);

// What a backward reads of the mask, which depends on its sizes, on what it needs and on `deterministic`.
struct BackwardLists {
  bool items;  // problem.mask.bits and problem.items, which plan_items made `for_backward`; where `keys` are read,
               // too, or grad_q alone is needed, the forward's list serves as well if it has as many items
  bool keys;   // columns and key_items
};

// Of a problem of which no pointer is read.
HBSATTN_API BackwardLists backward_lists(const BackwardParams& params);

// Bytes of `workspace` that one backward call needs; 0 where this build has no kernel for it.
HBSATTN_API size_t backward_workspace_size(const BackwardParams& params);

// Those gradients of q, k, v and sinks that are needed, given those of out and lse. What attends to nothing gets 0.
// Without queries or without keys nothing is written: the caller clears the gradients of what there is; that of a sink
// is then the sum of its head's grad_lse.
HBSATTN_API Status backward(const BackwardParams& params, Stream stream);

// The checks of sizes that hold on every backend, without those of pointers and those that ask for a compiled kernel
// and a GPU.
HBSATTN_API Status validate_mask(const MaskShape& shape);
HBSATTN_API Status validate_plan(const PlanParams& params);
HBSATTN_API Status validate_key_plan(const KeyPlanParams& params);
HBSATTN_API Status validate_forward(const ForwardParams& params);
HBSATTN_API Status validate_backward(const BackwardParams& params);

// All checks of `forward` or `backward` but those of pointers, of `addressable` and of kHeadDimMultiple, and of other
// views than q and v: whether the problem is valid and this build has a kernel for it on the current device.
HBSATTN_API Status supported(const ForwardParams& params);
HBSATTN_API Status supported(const BackwardParams& params);

// Whether the tensor memory accelerator can address this view: 16-byte aligned data, strides above 0 that are multiples
// of 16 bytes, and batch strides that are whole multiples of the row stride or of the head stride: batch entries lie
// one after another, or, as in (rows, batch, heads, head_dim), between rows. `forward` and `backward` refuse other
// views; a copy of the tensor qualifies. `by_rows`: batch entries may not lie between rows; so `backward` wants q and
// grad_out, whose addresses its innermost loop computes.
HBSATTN_API bool addressable(const TensorView& view, DType dtype, bool by_rows = false);

// Chooses the kernels of all later calls in this process: "sm90", those for compute capability 9.0, "sm80", those for
// 8.0 and newer, or "auto", as it is at first: on each device those that suit it. Refused if the current device, or
// this build, cannot run them. A plan is for the kernels that were chosen when it was made, in numbers of items and
// sizes of workspaces, too: forward and backward have to follow under the same choice. No other call may run meanwhile.
HBSATTN_API Status use_kernels(const std::string& name);

// The name that was given last.
HBSATTN_API std::string used_kernels();

// Leaves later calls in this process so many KB of shared memory for a CTA, as if the device had no more, and a
// multiprocessor 1 KB beside them; 0, as it is at first: all of it. Calls whose kernels need more are refused. From
// kLeastSharedKilobytes on, the least that a device of compute capability 8.0 or newer has, to what the current one
// has. Lists that were planned under another limit are another call's.
inline constexpr int32_t kLeastSharedKilobytes = 99;
HBSATTN_API Status limit_shared_memory(int32_t kilobytes);
HBSATTN_API int32_t shared_memory_limit();

// One compiled kernel, as `forward` or `backward` would choose it.
struct KernelInfo {
  std::string name;  // e.g. "sm90_forward_bf16_hd128_m128" or "sm90_backward_keys_bf16_hd128_n128"
  std::string arch;  // e.g. "sm_90a"; the oldest that the kernel is written for
  DType dtype;
  int32_t head_dim;      // head dims up to this one, and above the next smaller, use it
  int32_t value_dim;     // if less: such calls whose values have up to so many columns do
  int32_t tile_m;        // query rows of a tile; backward: of a stage
  int32_t tile_n;        // keys of a stage; backward: of a tile
  int32_t key_stages;    // backward: of queries
  int32_t value_stages;  // backward: of output gradients
  int32_t shared_bytes;  // shared memory of a CTA
};

struct BuildInfo {
  bool cuda;                    // false: a host-only build
  std::string cuda_version;     // of the compiler, e.g. "13.0"
  std::string cutlass_version;  // e.g. "4.2.0"
  std::vector<KernelInfo> kernels;
};

HBSATTN_API BuildInfo build_info();

// How a call would be computed.
struct Explanation {
  std::string kernel;          // as in KernelInfo::name
  std::string queries_kernel;  // of a backward that computes grad_q by a second kernel; otherwise empty
  std::string pairs_kernel;    // of a forward that takes query blocks which attend alike in pairs; otherwise empty
  std::string method;          // "forward"; of gradients: "by_keys", "by_queries", "by_keys_and_queries", "keys_only",
                               // "queries_only", or "none" where none is needed
  bool general = false;        // the kernels that keep queries take the path for ragged, united or small blocks
  int32_t tile_rows = 0;       // query rows that a CTA keeps; by keys, keys
  int32_t stage_rows = 0;      // keys of a stage that it streams; by keys, queries
  int32_t tile_heads = 0;      // query heads that share a tile; by keys, that a tile streams
  int64_t num_items = 0;       // lengths of the work lists that the call reads
  int64_t num_key_items = 0;
};

// Fills `explanation` for a problem of which no pointer is read; the Status is that of `supported`.
HBSATTN_API Status explain(const ForwardParams& params, Explanation* explanation);
HBSATTN_API Status explain(const BackwardParams& params, Explanation* explanation);

}  // namespace hbsattn
