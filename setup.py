"""Builds hbsattn._C. Environment variables (README.md, "Build switches"):

HBSATTN_CUDA         AUTO (default: if nvcc and a CUDA build of PyTorch are here), ON or OFF
TORCH_CUDA_ARCH_LIST architectures, 8.0 or newer: 9.0 stands for 9.0a, which has kernels of its own, and all others
                     are served by code for 8.0; older ones are left out with a note, and a list of these alone is an
                     error; default, and "native": those of the visible GPUs, or else 9.0a
HBSATTN_HEAD_DIMS    kernels to compile; default: all, "64,96,128,192,256"
HBSATTN_DTYPES       likewise; default: all, "fp32,fp16,bf16"
MAX_JOBS             compilers at a time; default: what cores and memory allow
NVCC_THREADS         threads of one nvcc, useful with several architectures; default 1
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).resolve().parent
GENERATED = ROOT / "build" / "generated"
sys.path[:0] = [str(ROOT / "third_party"), str(ROOT / "csrc" / "kernels")]

from find_cutlass import CutlassError, find_cutlass  # noqa: E402
from generate_instances import generate  # noqa: E402

HOPPER, PORTABLE = "9.0a", "8.0"  # what has code in a build: the latter for whatever is as new, or newer
GENERATIONS = {"Ampere": "8.0", "Ada": "8.9", "Hopper": "9.0", "Blackwell": "10.0"}
GENCODE = {
    HOPPER: "-gencode=arch=compute_90a,code=sm_90a",
    PORTABLE: "-gencode=arch=compute_80,code=[sm_80,compute_80]",
}
GIB_PER_JOB = 3  # a kernel's translation unit peaks below this


def fail(message: str) -> None:
    sys.exit(f"error: {message}")


def note(message: str) -> None:
    print(f"hbsattn: {message}", file=sys.stderr, flush=True)


def read_sources(groups: Iterable[str]) -> list[str]:
    """Those of csrc/sources.txt, which says what its groups are."""
    lines = (line.partition("#")[0].split() for line in (ROOT / "csrc" / "sources.txt").read_text().splitlines())
    return [f"csrc/{path}" for group, path in filter(None, lines) if group in groups]


def generate_instances(families: str) -> list[str]:
    """Writes the instances of kernels that are to be compiled, and returns their paths."""
    try:
        sources = generate(GENERATED, os.environ.get("HBSATTN_HEAD_DIMS"), os.environ.get("HBSATTN_DTYPES"), families)
    except ValueError as error:
        fail(str(error))
    return [str(source.relative_to(ROOT)) for source in sources]


def is_for_hopper_alone(source: str) -> bool:
    """Whether a source holds kernels that other architectures have no instructions for."""
    path = Path(source)
    return path.parent.name == "instances" and not path.name.startswith("sm80_")


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = shutil.which("nvcc", path=str(Path(home) / "bin") if home else None) or shutil.which(
        "nvcc", path="/usr/local/cuda/bin"
    )
    return Path(found) if found else None


def toolkit_of(nvcc: Path) -> Path:
    """The toolkit's root as nvcc itself sees it: the nvcc on PATH may be a wrapper in another place."""
    dryrun = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", dryrun, re.MULTILINE)
    return Path(top[1].strip()).resolve() if top else nvcc.resolve().parent.parent


def use_cuda() -> bool:
    """Whether to build for CUDA. Sets CUDA_HOME, which PyTorch reads at import."""
    mode = os.environ.get("HBSATTN_CUDA", "AUTO").upper()
    if mode not in ("AUTO", "ON", "OFF"):
        fail(f"HBSATTN_CUDA is {mode!r}; expected AUTO, ON or OFF")
    if mode == "OFF":
        note("HBSATTN_CUDA=OFF: building without CUDA")
        return False
    nvcc = find_nvcc()
    if nvcc is not None:
        os.environ["CUDA_HOME"] = str(toolkit_of(nvcc))
    import torch

    missing = "nvcc was not found" if nvcc is None else "" if torch.version.cuda else "this PyTorch has no CUDA"
    if missing and mode == "ON":
        fail(f"HBSATTN_CUDA is ON but {missing}")
    if missing:
        note(f"{missing}: building without CUDA, for CPU tensors only")
    return not missing


def code_for(arch: str) -> str | None:
    """Which code serves an architecture, as TORCH_CUDA_ARCH_LIST names it; None: there is none."""
    match = re.fullmatch(r"(\d+)\.(\d)[af]?(?:\+PTX)?", arch)
    if match is None or int(match[1]) < 8:
        return None
    return HOPPER if match[1] == "9" else PORTABLE


def choose_codes() -> tuple[str, ...]:
    """What to compile for."""
    import torch

    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", "").removeprefix("native")
    if wanted:
        names = [name for name in re.split(r"[;,\s]+", wanted) if name]
        names = [re.sub(r"^[A-Z][a-z]+", lambda name: GENERATIONS.get(name[0], name[0]), name) for name in names]
    else:
        names = ["{}.{}".format(*torch.cuda.get_device_capability(i)) for i in range(torch.cuda.device_count())]
    codes = {name: code_for(name) for name in names}
    chosen = {code for code in codes.values() if code is not None}
    others = sorted(name for name, code in codes.items() if code is None)
    if wanted and not chosen:
        fail(f"TORCH_CUDA_ARCH_LIST is {wanted!r}, for which hbsattn has no kernels; expected 9.0a, 8.0 or newer in it")
    if others:
        note(f"no kernels for compute capability {', '.join(others)}: CUDA tensors there are refused")
    return tuple(sorted(chosen or {HOPPER}))


