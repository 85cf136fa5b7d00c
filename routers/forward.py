"""A block's forward under decisions: the one place where work is done, or left out.

Rows that skip pass through, rows that reuse get what the block's unit added before, rows that compute are
gathered and run at their width.

Shapes: B batch rows, L tokens, D dim.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from .block import Block
from .cache import Streams
from .groups import Group
from .policy import Policy
from .run import Call
from .spec import WIDTHS
from .trace import REUSE, SKIP

if TYPE_CHECKING:
    from .watch.timing import Timeline

_UNTIMED = nullcontext()


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
    policy: Policy,
    original: Callable[..., Any],
    inputs: dict[str, Any],
    watch: Watch,
) -> Any:
    """A block in a call: every group of rows does what was decided for it."""
    before = block.streams(inputs)
    call.enter(block.index, before)
    groups = call.groups[block.index]
    if groups is None:
        with watch.timed("router", block.index):
            groups = call.decide(block, inputs, before)
    elif policy.reads_routers and (policy.reads_skipped or any(group.code >= 0 for group in groups)):
        with watch.timed("router", block.index):
            modulation = inputs.get(block.spec.modulation) if block.spec.modulation else None
            call.pooled[block.index] = before[0].mean(dim=1), modulation
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
            part = block.gather(inputs, index, call.branch.rows)
            rows = block.streams(part)
        after = _do(block, call, group, original, part, rows, watch)
        for stream, rows_after in zip(total, after, strict=True):
            stream.index_copy_(0, index, rows_after)
    return block.pack(total)


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
    after = block.unpack(block.run(original, inputs, WIDTHS[group.code], group.parts))
    if watch.observer is not None:
        watch.observer(Computed(block, call, original, inputs, before, after))
    with watch.timed("cache", block.index):
        call.remember(block.index, group, time, before, after)
    return after


def _reuse(group: Group, time: Tensor, order: int, before: Streams) -> Streams:
    """Streams after a unit, or a stretch of them, that is not computed: what they added is added again."""
    where = group.unit, group.last, group.rows, time, order, group.index
    delta = group.cache.delta(*where, group.weights)
    after = tuple(x + d for x, d in zip(before, delta, strict=True))
    if group.peer is not None and group.peer_weights is not None:
        more = group.peer.delta(*where, group.peer_weights)
        after = after[0] + more[0], *after[1:]
    return after
