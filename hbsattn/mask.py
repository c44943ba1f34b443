"""BlockMask: which key blocks each query block attends to, packed into bits and planned once for many calls.

This is its front. What is said of it here is done by _sources, _elements, _flex, _update and _reading.
"""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbsattn._checks import (
    check_batched,
    check_block_sizes,
    check_bool,
    check_device,
    check_dims,
    hint_at_flex,
    type_name,
)
from hbsattn._chunks import stays_lists
from hbsattn._contents import can_read, check_contents, check_total
from hbsattn._elements import Made, from_elements
from hbsattn._flex import MaskMod, from_flex, from_mask_mod, to_flex
from hbsattn._join import join
from hbsattn._layout import (
    K_BEGIN,
    K_LEN,
    Q_BEGIN,
    Q_LEN,
    UNBOUNDED,
    MaskLayout,
    Reach,
    ceil_div,
    reach_of_rows,
    unpack_bits,
)
from hbsattn._numbers import Numbers, broadcast_heads, numbers_of_heads
from hbsattn._partial import Partial
from hbsattn._placement import Lengths, Place, make_sequences, place_blocks
from hbsattn._plans import Maker, Plan, Plans, is_capturing, normal_tensors
from hbsattn._plot import plot
from hbsattn._reading import count_flops, describe, to_dense, to_elements
from hbsattn._sizes import OfSizes
from hbsattn._sources import Dense, Lists, Rows, Source
from hbsattn._update import update

