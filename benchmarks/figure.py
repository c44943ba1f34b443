"""Draws a figure from results: python benchmarks/figure.py results/bars.json -o figure.svg

Rates over block sizes: hbsattn and the rivals that compute the mask as bars, dense attention as lines; for the shape
with most block sizes, or with --all for every shape, from one file of results or several; of the forward, or with
--task backward of the gradients. It needs Python alone. Lines and text are mid-tones, readable on a light and on a dark
page.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from html import escape
from pathlib import Path

TEXT = "#768390"
BAR_COLORS = ("#2f7de1", "#e0872d", "#8f63d2", "#2ba38f", "#c94f7c", "#8a8f3c", "#7a6f66")
LINE_COLORS = ("#2c9c52", "#d0483f", "#a9762a")
WIDTH, PANEL_HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 276, 58, 24, 34, 46
LEGEND_ROW = 20
FONT = "font-family='Helvetica, Arial, sans-serif'"

Row = dict[str, object]
Size = tuple[int, int, str]  # query block, key block, and what is not usual about the mask


@dataclass
class Panel:
    """One set of axes: for each block size the rates of some contestants, and rates that do not depend on it."""

    title: str
    sizes: list[Size]
    rates: dict[str, dict[Size, float]]  # by contestant and block size
    lines: dict[str, float]
    labels: dict[str, str]


def panels_of(rows: list[Row], all_shapes: bool = False, task: str = "forward") -> list[Panel]:
    """The shape that was timed at most block sizes, or all shapes with several, not causal and causal.

    Of a workload and contestant that was timed more than once, the first row is shown. Raises ValueError if nothing is
    to be shown.
    """
    rows = [row for row in rows if row.get("tflops") and _task(row) == task]
    timed = list({(row["workload"], row["contestant"]): row for row in reversed(rows)}.values())
    timed.reverse()
    groups: dict[tuple, list[Row]] = defaultdict(list)
    for row in timed:
        shape = row["shape"]
        if shape["density"] < 1 and shape.get("per_row") is None and _is_plain(shape):
            groups[(*_tensors(shape), shape["density"])].append(row)
    if not groups:
        raise ValueError("the results hold no timed workload with a block mask")

    def variety(key: tuple) -> int:
        return len({_size(row) for row in groups[key]})

    panels = []
    for key in sorted(groups, key=variety, reverse=True)[: None if all_shapes else 1]:
        for causal in (False, True):
            chosen = [row for row in groups[key] if row["shape"]["causal"] == causal]
            if len({_size(row) for row in chosen}) >= 2:
                panels.append(_panel(key, causal, chosen, timed))
    if not panels:
        raise ValueError("the results hold no shape with two block sizes")
    return panels


def _panel(key: tuple, causal: bool, chosen: list[Row], timed: list[Row]) -> Panel:
    rates: dict[str, dict[Size, float]] = defaultdict(dict)
    for row in chosen:
        rates[row["contestant"]][_size(row)] = row["tflops"]
    batch, seqlen, heads, head_dim, dtype, density = key
    title = f"{'causal' if causal else 'not causal'}, s {seqlen}, density {density:g}, {heads} heads of {head_dim}"
    title += f", {dtype}" + (f", batch {batch}" if batch > 1 else "")
    lines, line_seqlen = _dense_rates(timed, chosen[0]["shape"])
    if lines and line_seqlen != seqlen:
        title += f" (dense: s {line_seqlen})"
    sizes = sorted({_size(row) for row in chosen}, key=lambda size: (size[2], -size[0], -size[1]))
    return Panel(title, sizes, rates, lines, {row["contestant"]: row["label"] for row in timed})


def draw(panels: list[Panel], caption: str) -> str:
    """The SVG."""
    contestants = list(dict.fromkeys(name for panel in panels for name in panel.rates))
    lines = list(dict.fromkeys(name for panel in panels for name in panel.lines))
    labels = {name: label for panel in panels for name, label in panel.labels.items()}
    colors = {name: BAR_COLORS[i % len(BAR_COLORS)] for i, name in enumerate(contestants)}
    colors |= {name: LINE_COLORS[i % len(LINE_COLORS)] for i, name in enumerate(lines)}
    legend, legend_rows = _legend(contestants, lines, labels, colors)
    head = 14 + legend_rows * LEGEND_ROW
    height = head + len(panels) * PANEL_HEIGHT + 26
    top_rate = max(rate for panel in panels for rate in (*panel.lines.values(), *_all_rates(panel.rates)))
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {height}' width='{WIDTH}' height='{height}'>",
        f"<g {FONT} font-size='12' fill='{TEXT}'>",
        *legend,
    ]
    for i, panel in enumerate(panels):
        parts += _draw_panel(panel, head + i * PANEL_HEIGHT, top_rate, contestants, colors)
    parts.append(f"<text x='{LEFT}' y='{height - 10}' font-size='10'>{escape(caption)}</text>")
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _draw_panel(panel: Panel, y: int, top_rate: float, contestants: list[str], colors: dict[str, str]) -> list[str]:
    bottom = y + PANEL_HEIGHT - BOTTOM
    unit = (PANEL_HEIGHT - TOP - BOTTOM) / (100 * -(-top_rate * 1.04 // 100))
    right = WIDTH - RIGHT
    parts = [f"<text x='{LEFT}' y='{y + 18}' font-weight='bold'>{escape(panel.title)}</text>"]
    for rate in range(0, int(100 * -(-top_rate * 1.04 // 100)) + 1, 100):
        at = bottom - rate * unit
        parts.append(
            f"<line x1='{LEFT}' x2='{right}' y1='{at:.1f}' y2='{at:.1f}' stroke='{TEXT}' stroke-opacity='0.25'/>"
        )
        parts.append(f"<text x='{LEFT - 8}' y='{at + 4:.1f}' text-anchor='end'>{rate}</text>")
    middle = (y + TOP + bottom) / 2
    parts.append(
        f"<text transform='translate(16 {middle:.1f}) rotate(-90)' text-anchor='middle'>TF/s on active pairs</text>"
    )
    slot = (right - LEFT) / len(panel.sizes)
    shown = [name for name in contestants if name in panel.rates]
    width = min(44.0, slot * 0.8 / len(shown))
    font_size = 12 if slot > 60 else 10
    for i, size in enumerate(panel.sizes):
        center = LEFT + (i + 0.5) * slot
        for text, y, font in ((f"{size[0]} x {size[1]}", bottom + 15, font_size), (size[2], bottom + 26, 9)):
            if text:
                at = f"x='{center:.1f}' y='{y}' font-size='{font}'"
                parts.append(f"<text {at} text-anchor='middle'>{escape(text)}</text>")
        present = [name for name in shown if size in panel.rates[name]]
        for j, name in enumerate(present):
            rate = panel.rates[name][size]
            x = center + (j - len(present) / 2) * width
            parts.append(
                f"<rect x='{x + 1:.1f}' y='{bottom - rate * unit:.1f}' width='{width - 2:.1f}' "
                f"height='{rate * unit:.1f}' rx='2' fill='{colors[name]}'/>"
            )
            if width >= 22:
                parts.append(
                    f"<text x='{x + width / 2:.1f}' y='{bottom - 7}' text-anchor='middle' "
                    f"font-size='10' fill='#ffffff'>{rate:.0f}</text>"
                )
    for name, rate in panel.lines.items():
        at = bottom - rate * unit
        parts.append(
            f"<line x1='{LEFT}' x2='{right}' y1='{at:.1f}' y2='{at:.1f}' stroke='{colors[name]}' stroke-width='2' "
            "stroke-dasharray='7 5'/>"
        )
        parts.append(
            f"<text x='{right}' y='{at - 5:.1f}' text-anchor='end' font-size='10' "
            f"fill='{colors[name]}'>{rate:.0f}</text>"
        )
    middle = (LEFT + right) / 2
    parts.append(f"<text x='{middle:.1f}' y='{bottom + 40}' text-anchor='middle'>query block x key block</text>")
    return parts


def _legend(
    contestants: list[str], lines: list[str], labels: dict[str, str], colors: dict[str, str]
) -> tuple[list[str], int]:
    """The legend's elements and rows."""
    parts = []
    x, row = LEFT, 0
    for name in [*contestants, *lines]:
        width = 30 + 6.6 * len(labels[name])
        if x + width > WIDTH - RIGHT and x > LEFT:
            x, row = LEFT, row + 1
        y = 16 + row * LEGEND_ROW
        if name in lines:
            parts.append(
                f"<line x1='{x:.1f}' x2='{x + 16:.1f}' y1='{y - 4}' y2='{y - 4}' stroke='{colors[name]}' "
                "stroke-width='2' stroke-dasharray='6 4'/>"
            )
        else:
            parts.append(f"<rect x='{x + 2:.1f}' y='{y - 10}' width='12' height='12' rx='2' fill='{colors[name]}'/>")
        parts.append(f"<text x='{x + 21:.1f}' y='{y}'>{escape(labels[name])}</text>")
        x += width + 8
    return parts, row + 1


