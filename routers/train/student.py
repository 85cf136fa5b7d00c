"""The student: a transformer whose blocks obey soft decisions, so that gradients reach the routers.

A block gives x + gate * delta + (1 - gate) * fallback on all its residual streams, where delta is what it
adds and fallback what its earlier passes say that it would add (`Memory`); a mask on the hidden units of its
image MLP stands for the width. At run time decisions save the work instead; here everything is computed,
which is what tells a gate whether it would have been better open.

Shapes: R rows, S samples, L tokens, D dim, F hidden units, N blocks, W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..block import Block, argument_names, by_name, find_blocks
from ..calls import first_tensor
from ..patching import Patches
from ..rows import count_rows, rows_back, rows_first
from ..spec import WIDTHS, TransformerSpec
from ..width import MlpSlicer
from .trajectory import RecordedCall

Streams = tuple[Tensor, ...]


@dataclass(frozen=True)
class Decision:
    """gate [S, N] and width shares [S, N, W] of samples, 0 or 1 in value, with straight-through gradients.

    trend [N]: how far a closed block continues the change of its last two passes (`Memory`).
    """

    gate: Tensor
    width: Tensor
    trend: Tensor | None = None

    def ratio(self) -> Tensor:
        """MLP widths [S, N] as ratios."""
        return self.width @ torch.tensor(WIDTHS, device=self.width.device)


@dataclass
class Memory:
    """What the blocks of one CFG branch added in their last two passes, newest first, row by row.

    evaluation: the number of the present one. passes: by block. at [2, R]: by block, at which evaluations.
    """

    evaluation: int = 0
    passes: dict[int, tuple[Streams, Streams]] = field(default_factory=dict)
    at: dict[int, Tensor] = field(default_factory=dict)

    def fallback(self, block: int, trend: Tensor | None) -> Streams | None:
        """What a block that is not computed adds: d_0 + trend r (d_0 - d_1), with r the share of the distance
        between the two passes that has gone by since. None before any pass.
        """
        if block not in self.passes:
            return None
        newest, older = self.passes[block]
        if trend is None:
            return newest
        last, before = self.at[block]
        share = trend * (self.evaluation - last) / (last - before).clamp_min(1)
        return tuple(
            new + per_stream(share, new) * (new - old) for new, old in zip(newest, older, strict=True)
        )

    def keep(self, block: int, deltas: Streams, computed: Tensor) -> None:
        """Remember a pass for the rows that computed it [R]; the first one counts for all rows."""
        deltas, now = tuple(d.detach() for d in deltas), torch.full_like(computed, self.evaluation)
        if block not in self.passes:
            self.passes[block], self.at[block] = (deltas, deltas), torch.stack([now, now])
            return
        (newest, older), (last, before) = self.passes[block], self.at[block]
        fresh = computed.bool()

        def chosen(new: Streams, old: Streams) -> Streams:
            return tuple(torch.where(per_stream(fresh, n), n, o) for n, o in zip(new, old, strict=True))

        self.passes[block] = chosen(deltas, newest), chosen(newest, older)
        self.at[block] = torch.stack([torch.where(fresh, now, last), torch.where(fresh, last, before)])


class Student:
    """A transformer under soft decisions. save_memory: recompute each block in the backward pass."""

    def __init__(self, transformer: nn.Module, spec: TransformerSpec, save_memory: bool = False) -> None:
        self.transformer, self.spec, self.save_memory = transformer, spec, save_memory
        self.blocks = find_blocks(transformer, spec, None)
        self._names = argument_names(transformer)
        self._rows = 1
        self._decision: Decision | None = None
        self._memory: Memory | None = None
        self._inputs: list[tuple[Tensor, Tensor | None]] = []

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Patch every block, and hook its MLPs as they are when the context begins (adapters included)."""
        with Patches() as patches:
            patches.add(self.transformer, self._call)
            for block in self.blocks:
                patches.add(block.module, partial(self._forward, block))
                for slicer in block.slicers:
                    linear = block.module.get_submodule(slicer.spec.out_linear)
                    hook = linear.register_forward_pre_hook(partial(self._mask, block, slicer))
                    patches.callback(hook.remove)
            yield

    @contextmanager
    def deciding(self, decision: Decision | None) -> Iterator[None]:
        """Obey a decision inside the context, backward pass included. None: all is computed."""
        self._decision = decision
        try:
            yield
        finally:
            self._decision, self._memory = None, None

    def __call__(self, call: RecordedCall, memory: Memory | None = None) -> Tensor:
        """The prediction [R, L, C] for a call's arguments. memory: of its branch, read and filled."""
        self._memory = memory
        return first_tensor(self.transformer(**call.inputs))

    def seen(self, samples: int) -> tuple[Tensor, Tensor | None]:
        """The routers' inputs in the last call, of its first rows: pooled [N, samples, D] and modulation
        [samples, E] or None.
        """
        modulation = self._inputs[0][1]
        pooled = torch.stack([pooled[:samples] for pooled, _ in self._inputs])
        return pooled, None if modulation is None else modulation[:samples]

    def _call(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._rows, self._inputs = count_rows(by_name(self._names, args, kwargs)[self.spec.sample]), []
        return original(*args, **kwargs)

    def _forward(self, block: Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs, rows = block.bind(args, kwargs), self._rows
        before = block.streams(inputs, rows)
        modulation = inputs[block.spec.modulation] if block.spec.modulation else None
        pooled = before[0].detach().float().flatten(1, -2).mean(dim=1)
        self._inputs.append((pooled, None if modulation is None else modulation.detach()))
        decision, memory = self._decision, self._memory
        if decision is None and memory is None:
            return original(*args, **kwargs)

        def compute(*streams: Tensor) -> Streams:
            places = block.picker.places
            named = zip(block.spec.streams, streams, strict=True)
            placed = {name: rows_back(x, places.get(name)) for name, x in named}
            return block.unpack(original(**{**inputs, **placed}), streams, rows)

        if self.save_memory and torch.is_grad_enabled():
            after: Streams = checkpoint(compute, *before, use_reentrant=False)
        else:
            after = compute(*before)
        return block.pack(self._gated(block.index, before, after))

    def _gated(self, index: int, before: Streams, after: Streams) -> Streams:
        """Streams after a block as its gate wants them."""
        decision, memory = self._decision, self._memory
        deltas = tuple(y - x for x, y in zip(before, after, strict=True))
        gate, fallback = torch.ones(self._rows, device=before[0].device), None
        if decision is not None:
            gate = per_row(decision.gate[:, index], self._rows)
            trend = None if decision.trend is None else decision.trend[index]
            fallback = None if memory is None else memory.fallback(index, trend)
        if memory is not None:
            memory.keep(index, deltas, gate.detach())
        if decision is None:
            return after
        if fallback is None:
            return tuple(x + per_stream(gate, x) * d for x, d in zip(before, deltas, strict=True))
        return tuple(
            x + f.to(x.dtype) + per_stream(gate, x) * (d - f.to(x.dtype))
            for x, d, f in zip(before, deltas, fallback, strict=True)
        )

    def _mask(self, block: Block, slicer: MlpSlicer, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._decision is None:
            return None
        place = block.picker.places.get(block.spec.streams[0])
        x = rows_first(args[0], place, self._rows)
        mask_RF = per_row(unit_mask(self._decision.width[:, block.index], slicer), self._rows)
        mask = mask_RF.view(len(mask_RF), *([1] * (x.dim() - 2)), -1).to(x.dtype)
        if slicer.column_offset:
            masked = x[..., slicer.column_offset :] * mask
            x = torch.cat([x[..., : slicer.column_offset], masked], dim=-1)
        else:
            x = x * mask
        return (rows_back(x, place), *args[1:])


def per_row(values: Tensor, rows: int) -> Tensor:
    """Values [S, ...] of samples for `rows` rows of a call: CFG branches that share it do the same."""
    return values if len(values) == rows else values.repeat(rows // len(values), *[1] * (values.dim() - 1))


def per_stream(values: Tensor, x: Tensor) -> Tensor:
    """Values [R] in the shape to multiply a stream [R, ..., D] with; numbers in its dtype."""
    shaped = values.view(-1, *[1] * (x.dim() - 1))
    return shaped if shaped.dtype == torch.bool else shaped.to(x.dtype)


def unit_mask(width: Tensor, slicer: MlpSlicer) -> Tensor:
    """Which hidden units [S, F] belong to width shares [S, W]: all up to the chosen width's last."""
    ends = [slicer.units(ratio) for ratio in WIDTHS]
    sizes = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)])
    wide_enough = width.flip(-1).cumsum(-1).flip(-1)
    return wide_enough.repeat_interleave(sizes.to(width.device), dim=-1)