CONSTRUCTORS = "BlockMask.from_dense, BlockMask.from_indices or BlockMask.from_csr, or another of its constructors"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class BlockMask(OfSizes):
    """A block mask, ready for any number of `block_sparse_attention` calls; built by `from_dense`, `from_indices` or
    `from_csr`, of any pairs by `from_elements`, `from_mask_mod` or `from_flex`, and of blocks of any sizes by
    `from_sizes`.

    Each sequence is cut from its own start into blocks of `q_block_size` queries and `k_block_size` keys; its last
    blocks may be short. Query i attends to key j if the entry of their blocks is on and, with `causal`,
    `j <= i + k_len - q_len`; `windowed` adds windows of tokens, and partial blocks have a bit for each pair. A mask has
    1 head, one for each key head, or one for each query head.

    The constructors share these keywords:

    * For packed tensors, (total, heads, head_dim): `cu_seqlens_q` and `cu_seqlens_k`, int32 (batch + 1) on the mask's
      device, and the host integers `max_seqlen_q` and `max_seqlen_k`, which no length exceeds. The mask is flat (no
      batch dimension, the blocks of all sequences one after another) or has a batch dimension (batch or 1) and is
      padded to the longest sequence or more.
    * For batched tensors, (batch, seqlen, heads, head_dim): `seqlen_q` and `seqlen_k`, and `batch_size` if the mask's
      batch dimension is 1 and stands for more.
    * `causal`.

    Integers may be whatever has `__index__`, but for bools. What does not fit raises TypeError or ValueError. What the
    tensors hold is checked on a CPU, and on CUDA in debug mode (`set_debug`); the constructors wait for the device only
    there, but for the last four, which always do and which no trace and no capture takes. Rows of packed tensors past
    the last sequence are padding.

    A mask may be copied, pickled, saved, moved and mapped over its fields; each copy plans its work anew. Copies share
    tensors as Python's own do, and so an `update_` of one; masks that are made from masks do not. `update_`
    rewrites it in place. Writes to `bits` and `sequences` by torch ops are noticed by later calls, but not by CUDA
    graphs, which read the mask's memory and keep the plan that they were captured with: keep the mask as long as its
    graphs, and rewrite it with `update_`. What is off for causality stays off in a copy with `causal=False`.

    Attributes:
        bits: int32 (heads, rows, ceil(cols / 32)), trimmed to the blocks that lengths, causality and windows leave
            visible; partial ones are on. Made anew each time by a mask that stays lists (`from_indices`).
        sequences: int32 (batch, 7), where each sequence lies, and its `k_len - q_len`.
        q_block_size, k_block_size, causal: as given. Calls cut blocks far above all lengths to about the length.
        batch: sequences.
        heads: mask heads.
        rows: query blocks of all sequences, padding included.
        cols: key blocks of the longest sequence, or a bound.
        packed: whether the mask is for packed tensors.
        seqlen_q, seqlen_k: lengths for batched tensors; for packed ones `max_seqlen_q` and `max_seqlen_k` as given.
    """

    # All tensors are fields of their own, so that whoever maps the fields of dataclasses finds them. The defaults serve
    # the sentence of `__init__` alone.
    _bits: Tensor | None = None
    sequences: Tensor = None
    q_block_size: int = 0
    k_block_size: int = 0
    causal: bool = False
    batch: int = 0
    heads: int = 0
    rows: int = 0
    cols: int = 0
    packed: bool = False
    seqlen_q: int | None = None
    seqlen_k: int | None = None
    _q_block: int = 0  # for the ops, as `cut_block` has it
    _k_block: int = 0
    _form: str = ""  # of the constructor, and the shape of its first tensor
    _shape: tuple[int, ...] = ()
    _counts: Tensor | None = None  # lists, where there are no bits
    _indices: Tensor | None = None
    _replayed: bool = False  # whether a CUDA graph writes the contents: they may change with each replay
    _rules: Tensor | None = None  # int32 (heads, 4), if heads have windows: left, right, sink and 0
    _partial: Tensor | None = None  # where partial blocks are, if there are any: these three as `_layout` has them
    _matrices: Tensor | None = None
    _elements: Tensor | None = None

    # Takes the fields in their order, or by name. A frozen dataclass's own would set them one by one, which takes as
    # long as all else that a new mask needs in Python.
    def __init__(self, *values: Any, **named: Any) -> None:
        is_compiling = torch.compiler.is_compiling()
        fields = {} if is_compiling else self.__dict__  # the tracer follows no writes to __dict__
        fields.update(zip(_FIELDS, values, strict=False), **named)
        if not isinstance(fields.get("sequences"), Tensor):
            raise TypeError(f"BlockMask was called itself; expected {CONSTRUCTORS}")
        if named or len(values) > len(_FIELDS):
            _check_fields(len(values), named)
        if not is_compiling:
            for name in _TENSORS:
                tensor = fields.get(name)
                if tensor is not None and isinstance(tensor, Tensor) and tensor.is_inference():
                    with torch.inference_mode(False):
                        fields[name] = tensor.clone()
        # No field: a copy, or a mask with other fields, plans anew.
        bits = fields.get("_bits")
        more = (x for x in (fields.get("_rules"), fields.get("_partial")) if x is not None)
        fields["_plans"] = Plans((fields.get("_counts") if bits is None else bits, fields["sequences"], *more))
        if is_compiling:
            for name, value in fields.items():
                object.__setattr__(self, name, value)

    def __reduce__(self) -> tuple[type, tuple[Any, ...]]:
        return BlockMask, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

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
        source = Dense.check(block_mask)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        return cls._of(source, q_block_size, k_block_size, lengths, causal)

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
                read. Entries out of range are dropped, or raise ValueError where contents are checked; lists with a
                batch dimension may name what the longest sequence has.
            max_seqlen_q, max_seqlen_k: required for packed tensors.
            seqlen_q: by default the query blocks times the block size; a length that is given ends in the last one.
            seqlen_k: required for batched tensors.

        With query blocks of 1 row, lists of long sequences may be far smaller than bits. Where bits would take more
        than 256 MB and twice what lists do (batched lists for batched tensors, flat ones for packed), the mask keeps a
        copy of the lists. A call without gradients and dropout then makes and plans the bits of as many rows as take
        256 MB at a time. The first with one of them makes all bits, and the mask keeps them for all later calls on the
        stream; a compiled call makes all bits each time.
        """
        source = Lists.check(counts, indices)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        return cls._of(source, q_block_size, k_block_size, lengths, causal)

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
        source = Rows.check(indptr, indices)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        return cls._of(source, q_block_size, k_block_size, lengths, causal)

    @classmethod
    def from_elements(
        cls,
        elements: Tensor,
        q_block_size: int,
        k_block_size: int,
        *,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        batch_size: int | None = None,
        causal: bool = False,
    ) -> "BlockMask":
        """Builds a mask from booleans of single pairs of a query and a key, exactly. Waits for the device.

        Args:
            elements: bool with any strides, True where attention is computed. Batched: (batch or 1, heads, queries,
                keys). For packed tensors likewise, of the longest sequence or more, or flat: (heads, queries of all
                sequences, keys of all sequences), sequences on the diagonal and the rest ignored.
            max_seqlen_q, max_seqlen_k: by default the longest lengths.

        A block is off, on, or partial: some of its pairs count. See `from_mask_mod` for what partial blocks cost.
        """
        sizes = _check_form(q_block_size, k_block_size, causal)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, None, None, batch_size)
        with normal_tensors():
            return cls._made(from_elements(elements, sizes, lengths.check(), causal), sizes, causal)

    @classmethod
    def from_mask_mod(
        cls,
        mask_mod: MaskMod,
        q_block_size: int,
        k_block_size: int,
        *,
        heads: int = 1,
        cu_seqlens_q: Tensor | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        seqlen_q: int | None = None,
        seqlen_k: int | None = None,
        batch_size: int | None = None,
        causal: bool = False,
        device: torch.device | str | int | None = None,
    ) -> "BlockMask":
        """Builds a mask from a function of FlexAttention's, exactly. Waits for the device.

        Args:
            mask_mod: takes the numbers of the sequence, the mask head, the query and the key in their sequence, integer
                tensors (), and returns a bool tensor (): True where attention is computed. It is mapped over all pairs
                that exist, and up to the diagonal with `causal`, by `torch.vmap`, as FlexAttention does; some million
                pairs at a time, so that memory stays bounded. What it indexes tables by is cut to what they have.
            heads: mask heads.
            seqlen_q, seqlen_k: required for batched tensors, of which there are `batch_size`, by default 1.
            max_seqlen_q, max_seqlen_k: by default the longest lengths.
            device: by default that of `cu_seqlens_q`, or PyTorch's.

        Of partial blocks, in which some pairs count and others do not, the mask keeps a bit for each pair, equal blocks
        once. What they hide is exactly what was asked for, in results and gradients. On CUDA, calls of such a mask run,
        for now, on the kernels of dropout and softcaps, all blocks below the rate that they have in others: `explain`
        names them. Keys and values of a partial block must be finite: they may reach queries that do not attend to
        them.

        Raises:
            ValueError, TypeError: also for a mask_mod that returns no bool, or, where contents are checked, reads out
                of range, and inside a trace or a capture.
        """
        sizes = _check_form(q_block_size, k_block_size, causal)
        given = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqlen_q, seqlen_k, batch_size)
        with normal_tensors():
            made = from_mask_mod(mask_mod, sizes, Lengths(*given).check(), heads, causal, device)
            return cls._made(made, sizes, causal)

    @classmethod
    def from_flex(cls, block_mask: Any, *, batch_size: int | None = None) -> "BlockMask":
        """Builds a mask from FlexAttention's, exactly. Waits for the device.

        Args:
            block_mask: a torch.nn.attention.flex_attention.BlockMask, of any `BLOCK_SIZE`. Blocks of its full lists are
                on; its mask_mod is evaluated on the others that it lists, as `from_mask_mod` says, and nowhere else.
                Where it has 1 head, mask_mod is asked about head 0, and where it has a batch of 1 about sequence 0.
            batch_size: of the tensors, if the mask's batch of 1 stands for more.

        Returns:
            A mask for batched tensors of its `seq_lengths`, in blocks of its size: (batch, length, heads, head_dim),
            unlike FlexAttention's. Causality is in its partial blocks: `causal` is False.
        """
        with normal_tensors():
            return cls._made(*from_flex(block_mask, batch_size), False)

    @classmethod
    def _made(cls, made: Made, sizes: tuple[int, int], causal: bool) -> "BlockMask":
        mask = cls._at(made.place, made.bits, made.sequences, *sizes, causal, made.heads)
        return mask if made.partial is None else dataclasses.replace(mask, **_fields_of(made.partial))

    @classmethod
    def _of(cls, source: Source, q_block_size: int, k_block_size: int, lengths: Lengths, causal: bool) -> "BlockMask":
        q_block_size, k_block_size = check_block_sizes(q_block_size, k_block_size)
        check_bool("causal", causal)
        lengths = lengths.check()
        name, device, lead = source.names[0], source.main.device, source.lead
        if isinstance(source, Rows) and not lengths.packed:
            lead = source.lead_of_batch(lengths, q_block_size)
            lengths = lengths._replace(batch_size=lead[0])
        with normal_tensors():
            place = place_blocks(name, device, lead, source.cols, lengths, q_block_size, k_block_size)
            bits = lists = None
            if _keep_lists(source, place):
                sequences = make_sequences(lengths, place, device)
                lists = source.clone()  # later changes of the caller's tensors change no mask, of bits or of lists
            else:
                bits, sequences = source.make(lengths, place, causal)
            # After the op, which refuses what shapes tell, and is safe with any contents.
            if can_read(*source.tensors, sequences):
                check_contents(source, lead, lengths, place, sequences, q_block_size, k_block_size)
        made_from = (source.form, tuple(source.main.shape), *((None, None) if lists is None else lists.tensors))
        return cls._at(place, bits, sequences, q_block_size, k_block_size, causal, source.heads, made_from)

    @classmethod
    def _at(
        cls,
        place: Place,
        bits: Tensor | None,
        sequences: Tensor,
        q_block_size: int,
        k_block_size: int,
        causal: bool,
        heads: int,
        made_from: tuple[Any, ...] = ("", (), None, None),
    ) -> "BlockMask":
        """`made_from`: the fields from `_form` to `_indices`, which tell what a constructor took."""
        return cls(
            bits,
            sequences,
            q_block_size,
            k_block_size,
            causal,
            place.batch,
            heads,
            place.rows,
            place.cols,
            place.packed,
            place.seqlen_q,
            place.seqlen_k,
            place.q_block,
            place.k_block,
            *made_from,
            is_capturing(sequences.device),
        )

    def update_(
        self, *contents: Tensor, cu_seqlens_q: Tensor | None = None, cu_seqlens_k: Tensor | None = None
    ) -> "BlockMask":
        """Rewrites the mask in place, with all work lists that calls have made from it, in the memory where they are.

        CUDA graphs that were captured with the mask replay with the new contents; an update that is itself captured
        takes effect at each replay. Like any write to a tensor, it runs on the current stream: whoever uses the mask on
        other streams orders them. A backward pass needs the mask of its forward pass, and raises RuntimeError after an
        update between the two.

        Args:
            contents: what the constructor took, with the same shapes on the same device: `block_mask`, or `counts` and
                `indices`, or `indptr` and `indices`. The last dimension of `indices` may differ, but for a mask that
                stays lists (`from_indices`).
            cu_seqlens_q, cu_seqlens_k: for packed tensors, optionally: new ones for as many sequences, none longer than
                the mask's `max_seqlen_q` and `max_seqlen_k`. By default the lengths stay.

        Returns:
            The mask itself.
        """
        update(self, contents, cu_seqlens_q, cu_seqlens_k)
        return self

    def __or__(self, other: object) -> "BlockMask":
        """The blocks that either mask has, of one place; heads as those of the mask that has more. Without windows, and
        without partial blocks.
        """
        return join(self, other, torch.bitwise_or) if isinstance(other, BlockMask) else NotImplemented

    def __and__(self, other: object) -> "BlockMask":
        """What both masks have, in partial blocks, too. Waits for the device if both have some."""
        return join(self, other, torch.bitwise_and) if isinstance(other, BlockMask) else NotImplemented

    def windowed(self, left: Numbers = UNBOUNDED, right: Numbers = UNBOUNDED, sink: Numbers = 0) -> "BlockMask":
        """Returns the mask within a sliding window of tokens, which each head may have its own of.

        With d = k_len - q_len of their sequence, query i attends to key j if the mask as it is lets it, causality
        included, and

            j < sink or i + d - left <= j <= i + d + right

        Of `bits`, what has no such pair is off. A mask that stays lists (`from_indices`) gets bits. Nothing waits for
        the device, and no dense mask is made.

        Args:
            left, right: tokens before and behind the query's own position; -1 is unbounded, as in FlashAttention's
                `window_size`.
            sink: first tokens of the sequence, which escape the window, never causality.

        Each is an int, or one for each mask head: a sequence of ints, or an int32 or int64 tensor (heads) on the mask's
        device. They have as many heads as the mask, unless it or they have 1: a mask of 1 head gets theirs.

        Returns:
            A mask for any number of calls. It is not rewritten with `update_`, joined with `|` or `&`, or given
            another window; `patterns.select_heads` mixes its heads with others.

        Raises:
            ValueError, TypeError: for a left or right below -1, a sink below 0 (of tensors, where contents are
                checked), another number of heads, a mask that has windows already.

        Values of keys that are outside every window must be finite where they share a block with keys that are inside:
        like those of all keys that a query does not attend to, they may reach it through their tile.
        """
        if self._rules is not None:
            raise ValueError("mask has windows already; expected one without: give left, right and sink at once")
        numbers = {
            name: numbers_of_heads(name, value, self.device, "mask", least)
            for name, value, least in (("left", left, UNBOUNDED), ("right", right, UNBOUNDED), ("sink", sink, 0))
        }
        for name, value in numbers.items():
            if self.heads != 1 and value.shape[0] not in (1, self.heads):
                raise ValueError(f"{name} has {value.shape[0]} heads; expected 1 or {self.heads}, those of mask")
        with normal_tensors():
            columns = broadcast_heads(numbers)
            largest = torch.iinfo(torch.int32).max
            rules = torch.cat((*columns, torch.zeros_like(columns[0])), dim=1).clamp(UNBOUNDED, largest).to(torch.int32)
            bits = reach_of_rows(self.sequences, self.rows, MaskLayout(*self._layout), rules).trim(self.bits)
            partial = self._partial_blocks and self._partial_blocks.of_heads(bits.shape[0])
            return self._with_bits(bits, partial, rules.expand(bits.shape[0], -1).contiguous())

    def _with_bits(self, bits: Tensor, partial: Partial | None, rules: Tensor | None = None) -> "BlockMask":
        """A mask of the same place, which no constructor has made. An `update_` of this one does not change it."""
        made = _fields_of(partial)
        made |= {"_form": "", "_shape": (), "_counts": None, "_indices": None, "_replayed": is_capturing(self.device)}
        made["sequences"] = self.sequences.clone()
        return dataclasses.replace(self, _bits=bits, _rules=rules, heads=bits.shape[0], **made)

    @property
    def _lists(self) -> Lists | None:
        return None if self._counts is None else Lists(self._counts, self._indices)

    @property
    def _partial_blocks(self) -> Partial | None:
        return None if self._partial is None else Partial(self._partial, self._matrices, self._elements)

    @property
    def _layout(self) -> tuple[int, int, int, int, int]:
        """What ops take as `layout`, a MaskLayout. An op's list of symbolic numbers holds no bool."""
        return self.cols, self._q_block, self._k_block, int(self.causal), int(self._partial is not None)

    @property
    def bits(self) -> Tensor:
        if self._bits is not None:
            return self._bits
        return self._lists.pack(self.sequences, self.rows, self._layout[:4])

    def _plan(self, key: tuple[Any, ...], make: Maker) -> Plan:
        """What calls share that are alike in `key`, made on the first one.

        `make` takes the mask and returns tensors, in sizes that follow from the sizes of the mask and from `key`. It
        may ask the mask for other plans; it may not hold the mask, which holds it.
        """
        return self._plans.find_or_make(self, key, make)

    def _makes_bits(self) -> bool:
        """Whether a mask of lists has its bits made at the next call.

        It has if an earlier call has made them. A compiled call has, too: chunks would be a graph for each length.
        """
        return torch.compiler.is_compiling() or self._plans.find(("bits",)) is not None

    def _kept_bits(self) -> Tensor:
        if self._bits is not None:
            return self._bits
        return self._plan(("bits",), lambda mask: (mask.bits,))[0]

    @property
    def device(self) -> torch.device:
        return self.sequences.device

    @property
    def density(self) -> float:
        """The share of active blocks, partial ones included, among those that lengths, causality and windows leave
        visible. Waits for the device.
        """
        visible = int(self._reach().count().sum()) * (self.heads if self._rules is None else 1)
        active = sum(int(head.sum()) for head in self._heads())
        return active / visible if visible else 0.0

    def to(self, device: torch.device | str | int) -> "BlockMask":
        """Returns the mask on another device, where its work lists are built anew; itself if it is there already."""
        device = check_device(device)
        with normal_tensors():
            sequences = self.sequences.to(device)
            if sequences is self.sequences:
                return self
            tensors = {name: getattr(self, name) for name in _TENSORS if name != "sequences"}
            tensors = {name: None if tensor is None else tensor.to(device) for name, tensor in tensors.items()}
            tensors["sequences"] = sequences
        return dataclasses.replace(self, **tensors, _replayed=is_capturing(device))

    def cuda(self, device: torch.device | str | int | None = None) -> "BlockMask":
        """Returns the mask on a CUDA device, by default the current one."""
        return self.to("cuda" if device is None else device)

    def cpu(self) -> "BlockMask":
        """Returns the mask on the CPU."""
        return self.to("cpu")

    def to_dense(self) -> Tensor:
        """Returns the mask's blocks as booleans, trimmed to the visible ones; partial blocks are on. For packed tensors
        this waits for the device.

        Packed: (heads, query blocks of all sequences, key blocks of all sequences). Batched: (batch, heads, query
        blocks, key blocks).
        """
        return to_dense(self)

    def to_elements(self) -> Tensor:
        """Returns which pairs of a query and a key attend, as `from_elements` takes it: bool (batch, heads, queries,
        keys), or for packed tensors (heads, queries of all sequences, keys of all sequences). Waits for the device.
        """
        return to_elements(self)

    def to_flex(self, num_heads: int | None = None) -> Any:
        """Returns a torch.nn.attention.flex_attention.BlockMask of the same pairs, for batched tensors. Causality,
        windows and bits of partial blocks are in its mask_mod, which full blocks do not need. Waits for the device.

        Args:
            num_heads: of the mask to return, by default as many as this one has: FlexAttention takes 1, or as many as
                q has.
        """
        return to_flex(self, num_heads)

    def flops(self, head_dim: int, num_heads: int, value_dim: int | None = None) -> int:
        """Counts the floating-point operations of the forward: 2 * (head_dim + value_dim), that of v, which is head_dim
        by default, for each pair of a query and a key that attend, over all `num_heads` query heads. Exact, with
        causality, windows, short blocks and partial ones. Waits for the device.
        """
        return count_flops(self, head_dim, num_heads, value_dim)

    def plot(self, head: int = 0, *, sequence: int = 0, ax: Any = None) -> Any:
        """Draws a head of a sequence with matplotlib, and returns the axes: `ax`, or new ones. Partial blocks, and
        those of which causality or a window leaves pairs out, are lighter. Waits for the device.

        Raises:
            ValueError: for a head, or a sequence, that the mask does not have, or a sequence without queries or keys.
            ImportError: without matplotlib.
        """
        return plot(self, head, sequence, ax)

    def __repr__(self) -> str:
        return describe(self)

    def _heads(self) -> Iterator[Tensor]:
        """The booleans of one head after another: of all heads at once they would be eight times the bits.

        Trimmed: bits that others wrote may be on where nothing is visible.
        """
        reach = self._reach()
        for head, bits in enumerate(self.bits):
            own = reach if self._rules is None else Reach(*(x[head] for x in reach))
            yield unpack_bits(own.trim(bits), self.cols)

    def _reach(self) -> Reach:
        """The blocks that are visible in each row."""
        return reach_of_rows(self.sequences, self.rows, MaskLayout(*self._layout), self._rules)

    def _check_use(self, q: Tensor, k: Tensor, q_shape: torch.Size, k_shape: torch.Size) -> None:
        """Checks tensors against the lengths that the mask was built for, which the op is not told."""
        if not self.packed:
            check_batched("q", q_shape, self.seqlen_q, self.q_block_size)
            check_batched("k", k_shape, self.seqlen_k, self.k_block_size)
            return
        check_dims("q", q_shape, 3, "packed")
        check_dims("k", k_shape, 3, "packed")
        keys, rows = self.batch * self.cols * self._k_block, k_shape[0]
        if self.seqlen_k is not None and self.batch and rows > keys:
            raise ValueError(
                f"max_seqlen_k is {self.seqlen_k}; expected at least {ceil_div(rows, self.batch)}, as k has {rows} "
                f"rows in {self.batch} sequences"
            )
        if can_read(self.sequences):
            check_total("q", q, self.sequences, Q_BEGIN, Q_LEN)
            check_total("k", k, self.sequences, K_BEGIN, K_LEN)


