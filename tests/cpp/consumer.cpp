// Block-sparse attention and its gradients from C++, checked against loops on the host. Without a GPU, the same calls
// must come back with a Status that says why; what they would compute is then not checked, and the program ends with
// kSkipped.

#include <hbsattn/hbsattn.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#ifdef CONSUMER_WITH_CUDA
#include <cuda_runtime_api.h>
#endif

namespace {

constexpr int kSkipped = 77;  // CTest's SKIP_RETURN_CODE in CMakeLists.txt

constexpr int kBatch = 2;
constexpr int kLengthsQ[kBatch] = {300, 290};
constexpr int kLengthsK[kBatch] = {330, 300};
constexpr int kTotalQ = 590;
constexpr int kTotalK = 630;
constexpr int kHeadsQ = 4;
constexpr int kHeadsK = 2;
constexpr int kMaskHeads = 2;
constexpr int kHeadDim = 64;
constexpr int kQBlock = 288;  // over two heads: three tiles of 192 rows in the forward, five of 128 for gradients
constexpr int kKBlock = 48;
constexpr int kRowsOf[kBatch] = {2, 2};  // query blocks of each sequence
constexpr int kColsOf[kBatch] = {7, 7};  // key blocks of each sequence
constexpr int kRows = 4;
constexpr int kCols = 14;        // columns of the flat mask
constexpr int kLongestCols = 7;  // key blocks of the longest sequence
constexpr float kScale = 0.125f;

// Every call needs pointers to what it reads and writes; they are device pointers where there is a device.
struct Buffers {
  void *mask, *cu_seqlens_q, *cu_seqlens_k, *sequences, *bits, *columns;
  void *q, *k, *v, *out, *lse, *items, *scratch, *workspace;
  void *grad_out, *grad_q, *grad_k, *grad_v, *backward_items, *key_items, *key_scratch, *backward_workspace;
};

hbsattn::MaskShape mask_shape() {
  hbsattn::MaskShape shape;
  shape.batch = kBatch;
  shape.heads = kMaskHeads;
  shape.rows = kRows;
  shape.cols = kLongestCols;
  shape.q_block_size = kQBlock;
  shape.k_block_size = kKBlock;
  shape.causal = true;
  return shape;
}

hbsattn::SequencesParams sequences_params(const Buffers& buffers) {
  hbsattn::SequencesParams params;
  params.shape = mask_shape();
  params.cu_seqlens_q = static_cast<int32_t*>(buffers.cu_seqlens_q);
  params.cu_seqlens_k = static_cast<int32_t*>(buffers.cu_seqlens_k);
  params.sequences = static_cast<hbsattn::Sequence*>(buffers.sequences);
  return params;
}

hbsattn::Status make_sequences(const Buffers& buffers) {
  return hbsattn::make_sequences(sequences_params(buffers), nullptr);
}

hbsattn::PackParams pack_params(const Buffers& buffers) {
  hbsattn::PackParams params;
  params.shape = mask_shape();
  params.sequences = static_cast<hbsattn::Sequence*>(buffers.sequences);
  params.source.form = hbsattn::PackSource::Form::kDense;
  params.source.flat = true;
  params.source.dense = static_cast<uint8_t*>(buffers.mask);
  params.source.dense_rows = kRows;
  params.source.dense_cols = kCols;
  params.source.head_stride = kRows * kCols;
  params.source.row_stride = kCols;
  params.source.col_stride = 1;
  params.bits = static_cast<uint32_t*>(buffers.bits);
  return params;
}

hbsattn::Status pack_mask(const Buffers& buffers) { return hbsattn::pack_mask(pack_params(buffers), nullptr); }

hbsattn::MaskView mask_view(const Buffers& buffers) {
  return {mask_shape(), static_cast<uint32_t*>(buffers.bits), static_cast<hbsattn::Sequence*>(buffers.sequences)};
}

int64_t count_items(bool for_backward) {
  return hbsattn::num_items(mask_shape(), kHeadsQ, kHeadsK, kHeadDim, true, for_backward);
}

// A list may have room for more than it needs.
int64_t room_for_items(bool for_backward) { return count_items(for_backward) + 100; }

hbsattn::PlanParams plan_params(const Buffers& buffers, bool for_backward) {
  hbsattn::PlanParams params;
  params.mask = mask_view(buffers);
  params.heads_q = kHeadsQ;
  params.heads_k = kHeadsK;
  params.head_dim = kHeadDim;
  params.element_size = 2;
  params.for_backward = for_backward;
  params.scratch = buffers.scratch;
  params.items = static_cast<hbsattn::WorkItem*>(for_backward ? buffers.backward_items : buffers.items);
  params.num_items = room_for_items(for_backward);
  return params;
}

hbsattn::Status plan_items(const Buffers& buffers, bool for_backward) {
  return hbsattn::plan_items(plan_params(buffers, for_backward), nullptr);
}

// Packed tensors have no batch entries: their stride over the batch says nothing.
hbsattn::TensorView queries(void* data) { return {data, 12345, kHeadsQ * kHeadDim, kHeadDim}; }
hbsattn::TensorView keys(void* data) { return {data, 12345, kHeadsK * kHeadDim, kHeadDim}; }

hbsattn::ForwardParams forward_params(const Buffers& buffers) {
  hbsattn::ForwardParams params;
  params.q = queries(buffers.q);
  params.k = keys(buffers.k);
  params.v = keys(buffers.v);
  params.out = queries(buffers.out);
  params.lse = static_cast<float*>(buffers.lse);
  params.packed = true;
  params.rows_q = kTotalQ;
  params.rows_k = kTotalK;
  params.heads_q = kHeadsQ;
  params.heads_k = kHeadsK;
  params.head_dim = kHeadDim;
  params.dtype = hbsattn::DType::kBFloat16;
  params.softmax_scale = kScale;
  params.mask = mask_view(buffers);
  params.items = static_cast<hbsattn::WorkItem*>(buffers.items);
  params.num_items = room_for_items(false);
  params.workspace = buffers.workspace;
  return params;
}

hbsattn::Status transpose_mask(const Buffers& buffers) {
  return hbsattn::transpose_mask({mask_view(buffers), static_cast<uint32_t*>(buffers.columns)}, nullptr);
}

hbsattn::KeyPlanParams key_plan_params(const Buffers& buffers, bool deterministic) {
  hbsattn::KeyPlanParams params;
  params.mask = mask_view(buffers);
  params.columns = static_cast<uint32_t*>(buffers.columns);
  params.heads_q = kHeadsQ;
  params.heads_k = kHeadsK;
  params.head_dim = kHeadDim;
  params.element_size = 2;
  params.deterministic = deterministic;
  params.packed = true;
  params.rows_k = kTotalK;
  params.scratch = buffers.key_scratch;
  params.items = static_cast<hbsattn::KeyItem*>(buffers.key_items);
  params.num_items = hbsattn::num_key_items(params) + 100;
  return params;
}

// What of a backward is asked for.
struct Gradients {
  bool deterministic = false;
  bool q = true, k = true, v = true;
};

// Lists that a backward does not read, and gradients that it need not write, are null.
hbsattn::BackwardParams backward_params(const Buffers& buffers, const Gradients& gradients) {
  hbsattn::BackwardParams params;
  params.problem = forward_params(buffers);
  params.deterministic = gradients.deterministic;
  params.needs_q = gradients.q;
  params.needs_k = gradients.k;
  params.needs_v = gradients.v;
  const hbsattn::BackwardLists lists = hbsattn::backward_lists(params);
  params.problem.items = lists.items ? static_cast<hbsattn::WorkItem*>(buffers.backward_items) : nullptr;
  params.problem.num_items = room_for_items(true);
  if (lists.keys) {
    params.columns = static_cast<uint32_t*>(buffers.columns);
    params.key_items = static_cast<hbsattn::KeyItem*>(buffers.key_items);
    params.num_key_items = key_plan_params(buffers, gradients.deterministic).num_items;
  }
  params.grad_out = queries(buffers.grad_out);
  if (gradients.q) params.grad_q = queries(buffers.grad_q);
  if (gradients.k) params.grad_k = keys(buffers.grad_k);
  if (gradients.v) params.grad_v = keys(buffers.grad_v);
  params.workspace = buffers.backward_workspace;
  return params;
}

int fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  return 1;
}

