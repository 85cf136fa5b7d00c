"""Rows of one batch on plans of their own: each has the budget that was asked for it.

The batch's times are those of all its rows' plans together. At each of them the transformer is called for the
rows whose plan has that time, and for no others; a row's state waits for its own next time. So a row spends
what its plan says, and takes the very steps that it takes alone.

Shapes: R rows of the sample, S rows of a call (with guidance in one call, S = 2 R: R for each branch).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..block import argument_names, by_name
from ..rows import count_rows
from .follow import Follower
from .timeplan import STILL, Array, TimePlan

POSITIONS = 4
"""Columns, at most, of a table of positions (`img_ids`): its lines are tokens, whatever their number."""


class RowPlans:
    """What a batch follows whose rows have plans of their own. plans: of each of R rows, from a common start
    to a common end; equal ones are one object.

    times [n + 1]: at which any row is evaluated. passes: the most that a plan keeps.
    """

    def __init__(self, plans: Sequence[TimePlan]) -> None:
        self.plans = list(plans)
        together = -np.sort(-np.concatenate([plan.times for plan in plans]))
        self.times: Array = together[np.concatenate([[True], np.diff(together) < -STILL])]
        self.passes = max(plan.passes for plan in plans)
        self._own = [[_place(plan, time) for time in self.times[:-1]] for plan in plans]

    @property
    def evaluations(self) -> int:
        """Calls of the transformer: n."""
        return len(self.times) - 1

    def begun_at(self, first: int) -> RowPlans:
        """Rows have times of their own, and a run begins at all of them together."""
        raise ValueError("rows with budgets of their own begin at their first time; give one budget")

    def follower(self) -> RowFollower:
        """One run of them."""
        return RowFollower(self)

    def row(self, step: int, x: object = None, outputs: object = ()) -> tuple[Array, float]:
        """There is no such row of weights: every row of the batch has its own."""
        raise ValueError("rows with budgets of their own are followed apart (RowFollower)")

    def step_of(self, row: int, step: int) -> int | None:
        """The step of a row's own plan that it takes at a step of the batch; None where it waits."""
        return self._own[row][step]

    def computed(self, step: int) -> list[int]:
        """Rows that are evaluated at a step."""
        return [row for row, own in enumerate(self._own) if own[step] is not None]


def _place(plan: TimePlan, time: float) -> int | None:
    near = np.abs(plan.times[:-1] - time) <= STILL
    return int(near.argmax()) if near.any() else None


class RowFollower:
    """As `Follower`, for a batch whose rows have plans of their own."""

    def __init__(self, plan: RowPlans) -> None:
        self.plan = plan
        distinct = {id(each): each for each in plan.plans}.values()
        self._groups = [[i for i, each in enumerate(plan.plans) if each is one] for one in distinct]
        self._runs = [Follower(each) for each in distinct]
        # as float32, in which a scheduler keeps its times
        self._sizes = [np.diff(each.times.astype(np.float32).astype(float)) for each in distinct]

    def __copy__(self) -> RowFollower:
        twin = object.__new__(RowFollower)
        twin.__dict__.update(vars(self))
        twin._runs = [copy.copy(run) for run in self._runs]
        return twin

    def step(self, index: int, x: Tensor, v: Tensor, size: float) -> Tensor:
        """The next state: of rows that are evaluated here, at their own next time; others stay.

        size: of the batch's step, which is no row's. Raises ValueError for another number of rows.
        """
        if len(x) != len(self.plan.plans):
            raise ValueError(f"{len(self.plan.plans)} budgets for a batch of {len(x)}: give one for each")
        after = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        for rows, run, sizes in zip(self._groups, self._runs, self._sizes, strict=True):
            own = self.plan.step_of(rows[0], index)
            if own is not None:
                after[rows] = run.step(own, x[rows], v[rows], float(sizes[own]))
        return after


@contextmanager
def left_out(transformers: Sequence[nn.Module], plan: RowPlans, step: Any) -> Iterator[None]:
    """Inside, transformers are called for the rows that a plan computes. step: says which step it is.

    What is returned for other rows is not theirs. Raises ValueError for a transformer that is compiled in
    place: nothing can be left out inside of a graph.
    """
    handles: list[Any] = []
    for transformer in transformers:
        if transformer._compiled_call_impl is not None:
            raise ValueError(
                "the transformer is compiled in place, and rows of its batch cannot be left out; give one "
                "budget, or compile its blocks: transformer.compile_repeated_blocks()"
            )
        calls = _Calls(argument_names(getattr(transformer, "_orig_mod", transformer)), plan, step)
        handles.append(transformer.register_forward_pre_hook(calls.before, with_kwargs=True))
        handles.append(transformer.register_forward_hook(calls.after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Calls:
    """Of one transformer: takes rows out of its arguments, and fills their places in its output."""

    def __init__(self, names: Sequence[str], plan: RowPlans, step: Any) -> None:
        self.names, self.plan, self.step = names, plan, step
        self._places: list[int] | None = None

    def before(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """The arguments for the rows that are computed."""
        self._places, step, rows = None, self.step(), len(self.plan.plans)
        computed = self.plan.computed(step) if step < self.plan.evaluations else range(rows)
        if len(computed) == rows:
            return args, kwargs
        inputs = by_name(self.names, args, kwargs)
        found = count_rows(inputs[self.names[0]])
        if found % rows:
            raise ValueError(f"a call of {found} rows for a batch of {rows}: which are whose is not known")
        index = [part * rows + row for part in range(found // rows) for row in computed]
        at = {row: place for place, row in enumerate(index)}
        self._places = [at.get(row, 0) for row in range(found)]
        listed = isinstance(inputs[self.names[0]], list)
        return (), {name: picked(value, index, found, name, listed) for name, value in inputs.items()}

    def after(self, _module: nn.Module, _args: Any, output: Any) -> Any:
        """An output of all rows; where one was left out, the first computed one stands in."""
        places = self._places
        if places is None:
            return None

        def spread(value: Any) -> Any:
            if isinstance(value, list):  # one tensor for each row
                return [value[i] for i in places]
            return value[places] if isinstance(value, Tensor) else value

        return tree_map(spread, output, is_leaf=lambda value: isinstance(value, list))


def picked(value: Any, index: Sequence[int], rows: int, name: str = "", listed: bool = False) -> Any:
    """An argument of a call of so many rows, for those in `index`: tensors and lists that are as long, also
    inside of others. Positions and tables of angles have tokens for lines. listed: whether the sample is a
    list with one tensor a row, so that other such lists are too.
    """
    if isinstance(value, Tensor):
        angles = "rotary" in name or "freqs" in name
        table = value.dim() == 2 and (angles or ("ids" in name and value.shape[1] <= POSITIONS))
        return value[list(index)] if value.dim() and len(value) == rows and not table else value
    if isinstance(value, Mapping):
        return {key: picked(inner, index, rows, name, listed) for key, inner in value.items()}
    if isinstance(value, tuple):
        return tuple(picked(inner, index, rows, name, listed) for inner in value)
    if isinstance(value, list):
        whole = any(isinstance(each, Tensor) and each.dim() and len(each) == rows for each in value)
        if len(value) == rows and (listed or not whole):
            return [value[i] for i in index]
        return [picked(inner, index, rows, name, listed) for inner in value]
    return value
