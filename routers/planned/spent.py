"""What a budget buys, and what a run on a plan spent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .course import Turn

if TYPE_CHECKING:
    from ..trace import Trace

GRAIN = 0.005
"""A budget may be missed by so much before a run says so."""
ROUNDING = 1e-6
"""A budget may be so little below what whole evaluations come to, as a share of one."""
EXACT_EVALUATIONS, EXACT_SHARE = 100, 4
"""Evaluations of a run that counts as exact, and how many for each step of the dense run, if that is more."""


def evaluations_for(budget: float, steps: int) -> int:
    """Whole evaluations that a share of the dense run's FLOPs buys, at least one.

    Raises ValueError for a budget that is not in (0, 1].
    """
    if not 0 < budget <= 1:
        raise ValueError(f"budget {budget:g} is not a share of the dense run's FLOPs; give one in (0, 1]")
    return max(1, int(budget * steps + ROUNDING))


@dataclass
class PlanTrace:
    """requested: share of the dense run's FLOPs. target: see `universal.py`. samples: results of the run.
    steps: what the dense run takes; planned: how many of them the plan evaluates. made, of: evaluations
    made so far, and how many the dense run would have made. widths: of narrow evaluations, in turn;
    ratio: what routers may spend of each; blocks: what the engine counted of them, None where all are
    whole. remarks: see `notes`. rows: traces of each row, where these have budgets of their own:
    `requested` is then their mean, and `made` counts calls for any of them. seconds: that the run was
    given, None for as many as it takes; took: that it took. turns: how a plan came about that was chosen
    on the way (`course.py`).
    """

    requested: float
    target: str = "dense"
    samples: int = 1
    steps: int = 0
    planned: int = 0
    made: int = 0
    of: int = 0
    host_syncs: int = 0
    widths: tuple[float, ...] = ()
    ratio: float = 1.0
    blocks: Trace | None = None
    remarks: list[str] = field(default_factory=list)
    rows: list[PlanTrace] = field(default_factory=list)
    seconds: float | None = None
    took: float = field(default=0.0, compare=False)
    turns: list[Turn] = field(default_factory=list)

    @property
    def num_steps(self) -> int:
        """Steps of the dense run, as they were believed to be."""
        return self.steps

    @property
    def num_calls(self) -> int:
        """Transformer calls that a dense run makes up to here; `made` of them were computed."""
        return self.of

    @property
    def share(self) -> float:
        """Share of the dense run's FLOPs that was spent: of rows with budgets of their own, the mean."""
        if self.rows:
            return sum(row.share for row in self.rows) / len(self.rows)
        if not self.of:
            return 1.0
        counted = {} if self.blocks is None else self.blocks.flops
        return self.made / self.of * (counted["spent"] / counted["dense"] if counted.get("dense") else 1.0)

    @property
    def spent(self) -> list[float]:
        """The share, for every sample."""
        return [row.share for row in self.rows] or [self.share] * self.samples

    @property
    def notes(self) -> list[str]:
        """What a user should know of this run, in plain words."""
        if self.rows:
            return list(dict.fromkeys([*self.remarks, *(note for row in self.rows for note in row.notes)]))
        if self.seconds is not None:
            late = self.took > self.seconds
            text = f"asked {self.seconds:.3g} s, took {self.took:.3g} s"
            return [*self.remarks, text] if late else self.remarks
        share = self.planned / self.steps if self.steps else self.requested
        share = self.share if self.blocks is not None else share
        if abs(share - self.requested) <= GRAIN and not self.narrow:
            return self.remarks
        return [
            *self.remarks,
            f"a budget of {self.requested:g} buys {self.planned} of {self.steps} evaluations{self.narrow}, "
            f"which is {share:.2f} of the dense FLOPs",
        ]

    @property
    def narrow(self) -> str:
        """How narrow evaluations are, in words."""
        if self.ratio < 1:
            return f", of each {self.ratio:g} as its routers choose"
        names = list(dict.fromkeys(f"{width:g}" for width in self.widths))
        return f" with MLPs at width {' and '.join(names)}" if names else ""

    def summary(self) -> str:
        """One paragraph: budget asked and spent, evaluations, notes."""
        if not self.of:
            return "no run yet"
        asked = f"budget asked {self.requested:g}"
        if self.seconds is not None:
            asked = f"asked {self.seconds:g} s, took {self.took:.3g} s"
        if self.rows:
            budgets = ", ".join(f"{row.requested:g} (spent {row.share:.3f})" for row in self.rows)
            asked = f"budgets asked {budgets}"
        spent = f"{asked}, spent {self.share:.3f} of dense FLOPs"
        return "\n".join(
            [f"{spent}: {self.made} evaluations of {self.of}, target {self.target}", *self.notes]
        )
