"""What a decision costs, in FLOPs, for any block class: counted on the meta device, not written by hand.

A block is run once per input shape as a twin without values (meta.py).
A block that needs real values to run (data-dependent shapes, operators without a meta kernel) is counted
in one real run instead, and its cost says so in a note.

Shapes: B batch, L tokens, D dim, F hidden units, H heads, K head dim.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from .lengths import length_told
from .meta import count_flops, meta_twin, to_meta, unshared
from .packed import in_features, is_packed, out_features
from .router import router_flops
from .rows import tensors_held
from .spec import MlpSpec

if TYPE_CHECKING:
    from .block import Block


COUNTED = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""What is counted outside of the blocks."""


@dataclass(frozen=True)
class BlockCost:
    """FLOPs of one block for one row: `dense` at full width, of which `mlp` scales with the width.

    note: for people, where the block could not be counted on the meta device. fills: whether the block fills
    an argument that later calls read (a key-value cache).
    """

    dense: float
    mlp: float
    note: str = ""
    fills: bool = False

    def at(self, width: float) -> float:
        """FLOPs with the image MLP at `width` in (0, 1]."""
        return self.dense - (1.0 - width) * self.mlp


@dataclass(frozen=True)
class CallCost:
    """FLOPs of a transformer call for one row: of its blocks, of what is around them, of one router.

    together: why its rows must decide together, "" if each may go its own way.
    """

    blocks: list[BlockCost]
    outside: float
    router: float
    together: str = ""

    def numbers(self) -> NDArray[np.float64]:
        """[2 N + 2]: all of its FLOPs."""
        each = [number for block in self.blocks for number in (block.dense, block.mlp)]
        return np.array([*each, self.outside, self.router])

    def with_numbers(self, numbers: NDArray[np.float64]) -> CallCost:
        """A call like this one with other FLOPs."""
        each, (outside, router) = numbers[:-2].reshape(-1, 2).tolist(), numbers[-2:].tolist()
        blocks = [replace(b, dense=dense, mlp=mlp) for b, (dense, mlp) in zip(self.blocks, each, strict=True)]
        return replace(self, blocks=blocks, outside=outside, router=router)


