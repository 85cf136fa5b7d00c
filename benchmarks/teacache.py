"""A cache in the style of TeaCache (arXiv 2411.19108): whole calls are skipped while the input barely moves.

As in the paper (section 3.3): the relative L1 change of the first block's modulated input, mapped by a
polynomial to the expected change of the model's output, is added up from call to call. While the sum stays
below the threshold, what the block stack added at its last computed call is added again; else the call is
computed and the sum starts anew. The polynomial is fitted on the dense model over calibration prompts.
The first and the last step are always computed. One decision serves the whole batch, per CFG branch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.bench import Attached, Bench
from routers.block import Block
from routers.patching import Patch, patch_forward, restore_forward

DEGREE = 4
"""Degree of the polynomial, as in the paper."""


def modulated_input(block: Any, hidden: Tensor, temb: Tensor) -> Tensor:
    """The first block's normalised, shifted and scaled image tokens [B, L, D] (latents of a mesh model)."""
    if type(block).__name__ == "DoubleStreamBlock":  # Hunyuan3D
        first: Tensor = block.img_mod(temb)[0].modulate(hidden)
        return first
    if hasattr(block, "img_mod"):  # QwenImageTransformerBlock; zero_cond_t doubles the rows of temb
        shift, scale = block.img_mod(temb[: len(hidden)]).chunk(6, dim=-1)[:2]
        normed: Tensor = block.img_norm1(hidden)
        return normed * (1 + scale[:, None]) + shift[:, None]
    modulated: Tensor = block.norm1(hidden, emb=temb)[0]  # FluxTransformerBlock
    return modulated


def relative_change(now: Tensor, before: Tensor) -> float:
    """Mean absolute change over mean absolute value."""
    return float((now - before).abs().mean() / before.abs().mean())


@dataclass
class _Branch:
    """One CFG branch of one generation."""

    call: int = 0
    seen: Tensor | None = None
    total: float = 0.0
    reusing: bool = False
    entered: tuple[Tensor, ...] = ()
    residual: tuple[Tensor, ...] | None = None


class StackCache:
    """Skips the block stack of a transformer where `reuse(branch, change)` says so.

    reuse: (calls before in this branch, accumulated and newest change) -> whether to skip the call.
    """

    def __init__(self, bench: Bench, reuse: Callable[[_Branch, float], bool]) -> None:
        spec = bench.backbone.family.transformer
        self.transformer, self.reuse = bench.transformer, reuse
        modules = [(s, m) for s in spec.blocks for m in bench.transformer.get_submodule(s.path)]
        self.blocks = [Block(i, s, m, None) for i, (s, m) in enumerate(modules)]
        self.branches: dict[str, _Branch] = {}
        self.name, self.inputs, self.residuals = "main", [], []  # type: ignore[var-annotated]
        self.record = False

    def reset(self) -> None:
        """A new generation begins."""
        self.branches.clear()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Patch the blocks; undone at the end."""
        patches: list[tuple[nn.Module, Patch, str]] = []
        if hasattr(self.transformer, "cache_context"):
            patch = patch_forward(self.transformer, self._context, "cache_context")
            patches.append((self.transformer, patch, "cache_context"))
        for block in self.blocks:
            patch = patch_forward(block.module, self._forward(block))
            patches.append((block.module, patch, "forward"))
        try:
            yield
        finally:
            for module, patch, name in reversed(patches):
                restore_forward(module, patch, name)

    @contextmanager
    def _context(self, original: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Iterator[None]:
        self.name = name
        with original(name, *args, **kwargs):
            yield

    def _forward(self, block: Block) -> Callable[..., Any]:
        first, last = block.index == 0, block.index == len(self.blocks) - 1

        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            branch = self.branches.setdefault(self.name, _Branch())
            inputs = block.bind(args, kwargs)
            streams = block.streams(inputs)
            if first:
                self._decide(branch, block, inputs, streams)
            if not branch.reusing:
                output = original(*args, **kwargs)
                if last:
                    after, before = block.unpack(output), branch.entered
                    if len(after) < len(before):  # Hunyuan3D's single blocks run on one joined stream
                        before = (torch.cat(before[::-1], dim=1),)
                    branch.residual = tuple(a - b for a, b in zip(after, before, strict=True))
                    if self.record:
                        self.residuals.append((self.name, branch.residual[0].clone()))
                return output
            assert branch.residual is not None, "a reuse follows a computed call"
            if last:
                streams = tuple(s + r for s, r in zip(streams, branch.residual, strict=True))
            return block.pack(streams)

        return forward

    def _decide(
        self, branch: _Branch, block: Block, inputs: Mapping[str, Any], streams: tuple[Tensor, ...]
    ) -> None:
        now = modulated_input(block.module, streams[0], inputs[str(block.spec.modulation)])
        change = 0.0 if branch.seen is None else relative_change(now, branch.seen)
        if self.record:
            self.inputs.append((self.name, change))
        branch.reusing = branch.residual is not None and self.reuse(branch, change)
        branch.seen, branch.entered = now, streams
        branch.call += 1


def why_not(bench: Bench) -> str | None:
    """Known for the first blocks of three families: the modulated input is read from them."""
    known = ("QwenImageTransformerBlock", "FluxTransformerBlock", "DoubleStreamBlock")
    first = bench.backbone.family.transformer.blocks[0].block_class
    return None if first in known else f"the modulated input of {first} is not known to it"


@contextmanager
def apply(bench: Bench, setting: Mapping[str, Any]) -> Iterator[Attached]:
    """Accumulated change below `threshold` reuses."""
    curve = bench.memo.setdefault("teacache", None)
    if curve is None:
        curve = bench.memo["teacache"] = fit(bench)
    threshold = float(setting["threshold"])

    def reuse(branch: _Branch, change: float) -> bool:
        branch.total += max(0.0, float(np.polyval(curve, change)))
        skip = branch.total < threshold and branch.call < bench.num_steps - 1
        if not skip:
            branch.total = 0.0
        return skip

    cache = StackCache(bench, reuse)
    with cache.attached():

        @contextmanager
        def generation() -> Iterator[None]:
            cache.reset()
            with nullcontext():
                yield

        yield Attached(bench.num_steps, generation)


def fit(bench: Bench) -> list[float]:
    """Polynomial from the change of the modulated input to that of the stack's residual, on dense runs."""
    cache = StackCache(bench, lambda branch, change: False)
    cache.record = True
    points: list[tuple[float, float]] = []
    with cache.attached():
        workload = bench.workload(1, bench.calibration)
        for batch in range(workload.num_batches):
            cache.reset()
            cache.inputs, cache.residuals = [], []
            workload.run(batch)
            for name in {name for name, _ in cache.inputs}:
                changes = [change for branch, change in cache.inputs if branch == name]
                residuals = [residual for branch, residual in cache.residuals if branch == name]
                pairs = zip(residuals[1:], residuals, strict=False)
                points += zip(changes[1:], [relative_change(b, a) for b, a in pairs], strict=True)
    x, y = np.array(points).T
    degree = min(DEGREE, len(set(x)) - 1)
    return [float(value) for value in np.polyfit(x, y, degree)]
