"""Shows the masks that people train with, those of `run.py --bars real`: python benchmarks/gallery.py -o gallery.svg

Prints a table of their names, recipes and densities, and draws one head of each. It needs no GPU.
"""

from __future__ import annotations

import argparse
import base64
import dataclasses
import struct
import sys
import zlib
from html import escape
from pathlib import Path

import torch
from torch import Tensor

import masks
import workloads
from workloads import Workload

TEXT = "#768390"
COLOR = (47, 125, 225)
LEVELS = 16  # shades, from none of an area that attends to all of it
PIXELS = 64  # of a picture's side
SIDE, GAP, CAPTION, COLUMNS = 192, 24, 58, 4  # on the page
LINE = 30  # characters of a caption's line
SEED = 1


def gallery() -> list[Workload]:
    """Each mask once, as its forward."""
    return [work for group in workloads.real_groups() for work in group.workloads if work.task == "forward"]


def draw_head(workload: Workload) -> Tensor:
    """One head of one sequence, or of all packed ones: bool (query blocks, key blocks), cut at the diagonal."""
    group = workload.heads // workload.mask_heads
    one = dataclasses.replace(workload, batch=1, heads=group, heads_k=1, shared=True)
    visible, _ = masks.visible_blocks(one, "cpu")
    return masks.make_mask(one, "cpu", SEED)[0, 0] & visible


def density(workload: Workload, head: Tensor) -> float:
    """The share of the visible blocks that are on."""
    visible, _ = masks.visible_blocks(workload, "cpu")
    return float(head.sum() / visible.sum())


def recipe(workload: Workload) -> str:
    """How the mask is made, in words."""
    work = workload
    what = {
        "top-k": f"the best {work.density:.0%} of each row by pooled scores",
        "local": f"the last {(work.per_row or 0) - work.sink_blocks} blocks of each row",
        "random": f"each block with probability {work.density:g}",
    }[work.pattern]
    if work.per_row and work.pattern == "random":
        what = f"{work.per_row} random blocks of each row"
        if work.alike > 1:
            what += f", of a list that {work.alike} neighbours share by {masks.KEPT:.0%}"
    always = []
    if work.sink_blocks:
        always.append("the first block" if work.sink_blocks == 1 else f"the first {work.sink_blocks} blocks")
    if work.diagonal:
        always.append("a row's own")
    parts = ["all true"] if work.density >= 1 else [what, " and ".join(always) + " always" if always else ""]
    parts += ["causal" if work.causal else ""]
    parts += [f"a mask for each of {work.mask_heads} {'key ' if work.shared else ''}heads"]
    return "; ".join(filter(None, parts))


def picture(head: Tensor) -> bytes:
    """A PNG whose opacity says what share of an area attends. Square roots, so that sparse areas are seen."""
    share = torch.nn.functional.adaptive_avg_pool2d(head[None, None].float(), PIXELS)[0, 0]
    shade = (share.sqrt() * (LEVELS - 1)).round().to(torch.uint8)
    packed = (shade[:, ::2] << 4) | shade[:, 1::2]
    rows = b"".join(b"\0" + bytes(row.tolist()) for row in packed)  # each begins with its filter: none
    alpha = bytes(255 * level // (LEVELS - 1) for level in range(LEVELS))
    header = struct.pack(">IIBBBBB", PIXELS, PIXELS, 4, 3, 0, 0, 0)  # 4 bits a pixel, from a palette
    chunks = ((b"IHDR", header), (b"PLTE", bytes(COLOR) * LEVELS), (b"tRNS", alpha), (b"IDAT", zlib.compress(rows, 9)))
    return b"\x89PNG\r\n\x1a\n" + b"".join(_chunk(*chunk) for chunk in (*chunks, (b"IEND", b"")))


def _chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def page(entries: list[tuple[str, float, bytes]]) -> str:
    """The SVG: pictures in rows, each with its name and density below."""
    rows = -(-len(entries) // COLUMNS)
    width, height = COLUMNS * (SIDE + GAP) + GAP, rows * (SIDE + CAPTION + GAP) + GAP
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' width='{width}' height='{height}'>",
        f"<g font-family='Helvetica, Arial, sans-serif' font-size='11' fill='{TEXT}'>",
    ]
    for i, (name, share, png) in enumerate(entries):
        x, y = GAP + i % COLUMNS * (SIDE + GAP), GAP + i // COLUMNS * (SIDE + CAPTION + GAP)
        data = base64.b64encode(png).decode()
        parts.append(
            f"<image x='{x}' y='{y}' width='{SIDE}' height='{SIDE}' preserveAspectRatio='none' "
            f"style='image-rendering:pixelated' href='data:image/png;base64,{data}'/>"
        )
        parts.append(f"<rect x='{x}' y='{y}' width='{SIDE}' height='{SIDE}' fill='none' stroke='{TEXT}'/>")
        for n, line in enumerate([*_wrap(name), f"density {share:.3f}"]):
            parts.append(f"<text x='{x}' y='{y + SIDE + 14 + 13 * n}'>{escape(line)}</text>")
    return "\n".join([*parts, "</g>", "</svg>", ""])


def _wrap(name: str) -> list[str]:
    """A workload's name in lines that end behind hyphens."""
    lines = [""]
    for part in name.replace("-", "-\n").split("\n"):
        if lines[-1] and len(lines[-1]) + len(part) > LINE:
            lines.append("")
        lines[-1] += part
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description="Names, recipes and densities of the masks that people train with.")
    parser.add_argument("-o", "--output", type=Path, help="SVG to write, with a picture of each")
    arguments = parser.parse_args()
    print("| mask | recipe | density |\n| --- | --- | --- |")
    entries = []
    for workload in gallery():
        head = draw_head(workload)
        share = density(workload, head)
        print(f"| `{workload.name}` | {recipe(workload)} | {share:.3f} |", flush=True)
        entries.append((workload.name, share, picture(head)))
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        arguments.output.write_text(page(entries))
    return 0


if __name__ == "__main__":
    sys.exit(main())
