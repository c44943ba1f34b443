"""Trains a small transformer twice from one seed, with hbsattn and with dense masked attention: do the losses agree?

    python benchmarks/train.py --json benchmarks/results/train.json     # and a figure beside it, train.svg
    python benchmarks/train.py --device cpu --steps 3                   # a look without a GPU, in float32

Each text repeats a phrase: a model first learns which tokens follow which, then to find the phrase before and copy it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from html import escape
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import environment
import figure
import hbsattn

LAYERS, HEADS, HEAD_DIM, SEQLEN, BLOCK = 4, 8, 64, 1024, 64
WIDTH = HEADS * HEAD_DIM
WINDOWS = (1, 2, 4, 8)  # key blocks up to the diagonal that a head attends to, from head to head in turns
TOKENS, FOLLOWERS = 64, 4  # different tokens, and how many of them may follow one
PHRASE = (32, 128)  # tokens, at least and at most
LEARNING_RATE, WARM_UP, CLIP = 1e-3, 20, 1.0
LAST = 50  # steps over which the final loss is averaged

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]  # of q, k and v (batch, seqlen, heads, head_dim)


def make_blocks(device: torch.device) -> Tensor:
    """The mask, the first key block and a window up to the diagonal: bool (1, heads, query blocks, key blocks)."""
    block = torch.arange(SEQLEN // BLOCK, device=device)
    distance = block[:, None] - block[None]
    windows = torch.tensor([WINDOWS[head % len(WINDOWS)] for head in range(HEADS)], device=device)
    local = (distance >= 0) & (distance < windows[:, None, None])
    return (local | ((distance >= 0) & (block == 0)))[None]


def make_sparse(batch: int, device: torch.device) -> Attend:
    mask = hbsattn.BlockMask.from_dense(make_blocks(device), BLOCK, BLOCK, causal=True, batch_size=batch)
    return lambda q, k, v: hbsattn.block_sparse_attention(q, k, v, mask)


def make_dense(batch: int, device: torch.device) -> Attend:
    pairs = make_blocks(device).repeat_interleave(BLOCK, 2).repeat_interleave(BLOCK, 3).tril()

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, attn_mask=pairs).transpose(1, 2)

    return attend


CONTESTANTS = {"hbsattn": make_sparse, "dense": make_dense}
LABELS = {"hbsattn": "hbsattn", "dense": "dense masked attention (SDPA)"}


class Layer(nn.Module):
    """Attention and a perceptron, each behind a norm and beside a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(2))
        self.qkv = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.merge = nn.Linear(WIDTH, WIDTH, bias=False)
        self.perceptron = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor, attend: Attend, angles: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        x = x + self.merge(attend(rotate(q, angles), rotate(k, angles), v).flatten(2))
        return x + self.perceptron(self.norms[1](x))


class Transformer(nn.Module):
    """A decoder: logits of the next token at each position."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, WIDTH)
        self.layers = nn.ModuleList(Layer() for _ in range(LAYERS))
        self.norm = nn.LayerNorm(WIDTH)
        self.logits = nn.Linear(WIDTH, TOKENS, bias=False)
        speeds = 1e4 ** -(torch.arange(HEAD_DIM // 2) / (HEAD_DIM // 2))
        self.register_buffer("angles", torch.arange(SEQLEN)[:, None, None] * speeds)

    def forward(self, tokens: Tensor, attend: Attend) -> Tensor:
        x = self.embedding(tokens)
        for layer in self.layers:
            x = layer(x, attend, self.angles)
        return self.logits(self.norm(x))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Turns pairs of elements of x (batch, seqlen, heads, head_dim) by angles that grow with the position."""
    a, b = x.float().chunk(2, -1)
    sin, cos = angles.sin(), angles.cos()
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1).to(x.dtype)


def make_texts(count: int, seed: int) -> Tensor:
    """Random phrases, each repeated to the end: int64 (count, SEQLEN + 1)."""
    generator = torch.Generator().manual_seed(seed)
    followers = torch.rand(TOKENS, TOKENS, generator=generator).topk(FOLLOWERS).indices
    chosen = torch.randint(FOLLOWERS, (count, PHRASE[1]), generator=generator)
    phrases = torch.randint(TOKENS, (count, PHRASE[1]), generator=generator)
    for i in range(1, PHRASE[1]):
        phrases[:, i] = followers[phrases[:, i - 1], chosen[:, i]]
    lengths = torch.randint(PHRASE[0], PHRASE[1] + 1, (count, 1), generator=generator)
    return phrases.gather(1, torch.arange(SEQLEN + 1) % lengths)