// Pointers for calls that return before they touch memory.
Buffers make_unread_buffers() {
  static char memory;
  void* p = &memory;
  return {p, p, p, p, p, p, p, p, p, p, p, p, p, p, p, p, p, p, p, p, p, p};
}

// Gradients that are not needed take neither lists nor workspace.
int check_frozen() {
  const Buffers buffers = make_unread_buffers();
  const auto lists = [&](const Gradients& gradients) {
    return hbsattn::backward_lists(backward_params(buffers, gradients));
  };
  for (const bool deterministic : {false, true}) {
    if (lists({deterministic, true, false, false}).keys)
      return fail("keys are frozen, and yet there are tiles of them");
    if (lists({deterministic, false, true, true}).items) return fail("queries are frozen, and yet there are tiles");
    if (lists({deterministic, true, false, true}).keys != deterministic) return fail("one frozen tensor changes lists");
  }
  const Gradients none{false, false, false, false};
  if (lists(none).items || lists(none).keys) return fail("a backward that computes nothing wants lists");
  if (hbsattn::backward_workspace_size(backward_params(buffers, none)) != 0)
    return fail("nor does it need a workspace");
  return 0;
}

// Wrong input is refused on every machine, in words that name it.
int check_refusals() {
  const Buffers buffers = make_unread_buffers();
  hbsattn::MaskShape shape = mask_shape();
  shape.q_block_size = 0;
  hbsattn::Status status = hbsattn::validate_mask(shape);
  if (status.code != hbsattn::StatusCode::kInvalidValue) return fail("validate_mask took a q_block_size of 0");
  if (status.message.find("q_block_size") == std::string::npos) return fail("unclear message: " + status.message);

  hbsattn::ForwardParams params = forward_params(buffers);
  if (!(status = hbsattn::validate_forward(params)).ok()) return fail("validate_forward: " + status.message);
  params.heads_q = 3;
  status = hbsattn::forward(params, nullptr);
  if (status.code != hbsattn::StatusCode::kInvalidValue) return fail("forward took 3 query heads for 2 key heads");
  if (status.message.find("heads_q") == std::string::npos) return fail("unclear message: " + status.message);

  // Values of another head dim: the problem's is the greater one.
  params = forward_params(buffers);
  params.v.columns = params.out.columns = kHeadDim / 2;
  if (!(status = hbsattn::validate_forward(params)).ok()) return fail("validate_forward: " + status.message);
  params.v.columns = params.out.columns = 2 * kHeadDim;
  status = hbsattn::validate_forward(params);
  if (status.code != hbsattn::StatusCode::kInvalidValue) return fail("forward took values wider than the problem");
  if (status.message.find("v.columns") == std::string::npos) return fail("unclear message: " + status.message);

  // Rows of a tile are numbered on past the last one of a block, over the heads that share it.
  hbsattn::PlanParams plan;
  plan.mask = mask_view(buffers);
  plan.heads_q = kHeadsQ;
  plan.heads_k = kHeadsK;
  plan.head_dim = kHeadDim;
  plan.mask.shape.q_block_size = (std::numeric_limits<int32_t>::max() - 255) / kHeadsQ - 1;
  if (!(status = hbsattn::validate_plan(plan)).ok()) return fail("validate_plan: " + status.message);
  ++plan.mask.shape.q_block_size;
  status = hbsattn::validate_plan(plan);
  if (status.code != hbsattn::StatusCode::kInvalidValue) return fail("validate_plan took a block with too many rows");
  if (status.message.find("q_block_size") == std::string::npos) return fail("unclear message: " + status.message);

  for (const bool deterministic : {false, true}) {
    hbsattn::BackwardParams gradients = backward_params(buffers, Gradients{deterministic});
    if (!(status = hbsattn::validate_backward(gradients)).ok()) return fail("validate_backward: " + status.message);
    const hbsattn::BackwardLists lists = hbsattn::backward_lists(gradients);
    if (!lists.items || lists.keys != deterministic) {
      return fail("this case should plan gradients by queries, and also by keys if they are deterministic");
    }
    if (!deterministic) continue;
    gradients.num_key_items = hbsattn::num_key_items(key_plan_params(buffers, deterministic)) - 1;
    status = hbsattn::backward(gradients, nullptr);
    if (status.code != hbsattn::StatusCode::kInvalidValue) return fail("backward took too few key items");
    if (status.message.find("key work items") == std::string::npos) return fail("unclear message: " + status.message);
  }
  return check_frozen();
}

