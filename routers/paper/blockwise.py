"""Deciding block by block, as the paper's released checkpoints do: a block's router runs right before it.

A policy of this kind asks for one host read per block, keeps its passes in numbered stores instead of one
cache per CFG branch, and its routers look at all tokens. None of that is known outside of this file: the
policy brings its own kind of run.

Shapes: R rows, N blocks.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..block import Block
from ..cache import ResidualCache, Streams
from ..cost import CallCost
from ..forward import Group, place, split_rows
from ..policy import CallInfo, Policy
from ..run import Branch, Call, Run, single_blocks
from ..trace import FULL, Actions, feasible

Stores = NDArray[np.int8]


class BlockwisePolicy(Policy, Protocol):
    """Decides one block at a time. `decide` is not used."""

    cache_depth: int
    """Passes per block and store."""

    def decide_block(
        self, call: CallInfo, block: int, gate: NDArray[np.float32], widths: NDArray[np.float32]
    ) -> tuple[Actions, Stores]:
        """Codes int8 [R] of one block, from gate [R] and width logits [R, 4], and the store [R] that each row
        reads or fills. A store never mixes calls of different shapes.
        """
        ...


class BlockwiseRun(Run):
    """A run whose blocks are decided when they are reached."""

    def __init__(self, policy: BlockwisePolicy, *args: Any) -> None:
        super().__init__(policy, *args)
        self.ask = policy.decide_block
        self.depth = policy.cache_depth
        self._stores: dict[Hashable, ResidualCache] = {}

    def begin(self, branch: Branch, time_: Tensor, cost: CallCost) -> Call:
        """Open a call in which nothing is decided yet."""
        info = self._call_info(branch, cost)
        branch.keep(single_blocks(info), 0)
        actions = np.full((info.rows, len(info.costs)), FULL, np.int8)
        call = BlockwiseCall(info, branch, time_, actions, [None] * len(info.costs))
        call.run, call.gate = self, np.full(actions.shape, np.nan, np.float32)
        return call

    def caches(self) -> list[ResidualCache]:
        """The stores."""
        return list(self._stores.values())

    def release(self) -> None:
        """Let go of the stores: the run is over."""
        self._stores.clear()

    def store(self, number: int, info: CallInfo) -> ResidualCache:
        """A numbered store, one for each set of shapes it is used with."""
        key = int(number), info.signature
        if key not in self._stores:
            self._stores[key] = ResidualCache(len(info.costs), info.rows, self.depth)
        return self._stores[key]


@dataclass
class BlockwiseCall(Call):
    """A call of such a run."""

    run: BlockwiseRun | None = None

    @property
    def routed(self) -> bool:
        """Every block's router runs for every row."""
        return True

    def decide(self, block: Block, inputs: dict[str, Any], before: Streams) -> list[Group]:
        """Run a block's router, read its logits and ask the policy."""
        run, index = self.run, block.index
        assert run is not None and self.gate is not None
        gate, widths = route(block, inputs, before)
        run.trace.host_syncs += 1
        logits = torch.cat([gate[:, None], widths], dim=1).float().cpu().numpy()
        codes, stores = run.ask(self.info, index, logits[:, 0], logits[:, 1:])
        caches = [run.store(store, self.info) for store in stores]
        available = np.array([cache.available(index, row) for row, cache in enumerate(caches)])
        self.actions[:, index] = codes = feasible(codes, available)
        self.gate[:, index] = logits[:, 0]
        split = split_rows([*zip(codes.tolist(), caches, strict=True)])
        groups = [Group(code, rows, index, cache, index) for (code, cache), rows in split]
        self.groups[index] = [*groups]
        place(groups, gate.device)
        return groups


def route(block: Block, inputs: dict[str, Any], before: Streams) -> tuple[Tensor, Tensor]:
    """A block's gate [R] and width logits [R, 4], from its image stream or from all tokens."""
    router: Any = block.router
    if router is None:
        raise RuntimeError(f"block {block.index} has no router, but the policy asks for one")
    image = before[0]
    if next(router.parameters()).device != image.device:
        router.to(image.device)
    modulation = inputs.get(block.spec.modulation) if block.spec.modulation else None
    if getattr(router, "all_streams", False):
        stream, mask = all_tokens(block, inputs)
        gate, widths = router(stream, modulation, mask)
    else:
        gate, widths = router(image, modulation)
    return gate, widths


def all_tokens(block: Block, inputs: dict[str, Any]) -> tuple[Tensor, Tensor | None]:
    """All streams as one `[B, L, D]`, image last, and which tokens count `[B, L]` (None: all)."""
    streams = block.streams(inputs)[::-1]
    mask = inputs.get(block.spec.mask) if block.spec.mask else None
    if mask is not None:
        parts = [mask.bool(), *(mask.new_ones(s.shape[:2], dtype=torch.bool) for s in streams[1:])]
        mask = torch.cat(parts, dim=1)
    return torch.cat(streams, dim=1), mask
