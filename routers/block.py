"""A patched block: how it is called, what it returns, and how a decision is carried out on its rows.

Shapes: B batch rows, L tokens, D dim, E time embedding dim.
"""

from __future__ import annotations

import inspect
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .cost import hidden_units
from .policy import Units
from .spec import BlockSpec, TransformerSpec

if TYPE_CHECKING:
    from .width import MlpSlicer


class Block:
    """A patched block: its place, how it is called, its router and its sliceable MLPs."""

    def __init__(self, index: int, spec: BlockSpec, module: nn.Module, router: nn.Module | None) -> None:
        if type(module).__name__ != spec.block_class:
            raise ValueError(
                f"{spec.path} holds {type(module).__name__}, the spec expects {spec.block_class}"
            )
        self.index, self.spec, self.module, self.router = index, spec, module, router
        self.names = argument_names(module)
        self.compiled: Any = None
        missing = {*spec.streams, *spec.batched, spec.modulation or self.names[0]} - set(self.names)
        if missing:
            raise ValueError(f"{spec.block_class}.forward has no argument {sorted(missing)}")
        for mlp in spec.mlps:
            hidden_units(module, mlp)  # refuses what cannot be narrowed

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name; blocks are called positionally under gradient checkpointing."""
        return by_name(self.names, args, kwargs)

    def streams(self, inputs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The residual streams `[B, L, D]` of a call, image first."""
        return tuple(inputs[name] for name in self.spec.streams)

    def unpack(self, output: Any) -> tuple[Tensor, ...]:
        """The residual streams of an output, in the order of `streams`."""
        return tuple(output[i] for i in self.spec.returns) if self.spec.returns else (output,)

    def pack(self, streams: Sequence[Tensor]) -> Any:
        """Inverse of `unpack`."""
        if not self.spec.returns:
            return streams[0]
        placed = sorted(zip(self.spec.returns, streams, strict=True), key=lambda pair: pair[0])
        return tuple(stream for _, stream in placed)

    def gather(self, inputs: Mapping[str, Any], index: Tensor, rows: int) -> dict[str, Any]:
        """The arguments for the rows in `index`; a modulation of k*B rows is cut in each of its k parts."""
        names = (*self.spec.streams, *self.spec.batched, self.spec.modulation)
        picked = dict(inputs)
        for name, value in inputs.items():
            if isinstance(value, Mapping):
                picked[name] = _gather_inside(value, index, rows)
            elif name in names and isinstance(value, Tensor) and value.dim() and value.shape[0] >= rows > 1:
                parts = value.shape[0] // rows
                at = index if parts == 1 else torch.cat([index + part * rows for part in range(parts)])
                picked[name] = value.index_select(0, at)
        return picked

    def adopt_compiled(self) -> None:
        """Take over `module.compile()`, so that deciding stays outside of what is compiled."""
        if self.module._compiled_call_impl is not None:
            self.compiled, self.module._compiled_call_impl = self.module._compiled_call_impl, None

    def return_compiled(self) -> None:
        """Undo `adopt_compiled`."""
        if self.compiled is not None:
            self.module._compiled_call_impl, self.compiled = self.compiled, None

    @cached_property
    def slicers(self) -> list[MlpSlicer]:
        """What narrows its MLPs."""
        from .width import MlpSlicer  # a plan of whole blocks never comes here

        return [MlpSlicer(self.module, mlp) for mlp in self.spec.mlps]

    @property
    def ragged(self) -> bool:
        """Whether rows of one call may differ in width: the hidden layers are fused with nothing else.

        Compiled blocks would recompile for every mix.
        """
        compiled = self.compiled or self.module._compiled_call_impl
        return compiled is None and not any(mlp.in_offset or mlp.out_offset for mlp in self.spec.mlps)

    def run(
        self,
        original: Callable[..., Any],
        inputs: Mapping[str, Any],
        width: float = 1.0,
        parts: Sequence[tuple[float, int]] = (),
    ) -> Any:
        """The block itself, compiled if it was. original: its forward under our patch.

        width: ratio of its image MLPs. parts: (width, rows) of consecutive rows, where they differ.
        """
        slicers = self.slicers if width < 1.0 or parts else []
        compiled = self.compiled is not None and not parts and all(slicer.can_lend for slicer in slicers)
        with ExitStack() as stack:
            for slicer in slicers:
                if parts:
                    stack.enter_context(slicer.narrowed_rows(parts))
                else:
                    stack.enter_context(slicer.lent(width) if compiled else slicer.narrowed(width))
            return self._run_compiled(original, inputs) if compiled else original(**inputs)

    def _run_compiled(self, original: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """A compiled block sees neither our patch, which would cost every block a graph of its own, nor hooks
        on the block, which have run around it already.
        """
        state = vars(self.module)
        bare: dict[str, Any] = {"_forward_hooks": OrderedDict(), "_forward_pre_hooks": OrderedDict()}
        saved = {name: state[name] for name in ("forward", *bare)}
        state.update(bare, forward=original)
        if original == type(self.module).forward.__get__(self.module):
            del state["forward"]
        # FLUX's single blocks return slices of one tensor: another stride would cost another graph
        contiguous = {name: inputs[name].contiguous() for name in self.spec.streams}
        try:
            return self.compiled(**{**inputs, **contiguous})
        finally:
            state.update(saved)

    def signature(self) -> tuple[Any, ...]:
        """Equal for blocks that cost the same on the same inputs."""
        return (self.spec.kind, *(tuple(p.shape) for p in self.module.parameters()))


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


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def call_shapes(inputs: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the tensors of a call, also of those in a mapping or list (conditions by name)."""
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            shapes.append((name, tuple(value.shape)))
        elif isinstance(value, Mapping):
            shapes += [(f"{name}.{inner}", shape) for inner, shape in call_shapes(value)]
        elif isinstance(value, list | tuple) and any(isinstance(x, Tensor) for x in value):
            shapes += call_shapes({f"{name}.{i}": x for i, x in enumerate(value)})
    return tuple(shapes)


def find_blocks(
    transformer: nn.Module, spec: TransformerSpec, routers: Sequence[nn.Module] | None
) -> list[Block]:
    """The transformer's blocks in execution order, each with its router (None: no routers)."""
    if type(transformer).__name__ != spec.transformer_class:
        raise ValueError(f"this spec is for {spec.transformer_class}, not for {type(transformer).__name__}")
    found = [
        (_spec_of(module, [kind for kind in spec.blocks if kind.path == path]), module)
        for path in dict.fromkeys(kind.path for kind in spec.blocks)
        for module in attrgetter(path)(transformer)
    ]
    if routers is not None and len(routers) != len(found):
        raise ValueError(f"{len(routers)} routers for a transformer of {len(found)} blocks")
    return [
        Block(i, kind, module, None if routers is None else routers[i])
        for i, (kind, module) in enumerate(found)
    ]


def _spec_of(module: nn.Module, specs: Sequence[BlockSpec]) -> BlockSpec:
    """Which of the specs that share a path describes this block; `Block` refuses it if none does."""
    return next((spec for spec in specs if spec.block_class == type(module).__name__), specs[0])


def segments(blocks: Sequence[Block]) -> Units:
    """Stretches of blocks on the same residual streams: (first, last) block of each."""
    starts = [i for i, b in enumerate(blocks) if i == 0 or b.spec.streams != blocks[i - 1].spec.streams]
    return tuple(zip(starts, [*(s - 1 for s in starts[1:]), len(blocks) - 1], strict=True))
