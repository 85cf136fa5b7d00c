"""Which arguments of a block carry the rows of a batch: told by calling with two different numbers of rows.

An axis that grows with the rows carries them; one that is as long by chance (tokens, the two tensors of a
rotary embedding) does not grow.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..spec import RowsAt
from .calls import BlockCall


@dataclass(frozen=True)
class Rows:
    """Where a block's arguments carry rows.

    plain: arguments with rows in the first axis. elsewhere: all others. missing: streams without rows, and
    arguments that grow with the rows but hold something else too, so that a row cannot be picked.
    """

    plain: tuple[str, ...]
    elsewhere: tuple[RowsAt, ...]
    missing: tuple[str, ...]


def with_rows(value: Any, rows: int, wanted: int, axes: int = 1, lists: bool = True) -> Any:
    """A nested value of a call with another number of rows.

    The first of `axes` axes that is `rows` long, and with `lists` lists of that length, are repeated or cut
    to `wanted`. Tuples keep their length: they hold sizes, or the parts of one thing.
    """
    order = [i % rows for i in range(wanted)]
    if isinstance(value, Tensor):
        if rows not in value.shape[:axes]:
            return value
        axis = value.shape.index(rows)
        return value.index_select(axis, torch.tensor(order, device=value.device))
    if isinstance(value, Mapping):
        return {name: with_rows(inner, rows, wanted, axes, lists) for name, inner in value.items()}
    if type(value) is list:
        holds_rows = any(isinstance(x, Tensor) and x.dim() and x.shape[0] == rows for x in value)
        if lists and len(value) == rows and not (holds_rows and rows > 1):
            return [value[i] for i in order]
        return [with_rows(inner, rows, wanted, axes, lists) for inner in value]
    if type(value) is tuple:
        return tuple(with_rows(inner, rows, wanted, axes, lists) for inner in value)
    return value


def find_rows(
    call: BlockCall,
    again: BlockCall | None,
    rows: tuple[int, int],
    streams: Sequence[str],
    modulation: str | None,
) -> Rows:
    """Where a block's arguments carry rows.

    again: the same block in a call of rows[1] rows instead of rows[0], None if there is none.
    """
    plain: list[str] = []
    elsewhere: list[RowsAt] = []
    unclear: list[str] = []
    axes: dict[str, int] = {}
    for path, value in call.arguments.items():
        other = again.arguments[path].shape if again is not None and path in again.arguments else None
        axis = _row_axis(value.shape, other, rows)
        if axis is None and other not in (None, value.shape):
            unclear.append(path)
        if axis is not None:
            axes[path] = axis
    # where a stream's rows are folded with frames, so is what has as many entries a row
    each = {path: call.arguments[path].shape[axis] // rows[0] for path, axis in axes.items()}
    frames = {each[name] for name in streams if name in each} - {1}
    for path, axis in axes.items():
        if axis == 0 and path in call.names and each[path] not in frames:
            plain.append(path)
        else:
            elsewhere.append(RowsAt(path, axis, folded=each[path] in frames))
    for path, length in call.lengths.items():
        if again is not None and (length, again.lengths.get(path)) == rows:
            elsewhere = [place for place in elsewhere if not place.path.startswith(f"{path}.")]
            elsewhere.append(RowsAt(path))
    placed = {*plain, *(place.path for place in elsewhere)}
    missing = (*(name for name in streams if name not in placed), *unclear)
    batched = tuple(name for name in plain if name not in streams and name != modulation)
    return Rows(batched, tuple(elsewhere), missing)


def _row_axis(shape: tuple[int, ...], other: tuple[int, ...] | None, rows: tuple[int, int]) -> int | None:
    """The axis with the rows. Without a second call: the first one, if it is as long as the rows."""
    if other is None:
        return 0 if len(shape) > 0 and shape[0] == rows[0] and (rows[0] > 1 or len(shape) > 1) else None
    if len(other) != len(shape):
        return None
    pairs = enumerate(zip(shape, other, strict=True))
    grown = [axis for axis, (a, b) in pairs if a != b and a * rows[1] == b * rows[0]]
    return grown[0] if grown and shape[grown[0]] % rows[0] == 0 else None
