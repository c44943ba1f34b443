"""Pictures of masks: what each block is called, beside the dense formula, and what is drawn."""

from __future__ import annotations

import sys

import pytest
import torch

from cases import Case, case
from hbsattn._plot import COLORS, OFF, PARTLY, WHOLLY, block_states
from oracle import dense
from problems import make_problem

SPECS = [
    case("causal", causal=True, lens_q=(150, 40), lens_k=(150, 90), q_block=32, k_block=16),
    case("windows", windows=((40, 9, 20),), lens_q=(150, 40), lens_k=(150, 90), q_block=32, k_block=16),
    case(
        "of_heads", windows=((0, 0, 5), (-1, -1, 0), (40, 9, 0), (7, -1, 70)), lens_q=(150,), lens_k=(170,), causal=True
    ),
    case("batched", lens_q=(70, 70), lens_k=(90, 90), packed=False, causal=True, windows=((30, 0, 0),)),
]


@pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
def test_states(spec: Case):
    problem = make_problem(spec, "cpu", torch.float32)
    mask = problem.mask()
    blocks = mask.to_dense()
    begin = [0, 0]
    for index, (q_len, k_len) in enumerate(zip(spec.lens_q, spec.lens_k, strict=True)):
        rows, cols = -(-q_len // spec.q_block), -(-k_len // spec.k_block)
        for head in range(mask.heads):
            window = spec.windows[head % len(spec.windows)] if spec.windows else (-1, -1, 0)
            every = torch.ones((1, rows, cols), dtype=torch.bool)
            lens = (q_len, k_len, spec.q_block, spec.k_block)
            seen = dense.element_mask(every, *lens, spec.causal, (window,))[0]
            on = blocks[index, head] if not spec.packed else blocks[head, begin[0] :, begin[1] :]
            states = block_states(mask, head, index)
            assert states.shape == (rows, cols)
            for row in range(rows):
                for col in range(cols):
                    block = seen[row * spec.q_block :][: spec.q_block, col * spec.k_block :][:, : spec.k_block]
                    state = WHOLLY if block.all() else PARTLY if block.any() else OFF
                    assert states[row, col] == (state if on[row, col] else OFF), (head, row, col)
        begin = [begin[0] + rows, begin[1] + cols]


class Axes:
    """What matplotlib's axes are asked for."""

    def imshow(self, states: torch.Tensor, **named: object) -> None:
        self.states, self.named = states, named

    def set(self, **labels: object) -> None:
        self.labels = labels


def test_plot():
    pytest.importorskip("matplotlib", reason="plot needs matplotlib").use("Agg")
    mask = make_problem(SPECS[1], "cpu", torch.float32).mask()
    axes = Axes()
    assert mask.plot(0, sequence=1, ax=axes) is axes
    assert torch.equal(axes.states, block_states(mask, 0, 1))
    assert axes.named["extent"] == (0, 96, 64, 0)
    assert axes.labels["xlim"] == (0, 90) and axes.labels["ylim"] == (40, 0) and axes.labels["xlabel"] == "key"
    with pytest.raises(TypeError, match=r"ax is 3; expected axes of matplotlib"):
        mask.plot(ax=3)
    drawn = mask.plot()
    assert drawn.images[0].get_array().shape == block_states(mask, 0, 0).shape
    assert drawn.images[0].get_cmap().colors == COLORS


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    mask = make_problem(SPECS[0], "cpu", torch.float32).mask()
    with pytest.raises(ImportError, match="pip install matplotlib"):
        mask.plot()


@pytest.mark.parametrize(
    ("named", "words"), [({"head": 9}, "head is 9"), ({"sequence": 2}, "sequence is 2"), ({"head": -1}, "-1")]
)
def test_errors(named: dict[str, int], words: str):
    mask = make_problem(SPECS[0], "cpu", torch.float32).mask()
    with pytest.raises(ValueError, match=words):
        mask.plot(**named)
