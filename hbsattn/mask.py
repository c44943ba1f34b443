"""BlockMask: which key blocks each query block attends to, packed into bits and planned once for many calls."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from hbsattn._layout import (
    COL_BEGIN,
    K_BEGIN,
    K_LEN,
    Q_BEGIN,
    Q_LEN,
    ceil_div,
    locate_rows,
    unpack_bits,
    visible_columns,
)
from hbsattn._ops import ops

_debug = os.environ.get("HBSATTN_DEBUG", "0") not in ("", "0")


def set_debug(enabled: bool) -> None:
    """Switches the checks that read device memory, and so wait for the device; HBSATTN_DEBUG=1 starts with them on.

    They verify cumulative lengths, block counts and listed indices when a mask is built, and lengths when it is used,
    and raise ValueError. They are skipped while a CUDA graph is captured or a program is traced.
    """
    global _debug
    _debug = bool(enabled)


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _debugging(device: torch.device) -> bool:
    return _debug and not torch.compiler.is_compiling() and not _capturing(device)


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
      padded to the longest sequence.
    * For batched tensors, (batch, seqlen, heads, head_dim): `seqlen_q` and `seqlen_k`, and `batch_size` if the mask's
      batch dimension is 1 and stands for more.
    * `causal`.

    They raise TypeError or ValueError for what does not fit. They wait for the device only in debug mode (`set_debug`).

    Attributes:
        bits: int32 (heads, rows, ceil(cols / 32)), trimmed to the blocks that lengths and causality leave visible.
        sequences: int32 (batch, 6), where each sequence lies.
        q_block_size, k_block_size, causal: as given.
        batch: sequences.
        heads: mask heads.
        rows: query blocks of all sequences, padding included.
        cols: key blocks of the longest sequence, or a bound.
        packed: whether the mask is for packed tensors.
        seqlen_q, seqlen_k: lengths for batched tensors; for packed ones `max_seqlen_q` and `max_seqlen_k` as given.
    """

    bits: Tensor
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
    _captured: bool  # whether bits get their values only when a CUDA graph runs
    _plans: dict[tuple[int, int, int, int, bool], Tensor] = field(default_factory=dict, init=False)

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
            seqlen_q, seqlen_k: by default the mask's blocks times the block size.
        """
        _check_block_sizes(q_block_size, k_block_size)
        _check_tensor("block_mask", block_mask, (3, 4), (torch.bool,))
        flat = block_mask.dim() == 3
        lengths = _Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        lead, cols = block_mask.shape[:-1], block_mask.shape[-1]
        place = _place("block_mask", block_mask.device, lead, cols, lengths, q_block_size, k_block_size)
        if _debugging(block_mask.device):
            _check_lengths("block_mask", lead, cols, lengths, q_block_size, k_block_size)
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
            seqlen_q: by default the query blocks times the block size.
            seqlen_k: required for batched tensors.
        """
        _check_block_sizes(q_block_size, k_block_size)
        _check_tensor("counts", counts, (2, 3), (torch.int32, torch.int64))
        _check_tensor("indices", indices, (counts.dim() + 1,), (torch.int32, torch.int64))
        if indices.shape[:-1] != counts.shape:
            raise ValueError(
                f"indices has shape {tuple(indices.shape)}; expected that of counts, {tuple(counts.shape)}, and one "
                "more dimension"
            )
        flat = counts.dim() == 2
        counts, indices = _to_int32(counts), _to_int32(indices)
        lengths = _Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        place = _place("counts", counts.device, counts.shape, None, lengths, q_block_size, k_block_size)
        if _debugging(counts.device):
            _check_lengths("counts", counts.shape, None, lengths, q_block_size, k_block_size)
            _check_lists(counts, indices, place, q_block_size, k_block_size)
        bits = ops.pack_indices.default(
            counts, indices, place.sequences, flat, place.rows, place.cols, q_block_size, k_block_size, causal
        )
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
        _check_block_sizes(q_block_size, k_block_size)
        _check_tensor("indptr", indptr, (2,), (torch.int32, torch.int64))
        _check_tensor("indices", indices, (1,), (torch.int32, torch.int64))
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
        indptr, indices = _to_int32(indptr), _to_int32(indices)
        lengths = _Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        place = _place("indptr", indptr.device, lead, None, lengths, q_block_size, k_block_size)
        if _debugging(indptr.device):
            _check_lengths("indptr", lead, None, lengths, q_block_size, k_block_size)
            _check_rows(indptr, indices, place, q_block_size, k_block_size)
        bits = ops.pack_csr.default(
            indptr, indices, place.sequences, place.rows, place.cols, q_block_size, k_block_size, causal
        )
        return cls._of(bits, place, q_block_size, k_block_size, causal)

    @classmethod
    def _of(cls, bits: Tensor, place: "_Place", q_block_size: int, k_block_size: int, causal: bool) -> "BlockMask":
        return cls(
            bits,
            place.sequences,
            q_block_size,
            k_block_size,
            causal,
            place.batch,
            bits.shape[0],
            place.rows,
            place.cols,
            place.packed,
            place.seqlen_q,
            place.seqlen_k,
            not torch.compiler.is_compiling() and _capturing(bits.device),
        )

    @property
    def device(self) -> torch.device:
        return self.bits.device

    @property
    def density(self) -> float:
        """The share of active blocks among those that lengths and causality leave visible. Waits for the device."""
        visible = int(self._visible().sum()) * self.heads
        active = sum(int(head.sum()) for head in self._heads())
        return active / visible if visible else 0.0

    def to(self, device: torch.device | str) -> "BlockMask":
        """Returns the mask on another device, where its work lists are built anew; itself if it is there already."""
        bits = self.bits.to(device)
        if bits is self.bits:
            return self
        return BlockMask(
            bits,
            self.sequences.to(device),
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
            False,
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
        key_blocks = _blocks(self.sequences, K_LEN, self.k_block_size)
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
        # On another device the density would make whoever prints a mask wait.
        density = f", density={self.density:.3f}" if type(self.bits) is Tensor and self.device.type == "cpu" else ""
        form = "packed" if self.packed else f"{self.seqlen_q} x {self.seqlen_k}"
        return (
            f"BlockMask(heads={self.heads}, batch={self.batch} {form}, {self.rows} x {self.cols} blocks of "
            f"{self.q_block_size} x {self.k_block_size}, causal={self.causal}{density}, device='{self.device}')"
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
            _check_total("q", q, self.sequences, Q_BEGIN, Q_LEN)
            _check_total("k", k, self.sequences, K_BEGIN, K_LEN)

    def _items(self, heads_q: int, heads_k: int, head_dim: int, element_size: int, pack_heads: bool) -> Tensor:
        """Returns the work list, int32 (tiles, 12), that calls of this kind share; builds it for the first one."""
        key = (heads_q, heads_k, head_dim, element_size, pack_heads)
        items = self._plans.get(key)
        if items is None:
            items = ops.plan_items.default(
                self.bits, self.sequences, self.cols, self.q_block_size, self.k_block_size, self.causal, *key
            )
            # A list made while a program is traced or a graph captured has no values yet.
            traced = torch.compiler.is_compiling() or type(items) is not Tensor
            if not traced and (self._captured or not _capturing(self.device)):
                self._plans[key] = items
        return items


class _Lengths(NamedTuple):
    """The keywords of the constructors that say where sequences begin and end."""

    cu_seqlens_q: Tensor | None
    cu_seqlens_k: Tensor | None
    max_seqlen_q: int | None
    max_seqlen_k: int | None
    seqlen_q: int | None
    seqlen_k: int | None
    batch_size: int | None


class _Place(NamedTuple):
    """Where the blocks of a mask lie, as its constructor worked it out."""

    sequences: Tensor
    batch: int
    rows: int
    cols: int
    packed: bool
    seqlen_q: int | None
    seqlen_k: int | None


def _place(
    name: str,
    device: torch.device,
    lead: Sequence[int],
    cols: int | None,
    lengths: _Lengths,
    q_block_size: int,
    k_block_size: int,
) -> _Place:
    """Fits a mask to its lengths. `lead` is (heads, rows) for a flat mask or (batch or 1, heads, query blocks), `cols`
    the columns of a dense one.
    """
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size = lengths
    flat, row_blocks = len(lead) == 2, lead[-1]
    packed = cu_seqlens_q is not None or cu_seqlens_k is not None
    if packed:
        if seqlen_q is not None or seqlen_k is not None:
            given = f"seqlen_q is {seqlen_q}" if seqlen_q is not None else f"seqlen_k is {seqlen_k}"
            raise ValueError(f"{given}; expected None with cu_seqlens_q and cu_seqlens_k, which give the lengths")
        batch = _batch_of(cu_seqlens_q, cu_seqlens_k)
        if batch_size not in (None, batch):
            raise ValueError(f"batch_size is {batch_size}; expected {batch}, the sequences of cu_seqlens_q")
        seqlen_q, seqlen_k = max_seqlen_q, max_seqlen_k
        if cols is None and (seqlen_q is None or seqlen_k is None):
            missing = "max_seqlen_q" if seqlen_q is None else "max_seqlen_k"
            raise ValueError(f"{missing} is None; expected an int for index lists and CSR with cu_seqlens_q")
        room = batch * ceil_div(seqlen_q, q_block_size) if seqlen_q is not None else row_blocks
        if flat and row_blocks > room:
            raise ValueError(
                f"{name} has {row_blocks} query blocks; expected at most {room}, those of {batch} sequences of "
                f"max_seqlen_q = {seqlen_q}"
            )
        if not flat and seqlen_q is not None and ceil_div(seqlen_q, q_block_size) > row_blocks:
            raise ValueError(
                f"max_seqlen_q is {seqlen_q}; expected at most {row_blocks * q_block_size}, the {row_blocks} query "
                f"blocks of {name}"
            )
        if cols is not None and seqlen_k is not None and ceil_div(seqlen_k, k_block_size) > cols:
            raise ValueError(
                f"max_seqlen_k is {seqlen_k}; expected at most {cols * k_block_size}, the {cols} key blocks of {name}"
            )
        if seqlen_k is not None:
            cols = ceil_div(seqlen_k, k_block_size)
    else:
        if max_seqlen_q is not None or max_seqlen_k is not None:
            given = f"max_seqlen_q is {max_seqlen_q}" if max_seqlen_q is not None else f"max_seqlen_k is {max_seqlen_k}"
            raise ValueError(f"{given}; expected None without cu_seqlens_q and cu_seqlens_k (seqlen_* are for batched)")
        if flat:
            dims = 4 if cols is not None else 3
            raise ValueError(
                f"{name} has {dims - 1} dimensions; expected {dims} for batched lengths, (batch or 1, heads, ...), or "
                "cu_seqlens_q and cu_seqlens_k for packed ones"
            )
        batch = lead[0] if batch_size is None else batch_size
        if seqlen_q is None:
            seqlen_q = row_blocks * q_block_size
        if seqlen_k is None:
            if cols is None:
                raise ValueError("seqlen_k is None; expected an int for index lists and CSR without cu_seqlens_k")
            seqlen_k = cols * k_block_size
        _check_blocks("seqlen_q", seqlen_q, q_block_size, row_blocks, f"query blocks of {name}")
        if cols is not None:
            _check_blocks("seqlen_k", seqlen_k, k_block_size, cols, f"key blocks of {name}")
        cols = ceil_div(seqlen_k, k_block_size)
    if not flat and lead[0] not in (1, batch):
        raise ValueError(f"{name} has a batch of {lead[0]}; expected 1 or {batch}")
    sequences = ops.make_sequences.default(
        cu_seqlens_q,
        cu_seqlens_k,
        device,
        batch,
        0 if packed else seqlen_q,
        0 if packed else seqlen_k,
        q_block_size,
        k_block_size,
        -1 if flat else row_blocks,
    )
    return _Place(sequences, batch, row_blocks if flat else batch * row_blocks, cols, packed, seqlen_q, seqlen_k)


def _batch_of(cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> int:
    if cu_seqlens_q is None or cu_seqlens_k is None:
        side, other = ("q", "k") if cu_seqlens_q is None else ("k", "q")
        raise ValueError(
            f"cu_seqlens_{side} is None; expected an int32 tensor (batch + 1), as cu_seqlens_{other} is given"
        )
    if cu_seqlens_q.dim() != 1 or cu_seqlens_q.shape[0] == 0:
        raise ValueError(f"cu_seqlens_q has shape {tuple(cu_seqlens_q.shape)}; expected (batch + 1,)")
    return cu_seqlens_q.shape[0] - 1


def _check_block_sizes(q_block_size: int, k_block_size: int) -> None:
    for name, value in (("q_block_size", q_block_size), ("k_block_size", k_block_size)):
        if not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}; expected an int")
        if value < 1:
            raise ValueError(f"{name} is {value}; expected at least 1")


def _check_tensor(name: str, tensor: Tensor, dims: tuple[int, ...], dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} is a {type(tensor).__name__}; expected a tensor")
    if tensor.dtype not in dtypes:
        raise TypeError(f"{name} has dtype {tensor.dtype}; expected {' or '.join(map(str, dtypes))}")
    if tensor.dim() not in dims:
        raise ValueError(
            f"{name} has {tensor.dim()} dimensions, shape {tuple(tensor.shape)}; expected {' or '.join(map(str, dims))}"
        )


def _check_blocks(name: str, seqlen: int, block_size: int, blocks: int, what: str) -> None:
    if ceil_div(seqlen, block_size) != blocks:
        low, high = max((blocks - 1) * block_size + 1, 0), blocks * block_size
        raise ValueError(f"{name} is {seqlen}; expected {low} to {high}, the {blocks} {what}")


def _to_int32(tensor: Tensor) -> Tensor:
    if tensor.dtype == torch.int64:
        # Clamped first: a large value must stay out of range.
        tensor = tensor.clamp(-1, torch.iinfo(torch.int32).max).to(torch.int32)
    return tensor.contiguous()


def _blocks(sequences: Tensor, column: int, block_size: int) -> Tensor:
    """Blocks of each sequence, int64 (batch)."""
    return -(-sequences[:, column].to(torch.int64) // block_size)


def _sum_clamped(last: Tensor, width: Tensor) -> Tensor:
    """Sums clamp(x, 0, width) over all integers x up to `last`."""
    last = last.clamp(min=0)
    rising = torch.minimum(last, width)
    return rising * (rising + 1) // 2 + (last - rising) * width


# Debug mode: these read device memory.


def _check_total(name: str, tensor: Tensor, sequences: Tensor, begin: int, length: int) -> None:
    total = int(sequences[-1, begin] + sequences[-1, length]) if sequences.shape[0] else 0
    if tensor.shape[0] != total:
        raise ValueError(f"{name} has {tensor.shape[0]} rows; expected {total}, cu_seqlens_{name}[-1]")


def _check_lengths(
    name: str, lead: Sequence[int], cols: int | None, lengths: _Lengths, q_block_size: int, k_block_size: int
) -> None:
    if lengths.cu_seqlens_q is None or lengths.cu_seqlens_k is None:
        return
    flat = len(lead) == 2
    sides = (
        ("q", "query", lengths.cu_seqlens_q, lengths.max_seqlen_q, q_block_size, lead[-1]),
        ("k", "key", lengths.cu_seqlens_k, lengths.max_seqlen_k, k_block_size, cols),
    )
    for side, word, cu_seqlens, longest, block_size, extent in sides:
        ends = cu_seqlens.tolist()
        if ends[0] != 0:
            raise ValueError(f"cu_seqlens_{side}[0] is {ends[0]}; expected 0")
        for i in range(1, len(ends)):
            if ends[i] < ends[i - 1]:
                raise ValueError(
                    f"cu_seqlens_{side}[{i}] is {ends[i]}; expected at least {ends[i - 1]}, the one before"
                )
        sizes = [end - begin for begin, end in pairwise(ends)]
        if longest is not None and max(sizes, default=0) > longest:
            raise ValueError(f"max_seqlen_{side} is {longest}; expected at least {max(sizes)}, the longest sequence")
        blocks = [ceil_div(size, block_size) for size in sizes]
        if extent is None:
            continue
        if flat and sum(blocks) != extent:
            raise ValueError(f"{name} has {extent} {word} blocks; expected {sum(blocks)}, those of all sequences")
        if not flat and max(blocks, default=0) > extent:
            raise ValueError(
                f"{name} has {extent} {word} blocks; expected at least {max(blocks)}, those of the longest sequence"
            )


def _check_range(entries: Tensor, row: Tensor, place: _Place, q_block_size: int, k_block_size: int) -> None:
    """Checks listed key blocks, each of its row of the bit matrix."""
    sequence, _, used = locate_rows(place.sequences, place.rows, q_block_size)
    if place.batch == 0:
        return
    limit = torch.where(used, _blocks(place.sequences, K_LEN, k_block_size)[sequence], torch.iinfo(torch.int32).max)
    wrong = used[row] & ((entries < 0) | (entries >= limit[row]))
    if wrong.any():
        at = int(wrong.nonzero()[0])
        raise ValueError(
            f"indices has the entry {int(entries[at])} in row {int(row[at])}; expected 0 to {int(limit[row[at]]) - 1}, "
            "the key blocks of the row's sequence"
        )


def _check_lists(counts: Tensor, indices: Tensor, place: _Place, q_block_size: int, k_block_size: int) -> None:
    width = indices.shape[-1]
    if counts.numel() and (int(counts.min()) < 0 or int(counts.max()) > width):
        raise ValueError(
            f"counts has values from {int(counts.min())} to {int(counts.max())}; expected 0 to {width}, the last "
            "dimension of indices"
        )
    if counts.dim() == 3:
        counts, indices = counts.expand(place.batch, -1, -1), indices.expand(place.batch, -1, -1, -1)
    at = (torch.arange(width, device=counts.device) < counts.unsqueeze(-1)).nonzero(as_tuple=True)
    row = at[1] if counts.dim() == 2 else at[0] * counts.shape[2] + at[2]
    _check_range(indices[at], row, place, q_block_size, k_block_size)


def _check_rows(indptr: Tensor, indices: Tensor, place: _Place, q_block_size: int, k_block_size: int) -> None:
    entries = indices.shape[0]
    sizes = indptr[:, 1:] - indptr[:, :-1]
    if indptr.numel() and (int(indptr.min()) < 0 or int(indptr.max()) > entries or bool((sizes < 0).any())):
        raise ValueError(
            f"indptr has values from {int(indptr.min())} to {int(indptr.max())}; expected rows that do not decrease, "
            f"from 0 to {entries}, the entries of indices"
        )
    for head in range(indptr.shape[0]):
        row = torch.repeat_interleave(torch.arange(place.rows, device=indptr.device), sizes[head])
        listed = indices[int(indptr[head, 0]) : int(indptr[head, -1])]
        _check_range(listed, row, place, q_block_size, k_block_size)
