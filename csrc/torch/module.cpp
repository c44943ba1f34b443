// hbsattn._C: what this build contains. Loading it registers the operators of schemas.cpp.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <set>
#include <string>

#include "hbsattn/hbsattn.h"

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

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &build_info,
        "What this build contains. archs, head_dims, dtypes and kernels are what was compiled for CUDA: in a host-only "
        "build, where cuda is False, they are empty. cpu_dtypes are those of CPU tensors, the same in every build.");
}
