"""What rows do in a block. Rows of a call that do the same act together: groups, made from its decisions.

Rows that skip pass through, rows that reuse get what the block's unit added before, rows that compute are
gathered and run at their width. `carry_out` is the one place where work is done, or left out.

Shapes: R rows, N blocks, U units of blocks, P cached passes.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .block import Block
from .cache import ResidualCache, Streams, Weights
from .calls import sent
from .policy import Units
from .spec import WIDTHS
from .trace import FULL, REUSE, SKIP, Actions

if TYPE_CHECKING:
    from .run import Call
    from .watch.timing import Timeline

_Key = TypeVar("_Key", bound=Hashable)
_UNTIMED = nullcontext()


@dataclass
class Group:
    """Rows of a call that do the same in a block. rows None: all of them.

    code: an action code. unit, last: for a reuse, the first and last unit of a chained stretch added in one
    go; last -1 marks a block whose delta an earlier block of the stretch has already added. weights: of the
    passes, as the policy gave them. cache: where the rows' passes are kept. parts: (width, rows) for
    consecutive rows that compute together at different widths. index: `rows` on the device.
    """

    code: int
    rows: list[int] | None
    last: int
    cache: ResidualCache
    unit: int = 0
    parts: list[tuple[float, int]] = field(default_factory=list)
    index: Tensor | None = None
    weights: Weights | None = None


def plan_groups(
    actions: Actions,
    cache: ResidualCache,
    ragged: Sequence[bool],
    units: Units,
    weights: NDArray[np.float32] | None = None,
    skips: bool = False,
) -> list[list[Group]]:
    """Per block, the rows that act alike; chained units that every row reuses become one stretch.

    skips: later blocks read the streams between units (a U shape), so that no stretch may stride over them.

    In ragged blocks all rows that compute are one group, ordered by width. A unit's first block adds its
    whole delta. weights [R, U, P]: see `Decision`.
    """
    groups: list[list[Group]] = []
    if all_full(actions):
        return [[Group(FULL, None, i, cache, i)] for i, (a, b) in enumerate(units) for _ in range(a, b + 1)]
    for unit, (first, last) in enumerate(units):
        for block in range(first, last + 1):
            found = [
                Group(code, rows, -1 if code == REUSE and block > first else unit, cache, unit)
                for code, rows in split_rows(actions[:, block].tolist())
            ]
            for group in found:
                if group.code == REUSE and weights is not None and block == first:
                    group.weights = shared_weights(weights[:, unit], group.rows)
            groups.append(_merge_widths(found) if ragged[block] else found)
    if not skips:
        _fuse(groups, cache, units)
    return groups


def all_full(actions: Actions) -> bool:
    """Whether every row computes every block in full."""
    return bool((actions == FULL).all())


def shared_weights(weights: NDArray[np.float32], rows: list[int] | None) -> Weights:
    """One set of numbers if all rows [R, P] share it, else one per row."""
    chosen = weights if rows is None else weights[rows]
    if (chosen == chosen[:1]).all():
        return tuple(float(w) for w in chosen[0])
    return torch.from_numpy(chosen.copy())


def _fuse(groups: list[list[Group]], cache: ResidualCache, units: Units) -> None:
    """Let chained units that all rows reuse with the same weights be added in one go."""
    unit = 0
    while unit < len(units):
        start = groups[units[unit][0]]
        if not _all_reuse(start):
            unit += 1
            continue
        last = unit
        while last + 1 < len(units):
            following = groups[units[last + 1][0]]
            same = _all_reuse(following) and _equal(start[0].weights, following[0].weights)
            if not same or not cache.chained(last, last + 1):
                break
            last += 1
        start[0].last = last
        for inner in range(unit + 1, last + 1):
            groups[units[inner][0]][0].last = -1
        unit = last + 1


def _equal(a: Weights | None, b: Weights | None) -> bool:
    return a == b if not isinstance(a, Tensor) and not isinstance(b, Tensor) else False


def _merge_widths(groups: list[Group]) -> list[Group]:
    computed = sorted((group for group in groups if group.code >= 0), key=lambda group: group.code)
    if len(computed) < 2:
        return groups
    merged = computed[-1]
    merged.parts = [(WIDTHS[group.code], len(group.rows or ())) for group in computed]
    merged.rows = [row for group in computed for row in group.rows or ()]
    return [merged, *(group for group in groups if group.code < 0)]


def place(groups: Sequence[Group], device: torch.device) -> None:
    """Give every group its rows on the device, in one copy for all, so that no block waits for its own."""
    split = [group for group in groups if group.rows is not None]
    rows = torch.tensor([row for group in split for row in group.rows or ()], dtype=torch.long)
    pieces = sent(rows, device).split([len(group.rows or ()) for group in split]) if split else ()
    for group, piece in zip(split, pieces, strict=True):
        group.index = piece
    for group in groups:
        if isinstance(group.weights, Tensor):
            group.weights = sent(group.weights, device)


def _all_reuse(groups: list[Group]) -> bool:
    return len(groups) == 1 and groups[0].code == REUSE and groups[0].rows is None


def split_rows(keys: Sequence[_Key]) -> list[tuple[_Key, list[int] | None]]:
    """Rows with equal keys together, in order of first appearance; None for the rows if all are equal."""
    distinct = list(dict.fromkeys(keys))
    if len(distinct) == 1:
        return [(distinct[0], None)]
    return [(key, [i for i, k in enumerate(keys) if k == key]) for key in distinct]


class Computed(NamedTuple):
    """A computed pass of a block, as an observer (calibration, profiling) sees it."""

    block: Block
    call: Call
    forward: Callable[..., Any]
    inputs: dict[str, Any]
    before: Streams
    after: Streams


@dataclass(eq=False)
class Watch:
    """Who looks on. observer: is shown every computed pass. timer: gets spans of every part."""

    observer: Callable[[Computed], None] | None = None
    timer: Timeline | None = None

    def timed(self, part: str, block: int = -1) -> AbstractContextManager[Any]:
        """A span of the timer, if there is one."""
        return _UNTIMED if self.timer is None else self.timer.span(part, block)


def carry_out(
    block: Block,
    call: Call,
    original: Callable[..., Any],
    inputs: dict[str, Any],
    watch: Watch,
) -> Any:
    """A block in a call: every group of rows does what was decided for it."""
    before = block.streams(inputs, call.info.rows)
    call.enter(block.index, before)
    groups = call.groups[block.index]
    if groups is None:
        with watch.timed("router", block.index):
            groups = call.decide(block, inputs, before)
    elif call.reads:
        with watch.timed("router", block.index):
            call.pooled.append(block.pooled(inputs, before))
    if groups[0].index is None:
        call.left = _do(block, call, groups[0], original, inputs, before, watch)
        return block.pack(call.left)
    call.left = total = tuple(stream.clone() for stream in before)
    for group in groups:
        if group.code == SKIP:
            continue
        index = group.index
        assert index is not None, "rows are in one group without an index or in several with one"
        part = inputs
        if group.code == REUSE:
            rows = tuple(stream.index_select(0, index) for stream in before)
        else:
            part = block.picker.pick(inputs, index, call.branch.rows)
            rows = block.streams(part, len(group.rows or ()))
        after = _do(block, call, group, original, part, rows, watch)
        for stream, rows_after in zip(total, after, strict=True):
            stream.index_copy_(0, index, rows_after)
    return block.pack(total)


def straight(
    block: Block, call: Call, original: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """`carry_out` where every row computes every block in full and nobody looks on: nothing to sort out."""
    compiled = block.compiled is not None
    if call.passes:
        call.entered += 1
        return (
            block.run_compiled(original, block.bind(args, kwargs)) if compiled else original(*args, **kwargs)
        )
    spec, inputs = block.spec, block.bind(args, kwargs) if args else kwargs
    before = tuple([inputs[name] for name in spec.streams])
    call.enter(block.index, before)
    if call.reads:
        call.pooled.append(block.pooled(inputs, before))
    output = block.run_compiled(original, inputs) if compiled else original(**inputs)
    found = [output[i] for i in spec.returns] if spec.returns else [output]
    call.left = after = tuple([y if y is not None else x for x, y in zip(before, found, strict=True)])
    groups = call.groups[block.index]
    assert groups is not None, "a call is straight where it is decided before it begins"
    call.remember(block.index, groups[0], call.time, before, after, compiled)
    return output


def _do(
    block: Block,
    call: Call,
    group: Group,
    original: Callable[..., Any],
    inputs: dict[str, Any],
    before: Streams,
    watch: Watch,
) -> Streams:
    """One group of rows through a block: `before` streams -> streams after it."""
    if group.code == SKIP or group.last < 0:
        return before
    time = call.time if group.index is None else call.time.index_select(0, group.index)
    if group.code == REUSE:
        with watch.timed("cache", block.index):
            return _reuse(group, time, call.order, before)
    output = block.run(original, inputs, WIDTHS[group.code], group.parts)
    after = block.unpack(output, before, call.info.rows if group.rows is None else len(group.rows))
    if watch.observer is not None:
        watch.observer(Computed(block, call, original, inputs, before, after))
    with watch.timed("cache", block.index):
        call.remember(block.index, group, time, before, after, block.compiled is not None)
    return after


def _reuse(group: Group, time: Tensor, order: int, before: Streams) -> Streams:
    """Streams after a unit, or a stretch of them, that is not computed: what they added is added again."""
    delta = group.cache.delta(group.unit, group.last, group.rows, group.index, time, order, group.weights)
    return tuple(x + d for x, d in zip(before, delta, strict=True))
