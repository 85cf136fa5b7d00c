"""What the routers need to know of a transformer, as plain data. No torch here: registries import this.

A backbone describes its transformer once with a `TransformerSpec`. `routers` reads nothing else about
it, so a new block class is a new row of data. A bundle stores the spec beside its routers, so
`routers.attach(pipe, "bundle")` works without the backbone registry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

WIDTHS: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0)
"""MLP widths a router may choose, as ratios of the hidden units (E-DiT, arXiv 2602.13993)."""
TARGETS = ("dense", "exact")
"""What a plan aims at: the run of all the pipeline's steps, or the solution that ever more steps tend to."""


@dataclass(frozen=True)
class MlpSpec:
    """An image-side MLP `in_linear -> activation -> out_linear` inside a block, sliceable by hidden unit.

    `in_offset` and `out_offset` say where the hidden units start, in multiples of the block's dim
    (`out_linear.out_features`): rows of a fused `in_linear` (Hunyuan3D: qkv first) and columns of a
    fused `out_linear` (FLUX single block: attention output first).
    """

    in_linear: str
    out_linear: str
    activation: str = ""
    in_offset: int = 0
    out_offset: int = 0
    gate: str = ""
    fused_gate: bool = False
    padded: bool = False
    per_row: bool = True


@dataclass(frozen=True)
class RowsAt:
    """An argument of a block with rows elsewhere than in the first axis of a plain tensor.

    path: the argument's name, with dots into tuples, lists and dicts ("image_rotary_emb.0"). If it leads to a
        list, every entry is a row.
    axis: the axis with the rows.
    folded: each row has several entries side by side (frames: entry f of row r is r * F + f). Otherwise
        several entries of a row lie in parts of B, as in a modulation `[k * B, D]`.
    """

    path: str
    axis: int = 0
    folded: bool = False


@dataclass(frozen=True)
class BlockSpec:
    """One block class: how it is called, what it returns, and which MLPs can be narrowed.

    kind: short name for reports and bundles, unique within a transformer ("double", "single").
    block_class: the class name expected at `path`; checked before anything is patched.
    path: dotted path of the `ModuleList` inside the transformer. Several specs may share a path: each
        takes the modules of its class, and the blocks stay in the list's order.
    streams: argument names of the residual streams, image stream first.
    returns: position of each stream in the returned tuple; empty if the block returns its only stream bare.
    modulation: argument that carries the timestep embedding `[B, D]`, or None if there is none.
    batched: every other argument that may carry a batch dimension (None values are passed through).
    mlps: the image-side MLPs a width applies to; empty declares the width fixed.
    mask: argument that says which tokens of the last stream count `[B, L]`, or None if there is none.
    rows: arguments, streams too, whose rows are not in the first axis of a plain tensor.
    ends: streams that the last block gives back as None, because nothing reads them any more.
    arity: values in the returned tuple, where it holds more than the streams; nothing reads the others.
    fresh: whether the first block of this list starts from other tokens than the block before it left, though
        its streams have the same names: a stretch of its own.
    absent: arguments that the traced call left out. What a later call gives there was never looked at.
    objects: arguments that are neither tensors nor plain data (a key-value cache): a block may fill them, and
        one that does not run does not.
    """

    kind: str
    block_class: str
    path: str
    streams: tuple[str, ...]
    returns: tuple[int, ...]
    modulation: str | None
    batched: tuple[str, ...] = ()
    mlps: tuple[MlpSpec, ...] = ()
    mask: str | None = None
    rows: tuple[RowsAt, ...] = ()
    ends: tuple[str, ...] = ()
    arity: int = 0
    fresh: bool = False
    absent: tuple[str, ...] = ()
    objects: tuple[str, ...] = ()


@dataclass(frozen=True)
class TransformerSpec:
    """A transformer: its block lists in execution order, and the arguments that place a call in time.

    timestep: name of the forward argument with the time `[B]` (any scale, monotone over a run).
    sample: name of the forward argument with the latents `[B, L, C]`; its batch size is the row count.
    skips: whether later blocks also read what earlier ones gave (a U shape), past the residual streams.
    listed_sample: whether the sample is a list with one tensor a row.
    per_row: False where the rows of a call cannot be told apart inside the blocks, so they decide together.
    """

    transformer_class: str
    blocks: tuple[BlockSpec, ...]
    timestep: str = "timestep"
    sample: str = "hidden_states"
    skips: bool = False
    listed_sample: bool = False
    per_row: bool = True

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> TransformerSpec:
        """Rebuild from JSON data. Raises ValueError on unknown or missing keys and wrong types."""
        from . import schema  # registries import this file without reading anything

        spec: TransformerSpec = schema.convert(data, cls, "spec")
        if unknown := schema.unknown_keys(data, spec.to_dict()):
            raise ValueError(f"spec: unknown keys {unknown}")
        return spec
