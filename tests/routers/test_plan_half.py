"""Half steps on real blocks: the second CFG branch is predicted from what the first has just added."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from routers.elastic import Elastic
from routers.planned.plan import StepPlan
from routers.planned.policy import PlannedPolicy
from routers.planned.prediction import HALF, WHOLE, Moments
from routers.policy import CallInfo, Decision, Units
from routers.trace import FULL, REUSE
from tests.block_kinds import CASES, Case

TIMES = (0.9, 0.7, 0.5)
QWEN = next(case for case in CASES if case.name.startswith("qwen"))


class HalfSteps(PlannedPolicy):
    """Every step but the first is a half one."""

    def _solve(self, call: CallInfo, split: bool) -> tuple[StepPlan, Units, slice]:
        levels = np.full(len(TIMES), HALF if split else 0, np.int8)
        levels[0] = WHOLE
        return StepPlan(levels, None, 0.0, 0.0, split), self._run.segments, slice(0)


class WithoutPeer(HalfSteps):
    """The same, what the first branch adds ignored."""

    def decide(self, call: CallInfo, logits: np.ndarray | None) -> Decision:
        return replace(super().decide(call, logits), peer=None)


def same_branches() -> Moments:
    """Both branches always add the same, and nothing can be told from earlier steps."""
    return Moments(
        ("cond", "uncond"),
        np.kron(np.ones((2, 2)) + 1e-9 * np.eye(2), np.eye(len(TIMES))),
        np.ones(len(TIMES)),
        np.array([4.0, -3.0]),
    )


def outputs(case: Case, policy: PlannedPolicy) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Outputs and decisions of all calls, cond and uncond in turn, both branches given the same inputs."""
    model = case.transformer()
    elastic, found = Elastic(model, case.spec), []
    try:
        with torch.no_grad(), elastic.scope(policy=policy, num_steps=len(TIMES), budget=0.7) as trace:
            for t in TIMES:
                for branch in ("cond", "uncond"):
                    with model.cache_context(branch):
                        found.append(case.run(model, t=t))
    finally:
        elastic.detach()
    return found, [call.actions for call in trace.calls]


def test_second_branch_is_predicted_from_the_first() -> None:
    found, actions = outputs(QWEN, HalfSteps(same_branches()))
    for step in range(1, len(TIMES)):
        cond, uncond = found[2 * step], found[2 * step + 1]
        assert (actions[2 * step] == FULL).all() and (actions[2 * step + 1] == REUSE).all()
        assert torch.allclose(cond, uncond, atol=1e-4), "equal branches must give equal outputs"


def test_prediction_needs_the_first_branch() -> None:
    found, _ = outputs(QWEN, WithoutPeer(same_branches()))
    assert not torch.allclose(found[2], found[3], atol=1e-2)
