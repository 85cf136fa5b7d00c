"""One traced call of a transformer: what every block of its lists was called with, and what it returned.

Values are summaries (shape, mark), not tensors: a trace of a real call keeps nothing of it alive.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..meta import flex_as_dense
from .hidden import Hidden, HiddenReader
from .provenance import Mark, Output, Provenance, Source, mark, mark_of, tensors_in

PLAIN = (Tensor, Mapping, tuple, list, str, int, float, type(None), torch.dtype, torch.device)
"""Arguments that a block reads; anything else may be a store that it also writes."""


@dataclass(frozen=True)
class Value:
    """A tensor in a call: shape, dtype, and where it came from."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    mark: Mark

    @property
    def sources(self) -> frozenset[Source]:
        """Arguments of the transformer and outputs of blocks that it was computed from."""
        return self.mark.sources


@dataclass
class BlockCall:
    """A call of one block.

    order: the number of the call, over all lists. arguments: every tensor by its dotted path. lengths: of the
    lists among the arguments, by path. absent: arguments that were None or not given. objects: arguments of
    classes of their own. returned: tensors by position, None for the position of a bare return. arity: values
    of the returned tuple, 0 for a bare one. hidden: the MLPs that were seen inside (of the first block of a
    class only).
    """

    path: str
    index: int
    module: nn.Module
    order: int
    names: tuple[str, ...]
    arguments: dict[str, Value]
    lengths: dict[str, int]
    absent: tuple[str, ...]
    objects: tuple[str, ...]
    returned: dict[int | None, Value] = field(default_factory=dict)
    arity: int = 0
    hidden: list[Hidden] = field(default_factory=list)

    @property
    def kind(self) -> str:
        """The block's class."""
        return type(self.module).__name__

    def plain(self) -> dict[str, Value]:
        """Arguments that are tensors themselves."""
        return {name: value for name, value in self.arguments.items() if name in self.names}


@dataclass
class TracedCall:
    """lists: members with parameters of every outermost list. inputs, output: of the transformer."""

    lists: dict[str, list[int]]
    blocks: list[BlockCall]
    inputs: dict[str, Any]
    output: list[Value]


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the forward's arguments, without *args and **kwargs."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return tuple(p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))


def outermost_lists(transformer: nn.Module) -> dict[str, nn.ModuleList]:
    """Every `ModuleList` that lies in no other one, by its path."""
    lists = {
        path: module
        for path, module in transformer.named_modules()
        if isinstance(module, nn.ModuleList) and path and len(module)
    }
    return {p: m for p, m in lists.items() if not any(p.startswith(f"{outer}.") for outer in lists)}


def traced_call(transformer: nn.Module, inputs: Mapping[str, Any], *, read_mlps: bool = True) -> TracedCall:
    """Call a transformer once and record the calls of its blocks. Raises whatever the forward raises.

    read_mlps: look into the first block of every class.
    """
    mode = Provenance()
    inputs = {name: _fresh(value, name) for name, value in inputs.items()}
    recorder = _Recorder(mode, read_mlps)
    lists: dict[str, list[int]] = {}
    for path, members in outermost_lists(transformer).items():
        for index, member in enumerate(members):
            if next(member.parameters(), None) is not None:
                lists.setdefault(path, []).append(index)
                recorder.watch(path, index, member)
    try:
        mode.resume()
        with torch.no_grad(), flex_as_dense():
            output = transformer(**inputs)
    finally:
        mode.pause()
        recorder.remove()
    if hasattr(output, "to_tuple"):
        output = output.to_tuple()
    return TracedCall(lists, recorder.calls, inputs, [_value(t) for _, t in tensors_in([output])])


def _fresh(value: Any, name: str) -> Any:
    """The value with tensors of its own, marked with the argument's name."""
    if isinstance(value, Tensor):
        value = value.detach()
        mark(value, frozenset([name]))
        return value
    if isinstance(value, Mapping):
        return {key: _fresh(inner, name) for key, inner in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_fresh(inner, name) for inner in value)
    return value


def _value(tensor: Tensor) -> Value:
    return Value(tuple(tensor.shape), tensor.dtype, mark_of(tensor))


def _lengths(value: Any, path: str) -> dict[str, int]:
    """Lengths of the lists in a nested value, by path."""
    if isinstance(value, Mapping):
        inner = [(f"{path}.{name}", x) for name, x in value.items()]
    elif type(value) in (tuple, list):
        inner = [(f"{path}.{i}", x) for i, x in enumerate(value)]
    else:
        return {}
    lengths = {path: len(value)} if type(value) is list else {}
    for name, x in inner:
        lengths |= _lengths(x, name)
    return lengths


class _Recorder:
    """Hooks around the blocks that fill `calls`."""

    def __init__(self, mode: Provenance, read_mlps: bool) -> None:
        self.calls: list[BlockCall] = []
        self._mode, self._read_mlps = mode, read_mlps
        self._open: list[tuple[BlockCall, HiddenReader | None]] = []
        self._seen: set[tuple[str, type]] = set()
        self._handles: list[Any] = []

    def watch(self, path: str, index: int, member: nn.Module) -> None:
        """Record the calls of a member of a list."""

        def before(module: nn.Module, args: Any, kwargs: Any) -> None:
            self._enter(path, index, module, args, kwargs)

        def after(_module: nn.Module, _args: Any, _kwargs: Any, output: Any) -> None:
            self._leave(output)

        self._handles += [
            member.register_forward_pre_hook(before, with_kwargs=True),
            member.register_forward_hook(after, with_kwargs=True),
        ]

    def remove(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        for _, reader in self._open:
            if reader is not None:
                reader.close()

    def _enter(self, path: str, index: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        names = argument_names(module)
        bound = {**dict(zip(names, args, strict=False)), **kwargs}
        arguments = {p: _value(t) for name, value in bound.items() for p, t in tensors_in(value, name)}
        lengths = {p: n for name, value in bound.items() for p, n in _lengths(value, name).items()}
        absent = tuple(name for name in names if bound.get(name) is None)
        objects = tuple(name for name, value in bound.items() if not isinstance(value, PLAIN))
        call = BlockCall(path, index, module, len(self.calls), names, arguments, lengths, absent, objects)
        self.calls.append(call)
        reader = None
        if self._read_mlps and (path, type(module)) not in self._seen and self._mode.reader is None:
            self._seen.add((path, type(module)))
            reader = self._mode.reader = HiddenReader(module)
        if reader is None and not self._open:
            self._mode.pause()  # what happens inside a block does not matter to the trace
        self._open.append((call, reader))

    def _leave(self, output: Any) -> None:
        call, reader = self._open.pop()
        if not self._open:
            self._mode.resume()
        returned: list[tuple[int | None, Any]] = [(None, output)]
        if isinstance(output, (tuple, list)):
            returned = list(enumerate(output))
            call.arity = len(output)
        tensors = {position: x for position, x in returned if isinstance(x, Tensor)}
        if reader is not None:
            call.hidden = reader.result(tensors)
            self._mode.reader = None
        for position, tensor in tensors.items():
            source: Output = (call.order, position)
            mark(tensor, frozenset([source]), source)
            call.returned[position] = _value(tensor)
