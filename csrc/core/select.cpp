#include "core/select.h"

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "hbsattn/hbsattn.h"
#include "plan/rows.h"

namespace hbsattn {
namespace {

constexpr int kVectorBytes = 16;           // what the copy engine moves at least
constexpr const char* kSuitable = "auto";  // what no family is forced is called

KernelFamily family_of(const ForwardParams& problem) { return kernels::current_policy(problem).family; }

// Whether the family that calls of a dtype use has kernels for it.
bool is_compiled(DType dtype) {
  const KernelFamily family = kernels::current_policy(element_size_of(dtype)).family;
  return with_kernels<KernelKind::kForward>(family, [&](auto kernels) {
    return decltype(kernels)::Table::any([&](auto config) { return decltype(config)::kDType == dtype; });
  });
}

// "float16, bfloat16 or float32"
std::string compiled_dtypes() {
  std::vector<std::string> names;
  for (DType dtype : {DType::kFloat16, DType::kBFloat16, DType::kFloat32}) {
    if (is_compiled(dtype)) names.push_back(name_of(dtype));
  }
  std::string all;
  for (size_t i = 0; i < names.size(); ++i) {
    all += (i == 0 ? "" : i + 1 < names.size() ? ", " : " or ") + names[i];
  }
  return all;
}

Status check_dtype(DType dtype) {
  if (is_compiled(dtype)) return Status::Ok();
  return Status::NotSupported(std::string("the dtype of q is ") + name_of(dtype) + "; expected " + compiled_dtypes() +
                              " on CUDA");
}

// Head dims of the compiled kernels that a problem may use.
struct HeadDims {
  KernelTiles tiles;
  int chosen = 0;        // the smallest that is large enough; 0: none is
  int shared_bytes = 0;  // of its CTAs
  int largest = 0;       // 0: there is no kernel
};

template <KernelKind kind>
HeadDims find_head_dims(const ForwardParams& problem, KernelTiles tiles) {
  HeadDims found{tiles};
  with_kernels<kind>(family_of(problem), [&](auto kernels) {
    using Kernels = decltype(kernels);
    return Kernels::Table::any([&](auto config) {
      using Config = decltype(config);
      if (Config::kDType != problem.dtype || !(Kernels::template tiles<Config>() == tiles)) return false;
      if (found.chosen == 0 && problem.head_dim <= Config::kHeadDim) {
        found.chosen = Config::kHeadDim;
        found.shared_bytes = Kernels::template shared_bytes<Config>();
      }
      found.largest = Config::kHeadDim;
      return false;
    });
  });
  return found;
}

// The same, or those of kernels for short values where these suffice.
template <KernelKind kind>
HeadDims find_for_values(const ForwardParams& problem, KernelTiles tiles) {
  const HeadDims found = find_head_dims<kind>(problem, tiles);
  if (view_of(problem, problem.v).columns > kShortValueDim) return found;
  tiles.short_values = true;
  const HeadDims of_short_values = find_head_dims<kind>(problem, tiles);
  return of_short_values.chosen > 0 && of_short_values.chosen <= found.chosen ? of_short_values : found;
}

Status refuse_head_dim(const ForwardParams& problem, int largest, const char* where) {
  const std::string expected = largest > 0 ? "1 to " + std::to_string(largest)
                                           : std::string("a head dim whose kernels this build of hbsattn has");
  const bool of_v = view_of(problem, problem.q).columns < problem.head_dim;
  return Status::NotSupported(std::string(of_v ? "the head dim of v is " : "head_dim is ") +
                              std::to_string(problem.head_dim) + "; expected " + expected + where);
}

// Whether the kernels of a call are those of calls that are altered alone.
bool is_altered_apart(const ForwardParams& problem) {
  const bool apart = with_kernels<KernelKind::kForward>(family_of(problem),
                                                        [](auto kernels) { return decltype(kernels)::kAlteredApart; });
  return apart && is_altered(problem);
}

KernelTiles query_tiles(const ForwardParams& problem, bool for_backward) {
  const TileShape tiles = shape_tiles(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim,
                                      problem.pack_heads, for_backward);
  return {tiles.tile_rows, false, is_altered_apart(problem)};
}

KernelTiles backward_tiles(const BackwardParams& params) {
  const ForwardParams& problem = params.problem;
  const BackwardMethod method = choose_backward_method(params, kernels::current_policy(params));
  return method == BackwardMethod::kByQueries || method == BackwardMethod::kQueriesOnly
             ? query_tiles(problem, true)
             : KernelTiles{shape_key_tiles(problem.mask.shape, problem.head_dim).tile_keys, false,
                           is_altered_apart(problem)};
}

// Whether a forward needs the general kernel, which those for short values have none of.
bool needs_general(const ForwardParams& problem) {
  const TileShape tiles =
      shape_tiles(problem.mask.shape, problem.heads_q, problem.heads_k, problem.head_dim, problem.pack_heads,
                  takes_gradient_tiles(problem, kernels::current_policy(problem)));
  return needs_general_kernel(problem, tiles);
}

HeadDims find_backward_head_dims(const BackwardParams& params) {
  const KernelTiles tiles = backward_tiles(params);
  switch (choose_backward_method(params, kernels::current_policy(params))) {
    case BackwardMethod::kByQueries:
      return find_for_values<KernelKind::kBackwardQueries>(params.problem, tiles);
    case BackwardMethod::kQueriesOnly:
      return find_for_values<KernelKind::kGradQueries>(params.problem, tiles);
    default:
      return find_for_values<KernelKind::kBackwardKeys>(params.problem, tiles);
  }
}

// Methods are chosen for the head dim of a problem; the kernel of a greater one, in a build without its own, may not
// add up gradients of queries, or not find the room for that.
Status check_adding(const BackwardParams& params, const HeadDims& found) {
  const DevicePolicy policy = kernels::current_policy(params);
  if (policy.family != KernelFamily::kSm80 || found.chosen == 0) return Status::Ok();
  if (choose_backward_method(params, policy) != BackwardMethod::kByKeys) return Status::Ok();
  if (found.chosen <= kSm80AddingHeadDim && policy.has_room_to_add(found.chosen, found.tiles.rows)) return Status::Ok();
  return Status::NotSupported("head_dim is " + std::to_string(params.problem.head_dim) +
                              ", for which this build of hbsattn has kernels of head dim " +
                              std::to_string(found.chosen) +
                              " alone; expected deterministic gradients of these, or a " +
                              "build with kernels of head dim " + (params.problem.head_dim <= 64 ? "64" : "96 or 128"));
}

Status select(const ForwardParams& problem, const HeadDims& found, const char* where, KernelKey* key) {
  if (found.chosen == 0) return refuse_head_dim(problem, found.largest, where);
  const int most = kernels::block_shared_bytes();
  if (found.shared_bytes > most && most > 0) {
    return Status::NotSupported("head_dim is " + std::to_string(problem.head_dim) + ", whose kernel takes " +
                                std::to_string(found.shared_bytes) + " bytes of shared memory" + where +
                                "; expected a smaller one, as " +
                                (kernels::shared_bytes_limit() > 0 ? "shared_kilobytes leaves " : "this device has ") +
                                std::to_string(most) + " for a CTA");
  }
  *key = {family_of(problem), problem.dtype, found.chosen, found.tiles};
  return Status::Ok();
}

// What streams keys past tiles of queries.
Status check_keys(const ForwardParams& problem) {
  const int32_t k_block_size = problem.mask.shape.k_block_size;
  if (k_block_size % kGranule == 0 || problem.rows_k < kRaggedKeyLimit) return Status::Ok();
  return Status::NotSupported("k has " + std::to_string(problem.rows_k) + " rows and k_block_size is " +
                              std::to_string(k_block_size) +
                              "; expected fewer than 2^27 rows, or a block size that is a multiple of 16");
}

// What grids and 32-bit numbers of chunks hold.
Status check_backward_sizes(const ForwardParams& problem) {
  constexpr int32_t kMostHeads = 65535;  // of a grid's second dimension
  if (problem.heads_q > kMostHeads) {
    return Status::NotSupported("heads_q is " + std::to_string(problem.heads_q) + "; expected at most " +
                                std::to_string(kMostHeads) + " for gradients on CUDA");
  }
  constexpr int64_t kChunkLimit = (int64_t{1} << 31) - 1, kHeadChunkLimit = int64_t{1} << 28;
  const QueryChunks chunks = chunk_queries(problem);
  const int64_t stacks = problem.heads_q / chunks.stack.heads;
  const bool fits = problem.rows_q < (int64_t{1} << 30 >> chunks.stack.rows_log2);
  if (fits && chunks.count < kHeadChunkLimit && stacks * chunks.count < kChunkLimit) return Status::Ok();
  return Status::NotSupported(
      "q has " + std::to_string(problem.rows_q) + " rows in blocks of " +
      std::to_string(problem.mask.shape.q_block_size) + ", which take " + std::to_string(stacks) + " times " +
      std::to_string(chunks.count) +
      " chunks of 16; expected fewer than 2^28 chunks, 2^31 - 1 in all, and 2^30 rows over heads that are "
      "streamed as one for gradients on CUDA");
}

Status check_head_dim(const char* name, const ForwardParams& problem, const TensorView& tensor) {
  const int32_t columns = view_of(problem, tensor).columns;
  if (columns % kHeadDimMultiple == 0) return Status::Ok();
  return Status::NotSupported(std::string("the head dim of ") + name + " is " + std::to_string(columns) +
                              "; expected a multiple of " + std::to_string(kHeadDimMultiple) +
                              "; copies with zeros behind each row do");
}

// `rows` and `heads`: of a batch entry.
Status check_view(const char* name, const ForwardParams& problem, const TensorView& tensor, int64_t rows, int64_t heads,
                  bool by_rows = false) {
  const TensorView view = view_of(problem, tensor);
  if (addressable(view, problem.dtype, by_rows)) {
    const TensorSpan span = span_tensor(problem, view, rows, heads);
    const int64_t longest = std::max(span.rows, span.heads);
    if (longest < kSm90RowLimit) return Status::Ok();
    return Status::NotSupported(std::string(name) + " spans " + std::to_string(longest) +
                                " rows or heads over its batch; expected fewer than 2^30");
  }
  return Status::NotSupported(std::string(name) + " has strides (" + std::to_string(view.batch_stride) + ", " +
                              std::to_string(view.row_stride) + ", " + std::to_string(view.head_stride) +
                              ", 1) or an address that the copy engine cannot use; expected 16-byte aligned data and "
                              "strides, and a batch stride that is a multiple of the row stride" +
                              (by_rows ? "" : " or of the head stride"));
}

// Whether this build has code of a family for a device.
bool has_code(KernelFamily family, int capability) {
  constexpr int kOldest = 80, kHopper = 90;
  const bool on_hopper = HBSATTN_SM90 && capability == kHopper;
  if (family == KernelFamily::kSm90) return on_hopper;
  return HBSATTN_SM80 && (on_hopper || (HBSATTN_PTX80 && capability >= kOldest));
}

Status check_code(KernelFamily family, int capability) {
  if (has_code(family, capability)) return Status::Ok();
  const bool on_hopper_alone = family == KernelFamily::kSm90 || !HBSATTN_PTX80;
  const std::string expected =
      !on_hopper_alone ? "8.0 or newer"
      : HBSATTN_SM90   ? "9.0 (Hopper)"
                       : std::string("none, as this build of hbsattn has no ") + name_of(family) + " kernels";
  return Status::NotSupported("the device has compute capability " + std::to_string(capability / 10) + "." +
                              std::to_string(capability % 10) + "; expected " + expected);
}

}  // namespace

const char* name_of(KernelFamily family) {
  return with_kernels<KernelKind::kForward>(family, [](auto kernels) { return decltype(kernels)::kFamily; });
}

const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat16:
      return "float16";
    case DType::kBFloat16:
      return "bfloat16";
    case DType::kFloat32:
      return "float32";
    case DType::kFloat64:
      return "float64";
  }
  return "unknown";
}

