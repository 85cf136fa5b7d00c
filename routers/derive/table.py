"""A derived description as rows of a table, for `edit models --inspect` and for tests."""

from __future__ import annotations

from dataclasses import dataclass

from ..spec import BlockSpec, MlpSpec
from . import Derived


@dataclass(frozen=True)
class Row:
    """One class of blocks of a transformer, in words.

    path: of the list. block: the class. streams: "image, text -> 1, 0", names in the call and positions in
    the return. time: the argument with the timestep embedding. mlps: in-linear > out-linear, "gate * linear"
    where it is gated, "2x linear" where one linear yields both halves.
    """

    path: str
    block: str
    streams: str
    time: str
    mlps: str

    def __str__(self) -> str:
        return f"{self.path} {self.block}: {self.streams}; time {self.time}; {self.mlps}"


def rows(derived: Derived) -> list[Row]:
    """A row for every class of blocks that is controlled."""
    return [_row(block) for block in derived.spec.blocks]


def _row(block: BlockSpec) -> Row:
    places = ", ".join(str(place) for place in block.returns) or "bare"
    return Row(
        path=block.path,
        block=block.block_class,
        streams=f"{', '.join(block.streams)} -> {places}",
        time=block.modulation or "-",
        mlps=", ".join(_mlp(mlp) for mlp in block.mlps) or "fixed width",
    )


def _mlp(mlp: MlpSpec) -> str:
    inner = f"{mlp.gate} * {mlp.in_linear}" if mlp.gate else mlp.in_linear
    if mlp.fused_gate:
        inner = f"2x {inner}"
    return f"{inner} > {mlp.out_linear}" + ("" if mlp.per_row else " (all rows)")
