"""Choose what a static transformer leaves out: the removals that change the output least, measured.

Skips and narrower MLPs are tried one by one on recorded calls of the dense model. The one with the least harm
per saved FLOP is kept, until the budget is met (lazy greedy selection: a candidate measured earlier is
measured again only when it comes to the top). Then what fits again is widened again.

Shapes: B rows, L tokens, F hidden units.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..block import argument_names, by_name, find_blocks
from ..calls import first_tensor
from ..elastic import Computed, Elastic
from ..patching import Patches
from ..policy import CallInfo, FixedPolicy
from ..spec import WIDTHS, TransformerSpec
from ..trace import SKIP
from .frozen import StaticShape, drop_groups, shape_of

Inputs = dict[str, Any]
Report = Callable[[float, float], None]


@dataclass(frozen=True)
class Removal:
    """Blocks left out and widths of others, by number in execution order."""

    dropped: frozenset[int] = frozenset()
    widths: Mapping[int, float] = field(default_factory=dict)

    def without(self, group: tuple[int, ...]) -> Removal:
        """These blocks left out as well."""
        kept = {index: width for index, width in self.widths.items() if index not in group}
        return Removal(self.dropped | set(group), kept)

    def at(self, index: int, width: float) -> Removal:
        """This block at another width."""
        return replace(self, widths={**self.widths, index: width})


@dataclass(frozen=True)
class Choice:
    """What was chosen. flops: share of a dense call's FLOPs, counted.

    error: mean over the calls of the output's squared error, relative to its squared size.
    """

    removal: Removal
    shape: StaticShape
    flops: float
    error: float


@contextmanager
def record_calls(transformer: nn.Module, keep: Sequence[int]) -> Iterator[list[Inputs]]:
    """Collect the arguments, by name, of the calls inside the context whose numbers are in `keep`."""
    calls: list[Inputs] = []
    names = argument_names(transformer)
    wanted, made = set(keep), 0

    def record(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if made in wanted:
            calls.append(tree_map(_copied, by_name(names, args, kwargs)))
        made += 1
        return original(*args, **kwargs)

    with Patches() as patches:
        patches.add(transformer, record)
        yield calls


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else value


class Trial:
    """A transformer on recorded calls, with any removal tried by running it elastically."""

    def __init__(self, transformer: nn.Module, spec: TransformerSpec, calls: Sequence[Inputs]) -> None:
        self.transformer, self.spec, self.calls = transformer, spec, calls
        self.blocks = find_blocks(transformer, spec, None)
        self._elastic: Elastic | None = None
        self._dense: list[Tensor] = []
        self._info: CallInfo | None = None

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Run the calls densely for reference, and any removal inside the context."""
        self._elastic = Elastic(self.transformer, self.spec)
        try:
            self._elastic.observer = self._observe
            self._dense = self.outputs(Removal())
            self._elastic.observer = None
            yield
        finally:
            self._elastic.detach()

    def _observe(self, seen: Computed) -> None:
        self._info = seen.call.info

    @torch.no_grad()
    def outputs(self, removal: Removal) -> list[Tensor]:
        """Outputs `[B, L, C]` of all calls with a removal, float32."""
        codes = [
            SKIP if block.index in removal.dropped else WIDTHS.index(removal.widths.get(block.index, 1.0))
            for block in self.blocks
        ]
        policy = FixedPolicy(np.array(codes, np.int8))
        policy.cache_depth = 0  # nothing is reused
        assert self._elastic is not None, "only inside of `attached`"
        with self._elastic.scope(policy=policy, num_steps=len(self.calls)):
            return [first_tensor(self.transformer(**call)).float() for call in self.calls]

    def error(self, removal: Removal) -> float:
        """Mean over calls of the output's squared error over its squared size."""
        parts = [
            float((output - dense).square().sum() / dense.square().sum().clamp_min(1e-20))
            for output, dense in zip(self.outputs(removal), self._dense, strict=True)
        ]
        return sum(parts) / len(parts)

    def flops(self, removal: Removal) -> float:
        """Share of a dense call's FLOPs."""
        assert self._info is not None, "only inside of `attached`"
        costs, outside = self._info.costs, self._info.outside
        kept = [(i, cost) for i, cost in enumerate(costs) if i not in removal.dropped]
        spent = outside + sum(cost.at(removal.widths.get(i, 1.0)) for i, cost in kept)
        return spent / (outside + sum(cost.dense for cost in costs))


