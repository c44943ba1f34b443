#include <cmath>
#include <string>

#include "kernels/common/convert.cuh"
#include "kernels/common/gaps.cuh"
#include "kernels/common/launch.cuh"
#include "kernels/common/row_sums.cuh"
#include "kernels/common/sinks.cuh"
#include "kernels/rows/rows.h"
#include "plan/dropout.h"
#include "plan/layout.h"
#include "plan/rows.h"

namespace hbsattn::kernels {
namespace {

constexpr int kRowThreads = 8;  // that share a row
constexpr int kPrepareThreads = kGranule * kRowThreads;
constexpr int kStacksTogether = 4;  // in a CTA of prepare_rows
constexpr int kFinishWarps = 4;
constexpr int kSinkThreads = 1024;
constexpr int64_t kFewBytes = int64_t{1} << 20;  // that prepare_rows clears among its reads
constexpr int kGapCtas = 64;                     // of a head, that share what belongs to no tile

struct RowArguments {
  MaskShape shape;
  const Sequence* sequences;
  BackwardWorkspace workspace;
  TensorView out, grad_out, grad_q;
  const float* lse_in;
  const float* grad_lse;
  float *lse, *delta, *grad_q_sum;
  int64_t rows_q;
  int heads_q;
  bool packed;
  float scale;
  float kept;  // the share of weights that dropout leaves
  uint4* cleared;
  int64_t cleared_vectors;
};

// Of a row of the workspace.
__device__ QueryPlace locate(const RowArguments& args, int chunk, int row_in_chunk) {
  return locate_query(args.shape, args.sequences, args.workspace.chunks, args.rows_q, chunk, row_in_chunk);
}

__device__ int head_of(const RowArguments& args, int stack, const QueryPlace& place) {
  return stack * args.workspace.chunks.stack.heads + place.head;
}

template <class Element>
__device__ Element* address(const TensorView& view, const QueryPlace& place, int head) {
  return static_cast<Element*>(view.data) + place.sequence * view.batch_stride + place.row * view.row_stride +
         head * view.head_stride;
}

__device__ float2 unpack(uint32_t pair, cutlass::bfloat16_t) {
  return __bfloat1622float2(reinterpret_cast<const __nv_bfloat162&>(pair));
}
__device__ float2 unpack(uint32_t pair, cutlass::half_t) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

template <class Element>
__device__ float dot(const uint4& a, const uint4& b) {
  float sum = 0.f;
  const uint32_t words[4][2] = {{a.x, b.x}, {a.y, b.y}, {a.z, b.z}, {a.w, b.w}};
#pragma unroll
  for (const auto& word : words) {
    if constexpr (std::is_same_v<Element, float>) {
      sum += __uint_as_float(word[0]) * __uint_as_float(word[1]);
    } else {
      const float2 x = unpack(word[0], Element{}), y = unpack(word[1], Element{});
      sum += x.x * y.x + x.y * y.y;
    }
  }
  return sum;
}

// A CTA has a chunk of 16 rows of kStacks stacks of heads, one behind the other, a thread up to kVectors vectors of 16
// bytes of a row.
template <class Element, int kVectors, int kStacks>
__global__ void __launch_bounds__(kPrepareThreads) prepare_rows_kernel(const RowArguments args) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int64_t thread = (int64_t{blockIdx.y} * gridDim.x + blockIdx.x) * kPrepareThreads + threadIdx.x;
  for (int64_t i = thread; i < args.cleared_vectors; i += int64_t{gridDim.y} * gridDim.x * kPrepareThreads) {
    args.cleared[i] = make_uint4(0, 0, 0, 0);
  }
  // The first heads last, which find their rows in the L2 cache then.
  const int chunk = blockIdx.x, first_stack = static_cast<int>(gridDim.y - 1 - blockIdx.y) * kStacks;
  const int row = threadIdx.x / kRowThreads, lane = threadIdx.x % kRowThreads;
  const QueryPlace place = locate(args, chunk, row);
  uint4 out[kStacks][kVectors] = {}, grad_out[kStacks][kVectors] = {};
  float lse[kStacks], grad_lse[kStacks];
#pragma unroll
  for (int of_cta = 0; of_cta < kStacks; ++of_cta) {
    lse[of_cta] = -INFINITY;
    grad_lse[of_cta] = 0.f;
    if (!place.exists) continue;
    const int head = head_of(args, first_stack + of_cta, place);
    const auto* out_row = reinterpret_cast<const uint4*>(address<Element>(args.out, place, head));
    const auto* grad_out_row = reinterpret_cast<const uint4*>(address<Element>(args.grad_out, place, head));
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const int vector = lane + i * kRowThreads;
      if (static_cast<int>(16 / sizeof(Element)) * vector >= args.out.columns) continue;
      out[of_cta][i] = __ldcs(out_row + vector);
      grad_out[of_cta][i] = grad_out_row[vector];
    }
    const int64_t entry = args.packed ? 0 : int64_t{place.sequence} * args.heads_q;
    const int64_t position = (entry + head) * args.rows_q + place.row;
    lse[of_cta] = args.lse_in[position];
    if (args.grad_lse != nullptr) grad_lse[of_cta] = args.grad_lse[position];
  }

#pragma unroll
  for (int of_cta = 0; of_cta < kStacks; ++of_cta) {
    float delta = 0.f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) delta += dot<Element>(out[of_cta][i], grad_out[of_cta][i]);
#pragma unroll
    for (int step = kRowThreads / 2; step > 0; step /= 2) delta += __shfl_xor_sync(0xffffffffu, delta, step);
    if (lane == 0) {
      const int64_t to = (first_stack + of_cta) * args.workspace.rows + int64_t{chunk} * kGranule + row;
      const bool empty = lse[of_cta] == -INFINITY;
      // The weights of a row with nothing to attend become exp(s - inf) = 0.
      args.lse[to] = empty ? INFINITY : lse[of_cta] * static_cast<float>(M_LOG2E);
      args.delta[to] = empty ? 0.f : args.kept * (delta - grad_lse[of_cta]);
    }
  }
  if (chunk == 0 && first_stack == 0 && threadIdx.x < BackwardWorkspace::kPaddingRows) {
    const int64_t padding = args.workspace.stacks * args.workspace.rows + threadIdx.x;
    args.lse[padding] = INFINITY;
    args.delta[padding] = 0.f;
  }
}

