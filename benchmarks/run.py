"""Times hbsattn beside other attention libraries: python benchmarks/run.py --help. README.md explains the columns."""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

import bars
import baselines
import environment
import gate
import gradients
import masks
import timing
import workloads
from hbsattn.utils import use_kernels
from ours import Ours
from workloads import Group, Workload

OURS = "hbsattn"
Rows = dict[tuple[str, str], dict[str, object]]  # by workload and contestant
SEED = 20261121
MEMORY_ALLOWANCE = 32 << 20  # bytes, beside a quarter of the bool mask
SPAN_BELOW_MS = 0.5  # attention shorter than this gets the columns span and host: there the host's time matters
SPAN_ITERATIONS = 40
SEVERAL = {"forward": ("basics", "shapes"), "all": tuple(bars.SETS)}  # sets of bars under one name
COLUMNS = (  # heading, field, format
    ("TF/s", "tflops", "{:.1f}"),
    ("ms", "ms", "{:.4f}"),
    ("spread", "spread", "{:.1%}"),
    ("cyc", "cycle_share", "{:.3f}"),
    ("b2b TF/s", "back_to_back_tflops", "{:.1f}"),
    ("x cuDNN", "speedup_over_cudnn", "{:.2f}"),
    ("backward / forward", "over_forward", "{:.2f}"),
    ("pack ms", "pack_ms", "{:.4f}"),
    ("plan ms", "plan_ms", "{:.4f}"),
    ("columns ms", "column_plan_ms", "{:.4f}"),
    ("planning", "planning_share", "{:.1%}"),
    ("extra bytes", "extra_bytes", "{:,}"),
    ("all ms", "end_to_end_ms", "{:.4f}"),
    ("span ms", "span_ms", "{:.4f}"),
    ("host ms", "host_ms", "{:.4f}"),
)


class Data:
    """The tensors and the mask that all tasks share which are alike but for the task."""

    def __init__(self, workload: Workload, qkv: tuple[Tensor, ...], seed: int) -> None:
        self._workload = workload
        self.qkv = qkv
        self.block_mask = masks.make_mask(workload, qkv[0].device, seed)

    @cached_property
    def pairs(self) -> int:
        return masks.count_pairs(self._workload, self.block_mask)

    @cached_property
    def grad_out(self) -> Tensor:
        return workloads.make_grad_out(self._workload, self.qkv[0].device, SEED - 1)

    @cached_property
    def gradients(self) -> gate.Gradients:
        return gate.Gradients(self._workload, *self.qkv, self.grad_out, self.block_mask)


class Problem:
    """A workload with its data."""

    def __init__(self, workload: Workload, data: Data) -> None:
        self.workload = workload
        self.block_mask = data.block_mask
        self.qkv = gradients.leaves(workload, data.qkv)
        self.flops = masks.count_flops(workload, data.pairs)
        self._data = data

    def make_launch(self, attend: Callable[[], Tensor]) -> Callable[[], Tensor | tuple[Tensor, ...]]:
        grad_out = None if self.workload.task == "forward" else self._data.grad_out
        return gradients.make_launch(self.workload, attend, self.qkv, grad_out)

    def check(
        self, result: Tensor | tuple[Tensor, ...], lse: Tensor | None = None
    ) -> gate.Verdict | gate.GradientVerdict:
        """Judges an output, or the gradients of q, k and v."""
        if self.workload.task != "forward":
            return self._data.gradients.check(result, self.workload.frozen)
        return gate.check(self.workload, *self.qkv, self.block_mask, result, lse)


@dataclass
class Entry:
    """A contestant on a workload: the call to time, or why there is none."""

    workload: Workload
    contestant: str
    label: str
    flops: int
    launch: Callable[[], Tensor | tuple[Tensor, ...]] | None = None
    ours: Ours | None = None
    block_mask: Tensor | None = None
    verdict: gate.Verdict | gate.GradientVerdict | None = None
    problem: str | None = None

    @property
    def key(self) -> tuple[str, str]:
        return self.workload.name, self.contestant


