"""Where a tensor comes from: marks that follow every tensor of a traced call through the tensor functions.

A mark holds the names of the transformer's arguments and the block outputs that a tensor was computed from.
Marks live on the tensor objects, so nothing is kept alive, and they need no values: a call on the meta device
is traced as well as a real one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

Output = tuple[int, int | None]
"""A block's output: the call's number, and the position in the returned tuple (None: returned bare)."""
Source = str | Output

SHAPED = ("type_as", "to", "view_as", "reshape_as", "expand_as")
"""Functions whose further tensors only say a shape, a dtype or a device."""

_NUMBERS = count()
_MARK = "_edit_mark"


@dataclass(frozen=True)
class Mark:
    """sources: what a tensor was computed from. output: the block output it is. number: the tensor's own."""

    sources: frozenset[Source]
    output: Output | None
    number: int


def mark(tensor: Tensor, sources: frozenset[Source], output: Output | None = None) -> None:
    """Give a tensor its mark."""
    setattr(tensor, _MARK, Mark(sources, output, next(_NUMBERS)))


def mark_of(tensor: Tensor) -> Mark:
    """A tensor's mark; one that nothing marked comes from the transformer itself."""
    if not hasattr(tensor, _MARK):
        mark(tensor, frozenset())
    found: Mark = getattr(tensor, _MARK)
    return found


def tensors_in(value: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a nested value with its dotted path: "image_rotary_emb.0"."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from tensors_in(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, (tuple, list)) and not isinstance(value, torch.Size):
        for index, inner in enumerate(value):
            yield from tensors_in(inner, f"{path}.{index}" if path else str(index))


class Provenance(TorchFunctionMode):
    """Marks what tensor functions return, or while there is a `reader` lets it watch them instead."""

    def __init__(self) -> None:
        super().__init__()
        self.reader: Any = None
        """Watches the functions inside a block: `see(function, args, kwargs, output)`."""
        self._active = False

    def resume(self) -> None:
        """Follow tensor functions."""
        if not self._active:
            self.__enter__()
            self._active = True

    def pause(self) -> None:
        """Follow them no longer."""
        if self._active:
            self.__exit__(None, None, None)
            self._active = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if self.reader is not None:
            self.reader.see(func.__name__, args, kwargs, output)
        elif isinstance(output, (Tensor, tuple, list)) or func is Tensor.__setitem__:
            self._follow(func, args, kwargs, output)
        return output

    @staticmethod
    def _follow(func: Any, args: Any, kwargs: Any, output: Any) -> None:
        if type(output) is torch.Size:
            return
        name = func.__name__
        if name.startswith("new_") or name.endswith("_like"):
            return
        read = [tensor for _, tensor in tensors_in(args[0] if name in SHAPED else [args, kwargs])]
        sources = frozenset().union(*(mark_of(t).sources for t in read if hasattr(t, _MARK)))
        if not sources:
            return
        written = args[:1] if func is Tensor.__setitem__ else output
        for _, tensor in tensors_in(written):
            old = getattr(tensor, _MARK, None)
            if old is None or not sources <= old.sources:
                mark(tensor, sources)