// A CTA has a head. A sink has the weight w = exp(sink - lse) in a row and no value: its gradient is the sum of
// w * (grad_lse - grad_out . out), and the statistics have what is in brackets.
__global__ void __launch_bounds__(kSinkThreads)
    sum_sinks_kernel(const RowArguments args, const float* sinks, float* grad_sinks) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int heads = args.workspace.chunks.stack.heads, head = blockIdx.x, stack = head / heads;
  const float sink = read_sink(sinks, head) * static_cast<float>(M_LOG2E);
  const float *lse = args.lse + stack * args.workspace.rows, *delta = args.delta + stack * args.workspace.rows;
  float sum = 0.f;
  for (int64_t row = threadIdx.x; row < args.workspace.rows; row += kSinkThreads) {
    if (heads > 1) {
      const QueryPlace place = locate(args, static_cast<int>(row / kGranule), static_cast<int>(row % kGranule));
      if (!place.exists || place.head != head % heads) continue;
    }
    // Rows that do not exist, or attend to nothing, have a log-sum-exp of +inf here. A weight of 0 does not silence a
    // NaN.
    const float weight = exp2f(sink - lse[row]);
    if (weight != 0.f) sum -= weight * delta[row];
  }
  __shared__ float sums[kSinkThreads / 32];
  const auto add_up = [](float x) {
    for (int step = 16; step > 0; step /= 2) x += __shfl_xor_sync(0xffffffffu, x, step);
    return x;
  };
  sum = add_up(sum);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x >= 32) return;
  sum = add_up(sums[threadIdx.x]);
  if (threadIdx.x == 0) grad_sinks[head] = sum / args.kept;
}

