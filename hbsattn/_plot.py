"""A picture of one head of a mask."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hbsattn._checks import check_index
from hbsattn._layout import (
    K_LEN,
    Q_LEN,
    MaskLayout,
    ceil_div,
    count_in_blocks,
    locate_rows,
    unpack_bits,
    windows_of_heads,
)

if TYPE_CHECKING:
    from hbsattn.mask import BlockMask

OFF, PARTLY, WHOLLY = range(3)
COLORS = ("#f4f5f7", "#8fb8ea", "#2f7de1")


def block_states(mask: "BlockMask", head: int, sequence: int) -> Tensor:
    """What each block of a sequence is, uint8 (query blocks, key blocks) on the CPU: OFF, PARTLY computed, as it is
    partial, or causality or a window leaves some of its pairs out, or WHOLLY.
    """
    layout = MaskLayout(*mask._layout)
    window = windows_of_heads(mask.heads, mask._rules)[head]
    pairs, of_block = count_in_blocks(mask.sequences, mask.rows, layout, window)
    on = unpack_bits(mask.bits[head], layout.cols) & (pairs > 0)
    whole = pairs == of_block
    if mask._partial is not None:
        whole &= ~unpack_bits(mask._partial[head, ..., 0], layout.cols)
    states = torch.where(on, torch.where(whole, WHOLLY, PARTLY), OFF).to(torch.uint8)
    owner, _, used = locate_rows(mask.sequences, mask.rows, layout.q_block_size)
    cols = ceil_div(int(mask.sequences[sequence, K_LEN]), layout.k_block_size)
    return states[used & (owner == sequence), :cols].cpu()


def plot(mask: "BlockMask", head: int, sequence: int, ax: Any) -> Any:
    """The picture that `BlockMask.plot` documents."""
    head, sequence = check_index("head", head, 0, mask.heads), check_index("sequence", sequence, 0, mask.batch)
    q_len, k_len = mask.sequences[sequence, [Q_LEN, K_LEN]].tolist()
    if min(q_len, k_len) == 0:
        raise ValueError(f"sequence is {sequence}, of {q_len} queries and {k_len} keys; expected one that has both")
    try:
        from matplotlib import pyplot
        from matplotlib.colors import ListedColormap
    except ImportError as error:
        raise ImportError("plot needs matplotlib, which is not installed: pip install matplotlib") from error
    states = block_states(mask, head, sequence)
    if ax is None:
        _, ax = pyplot.subplots()
    elif not hasattr(ax, "imshow"):
        raise TypeError(f"ax is {ax!r}; expected axes of matplotlib")
    rows, cols = states.shape
    extent = (0, cols * mask._k_block, rows * mask._q_block, 0)
    ax.imshow(states, cmap=ListedColormap(COLORS), vmin=OFF, vmax=WHOLLY, extent=extent, interpolation="nearest")
    ax.set(
        xlim=(0, k_len),
        ylim=(q_len, 0),
        xlabel="key",
        ylabel="query",
        title=f"head {head}, blocks of {mask.q_block_size} x {mask.k_block_size}",
    )
    return ax
