"""A transformer made smaller for good: blocks left out, MLPs cut to their first hidden units.

Nothing is decided at run time: the result has no routers and no patches, only fewer and smaller weights, and
so it can be compiled as one graph and exported.

Shapes: D dim, F hidden units of an MLP.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from operator import attrgetter
from typing import Annotated, Any

import msgspec
import torch
from msgspec import Meta
from torch import nn

from .. import schema
from ..block import Block, find_blocks
from ..spec import MlpSpec, TransformerSpec
from ..width import MlpSlicer

Count = Annotated[int, Meta(ge=0, le=10**6)]


class _Part(msgspec.Struct, forbid_unknown_fields=True):
    """One list of blocks in JSON."""

    kept: tuple[Count, ...]
    units: tuple[tuple[Count, ...], ...]


@dataclass(frozen=True)
class StaticShape:
    """Which blocks are kept, and how many hidden units each of their MLPs has.

    kept: by the path of a list of blocks, numbers of the kept ones in the model that was frozen.
    units: by the same path, for each kept block the hidden units of each of its MLPs.
    """

    kept: Mapping[str, tuple[int, ...]]
    units: Mapping[str, tuple[tuple[int, ...], ...]]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; inverse of `from_dict`."""
        return {
            path: {"kept": list(self.kept[path]), "units": [list(units) for units in self.units[path]]}
            for path in self.kept
        }

    @classmethod
    def from_dict(cls, data: Any) -> StaticShape:
        """Rebuild from JSON data. Raises ValueError, one line, for anything else."""
        parts: dict[str, _Part] = schema.convert(data, dict[schema.Name, _Part], "not a static shape")
        for path, part in parts.items():
            if len(part.kept) != len(part.units) or list(part.kept) != sorted(set(part.kept)):
                raise ValueError(
                    f"not a static shape: {path} keeps {len(part.kept)} blocks and describes others"
                )
        return cls({p: part.kept for p, part in parts.items()}, {p: part.units for p, part in parts.items()})


def shape_of(
    transformer: nn.Module, spec: TransformerSpec, dropped: set[int], widths: Mapping[int, float]
) -> StaticShape:
    """The shape without the blocks of these numbers (in execution order), and with these width ratios."""
    kept: dict[str, list[int]] = {}
    units: dict[str, list[tuple[int, ...]]] = {}
    for block, place in places(transformer, spec):
        numbers, sizes = kept.setdefault(block.spec.path, []), units.setdefault(block.spec.path, [])
        if block.index not in dropped:
            numbers.append(place)
            sizes.append(tuple(s.units(widths.get(block.index, 1.0)) for s in block.slicers))
    return StaticShape({k: tuple(v) for k, v in kept.items()}, {k: tuple(v) for k, v in units.items()})


def places(transformer: nn.Module, spec: TransformerSpec) -> list[tuple[Block, int]]:
    """Every block in execution order, with its place in its own list."""
    counts: Counter[str] = Counter()
    placed = []
    for block in find_blocks(transformer, spec, None):
        placed.append((block, counts[block.spec.path]))
        counts[block.spec.path] += 1
    return placed


def drop_groups(transformer: nn.Module, spec: TransformerSpec) -> list[tuple[int, ...]]:
    """Blocks that can only be left out together, by number in execution order.

    In a U-shaped transformer each block of the second half reads what its mirror image in the first gave, so
    both go or stay, and the middle one stays. With an even number of blocks none has a mirror image, and none
    can go.
    """
    count = len(find_blocks(transformer, spec, None))
    if not spec.skips:
        return [(i,) for i in range(count)]
    if count % 2 == 0:
        return []
    return [(i, count - 1 - i) for i in range(count // 2)]


def frozen(transformer: nn.Module, spec: TransformerSpec, shape: StaticShape) -> nn.Module:
    """A copy of a transformer in this shape. Only narrowed weights are copied, all others are shared.

    The configuration is the original's: whoever saves the copy changes its number of blocks. Raises
    ValueError if the shape does not fit.
    """
    if "_edit_elastic" in transformer.__dict__:
        raise ValueError("routers are attached to this transformer: detach them first")
    copied = _shared_copy(transformer, {})
    for path, numbers in shape.kept.items():
        blocks = attrgetter(path)(copied)
        if numbers and numbers[-1] >= len(blocks):
            raise ValueError(f"{path} has {len(blocks)} blocks and number {numbers[-1]} should be kept")
        parent, _, name = path.rpartition(".")
        kept = nn.ModuleList(blocks[i] for i in numbers)
        setattr(copied.get_submodule(parent), name, kept.train(blocks.training))
    narrow(copied, spec, shape)
    return copied


def narrow(transformer: nn.Module, spec: TransformerSpec, shape: StaticShape) -> None:
    """Cut the MLPs of a transformer, in place, to the first hidden units that a shape names.

    The transformer has as many blocks as the shape keeps; it may lie on the meta device. Raises ValueError if
    the shape does not fit.
    """
    placed = places(transformer, spec)
    counts = Counter(block.spec.path for block, _ in placed)
    for path, sizes in shape.units.items():
        if counts[path] != len(sizes):
            raise ValueError(
                f"the static shape describes {len(sizes)} blocks of {path}, the model has {counts[path]}"
            )
    for block, place in placed:
        mlps = shape.units[block.spec.path][place] if block.spec.path in shape.units else ()
        if len(mlps) != len(block.slicers):
            raise ValueError(
                f"the static shape describes {len(mlps)} MLPs of {block.spec.path}[{place}], "
                f"which has {len(block.slicers)}"
            )
        for slicer, units in zip(block.slicers, mlps, strict=True):
            if not 1 <= units <= slicer.hidden:
                raise ValueError(
                    f"the static shape asks for {units} hidden units of {slicer.spec.in_linear}, "
                    f"which has {slicer.hidden}"
                )
            if units < slicer.hidden:
                _cut(block.module, slicer, units)


def _cut(block: nn.Module, slicer: MlpSlicer, units: int) -> None:
    mlp: MlpSpec = slicer.spec
    outer = slicer.linears[1]
    for linear in (*slicer.readers, outer):
        if type(linear) is not nn.Linear or mlp.padded:
            kind = "an MLP of fixed sizes" if mlp.padded else f"a {type(linear).__name__}"
            raise ValueError(f"{mlp.in_linear} is {kind}; only plain linears can be cut")
    for path in filter(None, (mlp.in_linear, mlp.gate)):
        reader: Any = block.get_submodule(path)
        kept = slicer.rows(units)
        bias = None if reader.bias is None else torch.cat([reader.bias[rows] for rows in kept])
        _replace(block, path, torch.cat([reader.weight[rows] for rows in kept]), bias)
    assert isinstance(outer, nn.Linear)
    _replace(block, mlp.out_linear, outer.weight[:, : slicer.column_offset + units], outer.bias)


def _replace(block: nn.Module, path: str, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(), requires_grad=False)
    parent, _, name = path.rpartition(".")
    block.get_submodule(parent).register_module(name, linear.train(block.training))


def _shared_copy(module: nn.Module, done: dict[int, nn.Module]) -> nn.Module:
    """A tree of modules of its own over the same tensors."""
    if id(module) not in done:
        twin = done[id(module)] = copy.copy(module)
        state = dict(module.__dict__)
        for name in ("_parameters", "_buffers"):
            state[name] = dict(state[name])
        state["_modules"] = {
            name: None if child is None else _shared_copy(child, done)
            for name, child in module._modules.items()
        }
        twin.__dict__ = state
    return done[id(module)]
