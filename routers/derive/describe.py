"""`BlockSpec`s from the lists of a traced call: what the evidence of the other files comes to."""

from __future__ import annotations

from dataclasses import replace

from ..spec import BlockSpec
from .calls import BlockCall, TracedCall
from .lists import BlockList
from .mlps import find_mlps
from .rows import find_rows
from .streams import Lineage, image_first


class Description:
    """Puts a `BlockSpec` together for every class of every list."""

    def __init__(
        self,
        first: TracedCall,
        second: TracedCall | None,
        rows: tuple[int, int],
        lineage: Lineage,
        time: str,
        sample: str,
        notes: list[str],
    ) -> None:
        self.first, self.second, self.rows = first, second, rows
        self.lineage, self.time, self.sample, self.notes = lineage, time, sample, notes
        self.rowless = False
        self._roots: dict[tuple[int, int | None], frozenset[str]] = {}
        self._kinds: list[str] = []
        self._last: BlockCall | None = None
        self._last_streams: list[str] = []

    def specs(self, blocks: BlockList) -> list[BlockSpec]:
        """The specs of a list, one per class in it."""
        specs = [self._spec(blocks, kind) for kind in blocks.streams]
        self._last, self._last_streams = blocks.calls[-1], list(specs[-1].streams)
        return specs

    def _spec(self, blocks: BlockList, kind: str) -> BlockSpec:
        streams, group = blocks.streams[kind], blocks.group(kind)
        call, every = group[0], _together(group)
        names = image_first(streams, call, self._stream_roots(blocks, kind), self.sample)
        places = [streams.places[name] for name in names]
        modulation = self._modulation(every, names)
        again = None if self.second is None else _together([self.second.blocks[c.order] for c in group])
        rows = find_rows(every, again, self.rows, names, modulation)
        if rows.missing:
            self.rowless = True
            self.notes.append(
                f"{kind}: {', '.join(rows.missing)} has no axis of rows, so rows decide together"
            )
        narrow = find_mlps(call, names, streams.places, [c.module for c in group])
        self.notes.extend(f"{kind}: width fixed at {reason}" for reason in narrow.fixed)
        if not narrow.mlps and not narrow.fixed:
            self.notes.append(f"{kind}: no MLP of linears, so its width is fixed")
        if streams.loose:
            self.notes.append(f"{kind}: {len(streams.loose)} of {call.arity} outputs are read by nothing")
        return BlockSpec(
            kind=self._name(kind, len(names)),
            block_class=kind,
            path=blocks.path,
            streams=tuple(names),
            returns=() if None in places else tuple(p for p in places if p is not None),
            modulation=modulation,
            batched=rows.plain,
            mlps=narrow.mlps,
            mask=self._mask(every, names),
            rows=rows.elsewhere,
            ends=streams.ends,
            arity=call.arity if call.arity > len(names) else 0,
            fresh=self._is_fresh(call, names),
            absent=every.absent,
            objects=call.objects,
        )

    def _name(self, kind: str, streams: int) -> str:
        """A short name for reports, unique within the transformer."""
        base = "single" if "Single" in kind else "double" if streams > 1 else "block"
        name, number = base, 1
        while name in self._kinds:
            number += 1
            name = f"{base}{number}"
        self._kinds.append(name)
        return name

    def _stream_roots(self, blocks: BlockList, kind: str) -> dict[str, frozenset[str]]:
        """What each stream began as: arguments of the transformer, followed back along the streams only."""
        for call in blocks.calls:
            for name, position in blocks.streams[call.kind].places.items():
                self._roots[call.order, position] = self._began(call, name)
        return {name: self._began(blocks.group(kind)[0], name) for name in blocks.streams[kind].places}

    def _began(self, call: BlockCall, name: str) -> frozenset[str]:
        sources = call.arguments[name].sources
        roots = {source for source in sources if isinstance(source, str)}
        for source in sources:
            if not isinstance(source, str):
                roots |= self._roots.get(source, frozenset())
        return frozenset(roots)

    def _modulation(self, call: BlockCall, streams: list[str]) -> str | None:
        for name, value in call.plain().items():
            if name in streams or len(value.shape) != 2 or not value.dtype.is_floating_point:
                continue
            roots = self.lineage.of(value.sources)
            if self.time in roots and self.sample not in roots:
                return name
        return None

    def _mask(self, call: BlockCall, streams: list[str]) -> str | None:
        """The 2-D mask over the tokens of the last of several streams."""
        if len(streams) < 2:
            return None
        tokens = call.arguments[streams[-1]].shape[:2]
        for name, value in call.plain().items():
            if name not in streams and value.shape == tokens and "mask" in name:
                return name
        return None

    def _is_fresh(self, call: BlockCall, streams: list[str]) -> bool:
        """Whether the list begins on other tokens than the list before it ended on."""
        if self._last is None or call.index or streams != self._last_streams:
            return False
        value = call.arguments[streams[0]]
        follows = any(
            source == (self._last.order, p) for source in value.sources for p in self._last.returned
        )
        return not follows or value.shape != self._last.arguments[streams[0]].shape


def _together(group: list[BlockCall]) -> BlockCall:
    """The first call of a group, with the arguments that only later calls were given."""
    arguments = {path: value for call in reversed(group) for path, value in call.arguments.items()}
    lengths = {path: length for call in reversed(group) for path, length in call.lengths.items()}
    order = {path: i for i, path in enumerate(p for call in group for p in call.arguments)}
    arguments = dict(sorted(arguments.items(), key=lambda item: order[item[0]]))
    absent = tuple(name for name in group[0].absent if all(name in call.absent for call in group))
    return replace(group[0], arguments=arguments, lengths=lengths, absent=absent)


def reads_further_back(calls: list[BlockCall]) -> bool:
    """Whether a block reads what a block further back than the one before it gave."""
    return any(
        not isinstance(source, str) and source[0] in {earlier.order for earlier in calls[: max(0, i - 1)]}
        for i, call in enumerate(calls)
        for value in call.arguments.values()
        for source in value.sources
    )
