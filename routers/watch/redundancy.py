"""How redundant a dense model's blocks are, and how far an elastic run drifts from the dense one.

Both compare a fixed sample of the image stream's tokens and channels, so that a large model's streams
need not be kept whole.

Shapes: R rows, L tokens, D dim, T sampled tokens, C sampled channels, S steps, N blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..block import Block
from ..calls import first_tensor
from ..elastic import Computed, Elastic
from ..patching import Patches

TOKENS, CHANNELS = 32, 256
"""Of each row's stream: at most so many tokens and channels, evenly spread, are compared."""

Streams = dict[tuple[str, int, int], Tensor]
"""Sampled image stream `[R, T, C]` after a block, by branch, step and block."""


@contextmanager
def watch_streams(elastic: Elastic) -> Iterator[Streams]:
    """Collect the image stream after every block of the run inside the context, float32 on the host."""
    seen: Streams = {}

    def record(block: Block, _module: Any, _inputs: Any, output: Any) -> None:
        call = elastic.call
        if call is not None:
            seen[call.info.branch, call.info.step, block.index] = _sample(block.unpack(output)[0]).cpu()

    handles = [block.module.register_forward_hook(partial(record, block)) for block in elastic.blocks]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def drift(elastic: Streams, dense: Streams) -> dict[tuple[str, int, int], NDArray[np.float64]]:
    """Per branch, step and block: RMS of the difference over RMS of the dense stream, per row `[R]`."""
    return {
        at: relative(stream, dense[at])
        for at, stream in elastic.items()
        if at in dense and dense[at].shape == stream.shape
    }


@dataclass
class RowMaps:
    """Maps `[S, R, N]` of one CFG branch, NaN where nothing was measured.

    adds: RMS of what a block adds over RMS of its input. similarity: cosine between what it adds and what
    it added at the step before. skip_cost: relative RMS change of the transformer's output in this call
    when this block alone is skipped.
    """

    adds: NDArray[np.float64]
    similarity: NDArray[np.float64]
    skip_cost: NDArray[np.float64]


@dataclass
class Redundancy:
    """Watches dense runs of an attached transformer, and skips each block once more in the steps to probe.

    steps: of a run. probe_steps: in these, every call is followed by one call per block with that block
    skipped, so a probed step takes N + 1 times as long.
    """

    elastic: Elastic
    steps: int
    probe_steps: Sequence[int] = ()
    maps: dict[str, RowMaps] = field(default_factory=dict)
    _before: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _seen: Computed | None = None
    _skipped: int = -1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """A context around one dense run; afterwards `maps` hold it."""
        elastic = self.elastic
        if elastic.observer is not None:
            raise RuntimeError("the transformer is being observed already")
        self.maps, self._before = {}, {}
        elastic.observer = self._observe
        try:
            with Patches() as patches:
                patches.add(elastic.transformer, self._forward)
                for block in elastic.blocks:
                    patches.add(block.module, partial(self._block_forward, block))
                yield
        finally:
            elastic.observer, self._seen, self._before = None, None, {}

    def _forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        assert self._seen is not None, "a dense call computes every block"
        info = self._seen.call.info
        if info.step in self.probe_steps:
            dense, costs = first_tensor(output), self.maps[info.branch].skip_cost
            try:
                for n in range(len(self.elastic.blocks)):
                    self._skipped = n
                    changed = first_tensor(self.elastic.dense_forward(*args, **kwargs))
                    costs[info.step, :, n] = relative(changed.float(), dense.float())
            finally:
                self._skipped = -1
        return output

    def _block_forward(self, block: Block, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if block.index == self._skipped:
            return block.pack(block.streams(block.bind(args, kwargs)))
        return original(*args, **kwargs)

    def _observe(self, seen: Computed) -> None:
        self._seen, info, n = seen, seen.call.info, seen.block.index
        if info.branch not in self.maps:
            shape = (self.steps, info.rows, len(self.elastic.blocks))
            self.maps[info.branch] = RowMaps(*(np.full(shape, np.nan) for _ in range(3)))
        maps = self.maps[info.branch]
        before = _sample(seen.before[0])
        delta = _sample(seen.after[0]) - before
        maps.adds[info.step, :, n] = _ratio(delta, before)
        last = self._before.get((info.branch, n))
        if last is not None:
            cosine = torch.nn.functional.cosine_similarity(last.flatten(1), delta.flatten(1))
            maps.similarity[info.step, :, n] = cosine.cpu().numpy()
        self._before[info.branch, n] = delta


def relative(changed: Tensor, exact: Tensor) -> NDArray[np.float64]:
    """RMS of the difference over RMS of `exact`, per row."""
    return _ratio(changed - exact, exact)


def _ratio(part: Tensor, whole: Tensor) -> NDArray[np.float64]:
    up, down = (x.float().flatten(1).square().mean(dim=1).sqrt() for x in (part, whole))
    ratio: NDArray[np.float64] = (up / down.clamp_min(1e-12)).double().cpu().numpy()
    return ratio


def _sample(stream_BLD: Tensor) -> Tensor:
    _, tokens, dim = stream_BLD.shape
    rows = torch.linspace(0, tokens - 1, min(TOKENS, tokens)).long().to(stream_BLD.device)
    channels = torch.linspace(0, dim - 1, min(CHANNELS, dim)).long().to(stream_BLD.device)
    return stream_BLD.detach().index_select(1, rows).index_select(2, channels).float()
