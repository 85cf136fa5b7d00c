"""The residual streams of a list of blocks: which argument each output continues.

Best evidence first: the next block's argument *is* the output; it was computed from it (a control net added
something in between); it has its shape and changes from block to block.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from .calls import BlockCall, Value
from .provenance import Source


@dataclass(frozen=True)
class Streams:
    """What the blocks of one class return.

    places: position in the returned tuple for each stream's argument. ends: streams that a block gives back
    as None. loose: positions of further outputs, which are not streams.
    """

    places: dict[str, int | None]
    ends: tuple[str, ...]
    loose: tuple[int | None, ...]


class Lineage:
    """What values were computed from in the end: names of the transformer's arguments."""

    def __init__(self, calls: Sequence[BlockCall]) -> None:
        self._calls = calls
        self._all: dict[int, frozenset[str]] = {}

    def of(self, sources: frozenset[Source]) -> frozenset[str]:
        """All arguments of the transformer that went into a value, also through blocks."""
        names = {source for source in sources if isinstance(source, str)}
        for source in sources:
            if not isinstance(source, str):
                names |= self._call(source[0])
        return frozenset(names)

    def _call(self, order: int) -> frozenset[str]:
        if order not in self._all:
            self._all[order] = frozenset()
            values = self._calls[order].arguments.values()
            self._all[order] = self.of(frozenset().union(*(value.sources for value in values)))
        return self._all[order]


def find_streams(calls: Sequence[BlockCall], group: Sequence[BlockCall]) -> Streams:
    """The streams of the blocks of one class, `group`, among all calls of their list."""
    places: dict[str, int | None] = {}
    positions = list(dict.fromkeys(p for call in group for p in call.returned))
    for evidence in (_is_next_argument, _went_into_next_argument, _has_shape):
        for position in positions:
            if position not in places.values():
                name = evidence(calls, group, position, places)
                if name is not None:
                    places[name] = position
    ends = tuple(n for n, p in places.items() if any(p not in call.returned for call in group))
    return Streams(places, ends, tuple(p for p in positions if p not in places.values()))


def _next_argument(
    calls: Sequence[BlockCall],
    group: Sequence[BlockCall],
    taken: dict[str, int | None],
    fits: Callable[[BlockCall, Value], bool],
) -> str | None:
    """The argument of the blocks after the group's whose value most often fits what the one before gave."""
    members = {call.order for call in group}
    votes = Counter(
        name
        for now, then in pairwise(calls)
        if now.order in members
        for name, value in then.plain().items()
        if name in now.names and name not in taken and fits(now, value)
    )
    return votes.most_common(1)[0][0] if votes else None


def _is_next_argument(
    calls: Sequence[BlockCall], group: Sequence[BlockCall], position: int | None, taken: dict[str, int | None]
) -> str | None:
    return _next_argument(calls, group, taken, lambda now, value: value.mark.output == (now.order, position))


def _went_into_next_argument(
    calls: Sequence[BlockCall], group: Sequence[BlockCall], position: int | None, taken: dict[str, int | None]
) -> str | None:
    return _next_argument(
        calls, group, taken,
        lambda now, value: position in now.returned
        and value.shape == now.returned[position].shape
        and (now.order, position) in value.sources,
    )  # fmt: skip


def _has_shape(
    calls: Sequence[BlockCall], group: Sequence[BlockCall], position: int | None, taken: dict[str, int | None]
) -> str | None:
    first = next(call for call in group if position in call.returned)
    output = first.returned[position]
    for name in first.names:
        value = first.arguments.get(name)
        if value is None or name in taken or not _alike(value, output):
            continue
        numbers = [call.arguments[name].mark.number for call in group if name in call.arguments]
        if len(set(numbers)) == len(group):
            return name
    return None


def _alike(a: Value, b: Value) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and len(a.shape) >= 2


def image_first(
    streams: Streams, call: BlockCall, roots: dict[str, frozenset[str]], sample: str
) -> list[str]:
    """Names of the streams: what the sample went into first, then the longest."""

    def rank(name: str) -> tuple[bool, int, int]:
        shape = call.arguments[name].shape
        return sample not in roots[name], -(shape[-2] if len(shape) > 1 else 0), call.names.index(name)

    return sorted(streams.places, key=rank)
