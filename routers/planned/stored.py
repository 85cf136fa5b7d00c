"""Plans as the tensors of a file: "plans.<target>.<evaluations>.<array>", "narrow.<target>.<i>.<array>"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..spec import TARGETS
from .narrow import SAME_TIMES, NarrowPlan
from .timeplan import Array, TimePlan

LARGEST_WEIGHT = 1e4
"""Of a step of a plan: fitted ones are a few units."""


def to_tensors(
    plans: Mapping[str, Mapping[int, TimePlan]], narrow: Mapping[str, Sequence[NarrowPlan]]
) -> dict[str, Tensor]:
    """What `read_plans` and `read_narrow` read."""
    arrays = {f"plans.{t}.{n}": plan.to_arrays() for t, each in plans.items() for n, plan in each.items()}
    for target, found in narrow.items():
        arrays |= {f"narrow.{target}.{i}": one.to_arrays() for i, one in enumerate(found)}
    return {
        f"{key}.{name}": torch.from_numpy(array.copy())
        for key, named in arrays.items()
        for name, array in named.items()
    }


def _arrays(tensors: dict[str, Tensor], kind: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Arrays "<kind>.<target>.<number>.<name>" by target and number."""
    arrays: dict[tuple[str, str], dict[str, Any]] = {}
    for key, value in tensors.items():
        if key.startswith(f"{kind}."):
            target, number, name = (*key.split(".")[1:], "", "")[:3]
            arrays.setdefault((target, number), {})[name] = value.double().numpy()
    return arrays


def _checked(target: str, number: str, read: Callable[[], TimePlan | NarrowPlan], times: Array) -> Any:
    """A plan of a file. Raises ValueError, which names it, where it does not fit the run."""
    try:
        found = read()
        plan = found.plan if isinstance(found, NarrowPlan) else found
        if target not in TARGETS:
            raise ValueError(f"targets are {TARGETS}")
        if isinstance(found, TimePlan) and str(plan.evaluations) != number:
            raise ValueError(f"it makes {plan.evaluations} evaluations")
        if len(times) < 2 or not np.allclose(plan.times[[0, -1]], times[[0, -1]], atol=SAME_TIMES):
            raise ValueError("it begins or ends at other times than the run it was fitted for")
        if plan.evaluations > len(times) - 1:
            raise ValueError("it makes more evaluations than the run it was fitted for")
        if max(np.abs(plan.weights).max(), np.abs(plan.state).max()) > LARGEST_WEIGHT:
            raise ValueError(f"it has a weight above {LARGEST_WEIGHT:g}")
    except ValueError as error:
        raise ValueError(f"the plan {target}.{number}: {error}") from error
    return found


def read_plans(tensors: dict[str, Tensor], times: Array) -> dict[str, dict[int, TimePlan]]:
    """Plans of whole evaluations, by target and their number. times: of the run. Raises ValueError."""
    plans: dict[str, dict[int, TimePlan]] = {}
    for (target, number), arrays in _arrays(tensors, "plans").items():
        plan = _checked(target, number, partial(TimePlan.from_arrays, arrays), times)
        plans.setdefault(target, {})[plan.evaluations] = plan
    return plans


def read_narrow(tensors: dict[str, Tensor], times: Array) -> dict[str, list[NarrowPlan]]:
    """Plans with narrow evaluations by target, cheapest first. times: of the run. Raises ValueError."""
    narrow: dict[str, list[NarrowPlan]] = {}
    for (target, number), arrays in _arrays(tensors, "narrow").items():
        found = _checked(target, number, partial(NarrowPlan.from_arrays, arrays), times)
        narrow.setdefault(target, []).append(found)
    return {target: sorted(plans, key=lambda found: found.share) for target, plans in narrow.items()}
