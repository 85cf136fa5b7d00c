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

from torch import Tensor, nn

from .cost import hidden_units
from .packed import base_layer, is_packed
from .policy import Units
from .rows import RowPicker, rows_back, rows_first
from .spec import BlockSpec, MlpSpec, RowsAt, TransformerSpec

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
        self.picker = RowPicker(spec)
        self.compiled: Any = None
        missing = {*spec.streams, *spec.batched, spec.modulation or self.names[0]} - set(self.names)
        if missing:
            raise ValueError(f"{spec.block_class}.forward has no argument {sorted(missing)}")
        for mlp in spec.mlps:
            hidden_units(module, mlp)  # refuses what cannot be narrowed
        self.mlps = tuple(mlp for mlp in spec.mlps if not self._packed(mlp))

    def bind(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Arguments by name; blocks are called positionally under gradient checkpointing."""
        return by_name(self.names, args, kwargs)

    def streams(self, inputs: Mapping[str, Any], rows: int = 1) -> tuple[Tensor, ...]:
        """The residual streams `[B, L, D]` of a call, image first.

        rows: B, needed where each row has several entries `[B * F, L, D]`: these become `[B, F, L, D]`.
        """
        return tuple(rows_first(inputs[name], self._place(name), rows) for name in self.spec.streams)

    def unpack(self, output: Any, before: Sequence[Tensor] = (), rows: int = 1) -> tuple[Tensor, ...]:
        """The residual streams of an output, in the order of `streams`; one that ends here as before."""
        values = [output[i] for i in self.spec.returns] if self.spec.returns else [output]
        named = zip(self.spec.streams, values, strict=True)
        return tuple(
            before[i] if x is None else rows_first(x, self._place(name), rows)
            for i, (name, x) in enumerate(named)
        )

    def pack(self, streams: Sequence[Tensor]) -> Any:
        """Inverse of `unpack`; further outputs, which nothing reads, are None."""
        named = zip(self.spec.streams, streams, strict=True)
        values = [rows_back(x, self._place(name)) for name, x in named]
        if not self.spec.returns:
            return values[0]
        placed = dict(zip(self.spec.returns, values, strict=True))
        return tuple(placed.get(i) for i in range(max(self.spec.arity, len(placed))))

    def pooled(self, inputs: Mapping[str, Any], before: Sequence[Tensor]) -> tuple[Tensor, Tensor | None]:
        """What its router reads: the image stream's mean over tokens `[R, D]`, and the modulation."""
        modulation = inputs.get(self.spec.modulation) if self.spec.modulation else None
        image = before[0]
        return (image if image.dim() == 3 else image.flatten(1, -2)).mean(dim=1), modulation

    @cached_property
    def plain(self) -> bool:
        """Whether its streams have their rows in the first axis."""
        return not any(self._place(name) for name in self.spec.streams)

    def _packed(self, mlp: MlpSpec) -> bool:
        """Whether an MLP's width is fixed by the form of its weights."""
        paths = [path for path in (mlp.in_linear, mlp.gate, mlp.out_linear) if path]
        return any(is_packed(base_layer(attrgetter(path)(self.module))) for path in paths)

    def _place(self, stream: str) -> RowsAt | None:
        return self.picker.places.get(stream)

    def adopt_compiled(self) -> bool:
        """Take over `module.compile()`, so that deciding stays outside of what is compiled.

        Returns whether the block is compiled.
        """
        if self.module._compiled_call_impl is not None:
            self.compiled, self.module._compiled_call_impl = self.module._compiled_call_impl, None
        return self.compiled is not None

    def return_compiled(self) -> None:
        """Undo `adopt_compiled`."""
        if self.compiled is not None:
            self.module._compiled_call_impl, self.compiled = self.compiled, None

    @cached_property
    def slicers(self) -> list[MlpSlicer]:
        """What narrows its MLPs."""
        from .width import MlpSlicer  # a plan of whole blocks never comes here

        return [MlpSlicer(self.module, mlp) for mlp in self.mlps]

    @property
    def ragged(self) -> bool:
        """Whether rows of one call may differ in width: the hidden layers are gated by nothing and fused with
        nothing else.

        Compiled blocks would recompile for every mix.
        """
        compiled = self.compiled or self.module._compiled_call_impl
        plain = all(mlp == MlpSpec(mlp.in_linear, mlp.out_linear, mlp.activation) for mlp in self.mlps)
        return compiled is None and plain and self.plain

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
            return self.run_compiled(original, inputs) if compiled else original(**inputs)

    def run_compiled(self, original: Callable[..., Any], inputs: Mapping[str, Any]) -> Any:
        """The block as it was compiled, in full.

        A compiled block sees neither our patch, which would cost every block a graph of its own, nor hooks
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


def argument_names(module: nn.Module) -> tuple[str, ...]:
    """Names of the arguments of a module's forward, in order."""
    return tuple(inspect.signature(type(module).forward).parameters)[1:]


def by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, however they were passed."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


Shapes = tuple[tuple[str, tuple[int, ...]], ...]


def call_shapes(inputs: Mapping[str, Any]) -> Shapes:
    """Names and shapes of the tensors of a call, also of those in a mapping or list (conditions by name).

    Words count too: they say in which of its modes a transformer is called.
    """
    shapes: list[tuple[str, tuple[int, ...]]] = []
    for name, value in inputs.items():
        if isinstance(value, Tensor):
            shapes.append((name, tuple(value.shape)))
        elif isinstance(value, str):
            shapes.append((f"{name}={value}", ()))
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

    def starts_anew(block: Block, before: Block) -> bool:
        others = block.spec.streams != before.spec.streams
        return others or (block.spec.fresh and block.spec.path != before.spec.path)

    starts = [i for i, block in enumerate(blocks) if i == 0 or starts_anew(block, blocks[i - 1])]
    return tuple(zip(starts, [*(s - 1 for s in starts[1:]), len(blocks) - 1], strict=True))
