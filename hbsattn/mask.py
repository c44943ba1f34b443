"""BlockMask: which key blocks each query block attends to, packed into bits and planned once for many calls."""

import dataclasses
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hbsattn._checks import (
    check_block_sizes,
    check_bool,
    check_device,
    check_index,
    check_same_device,
    hint_at_flex,
    type_name,
)
from hbsattn._chunks import stays_lists
from hbsattn._contents import can_read, check_contents, check_total
from hbsattn._layout import (
    COL_BEGIN,
    K_BEGIN,
    K_LEN,
    Q_BEGIN,
    Q_LEN,
    UNBOUNDED,
    MaskLayout,
    Reach,
    ceil_div,
    count_blocks,
    count_pairs,
    locate_rows,
    reach_of_rows,
    unpack_bits,
)
from hbsattn._numbers import Numbers, broadcast_heads, numbers_of_heads
from hbsattn._placement import Lengths, Place, count_sequences, make_sequences, place_blocks
from hbsattn._plans import Maker, Plan, Plans, is_capturing, normal_tensors
from hbsattn._plot import plot
from hbsattn._sources import FORMS, Dense, Lists, Rows, Source

CONSTRUCTORS = "BlockMask.from_dense, BlockMask.from_indices or BlockMask.from_csr"


@dataclass(frozen=True, eq=False, repr=False, init=False)
class BlockMask:
    """A block mask, ready for any number of `block_sparse_attention` calls; built by `from_dense`, `from_indices` or
    `from_csr`.

    Each sequence is cut from its own start into blocks of `q_block_size` queries and `k_block_size` keys; its last
    blocks may be short. Query i attends to key j if the entry of their blocks is on and, with `causal`,
    `j <= i + k_len - q_len`; `windowed` adds windows of tokens. A mask has 1 head, one for each key head, or one for
    each query head.

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
    there. Rows of packed tensors past the last sequence are padding.

    A mask may be copied, pickled, saved, moved and mapped over its fields; each copy plans its work anew. Copies share
    tensors as Python's own do, and so an `update_` of one; masks that are made from masks do not. `update_`
    rewrites it in place. Writes to `bits` and `sequences` by torch ops are noticed by later calls, but not by CUDA
    graphs, which read the mask's memory and keep the plan that they were captured with: keep the mask as long as its
    graphs, and rewrite it with `update_`. What is off for causality stays off in a copy with `causal=False`.

    Attributes:
        bits: int32 (heads, rows, ceil(cols / 32)), trimmed to the blocks that lengths, causality and windows leave
            visible. Made anew each time by a mask that stays lists (`from_indices`).
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
        if not self._form:
            raise ValueError(
                "mask was made by a pattern, by windowed or from other masks; expected one from a constructor, as "
                "update_ rewrites what that took"
            )
        kind = FORMS[self._form]
        if len(contents) != len(kind.names):
            raise TypeError(
                f"update_ is called with {len(contents)} tensors; expected {' and '.join(kind.names)}, as mask was "
                f"built by from_{kind.form}"
            )
        source = kind.check(*contents)
        name = kind.names[0]
        check_same_device(name, source.main, self.device, "mask")
        if tuple(source.main.shape) != self._shape:
            raise ValueError(
                f"{name} has shape {tuple(source.main.shape)}; expected {self._shape}, that which mask was built from"
            )
        lists = self._lists
        if lists is not None and source.indices.shape != lists.indices.shape:
            raise ValueError(
                f"indices has shape {tuple(source.indices.shape)}; expected {tuple(lists.indices.shape)}, as mask "
                "stays lists"
            )
        with normal_tensors(), torch.no_grad():
            place, lengths, sequences = self._place_again(cu_seqlens_q, cu_seqlens_k)
            if can_read(*source.tensors, sequences):
                check_contents(source, self._lead, lengths, place, sequences, self.q_block_size, self.k_block_size)
            if lists is None:
                self._bits.copy_(source.pack(sequences, place.rows, self._layout[:4]))
            else:
                lists.counts.copy_(source.counts)
                lists.indices.copy_(source.indices)
            if lengths.packed:
                self.sequences.copy_(sequences)
        if is_capturing(self.device):
            object.__setattr__(self, "_replayed", True)
        if not torch.compiler.is_compiling():  # the plans that a compiled program outdates are made anew when next used
            self._plans.remake(self)
        return self

    def __or__(self, other: object) -> "BlockMask":
        """The blocks that either mask has, of one place; heads as those of the mask that has more. Without windows."""
        return self._join(other, torch.bitwise_or)

    def __and__(self, other: object) -> "BlockMask":
        """The blocks that both masks have."""
        return self._join(other, torch.bitwise_and)

    def _join(self, other: object, join: Callable[[Tensor, Tensor], Tensor]) -> "BlockMask":
        if not isinstance(other, BlockMask):
            return NotImplemented
        self._check_place(other)
        if self._rules is not None or other._rules is not None:
            raise ValueError(
                f"{'the first' if self._rules is not None else 'the other'} mask has windows; expected masks without: "
                "join those, and call windowed on the result"
            )
        heads = max(self.heads, other.heads)
        if min(self.heads, other.heads) == 0 or heads % self.heads or heads % other.heads:
            raise ValueError(
                f"masks have {self.heads} and {other.heads} heads; expected one to be a multiple of the other"
            )
        with normal_tensors():
            bits = (
                m.bits.repeat_interleave(heads // m.heads, dim=0) if m.heads < heads else m.bits for m in (self, other)
            )
            return self._with_bits(join(*bits))

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
            return self._with_bits(bits, rules.expand(bits.shape[0], -1).contiguous())

    def _with_bits(self, bits: Tensor, rules: Tensor | None = None) -> "BlockMask":
        """A mask of the same place, which no constructor has made. An `update_` of this one does not change it."""
        made = {"_form": "", "_shape": (), "_counts": None, "_indices": None, "_replayed": is_capturing(self.device)}
        made["sequences"] = self.sequences.clone()
        return dataclasses.replace(self, _bits=bits, _rules=rules, heads=bits.shape[0], **made)

    def _check_place(self, other: "BlockMask") -> None:
        """Refuses a mask whose bits lie otherwise."""
        check_same_device("the other mask", other.sequences, self.device, "the first")
        for name in (
            "q_block_size",
            "k_block_size",
            "causal",
            "packed",
            "seqlen_q",
            "seqlen_k",
            "batch",
            "rows",
            "cols",
        ):
            mine, given = getattr(self, name), getattr(other, name)
            if mine != given:
                raise ValueError(f"{name} of the other mask is {given}; expected {mine}, that of the first")
        if can_read(self.sequences, other.sequences) and not torch.equal(self.sequences, other.sequences):
            raise ValueError("cu_seqlens of the other mask differ; expected those of the first")

    @property
    def _lead(self) -> tuple[int, ...]:
        """The shape of what the constructor took, without columns, as `place_blocks` has it."""
        if self._form == "dense":
            return self._shape[:-1]
        if self._form == "indices":
            return self._shape
        flat = (self.heads, self.rows)
        return flat if self.packed else (self.batch, self.heads, self.rows // max(self.batch, 1))

    def _place_again(self, cu_seqlens_q: Tensor | None, cu_seqlens_k: Tensor | None) -> tuple[Place, Lengths, Tensor]:
        """The place of the same blocks over new lengths, or over those that are there, and the table of sequences."""
        longest = (self.seqlen_q, self.seqlen_k) if self.packed else (None, None)
        lengths = Lengths(cu_seqlens_q, cu_seqlens_k, *longest, None, None, None)
        lead = self._lead
        shape = (self.batch, self.rows, self.cols, self.packed, self.seqlen_q, self.seqlen_k)
        place = Place(*shape, self._q_block, self._k_block, -1 if len(lead) == 2 else lead[-1])
        if not lengths.packed:
            return place, lengths, self.sequences
        if not self.packed:
            given = "cu_seqlens_q" if cu_seqlens_q is not None else "cu_seqlens_k"
            raise ValueError(f"{given} is a Tensor; expected None, as mask was built for batched tensors")
        batch = count_sequences(cu_seqlens_q, cu_seqlens_k, self.device, "mask")
        if batch != self.batch:
            raise ValueError(f"cu_seqlens_q has {batch} sequences; expected {self.batch}, those of mask")
        return place, lengths, make_sequences(lengths, place, self.device)

    @property
    def _lists(self) -> Lists | None:
        return None if self._counts is None else Lists(self._counts, self._indices)

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
        """The share of active blocks among those that lengths, causality and windows leave visible. Waits for the
        device.
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
        """Returns the mask as booleans, trimmed to the visible blocks; for packed tensors this waits for the device.

        Packed: (heads, query blocks of all sequences, key blocks of all sequences). Batched: (batch, heads, query
        blocks, key blocks).
        """
        mask = torch.stack(list(self._heads()))
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

    def flops(self, head_dim: int, num_heads: int, value_dim: int | None = None) -> int:
        """Counts the floating-point operations of the forward: 2 * (head_dim + value_dim), that of v, which is head_dim
        by default, for each pair of a query and a key that attend, over all `num_heads` query heads. Exact, with
        causality, windows and short blocks. Waits for the device.
        """
        head_dim, num_heads = check_index("head_dim", head_dim), check_index("num_heads", num_heads)
        value_dim = head_dim if value_dim is None else check_index("value_dim", value_dim)
        if num_heads % max(self.heads, 1) != 0:
            raise ValueError(f"num_heads is {num_heads}; expected a multiple of the {self.heads} heads of the mask")
        pairs = count_pairs(self.bits, self.sequences, MaskLayout(*self._layout), self._rules)
        return 2 * (head_dim + value_dim) * pairs * (num_heads // max(self.heads, 1))

    def plot(self, head: int = 0, *, sequence: int = 0, ax: Any = None) -> Any:
        """Draws a head of a sequence with matplotlib, and returns the axes: `ax`, or new ones. Blocks of which
        causality or a window leaves pairs out are lighter. Waits for the device.

        Raises:
            ValueError: for a head, or a sequence, that the mask does not have, or a sequence without queries or keys.
            ImportError: without matplotlib.
        """
        return plot(self, head, sequence, ax)

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
        windows = "" if self._rules is None else ", windows=True"
        return (
            f"BlockMask({form}, batch={self.batch}, {lengths}heads={self.heads}, blocks of {self.q_block_size} x "
            f"{self.k_block_size}, {blocks}, causal={self.causal}{windows}{density}, device='{self.device}')"
        )

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
            _check_batched("q", q_shape, self.seqlen_q, self.q_block_size)
            _check_batched("k", k_shape, self.seqlen_k, self.k_block_size)
            return
        _check_dims("q", q_shape, 3, "packed")
        _check_dims("k", k_shape, 3, "packed")
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


def _check_dims(name: str, shape: torch.Size, dims: int, form: str) -> None:
    if len(shape) != dims:
        raise ValueError(
            f"{name} has {len(shape)} dimensions, shape {tuple(shape)}; expected {dims}, as mask was built for {form} "
            "tensors"
        )


def _check_batched(name: str, shape: torch.Size, seqlen: int, block_size: int) -> None:
    if len(shape) == 4 and shape[1] == seqlen:
        return
    _check_dims(name, shape, 4, "batched")
    length = shape[1]
    hint = ""
    if shape[2] == seqlen:
        hint = ": heads come after the length, (batch, length, heads, head_dim)"
    elif ceil_div(length, block_size) == ceil_div(seqlen, block_size):
        hint = f": for this one, build the mask with seqlen_{name}={length}"
    raise ValueError(f"{name} has length {length}; expected {seqlen}, the seqlen_{name} that mask has{hint}")


def _keep_lists(source: Source, place: Place) -> bool:
    """Whether the mask keeps lists instead of bits. Chunks need lists that lie as the rows of tensors do."""
    if not isinstance(source, Lists) or (len(source.lead) == 2) != place.packed:
        return False
    return stays_lists(place.q_block, source.heads, place.rows, place.cols, source.indices.numel())


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
