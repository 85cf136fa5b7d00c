"""Which lists of blocks are elastic, and why the others run in full."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from .calls import BlockCall, TracedCall
from .streams import Lineage, Streams, find_streams

SMALL = 0.02
"""A list with less than this share of the transformer's parameters is not worth deciding about."""

NO_STREAM = "no output continues an argument"


@dataclass
class BlockList:
    """A list in a traced call: its calls in order, the streams of each class in it, its parameters."""

    path: str
    calls: list[BlockCall]
    streams: dict[str, Streams]
    parameters: int

    def group(self, kind: str) -> list[BlockCall]:
        """Calls of the blocks of one class."""
        return [call for call in self.calls if call.kind == kind]

    @property
    def names(self) -> list[set[str]]:
        """Argument names of the streams, a set per class."""
        return [set(streams.places) for streams in self.streams.values()]


def choose_lists(
    transformer: nn.Module, traced: TracedCall, lineage: Lineage, time: str
) -> tuple[list[BlockList], dict[str, str]]:
    """The lists to control, in the order they run, and for every other list the reason to leave it alone."""
    left: dict[str, str] = {}
    fit: list[BlockList] = []
    for path, members in traced.lists.items():
        calls = [call for call in traced.blocks if call.path == path]
        if not calls:
            continue
        groups = {kind: [c for c in calls if c.kind == kind] for kind in dict.fromkeys(c.kind for c in calls)}
        modules = transformer.get_submodule(path)
        found = BlockList(
            path,
            calls,
            {kind: find_streams(calls, group) for kind, group in groups.items()},
            sum(parameter.numel() for parameter in modules.parameters()),
        )
        reason = _unfit(found, members, traced)
        if reason.endswith(NO_STREAM) and "." in path:
            continue  # layers of some module, not blocks
        if reason:
            left[path] = reason
        else:
            fit.append(found)
    if any("." not in blocks.path for blocks in fit):
        left |= {blocks.path: "inside another module" for blocks in fit if "." in blocks.path}
        fit = [blocks for blocks in fit if "." not in blocks.path]
    if not fit:
        return [], left
    main = max(fit, key=lambda blocks: (blocks.parameters, blocks.calls[-1].order))
    total = sum(parameter.numel() for parameter in transformer.parameters())
    kept = [main]
    for blocks in fit:
        reason = "" if blocks is main else _aside(blocks, main, total, lineage, time)
        if reason:
            left[blocks.path] = reason
        elif blocks is not main:
            kept.append(blocks)
    return sorted(kept, key=lambda blocks: blocks.calls[0].order), left


def _unfit(blocks: BlockList, members: Sequence[int], traced: TracedCall) -> str:
    """Why blocks cannot be decided about, "" if they can."""
    order = [call.index for call in blocks.calls]
    if order != list(members):
        return f"not called once each in order ({len(order)} calls of {len(members)} blocks)"
    for kind, streams in blocks.streams.items():
        if not streams.places:
            return f"{kind}: {NO_STREAM}"
        read = [(call.order, position) for call in blocks.group(kind) for position in streams.loose]
        readers = [value.sources for call in traced.blocks for value in call.arguments.values()]
        readers += [value.sources for value in traced.output]
        if any(output in sources for output in read for sources in readers):
            return f"{kind}: gives hints that others read"
    return ""


def _aside(blocks: BlockList, main: BlockList, total: int, lineage: Lineage, time: str) -> str:
    """Why a list beside the main one runs in full, "" if it does not."""
    first, main_first = blocks.calls[0], main.calls[0]
    streams, main_streams = blocks.streams[first.kind], main.streams[main_first.kind]
    timed = any(
        time in lineage.of(value.sources)
        for path, value in first.arguments.items()
        if path not in streams.places
    )
    if not timed:
        return "no timestep argument"
    if set(streams.places) == set(main_streams.places):
        shapes = [call.arguments[next(iter(streams.places))].shape for call in (first, main_first)]
        if shapes[0] != shapes[1]:
            return "same argument names on other tokens"
    if blocks.parameters < SMALL * total:
        return f"{blocks.parameters / total:.1%} of the parameters"
    orders = [call.order for call in blocks.calls]
    if any(orders[0] < call.order < orders[-1] for call in main.calls) or any(
        main.calls[0].order < order < main.calls[-1].order for order in orders
    ):
        return f"called between the blocks of {main.path}"
    return ""
