"""Where the rows of a call lie in a block's arguments: picked by number, and streams turned rows first.

A hand-written description has rows in the first axis of plain tensors. A derived one says by `RowsAt` where
else they are. What it cannot say (an argument that the traced call left out, an object with a state of its
own) makes the rows of a call decide together.

Shapes: R rows, F entries of one row side by side (frames), k parts of R entries, L tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import isroutine
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from .spec import BlockSpec, RowsAt


def count_rows(sample: Any) -> int:
    """Rows of a call, from its sample: a tensor `[R, ...]`, or a list with one tensor a row."""
    return int(sample.shape[0]) if isinstance(sample, Tensor) else len(sample)


def row_times(time: Any, rows: int, device: torch.device) -> Tensor:
    """The time of every row `[R]`. Of a time per frame or token it is the largest.

    Frames that are given, not made, have a time that stays where it is, at the end of the way.
    """
    times = torch.as_tensor(time, device=device).float()
    if times.numel() in (1, rows):
        return times.flatten()
    if times.dim() and times.shape[0] == rows:
        return times.reshape(rows, -1).amax(dim=1)
    return times.amax().reshape(1)


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor of nested tuples, lists and mappings."""
    if isinstance(value, Tensor):
        return [value]
    inner = (
        value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    )
    return [tensor for x in inner for tensor in tensors_in(x)]


def tensors_held(value: Any, seen: set[int] | None = None) -> list[Tensor]:
    """As `tensors_in`, and those in the state of objects that are not modules (a key-value cache)."""
    seen = set() if seen is None else seen
    if isinstance(value, Tensor):
        return [value]
    if id(value) in seen or isinstance(value, (nn.Module, ModuleType, type)) or isroutine(value):
        return []
    seen.add(id(value))
    inner = value
    if not isinstance(value, (Mapping, list, tuple)):
        inner = getattr(value, "__dict__", {})
    inner = list(inner.values()) if isinstance(inner, Mapping) else inner
    return [tensor for x in inner for tensor in tensors_held(x, seen)]


def copied(value: Any) -> Any:
    """A value whose lists and dicts are new ones, for a forward that may take things out of them."""
    if type(value) in (list, tuple):
        return type(value)(copied(inner) for inner in value)
    return {name: copied(inner) for name, inner in value.items()} if type(value) is dict else value


def same(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors that both are alive are one and the same, or one view of the same memory."""
    if a is b or a.shape != b.shape or a.stride() != b.stride() or a.dtype != b.dtype:
        return a is b
    return a.data_ptr() == b.data_ptr() and a.device == b.device != torch.device("meta")


def rows_first(x: Tensor, place: RowsAt | None, rows: int) -> Tensor:
    """A stream with its rows in the first axis: `[R, L, D]`, or `[R, F, L, D]` where they are folded."""
    if place is None:
        return x
    turned = x.movedim(place.axis, 0)
    return turned.unflatten(0, (rows, -1)) if place.folded else turned


def rows_back(x: Tensor, place: RowsAt | None) -> Tensor:
    """Inverse of `rows_first`."""
    if place is None:
        return x
    return (x.flatten(0, 1) if place.folded else x).movedim(0, place.axis)


class RowPicker:
    """Picks rows of the arguments of a block, where its description says that they are."""

    def __init__(self, spec: BlockSpec) -> None:
        self.spec = spec
        self.places = {place.path: place for place in spec.rows}
        self._inside = {path.partition(".")[0] for path in self.places}
        self._plain = {*spec.streams, *spec.batched, spec.modulation} - self._inside

    def pick(self, inputs: Mapping[str, Any], index: Tensor, rows: int) -> dict[str, Any]:
        """The arguments of a call of `rows` rows for those in `index`."""
        picked = dict(inputs)
        for name, value in inputs.items():
            if name in self._inside:
                continue
            if isinstance(value, Mapping):
                picked[name] = _gather_inside(value, index, rows)
            elif (
                name in self._plain
                and isinstance(value, Tensor)
                and value.dim()
                and value.shape[0] >= rows > 1
            ):
                picked[name] = _picked(value, index, rows, RowsAt(name))
        for path, place in self.places.items():
            name, *steps = path.split(".")
            if name in picked:
                picked[name] = _replaced(
                    picked[name], steps, partial(_picked, index=index, rows=rows, place=place)
                )
        return picked

    def obstacle(self, inputs: Mapping[str, Any], rows: int) -> str:
        """Why the rows of a call cannot be told apart in these arguments, "" if they can."""
        for name in self.spec.absent:
            if tensors_in(inputs.get(name)):
                return f"{name} was not in the call that the description was derived from"
        for name in self.spec.objects:
            held = tensors_held(inputs.get(name))
            if any(x.dim() and x.shape[0] % rows == 0 for x in held):
                return f"{name} is a {type(inputs[name]).__name__}, which may hold something of every row"
        for path, place in self.places.items():
            value = _at(inputs, path.split("."))
            if isinstance(value, Tensor) and (value.dim() <= place.axis or value.shape[place.axis] % rows):
                return f"{path} {list(value.shape)} has no axis of {rows} rows"
            if isinstance(value, list) and len(value) != rows:
                return f"{path} holds {len(value)} entries for {rows} rows"
        return ""


def _picked(value: Any, index: Tensor, rows: int, place: RowsAt) -> Any:
    """The rows in `index` of a tensor, all k or F entries of each, or of a list."""
    if isinstance(value, (list, tuple)):
        return type(value)(value[i] for i in index.tolist())
    if not isinstance(value, Tensor):
        return value
    each = value.shape[place.axis] // rows
    if each == 1:
        at = index
    elif place.folded:
        at = (index[:, None] * each + torch.arange(each, device=index.device)).flatten()
    else:
        at = torch.cat([index + part * rows for part in range(each)])
    return value.index_select(place.axis, at)


def _at(value: Any, steps: Sequence[str]) -> Any:
    for step in steps:
        if isinstance(value, Mapping):
            value = value.get(step)
        elif isinstance(value, (list, tuple)) and int(step) < len(value):
            value = value[int(step)]
        else:
            return None
    return value


def _replaced(value: Any, steps: Sequence[str], change: Callable[[Any], Any]) -> Any:
    """A nested value with what lies at the end of `steps` changed."""
    if not steps:
        return change(value)
    step, *rest = steps
    if isinstance(value, Mapping):
        return {**value, step: _replaced(value[step], rest, change)} if step in value else value
    if isinstance(value, (list, tuple)) and int(step) < len(value):
        return type(value)(_replaced(x, rest, change) if i == int(step) else x for i, x in enumerate(value))
    return value


def _gather_inside(value: Any, index: Tensor, rows: int) -> Any:
    """What a mapping of keyword arguments holds, for the rows in `index`: there, a tensor whose first
    dimension is the batch's belongs to its rows (IP-Adapter's embeddings, for one).
    """
    if isinstance(value, Tensor):
        return value.index_select(0, index) if value.dim() and value.shape[0] == rows > 1 else value
    if isinstance(value, Mapping):
        return {name: _gather_inside(inner, index, rows) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        inside = [_gather_inside(inner, index, rows) for inner in value]
        return tuple(inside) if isinstance(value, tuple) else inside
    return value
