"""Which weights dropout keeps, from the definition: one pair of a query and a key at a time, in plain integers.

Judges the product, so it imports nothing from it.
"""

from __future__ import annotations

WORD = 0xFFFFFFFF
NUMBERS = 1 << 15  # that a weight may draw


def philox4x32(counter: tuple[int, ...], key: tuple[int, ...], rounds: int) -> tuple[int, ...]:
    """Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011."""
    c, k = list(counter), list(key)
    for number in range(rounds):
        if number > 0:
            k = [(k[0] + 0x9E3779B9) & WORD, (k[1] + 0xBB67AE85) & WORD]
        high0, low0 = divmod(0xD2511F53 * c[0], 1 << 32)
        high1, low1 = divmod(0xCD9E8D57 * c[2], 1 << 32)
        c = [high1 ^ c[1] ^ k[0], low1, high0 ^ c[3] ^ k[1], low0]
    return tuple(c)


def stream_words(seed: int, offset: int, stream: int) -> tuple[int, int]:
    """stream: sequence * heads_q + query head."""
    counter = (offset & WORD, offset >> 32 & WORD, stream & WORD, 0)
    return philox4x32(counter, (seed & WORD, seed >> 32 & WORD), 10)[:2]


def draw(words_of_stream: tuple[int, int], query: int, key: int) -> int:
    """The number of a pair, 0 to NUMBERS - 1."""
    row, col = (x // 16 * 4 + x % 8 // 2 for x in (query, key))
    words = philox4x32((row, col, *words_of_stream), (0, 0), 7)
    byte = query // 8 % 2 + 2 * (key // 8 % 2)
    high = words[2 * (query % 2) + key % 2] >> 8 * byte & 127
    low = (words[1] ^ words[3] if key % 2 == 0 else words[0] ^ words[2]) >> 8 * byte & 255
    return high * 256 + low


def is_kept(dropout_p: float, seed: int, offset: int, stream: int, query: int, key: int) -> bool:
    dropped = min(round(dropout_p * NUMBERS), NUMBERS - 1)
    number = draw(stream_words(seed, offset, stream), query, key)
    return number >= dropped if dropped <= NUMBERS // 2 else number < NUMBERS - dropped