class Bench:
    """Runs groups; each gives rows, one for each workload and contestant."""

    def __init__(self, rivals: list[baselines.Rival], samples: int, quick: bool, say: Callable[[str], None]) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._rivals = rivals
        self._samples = samples
        self._quick = quick
        self._say = say
        self._timer = timing.Timer(self._device)
        self._began = time.perf_counter()
        properties = torch.cuda.get_device_properties(self._device)
        per_cycle = timing.TENSOR_FLOPS_PER_CYCLE.get((properties.major, properties.minor))
        self._peak_per_cycle = per_cycle and per_cycle * properties.multi_processor_count
        self.wrong = 0  # results of ours that the gate refused

    def measure_empty(self) -> float:
        """The time of no launch at all, in milliseconds: what an event pair adds to each time."""
        return self._timer.spaced({"": lambda: None}, 15)[""].ms

    def run(self, group: Group) -> Rows:
        """Times one group, says its table, and returns its rows by workload and contestant."""
        entries = self._prepare(group)
        ready = {" ".join(entry.key): entry for entry in entries if entry.launch}
        self._progress(f"{group.name}: times {len(ready)} contestants in turns")
        times = self._timer.spaced({name: entry.launch for name, entry in ready.items()}, self._samples)
        rows = {entry.key: self._row(entry, group, times.get(" ".join(entry.key))) for entry in entries}
        self._progress(f"{group.name}: times their parts and back-to-back rates")
        for entry in ready.values():
            self._add_details(entry, rows[entry.key], self._quick or group.brief)
        for entry in entries:
            _add_speedup(entry, rows)
        _add_ratios(entries, rows)
        self._say(_table(list(rows.values())))
        return rows

    def _prepare(self, group: Group) -> list[Entry]:
        """Tensors, masks, compiled calls; each result through the gate."""
        entries: list[Entry] = []
        tensors: dict[tuple, tuple[Tensor, ...]] = {}
        shared: dict[Workload, Data] = {}

        def pose(workload: Workload) -> Problem:
            self._progress(f"{group.name}: prepares and checks {workload.name}")
            if workload.problem not in tensors:
                tensors[workload.problem] = workloads.make_tensors(workload, self._device, SEED)
            key = workload.mask_only()
            if key not in shared:
                shared[key] = Data(key, tensors[workload.problem], SEED + 1 + len(shared))
            return Problem(workload, shared[key])

        for workload in group.workloads:
            problem = pose(workload)
            entry = self._prepare_ours(problem)
            entries.append(entry)
            if entry.verdict and not entry.verdict.passed:
                continue
            if group.compares(workload):
                entries += [self._prepare_rival(rival, problem) for rival in self._rivals if not rival.dense]
        for workload in group.dense_workloads():
            problem = pose(workload)
            rivals = [rival for rival in self._rivals if rival.dense and group.compares_dense(rival.name)]
            entries += [self._prepare_rival(rival, problem) for rival in rivals]
        return [entry for entry in entries if entry]

    def _prepare_ours(self, problem: Problem) -> Entry:
        workload = problem.workload
        entry = Entry(workload, OURS, OURS, problem.flops, block_mask=problem.block_mask)
        try:
            ours = Ours(workload, *problem.qkv, problem.block_mask)
            if ours.flops() != problem.flops:
                entry.problem = f"BlockMask.flops makes it {ours.flops()}, not {problem.flops}"
                self.wrong += 1
                return entry
            launch = problem.make_launch(ours.attend)
            results = ours.attend_with_lse() if workload.task == "forward" else (launch(),)
            entry.verdict = problem.check(*results)
        except (ValueError, TypeError, NotImplementedError) as error:
            entry.problem = f"not supported: {error}"
            return entry
        except torch.OutOfMemoryError as error:
            entry.problem = f"out of memory: {error}".splitlines()[0]
            torch.cuda.empty_cache()
            return entry
        if entry.verdict.passed:
            entry.ours, entry.launch = ours, launch
        else:
            entry.problem = f"WRONG RESULT, no times: {entry.verdict}"
            self.wrong += 1
        return entry

    def _prepare_rival(self, rival: baselines.Rival, problem: Problem) -> Entry | None:
        """None for a rival that the task or the dtype rules out."""
        workload = problem.workload
        if workload.dtype not in rival.dtypes or (workload.task != "forward" and not rival.differentiable):
            return None
        entry = Entry(workload, rival.name, rival.label, problem.flops, problem=rival.refusal(workload))
        if workload.lengths:
            entry.problem = "packed sequences are timed with hbsattn alone"
        if workload.windows and not rival.windowed:
            entry.problem = "not supported: windows of tokens"
        if workload.head_sinks:
            entry.problem = "not supported: sinks of heads"
        if workload.value_dim is not None:
            entry.problem = "values of another head dim are timed with hbsattn alone"
        if workload.altered:
            entry.problem = "dropout and softcaps are timed with hbsattn alone"
        if entry.problem:
            return entry
        begin = time.perf_counter()
        block_mask = problem.block_mask.repeat_interleave(workload.heads // workload.mask_heads, 1)
        try:
            with torch.set_grad_enabled(workload.task != "forward"):
                attend = rival.prepare(workload, *problem.qkv, block_mask)
            launch = problem.make_launch(attend)
            entry.verdict = problem.check(launch())
        except Exception as error:  # whatever a library raises, the others still run
            entry.problem = f"fails: {type(error).__name__}: {error}".splitlines()[0]
            torch.cuda.empty_cache()
            return entry
        if entry.verdict.passed:
            entry.launch = launch
        else:
            entry.problem = f"wrong result, no times: {entry.verdict}"
        if (seconds := time.perf_counter() - begin) > 2:
            self._progress(f"{rival.label} took {seconds:.0f} s to compile")
        return entry

    def _row(self, entry: Entry, group: Group, times: timing.Times | None) -> dict[str, object]:
        work = entry.workload
        row: dict[str, object] = {
            "workload": work.name,
            "contestant": entry.contestant,
            "label": entry.label,
            "group": group.name,
            "shape": work.describe(),
            "flops": entry.flops,
            "problem": entry.problem,
        }
        if entry.verdict:
            row["gate"] = {"rows": entry.verdict.rows, "error": entry.verdict.error, "allowed": entry.verdict.allowed}
        if times:
            row |= {
                "ms": times.ms,
                "ms_best": times.best,
                "spread": times.spread,
                "samples": len(times.samples),
                "host_time_included": times.exposed,
                "tflops": entry.flops / times.ms * 1e-9,
                "dense_tflops": masks.count_flops(work, masks.count_visible_pairs(work)) / times.ms * 1e-9,
                "token_ns": 1e6 * times.ms / (work.batch * work.seqlen * work.heads),
            }
        return row

    def _add_details(self, entry: Entry, row: dict[str, object], brief: bool) -> None:
        if not brief:
            row["back_to_back_ms"] = self._timer.back_to_back(entry.launch)
            row["back_to_back_tflops"] = entry.flops / row["back_to_back_ms"] * 1e-9
        few = 3 if self._quick else 5 if brief else 11
        ours, task = entry.ours, entry.workload.task
        if ours and task == "backward":
            times = self._timer.spaced({"columns": ours.plan_columns}, few)["columns"]
            row["column_plan_ms"] = times.ms
            row["planning_share"] = times.ms / row["ms"]
            row["host_time_included"] |= times.exposed
            row["extra_bytes"] = timing.measure_memory(entry.launch)
            row["extra_bytes_allowed"] = ours.scratch_allowed()
        elif ours and task == "forward":
            parts = {"pack": ours.pack, "plan": ours.plan, "end_to_end": ours.end_to_end}
            for part, times in self._timer.spaced(parts, few).items():
                row[f"{part}_ms"] = times.ms
                row["host_time_included"] |= times.exposed
            row["pack_and_plan_ms"] = row["pack_ms"] + row["plan_ms"]
            row["planning_share"] = row["pack_and_plan_ms"] / row["ms"]
            if self._peak_per_cycle and entry.workload.dtype.itemsize == 2:
                cycles = self._timer.cycles(ours.clocks, 3 if brief else 7)
                row["cycles"] = cycles
                row["cycle_share"] = entry.flops / (self._peak_per_cycle * cycles)
            if row["ms"] < SPAN_BELOW_MS:
                span = self._timer.span(ours.end_to_end, SPAN_ITERATIONS, 3 if self._quick else 9)
                if span:
                    row["span_ms"], row["host_ms"] = span
            row["extra_bytes"] = timing.measure_memory(ours.end_to_end)
            if not entry.workload.listed and not entry.workload.lengths:
                row["extra_bytes_allowed"] = entry.block_mask.numel() // 4 + MEMORY_ALLOWANCE

    def _progress(self, text: str) -> None:
        print(f"[{time.perf_counter() - self._began:6.1f} s] {text}", file=sys.stderr, flush=True)


def _add_speedup(entry: Entry, rows: Rows) -> None:
    """How many times faster than dense attention of the same shape."""
    row = rows[entry.key]
    dense = rows.get((entry.workload.dense().name, "cudnn"), {}).get("ms")
    if dense and "ms" in row:
        row["speedup_over_cudnn"] = dense / row["ms"]


def _add_ratios(entries: list[Entry], rows: Rows) -> None:
    """How many times as long as the same contestant's forward on the same mask."""
    forward = {
        (entry.contestant, entry.workload.mask_only()): rows[entry.key].get("ms")
        for entry in entries
        if entry.workload.task == "forward"
    }
    for entry in entries:
        row, ms = rows[entry.key], forward.get((entry.contestant, entry.workload.mask_only()))
        if entry.workload.task == "backward" and ms and "ms" in row:
            row["over_forward"] = row["ms"] / ms


def _table(rows: list[dict[str, object]]) -> str:
    """The rows for people. Columns that all rows lack are left out; a row without times says why."""
    columns = [column for column in COLUMNS if any(column[1] in row for row in rows)]
    cells = [["workload", "contestant", *(heading for heading, _, _ in columns)]]
    notes = [""]
    for row in rows:
        name = f"{row['label']} *" if row.get("host_time_included") else row["label"]
        values = (
            [] if row["problem"] else [style.format(row[field]) if field in row else "" for _, field, style in columns]
        )
        cells.append([row["workload"], name, *values])
        notes.append(textwrap.shorten(row["problem"] or "", 160))
    lines = [f"{line}  {note}".rstrip() for line, note in zip(_align(cells, right_from=2), notes, strict=True)]
    if any(row.get("host_time_included") for row in rows):
        lines.append("* waits for the GPU within the call or its preparation, so host time is included")
    return "\n".join([*lines, ""])


def _align(cells: list[list[str]], right_from: int) -> list[str]:
    """The lines of a table, columns from `right_from` on aligned to the right. Rows may be shorter than the first."""
    widths = [max(len(row[i]) for row in cells if i < len(row)) for i in range(len(cells[0]))]
    return [
        "  ".join(
            cell.rjust(width) if i >= right_from else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=False))
        )
        for row in cells
    ]


