"""The MLPs of a block, read off one run: which linear's outputs are, unit by unit, another linear's inputs.

Inside the block every tensor carries what its last axis consists of: *segments*, each either the output
units of linears, changed only unit by unit (an activation, a gate's product), or something else. A linear
that reads such a segment is the out-linear of an MLP: an input unit that is left out is a hidden unit left
out, whatever lies between. Names play no part.

    x -> in_linear -> activation -> out_linear              a plain MLP
    x -> linear, gate -> activation(gate) * linear -> out   a gated one of three linears
    x -> in_linear -> halves a, b -> activation(a) * b      a gated one with a fused in-linear
    cat(attention, activation(in_linear)) -> out            fused with the attention's projection (FLUX)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from .provenance import tensors_in

_UNITS, _REACH = "_edit_units", "_edit_reach"

ACTIVATIONS = frozenset(
    {
        "gelu",
        "silu",
        "relu",
        "relu6",
        "leaky_relu",
        "elu",
        "celu",
        "selu",
        "mish",
        "softplus",
        "hardswish",
        "sigmoid",
        "tanh",
        "square",
        "pow",
    }
)
UNCHANGED = frozenset(
    {
        "to",
        "float",
        "half",
        "bfloat16",
        "type",
        "type_as",
        "contiguous",
        "clone",
        "detach",
        "dropout",
        "neg",
        "clamp",
        "clip",
    }
)
PAIRS = frozenset(
    {
        "add",
        "sub",
        "mul",
        "div",
        "true_divide",
        "multiply",
        "subtract",
        "divide",
        "rmul",
        "radd",
        "rsub",
        "imul",
        "iadd",
        "isub",
    }
)
RESHAPES = frozenset(
    {"view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "view_as", "reshape_as"}
)
TURNS = frozenset({"transpose", "permute", "swapaxes", "movedim"})
JOINS = frozenset({"cat", "concat", "concatenate"})


@dataclass(frozen=True)
class Source:
    """Output units start..stop of a linear, `activated` where an activation was applied to them."""

    linear: str
    start: int
    stop: int
    activated: bool = False


@dataclass(frozen=True)
class Segment:
    """A stretch of the last axis. sources: the linears whose units it consists of, none for something else.

    whole: every unit is needed where it lies, because the code holds sizes or weights for all of them.
    """

    size: int
    sources: frozenset[Source] = frozenset()
    whole: bool = False

    @property
    def activated(self) -> bool:
        """Whether this may be the hidden layer of an MLP."""
        return any(source.activated for source in self.sources)


Segments = tuple[Segment, ...]


@dataclass
class Hidden:
    """An out-linear and what it read. shape, width: of its input's leading axes and its output's last one.

    activation: the module that gave the hidden layer, "" if none gave just that. reaches: positions in the
    block's return that its output went into.
    """

    out_linear: str
    segments: Segments
    shape: tuple[int, ...]
    width: int
    activation: str = ""
    reaches: frozenset[int | None] = frozenset()


class HiddenReader:
    """Follows the tensor functions of one run of a block."""

    def __init__(self, block: nn.Module) -> None:
        self._linears: dict[int, str] = {}
        self._found: list[Hidden] = []
        self._given: list[tuple[str, frozenset[Source]]] = []
        self._handles = []
        for path, module in block.named_modules():
            weight = module._parameters.get("weight")
            if weight is not None and weight.dim() == 2 and hasattr(module, "in_features"):
                self._linears[id(weight)] = path.removesuffix(".base_layer")
            self._handles.append(module.register_forward_hook(self._note_module(path)))

    def _note_module(self, path: str) -> Any:
        def note(_module: nn.Module, _inputs: Any, output: Any) -> None:
            segments: Segments = getattr(output, _UNITS, ()) if isinstance(output, Tensor) else ()
            if len(segments) == 1 and segments[0].activated:
                self._given.append((path, segments[0].sources))

        return note

    def close(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def result(self, returned: Mapping[int | None, Tensor]) -> list[Hidden]:
        """The MLPs, once the block has returned."""
        self.close()
        for number, hidden in enumerate(self._found):
            hidden.reaches = frozenset(p for p, t in returned.items() if number in getattr(t, _REACH, ()))
            sources = {s for segment in hidden.segments if segment.activated for s in segment.sources}
            hidden.activation = next((path for path, given in self._given if given == sources), "")
        return self._found

    def see(self, function: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        """Follow one function: what its output's last axis consists of, and which MLPs went into it."""
        name = function.strip("_")
        made = [tensor for _, tensor in tensors_in([output])]
        read = [tensor for _, tensor in tensors_in([args, kwargs])]
        if name == "setitem":
            made = [args[0]]
        reach = frozenset().union(*(getattr(t, _REACH, frozenset()) for t in read))
        if name == "linear":
            reach |= self._linear(output, read[0], read[1])
        elif not any(hasattr(tensor, _UNITS) for tensor in read):
            pass
        elif isinstance(output, Tensor):
            _set(output, _follow(name, args, kwargs, output))
        elif name in ("chunk", "split", "split_with_sizes", "tensor_split"):
            _split(name, args[0], made, kwargs.get("dim", args[2] if len(args) > 2 else 0))
        for tensor in made:
            if reach - getattr(tensor, _REACH, frozenset()):
                setattr(tensor, _REACH, reach | getattr(tensor, _REACH, frozenset()))

    def _linear(self, output: Tensor, x: Tensor, weight: Tensor) -> frozenset[int]:
        path = self._linears.get(id(weight))
        if path is None:
            return frozenset()
        units = output.size(-1)
        _set(output, (Segment(units, frozenset([Source(path, 0, units)])),))
        segments: Segments = getattr(x, _UNITS, ())
        if not any(segment.activated for segment in segments):
            return frozenset()
        self._found.append(Hidden(path, segments, tuple(x.shape[:-1]), units))
        return frozenset([len(self._found) - 1])


