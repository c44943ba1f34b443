"""Tells which tiles fit the shared memory of each class of device, by the sizes that the compiler gives the kernels'
own storage.

    python csrc/kernels/sm80/fits.py [--head-dims 64,128] [--kernels forward,grad_queries,backward_keys]

Of each kernel: what config.h has, marked, and the same with stages of other lengths and numbers; the bytes of a CTA;
and how many CTAs a multiprocessor has room for, by class (Sm80SharedClass). The forward has one stage where two would
cost a CTA, and where that does, too, Sm80SmallForward, which is not listed. Registers may allow fewer, as
`-Xptxas=-v` tells. Needs nvcc and the CUTLASS headers, no GPU.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

CSRC = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(CSRC.parent / "third_party"), str(CSRC / "kernels")]

from find_cutlass import find_cutlass  # noqa: E402
from generate_instances import Instance, read_table  # noqa: E402

# Of each kernel: whose its storage is, which numbers are those of its tile and of a stage, and the rows and the number
# of stages that its assertions allow.
TRAITS = {
    "forward": ("sm80::QueryTileTraits", "kTileM", "kTileN", ((32, 1), (32, 2), (64, 1), (64, 2), (128, 1))),
    "grad_queries": ("kernels::Sm80GradQueriesTraits", "kTileM", "kTileN", ((32, 2), (64, 2))),
    "backward_keys": ("kernels::Sm80BackwardKeysTraits", "kTileN", "kTileM", ((32, 2), (32, 3), (64, 2))),
}
CLASSES = (99, 163, 227)  # KB that a CTA may have

PROGRAM = """
#include <cstdio>
%(includes)s

using namespace hbsattn;

template <class Config, int kRows, int kCount>
struct OtherKeys : Config {
  static constexpr int kTileN = kRows, kStages = kCount;
};
template <class Config, int kRows, int kCount>
struct OtherQueries : Config {
  static constexpr int kTileM = kRows, kStages = kCount;
};

template <class Storage>
void tell(const char* kernel, int head_dim, int tile, int rows, int stages, bool chosen) {
  const int bytes = sizeof(Storage);
  std::printf("%%s %%d %%d %%d %%d %%d %%d", kernel, chosen, head_dim, tile, rows, stages, bytes);
  for (int count : {%(counts)s}) std::printf(" %%d", count);
  std::printf("\\n");
}

int main() {
%(calls)s
}
"""


def write_program(instances: list[Instance]) -> str:
    includes = "\n".join(f'#include "kernels/sm80/{name}/launch.cuh"' for name in TRAITS)
    calls = []
    for instance in instances:
        traits, tile, stage, stages_of = TRAITS[instance.name]
        config, other = instance.config, "OtherKeys" if stage == "kTileN" else "OtherQueries"
        calls += [
            f"  tell<{traits}<{other}<{config}, {rows}, {stages}>>::Storage>("
            f'"{instance.name}", {instance.head_dim}, {config}::{tile}, {rows}, {stages}, '
            f"{config}::{stage} == {rows} && {config}::kStages == {stages});"
            for rows, stages in stages_of
        ]
    counts = ", ".join(f"kSm80Shared{kilobytes}.count(bytes)" for kilobytes in CLASSES)
    return PROGRAM % {"includes": includes, "counts": counts, "calls": "\n".join(calls)}


def run_program(text: str) -> list[list[str]]:
    """The lines that the program prints, as words."""
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "fits.cu", Path(folder) / "fits"
        source.write_text(text)
        command = ["nvcc", "-std=c++17", "-arch=sm_80", "--expt-relaxed-constexpr", "-DHBSATTN_WITH_CUDA=1"]
        command += [f"-I{CSRC}", f"-I{CSRC / 'include'}", f"-isystem={find_cutlass().include}"]
        # The launchers are only declared: nothing is linked that they would call.
        subprocess.run([*command, str(source), "-o", str(program)], check=True)
        out = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    return [line.split() for line in out.splitlines()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--head-dims", help="comma-separated; all by default")
    parser.add_argument("--kernels", default=",".join(TRAITS), help="comma-separated; default %(default)s")
    options = parser.parse_args()
    kernels, head_dims = options.kernels.split(","), options.head_dims and options.head_dims.split(",")
    instances = [
        instance
        for instance in read_table("sm80")
        if instance.dtype == "bf16"
        and instance.name in kernels
        and (head_dims is None or instance.head_dim in head_dims)
    ]
    print("kernel         head dim  tile  stage  stages   bytes  CTAs at " + ", ".join(map(str, CLASSES)) + " KB")
    for kernel, chosen, *numbers in run_program(write_program(instances)):
        cells = [f"{number:>{width}}" for number, width in zip(numbers, (8, 6, 7, 8, 8, 9, 4, 4), strict=True)]
        print(f"{kernel:<15}" + "".join(cells) + ("  *" if chosen == "1" else ""))


if __name__ == "__main__":
    sys.exit(main())