// Queries that belong to no chunk, as no tile has them.
template <class Element>
__device__ void write_gaps(const RowArguments& args, int stack, int lane) {
  const int heads = args.workspace.chunks.stack.heads;
  auto* grad_q = static_cast<Element*>(args.grad_q.data) + int64_t{stack} * heads * args.grad_q.head_stride;
  const auto rows = static_cast<int32_t>(args.rows_q);
  visit_gaps(
      args.shape.batch, static_cast<int>(blockIdx.x), mask::smaller<int>(gridDim.x, kGapCtas), lane,
      [&](int index) { return find_query_gap(args.shape, args.sequences, index, rows); },
      [&](int row) {
        clear_row(grad_q, row, args.grad_q.row_stride, args.grad_q.head_stride, heads, args.grad_q.columns,
                  sizeof(Element), lane);
      });
}

// A warp has a chunk. Four floats of a group belong to the lane of an accumulator: two columns of row lane / 4 and two
// of the row 8 further on. kParts: 32 columns each.
template <class Element, int kParts>
__global__ void __launch_bounds__(32 * kFinishWarps) finish_rows_kernel(const RowArguments args, int chunks) {
  // Parts that a lane holds. Of float32 fewer, by registers: its rows are not put together from quads.
  constexpr int kAtOnce = kParts % 4 == 0 && sizeof(Element) == 2 ? 4 : kParts % 3 == 0 ? 3 : 2;
  static_assert(kParts % kAtOnce == 0);
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const auto chunk = static_cast<int>(blockIdx.x * kFinishWarps + threadIdx.x / 32);
  // The last heads first, whose sums are still in the L2 cache.
  const int stack = static_cast<int>(gridDim.y - 1 - blockIdx.y), lane = threadIdx.x % 32;
  if (args.packed && blockIdx.x < kGapCtas && threadIdx.x < 32) write_gaps<Element>(args, stack, lane);
  if (chunk >= chunks) return;
  const int64_t stack_row = stack * args.workspace.rows + int64_t{chunk} * kGranule;
  const float* sums = args.grad_q_sum + stack_row * (32 * kParts);
  Element* rows[2];  // null: the row does not exist, or is done
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int row = lane / 4 + 8 * i;
    const QueryPlace place = locate(args, chunk, row);
    rows[i] = place.exists ? address<Element>(args.grad_q, place, head_of(args, stack, place)) : nullptr;
    if (rows[i] == nullptr || args.lse[stack_row + row] != INFINITY) continue;
    // A row with nothing to attend: keys that only other rows of its tiles attend to may have given it NaNs.
    constexpr int kColumns = 16 / sizeof(Element);
    for (int column = lane % 4 * kColumns; column < args.grad_q.columns; column += 4 * kColumns) {
      *reinterpret_cast<uint4*>(rows[i] + column) = make_uint4(0, 0, 0, 0);
    }
    rows[i] = nullptr;
  }
#pragma unroll
  for (int first = 0; first < kParts; first += kAtOnce) {
    float4 held[kAtOnce][4];
#pragma unroll
    for (int i = 0; i < 4 * kAtOnce; ++i) held[i / 4][i % 4] = read_group(sums + (4 * first + i) * 128, lane);
#pragma unroll
    for (int part = 0; part < kAtOnce; ++part) {
      if constexpr (std::is_same_v<Element, float>) {
#pragma unroll
        for (int group = 0; group < 4; ++group) {
          const float4& sum = held[part][group];
          const int column = (first + part) * 32 + 8 * group + lane % 4 * 2;
          if (column >= args.grad_q.columns) continue;
          if (rows[0] != nullptr) {
            *reinterpret_cast<float2*>(rows[0] + column) = make_float2(args.scale * sum.x, args.scale * sum.y);
          }
          if (rows[1] != nullptr) {
            *reinterpret_cast<float2*>(rows[1] + column) = make_float2(args.scale * sum.z, args.scale * sum.w);
          }
        }
        continue;
      }
      uint32_t columns[2][4];
#pragma unroll
      for (int group = 0; group < 4; ++group) {
        const float4& sum = held[part][group];
        columns[0][group] = pack_pair<Element>(args.scale * sum.x, args.scale * sum.y);
        columns[1][group] = pack_pair<Element>(args.scale * sum.z, args.scale * sum.w);
      }
      const int column = (first + part) * 32 + lane % 4 * 8;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        transpose_quad(columns[i], lane);
        if (rows[i] != nullptr && column < args.grad_q.columns) {
          *reinterpret_cast<uint4*>(rows[i] + column) =
              make_uint4(columns[i][0], columns[i][1], columns[i][2], columns[i][3]);
        }
      }
    }
  }
}