def _set(tensor: Tensor, segments: Segments) -> None:
    if segments:
        setattr(tensor, _UNITS, segments)
    elif hasattr(tensor, _UNITS):
        delattr(tensor, _UNITS)


def _segments(tensor: Tensor) -> Segments:
    """What a tensor's last axis consists of; one stretch of something else if nothing is known."""
    return getattr(tensor, _UNITS, None) or (Segment(tensor.shape[-1]),)


def _follow(name: str, args: Sequence[Any], kwargs: Mapping[str, Any], output: Tensor) -> Segments:
    """Segments of the one output of a function, () where units are mixed."""
    first = next((x for x in args if isinstance(x, Tensor)), output)
    if name in ACTIVATIONS:
        return tuple(_activated(segment) for segment in _segments(first))
    if name in UNCHANGED:
        return _segments(first)
    if name in PAIRS:
        return _paired(args, output)
    if name in JOINS:
        parts = args[0] if args else kwargs["tensors"]
        return _joined(parts, kwargs.get("dim", args[1] if len(args) > 1 else 0))
    if first.dim() == 0 or output.dim() == 0:
        return ()
    if name in RESHAPES and output.shape[-1] == first.shape[-1]:
        return _segments(first)
    if name in TURNS and output.shape[-1] == first.shape[-1] and output.stride(-1) == first.stride(-1):
        return _segments(first)
    if name == "getitem":
        return _indexed(first, args[1], output)
    return ()


def _activated(segment: Segment) -> Segment:
    return replace(segment, sources=frozenset(replace(source, activated=True) for source in segment.sources))


def _paired(args: Sequence[Any], output: Tensor) -> Segments:
    """Of an elementwise function of two: the same units of several linears together are a gated unit."""
    known = [_segments(x) for x in args if isinstance(x, Tensor) and hasattr(x, _UNITS)]
    others = [x for x in args if isinstance(x, Tensor) and not hasattr(x, _UNITS)]
    if sum(s.size for s in known[0]) != output.shape[-1]:
        return ()
    for segments in known[1:]:
        if [s.size for s in segments] != [s.size for s in known[0]]:
            return ()
        known[0] = tuple(_gated(a, b) for a, b in zip(known[0], segments, strict=True))
    wide = [x for x in others if x.dim() and x.shape[-1] > 1]
    if not all(isinstance(x, nn.Parameter) for x in wide):
        return ()  # an attention's gate, say
    return tuple(replace(segment, whole=True) for segment in known[0]) if wide else known[0]


def _gated(a: Segment, b: Segment) -> Segment:
    if not (a.sources and b.sources):
        return Segment(a.size)
    return Segment(a.size, a.sources | b.sources, a.whole or b.whole)


def _joined(parts: Sequence[Tensor], dim: int) -> Segments:
    if dim in (-1, parts[0].dim() - 1):
        return tuple(segment for part in parts for segment in _segments(part))
    same = {_segments(part) for part in parts}
    return same.pop() if len(same) == 1 else ()


def _split(name: str, whole: Tensor, parts: Sequence[Tensor], dim: int) -> None:
    """`chunk` halves what there is; a split at given sizes needs every unit where it lies."""
    if dim not in (-1, whole.dim() - 1):
        for part in parts:
            _set(part, _segments(whole))
        return
    start = 0
    for part in parts:
        stop = start + part.shape[-1]
        cut = _cut(_segments(whole), start, stop)
        _set(part, cut if name == "chunk" else tuple(replace(segment, whole=True) for segment in cut))
        start = stop


def _cut(segments: Segments, start: int, stop: int) -> Segments:
    """Units start..stop of the last axis."""
    kept: list[Segment] = []
    at = 0
    for segment in segments:
        low, high = max(start, at), min(stop, at + segment.size)
        if low < high:
            first = low - at
            sources = frozenset(
                replace(source, start=source.start + first, stop=source.start + first + high - low)
                for source in segment.sources
            )
            kept.append(Segment(high - low, sources, segment.whole))
        at += segment.size
    return tuple(kept)


def _indexed(x: Tensor, index: Any, output: Tensor) -> Segments:
    """`x[..., a:b]`: an open end follows a narrower layer, a given one does not."""
    index = index if isinstance(index, tuple) else (index,)
    last = index[-1]
    on_last = Ellipsis in [i for i in index if i is Ellipsis] or len(index) == x.dim()
    if not on_last or not isinstance(last, slice):
        return _segments(x) if output.dim() and output.shape[-1] == x.shape[-1] and not on_last else ()
    start, stop, step = last.indices(x.shape[-1])
    if step != 1:
        return ()
    cut = _cut(_segments(x), start, stop)
    return cut if last.stop is None else tuple(replace(segment, whole=True) for segment in cut)
