// One block-sparse attention call from C++, checked against a double loop on the host. Without a GPU, the same call
// must come back with a Status that says why.

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

constexpr int kBatch = 2;
constexpr int kLengthsQ[kBatch] = {100, 37};
constexpr int kLengthsK[kBatch] = {130, 64};
constexpr int kTotalQ = 137;
constexpr int kTotalK = 194;
constexpr int kHeadsQ = 4;
constexpr int kHeadsK = 2;
constexpr int kMaskHeads = 2;
constexpr int kHeadDim = 64;
constexpr int kQBlock = 32;
constexpr int kKBlock = 48;
constexpr int kRowsOf[kBatch] = {4, 2};  // query blocks of each sequence
constexpr int kColsOf[kBatch] = {3, 2};  // key blocks of each sequence
constexpr int kRows = 6;
constexpr int kCols = 5;         // columns of the flat mask
constexpr int kLongestCols = 3;  // key blocks of the longest sequence
constexpr float kScale = 0.125f;

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
  std::vector<uint8_t> mask = make_mask();
  std::vector<int32_t> cu_seqlens_q = {0, kLengthsQ[0], kTotalQ};
  std::vector<int32_t> cu_seqlens_k = {0, kLengthsK[0], kTotalK};
};

// The definition, in double precision.
void reference(const Problem& problem, std::vector<double>* out, std::vector<double>* lse) {
  out->assign(size_t{kTotalQ} * kHeadsQ * kHeadDim, 0.0);
  lse->assign(size_t{kHeadsQ} * kTotalQ, -std::numeric_limits<double>::infinity());
  for (int b = 0, row = 0, col = 0; b < kBatch; row += kRowsOf[b], col += kColsOf[b], ++b) {
    const int q_begin = problem.cu_seqlens_q[b], k_begin = problem.cu_seqlens_k[b];
    const int shift = kLengthsK[b] - kLengthsQ[b];
    for (int h = 0; h < kHeadsQ; ++h) {
      const int key_head = h / (kHeadsQ / kHeadsK);
      for (int i = 0; i < kLengthsQ[b]; ++i) {
        const uint8_t* blocks = &problem.mask[(key_head * kRows + row + i / kQBlock) * kCols + col];
        std::vector<int> keys;
        std::vector<double> scores;
        double largest = -std::numeric_limits<double>::infinity();
        for (int j = 0; j < kLengthsK[b] && j <= i + shift; ++j) {
          if (!blocks[j / kKBlock]) continue;
          double score = 0;
          for (int d = 0; d < kHeadDim; ++d) {
            score += static_cast<double>(from_bfloat16(problem.q[((q_begin + i) * kHeadsQ + h) * kHeadDim + d])) *
                     from_bfloat16(problem.k[((k_begin + j) * kHeadsK + key_head) * kHeadDim + d]);
          }
          keys.push_back(j);
          scores.push_back(score * kScale);
          largest = std::max(largest, scores.back());
        }
        if (keys.empty()) continue;
        double sum = 0;
        for (double& score : scores) sum += (score = std::exp(score - largest));
        (*lse)[h * kTotalQ + q_begin + i] = largest + std::log(sum);
        for (size_t n = 0; n < keys.size(); ++n) {
          for (int d = 0; d < kHeadDim; ++d) {
            (*out)[((q_begin + i) * kHeadsQ + h) * kHeadDim + d] +=
                scores[n] / sum * from_bfloat16(problem.v[((k_begin + keys[n]) * kHeadsK + key_head) * kHeadDim + d]);
          }
        }
      }
    }
  }
}