def narrow_error(
    transformer: nn.Module, spec: TransformerSpec, calls: Sequence[Inputs], width: float = 0.5
) -> float:
    """What the order of the hidden units is worth: the output's error with every MLP at a width ratio.

    Mean over the calls of the squared error relative to the output's squared size.
    """
    trial = Trial(transformer, spec, calls)
    with trial.attached():
        return trial.error(Removal(widths={block.index: width for block in trial.blocks if block.slicers}))


def choose(
    transformer: nn.Module,
    spec: TransformerSpec,
    calls: Sequence[Inputs],
    budget: float,
    report: Report = lambda spent, error: None,
) -> Choice:
    """The removal that meets `budget`, a share of the dense FLOPs in (0, 1], with the least harm found.

    The units of the MLPs should be in order (`order_units`). Raises ValueError for a budget out of reach.
    """
    trial = Trial(transformer, spec, calls)
    with trial.attached():
        removal, error = _remove(trial, budget, report)
        removal, error = _give_back(trial, budget, removal, error)
    shape = shape_of(transformer, spec, set(removal.dropped), removal.widths)
    return Choice(removal, shape, trial.flops(removal), error)


def _remove(trial: Trial, budget: float, report: Report) -> tuple[Removal, float]:
    """Lazy greedy: the queue is ordered by harm per saved FLOP and knows when each was measured."""
    groups = drop_groups(trial.transformer, trial.spec)
    now, error, turn = Removal(), 0.0, 0
    # the lower end of the queue's numbers breaks ties, so that equal candidates come in a fixed order
    queue: list[tuple[float, int, int, float, Any]] = []
    candidates = [("drop", group) for group in groups]
    candidates += [("narrow", (b.index,)) for b in trial.blocks if b.slicers]
    for number, candidate in enumerate(candidates):
        queue.append((-float("inf"), number, -1, 0.0, candidate))
    heapq.heapify(queue)
    while trial.flops(now) > budget + 1e-9:
        if not queue:
            raise ValueError(_unreachable(trial, budget, now))
        _, number, measured, harm, candidate = heapq.heappop(queue)
        tried = _apply(trial, now, candidate)
        if tried is None:
            continue
        if measured != turn:
            saved = trial.flops(now) - trial.flops(tried)
            if saved > 0:
                harm = trial.error(tried)
                heapq.heappush(queue, ((harm - error) / saved, number, turn, harm, candidate))
            continue
        now, error, turn = tried, harm, turn + 1
        report(trial.flops(now), error)
        if candidate[0] == "narrow":
            heapq.heappush(queue, (-float("inf"), number, -1, 0.0, candidate))
    return now, error


def _apply(trial: Trial, now: Removal, candidate: tuple[str, tuple[int, ...]]) -> Removal | None:
    """The removal with one more step of a candidate; None if it has none left."""
    kind, group = candidate
    if any(index in now.dropped for index in group):
        return None
    if kind == "drop":
        tried = now.without(group)
        # at least one block of every list stays
        paths = {block.spec.path for block in trial.blocks}
        left = {block.spec.path for block in trial.blocks if block.index not in tried.dropped}
        return tried if left == paths else None
    (index,) = group
    narrower = [w for w in WIDTHS if w < now.widths.get(index, 1.0)]
    return now.at(index, max(narrower)) if narrower else None


def _give_back(trial: Trial, budget: float, now: Removal, error: float) -> tuple[Removal, float]:
    """The last removal may have saved more than was needed: widen and put back what fits, best first."""
    while True:
        wider = [
            now.at(index, min(w for w in WIDTHS if w > width))
            for index, width in now.widths.items()
            if width < 1.0
        ]
        back = [
            replace(now, dropped=now.dropped - set(group))
            for group in drop_groups(trial.transformer, trial.spec)
            if set(group) <= now.dropped
        ]
        back += [
            removal.at(index, width)
            for removal in back
            for index in removal.dropped ^ now.dropped
            if trial.blocks[index].slicers
            for width in WIDTHS[:-1]
        ]
        fitting = [(trial.error(r), i, r) for i, r in enumerate([*wider, *back]) if trial.flops(r) <= budget]
        if not fitting or min(fitting)[0] >= error:
            return now, error
        error, _, now = min(fitting)


def _unreachable(trial: Trial, budget: float, now: Removal) -> str:
    reason = ""
    if trial.spec.skips and not drop_groups(trial.transformer, trial.spec):
        reason = (
            " (later blocks of this model read what earlier ones gave and have no mirror image, so none "
            "can be dropped)"
        )
    return (
        f"a static model of budget {budget:g} is not possible here: with all removals it still costs "
        f"{trial.flops(now):.3f} of the dense FLOPs{reason}; give a --budget from there to 1"
    )