int run_without_gpu(const char* reason) {
  const Buffers buffers = make_unread_buffers();
  for (const auto& [name, status] :
       {std::pair{"make_sequences", make_sequences(buffers)}, std::pair{"pack_mask", pack_mask(buffers)},
        std::pair{"plan_items", plan_items(buffers, false)},
        std::pair{"forward", hbsattn::forward(forward_params(buffers), nullptr)},
        std::pair{"transpose_mask", transpose_mask(buffers)},
        std::pair{"plan_keys", hbsattn::plan_keys(key_plan_params(buffers, true), nullptr)},
        std::pair{"backward", hbsattn::backward(backward_params(buffers, Gradients{}), nullptr)},
        std::pair{"backward", hbsattn::backward(backward_params(buffers, Gradients{true}), nullptr)}}) {
    if (status.ok()) return fail(std::string(name) + " succeeded without a GPU");
    if (status.message.empty()) return fail(std::string(name) + " failed without a message");
    std::printf("%s is refused, as it should be: %s\n", name, status.message.c_str());
  }
  std::printf("SKIPPED: forward and backward were not computed: %s. All that needs no GPU passed.\n", reason);
  return kSkipped;
}

#ifdef CONSUMER_WITH_CUDA

float from_bfloat16(uint16_t x) {
  uint32_t bits = static_cast<uint32_t>(x) << 16;
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

// Numbers in (-2, 2) that bfloat16 holds exactly.
std::vector<uint16_t> random_bfloat16(size_t count, uint32_t seed) {
  std::vector<uint16_t> values(count);
  for (uint16_t& value : values) {
    seed = seed * 1664525u + 1013904223u;
    const float number = static_cast<float>(static_cast<int>(seed >> 24) - 128) / 64.f;
    uint32_t bits;
    std::memcpy(&bits, &number, sizeof(bits));
    value = static_cast<uint16_t>(bits >> 16);
  }
  return values;
}

// A flat mask with about half of the blocks on; the second block row of the last sequence is empty, and what lies off
// the block diagonal is on but must be ignored.
std::vector<uint8_t> make_mask() {
  std::vector<uint8_t> mask(kMaskHeads * kRows * kCols, 1);
  for (int h = 0; h < kMaskHeads; ++h) {
    for (int b = 0, row = 0, col = 0; b < kBatch; row += kRowsOf[b], col += kColsOf[b], ++b) {
      for (int i = 0; i < kRowsOf[b]; ++i) {
        for (int c = 0; c < kColsOf[b]; ++c) {
          const bool empty_row = b == kBatch - 1 && i == 1;
          mask[(h * kRows + row + i) * kCols + col + c] = !empty_row && (c + i + h) % 2 == 0;
        }
      }
    }
  }
  return mask;
}

struct Problem {
  std::vector<uint16_t> q = random_bfloat16(size_t{kTotalQ} * kHeadsQ * kHeadDim, 1);
  std::vector<uint16_t> k = random_bfloat16(size_t{kTotalK} * kHeadsK * kHeadDim, 2);
  std::vector<uint16_t> v = random_bfloat16(size_t{kTotalK} * kHeadsK * kHeadDim, 3);
  std::vector<uint16_t> grad_out = random_bfloat16(q.size(), 4);
  std::vector<uint8_t> mask = make_mask();
  std::vector<int32_t> cu_seqlens_q = {0, kLengthsQ[0], kTotalQ};
  std::vector<int32_t> cu_seqlens_k = {0, kLengthsK[0], kTotalK};
};

double dot(const uint16_t* x, const uint16_t* y) {
  double sum = 0;
  for (int d = 0; d < kHeadDim; ++d) sum += static_cast<double>(from_bfloat16(x[d])) * from_bfloat16(y[d]);
  return sum;
}

void add(double factor, const uint16_t* x, double* sum) {
  for (int d = 0; d < kHeadDim; ++d) sum[d] += factor * from_bfloat16(x[d]);
}

struct Results {
  std::vector<double> out = std::vector<double>(size_t{kTotalQ} * kHeadsQ * kHeadDim);
  std::vector<double> lse = std::vector<double>(size_t{kHeadsQ} * kTotalQ, -std::numeric_limits<double>::infinity());
  std::vector<double> grad_q = out;
  std::vector<double> grad_k = std::vector<double>(size_t{kTotalK} * kHeadsK * kHeadDim);
  std::vector<double> grad_v = grad_k;
};

// The definition, in double precision, and its derivative.
Results reference(const Problem& problem) {
  Results results;
  for (int b = 0, row = 0, col = 0; b < kBatch; row += kRowsOf[b], col += kColsOf[b], ++b) {
    const int shift = kLengthsK[b] - kLengthsQ[b];
    for (int h = 0; h < kHeadsQ; ++h) {
      const int key_head = h / (kHeadsQ / kHeadsK);
      for (int i = 0; i < kLengthsQ[b]; ++i) {
        const int query = ((problem.cu_seqlens_q[b] + i) * kHeadsQ + h) * kHeadDim;
        const uint16_t *q = &problem.q[query], *grad_out = &problem.grad_out[query];
        const uint8_t* blocks = &problem.mask[(key_head * kRows + row + i / kQBlock) * kCols + col];
        std::vector<int> keys;
        std::vector<double> weights;
        double largest = -std::numeric_limits<double>::infinity();
        for (int j = 0; j < kLengthsK[b] && j <= i + shift; ++j) {
          if (!blocks[j / kKBlock]) continue;
          keys.push_back(((problem.cu_seqlens_k[b] + j) * kHeadsK + key_head) * kHeadDim);
          weights.push_back(kScale * dot(q, &problem.k[keys.back()]));
          largest = std::max(largest, weights.back());
        }
        if (keys.empty()) continue;
        double sum = 0;
        for (double& weight : weights) sum += (weight = std::exp(weight - largest));
        results.lse[h * kTotalQ + problem.cu_seqlens_q[b] + i] = largest + std::log(sum);
        double delta = 0;  // what the row of the output and its gradient multiply to
        for (size_t n = 0; n < keys.size(); ++n) {
          weights[n] /= sum;
          add(weights[n], &problem.v[keys[n]], &results.out[query]);
          delta += weights[n] * dot(grad_out, &problem.v[keys[n]]);
        }
        for (size_t n = 0; n < keys.size(); ++n) {
          const double grad_score = kScale * weights[n] * (dot(grad_out, &problem.v[keys[n]]) - delta);
          add(grad_score, &problem.k[keys[n]], &results.grad_q[query]);
          add(grad_score, q, &results.grad_k[keys[n]]);
          add(weights[n], grad_out, &results.grad_v[keys[n]]);
        }
      }
    }
  }
  return results;
}

#define CHECK_CUDA(expression)                                                                        \
  do {                                                                                                \
    const cudaError_t error = (expression);                                                           \
    if (error != cudaSuccess) return fail(#expression ": " + std::string(cudaGetErrorString(error))); \
  } while (0)

template <class T>
cudaError_t upload(const std::vector<T>& values, void** device) {
  const size_t bytes = values.size() * sizeof(T);
  const cudaError_t error = cudaMalloc(device, bytes);
  return error != cudaSuccess ? error : cudaMemcpy(*device, values.data(), bytes, cudaMemcpyHostToDevice);
}

// Device memory whose every byte is 0xff, a NaN in all floating-point types.
cudaError_t poisoned(size_t bytes, void** device) {
  const cudaError_t error = cudaMalloc(device, std::max<size_t>(bytes, 1));
  return error != cudaSuccess ? error : cudaMemset(*device, 0xff, bytes);
}

// Compares bfloat16 numbers on the device; an error may be a hundredth of the largest number.
int compare(const char* name, const void* device, const std::vector<double>& expected) {
  std::vector<uint16_t> got(expected.size());
  CHECK_CUDA(cudaMemcpy(got.data(), device, got.size() * sizeof(uint16_t), cudaMemcpyDeviceToHost));
  double largest = 0, largest_error = 0;
  for (const double number : expected) largest = std::max(largest, std::fabs(number));
  for (size_t i = 0; i < got.size(); ++i) {
    const double error = std::fabs(from_bfloat16(got[i]) - expected[i]);
    if (!(error <= 1e-2 * largest)) {
      return fail(std::string(name) + "[" + std::to_string(i) + "] is off by " + std::to_string(error));
    }
    largest_error = std::max(largest_error, error);
  }
  std::printf("GPU: %s within %.1e, of up to %.1f\n", name, largest_error, largest);
  return 0;
}

int compare_lse(const void* device, const std::vector<double>& expected) {
  std::vector<float> got(expected.size());
  CHECK_CUDA(cudaMemcpy(got.data(), device, got.size() * sizeof(float), cudaMemcpyDeviceToHost));
  int empty = 0;
  for (size_t i = 0; i < got.size(); ++i) {
    if (std::isinf(expected[i])) {
      if (got[i] != -std::numeric_limits<float>::infinity()) return fail("lse of an empty row is not -inf");
      ++empty;
    } else if (const double error = std::fabs(got[i] - expected[i]); !(error <= 1e-3)) {
      return fail("lse[" + std::to_string(i) + "] is off by " + std::to_string(error));
    }
  }
  std::printf("GPU: lse, with %d empty rows\n", empty);
  return empty > 0 ? 0 : fail("no empty row was tested");
}

// Mask, plan and forward in fewer launches: the table of sequences is made with the bits, the workspace cleared with
// the list.
hbsattn::Status run_short_chain(const Buffers& buffers) {
  hbsattn::PackParams pack = pack_params(buffers);
  pack.table = sequences_params(buffers);
  HBSATTN_RETURN_IF_ERROR(hbsattn::pack_mask(pack, nullptr));
  hbsattn::PlanParams plan = plan_params(buffers, false);
  plan.workspace = buffers.workspace;
  HBSATTN_RETURN_IF_ERROR(hbsattn::plan_items(plan, nullptr));
  hbsattn::ForwardParams params = forward_params(buffers);
  params.workspace_is_clear = true;
  return hbsattn::forward(params, nullptr);
}

// A table that is not the mask's is refused.
int check_tables(const Buffers& buffers) {
  hbsattn::PackParams pack = pack_params(buffers);
  pack.table = sequences_params(buffers);
  pack.table.shape.batch = kBatch - 1;
  hbsattn::Status status = hbsattn::pack_mask(pack, nullptr);
  if (status.code != hbsattn::StatusCode::kInvalidValue) return fail("pack_mask took a table of another batch");
  if (status.message.find("table.shape.batch") == std::string::npos) return fail("unclear message: " + status.message);
  pack.table = sequences_params(buffers);
  ++pack.table.sequences;
  status = hbsattn::pack_mask(pack, nullptr);
  if (status.code != hbsattn::StatusCode::kInvalidValue) return fail("pack_mask took two tables");
  return 0;
}

int run_forward(Buffers& buffers, const Problem& problem, const Results& expected) {
  const int64_t items = room_for_items(false), backward_items = room_for_items(true);
  if (items == backward_items) return fail("this case should have other tiles in the forward than for gradients");
  CHECK_CUDA(upload(problem.q, &buffers.q));
  CHECK_CUDA(upload(problem.k, &buffers.k));
  CHECK_CUDA(upload(problem.v, &buffers.v));
  CHECK_CUDA(upload(problem.mask, &buffers.mask));
  CHECK_CUDA(upload(problem.cu_seqlens_q, &buffers.cu_seqlens_q));
  CHECK_CUDA(upload(problem.cu_seqlens_k, &buffers.cu_seqlens_k));
  CHECK_CUDA(poisoned(hbsattn::plan_scratch_size(std::max(items, backward_items)), &buffers.scratch));
  for (const bool fewer_launches : {true, false}) {
    CHECK_CUDA(poisoned(problem.q.size() * sizeof(uint16_t), &buffers.out));
    CHECK_CUDA(poisoned(sizeof(float) * kHeadsQ * kTotalQ, &buffers.lse));
    CHECK_CUDA(poisoned(sizeof(hbsattn::Sequence) * kBatch, &buffers.sequences));
    CHECK_CUDA(poisoned(sizeof(uint32_t) * kMaskHeads * kRows * mask_shape().words(), &buffers.bits));
    CHECK_CUDA(poisoned(sizeof(hbsattn::WorkItem) * items, &buffers.items));
    CHECK_CUDA(poisoned(hbsattn::forward_workspace_size(), &buffers.workspace));
    if (fewer_launches) {
      if (const hbsattn::Status status = run_short_chain(buffers); !status.ok()) return fail(status.message);
    } else {
      for (const hbsattn::Status& status : {make_sequences(buffers), pack_mask(buffers), plan_items(buffers, false),
                                            hbsattn::forward(forward_params(buffers), nullptr)}) {
        if (!status.ok()) return fail(status.message);
      }
    }
    CHECK_CUDA(cudaDeviceSynchronize());
    if (int failed = compare("out", buffers.out, expected.out)) return failed;
    if (int failed = compare_lse(buffers.lse, expected.lse)) return failed;
  }
  return check_tables(buffers);
}

// Plans what these gradients need, and computes them.
hbsattn::Status backward(const Buffers& buffers, const Gradients& gradients) {
  const hbsattn::BackwardParams params = backward_params(buffers, gradients);
  const hbsattn::BackwardLists lists = hbsattn::backward_lists(params);
  if (lists.items) HBSATTN_RETURN_IF_ERROR(plan_items(buffers, true));
  if (lists.keys) {
    HBSATTN_RETURN_IF_ERROR(transpose_mask(buffers));
    HBSATTN_RETURN_IF_ERROR(hbsattn::plan_keys(key_plan_params(buffers, gradients.deterministic), nullptr));
  }
  return hbsattn::backward(params, nullptr);
}

// After a forward, whose results it reads.
int run_backward(Buffers& buffers, const Problem& problem, const Results& expected, const Gradients& gradients) {
  const int64_t items = room_for_items(true);
  const int64_t key_items = key_plan_params(buffers, gradients.deterministic).num_items;
  const size_t workspace_bytes = hbsattn::backward_workspace_size(backward_params(buffers, gradients));
  CHECK_CUDA(upload(problem.grad_out, &buffers.grad_out));
  CHECK_CUDA(poisoned(problem.q.size() * sizeof(uint16_t), &buffers.grad_q));
  CHECK_CUDA(poisoned(problem.k.size() * sizeof(uint16_t), &buffers.grad_k));
  CHECK_CUDA(poisoned(problem.v.size() * sizeof(uint16_t), &buffers.grad_v));
  CHECK_CUDA(poisoned(sizeof(uint32_t) * kMaskHeads * kLongestCols * mask_shape().row_words(), &buffers.columns));
  CHECK_CUDA(poisoned(sizeof(hbsattn::WorkItem) * items, &buffers.backward_items));
  CHECK_CUDA(poisoned(sizeof(hbsattn::KeyItem) * key_items, &buffers.key_items));
  CHECK_CUDA(poisoned(hbsattn::key_plan_scratch_size(key_items), &buffers.key_scratch));
  CHECK_CUDA(poisoned(workspace_bytes, &buffers.backward_workspace));
  if (const hbsattn::Status status = backward(buffers, gradients); !status.ok()) return fail(status.message);
  CHECK_CUDA(cudaDeviceSynchronize());
  if (gradients.q) {
    if (int failed = compare("grad_q", buffers.grad_q, expected.grad_q)) return failed;
  }
  if (gradients.k) {
    if (int failed = compare("grad_k", buffers.grad_k, expected.grad_k)) return failed;
  }
  return gradients.v ? compare("grad_v", buffers.grad_v, expected.grad_v) : 0;
}

// What a call would do is told in the words of build_info, with the lengths of its lists.
int check_explanations() {
  const Buffers buffers = make_unread_buffers();
  const auto is_compiled = [](const std::string& name) {
    const auto kernels = hbsattn::build_info().kernels;
    return std::any_of(kernels.begin(), kernels.end(), [&](const auto& kernel) { return kernel.name == name; });
  };
  hbsattn::Explanation told;
  hbsattn::Status status = hbsattn::explain(forward_params(buffers), &told);
  if (!status.ok()) return fail("explain: " + status.message);
  if (!is_compiled(told.kernel) || told.tile_rows != 192 || told.num_items != count_items(false)) {
    return fail("a forward is explained by " + told.kernel);
  }
  status = hbsattn::explain(backward_params(buffers, Gradients{true}), &told);
  if (!status.ok()) return fail("explain: " + status.message);
  if (told.method != "deterministic" || !is_compiled(told.kernel) || !is_compiled(told.queries_kernel) ||
      told.num_items != count_items(true) ||
      told.num_key_items != hbsattn::num_key_items(key_plan_params(buffers, true))) {
    return fail("a deterministic backward is explained as " + told.method + " by " + told.kernel);
  }
  return 0;
}

int run_with_gpu() {
  if (int failed = check_explanations()) return failed;
  const Problem problem;
  const Results expected = reference(problem);
  Buffers buffers{};
  if (int failed = run_forward(buffers, problem, expected)) return failed;
  const Gradients all[] = {{},                           // by tiles of queries
                           {true},                       // by tiles of keys, then of queries
                           {false, true, false, true},   // without those of keys
                           {true, true, true, false},    // without those of values
                           {false, true, false, false},  // of queries alone
                           {false, false, true, true},   // of keys and values alone
                           {true, false, true, false},   // of keys alone
                           {false, false, false, false}};
  for (const Gradients& gradients : all) {
    if (int failed = run_backward(buffers, problem, expected, gradients)) return failed;
  }
  std::printf("GPU: forward and backward passed\n");
  return 0;
}

// Null where there is a GPU to compute on.
const char* find_reason_to_skip() {
  if (!hbsattn::build_info().cuda) return "the library was built without CUDA";
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 ? nullptr : "this machine has no CUDA device";
}

#else

const char* find_reason_to_skip() { return "this program was built without a CUDA toolkit"; }
int run_with_gpu() { return 1; }

#endif

// Sizes that no check has seen are answered, not divided by.
bool answers_unchecked_sizes() {
  hbsattn::BackwardParams params;
  hbsattn::ForwardParams& problem = params.problem;
  problem.head_dim = 64;
  for (const int zero : {0, 1, 2, 3}) {
    problem.heads_q = problem.heads_k = zero == 0 ? 0 : 2;
    if (zero == 1) problem.heads_k = 0;
    problem.mask.shape.q_block_size = zero == 2 ? 0 : 128;
    problem.mask.shape.k_block_size = zero == 3 ? 0 : 16;
    if (hbsattn::backward_workspace_size(params) != 0) return false;
    if (zero < 3 && !hbsattn::backward_lists(params).keys) return false;
  }
  return true;
}

}  // namespace

int main() {
  if (!answers_unchecked_sizes()) {
    std::printf("a size of 0 was taken for a problem\n");
    return 1;
  }
  const hbsattn::BuildInfo info = hbsattn::build_info();
  std::printf("hbsattn: %zu kernels, CUDA %s\n", info.kernels.size(), info.cuda ? info.cuda_version.c_str() : "none");
  if (int failed = check_refusals()) return failed;
  const char* reason = find_reason_to_skip();
  return reason == nullptr ? run_with_gpu() : run_without_gpu(reason);
}