class Costs:
    """What the calls of a transformer cost, counted once for each set of shapes, and no more once a few
    lengths of a sequence tell the others (`lengths.py`).

    A pass with closed blocks shows what each is called with. seen: these calls, None while nothing is
    counted. notes: for people, on how it was counted. per_row: see `TransformerSpec`.
    """

    def __init__(self, transformer: nn.Module, blocks: Sequence[Block], per_row: bool = True) -> None:
        self.transformer, self.blocks, self.per_row = transformer, blocks, per_row
        self.seen: list[tuple[Block, tuple[Any, ...], dict[str, Any]]] | None = None
        self.notes: list[str] = []
        self._counted: dict[Any, CallCost] = {}

    def of_call(self, shapes: Any, rows: int, call: Callable[[], Any], alone: Callable[[], Any]) -> CallCost:
        """call: makes the call. alone: a context in which a block may run by itself, to be counted for real
        where shapes do not tell. Raises ValueError for a transformer that does not call its blocks in turn.
        """
        if shapes not in self._counted:
            told = length_told(shapes, {key: cost.numbers() for key, cost in self._counted.items()})
            if told is not None:
                self._counted[shapes] = self._counted[told[0]].with_numbers(told[1])
        if shapes not in self._counted:
            seen: list[Any] = []
            self.seen = seen
            try:
                inside = [block.module for block in self.blocks]
                with torch.no_grad(), count_linears(self.transformer, inside) as outside:
                    call()
            finally:
                self.seen = None
            if [block.index for block, _, _ in seen] != list(range(len(self.blocks))):
                raise ValueError(
                    "the transformer must call its blocks once each, in the order of the spec; does another "
                    "cache or a wrapped forward leave some out?"
                )
            with alone():
                self._counted[shapes] = self._count(seen, rows, sum(outside) / rows)
        return self._counted[shapes]

    def show(self, block: Block, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A closed block's answer in the pass that shows the calls."""
        assert self.seen is not None
        self.seen.append((block, args, kwargs))
        return block.pack(block.streams(block.bind(args, kwargs)))

    def _count(self, seen: list[Any], rows: int, outside: float) -> CallCost:
        known: dict[Any, BlockCost] = {}
        costs, routers = [], [0.0]
        together = "" if self.per_row or rows == 1 else "its blocks cannot tell them apart"
        for block, args, kwargs in seen:
            signature, inputs = block.signature(), block.bind(args, kwargs)
            together = together or (block.picker.obstacle(inputs, rows) if rows > 1 else "")
            if signature not in known:
                tokens = [stream.shape[:-1].numel() // rows for stream in block.streams(inputs)]
                cost = block_cost(block.module, block.mlps, args, kwargs, rows, tokens[0])
                known[signature] = cost
                if block.router is not None:
                    routers.append(router_flops(block.router, sum(tokens)))
                if cost.note and cost.note not in self.notes:
                    self.notes.append(cost.note)
            costs.append(known[signature])
        return CallCost(costs, outside, max(routers), together)


def hidden_units(block: nn.Module, mlp: MlpSpec) -> int:
    """Hidden units F of a block's MLP. Raises ValueError where its linears share no hidden layer."""
    inner, outer = attrgetter(mlp.in_linear)(block), attrgetter(mlp.out_linear)(block)
    dim, columns = out_features(outer), in_features(outer)
    hidden, offset = columns - mlp.out_offset * dim, mlp.in_offset * dim
    rows = [out_features(inner), *([out_features(attrgetter(mlp.gate)(block))] if mlp.gate else [])]
    if hidden <= 0 or any(n != offset + hidden * (2 if mlp.fused_gate else 1) for n in rows):
        raise ValueError(
            f"{mlp.in_linear} has {rows[0]} rows and {mlp.out_linear} {columns} columns: they share no "
            f"hidden layer at offsets {offset} and {mlp.out_offset * dim}"
        )
    return hidden


def block_cost(
    block: nn.Module,
    mlps: Sequence[MlpSpec],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    rows: int,
    tokens: int,
) -> BlockCost:
    """Cost per row of a block called with `(*args, **kwargs)` for `rows` rows of `tokens` image tokens.

    Runs on the meta device, or once for real where that is impossible. Errors of that run are raised.
    """
    note = ""
    args, kwargs = unshared(args), unshared(dict(kwargs))  # what it fills must not be the caller's
    held = {id(tensor) for tensor in tensors_held([args, kwargs])}
    try:
        total, seen = _count_block(meta_twin(block), mlps, to_meta(args), to_meta(kwargs))
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        if not _needs_values(error):
            raise
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        note = (
            f"{type(block).__name__} needs real values to run, so its FLOPs were counted in a run of its own "
            f"({first[:100]})"
        )
        total, seen = _count_block(block, mlps, args, kwargs)
    narrows = 0.0
    for mlp, count in zip(mlps, seen, strict=True):
        inner = in_features(block.get_submodule(mlp.in_linear)) * (2 if mlp.gate or mlp.fused_gate else 1)
        outer = out_features(block.get_submodule(mlp.out_linear))
        narrows += 2.0 * (count or rows * tokens) * hidden_units(block, mlp) * (inner + outer)
    fills = {id(tensor) for tensor in tensors_held([args, kwargs])} != held
    return BlockCost(total / rows, narrows / rows, note, fills)


def _count_block(
    block: nn.Module, mlps: Sequence[MlpSpec], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[float, list[int]]:
    """FLOPs of one call, and for each MLP how many tokens of all rows went through it."""
    counts = [0] * len(mlps)

    def recorder(i: int) -> Any:
        def record(_module: nn.Module, _inputs: Any, output: Tensor) -> None:
            counts[i] += output.numel() // output.shape[-1]

        return record

    handles = [
        block.get_submodule(mlp.in_linear).register_forward_hook(recorder(i)) for i, mlp in enumerate(mlps)
    ]
    try:
        return count_flops(block, *args, **kwargs), counts
    finally:
        for handle in handles:
            handle.remove()


def _needs_values(error: Exception) -> bool:
    """Whether a run failed because its tensors hold no values: PyTorch names the meta device then."""
    return isinstance(error, NotImplementedError) or "meta" in str(error).lower()


@contextmanager
def count_linears(root: nn.Module, exclude: Iterable[nn.Module]) -> Iterator[list[float]]:
    """Collect the FLOPs of every linear and convolution of `root` outside `exclude` inside the context.

    Used once per input shape for what surrounds the blocks: patch embedding, time embedding, output
    projection. Yields a list with one entry per call.
    """
    inside = {id(m) for block in exclude for m in block.modules()}
    flops: list[float] = []

    def record(module: Any, _inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            each = module.in_features if hasattr(module, "in_features") else module.weight[0].numel()
            flops.append(2.0 * output.numel() * each)

    handles = [
        m.register_forward_hook(record)
        for m in root.modules()
        if (isinstance(m, COUNTED) or is_packed(m)) and id(m) not in inside
    ]
    try:
        yield flops
    finally:
        for handle in handles:
            handle.remove()
