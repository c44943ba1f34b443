// hbsattn._C: what this build contains. Loading it registers the operators of schemas.cpp.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <set>
#include <string>
#include <utility>

#include "hbsattn/hbsattn.h"
#include "torch/checks.h"

namespace py = pybind11;

namespace {

const char* name_of(hbsattn::DType dtype) {
  switch (dtype) {
    case hbsattn::DType::kFloat16:
      return "float16";
    case hbsattn::DType::kBFloat16:
      return "bfloat16";
    case hbsattn::DType::kFloat32:
      return "float32";
    case hbsattn::DType::kFloat64:
      return "float64";
  }
  return "unknown";
}

// Of CPU tensors, in every build: all that the operators' checks let through.
constexpr hbsattn::DType kCpuDTypes[] = {hbsattn::DType::kFloat16, hbsattn::DType::kBFloat16, hbsattn::DType::kFloat32,
                                         hbsattn::DType::kFloat64};

py::dict build_info() {
  const hbsattn::BuildInfo info = hbsattn::build_info();
  std::set<std::string> archs, dtypes;
  std::set<int> head_dims;
  py::list kernels;
  for (const hbsattn::KernelInfo& kernel : info.kernels) {
    archs.insert(kernel.arch);
    dtypes.insert(name_of(kernel.dtype));
    head_dims.insert(kernel.head_dim);
    py::dict entry;
    entry["name"] = kernel.name;
    entry["arch"] = kernel.arch;
    entry["dtype"] = name_of(kernel.dtype);
    entry["head_dim"] = kernel.head_dim;
    entry["value_dim"] = kernel.value_dim;
    entry["tile_m"] = kernel.tile_m;
    entry["tile_n"] = kernel.tile_n;
    entry["key_stages"] = kernel.key_stages;
    entry["value_stages"] = kernel.value_stages;
    entry["shared_bytes"] = kernel.shared_bytes;
    kernels.append(entry);
  }
  auto sorted = [](const auto& names) {
    py::list list;
    for (const auto& name : names) list.append(name);
    return list;
  };
  py::dict result;
  result["cuda"] = info.cuda;
  result["cuda_version"] = info.cuda_version;
  result["cutlass_version"] = info.cutlass_version;
  result["archs"] = sorted(archs);
  result["head_dims"] = sorted(head_dims);
  result["dtypes"] = sorted(dtypes);
  result["kernels"] = kernels;
  py::list cpu_dtypes;
  for (const hbsattn::DType dtype : kCpuDTypes) cpu_dtypes.append(name_of(dtype));
  result["cpu_dtypes"] = cpu_dtypes;
  return result;
}

hbsattn::DType dtype_of(const std::string& name) {
  for (const hbsattn::DType dtype : kCpuDTypes) {
    if (name == name_of(dtype)) return dtype;
  }
  TORCH_CHECK_TYPE(false, "q has dtype " + name + "; expected float16, bfloat16, float32 or float64");
}

py::dict to_dict(const hbsattn::Explanation& explanation) {
  py::dict entry;
  entry["method"] = explanation.method;
  entry["kernel"] = explanation.kernel;
  entry["queries_kernel"] = explanation.queries_kernel;
  entry["pairs_kernel"] = explanation.pairs_kernel;
  entry["general"] = explanation.general;
  entry["tile_rows"] = explanation.tile_rows;
  entry["stage_rows"] = explanation.stage_rows;
  entry["tile_heads"] = explanation.tile_heads;
  entry["num_items"] = explanation.num_items;
  entry["num_key_items"] = explanation.num_key_items;
  return entry;
}

// `queries` and `keys`: rows and heads; `head_dims`: of q and of v; `mask`: batch, heads, rows and cols; `blocks`:
// queries and keys of a block.
std::pair<py::dict, py::dict> explain(const std::string& dtype, bool packed, std::array<int64_t, 2> queries,
                                      std::array<int64_t, 2> keys, std::array<int32_t, 2> head_dims,
                                      std::array<int64_t, 4> mask, std::array<int32_t, 2> blocks, bool causal,
                                      bool ruled, bool partial, bool deterministic, std::array<bool, 3> needs,
                                      double softcap, double dropout_p) {
  hbsattn::BackwardParams params;
  hbsattn::ForwardParams& problem = params.problem;
  problem.dtype = dtype_of(dtype);
  problem.packed = packed;
  problem.rows_q = queries[0];
  problem.heads_q = static_cast<int32_t>(queries[1]);
  problem.rows_k = keys[0];
  problem.heads_k = static_cast<int32_t>(keys[1]);
  problem.head_dim = std::max(head_dims[0], head_dims[1]);
  problem.q.columns = problem.k.columns = head_dims[0];
  problem.v.columns = problem.out.columns = head_dims[1];
  problem.softmax_scale = 1.f;
  problem.softcap = static_cast<float>(softcap);
  problem.dropout_p = dropout_p;
  hbsattn::MaskShape& shape = problem.mask.shape;
  shape.batch = static_cast<int32_t>(mask[0]);
  shape.heads = static_cast<int32_t>(mask[1]);
  shape.rows = mask[2];
  shape.cols = mask[3];
  shape.q_block_size = blocks[0];
  shape.k_block_size = blocks[1];
  shape.causal = causal;
  shape.ruled = ruled;
  shape.partial = partial;
  params.deterministic = deterministic;
  params.needs_q = needs[0];
  params.needs_k = needs[1];
  params.needs_v = needs[2];
  hbsattn::Explanation forward, backward;
  hbsattn::raise_if_error(hbsattn::explain(problem, &forward));
  hbsattn::raise_if_error(hbsattn::explain(params, &backward));
  return {to_dict(forward), to_dict(backward)};
}

std::pair<std::string, int32_t> kernel_choice() { return {hbsattn::used_kernels(), hbsattn::shared_memory_limit()}; }
void set_kernel_family(const std::string& name) { hbsattn::raise_if_error(hbsattn::use_kernels(name)); }
void limit_shared_memory(int32_t kilobytes) { hbsattn::raise_if_error(hbsattn::limit_shared_memory(kilobytes)); }

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What this build contains. archs, head_dims, dtypes and kernels are what was compiled for CUDA: in a host-only "
        "build, where cuda is False, they are empty. cpu_dtypes are those of CPU tensors, the same in every build.");
  m.def("set_kernel_family", &set_kernel_family, "Chooses the kernels of all later calls: auto, sm90 or sm80.");
  m.def("kernel_family", &hbsattn::used_kernels, "The name that was set last; auto at first.");
  m.def("kernel_choice", &kernel_choice, "kernel_family() and shared_memory_limit(): what plans are made for.");
  m.def("limit_shared_memory", &limit_shared_memory, "KB that a CTA of later calls may have; 0: all there are.");
  m.def("shared_memory_limit", &hbsattn::shared_memory_limit, "What was set last; 0 at first.");
  m.def("explain", &explain, "How a call on the current device would be computed: (forward, backward).");
}
