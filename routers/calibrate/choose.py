"""Which steps to compute, decided by trying: the closed form proposes plans, runs of the model choose.

The closed form of planned/prediction.py adds errors up as if nothing answered to them. Where few are left out
that is close; where most are, its best plan can be several dB behind its third best, and a plan of more
steps behind one of fewer (docs/notes/planning.md). So calibration runs a few proposals for every number of
branch passes on some of its samples, and keeps the best:

1. the closed form's own choice, with gains as measured, evened out by half, and all alike;
2. the best plan of one pass less, with one more, and then that of one pass more, with one less.

Shapes: R rows, S steps, K plans.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from ..elastic import Elastic
from ..planned.plan import Planner, raised
from ..planned.policy import PlannedPolicy
from ..planned.prediction import DEAD, HALF, WHOLE, Levels, Moments
from .evaluate import latent_snr
from .record import Record
from .state import State
from .workload import Workload, run_patched

EVENED = (1.0, 0.5, 0.0)
"""Exponents of the gains that plans are proposed with. Measured gains are noisy, and they hold for a run in
which every other step is computed."""
MOVES = 2
"""Neighbours of a plan that are tried, those the closed form likes best."""
HIGHEST = 0.9
"""Share of the steps from which plans are no longer tried: what they leave is beyond measuring."""


@dataclass
class Trials:
    """Runs of plans on some batches, each plan once."""

    elastic: Elastic
    workload: Workload
    recorded: Record
    moments: Moments
    batches: int
    state: State | None = None
    scores: dict[bytes, float] = field(default_factory=dict)
    planners: dict[tuple[int, int], Planner] = field(default_factory=dict)

    def score(self, levels: Levels) -> float:
        """Mean latent SNR in dB to the dense run. Raises NotFiniteError, OSError."""
        key = levels.tobytes()
        if key not in self.scores:
            score = None if self.state is None else self.state.trial(levels.tolist())
            if score is None:
                score = float(np.mean([self._run(levels, batch) for batch in range(self.batches)]))
                if self.state is not None:
                    self.state.keep_trial(levels.tolist(), score)
            self.scores[key] = score
        return self.scores[key]

    def splits(self) -> bool:
        """Whether the CFG branches come in calls of their own, so that steps can be half ones."""
        if len(self.moments.branches) != 2:
            return False
        policy = self._policy(np.full(self.workload.num_steps, WHOLE, np.int8))
        run_patched(self.elastic, self.workload, 0, policy, "plans, all steps computed")
        return policy.plan is not None and policy.plan.split

    def _policy(self, levels: Levels) -> PlannedPolicy:
        return PlannedPolicy(self.moments, self.planners, levels=levels)

    def _run(self, levels: Levels, batch: int) -> list[float]:
        """SNR in dB of each row of a batch."""
        phase = f"plans, computing {int(levels.sum())} branch passes"
        latents = run_patched(self.elastic, self.workload, batch, self._policy(levels), phase)
        rows = self.workload.rows
        return latent_snr(latents, self.recorded.latents[batch * rows : (batch + 1) * rows])


def choose_plans(
    elastic: Elastic,
    workload: Workload,
    recorded: Record,
    moments: Moments,
    samples: int,
    least: float,
    report: Callable[[int, int], None] = lambda done, total: None,
    state: State | None = None,
) -> Levels | None:
    """Levels [K, S] of the best plan tried for each number of branch passes; None without samples or steps.

    samples: rows that plans are tried on, rounded up to whole batches. least: the smallest budget that
    is served. state: keeps every trial, and gives back those of an earlier attempt.
    """
    steps, batches = workload.num_steps, min(-(-samples // workload.rows), workload.num_batches)
    if batches < 1 or steps < 4:
        return None
    trials = Trials(elastic, workload, recorded, moments, batches, state)
    split = trials.splits()
    grain = HALF if split else WHOLE
    first = max(WHOLE, WHOLE * int(least * steps) - WHOLE)
    counts = range(first, int(WHOLE * HIGHEST * steps) + 1, grain)
    planners = [Planner(replace(moments, gain=evened(moments.gain, e), plans=None)) for e in EVENED]
    best: dict[int, Levels] = {}
    stages = [
        lambda count: [planner.best(count, split)[0] for planner in planners],
        lambda count: moves(planners[1], best.get(count - grain), grain),
        lambda count: moves(planners[1], best.get(count + grain), -grain),
    ]
    for number, stage in enumerate(stages):
        order = counts if number < len(stages) - 1 else reversed(counts)
        for done, count in enumerate(order, 1):
            tried = [*([best[count]] if count in best else []), *stage(count)]
            best[count] = max(tried, key=trials.score)
            report(number * len(counts) + done, len(stages) * len(counts))
    return np.stack([best[count] for count in counts])


def evened(gain: NDArray[np.float64], exponent: float) -> NDArray[np.float64]:
    """Gains [S] brought nearer to their median, as a power; steps that never reach the latents stay so."""
    typical = float(np.median(gain))
    alive = gain > DEAD * 10 * typical
    nearer = gain.copy()
    nearer[alive] = typical * (gain[alive] / typical) ** exponent
    return nearer


def moves(planner: Planner, levels: Levels | None, by: int) -> list[Levels]:
    """Plans [S] that compute `by` branch passes more (or less) than `levels`, in one step."""
    if levels is None:
        return []
    places = [s for s in range(1, len(levels)) if 0 <= levels[s] + by <= WHOLE]
    plans = [plan for plan in (raised(levels, s, by) for s in places) if planner.is_late(plan)]
    return sorted(plans, key=planner.error)[:MOVES]
