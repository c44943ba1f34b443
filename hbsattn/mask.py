"""BlockMask: which key blocks each query block attends to, packed into bits and planned once for many calls."""

import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from hbsattn._chunks import Lists, stays_lists
from hbsattn._layout import (
    COL_BEGIN,
    K_BEGIN,
    K_LEN,
    Q_BEGIN,
    Q_LEN,
    ceil_div,
    count_blocks,
    locate_rows,
    unpack_bits,
    visible_columns,
)
from hbsattn._ops import ops
from hbsattn._placement import (
    Lengths,
    Place,
    check_block_sizes,
    check_is_tensor,
    check_lengths,
    check_lists,
    check_rows,
    check_tensor,
    check_total,
    place_blocks,
    to_int32,
)
from hbsattn._plans import Plans, is_capturing, plans_beside

_debug = os.environ.get("HBSATTN_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Switches the checks that read device memory, and so wait for the device; HBSATTN_DEBUG=1 starts with them on.

    They verify cumulative lengths, block counts and listed indices when a mask is built, and lengths when it is used,
    and raise ValueError. They are skipped while a CUDA graph is captured or a program is traced.
    """
    global _debug
    _debug = bool(enabled)


def _debugging(device: torch.device) -> bool:
    return _debug and not torch.compiler.is_compiling() and not is_capturing(device)


@dataclass(frozen=True, eq=False, repr=False)
class BlockMask:
    """A block mask, ready for any number of `block_sparse_attention` calls; built by `from_dense`, `from_indices` or
    `from_csr`.

    Each sequence is cut from its own start into blocks of `q_block_size` queries and `k_block_size` keys; its last
    blocks may be short. Query i attends to key j if the entry of their blocks is on and, with `causal`,
    `j <= i + k_len - q_len`. A mask has 1 head, one for each key head, or one for each query head.

    The constructors share these keywords:

    * For packed tensors, (total, heads, head_dim): `cu_seqlens_q` and `cu_seqlens_k`, int32 (batch + 1) on the mask's
      device, and the host integers `max_seqlen_q` and `max_seqlen_k`, which no length exceeds. The mask is flat (no
      batch dimension, the blocks of all sequences one after another) or has a batch dimension (batch or 1) and is
      padded to the longest sequence or more.
    * For batched tensors, (batch, seqlen, heads, head_dim): `seqlen_q` and `seqlen_k`, and `batch_size` if the mask's
      batch dimension is 1 and stands for more.
    * `causal`.

    They raise TypeError or ValueError for what does not fit. They wait for the device only in debug mode (`set_debug`).

    Attributes:
        bits: int32 (heads, rows, ceil(cols / 32)), trimmed to the blocks that lengths and causality leave visible. Made
            anew each time by a mask that stays lists (`from_indices`).
        sequences: int32 (batch, 6), where each sequence lies.
        q_block_size, k_block_size, causal: as given.
        batch: sequences.
        heads: mask heads.
        rows: query blocks of all sequences, padding included.
        cols: key blocks of the longest sequence, or a bound.
        packed: whether the mask is for packed tensors.
        seqlen_q, seqlen_k: lengths for batched tensors; for packed ones `max_seqlen_q` and `max_seqlen_k` as given.
    """

    _bits: Tensor | None
    sequences: Tensor
    q_block_size: int
    k_block_size: int
    causal: bool
    batch: int
    heads: int
    rows: int
    cols: int
    packed: bool
    seqlen_q: int | None
    seqlen_k: int | None
    _lists: Lists | None
    _plans: Plans

    @classmethod
    def from_dense(
        cls,
        block_mask: Tensor,
        q_block_size: int,
        k_block_size: int,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        batch_size: int | None = None,
        causal: bool = False,
    ) -> "BlockMask":
        """Builds a mask from booleans, True where attention is computed.

        Args:
            block_mask: bool with any strides. Flat: (heads, query blocks of all sequences, key blocks of all
                sequences), sequences on the block diagonal and the rest ignored. Batched: (batch or 1, heads, query
                blocks, key blocks).
            max_seqlen_q, max_seqlen_k: optional here; with `max_seqlen_k` a flat mask packs into fewer bits.
            seqlen_q, seqlen_k: by default the mask's blocks times the block size; a length that is given ends in the
                mask's last block.
        """
        check_block_sizes(q_block_size, k_block_size)
        check_tensor("block_mask", block_mask, (3, 4), (torch.bool,))
        flat = block_mask.dim() == 3
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        lead, cols = block_mask.shape[:-1], block_mask.shape[-1]
        place = place_blocks("block_mask", block_mask.device, lead, cols, lengths, q_block_size, k_block_size)
        if _debugging(block_mask.device):
            check_lengths("block_mask", lead, cols, lengths, q_block_size, k_block_size)
        bits = ops.pack_dense.default(
            block_mask, place.sequences, flat, place.rows, place.cols, q_block_size, k_block_size, causal
        )
        return cls._of(bits, place, q_block_size, k_block_size, causal)

    @classmethod
    def from_indices(
        cls,
        counts: Tensor,
        indices: Tensor,
        q_block_size: int,
        k_block_size: int,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        batch_size: int | None = None,
        causal: bool = False,
    ) -> "BlockMask":
        """Builds a mask from a list of key blocks for each query block.

        Args:
            counts: int32 or int64, entries of each list. Flat: (heads, query blocks of all sequences). Batched:
                (batch or 1, heads, query blocks).
            indices: int32 or int64, counts' shape and one more dimension for the lists. Key blocks are numbered within
                their own sequence and come in any order; repeated ones count once. Entries past the count are not
                read, entries out of range are dropped (in debug mode: ValueError).
            max_seqlen_q, max_seqlen_k: required for packed tensors.
            seqlen_q: by default the query blocks times the block size; a length that is given ends in the last one.
            seqlen_k: required for batched tensors.

        With query blocks of 1 row, lists of long sequences may be far smaller than bits. Where bits would take more
        than 256 MB and twice what lists do (batched lists for batched tensors, flat ones for packed), the mask keeps a
        copy of the lists. A call without gradients then makes and plans the bits of as many rows as take 256 MB at a
        time. The first with gradients makes all bits, and the mask keeps them for all later calls on the stream; a
        compiled call makes all bits each time.
        """
        check_block_sizes(q_block_size, k_block_size)
        check_tensor("counts", counts, (2, 3), (torch.int32, torch.int64))
        check_tensor("indices", indices, (counts.dim() + 1,), (torch.int32, torch.int64))
        if indices.shape[:-1] != counts.shape:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)}; expected that of counts, {tuple(counts.shape)}, and one "
                "more dimension"
            )
        flat = counts.dim() == 2
        counts, indices = to_int32(counts), to_int32(indices)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        place = place_blocks("counts", counts.device, counts.shape, None, lengths, q_block_size, k_block_size)
        if _debugging(counts.device):
            check_lengths("counts", counts.shape, None, lengths, q_block_size, k_block_size)
            check_lists(counts, indices, place, q_block_size, k_block_size)
        lists = Lists(counts, indices)
        if flat == place.packed and stays_lists(q_block_size, lists.heads, place.rows, place.cols, indices.numel()):
            # Later changes of the caller's tensors change no mask, of bits or of lists.
            return cls._of(None, place, q_block_size, k_block_size, causal, lists.clone())
        bits = lists.pack(place.sequences, place.rows, place.cols, q_block_size, k_block_size, causal)
        return cls._of(bits, place, q_block_size, k_block_size, causal)

    @classmethod
    def from_csr(
        cls,
        indptr: Tensor,
        indices: Tensor,
        q_block_size: int,
        k_block_size: int,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        batch_size: int | None = None,
        causal: bool = False,
    ) -> "BlockMask":
        """Builds a mask from compressed sparse rows.

        Args:
            indptr: int32 or int64 (heads, rows + 1), positions in `indices`: row r of head h lists the entries from
                `indptr[h, r]` to `indptr[h, r + 1]`. Rows are the query blocks of all sequences, one after another.
            indices: int32 or int64 (entries), key blocks as in `from_indices`.
            max_seqlen_q, max_seqlen_k: required for packed tensors.
            seqlen_q, seqlen_k: required for batched tensors; `batch_size` follows from them and the rows.
        """
        check_block_sizes(q_block_size, k_block_size)
        check_tensor("indptr", indptr, (2,), (torch.int32, torch.int64))
        check_tensor("indices", indices, (1,), (torch.int32, torch.int64))
        heads, rows = indptr.shape[0], indptr.shape[1] - 1
        lead: tuple[int, ...] = (heads, rows)
        if cu_seqlens_q is None and cu_seqlens_k is None:
            if seqlen_q is None:
                raise ValueError("seqlen_q is None; expected the length of the batched queries of a mask from_csr")
            blocks = ceil_div(seqlen_q, q_block_size)
            if batch_size is None:
                batch_size = rows // blocks if blocks else 0
            if batch_size * blocks != rows:
                raise ValueError(
                    f"indptr has shape {tuple(indptr.shape)}; expected (heads, rows + 1) with {blocks} rows, the query "
                    f"blocks of length seqlen_q = {seqlen_q}, for each sequence of the batch"
                )
            lead = (batch_size, heads, blocks)
        indptr, indices = to_int32(indptr), to_int32(indices)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        place = place_blocks("indptr", indptr.device, lead, None, lengths, q_block_size, k_block_size)
        if _debugging(indptr.device):
            check_lengths("indptr", lead, None, lengths, q_block_size, k_block_size)
            check_rows(indptr, indices, place, q_block_size, k_block_size)
        bits = ops.pack_csr.default(
            indptr, indices, place.sequences, place.rows, place.cols, q_block_size, k_block_size, causal
        )
        return cls._of(bits, place, q_block_size, k_block_size, causal)

    @classmethod
    def _of(
        cls,
        bits: Tensor | None,
        place: "Place",
        q_block_size: int,
        k_block_size: int,
        causal: bool,
        lists: Lists | None = None,
    ) -> "BlockMask":
        return cls(
            bits,
            place.sequences,
            q_block_size,
            k_block_size,
            causal,
            place.batch,
            lists.heads if bits is None else bits.shape[0],
            place.rows,
            place.cols,
            place.packed,
            place.seqlen_q,
            place.seqlen_k,
            lists,
            Plans(place.sequences.device),
        )

    @property
    def bits(self) -> Tensor:
        if self._bits is not None:
            return self._bits
        sizes = (self.rows, self.cols, self.q_block_size, self.k_block_size)
        return self._lists.pack(self.sequences, *sizes, self.causal)

    def _makes_bits(self) -> bool:
        """Whether a mask of lists has its bits made: a call has, or is compiled, and not to be once for each length."""
        return torch.compiler.is_compiling() or self._plans.find("bits") is not None

    def _kept_bits(self) -> Tensor:
        if self._bits is not None:
            return self._bits
        return self._plans.find_or_make("bits", lambda: (self.bits,))[0]

    @property
    def device(self) -> torch.device:
        return self.sequences.device

    @property
    def density(self) -> float:
        """The share of active blocks among those that lengths and causality leave visible. Waits for the device."""
        visible = int(self._visible().sum()) * self.heads
        active = sum(int(head.sum()) for head in self._heads())
        return active / visible if visible else 0.0

    def to(self, device: torch.device | str) -> "BlockMask":
        """Returns the mask on another device, where its work lists are built anew; itself if it is there already."""
        sequences = self.sequences.to(device)
        if sequences is self.sequences:
            return self
        return BlockMask(
            None if self._bits is None else self._bits.to(device),
            sequences,
            self.q_block_size,
            self.k_block_size,
            self.causal,
            self.batch,
            self.heads,
            self.rows,
            self.cols,
            self.packed,
            self.seqlen_q,
            self.seqlen_k,
            None if self._lists is None else self._lists.to(device),
            Plans(sequences.device),
        )

    def to_dense(self) -> Tensor:
        """Returns the mask as booleans, trimmed to the visible blocks; for packed tensors this waits for the device.

        Packed: (heads, query blocks of all sequences, key blocks of all sequences). Batched: (batch, heads, query
        blocks, key blocks).
        """
        mask = unpack_bits(self.bits, self.cols)
        if not self.packed:
            blocks = ceil_div(self.seqlen_q, self.q_block_size)
            return mask.view(self.heads, self.batch, blocks, self.cols).transpose(0, 1)
        sequence, _, used = locate_rows(self.sequences, self.rows, self.q_block_size)
        key_blocks = count_blocks(self.sequences, K_LEN, self.k_block_size)
        dense = mask.new_zeros(self.heads, int(used.sum()), int(key_blocks.sum()))
        column = torch.arange(self.cols, device=self.device)
        row, col = (column < key_blocks[sequence[used]].unsqueeze(-1)).nonzero(as_tuple=True)
        begin = self.sequences[:, COL_BEGIN].to(torch.int64)[sequence[used]]
        dense[:, row, begin[row] + col] = mask[:, used][:, row, col]
        return dense

    def flops(self, head_dim: int, num_heads: int) -> int:
        """Counts the floating-point operations of the forward: 4 * head_dim for each pair of a query and a key that
        attend, over all `num_heads` query heads. Exact, with causality and short blocks. Waits for the device.
        """
        if num_heads % max(self.heads, 1) != 0:
            raise ValueError(f"num_heads is {num_heads}; expected a multiple of the {self.heads} heads of the mask")
        sequence, block, used = locate_rows(self.sequences, self.rows, self.q_block_size)
        if self.batch == 0:
            return 0
        table = self.sequences.to(torch.int64)[sequence]
        q_len, k_len = table[:, Q_LEN].unsqueeze(-1), table[:, K_LEN].unsqueeze(-1)
        first = (block * self.q_block_size).unsqueeze(-1)
        last = torch.minimum(first + self.q_block_size, q_len)
        key = torch.arange(self.cols, device=self.device) * self.k_block_size
        width = (k_len - key).clamp(0, self.k_block_size)
        if self.causal:
            # Query i sees i + reach of the block's keys, cut to [0, width]; summed over the queries of a block.
            reach = k_len - q_len + 1 - key
            pairs = _sum_clamped(last - 1 + reach, width) - _sum_clamped(first - 1 + reach, width)
        else:
            pairs = (last - first) * width
        pairs = torch.where(used.unsqueeze(-1), pairs, 0)
        active = sum(int(pairs[head].sum()) for head in self._heads())
        return 4 * head_dim * active * (num_heads // max(self.heads, 1))

    def __repr__(self) -> str:
        if self.packed:
            form, name, blocks = "packed", "max_seqlen", f"rows={self.rows}, cols={self.cols}"
        else:
            form, name = "batched", "seqlen"
            blocks = f"{ceil_div(self.seqlen_q, self.q_block_size)} x {self.cols} in each sequence"
        sides = (("q", self.seqlen_q), ("k", self.seqlen_k))
        lengths = "".join(f"{name}_{side}={length}, " for side, length in sides if length is not None)
        # On another device the density would make whoever prints a mask wait; of lists it would take all bits.
        known = type(self._bits) is Tensor and self.device.type == "cpu"
        density = f", density={self.density:.3g}" if known else ""
        return (
            f"BlockMask({form}, batch={self.batch}, {lengths}heads={self.heads}, blocks of {self.q_block_size} x "
            f"{self.k_block_size}, {blocks}, causal={self.causal}{density}, device='{self.device}')"
        )

    def _heads(self) -> Iterator[Tensor]:
        """The booleans of one head after another: of all heads at once they would be eight times the bits."""
        return (unpack_bits(bits, self.cols) for bits in self.bits)

    def _visible(self) -> Tensor:
        return visible_columns(self.sequences, self.rows, self.cols, self.q_block_size, self.k_block_size, self.causal)

    def _check_use(self, q: Tensor, k: Tensor) -> None:
        """Checks tensors against the lengths that the mask was built for, which the op is not told."""
        dims, form = (3, "packed") if self.packed else (4, "batched")
        for name, tensor, seqlen in (("q", q, self.seqlen_q), ("k", k, self.seqlen_k)):
            check_is_tensor(name, tensor)
            if tensor.dim() != dims:
                raise ValueError(
                    f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; expected {dims}, as mask was "
                    f"built for {form} tensors"
                )
            if not self.packed and tensor.shape[1] != seqlen:
                raise ValueError(
                    f"{name} has length {tensor.shape[1]}; expected {seqlen}, the seqlen_{name} that mask has"
                )
        if self.packed and _debugging(self.device):
            check_total("q", q, self.sequences, Q_BEGIN, Q_LEN)
            check_total("k", k, self.sequences, K_BEGIN, K_LEN)

    def _cached_items(self, key: tuple[int, int, int, int, bool]) -> Tensor | None:
        """The work list of an earlier call of this kind, if the current stream may use it as it is."""
        found = self._plans.find(key)
        return None if found is None else found[0]

    def _items(
        self,
        heads_q: int,
        heads_k: int,
        head_dim: int,
        element_size: int,
        pack_heads: bool,
        bits: Tensor | None = None,
    ) -> Tensor:
        """Returns the work list, int32 (tiles, 16), that calls of this kind on one stream share. `bits`: if at hand."""
        key = (heads_q, heads_k, head_dim, element_size, pack_heads)

        def make() -> tuple[Tensor]:
            items = ops.plan_items.default(
                self._kept_bits() if bits is None else bits,
                self.sequences,
                self.cols,
                self.q_block_size,
                self.k_block_size,
                self.causal,
                *key,
            )
            plans_beside(items)
            return (items,)

        return self._plans.find_or_make(key, make)[0]


def _sum_clamped(last: Tensor, width: Tensor) -> Tensor:
    """Sums clamp(x, 0, width) over all integers x up to `last`."""
    last = last.clamp(min=0)
    rising = torch.minimum(last, width)
    return rising * (rising + 1) // 2 + (last - rising) * width
