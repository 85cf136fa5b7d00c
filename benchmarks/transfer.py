"""What a bundle is worth where it was not made: other steps, guidance, times, size, weights, another model.

    python -m benchmarks.transfer                              # qwen-image-tiny at budgets 0.4 and 0.6
    python -m benchmarks.transfer flux-tiny --budgets 0.5 --count 8
    python -m benchmarks.transfer qwen-image-tiny --other flux-tiny --changes same "half of the steps"

For every change a table row: latent SNR in dB to the dense run there, mean over `--count` prompts that
nothing was fitted on, of the plan that needs nothing, of one dense run's (`--observe`), of the bundle as it
is used there, and of a bundle made there. The bundle is made at the model's own settings; where its plans
were made for other times, it falls back to the plan that needs nothing, at the times that it likes best,
and the table says so. "its weights" are its plans' all the same, step by step. A fine-tune is not among the
changes. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import routers
from edit_cli.calibrate.calibration import Calibration
from edit_cli.calibrate.plan import make_calibration_plan
from edit_cli.request import Request
from routers.calibrate.evaluate import latent_snr
from routers.calibrate.fit import fit
from routers.calibrate.settings import FitSettings
from routers.planned.follow import Planner
from routers.planned.scheduler import elastic_scheduler
from routers.planned.spent import evaluations_for
from routers.planned.timeplan import Array, TimePlan
from routers.planned.universal import universal_plan, universal_planner

FITTED = 2
"""Samples that the bundles are made on."""
RANK, STRENGTH = 4, 0.1
"""Of the random LoRA; as a share of each weight's norm."""