bool addressable(const TensorView& view, DType dtype, bool by_rows) {
  // A tensor map's strides fit 40 bits; those of rows must also leave room for the wrap of kernels/common/tensor_map.h.
  constexpr int64_t kRowLimit = int64_t{1} << 31, kHeadLimit = int64_t{1} << 40;
  const int64_t row_bytes = view.row_stride * element_size_of(dtype),
                head_bytes = view.head_stride * element_size_of(dtype);
  return reinterpret_cast<uintptr_t>(view.data) % kVectorBytes == 0 && row_bytes > 0 && row_bytes < kRowLimit &&
         row_bytes % kVectorBytes == 0 && head_bytes > 0 && head_bytes < kHeadLimit && head_bytes % kVectorBytes == 0 &&
         view.batch_stride >= 0 &&
         (view.batch_stride % view.row_stride == 0 || (!by_rows && view.batch_stride % view.head_stride == 0));
}

Status check_addressable(const ForwardParams& params) {
  HBSATTN_RETURN_IF_ERROR(check_head_dim("q", params, params.q));
  HBSATTN_RETURN_IF_ERROR(check_head_dim("v", params, params.v));
  HBSATTN_RETURN_IF_ERROR(check_view("q", params, params.q, params.rows_q, params.heads_q));
  HBSATTN_RETURN_IF_ERROR(check_view("k", params, params.k, params.rows_k, params.heads_k));
  HBSATTN_RETURN_IF_ERROR(check_view("v", params, params.v, params.rows_k, params.heads_k));
  return check_view("out", params, params.out, params.rows_q, params.heads_q);
}