// Every call needs pointers to what it reads and writes; they are device pointers where there is a device.
struct Buffers {
  void *q, *k, *v, *out, *lse, *mask, *cu_seqlens_q, *cu_seqlens_k, *sequences, *bits, *items, *scratch, *workspace;
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

hbsattn::Status make_sequences(const Buffers& buffers) {
  hbsattn::SequencesParams params;
  params.shape = mask_shape();
  params.cu_seqlens_q = static_cast<int32_t*>(buffers.cu_seqlens_q);
  params.cu_seqlens_k = static_cast<int32_t*>(buffers.cu_seqlens_k);
  params.sequences = static_cast<hbsattn::Sequence*>(buffers.sequences);
  return hbsattn::make_sequences(params, nullptr);
}

hbsattn::Status pack_mask(const Buffers& buffers) {
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
  return hbsattn::pack_mask(params, nullptr);
}

hbsattn::MaskView mask_view(const Buffers& buffers) {
  return {mask_shape(), static_cast<uint32_t*>(buffers.bits), static_cast<hbsattn::Sequence*>(buffers.sequences)};
}

hbsattn::Status plan_items(const Buffers& buffers) {
  hbsattn::PlanParams params;
  params.mask = mask_view(buffers);
  params.heads_q = kHeadsQ;
  params.heads_k = kHeadsK;
  params.head_dim = kHeadDim;
  params.element_size = 2;
  params.scratch = static_cast<hbsattn::WorkItem*>(buffers.scratch);
  params.items = static_cast<hbsattn::WorkItem*>(buffers.items);
  return hbsattn::plan_items(params, nullptr);
}

hbsattn::ForwardParams forward_params(const Buffers& buffers) {
  hbsattn::ForwardParams params;
  params.q = {buffers.q, 0, kHeadsQ * kHeadDim, kHeadDim};
  params.k = {buffers.k, 0, kHeadsK * kHeadDim, kHeadDim};
  params.v = {buffers.v, 0, kHeadsK * kHeadDim, kHeadDim};
  params.out = {buffers.out, 0, kHeadsQ * kHeadDim, kHeadDim};
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
  params.num_items = hbsattn::num_items(mask_shape(), kHeadsQ, kHeadsK, kHeadDim, true);
  params.workspace = buffers.workspace;
  return params;
}

int fail(const std::string& what) {
  std::printf("FAILED: %s\n", what.c_str());
  return 1;
}

// Wrong input is refused on every machine, in words that name it.
int check_refusals(const Buffers& buffers) {
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
  return 0;
}

int run_without_gpu() {
  // Never read: the calls return before they touch memory.
  std::vector<char> memory(1 << 20);
  char* p = memory.data();
  const Buffers buffers = {p, p, p, p, p, p, p, p, p, p, p, p, p};
  if (int failed = check_refusals(buffers)) return failed;
  for (const auto& [name, status] :
       {std::pair{"make_sequences", make_sequences(buffers)}, std::pair{"pack_mask", pack_mask(buffers)},
        std::pair{"plan_items", plan_items(buffers)},
        std::pair{"forward", hbsattn::forward(forward_params(buffers), nullptr)}}) {
    if (status.ok()) return fail(std::string(name) + " succeeded without a GPU");
    if (status.message.empty()) return fail(std::string(name) + " failed without a message");
    std::printf("%s: no GPU: %s\n", name, status.message.c_str());
  }
  return 0;
}

#ifdef CONSUMER_WITH_CUDA

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

int run_with_gpu() {
  const Problem problem;
  const int64_t items = hbsattn::num_items(mask_shape(), kHeadsQ, kHeadsK, kHeadDim, true);
  Buffers buffers{};
  CHECK_CUDA(upload(problem.q, &buffers.q));
  CHECK_CUDA(upload(problem.k, &buffers.k));
  CHECK_CUDA(upload(problem.v, &buffers.v));
  CHECK_CUDA(upload(problem.mask, &buffers.mask));
  CHECK_CUDA(upload(problem.cu_seqlens_q, &buffers.cu_seqlens_q));
  CHECK_CUDA(upload(problem.cu_seqlens_k, &buffers.cu_seqlens_k));
  CHECK_CUDA(poisoned(problem.q.size() * sizeof(uint16_t), &buffers.out));
  CHECK_CUDA(poisoned(sizeof(float) * kHeadsQ * kTotalQ, &buffers.lse));
  CHECK_CUDA(poisoned(sizeof(hbsattn::Sequence) * kBatch, &buffers.sequences));
  CHECK_CUDA(poisoned(sizeof(uint32_t) * kMaskHeads * kRows * mask_shape().words(), &buffers.bits));
  CHECK_CUDA(poisoned(sizeof(hbsattn::WorkItem) * items, &buffers.items));
  CHECK_CUDA(poisoned(hbsattn::plan_scratch_size(items), &buffers.scratch));
  CHECK_CUDA(poisoned(hbsattn::forward_workspace_size(), &buffers.workspace));
  if (int failed = check_refusals(buffers)) return failed;

  for (const hbsattn::Status& status : {make_sequences(buffers), pack_mask(buffers), plan_items(buffers),
                                        hbsattn::forward(forward_params(buffers), nullptr)}) {
    if (!status.ok()) return fail(status.message);
  }
  CHECK_CUDA(cudaDeviceSynchronize());

  std::vector<uint16_t> out(problem.q.size());
  std::vector<float> lse(size_t{kHeadsQ} * kTotalQ);
  CHECK_CUDA(cudaMemcpy(out.data(), buffers.out, out.size() * sizeof(uint16_t), cudaMemcpyDeviceToHost));
  CHECK_CUDA(cudaMemcpy(lse.data(), buffers.lse, lse.size() * sizeof(float), cudaMemcpyDeviceToHost));

  std::vector<double> expected_out, expected_lse;
  reference(problem, &expected_out, &expected_lse);
  double out_error = 0, lse_error = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    const double error = std::fabs(from_bfloat16(out[i]) - expected_out[i]);
    if (!(error <= 2e-2)) return fail("out[" + std::to_string(i) + "] is off by " + std::to_string(error));
    out_error = std::max(out_error, error);
  }
  int empty = 0;
  for (size_t i = 0; i < lse.size(); ++i) {
    if (std::isinf(expected_lse[i])) {
      if (lse[i] != -std::numeric_limits<float>::infinity()) return fail("lse of an empty row is not -inf");
      ++empty;
      continue;
    }
    const double error = std::fabs(lse[i] - expected_lse[i]);
    if (!(error <= 1e-3)) return fail("lse[" + std::to_string(i) + "] is off by " + std::to_string(error));
    lse_error = std::max(lse_error, error);
  }
  std::printf("GPU: out within %.1e, lse within %.1e, %d empty rows\n", out_error, lse_error, empty);
  return empty > 0 ? 0 : fail("no empty row was tested");
}

bool has_gpu() {
  int devices = 0;
  return cudaGetDeviceCount(&devices) == cudaSuccess && devices > 0 && hbsattn::build_info().cuda;
}

#else

bool has_gpu() { return false; }
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
    if (zero < 3 && hbsattn::backward_by_queries(problem, false)) return false;
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
  return has_gpu() ? run_with_gpu() : run_without_gpu();
}