def _dense_rates(timed: list[Row], shape: Row) -> tuple[dict[str, float], int]:
    """Rates of dense attention with these heads, from rivals that ignore the mask, and the length of its sequences:
    this one, or else the longest that was timed.
    """
    rates: dict[int, dict[str, float]] = defaultdict(dict)
    for row in timed:
        other = row["shape"]
        alike = all(other[key] == shape[key] for key in ("batch", "heads", "head_dim", "dtype", "causal"))
        dense = row["workload"].removeprefix(f"{_task(row)}-").startswith("dense-")
        if dense and alike and other["heads_k"] == other["heads"]:
            rates[other["seqlen"]][row["contestant"]] = row["tflops"]
    seqlen = shape["seqlen"] if shape["seqlen"] in rates else max(rates, default=0)
    return rates.get(seqlen, {}), seqlen


def _task(row: Row) -> str:
    """What was timed; "deterministic" for gradients that are slower for it and "frozen" for some of them, which no
    figure shows.
    """
    shape = row["shape"]
    special = (name for name in ("deterministic", "frozen") if shape.get(name))
    return next(special, shape.get("task", "forward"))


def _is_plain(shape: Row) -> bool:
    """Whether the mask is random with a first column, which block sizes can be compared on."""
    unusual = any(shape.get(name) for name in ("lengths", "diagonal", "windows")) or shape.get("sinks") is not None
    return shape.get("pattern", "random") == "random" and not unusual


