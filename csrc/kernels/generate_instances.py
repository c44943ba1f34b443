"""Makes the sources of the kernels in sm90/instances.txt and sm80/instances.txt, and the lists of them that
core/kernel_table.h includes.

setup.py imports this file; CMakeLists.txt runs
`generate_instances.py FOLDER [--head-dims 64,128] [--dtypes bf16] [--families sm90]`.
It writes FOLDER/instances/*.cu and FOLDER/instances/*_kernels.h, and prints the paths of the sources, a line each,
those that take longest to compile first. Sources of another family than sm90 have its name before theirs.

A source holds an entry of a table for those of its dtypes that are chosen: the compiler reads the headers once for
both, and shares the layouts that it derives from them.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
DTYPES = {"bf16": "DType::kBFloat16", "fp16": "DType::kFloat16", "fp32": "DType::kFloat32"}


class Kernel(NamedTuple):
    """A column of a table."""

    template: str  # of its Config
    takes_rows: bool  # whether that takes tile rows
    function: str  # the folder that it comes from; what runs it is run_*, and its kernels are a list
    parameters: str  # of that function


# The columns of each family's table.
KERNELS = {
    "sm90": {
        "forward": Kernel("Sm90Forward", True, "forward", "ForwardParams"),
        "forward_pairs": Kernel("Sm90ForwardPairs", False, "forward", "ForwardParams"),
        "forward_altered": Kernel("Sm90ForwardAltered", True, "forward", "ForwardParams"),
        "forward_short_values": Kernel("Sm90ForwardShortValues", True, "forward", "ForwardParams"),
        "grad_queries": Kernel("Sm90GradQueries", True, "grad_queries", "BackwardParams"),
        "grad_queries_altered": Kernel("Sm90GradQueriesAltered", True, "grad_queries", "BackwardParams"),
        "grad_queries_short_values": Kernel("Sm90GradQueriesShortValues", True, "grad_queries", "BackwardParams"),
        "backward_queries": Kernel("Sm90BackwardQueries", False, "backward_queries", "BackwardParams"),
        "backward_keys_altered": Kernel("Sm90BackwardKeysAltered", True, "backward_keys", "BackwardParams"),
        "backward_keys_short_values": Kernel("Sm90BackwardKeysShortValues", True, "backward_keys", "BackwardParams"),
        "backward_keys": Kernel("Sm90BackwardKeys", True, "backward_keys", "BackwardParams"),
    },
    "sm80": {
        "forward": Kernel("Sm80Forward", True, "forward", "ForwardParams"),
        "grad_queries": Kernel("Sm80GradQueries", True, "grad_queries", "BackwardParams"),
        "backward_keys": Kernel("Sm80BackwardKeys", True, "backward_keys", "BackwardParams"),
    },
}


class Instance(NamedTuple):
    """One compiled kernel."""

    family: str
    name: str
    dtype: str
    of_dtypes: str  # that share its row
    head_dim: str
    tile_rows: str

    @property
    def kernel(self) -> Kernel:
        return KERNELS[self.family][self.name]

    @property
    def config(self) -> str:
        rows = f", {self.tile_rows}" if self.kernel.takes_rows else ""
        return f"{self.kernel.template}<{DTYPES[self.dtype]}, {self.head_dim}{rows}>"

    @property
    def prefix(self) -> str:
        """Of files and functions."""
        return "" if self.family == "sm90" else f"{self.family}_"

    @property
    def file(self) -> str:
        alone = "" if "," in self.of_dtypes else f"_{self.of_dtypes}"
        return f"{self.prefix}{self.name}{alone}_hd{self.head_dim}_{self.tile_rows}.cu"

    @property
    def instantiation(self) -> str:
        function = self.prefix + self.kernel.function
        return (
            f"template Status run_{function}<{self.config}>(const {self.kernel.parameters}&, Stream);\n"
            f"template int {function}_shared_bytes<{self.config}>();\n\n"
        )


def source_of(instances: list[Instance]) -> str:
    """The text of a source file that holds these instances of one kernel."""
    first = instances[0]
    return (
        f'#include "kernels/{first.family}/{first.kernel.function}/launch.cuh"\n\n'
        "namespace hbsattn::kernels {\n\n"
        + "".join(instance.instantiation for instance in instances)
        + "}  // namespace hbsattn::kernels\n"
    )


def read_table(family: str) -> list[Instance]:
    """All kernels of a family, by kernel, then dtype, then ascending head dim."""
    text = (FOLDER / family / "instances.txt").read_text()
    lines = [line.split() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    kernels, rows = lines[0][2:], sorted(lines[1:], key=lambda row: int(row[1]))
    return [
        Instance(family, kernel, dtype, row[0], row[1], tile_rows)
        for column, kernel in enumerate(kernels, 2)
        for dtype in DTYPES
        for row in rows
        if dtype in row[0].split(",")
        for tile_rows in row[column].split(",")
        if tile_rows != "-"
    ]


def list_of(family: str, chosen: list[Instance]) -> str:
    """The text of the header that lists a family's kernels."""
    lines = ["#pragma once", "", "namespace hbsattn {", ""]
    for name, kernel in KERNELS[family].items():
        if name != kernel.function:
            continue
        configs = ",\n    ".join(x.config for x in chosen if x.family == family and x.kernel.function == name)
        lines += [f"using {kernel.template}Kernels = KernelTable<", f"    {configs}>;", ""]
    return "\n".join([*lines, "}  // namespace hbsattn", ""])


def choose(name: str, given: str | None, known: list[str]) -> list[str]:
    """Which of the known values a comma-separated list selects; by default all."""
    known = list(dict.fromkeys(known))
    values = [value.strip() for value in given.split(",")] if given else known
    if not set(values) <= set(known):
        raise ValueError(f"{name} is {given!r}; expected a comma-separated subset of {','.join(known)}")
    return values


def write_if_changed(path: Path, text: str) -> None:
    """A file that says the same already keeps its time, so that it is not compiled again."""
    if not path.is_file() or path.read_text() != text:
        path.write_text(text)


def generate(
    folder: Path, head_dims: str | None = None, dtypes: str | None = None, families: str | None = None
) -> list[Path]:
    """Writes the sources of the selected kernels, and their lists, below `folder`.

    Returns the sources, those first that take longest to compile.
    """
    chosen_families = choose("families", families, list(KERNELS))
    table = [instance for family in chosen_families for instance in read_table(family)]
    chosen_dims = choose("HBSATTN_HEAD_DIMS", head_dims, [instance.head_dim for instance in table])
    chosen_dtypes = choose("HBSATTN_DTYPES", dtypes, [instance.dtype for instance in table])
    chosen = [instance for instance in table if instance.head_dim in chosen_dims and instance.dtype in chosen_dtypes]
    folder = folder / "instances"
    folder.mkdir(parents=True, exist_ok=True)
    # A table's columns, and in them the head dims, run from what compiles fast to what takes long.
    held: dict[Path, list[Instance]] = {}
    for family in chosen_families:
        held |= {folder / instance.file: [] for instance in reversed(chosen) if instance.family == family}
        write_if_changed(folder / f"{family}_kernels.h", list_of(family, chosen))
    for instance in chosen:
        held[folder / instance.file].append(instance)
    for path, instances in held.items():
        write_if_changed(path, source_of(instances))
    for path in set(folder.glob("*.cu")) - set(held):
        path.unlink()
    return list(held)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--head-dims")
    parser.add_argument("--dtypes")
    parser.add_argument("--families")
    options = parser.parse_args()
    try:
        print(*generate(options.folder, options.head_dims, options.dtypes, options.families), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