Status check_addressable(const BackwardParams& params) {
  const ForwardParams& problem = params.problem;
  HBSATTN_RETURN_IF_ERROR(check_addressable(problem));
  HBSATTN_RETURN_IF_ERROR(check_view("q", problem, problem.q, problem.rows_q, problem.heads_q, true));
  HBSATTN_RETURN_IF_ERROR(check_view("grad_out", problem, params.grad_out, problem.rows_q, problem.heads_q, true));
  if (params.needs_q)
    HBSATTN_RETURN_IF_ERROR(check_view("grad_q", problem, params.grad_q, problem.rows_q, problem.heads_q));
  if (params.needs_k)
    HBSATTN_RETURN_IF_ERROR(check_view("grad_k", problem, params.grad_k, problem.rows_k, problem.heads_k));
  return params.needs_v ? check_view("grad_v", problem, params.grad_v, problem.rows_k, problem.heads_k) : Status::Ok();
}

Status check_device(const DevicePolicy& policy) {
  int capability = 0, multiprocessors = 0;
  HBSATTN_RETURN_IF_ERROR(kernels::current_device(&capability, &multiprocessors));
  return check_code(policy.family, capability);
}

Status use_kernels(const std::string& name) {
  std::optional<KernelFamily> family;
  for (KernelFamily known : {KernelFamily::kSm90, KernelFamily::kSm80}) {
    if (name == name_of(known)) family = known;
  }
  if (!family && name != kSuitable) {
    return Status::InvalidValue("name is " + name + "; expected auto, sm90 or sm80");
  }
  if (family) {
    int capability = 0, multiprocessors = 0;
    Status status = kernels::current_device(&capability, &multiprocessors);
    if (status.ok()) status = check_code(*family, capability);
    if (!status.ok()) {
      status.message = "name is " + name + ", but " + status.message;
      return status;
    }
  }
  kernels::force_family(family);
  return Status::Ok();
}