def check_is_mask(value: object) -> None:
    """Refuses what is no BlockMask, and says how to get one from what is often given instead."""
    if isinstance(value, BlockMask):
        return
    is_tensor = isinstance(value, Tensor)
    hint = ": for booleans, BlockMask.from_dense makes one" if is_tensor else hint_at_flex(value)
    raise TypeError(f"mask is a {type_name(value)}; expected a BlockMask of hbsattn{hint}")


def _keep_lists(source: Source, place: Place) -> bool:
    """Whether the mask keeps lists instead of bits. Chunks need lists that lie as the rows of tensors do."""
    if not isinstance(source, Lists) or (len(source.lead) == 2) != place.packed:
        return False
    return stays_lists(place.q_block, source.heads, place.rows, place.cols, source.indices.numel())


def _check_form(q_block_size: int, k_block_size: int, causal: bool) -> tuple[int, int]:
    check_bool("causal", causal)
    return check_block_sizes(q_block_size, k_block_size)


def _fields_of(partial: Partial | None) -> dict[str, Any]:
    return dict(zip(("_partial", "_matrices", "_elements"), partial or (None,) * 3, strict=True))


def _check_fields(given: int, named: dict[str, Any]) -> None:
    """Refuses what a dataclass's own `__init__` refuses, as `dataclasses.replace` leaves that to it."""
    if given > len(_FIELDS):
        raise TypeError(f"BlockMask was called with {given} values; expected at most {len(_FIELDS)}")
    for name in named:
        if name not in _FIELDS[given:]:
            what = "given twice" if name in _FIELDS else "no field of BlockMask"
            raise TypeError(f"{name} is {what}; expected one of {', '.join(_FIELDS[given:])}")


_FIELDS = tuple(field.name for field in dataclasses.fields(BlockMask))
_TENSORS = ("_bits", "sequences", "_counts", "_indices", "_rules", "_partial", "_matrices", "_elements")

torch.serialization.add_safe_globals([BlockMask])  # for torch.load(weights_only=True)