def default_jobs(threads: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = []
    for file, pattern, scale in (
        ("/proc/meminfo", r"MemAvailable:\s+(\d+)", 1 << 10),
        ("/sys/fs/cgroup/memory.max", r"^(\d+)", 1),
    ):
        if Path(file).is_file() and (match := re.search(pattern, Path(file).read_text())):
            memory.append(int(match[1]) * scale)
    by_memory = min(memory) // (GIB_PER_JOB << 30) if memory else cores
    return max(1, min(cores, by_memory) // threads)


def extension():
    """Returns (the extension, its build command)."""
    if importlib.util.find_spec("torch") is None:
        fail("PyTorch is not in the build environment; install it, then: pip install --no-build-isolation")
    cuda = use_cuda()
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    codes = choose_codes() if cuda else ()
    hopper = HOPPER in codes
    sources = read_sources(["core", "torch", *["cuda"] * cuda, *["sm90"] * hopper])
    macros = {"HBSATTN_WITH_CUDA": int(cuda), "HBSATTN_SM90": int(hopper), "HBSATTN_SM80": int(cuda)}
    macros["HBSATTN_PTX80"] = int(PORTABLE in codes)  # whether devices that are newer than any of those find code
    macros |= {"HBSATTN_CUDA_VERSION": '""', "HBSATTN_CUTLASS_VERSION": '""'}
    include_dirs = [str(ROOT / "csrc" / "include"), str(ROOT / "csrc"), str(GENERATED)]
    # Most Pythons add -g, which makes the module 18 MB larger.
    cxx = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-Wall"]
    nvcc = []
    if cuda:
        try:
            cutlass = find_cutlass()
        except CutlassError as error:
            fail(str(error))
        # What takes longest to compile first.
        sources = generate_instances("sm90,sm80" if hopper else "sm80") + sources
        version = subprocess.check_output([Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc", "--version"], text=True)
        macros["HBSATTN_CUTLASS_VERSION"] = f'"{cutlass.version}"'
        macros["HBSATTN_CUDA_VERSION"] = '"{}"'.format(re.search(r"release (\d+\.\d+)", version)[1])
        threads = int(os.environ.get("NVCC_THREADS", "1"))
        nvcc = ["-O3", "-std=c++17", "-Xptxas=-v", "-Xcompiler=-fvisibility=hidden", f"--threads={threads}"]
        nvcc.append(f"-isystem={cutlass.include}")
        # Kernels take a quarter of the room, and are unpacked when one is first used.
        nvcc.append("-Xfatbin=-compress-all")
        # PyTorch removes the operators of half types, which CUTLASS uses.
        for name in ("HALF_OPERATORS", "HALF_CONVERSIONS", "HALF2_OPERATORS", "BFLOAT16_CONVERSIONS"):
            nvcc.append(f"-U__CUDA_NO_{name}__")
        os.environ.setdefault("MAX_JOBS", str(default_jobs(threads)))

    make = CUDAExtension if cuda else CppExtension
    module = make(
        "hbsattn._C",
        sources,
        include_dirs=include_dirs,
        define_macros=[("NDEBUG", None), *((name, str(value)) for name, value in macros.items())],
        extra_compile_args={"cxx": cxx, "nvcc": nvcc},
    )

    class Build(BuildExtension):
        def finalize_options(self) -> None:
            super().finalize_options()
            # Outside pip's temporary directories, so that an editable install compiles only what changed.
            kind = "cuda" if cuda else "host"
            self.build_temp = str(ROOT / "build" / f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}-{kind}")

        def build_extensions(self) -> None:
            jobs = f", {os.environ['MAX_JOBS']} at a time; one with kernels takes up to two minutes" if cuda else ""
            note(f"compiling {len(module.sources)} sources{jobs}")
            super().build_extensions()

        def build_extension(self, ext) -> None:
            # setuptools sorts sources by name. ninja starts them in the order in which it gets them.
            compile_sources = self.compiler.compile

            def compile_in_order(sources, output_dir, extra_postargs, **options):
                by_codes: dict[tuple[str, ...], list[str]] = {}
                for source in sorted(sources, key=module.sources.index):
                    by_codes.setdefault((HOPPER,) if is_for_hopper_alone(source) else codes, []).append(source)
                objects = []
                for number, (own_codes, chosen) in enumerate(by_codes.items()):
                    # A folder for each: PyTorch writes a file for ninja there.
                    folder = str(Path(output_dir) / str(number)) if len(by_codes) > 1 else output_dir
                    flags = [*extra_postargs["nvcc"], *(GENCODE[code] for code in own_codes)]
                    objects += compile_sources(
                        chosen, folder, extra_postargs={**extra_postargs, "nvcc": flags}, **options
                    )
                return objects

            self.compiler.compile = compile_in_order
            super().build_extension(ext)

    return module, Build


building = not {"egg_info", "dist_info", "sdist", "clean", "--version", "--name"} & set(sys.argv)
module, build = extension() if building else (None, None)
setup(ext_modules=[module] if module else [], cmdclass={"build_ext": build} if build else {})
