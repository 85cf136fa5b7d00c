"""What happened in a run: every decision, its FLOPs, and the time in the transformer.

Shapes: R rows of a transformer call, S samples of a run, N blocks.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from .spec import WIDTHS

SKIP, REUSE = -2, -1
"""Action codes. A code >= 0 means: compute with the MLP at WIDTHS[code]."""
FULL = len(WIDTHS) - 1
"""Action code of the dense computation."""

Actions = NDArray[np.int8]


def feasible(actions: Actions, available: NDArray[np.int64]) -> Actions:
    """A reuse with nothing cached computes instead."""
    return np.where((actions == REUSE) & (available == 0), FULL, actions).astype(np.int8)


@dataclass
class CallRecord:
    """One transformer call: what each row did in each block, and what it cost."""

    step: int
    branch: str
    actions: Actions
    """int8 [R, N], codes as above."""
    flops: NDArray[np.float64]
    """[R]: FLOPs spent per row, routers and the layers around the blocks included."""
    dense_flops: float
    """FLOPs of one row run densely."""
    seconds: float = 0.0
    """Of the call, in s, on a CPU; 0 where a device works on when the call returns."""
    gate: NDArray[np.float32] | None = None
    """[R, N] gate logits the routers gave, where a policy read them."""


@dataclass
class Trace:
    """The record of one scope: filled while a pipeline runs, complete when the scope ends."""

    requested: float | None = None
    """Asked budget, ratio of dense FLOPs; None when nothing was asked."""
    num_steps: int | None = None
    """Of the last run."""
    samples: int = 0
    kinds: list[str] = field(default_factory=list)
    """Block kind per block, in execution order."""
    calls: list[CallRecord] = field(default_factory=list)
    host_syncs: int = 0
    """Device-to-host reads made by the policy."""
    cache_bytes: int = 0
    """Peak of the feature cache."""
    remarks: list[str] = field(default_factory=list)
    """What was noted while the run was made."""
    _first: int = 0
    """Number of the last run's first call: a scope may hold several runs."""
    _lengths: list[tuple[int, int]] = field(default_factory=list)
    """Steps planned for and steps made of the runs before the last."""

    def begin(self, num_steps: int) -> None:
        """A run of so many steps begins."""
        if self.calls:
            self._lengths.append((self.num_steps or 0, self._made()))
        self.num_steps, self._first = num_steps, len(self.calls)

    def note(self, remark: str) -> None:
        """Add a remark, once."""
        if remark not in self.remarks:
            self.remarks.append(remark)

    def _made(self) -> int:
        return 1 + max((call.step for call in self.calls[self._first :]), default=-1)

    @property
    def notes(self) -> list[str]:
        """What a user should know of this run, in plain words."""
        notes = list(self.remarks)
        if not self.calls or self.requested is None or self.requested >= 1.0:
            return notes
        for planned, made in [*self._lengths, (self.num_steps or 0, self._made())]:
            if planned != made:
                notes.append(
                    f"{made} steps were made where {planned} were planned for, so what was spent is not what "
                    "was asked for"
                )
        decisions = self.decisions
        partial = any(count for width, count in decisions["compute"].items() if width != "1.0")  # type: ignore[attr-defined]
        if not (decisions["skip"] or decisions["reuse"] or partial):
            notes.append("nothing was skipped: every block ran in full")
        return notes

    @property
    def num_calls(self) -> int:
        """Transformer calls."""
        return len(self.calls)

    @property
    def seconds(self) -> float:
        """Time in the transformer on a CPU, s; 0 on other devices, whose own clock `Elastic.timer` reads."""
        return sum(call.seconds for call in self.calls)

    @property
    def spent(self) -> list[float]:
        """FLOPs ratio to dense, per sample, over all its calls and CFG branches."""
        spent, dense = self._per_sample()
        return [float(s / d) if d else 1.0 for s, d in zip(spent, dense, strict=True)]

    @property
    def flops(self) -> dict[str, float]:
        """FLOPs of all samples together: {"dense": ..., "spent": ...}."""
        spent, dense = self._per_sample()
        return {"dense": float(dense.sum()), "spent": float(spent.sum())}

    @property
    def decisions(self) -> dict[str, object]:
        """How often each action was taken, counted per row, block and call."""
        codes = np.concatenate([call.actions.ravel() for call in self.calls] or [np.empty(0, np.int8)])
        compute = {str(width): int((codes == i).sum()) for i, width in enumerate(WIDTHS)}
        return {"skip": int((codes == SKIP).sum()), "reuse": int((codes == REUSE).sum()), "compute": compute}

    def _per_sample(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        spent, dense = np.zeros(self.samples), np.zeros(self.samples)
        for call in self.calls:
            # Rows of a batched-CFG call are branch-major, so row r belongs to sample r % S.
            sample = np.arange(len(call.flops)) % self.samples
            np.add.at(spent, sample, call.flops)
            np.add.at(dense, sample, call.dense_flops)
        return spent, dense

    def summary(self) -> str:
        """One paragraph: budget asked and spent, decisions, cache, notes."""
        if not self.calls:
            return "no run yet"
        spent = self.spent
        asked = "none" if self.requested is None else f"{self.requested:g}"
        decisions = self.decisions
        widths = ", ".join(f"{w}: {n}" for w, n in decisions["compute"].items() if n)  # type: ignore[attr-defined]
        lines = [
            f"budget asked {asked}, spent {sum(spent) / len(spent):.3f} of dense FLOPs "
            f"({self.flops['spent']:.3g} of {self.flops['dense']:.3g}) in {self.num_calls} calls"
            + (f", {self.seconds:.2f} s" if self.seconds else ""),
            f"blocks skipped {decisions['skip']}, reused {decisions['reuse']}, computed at width "
            f"{{{widths}}}; cache {self.cache_bytes / 2**20:.1f} MiB",
            *self.notes,
        ]
        return "\n".join(lines)
