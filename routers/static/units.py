"""The hidden units of MLPs put in order, the most important first, so that narrow MLPs leave out the others.

Shapes: D dim, F hidden units.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..block import find_blocks
from ..patching import Patches
from ..spec import TransformerSpec
from ..width import MlpSlicer


@torch.no_grad()
def order_units(
    transformer: nn.Module, spec: TransformerSpec, calls: Sequence[Mapping[str, Any]]
) -> Callable[[], None]:
    """Put the most important hidden units of every MLP first, in place, as measured on these calls: by their
    mean |activation| times the norm of their column in the out-linear.

    The transformer gives the same as before up to the order of summation. The returned function puts the
    units back.
    """
    sums: dict[MlpSlicer, Tensor] = {}

    def watch(slicer: MlpSlicer, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        hidden = inputs[0][..., slicer.column_offset :].detach().abs().flatten(0, -2).float().sum(dim=0)
        sums[slicer] = sums[slicer] + hidden if slicer in sums else hidden

    with Patches() as hooks:
        for block in find_blocks(transformer, spec, None):
            for slicer in block.slicers:
                hooks.callback(slicer.linears[1].register_forward_pre_hook(partial(watch, slicer)).remove)
        for call in calls:
            transformer(**call)
    orders: list[tuple[MlpSlicer, Tensor]] = []
    for slicer, seen in sums.items():
        outer: Any = slicer.linears[1]
        norms = torch.linalg.vector_norm(outer.weight[:, slicer.column_offset :].float(), dim=0)
        orders.append((slicer, (seen * norms).argsort(descending=True, stable=True)))
        reorder_units(*orders[-1])

    def undo() -> None:
        for slicer, order in orders:
            reorder_units(slicer, order.argsort())

    return undo


@torch.no_grad()
def reorder_units(slicer: MlpSlicer, order: Tensor) -> None:
    """Permute the hidden units of an MLP in place: the new unit i is the old unit order[i]. order: `[F]`."""
    outer: Any = slicer.linears[1]
    columns, order = slice(slicer.column_offset, None), order.to(outer.weight.device)
    readers: list[Any] = slicer.readers
    for reader in readers:
        for rows in slicer.halves:
            reader.weight[rows] = reader.weight[rows][order]
            if reader.bias is not None:
                reader.bias[rows] = reader.bias[rows][order]
    outer.weight[:, columns] = outer.weight[:, columns][:, order]