std::string used_kernels() {
  const std::optional<KernelFamily> family = kernels::forced_family();
  return family ? name_of(*family) : kSuitable;
}

Status limit_shared_memory(int32_t kilobytes) {
  if (kilobytes != 0) {
    int capability = 0, multiprocessors = 0;
    Status status = kernels::current_device(&capability, &multiprocessors);
    if (!status.ok()) {
      status.message = "shared_kilobytes is " + std::to_string(kilobytes) + ", but " + status.message;
      return status;
    }
    const int before = kernels::shared_bytes_limit();
    kernels::limit_shared_bytes(0);
    const int most = kernels::block_shared_bytes() / 1024;
    kernels::limit_shared_bytes(before);
    if (kilobytes < kLeastSharedKilobytes || kilobytes > most) {
      return Status::InvalidValue("shared_kilobytes is " + std::to_string(kilobytes) + "; expected " +
                                  std::to_string(kLeastSharedKilobytes) +
                                  ", the least that devices of compute capability 8.0 or newer have, to " +
                                  std::to_string(most) + ", what this one has");
    }
  }
  kernels::limit_shared_bytes(kilobytes * 1024);
  return Status::Ok();
}

int32_t shared_memory_limit() { return kernels::shared_bytes_limit() / 1024; }

Status select_forward(const ForwardParams& params, KernelKey* key) {
  HBSATTN_RETURN_IF_ERROR(check_device(kernels::current_policy(params)));
  HBSATTN_RETURN_IF_ERROR(check_dtype(params.dtype));
  HBSATTN_RETURN_IF_ERROR(check_keys(params));
  const KernelTiles tiles = query_tiles(params, takes_gradient_tiles(params, kernels::current_policy(params)));
  const HeadDims found = needs_general(params) ? find_head_dims<KernelKind::kForward>(params, tiles)
                                               : find_for_values<KernelKind::kForward>(params, tiles);
  return select(params, found, " on CUDA", key);
}

Status select_pairs(const ForwardParams& params, KernelKey* key) {
  constexpr KernelTiles kTiles{kPairRows, true};
  return select(params, find_head_dims<KernelKind::kForward>(params, kTiles), " on CUDA", key);
}

int choose_backward_head_dim(const BackwardParams& params) { return find_backward_head_dims(params).chosen; }

Status select_backward(const BackwardParams& params, KernelKey* key) {
  HBSATTN_RETURN_IF_ERROR(check_device(kernels::current_policy(params)));
  HBSATTN_RETURN_IF_ERROR(check_dtype(params.problem.dtype));
  HBSATTN_RETURN_IF_ERROR(check_backward_sizes(params.problem));
  // Tiles of keys take them as they are; those of queries tell consumers where blocks end.
  if (backward_lists(params).items) HBSATTN_RETURN_IF_ERROR(check_keys(params.problem));
  const HeadDims found = find_backward_head_dims(params);
  HBSATTN_RETURN_IF_ERROR(check_adding(params, found));
  return select(params.problem, found, " for the backward pass on CUDA", key);
}

Status select_grad_queries(const BackwardParams& params, KernelKey* key) {
  const KernelTiles tiles = query_tiles(params.problem, true);
  return select(params.problem, find_for_values<KernelKind::kGradQueries>(params.problem, tiles),
                " for the gradient of q on CUDA", key);
}

}  // namespace hbsattn
