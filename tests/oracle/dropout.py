"""Which weights dropout keeps, from the definition: for integers, or for int64 tensors, element by element.

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
        first, second = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]  # of tensors, modulo 2^64
        c = [second >> 32 & WORD ^ c[1] ^ k[0], second & WORD, first >> 32 & WORD ^ c[3] ^ k[1], first & WORD]
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
    of_even = words[0] * (1 - key % 2) + words[1] * (key % 2)
    of_odd = words[2] * (1 - key % 2) + words[3] * (key % 2)
    high = of_even * (1 - query % 2) + of_odd * (query % 2)
    low = (words[1] ^ words[3]) * (1 - key % 2) + (words[0] ^ words[2]) * (key % 2)
    return (high >> 8 * byte & 127) * 256 + (low >> 8 * byte & 255)


def is_kept(dropout_p: float, seed: int, offset: int, stream: int, query: int, key: int) -> bool:
    dropped = min(round(dropout_p * NUMBERS), NUMBERS - 1)
    number = draw(stream_words(seed, offset, stream), query, key)
    return number >= dropped if dropped <= NUMBERS // 2 else number < NUMBERS - dropped