def _tensors(shape: Row) -> tuple:
    return tuple(shape[key] for key in ("batch", "seqlen", "heads", "head_dim", "dtype"))


def _size(row: Row) -> Size:
    shape = row["shape"]
    notes = []
    if shape["heads_k"] != shape["heads"]:
        notes.append(f"group {shape['heads'] // shape['heads_k']}")
    if shape.get("alike", 1) > 1:
        notes.append(f"alike {shape['alike']}")
    return shape["q_block"], shape["k_block"], ", ".join(notes)


def _all_rates(rates: dict[str, dict[Size, float]]) -> list[float]:
    return [rate for by_size in rates.values() for rate in by_size.values()]


def main() -> int:
    parser = argparse.ArgumentParser(description="Draws rates over block sizes from the results of run.py.")
    parser.add_argument("results", type=Path, nargs="+", help="JSON that run.py wrote; of several, the first counts")
    parser.add_argument("--all", action="store_true", help="all shapes with several block sizes, not only the largest")
    parser.add_argument("--task", choices=("forward", "backward"), default="forward", help="default %(default)s")
    parser.add_argument("-o", "--output", type=Path, required=True, help="SVG to write")
    arguments = parser.parse_args()
    results = [json.loads(path.read_text()) for path in arguments.results]
    described = results[0]["environment"]
    caption = (
        f"{described['gpu']}, CUDA {described['cuda']}, torch {described['versions']['torch']}, "
        f"{described['date'][:10]}; {arguments.task}, spaced and alternating, every result checked"
    )
    try:
        rows = [row for result in results for row in result["rows"]]
        svg = draw(panels_of(rows, arguments.all, arguments.task), caption)
    except ValueError as error:
        print(f"{', '.join(map(str, arguments.results))}: {error}", file=sys.stderr)
        return 1
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(svg)
    return 0


if __name__ == "__main__":
    sys.exit(main())
