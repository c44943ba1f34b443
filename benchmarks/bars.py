"""The bars: what this version has to reach on an H200 or H100, as data, and the table that says whether it does."""

from __future__ import annotations

import textwrap
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

    def problem(self, rows: Rows) -> str | None:
        """Why there is nothing to read, where that is known."""
        return rows.get((self.workload, self.contestant), {}).get("problem")

    def where(self, rows: Rows) -> str | None:
        """Which workload it is, where that is not said by the bar."""
        return None


@dataclass(frozen=True)
class Constant:
    """A unit, so that a bar may be in GiB."""

    value: float

    def read(self, rows: Rows) -> float | None:
        return self.value


@dataclass(frozen=True)
class Worst:
    """The largest quotient of two fields of ours over all masks whose default backward was timed.

    over, under: the end that the name of the default backward takes ("-deterministic"), and a field.
    """

    over: tuple[str, str]
    under: tuple[str, str]

    def read(self, rows: Rows) -> float | None:
        return max(self._quotients(rows).values(), default=None)

    def where(self, rows: Rows) -> str | None:
        quotients = self._quotients(rows)
        return max(quotients, key=quotients.get, default=None)

    def problem(self, rows: Rows) -> str | None:
        ends = {self.over[0], self.under[0]}
        found = (rows.get((name + end, "hbsattn"), {}).get("problem") for name in self._masks(rows) for end in ends)
        return next(filter(None, found), None)

    def _quotients(self, rows: Rows) -> dict[str, float]:
        quotients = {}
        for name in self._masks(rows):
            over, under = (_ours(name + end, field).read(rows) for end, field in (self.over, self.under))
            if over is not None and under:
                quotients[name] = over / under
        return quotients

    def _masks(self, rows: Rows) -> list[str]:
        shapes = {name: row["shape"] for (name, contestant), row in rows.items() if contestant == "hbsattn"}
        return [
            name
            for name, shape in shapes.items()
            if shape["task"] == "backward" and not shape["deterministic"] and not shape["frozen"]
        ]


@dataclass(frozen=True)
class OneByOne:
    """The rate of a contestant that runs several workloads one after another: all their work over all their time."""

    workloads: tuple[str, ...]
    contestant: str

    def read(self, rows: Rows) -> float | None:
        flops = [Quantity(workload, self.contestant, "flops").read(rows) for workload in self.workloads]
        ms = [Quantity(workload, self.contestant, "ms").read(rows) for workload in self.workloads]
        return None if None in flops or None in ms else sum(flops) / sum(ms) * 1e-9


@dataclass(frozen=True)
class Bar:
    """`ours`, divided by `reference` if there is one, has to be at least (or `at_most`) `target`.

    beside: a quantity to show with it.
    others: what others reach, TF/s on active pairs, back to back (up to 15% below spaced times), or as it says.
    """

    what: str
    ours: Quantity | Worst
    reference: Quantity | OneByOne | Constant | None
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


MB = Constant(1e6)
GIB = Constant(2.0**30)
C = Quantity("dense-s8192", "cudnn", "tflops")
CC = Quantity("dense-s8192-causal", "cudnn", "tflops")
SPARSE = "128x128-s32768-density0.1"
TOKENS = "1x128-s65536-heads64-kv4-random16-shared"
BATCH = "128x128-batch8-s1024-density0.1-causal"


def _small_blocks(k_block: int, target: float, others: str = "") -> Bar:
    workload = f"128x{k_block}-s32768-density0.1"
    return Bar(
        f"128x{k_block}, s 32768, density 0.1", _ours(workload), _ours(SPARSE), target, "of 128x128", others=others
    )