// Calls visit(Element{}) with the dtype of a problem. kFloat32: whether the kernels are compiled for that, too.
template <bool kFloat32 = false, class Visitor>
Status visit_dtype(DType dtype, Visitor&& visit) {
  switch (dtype) {
    case DType::kBFloat16:
      return visit(cutlass::bfloat16_t{});
    case DType::kFloat16:
      return visit(cutlass::half_t{});
    case DType::kFloat32:
      if constexpr (kFloat32) return visit(float{});
      break;
    case DType::kFloat64:
      break;
  }
  return Status::NotSupported("the dtype is number " + std::to_string(static_cast<int>(dtype)) +
                              ", for which no such kernel over rows is compiled");
}

RowArguments row_arguments(const BackwardParams& params, const BackwardWorkspace& workspace) {
  const ForwardParams& problem = params.problem;
  auto* bytes = static_cast<uint8_t*>(params.workspace);
  const int64_t array = workspace.stacks * workspace.rows + BackwardWorkspace::kPaddingRows;
  auto* lse = reinterpret_cast<float*>(bytes + workspace.statistics);
  const Dropout dropout = make_dropout(problem);
  return {problem.mask.shape,
          problem.mask.sequences,
          workspace,
          view_of(problem, problem.out),
          view_of(problem, params.grad_out),
          view_of(problem, params.grad_q),
          problem.lse,
          params.grad_lse,
          lse,
          lse + array,
          reinterpret_cast<float*>(bytes + workspace.sums),
          problem.rows_q,
          problem.heads_q,
          problem.packed,
          problem.softmax_scale * dropout.scale,
          dropout.kept,
          reinterpret_cast<uint4*>(bytes + workspace.tickets),
          0};
}

constexpr int kVector = 8;    // columns of a thread
constexpr int kKeyRows = 16;  // of a CTA

struct KeyArguments {
  const float* sums;          // (2, heads_k, rows, padded head dim): of keys, and of values
  TensorView grad_k, grad_v;  // null: not needed
  float scale;                // of grad_k
  int64_t rows, batch_rows;   // over the batch, and of a batch entry
  int heads_k, padded_head_dim;
};

// Writes the gradients of keys, or of values, that tiles have added up.
template <class Element>
__global__ void __launch_bounds__(kKeyRows * 256 / kVector) finish_keys_kernel(const KeyArguments args) {
  let_next_kernel_start();
  wait_for_earlier_kernels();
  const int head = blockIdx.y, which = blockIdx.z, column = static_cast<int>(threadIdx.x) * kVector;
  const uint32_t row = blockIdx.x * kKeyRows + threadIdx.y;
  const TensorView grad = which == 0 ? args.grad_k : args.grad_v;
  if (row >= args.rows || column >= grad.columns || grad.data == nullptr) return;
  const int64_t head_row = (int64_t{which} * args.heads_k + head) * args.rows + row;
  const auto* sums = reinterpret_cast<const float4*>(args.sums + head_row * args.padded_head_dim + column);
  const float4 first = __ldcs(sums), second = __ldcs(sums + 1);
  const float scale = which == 0 ? args.scale : 1.f;
  const auto batch_rows = static_cast<uint32_t>(args.batch_rows);
  auto* destination = static_cast<Element*>(grad.data) + row / batch_rows * grad.batch_stride +
                      row % batch_rows * grad.row_stride + head * grad.head_stride + column;
  *reinterpret_cast<uint4*>(destination) = make_uint4(
      pack_pair<Element>(scale * first.x, scale * first.y), pack_pair<Element>(scale * first.z, scale * first.w),
      pack_pair<Element>(scale * second.x, scale * second.y), pack_pair<Element>(scale * second.z, scale * second.w));
}

}  // namespace

