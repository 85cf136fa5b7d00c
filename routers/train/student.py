"""The student: a transformer whose blocks obey soft decisions, so that gradients reach the routers.

A block gives x + gate * (block(x) - x) on all its residual streams, and a mask on the hidden units of its
image MLP stands for the width. At run time decisions save the work instead; here everything is computed,
which is what tells a gate whether it would have been better open.

Shapes: R rows, L tokens, D dim, F hidden units, N blocks, W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..block import Block, find_blocks
from ..calls import first_tensor
from ..patching import Patches
from ..spec import WIDTHS, TransformerSpec
from ..width import MlpSlicer
from .trajectory import RecordedCall


@dataclass(frozen=True)
class Decision:
    """gate [R, N] and width shares [R, N, W] of samples, 0 or 1 in value, with straight-through gradients."""

    gate: Tensor
    width: Tensor

    def ratio(self) -> Tensor:
        """MLP widths [R, N] as ratios."""
        return self.width @ torch.tensor(WIDTHS, device=self.width.device)


class Student:
    """A transformer under soft decisions. save_memory: recompute each block in the backward pass."""

    def __init__(self, transformer: nn.Module, spec: TransformerSpec, save_memory: bool = False) -> None:
        self.transformer, self.save_memory = transformer, save_memory
        self.blocks = find_blocks(transformer, spec, None)
        self._decision: Decision | None = None
        self._inputs: list[tuple[Tensor, Tensor | None]] | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Patch every block, and hook its MLPs as they are when the context begins (adapters included)."""
        with Patches() as patches:
            for block in self.blocks:
                patches.add(block.module, partial(self._forward, block))
                for slicer in block.slicers:
                    linear = block.module.get_submodule(slicer.spec.out_linear)
                    hook = linear.register_forward_pre_hook(partial(self._mask, block.index, slicer))
                    patches.callback(hook.remove)
            yield

    @contextmanager
    def deciding(self, decision: Decision) -> Iterator[None]:
        """Obey a decision inside the context; the backward pass belongs into it too."""
        self._decision = decision
        try:
            yield
        finally:
            self._decision = None

    def __call__(self, call: RecordedCall) -> Tensor:
        """The prediction [R, L, C] for a recorded call's arguments."""
        return first_tensor(self.transformer(**call.inputs))

    @torch.no_grad()
    def features(self, call: RecordedCall, samples: int) -> tuple[Tensor, Tensor | None]:
        """The routers' inputs of a call's first rows as the student makes them, all blocks open:
        pooled [N, samples, D] and modulation [samples, E] or None.
        """
        seen: list[tuple[Tensor, Tensor | None]] = []
        self._inputs = seen
        try:
            self.transformer(**call.inputs)
        finally:
            self._inputs = None
        modulation = seen[0][1]
        pooled = torch.stack([pooled[:samples] for pooled, _ in seen])
        return pooled, None if modulation is None else modulation[:samples]

    def _forward(self, block: Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = block.bind(args, kwargs)
        before = block.streams(inputs)
        if self._inputs is not None:
            modulation = inputs[block.spec.modulation] if block.spec.modulation else None
            self._inputs.append((before[0].float().mean(dim=1), modulation))
        decision = self._decision
        if decision is None:
            return original(*args, **kwargs)

        def compute(*streams: Tensor) -> tuple[Tensor, ...]:
            named = {**inputs, **dict(zip(block.spec.streams, streams, strict=True))}
            return block.unpack(original(**named))

        if self.save_memory and torch.is_grad_enabled():
            after = checkpoint(compute, *before, use_reentrant=False)
        else:
            after = compute(*before)
        gate = per_row(decision.gate[:, block.index], len(before[0]))[:, None, None]
        return block.pack([x + gate.to(x.dtype) * (y - x) for x, y in zip(before, after, strict=True)])

    def _mask(self, index: int, slicer: MlpSlicer, _module: nn.Module, args: tuple[Any, ...]) -> Any:
        if self._decision is None:
            return None
        x = args[0]
        mask_RF = per_row(unit_mask(self._decision.width[:, index], slicer), len(x))
        mask = mask_RF.view(len(mask_RF), *([1] * (x.dim() - 2)), -1).to(x.dtype)
        if slicer.column_offset:
            masked = x[..., slicer.column_offset :] * mask
            return (torch.cat([x[..., : slicer.column_offset], masked], dim=-1), *args[1:])
        return (x * mask, *args[1:])


def per_row(values: Tensor, rows: int) -> Tensor:
    """Values [S, ...] of samples for `rows` rows of a call: CFG branches that share it do the same."""
    return values if len(values) == rows else values.repeat(rows // len(values), *[1] * (values.dim() - 1))


def unit_mask(width: Tensor, slicer: MlpSlicer) -> Tensor:
    """Which hidden units [R, F] belong to width shares [R, W]: all up to the chosen width's last."""
    ends = [slicer.units(ratio) for ratio in WIDTHS]
    sizes = torch.tensor([end - start for start, end in zip([0, *ends], ends, strict=False)])
    wide_enough = width.flip(-1).cumsum(-1).flip(-1)
    return wide_enough.repeat_interleave(sizes.to(width.device), dim=-1)
