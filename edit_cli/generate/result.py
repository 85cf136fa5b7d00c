"""What runs add up to: spent budgets, FLOPs, decisions, calls. Both generating commands report it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Tally:
    """Measurements summed over runs; `spent` has one entry per result, in the order they were made."""

    spent: list[float] = field(default_factory=list)
    flops: dict[str, float] = field(default_factory=lambda: {"dense": 0.0, "spent": 0.0})
    decisions: dict[str, Any] = field(default_factory=lambda: {"skip": 0, "reuse": 0, "compute": {}})
    seconds: dict[str, float] = field(default_factory=dict)
    calls: int = 0
    comparison: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def book(self, trace: Any, rows: Sequence[int]) -> None:
        """Add a run's trace. rows: which of its rows were asked for."""
        self.spent += [trace.spent[row] for row in rows]
        for name, value in trace.flops.items():
            self.flops[name] += value
        for name in ("skip", "reuse"):
            self.decisions[name] += trace.decisions[name]
        compute = self.decisions["compute"]
        for width, count in trace.decisions["compute"].items():
            compute[width] = compute.get(width, 0) + count
        self.calls += trace.num_calls
        self.notes += [note for note in trace.notes if note not in self.notes]

    def note_slower(self, elastic: float, dense: float) -> None:
        """Say so if fewer FLOPs took longer. elastic, dense: seconds of denoising."""
        if elastic > dense and self.flops["spent"] < 0.999 * self.flops["dense"]:
            self.notes.append(
                f"elastic was slower than dense here ({elastic:.2f} s against {dense:.2f} s of denoising): "
                "the model is too small or the run too short for the saved FLOPs to show"
            )