BASICS = (
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


def _of_c(what: str, workload: str, target: float, others: str = "", unit: str = "C") -> Bar:
    return Bar(what, _ours(workload), CC if unit == "Cc" else C, target, unit, others=others)


def _wide(size: str, target: float, others: str = "") -> tuple[Bar, Bar]:
    """Key blocks of any size at the rate of 128x128, not causal and causal."""
    workload = f"{size}-s32768-density0.1"
    return (
        Bar(f"{size}, s 32768", _ours(workload), _ours(SPARSE), target, "of 128x128"),
        Bar(
            "the same, causal",
            _ours(f"{workload}-causal"),
            _ours(f"{SPARSE}-causal"),
            0.94,
            "of 128x128 causal",
            others=others,
        ),
    )


def _packed(size: int, group: int, others: str = "") -> Bar:
    """A group of heads fills a tile of 128 rows."""
    what = f"{size}x{size}, mask shared by {group} heads"
    workload = f"{size}x{size}-s16384-kv{32 // group}-density0.1-shared"
    reference = _ours(f"128x{size}-s16384-density0.1")
    return Bar(what, _ours(workload), reference, 0.93, f"of 128x{size}", others=others)


def _head_dim(dim: int, target: float) -> Bar:
    ours = _ours(f"128x128-s16384-dim{dim}-density0.1")
    dense = Quantity(f"dense-s8192-dim{dim}", "cudnn", "tflops")
    return Bar(f"128x128, head dim {dim}", ours, dense, target, "of cuDNN dense")


def _head_dim_between(dim: int, kernel_dim: int) -> Bar:
    """Products with columns of zeros are what such a head dim costs."""
    ours, reference = (_ours(f"128x128-s16384-dim{d}-density0.1".replace("-dim128", "")) for d in (dim, kernel_dim))
    what = f"128x128, head dim {dim}"
    return Bar(what, ours, reference, 0.93 * dim / kernel_dim, f"of head dim {kernel_dim}: 0.93 of {dim}/{kernel_dim}")


def _long(pattern: str, target: float) -> Bar:
    workload, reference = (f"128x128-s{seqlen}-heads8-{pattern}64-causal" for seqlen in (1048576, 65536))
    return Bar(f"1,048,576 tokens, 64 blocks a row, {pattern}", _ours(workload), _ours(reference), target, "of s 65536")


# s 16384, density 0.1, 32 heads, not causal, unless it says otherwise
SHAPES = (
    _of_c("128x128, s 32768", SPARSE, 1.03, "FlashAttention-4 611"),
    _of_c("the same, causal", f"{SPARSE}-causal", 1.10, "FlashAttention-4 575", "Cc"),
    *_wide("128x64", 0.98, "FlashAttention-4 441"),
    *_wide("128x32", 0.98, "FlashAttention-4 367"),
    *_wide("128x16", 0.98, "FlashInfer 398, not causal"),
    *_wide("256x64", 0.98, "443"),
    *_wide("192x48", 0.93),
    *_wide("128x80", 0.93),
    _of_c("64x64, s 32768", "64x64-s32768-density0.1", 0.80, "519"),
    _of_c("64x16", "64x16-s16384-density0.1", 0.72, "168"),
    _of_c("64x128", "64x128-s16384-density0.1", 0.80),
    _packed(64, 2, "402"),
    _packed(32, 4),
    _packed(16, 8),
    _of_c("80x48", "80x48-s16384-density0.1", 0.50, "257"),
    _of_c("112x64", "112x64-s16384-density0.1", 0.70),
    _of_c("32x32", "32x32-s16384-density0.1", 0.33, "85; 295 is the limit of L2"),
    _of_c("32x128", "32x128-s16384-density0.1", 0.33, "85; 295 is the limit of L2"),
    _of_c("16x16", "16x16-s16384-density0.1", 0.16, "55; 147 is the limit of L2"),
    _of_c("16x128", "16x128-s16384-density0.1", 0.16, "55; 147 is the limit of L2"),
    _of_c("16x16, 4 neighbours draw from one list", "16x16-s16384-density0.1-alike4", 0.50, "52"),
    _of_c("16x16, 8 neighbours draw from one list", "16x16-s16384-density0.1-alike8", 0.50, "52"),
    _of_c("64x64, s 32768, 2 neighbours draw from one list", "64x64-s32768-density0.1-alike2", 0.90),
    _of_c("64x64, s 32768, 4 neighbours draw from one list", "64x64-s32768-density0.1-alike4", 0.90),
    _of_c("1x128, groups of 16 heads, top 16, causal, s 65536", f"{TOKENS}-causal", 0.15),
    _of_c("the same, 16 neighbours draw from one list", f"{TOKENS}-alike16-causal", 0.45),
    _head_dim(64, 1.0),
    _head_dim(96, 1.0),
    _head_dim(192, 0.85),
    _head_dim(256, 0.85),
    _head_dim_between(40, 64),
    _head_dim_between(72, 96),
    _head_dim_between(80, 96),
    _head_dim_between(112, 128),
    _head_dim_between(160, 192),
    Bar(
        "half the heads dense, half 4 blocks a row, causal, s 32768",
        _ours("128x128-s32768-half-dense4-causal"),
        OneByOne(("all-true-s32768-heads16-causal", "128x128-s32768-heads16-random4-causal"), "hbsattn"),
        0.95,
        "of the halves alone",
    ),
    _long("local", 0.9),
    _long("random", 0.7),
    Bar(
        "batch 8, s 1024, causal: bool mask to result, GPU span",
        _ours(BATCH, "span_ms"),
        None,
        0.10,
        "ms",
        at_most=True,
        beside=_ours(BATCH, "host_ms"),
        others="FlashAttention-4 0.104 ms, attention alone",
    ),
    Bar(
        "4,096 sequences of 8 tokens, 8 heads, flat mask without a longest sequence: memory beyond inputs and result",
        _ours("all-true-packed4096x8-heads8-unbounded", "extra_bytes"),
        MB,
        64,
        "MB",
        at_most=True,
    ),
)

CB = Quantity("backward-dense-s8192", "cudnn", "tflops")
CBC = Quantity("backward-dense-s8192-causal", "cudnn", "tflops")
GRADIENT = f"backward-{SPARSE}"
SAME_LENGTH = "backward-128x128-s16384-density0.1"
TOP = "kv8-top0.1-diagonal-shared-causal"
TOP_SHORT = TOP.replace("0.1", "0.3")
RAGGED = "16384+9000+4096+2500+777"


def _of_cb(what: str, workload: str, targets: tuple[float, float], others: tuple[str, str]) -> tuple[Bar, Bar]:
    """Not causal and causal."""
    return (
        Bar(what, _ours(workload), CB, targets[0], "CB", others=others[0]),
        Bar("the same, causal", _ours(f"{workload}-causal"), CBC, targets[1], "CBc", others=others[1]),
    )


def _of_own(size: str, target: float) -> Bar:
    workload = f"backward-{size}-s16384-density0.1"
    return Bar(f"{size}, s 16384", _ours(workload), _ours(SAME_LENGTH), target, "of 128x128")


def _of_ungrouped(size: str) -> Bar:
    ours = _ours(f"backward-{size}-s16384-kv4-density0.1-shared")
    reference = _ours(f"backward-{size}-s16384-density0.1")
    return Bar(f"{size}, s 16384, mask shared by 8 heads", ours, reference, 0.95, "of as many key heads")


def _gradient_dim(dim: int, target: float) -> Bar:
    ours = _ours(f"backward-128x128-s32768-dim{dim}-density0.1")
    dense = Quantity(f"backward-dense-s8192-dim{dim}", "cudnn", "tflops")
    return Bar(f"128x128, s 32768, head dim {dim}", ours, dense, target, "of cuDNN dense")


def _frozen(what: str, letters: str, target: float) -> Bar:
    """Gradients that nobody asks for are not computed: three of five products, or four."""
    ours = _ours(f"{GRADIENT}-frozen-{letters}", "ms")
    return Bar(
        f"{what} frozen, 128x128, s 32768: time", ours, _ours(GRADIENT, "ms"), target, "of all three", at_most=True
    )


def _training(batch: int, seqlen: int, densities: tuple[float, ...]) -> list[Bar]:
    """Forward and backward: all true beside FlashAttention-2, and sparse at the rate of all true, that is, in a time in
    proportion to the active share, within 10%.
    """
    shape = f"batch{batch}-s{seqlen}" if batch > 1 else f"s{seqlen}"
    all_true = f"training-all-true-{shape}-causal"
    dense = Quantity(f"training-dense-{shape}-causal", "fa2", "ms")
    bars = [
        Bar(
            f"forward + backward, batch {batch}, s {seqlen}, causal, all true: time",
            _ours(all_true, "ms"),
            dense,
            0.68,
            "of FlashAttention-2",
            at_most=True,
            others="MIT 1.18",
        )
    ]
    for density in densities:
        workload = f"training-128x128-{shape}-density{density:g}-causal"
        reference = _ours(all_true)
        bars.append(Bar(f"the same, sparsity {1 - density:g}", _ours(workload), reference, 0.91, "of all true's rate"))
    return bars


# density 0.1, 32 heads, head dim 128, 10 x head dim operations a pair, not causal, unless it says otherwise
BACKWARD = (
    *_of_cb("128x128, s 32768", GRADIENT, (0.94, 0.92), ("cuDNN frontend 515", "FlashAttention-4 450")),
    *_of_cb(
        "all-true mask, s 8192",
        "backward-all-true-s8192",
        (1.02, 1.04),
        ("FlashAttention-4 603, FlashAttention-3 581", "FlashAttention-3 557"),
    ),
    *_of_cb("64x64, s 32768", "backward-64x64-s32768-density0.1", (0.72, 0.68), ("cuDNN frontend 399", "")),
    _of_own("128x64", 0.70),
    _of_own("64x128", 0.70),
    _of_own("32x128", 0.60),
    _of_own("128x32", 0.42),
    _of_own("128x16", 0.28),
    _of_ungrouped("128x128"),
    _of_ungrouped("64x64"),
    _gradient_dim(64, 0.90),
    _gradient_dim(96, 0.90),
    _gradient_dim(192, 1.0),
    _gradient_dim(256, 1.0),
    Bar(
        "deterministic, 128x128, s 32768: time",
        _ours(f"{GRADIENT}-deterministic", "ms"),
        _ours(GRADIENT, "ms"),
        1.6,
        "of the default",
        at_most=True,
    ),
    _frozen("k and v", "kv", 0.65),
    _frozen("q", "q", 0.75),
    Bar(
        "transposing and planning columns, 128x128, s 32768",
        _ours(GRADIENT, "column_plan_ms"),
        _ours(GRADIENT, "ms"),
        0.03,
        "of the backward",
        at_most=True,
    ),
    Bar(
        "scratch memory of a backward, 128x128, s 32768",
        _ours(GRADIENT, "extra_bytes"),
        _ours(GRADIENT, "extra_bytes_allowed"),
        1.0,
        "of dQ in float32 + 8 bytes a row + 16 MB",
        at_most=True,
    ),
    *_training(1, 32768, (0.5, 0.1)),
    *_training(1, 65536, (0.1,)),
    *_training(8, 32768, (0.1,)),
)


def _of_forward(what: str, mask: str, target: float) -> Bar:
    """The backward beside the forward of the same mask."""
    return Bar(what, _ours(f"backward-{mask}", "ms"), _ours(mask, "ms"), target, "of the forward", at_most=True)


def _of_dense(what: str, mask: str, dense: str, target: float) -> Bar:
    """Time beside cuDNN's without a mask."""
    reference = Quantity(f"backward-dense-{dense}", "cudnn", "ms")
    return Bar(what, _ours(f"backward-{mask}", "ms"), reference, target, "of cuDNN dense", at_most=True)


def _all_true(shape: str, target: float, heads: str = "") -> Bar:
    return _of_dense(f"all true, causal, {shape}{heads}", f"all-true-{shape}-causal", f"{shape}-causal", target)


def _of_cudnn(what: str, mask: str, target: float, unit: str = "CB") -> Bar:
    return Bar(what, _ours(f"backward-{mask}"), CBC if unit == "CBc" else CB, target, unit)


def _tokens(what: str, mask: str, rate: float, gib: float) -> list[Bar]:
    """Rate and workspace, of random lists and where 16 neighbours draw from one."""
    bars = []
    for kind, end in (("random", "-causal"), ("16 neighbours draw from one list", "-alike16-causal")):
        workload = f"backward-{mask}-diagonal-shared{end}"
        bars += [
            Bar(f"token rows, {what}, {kind}", _ours(workload), None, rate, "TF/s"),
            Bar("the same: workspace", _ours(workload, "extra_bytes"), GIB, gib, "GiB", at_most=True),
        ]
    return bars


# Masks that people train with: head dim 128, causal, top-k of 8 key heads, unless it says otherwise; an H100's targets.
REAL = (
    Bar(
        "default backward beside deterministic, all masks: the worst",
        Worst(("", "ms"), ("-deterministic", "ms")),
        None,
        1.02,
        "of its time",
        at_most=True,
    ),
    Bar(
        "deterministic backward beside default, all masks: the worst",
        Worst(("-deterministic", "ms"), ("", "ms")),
        None,
        1.4,
        "of its time",
        at_most=True,
    ),
    Bar(
        "workspace of the default backward, all masks: the worst",
        Worst(("", "extra_bytes"), ("", "extra_bytes_allowed")),
        None,
        1.0,
        "of sums in float32 + 8 bytes a row + 16 MB",
        at_most=True,
    ),
    _of_forward("top-k, 16384 + 9000 + 4096 + 2500 + 777, 128x64", f"128x64-packed{RAGGED}-{TOP}", 3.2),
    _of_forward("top-k, 32 x 1024, 128x64, density .46", f"128x64-packed32x1024-{TOP_SHORT}", 3.4),
    _of_dense("the same", f"128x64-packed32x1024-{TOP_SHORT}", "batch32-s1024-kv8-causal", 0.5),
    _of_forward("top-k, s 32768, 128x64", f"128x64-s32768-{TOP}", 3.2),
    _of_forward("top-k, s 32768, 128x128", f"128x128-s32768-{TOP}", 3.0),
    _of_forward("top-k 5%, s 131072, 128x128", f"128x128-s131072-{TOP.replace('0.1', '0.05')}", 2.9),
    _of_forward("batch 8, s 4096, 32 heads, 64x64, density .25", "64x64-batch8-s4096-density0.25-diagonal-causal", 2.9),
    _of_forward("the same, 8 key heads", "64x64-batch8-s4096-kv8-density0.25-diagonal-shared-causal", 3.3),
    _of_forward("s 32768, 8 key heads, 64x64, density .06", "64x64-s32768-kv8-density0.06-diagonal-shared-causal", 3.3),
    _of_forward("s 32768, 32 heads, 128x128, density .05", "128x128-s32768-density0.05-diagonal-causal", 3.4),
    _all_true("batch64-s512-heads16", 0.80),
    _all_true("batch8-s1024", 0.90),
    _all_true("batch32-s1024", 0.90),
    _all_true("batch8-s4096", 0.90),
    _all_true("batch2-s8192", 0.88),
    _of_cudnn("128x128, s 32768, density .1, not causal", SPARSE, 1.04),
    _of_cudnn("the same, causal", f"{SPARSE}-causal", 1.00, "CBc"),
    _of_cudnn("64x64, s 32768, density .1, not causal", "64x64-s32768-density0.1", 0.73),
    Bar("128x64, the same", _ours("backward-128x64-s32768-density0.1"), _ours(GRADIENT), 0.74, "of 128x128"),
    Bar("128x16, the same", _ours("backward-128x16-s32768-density0.1"), _ours(GRADIENT), 0.58, "of 128x128"),
    # What an earlier version had beside cuDNN on an H100, times 2, 1.5, 1.3 and, of the local blocks, 1.25.
    _of_cudnn("64x16, s 16384, density .1, not causal", "64x16-s16384-density0.1", 0.43),
    _of_cudnn("16x16, the same", "16x16-s16384-density0.1", 0.30),
    _of_cudnn("32x32, the same", "32x32-s16384-density0.1", 0.46),
    _of_cudnn("1 sink and 8 local blocks of 128, s 32768", "128x128-s32768-local9-sinks1-causal", 0.98, "CBc"),
    *_tokens("32:2 heads, k 64, top 64, s 32768", "1x64-s32768-kv2-random64", 250, 0.8),
    *_tokens("64:4 heads, k 128, top 16, s 32768", "1x128-s32768-heads64-kv4-random16", 280, 1.5),
    Bar(
        "128x128, s 32768, density .1, a mask for each of 4 key heads, not causal",
        _ours("backward-128x128-s32768-kv4-density0.1-shared"),
        _ours(GRADIENT),
        0.98,
        "of 32 key heads",
    ),
    Bar(
        "forward + backward, s 32768, density .1",
        _ours("training-128x128-s32768-density0.1-causal"),
        _ours("training-all-true-s32768-causal"),
        0.90,
        "of all true's rate",
    ),
)


STREAMING = "64 sink and 256 local tokens"


def _windowed(shape: str, windows: str) -> str:
    """The name of an all-true mask with windows."""
    return f"all-true-{shape}-window-{windows}-causal"


def _streaming(shape: str) -> str:
    return _windowed(shape, "left255-sink64")


def _half_dense(seqlen: int, tokens: float, blocks: float, task: str = "") -> list[Bar]:
    """Every second head dense, the others streaming by tokens or by blocks: rates as if all were dense."""
    what = f"{'forward + backward, ' if task else ''}half the heads dense, half {STREAMING}, s {seqlen}"
    named = (
        (what, _windowed(f"s{seqlen}", "all+left255-sink64"), tokens),
        ("the same, half 1 sink and 3 local blocks of 128", f"128x128-s{seqlen}-half-streaming4-causal", blocks),
    )
    all_true = _ours(f"{task}all-true-s{seqlen}-causal")
    return [
        Bar(what, _ours(f"{task}{mask}", "dense_tflops"), all_true, target, "of all true, dense-equivalent")
        for what, mask, target in named
    ]


def _sliding(what: str, target: float, task: str = "") -> Bar:
    own = _ours(f"{task}all-true-s65536-causal")
    return Bar(what, _ours(f"{task}{_windowed('s65536', 'left4095')}"), own, target, "of all true's rate")


def _with_addition(what: str, addition: str, forward: float, backward: float) -> list[Bar]:
    return [
        Bar(
            f"{what}, all true, s 32768: time{', backward' if task else ''}",
            _ours(f"{task}all-true-s32768-{addition}-causal", "ms"),
            _ours(f"{task}all-true-s32768-causal", "ms"),
            target,
            "of that without",
            at_most=True,
        )
        for task, target in (("", forward), ("backward-", backward))
    ]


def _with_short_values(task: str = "") -> Bar:
    name = f"{task}all-true-s16384-dim192"
    what = f"values of 128 columns, head dim 192, all true, s 16384{', backward' if task else ''}"
    return Bar(what, _ours(f"{name}-values128-causal"), _ours(f"{name}-causal"), 0.95, "of the rate with 192")


# Heads of every kind, those of one call alike or not: 32 heads, head dim 128, causal. All true is our own mask.
HEADS = (
    *_half_dense(8192, 1.60, 1.63),
    *_half_dense(32768, 1.85, 1.87),
    *_half_dense(65536, 1.91, 1.92),
    *_half_dense(131072, 1.95, 1.95),
    *_half_dense(65536, 1.85, 1.85, "training-"),
    Bar(
        f"all heads {STREAMING}, s 65536",
        _ours(_streaming("s65536")),
        _ours("all-true-s65536-causal"),
        0.35,
        "of all true's rate",
    ),
    Bar(
        "the same, 8 heads, s 1048576: time of a token and head",
        _ours(_streaming("s1048576-heads8"), "token_ns"),
        _ours(_streaming("s8192"), "token_ns"),
        1.08,
        "of 32 heads, s 8192",
        at_most=True,
    ),
    _sliding("sliding window of 4096 tokens, s 65536", 0.88),
    _sliding("the same, backward", 0.85, "backward-"),
    Bar(
        "windows that hide nothing, all true, s 32768: time",
        _ours(_windowed("s32768", "all"), "ms"),
        _ours("all-true-s32768-causal", "ms"),
        1.01,
        "of that without windows",
        at_most=True,
    ),
    *_with_addition("a sink for each head", "head-sinks", 1.02, 1.02),
    *_with_addition("dropout 0.1", "dropout0.1", 1.20, 1.25),
    *_with_addition("a softcap of 50", "softcap50", 1.12, 1.12),
    _with_short_values(),
    _with_short_values("backward-"),
)


def _of_efficient(task: str, kind: str, shape: str, end: str, target: float) -> Bar:  # in float32
    reference = Quantity(f"{task}dense-{shape}", "efficient", "tflops")
    return Bar(f"{task}{kind}-{shape}{end}", _ours(f"{task}{kind}-{shape}{end}"), reference, target, "of dense")


FLOAT32 = tuple(
    _of_efficient(task, kind, f"s8192-heads16{dim}-float32", end, target)
    for dim in ("-dim64", "")
    for kind, end in (("all-true", ""), ("128x128", "-density0.1"))
    for task, target in (("", 1.5), ("backward-", 1.3))
)

SETS = {"basics": BASICS, "shapes": SHAPES, "backward": BACKWARD, "real": REAL, "heads": HEADS, "float32": FLOAT32}


def evaluate(name: str, rows: Rows) -> list[dict[str, object]]:
    """A set of bars with what was measured, ready for JSON.

    `measured` is None where a number is missing. `met` is then None, too, unless our row says what the problem is.
    """
    results = []
    for bar in SETS[name]:
        value = bar.measure(rows)
        beside = bar.beside.read(rows) if bar.beside else None
        problem = bar.ours.problem(rows)
        results.append(
            {
                "set": name,
                "what": bar.what,
                "target": bar.target,
                "at_most": bar.at_most,
                "unit": bar.unit,
                "measured": value,
                "met": False if problem else None if value is None else bar.met(value),
                "problem": problem,
                "ours": bar.ours.read(rows),
                "reference": bar.reference.read(rows) if bar.reference else None,
                "beside": {bar.beside.field: beside} if bar.beside else None,
                "where": bar.ours.where(rows),
                "others": bar.others,
            }
        )
    return results


def table(results: list[dict[str, object]]) -> list[list[str]]:
    """Cells of the table, headings first."""
    cells = [["bar", "target", "measured", "", "others, in other runs"]]
    for result in results:
        measured = textwrap.shorten(result["problem"] or "not measured", 60)
        if result["measured"] is not None and not result["problem"]:
            measured = f"{result['measured']:.3f}"
            if result["reference"] is not None:
                measured += f" = {_short(result['ours'])} / {_short(result['reference'])}"
            for field, value in (result["beside"] or {}).items():
                measured += f" ({field.removesuffix('_ms')} {_short(value)} ms)" if value is not None else ""
            measured += f" ({result['where']})" if result["where"] else ""
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
