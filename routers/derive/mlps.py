"""`MlpSpec`s from what was read off a block: which MLPs can be narrowed, and in what form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..spec import MlpSpec
from .calls import BlockCall
from .hidden import Hidden, Segment, Source


@dataclass(frozen=True)
class Narrowable:
    """mlps: the image-side MLPs of a block. fixed: MLPs that cannot be narrowed, each with the reason."""

    mlps: tuple[MlpSpec, ...]
    fixed: tuple[str, ...]


def find_mlps(
    call: BlockCall, streams: Sequence[str], places: dict[str, int | None], blocks: Sequence[nn.Module]
) -> Narrowable:
    """The MLPs of the first stream of a traced block call.

    streams: image first. blocks: all of the class, which must have the MLP too.
    """
    image = call.arguments[streams[0]].shape
    others = {call.arguments[name].shape[:-1] for name in streams[1:]} - {image[:-1]}
    mlps: list[MlpSpec] = []
    fixed: list[str] = []
    for hidden in call.hidden:
        on_image = places[streams[0]] in hidden.reaches and hidden.shape not in others
        if not on_image or hidden.width != image[-1]:
            continue
        mlp = _spec(call.module, hidden, image)
        if isinstance(mlp, str):
            fixed.append(mlp)
        elif mlp is not None and all(_sizes(block, mlp) == _sizes(call.module, mlp) for block in blocks):
            mlps.append(mlp)
        elif mlp is not None:
            fixed.append(f"{mlp.in_linear}: only some of the blocks have it")
    return Narrowable(tuple(mlps), tuple(fixed))


def _spec(block: nn.Module, hidden: Hidden, image: tuple[int, ...]) -> MlpSpec | str | None:
    """One MLP. A string: it is one, but its width is fixed; None: it is none (a bottleneck, a modulation)."""
    dim = hidden.width
    layer = next(segment for segment in hidden.segments if segment.activated)
    sources = _merged(layer)
    if layer.size < dim or any(_in_features(block, source.linear) != dim for source in sources):
        return None
    before = sum(segment.size for segment in hidden.segments[: hidden.segments.index(layer)])
    if layer is not hidden.segments[-1] or before % dim:
        return f"{hidden.out_linear}: its columns do not end with the hidden layer"
    gates = [source for source in sources if source.activated]
    values = [source for source in sources if not source.activated] or gates[:1]
    found = MlpSpec(
        in_linear=values[0].linear,
        out_linear=hidden.out_linear,
        activation=hidden.activation,
        out_offset=before // dim,
        padded=layer.whole,
        per_row=len(hidden.shape) > 1 and hidden.shape[0] == image[0],
    )
    start = min(source.start for source in sources)
    stop = max(source.stop for source in sources)
    if start % dim or stop != _out_features(block, values[0].linear):
        return f"{values[0].linear}: its rows do not end with the hidden layer"
    if len(sources) == 1:
        return replace(found, in_offset=start // dim)
    if len(sources) > 2 or len(gates) != 1:
        return f"{hidden.out_linear}: the hidden layer of {len(sources)} parts is of an unknown kind"
    if gates[0].linear == values[0].linear:
        return replace(found, in_offset=start // dim, fused_gate=True)
    return replace(found, in_offset=start // dim, gate=gates[0].linear)


def _sizes(block: nn.Module, mlp: MlpSpec) -> list[torch.Size | None]:
    """Shapes of an MLP's weights, None where the block has no such linear."""
    weights = [
        getattr(_submodule(block, path), "weight", None) for path in (mlp.in_linear, mlp.gate, mlp.out_linear)
    ]
    return [None if weight is None else weight.shape for weight in weights]


def _submodule(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path) if path else None
    except AttributeError:
        return None


def _merged(layer: Segment) -> list[Source]:
    """The units of a hidden layer, each stretch once (`x * sigmoid(x)` names it twice)."""
    stretches = {(s.linear, s.start, s.stop) for s in layer.sources}
    active = {(s.linear, s.start, s.stop) for s in layer.sources if s.activated}
    return [Source(*stretch, stretch in active) for stretch in sorted(stretches)]


def _weight(block: nn.Module, path: str) -> tuple[int, int]:
    module = block.get_submodule(path)
    base = getattr(module, "base_layer", module)
    return int(base.out_features), int(base.in_features)  # type: ignore[arg-type]


def _in_features(block: nn.Module, path: str) -> int:
    return _weight(block, path)[1]


def _out_features(block: nn.Module, path: str) -> int:
    return _weight(block, path)[0]
