"""Makes the sources of the kernels in sm90/instances.txt, and the list of them that core/kernel_table.h includes.

setup.py imports this file; CMakeLists.txt runs `generate_instances.py FOLDER [--head-dims 64,128] [--dtypes bf16]`.
It writes FOLDER/instances/*.cu and FOLDER/instances/sm90_kernels.h, and prints the paths of the sources, a line each,
those that take longest to compile first.

A source holds an entry of the table for all chosen dtypes: the compiler reads the headers once for both, and shares the
layouts that it derives from them.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

TABLE = Path(__file__).resolve().parent / "sm90" / "instances.txt"
DTYPES = {"bf16": "DType::kBFloat16", "fp16": "DType::kFloat16"}


class Kernel(NamedTuple):
    """A column of the table."""

    template: str  # of its Config
    takes_rows: bool  # whether that takes tile rows
    function: str  # what runs it, run_*: the kernels of one function are a list, and come from one folder
    parameters: str  # of that function


KERNELS = {
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
}


class Instance(NamedTuple):
    """One compiled kernel."""

    kernel: str
    dtype: str
    head_dim: str
    tile_rows: str

    @property
    def config(self) -> str:
        kernel = KERNELS[self.kernel]
        rows = f", {self.tile_rows}" if kernel.takes_rows else ""
        return f"{kernel.template}<{DTYPES[self.dtype]}, {self.head_dim}{rows}>"

    @property
    def file(self) -> str:
        return f"{self.kernel}_hd{self.head_dim}_{self.tile_rows}.cu"

    @property
    def instantiation(self) -> str:
        kernel = KERNELS[self.kernel]
        return (
            f"template Status run_{kernel.function}<{self.config}>(const {kernel.parameters}&, Stream);\n"
            f"template int {kernel.function}_shared_bytes<{self.config}>();\n\n"
        )


def source_of(instances: list[Instance]) -> str:
    """The text of a source file that holds these instances of one kernel."""
    return (
        f'#include "kernels/sm90/{KERNELS[instances[0].kernel].function}/launch.cuh"\n\n'
        "namespace hbsattn::kernels {\n\n"
        + "".join(instance.instantiation for instance in instances)
        + "}  // namespace hbsattn::kernels\n"
    )


def read_table() -> list[Instance]:
    """All kernels there are, by kernel, then dtype, then ascending head dim."""
    lines = [line.split() for line in TABLE.read_text().splitlines() if line.strip() and not line.startswith("#")]
    kernels, rows = lines[0][1:], sorted(lines[1:], key=lambda row: int(row[0]))
    return [
        Instance(kernel, dtype, row[0], tile_rows)
        for column, kernel in enumerate(kernels, 1)
        for dtype in DTYPES
        for row in rows
        for tile_rows in row[column].split(",")
        if tile_rows != "-"
    ]


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


def generate(folder: Path, head_dims: str | None = None, dtypes: str | None = None) -> list[Path]:
    """Writes the sources of the selected kernels, and their list, below `folder`.

    Returns the sources, those first that take longest to compile.
    """
    table = read_table()
    chosen_dims = choose("HBSATTN_HEAD_DIMS", head_dims, [instance.head_dim for instance in table])
    chosen_dtypes = choose("HBSATTN_DTYPES", dtypes, [instance.dtype for instance in table])
    chosen = [instance for instance in table if instance.head_dim in chosen_dims and instance.dtype in chosen_dtypes]
    folder = folder / "instances"
    folder.mkdir(parents=True, exist_ok=True)
    # The table's columns, and in them the head dims, run from what compiles fast to what takes long.
    held = {folder / instance.file: [] for instance in reversed(chosen)}
    for instance in chosen:
        held[folder / instance.file].append(instance)
    for path, instances in held.items():
        write_if_changed(path, source_of(instances))
    for path in set(folder.glob("*.cu")) - set(held):
        path.unlink()
    lines = ["#pragma once", "", "namespace hbsattn {", ""]
    for name, kernel in KERNELS.items():
        if name != kernel.function:
            continue
        held_in = [instance.config for instance in chosen if KERNELS[instance.kernel].function == name]
        configs = ",\n    ".join(held_in)
        lines += [f"using {kernel.template}Kernels = KernelTable<", f"    {configs}>;", ""]
    write_if_changed(folder / "sm90_kernels.h", "\n".join([*lines, "}  // namespace hbsattn", ""]))
    return list(held)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--head-dims")
    parser.add_argument("--dtypes")
    options = parser.parse_args()
    try:
        print(*generate(options.folder, options.head_dims, options.dtypes), sep="\n")
    except ValueError as error:
        sys.exit(str(error))
