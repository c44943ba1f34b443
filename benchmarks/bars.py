"""The bars: what this version has to reach on an H200, as data, and the table that says whether it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

Rows = Mapping[tuple[str, str], Mapping[str, object]]


@dataclass(frozen=True)
class Quantity:
    """A field of a row of the results."""

    workload: str
    contestant: str
    field: str

    def read(self, rows: Rows) -> float | None:
        value = rows.get((self.workload, self.contestant), {}).get(self.field)
        return None if value is None else float(value)


@dataclass(frozen=True)
class Bar:
    """`ours`, divided by `reference` if there is one, has to be at least (or `at_most`) `target`.

    beside: a quantity to show with it.
    others: what others reach, TF/s on active pairs, back to back (5 to 10% below spaced times), or as it says.
    """

    what: str
    ours: Quantity
    reference: Quantity | None
    target: float
    unit: str
    at_most: bool = False
    beside: Quantity | None = None
    others: str = ""

    def measure(self, rows: Rows) -> float | None:
        value = self.ours.read(rows)
        if value is None or self.reference is None:
            return value
        reference = self.reference.read(rows)
        return value / reference if reference else None

    def met(self, value: float) -> bool:
        return value <= self.target if self.at_most else value >= self.target


def _ours(workload: str, field: str = "tflops") -> Quantity:
    return Quantity(workload, "hbsattn", field)


C = Quantity("dense-s8192", "cudnn", "tflops")
CC = Quantity("dense-s8192-causal", "cudnn", "tflops")
SPARSE = "128x128-s32768-density0.1"
BATCH = "128x128-batch8-s1024-density0.1-causal"


def _small_blocks(k_block: int, target: float, others: str = "") -> Bar:
    workload = f"128x{k_block}-s32768-density0.1"
    return Bar(
        f"128x{k_block}, s 32768, density 0.1", _ours(workload), _ours(SPARSE), target, "of 128x128", others=others
    )


BARS = (
    Bar(
        "128x128, s 32768, density 0.1",
        _ours(SPARSE),
        C,
        0.98,
        "C",
        others="FlashAttention-4 611, FlexAttention 412, MIT 323, Triton hbsattn 247",
    ),
    Bar("the same, causal", _ours(f"{SPARSE}-causal"), CC, 1.03, "Cc", others="FlashAttention-4 575"),
    Bar("all-true mask, s 8192", _ours("all-true-s8192"), C, 1.02, "C", others="FlashAttention-3 1.03 C"),
    Bar("the same, causal", _ours("all-true-s8192-causal"), CC, 1.04, "Cc", others="FlashAttention-3 1.05 Cc"),
    _small_blocks(64, 0.95, "FlashAttention-4 441, causal"),
    _small_blocks(32, 0.95, "FlashAttention-4 367, causal"),
    _small_blocks(16, 0.95, "FlashInfer 398"),
    _small_blocks(48, 0.91),
    _small_blocks(80, 0.91),
    Bar(
        "batch 8, s 1024, density 0.1, causal: bool mask to result, GPU span",
        _ours(BATCH, "span_ms"),
        None,
        0.12,
        "ms",
        at_most=True,
        beside=_ours(BATCH, "host_ms"),
        others="MIT 0.661 ms, Triton hbsattn 0.745 ms",
    ),
    Bar(
        "the same, attention alone",
        _ours(BATCH, "ms"),
        None,
        0.075,
        "ms",
        at_most=True,
        others="FlashAttention-4 0.104 ms",
    ),
    Bar(
        "packing and planning, 128x128, s 32768",
        _ours(SPARSE, "pack_and_plan_ms"),
        _ours(SPARSE, "ms"),
        0.05,
        "of the attention",
        at_most=True,
    ),
    Bar(
        "memory beyond inputs, mask and output, 128x128, s 32768",
        _ours(SPARSE, "extra_bytes"),
        _ours(SPARSE, "extra_bytes_allowed"),
        1.0,
        "of mask/4 + 32 MB",
        at_most=True,
    ),
    Bar(
        "the same, 128x16",
        _ours("128x16-s32768-density0.1", "extra_bytes"),
        _ours("128x16-s32768-density0.1", "extra_bytes_allowed"),
        1.0,
        "of mask/4 + 32 MB",
        at_most=True,
    ),
)


def evaluate(rows: Rows) -> list[dict[str, object]]:
    """The bars with what was measured, ready for JSON; `measured` and `met` are None where a row is missing."""
    results = []
    for bar in BARS:
        value = bar.measure(rows)
        beside = bar.beside.read(rows) if bar.beside else None
        results.append(
            {
                "what": bar.what,
                "target": bar.target,
                "at_most": bar.at_most,
                "unit": bar.unit,
                "measured": value,
                "met": None if value is None else bar.met(value),
                "ours": bar.ours.read(rows),
                "reference": bar.reference.read(rows) if bar.reference else None,
                "beside": {bar.beside.field: beside} if bar.beside else None,
                "others": bar.others,
            }
        )
    return results


def table(results: list[dict[str, object]]) -> list[list[str]]:
    """Cells of the table, headings first."""
    cells = [["bar", "target", "measured", "", "others, in other runs"]]
    for result in results:
        measured = "not measured"
        if result["measured"] is not None:
            measured = f"{result['measured']:.3f}"
            if result["reference"] is not None:
                measured += f" = {_short(result['ours'])} / {_short(result['reference'])}"
            for field, value in (result["beside"] or {}).items():
                measured += f" ({field.removesuffix('_ms')} {_short(value)} ms)" if value is not None else ""
        verdict = {None: "", True: "met", False: "MISSED"}[result["met"]]
        relation = "<=" if result["at_most"] else ">="
        cells.append(
            [result["what"], f"{relation} {result['target']:g} {result['unit']}", measured, verdict, result["others"]]
        )
    return cells


def _short(value: float) -> str:
    """A number of any size in few characters: bytes as MB."""
    if value >= 1e5:
        return f"{value / 1e6:.1f} MB"
    return f"{value:.0f}" if value >= 100 else f"{value:.3f}"