def _write(path: Path | None, results: dict[str, object], said: list[str]) -> None:
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(results, indent=1) + "\n")
        path.with_suffix(".txt").write_text("\n".join(said))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Times hbsattn beside other attention libraries.")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--bars",
        nargs="?",
        const="basics",
        choices=(*bars.SETS, *SEVERAL),
        help="the workloads of a set of bars, and the bars (the default: basics; forward: basics and shapes; real: "
        "masks that people train with, in both directions; heads: heads of every kind in one call; float32)",
    )
    what.add_argument("--grid", choices=tuple(workloads.GRIDS), help="a grid of workloads")
    what.add_argument("--workloads", nargs="+", metavar="NAME", help="workloads by name, with spaces or commas between")
    what.add_argument("--list", action="store_true", help="print the names of all workloads and stop")
    parser.add_argument("--match", metavar="TEXT", help="of these, only the workloads with TEXT in their name")
    parser.add_argument("--quick", action="store_true", help="7 samples, nothing back to back")
    parser.add_argument("--samples", type=int, default=None, help="spaced samples of each contestant (default 21)")
    parser.add_argument(
        "--rivals", default=",".join(baselines.FILES), metavar="NAMES", help="comma-separated; default %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the results here, and beside it as .txt")
    parser.add_argument("--commit", help="what to record as commit where git cannot tell")
    parser.add_argument("--kernels", default="auto", help="auto, sm90 or sm80: see hbsattn.utils.use_kernels")
    parser.add_argument("--shared-kilobytes", type=int, metavar="KB", help="that a CTA may have: see there")
    return parser.parse_args()


