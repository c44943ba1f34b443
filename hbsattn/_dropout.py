"""Which weights dropout keeps: a function of the seed, the sequence, the query head and the positions of query and key.

csrc/kernels/common/dropout.cuh has the same function. Random numbers are those of Philox-4x32 (Salmon et al., "Parallel
random numbers: as easy as 1, 2, 3", SC 2011). Words of 32 bits lie in int64, whose products are exact modulo 2^64.
"""

import torch
from torch import Tensor

from hbsattn._checks import check_index, check_number, check_same_device, check_tensor

STEPS = 1 << 15  # rates are multiples of 1 / STEPS
SEED_LIMIT = (1 << 63) - 1
WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
INCREMENTS = (0x9E3779B9, 0xBB67AE85)
STREAM_ROUNDS, PAIR_ROUNDS = 10, 7
PAIRS, PAIRS_ON_CPU = 1 << 22, 1 << 16  # drawn at a time: on a CPU, few enough to stay in the caches

Words = tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]


def check_dropout_p(name: str, value: object) -> float:
    """Returns it rounded."""
    p = check_number(name, value)
    if not 0 <= p < 1:
        raise ValueError(f"{name} is {p}; expected at least 0 and less than 1")
    return round_dropout_p(p)


def round_dropout_p(p: float) -> float:
    return min(round(p * STEPS), STEPS - 1) / STEPS


def check_dropout_seed(dropout_seed: object) -> Tensor:
    check_tensor("dropout_seed", dropout_seed, (1,), (torch.int64,))
    if dropout_seed.shape[0] != 2:
        raise ValueError(f"dropout_seed has shape ({dropout_seed.shape[0]},); expected (2,), a seed and an offset")
    return dropout_seed.contiguous()


def seed_of_call(dropout_p: float, dropout_seed: Tensor | None, device: torch.device) -> Tensor | None:
    """The seed that ops take: None without dropout, the next of PyTorch's generator where none is given."""
    if dropout_seed is not None:
        dropout_seed = check_dropout_seed(dropout_seed)
        check_same_device("dropout_seed", dropout_seed, device, "q")
    if dropout_p == 0:
        return None
    return torch.randint(SEED_LIMIT, (2,), dtype=torch.int64, device=device) if dropout_seed is None else dropout_seed


def dropout_mask(
    dropout_p: float, dropout_seed: Tensor, batch: int, heads_q: int, seqlen_q: int, seqlen_k: int
) -> Tensor:
    """Tells which weights `block_sparse_attention` keeps, for checks and for other implementations.

    Args:
        dropout_p: as for `block_sparse_attention`.
        dropout_seed: int64 (2), a seed and an offset.
        batch: number of sequences, packed or batched.
        heads_q: as many as the call has.
        seqlen_q, seqlen_k: queries and keys of each sequence, counted from its start. Longer ones only add to the mask.

    Returns:
        bool (batch, heads_q, seqlen_q, seqlen_k) on the device of `dropout_seed`; True is kept.

    Raises:
        ValueError, TypeError: for an argument that does not fit.
    """
    dropout_p = check_dropout_p("dropout_p", dropout_p)
    dropout_seed = check_dropout_seed(dropout_seed)
    sizes = {"batch": batch, "heads_q": heads_q, "seqlen_q": seqlen_q, "seqlen_k": seqlen_k}
    batch, heads_q, seqlen_q, seqlen_k = (check_index(name, value) for name, value in sizes.items())
    device = dropout_seed.device
    streams = torch.arange(batch * heads_q, device=device).view(-1, 1, 1)
    queries, keys = torch.arange(seqlen_q, device=device).view(1, -1, 1), torch.arange(seqlen_k, device=device)
    return keeps(dropout_p, dropout_seed, streams, queries, keys.view(1, 1, -1)).unflatten(0, (batch, heads_q))


def keeps(dropout_p: float, dropout_seed: Tensor, streams: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    """Whether the weights of pairs are kept, bool (tiles, queries, keys).

    Args:
        streams: sequence * heads_q + query head, (tiles or 1, queries or 1, 1).
        queries, keys: positions in the sequence, (tiles or 1, queries or 1, 1) and (tiles or 1, 1, keys).

    All are int64 and not below 0.
    """
    kept = torch.empty(
        torch.broadcast_shapes(streams.shape, queries.shape, keys.shape), dtype=torch.bool, device=keys.device
    )
    tiles, rows, cols = kept.shape
    streams, queries, keys = streams.expand(tiles, rows, 1), queries.expand(tiles, rows, 1), keys.expand(tiles, 1, cols)
    pairs = PAIRS_ON_CPU if keys.device.type == "cpu" else PAIRS
    tile_step, row_step = (max(pairs // max(size, 1), 1) for size in (rows * cols, cols))
    for tile in range(0, tiles, tile_step):
        some = slice(tile, tile + tile_step)
        for row in range(0, rows, row_step):
            at = some, slice(row, row + row_step)
            kept[at] = _keeps(dropout_p, dropout_seed, streams[at], queries[at], keys[some])
    return kept


def _keeps(dropout_p: float, dropout_seed: Tensor, streams: Tensor, queries: Tensor, keys: Tensor) -> Tensor:
    seed, offset = dropout_seed.unbind()
    first, second, *_ = _philox(
        (offset & WORD, offset >> 32 & WORD, streams & WORD, 0), (seed & WORD, seed >> 32 & WORD), STREAM_ROUNDS
    )
    # A counter serves 16 pairs: queries i and i + 1, and those 8 behind them, beside keys j and j + 1, and 8 behind.
    row, col = (4 * (x >> 4) + ((x & 7) >> 1) for x in (queries, keys))
    words = _philox((row, col, first, second), (0, 0), PAIR_ROUNDS)
    lower, right = (queries & 1).bool(), (keys & 1).bool()
    shift = (queries >> 3 & 1) * 8 + (keys >> 3 & 1) * 16
    own = torch.where(right, torch.where(lower, words[3], words[1]), torch.where(lower, words[2], words[0]))
    other = torch.where(right, words[0] ^ words[2], words[1] ^ words[3])
    drawn = (own >> shift & 127) * 256 + (other >> shift & 255)
    dropped = int(round_dropout_p(dropout_p) * STEPS)  # of STEPS
    return drawn >= dropped if 2 * dropped <= STEPS else drawn < STEPS - dropped


def _philox(counter: Words, key: tuple[Tensor | int, Tensor | int], rounds: int) -> Words:
    """Four random words for each counter."""
    c0, c1, c2, c3 = counter
    for _ in range(rounds):
        x, y = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (y >> 32 & WORD) ^ (c1 ^ key[0]), y & WORD, (x >> 32 & WORD) ^ (c3 ^ key[1]), x & WORD
        key = tuple(word + step & WORD for word, step in zip(key, INCREMENTS, strict=True))
    return c0, c1, c2, c3