Status prepare_rows(const BackwardParams& params, const BackwardWorkspace& workspace, Stream stream) {
  RowArguments args = row_arguments(params, workspace);
  if (workspace.zeroed <= kFewBytes) {
    args.cleared_vectors = workspace.zeroed / sizeof(uint4);
  } else {
    // The memory is faster at writing that many by themselves than among the reads of the kernel.
    HBSATTN_RETURN_IF_ERROR(cuda_status(cudaMemsetAsync(args.cleared, 0, workspace.zeroed, stream), "cudaMemsetAsync"));
  }
  return visit_dtype<true>(params.problem.dtype, [&](auto element) {
    using Element = decltype(element);
    constexpr int kOf64 = 64 * sizeof(Element) / (16 * kRowThreads);  // vectors of a thread, of 64 columns
    // What is found for a row serves as many stacks as there are registers for.
    constexpr int kTogether = kOf64 == 1 ? kStacksTogether : 1;
    const bool together = workspace.stacks % kTogether == 0 && args.out.columns <= 128;
    auto* of_64 = together ? prepare_rows_kernel<Element, kOf64, kTogether> : prepare_rows_kernel<Element, kOf64, 1>;
    auto* of_128 =
        together ? prepare_rows_kernel<Element, 2 * kOf64, kTogether> : prepare_rows_kernel<Element, 2 * kOf64, 1>;
    auto* kernel = args.out.columns <= 64    ? of_64
                   : args.out.columns <= 128 ? of_128
                                             : prepare_rows_kernel<Element, 4 * kOf64, 1>;
    const dim3 grid(static_cast<unsigned>(workspace.chunks.count),
                    static_cast<unsigned>(workspace.stacks / (together ? kTogether : 1)));
    return launch("the launch of prepare_rows", kernel, grid, kPrepareThreads, 0, stream, args);
  });
}

Status sum_sinks(const BackwardParams& params, const BackwardWorkspace& workspace, Stream stream) {
  static_assert(kSinkThreads == 32 * 32, "a warp adds up the sums of all warps");
  return launch("the launch of sum_sinks", sum_sinks_kernel, static_cast<unsigned>(params.problem.heads_q),
                kSinkThreads, 0, stream, row_arguments(params, workspace), params.problem.sinks, params.grad_sinks);
}

Status finish_keys(const BackwardParams& params, const BackwardWorkspace& workspace, int padded_head_dim,
                   Stream stream) {
  const ForwardParams& problem = params.problem;
  const int64_t rows = problem.rows_k * (problem.packed ? 1 : problem.mask.shape.batch);
  const auto* sums = reinterpret_cast<const float*>(static_cast<const uint8_t*>(params.workspace) + workspace.sums);
  const TensorView none;
  const KeyArguments args{sums,
                          params.needs_k ? view_of(problem, params.grad_k) : none,
                          params.needs_v ? view_of(problem, params.grad_v) : none,
                          problem.softmax_scale,
                          rows,
                          problem.rows_k,
                          problem.heads_k,
                          padded_head_dim};
  const dim3 grid(static_cast<unsigned>(mask::ceil_div(rows, kKeyRows)), static_cast<unsigned>(problem.heads_k), 2);
  return visit_dtype(problem.dtype, [&](auto element) {
    return launch("the launch of finish_keys", finish_keys_kernel<decltype(element)>, grid,
                  dim3(padded_head_dim / kVector, kKeyRows), 0, stream, args);
  });
}

Status finish_rows(const BackwardParams& params, const BackwardWorkspace& workspace, int padded_head_dim,
                   Stream stream) {
  const RowArguments args = row_arguments(params, workspace);
  const int64_t chunks = workspace.chunks.count;
  const dim3 grid(static_cast<unsigned>(mask::ceil_div(chunks, kFinishWarps)), static_cast<unsigned>(workspace.stacks));
  return visit_dtype<true>(params.problem.dtype, [&](auto element) {
    using Element = decltype(element);
    auto* kernel = padded_head_dim == 64    ? finish_rows_kernel<Element, 2>
                   : padded_head_dim == 96  ? finish_rows_kernel<Element, 3>
                   : padded_head_dim == 128 ? finish_rows_kernel<Element, 4>
                   : padded_head_dim == 192 ? finish_rows_kernel<Element, 6>
                                            : finish_rows_kernel<Element, 8>;
    return launch("the launch of finish_rows", kernel, grid, 32 * kFinishWarps, 0, stream, args,
                  static_cast<int>(chunks));
  });
}

}  // namespace hbsattn::kernels