def train(attend: Attend, texts: Tensor, seed: int) -> list[float]:
    """The loss of each step. texts: (steps, batch, SEQLEN + 1)."""
    device = texts.device
    torch.manual_seed(seed)
    model = Transformer().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min((step + 1) / WARM_UP, 1.0))
    losses = []
    for text in texts:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(text[:, :-1], attend)
        loss = cross_entropy(logits.flatten(0, 1).float(), text[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    return torch.stack(losses).tolist()


def draw(losses: dict[str, list[float]], caption: str) -> str:
    """The curves as an SVG."""
    left, right, top, bottom = figure.LEFT, figure.WIDTH - figure.RIGHT, 40, 300
    steps = max(len(values) for values in losses.values())
    highest = -(-max(max(values) for values in losses.values()) // 1)
    x_unit, y_unit = (right - left) / max(steps - 1, 1), (bottom - top) / highest
    size = f"width='{figure.WIDTH}' height='{bottom + 66}'"
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {figure.WIDTH} {bottom + 66}' {size}>",
        f"<g {figure.FONT} font-size='12' fill='{figure.TEXT}'>",
    ]
    for loss in range(int(highest) + 1):
        at = bottom - loss * y_unit
        grid = f"stroke='{figure.TEXT}' stroke-opacity='0.25'"
        parts.append(f"<line x1='{left}' x2='{right}' y1='{at:.1f}' y2='{at:.1f}' {grid}/>")
        parts.append(f"<text x='{left - 8}' y='{at + 4:.1f}' text-anchor='end'>{loss}</text>")
    for step in range(0, steps, max(steps // 6, 1)):
        parts.append(f"<text x='{left + step * x_unit:.1f}' y='{bottom + 16}' text-anchor='middle'>{step}</text>")
    # The curves lie on each other: a wide one below, a narrow one above.
    styles = {"dense": (figure.BAR_COLORS[1], 5), "hbsattn": (figure.BAR_COLORS[0], 1.5)}
    for i, (name, (color, width)) in enumerate(styles.items()):
        points = " ".join(f"{left + j * x_unit:.1f},{bottom - y * y_unit:.1f}" for j, y in enumerate(losses[name]))
        stroke = f"fill='none' stroke='{color}' stroke-width='{width}'"
        parts.append(f"<polyline points='{points}' {stroke} stroke-linejoin='round'/>")
        x = left + i * 250
        parts.append(f"<line x1='{x}' x2='{x + 18}' y1='16' y2='16' {stroke}/>")
        parts.append(f"<text x='{x + 24}' y='20'>{LABELS[name]}</text>")
    middle = (top + bottom) / 2
    parts.append(f"<text transform='translate(16 {middle:.1f}) rotate(-90)' text-anchor='middle'>loss</text>")
    parts.append(f"<text x='{(left + right) / 2:.1f}' y='{bottom + 34}' text-anchor='middle'>step</text>")
    parts.append(f"<text x='{left}' y='{bottom + 56}' font-size='10'>{escape(caption)}</text>")
    return "\n".join([*parts, "</g>", "</svg>", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description="Compares losses of training with hbsattn and with dense attention.")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"), help="default %(default)s")
    parser.add_argument("--steps", type=int, default=400, help="default %(default)s")
    parser.add_argument("--batch", type=int, help="texts in a step; default 16, on a CPU 2")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the texts; default %(default)s")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the losses here, and their figure beside it")
    parser.add_argument("--commit", help="what to record as commit where git cannot tell")
    arguments = parser.parse_args()
    if arguments.steps < 1:
        parser.error("--steps is the number of steps, at least 1")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print("benchmarks/train.py needs a CUDA GPU, or --device cpu; torch sees none", file=sys.stderr)
        return 2
    device = torch.device(arguments.device)
    on_gpu = device.type == "cuda"
    batch = arguments.batch or (16 if on_gpu else 2)
    texts = make_texts(arguments.steps * batch, arguments.seed).view(arguments.steps, batch, -1).to(device)

    losses, seconds = {}, {}
    for name, make in CONTESTANTS.items():
        begin = time.perf_counter()
        losses[name] = train(make(batch, device), texts, arguments.seed)
        seconds[name] = time.perf_counter() - begin
    differences = [abs(ours - dense) for ours, dense in zip(losses["hbsattn"], losses["dense"], strict=True)]
    largest = max(differences)
    last = min(LAST, arguments.steps)

    where = torch.cuda.get_device_name() if on_gpu else "CPU"
    dtype = "bfloat16" if on_gpu else "float32"
    print(f"{where}, {dtype}: {LAYERS} layers, {HEADS} heads of {HEAD_DIM}, {batch} texts of {SEQLEN} tokens a step")
    print(f"{'':32}{'first loss':>12}{f'last {last}, mean':>16}{'seconds':>10}")
    for name, values in losses.items():
        print(f"{LABELS[name]:32}{values[0]:12.4f}{sum(values[-last:]) / last:16.4f}{seconds[name]:10.1f}")
    print(f"largest difference of a step's losses: {largest:.4f}, in step {differences.index(largest)}")
    if arguments.json:
        described = environment.describe(arguments.commit) if on_gpu else {"gpu": None}
        results = {
            "environment": described,
            "dtype": dtype,
            "batch": batch,
            "seed": arguments.seed,
            "losses": losses,
            "largest_difference": largest,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(results, indent=1) + "\n")
        caption = f"{where}, {dtype}, causal, {BLOCK} x {BLOCK} blocks: the first and {', '.join(map(str, WINDOWS))}"
        caption += f" up to the diagonal; largest difference {largest:.4f}"
        arguments.json.with_suffix(".svg").write_text(draw(losses, caption))
    return 0


if __name__ == "__main__":
    sys.exit(main())