def _select(arguments: argparse.Namespace) -> dict[str, list[Group]]:
    """Groups by the name of their set of bars, or of the grid."""
    if arguments.grid:
        chosen = {arguments.grid: workloads.GRIDS[arguments.grid]()}
    elif arguments.workloads:
        names = [name for names in arguments.workloads for name in names.split(",") if name]
        chosen = {"workloads": workloads.named_groups(names)}
    else:
        wanted = arguments.bars or "basics"
        chosen = {name: workloads.SETS[name]() for name in SEVERAL.get(wanted, (wanted,))}
    if arguments.match:
        chosen = {name: workloads.matching(groups, arguments.match) for name, groups in chosen.items()}
    return chosen


def main() -> int:
    arguments = _parse()
    if arguments.list:
        print("\n".join(workloads.all_workloads()))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/run.py needs a CUDA GPU; torch sees none", file=sys.stderr)
        return 2
    with use_kernels(arguments.kernels, shared_kilobytes=arguments.shared_kilobytes):
        return _run(arguments)


def _run(arguments: argparse.Namespace) -> int:
    torch.set_grad_enabled(False)
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        print(text, flush=True)

    try:
        chosen = _select(arguments)
        rivals, missing = baselines.load([name for name in arguments.rivals.split(",") if name])
    except ValueError as error:
        print(f"benchmarks/run.py: {error}", file=sys.stderr)
        return 2

    described = environment.describe(arguments.commit)
    say("\n".join(environment.lines(described)))
    for name, reason in missing.items():
        say(f"left out: {name} ({reason})")
    samples = arguments.samples or (7 if arguments.quick else 21)
    bench = Bench(rivals, samples, arguments.quick, say)
    empty_ms = bench.measure_empty()
    say(f"spaced, {samples} samples (fewer of long calls); an empty launch reads {empty_ms:.4f} ms\n")

    results: dict[str, object] = {
        "environment": described,
        "left_out": missing,
        "protocol": {
            "kernels": arguments.kernels,
            "shared_kilobytes": arguments.shared_kilobytes,
            "samples": samples,
            "idle_seconds": timing.IDLE_SECONDS,
            "flush_bytes": timing.FLUSH_BYTES,
            "empty_ms": empty_ms,
        },
        "rows": [],
        "bars": [],
    }
    for name, groups in chosen.items():
        rows: Rows = {}
        for group in groups:
            rows |= (found := bench.run(group))
            torch.cuda.empty_cache()
            results["rows"] += found.values()
            _write(arguments.json, results, said)  # after every group: a long run may be cut short
        if name in bars.SETS:
            results["bars"] += bars.evaluate(name, rows)
    if results["bars"]:
        say("\n".join(line.rstrip() for line in _align(bars.table(results["bars"]), right_from=9)))
        met = sum(result["met"] is True for result in results["bars"])
        say(f"\n{met} of {len(results['bars'])} bars met")
        _write(arguments.json, results, said)
    if bench.wrong:
        print(f"{bench.wrong} results of hbsattn are wrong", file=sys.stderr)
    return 1 if bench.wrong else 0


if __name__ == "__main__":
    sys.exit(main())