@dataclass
class Place:
    """A model with samples to fit on and others to judge by."""

    pipe: Any
    spec: Any
    name: str
    guidance: float
    fitted: Any
    judged: Any

    @classmethod
    def open(cls, model: str, count: int) -> Place:
        """The packaged model at its own settings."""
        asked = {"model": model, "output": "unused", "method": "fit", "samples": FITTED}
        plan = make_calibration_plan(Request(asked))
        calibration = Calibration.open(plan)
        backbone, judged = plan.generation.backbone, calibration.judge
        judged.num_batches = min(judged.num_batches, max(1, count // judged.rows))
        guidance = plan.generation.jobs[0].guidance
        pipe, spec = calibration.session.pipe, backbone.family.transformer
        return cls(pipe, spec, backbone.name, guidance, calibration.train, judged)

    def changed(self, **fields: Any) -> Place:
        """The same with other fields of its workloads."""
        guidance = fields.get("guidance", self.guidance)
        judged = replace(self.judged, **fields)
        judged.num_batches = self.judged.num_batches
        return replace(self, fitted=replace(self.fitted, **fields), judged=judged, guidance=guidance)

    def warp(self) -> Any:
        """What the scheduler knows of times where nothing was measured."""
        return getattr(self.pipe.scheduler, "warps", {}).get("dense")

    def latents(self, planner: Planner | None = None) -> Tensor:
        """Final latents of the judged samples."""
        with torch.no_grad(), nullcontext() if planner is None else elastic_scheduler(self.pipe, planner):
            return torch.cat([self.judged.run(batch).cpu() for batch in range(self.judged.num_batches)])

    def calibrated(self, budgets: tuple[float, ...]) -> routers.Bundle:
        """What `edit calibrate` makes here."""
        settings = FitSettings(budgets=budgets)
        return fit(self.pipe.transformer, self.spec, self.fitted, self.name, self.guidance, settings)

    def observed(self) -> routers.Bundle:
        """What `--observe` makes here of one dense run."""
        elastic = routers.attach(self.pipe)
        try:
            with torch.no_grad(), elastic.observe() as seen:  # type: ignore[union-attr]
                self.fitted.run(0)
            return seen.bundle(self.name, self.guidance, self.spec)
        finally:
            elastic.detach()


def moved(bundle: routers.Bundle, budget: float, warp: Any) -> Planner:
    """A bundle's weights step by step, whatever the run's own times: for as many evaluations."""

    def planner(grid: Array) -> TimePlan | None:
        count = evaluations_for(budget, len(grid) - 1)
        near = universal_plan(grid, count, "dense", bundle.warps.get("dense", warp))
        plans = bundle.plans["dense"]
        plan = plans[min(plans, key=lambda number: abs(number - count))]
        if plan.evaluations != count or len(near.times) != len(plan.times):
            return near
        return TimePlan(near.times, plan.weights, plan.state)

    return planner


@contextmanager
def with_lora(place: Place) -> Iterator[Place]:
    """A random LoRA on the attention, taken off again."""
    named = place.pipe.transformer.named_modules()
    linears = [module for name, module in named if isinstance(module, nn.Linear) and "attn" in name]
    before, random = [linear.weight.detach().clone() for linear in linears], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for linear in linears:
            rows, columns = linear.weight.shape
            change = torch.randn(rows, RANK, generator=random) @ torch.randn(RANK, columns, generator=random)
            size = STRENGTH * linear.weight.norm().cpu() / change.norm()
            linear.weight += (size * change).to(linear.weight)
    try:
        yield place
    finally:
        with torch.no_grad():
            for linear, weight in zip(linears, before, strict=True):
                linear.weight.copy_(weight)


@contextmanager
def with_times(place: Place) -> Iterator[Place]:
    """The sampler with Karras's times."""
    own = place.pipe.scheduler
    place.pipe.scheduler = type(own).from_config(own.config, use_karras_sigmas=True)
    try:
        yield place
    finally:
        place.pipe.scheduler = own


Change = Callable[[Place], Any]


def changes(place: Place) -> dict[str, Change]:
    """What can be another way for this model: name -> a context with the place as it then is."""

    def fields(**given: Any) -> Change:
        return lambda place: nullcontext(place.changed(**given))

    steps, found = place.judged.num_steps, dict[str, Change]()
    found["same"] = nullcontext
    found["half of the steps"] = fields(num_steps=steps // 2)
    found["twice the steps"] = fields(num_steps=2 * steps)
    if place.guidance > 1:
        found["guidance halved"] = fields(guidance=max(1.5, place.guidance / 2))
        found["guidance doubled"] = fields(guidance=2 * place.guidance)
    if getattr(place.judged, "width", None):
        side = place.judged.width
        found["other size"] = fields(width=side * 3 // 2, height=side)
    if "use_karras_sigmas" in getattr(place.pipe.scheduler, "config", {}):
        found["other times"] = with_times
    found["LoRA"] = with_lora
    return found


def measure(
    place: Place, bundle: routers.Bundle, budgets: tuple[float, ...], other: routers.Bundle | None = None
) -> dict[str, Any]:
    """Mean latent SNR of every plan at every budget, and why a bundle's plans do not serve."""
    dense, why, warp = place.latents(), "", place.warp()
    here, seen = place.calibrated(budgets), place.observed()
    found: dict[str, Any] = {}
    for budget in budgets:
        planners: dict[str, Planner] = {
            "nothing": universal_planner(budget, "dense", warp),
            "observed": seen.planner(budget, "dense", warp),
            "bundle": bundle.planner(budget, "dense", warp),
            "its weights": moved(bundle, budget, warp),
            "made here": here.planner(budget, "dense", warp),
        }
        if other is not None:
            planners["another model's"] = moved(other, budget, warp)
        for name, planner in planners.items():
            snr = float(np.mean(latent_snr(place.latents(planner), dense)))
            found.setdefault(name, {})[f"{budget:g}"] = round(snr, 2)
    grids: list[Array] = []
    with elastic_scheduler(place.pipe, lambda grid: grids.append(grid)):  # type: ignore[func-returns-value]
        place.judged.run(0, num_steps=None)
    why = bundle.unfitted(grids[-1])
    return {"snr": found, "unfitted": why}


def as_markdown(rows: dict[str, Any], budgets: tuple[float, ...]) -> str:
    """A row for each change and budget."""
    names = list(dict.fromkeys(name for row in rows.values() for name in row["snr"]))
    lines = [f"| change | budget | {' | '.join(names)} | |", "|---" * (len(names) + 3) + "|"]
    for change, row in rows.items():
        for budget in budgets:
            values = [row["snr"].get(name, {}).get(f"{budget:g}") for name in names]
            cells = " | ".join("-" if value is None else f"{value:.1f}" for value in values)
            lines.append(f"| {change} | {budget:g} | {cells} | {verdict(row, budget)} |")
    return "\n".join(lines)


def verdict(row: dict[str, Any], budget: float) -> str:
    """What the figures of a change say of the bundle."""
    snr = {name: values[f"{budget:g}"] for name, values in row["snr"].items()}
    if row["unfitted"]:
        return f"not used; calibrating again gains {snr['made here'] - snr['bundle']:.1f} dB"
    return f"holds: {snr['made here'] - snr['bundle']:.1f} dB behind one made there"


def main(arguments: list[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", nargs="?", default="qwen-image-tiny")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.4, 0.6])
    parser.add_argument("--count", type=int, default=8, help="prompts that judge")
    parser.add_argument("--changes", nargs="+", help="these alone")
    parser.add_argument("--other", help="a model whose bundle is tried too, at the same steps")
    parser.add_argument("--steps", type=int, help="of the run that the bundle is made for")
    given = parser.parse_args(arguments)
    budgets, place = tuple(sorted(given.budgets)), Place.open(given.model, given.count)
    place = place.changed(num_steps=given.steps) if given.steps else place
    bundle, other = place.calibrated(budgets), None
    if given.other:
        there = Place.open(given.other, given.count)
        other = there.changed(num_steps=place.judged.num_steps).calibrated(budgets)
    known, rows = changes(place), {}
    for name in given.changes or known:
        if name not in known:
            parser.error(f"no change {name!r} of {place.name}; there are {', '.join(known)}")
        with known[name](copy.copy(place)) as changed:
            rows[name] = measure(changed, bundle, budgets, other if name == "same" else None)
    print(as_markdown(rows, budgets))
    print(json.dumps({"model": place.name, "changes": rows}))


if __name__ == "__main__":
    main()
