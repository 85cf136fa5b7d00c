"""What `edit calibrate` does once its arguments are known: load, fit, measure, save, show."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.table import Table

import routers
from backbones import loading, registry
from backbones.spec import Backbone, Placement
from backbones.workload import PipelineWorkload
from edit_cli import __version__
from edit_cli.errors import EditError
from edit_cli.prompts import default_prompts, read_prompts
from routers.calibrate.evaluate import Quality, as_metadata, evaluate, prefers_routers, recommend
from routers.calibrate.fit import FitSettings, fit

HELD_OUT = 8
"""Samples that only measure the finished bundle."""
POINTS = 8
"""Budgets measured between the lowest and 1."""


@dataclass
class Calibration:
    """A loaded model with its calibration and held-out requests."""

    backbone: Backbone
    pipe: Any
    train: PipelineWorkload
    judge: PipelineWorkload
    settings: FitSettings
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def open(
        cls, model: str, prompts: str | None, device: str | None, dtype: str | None, asked: dict[str, Any]
    ) -> Calibration:
        """Load a model and cut the prompts into requests. Raises EditError or ValueError for bad input."""
        backbone = registry.resolve(model)
        lines = [entry["prompt"] for entry in read_prompts(prompts or str(default_prompts(backbone)))]
        pipe = loading.load_pipeline(backbone, Placement(device=device or "auto", dtype=dtype or "auto"))
        pipe.set_progress_bar_config(disable=True)
        defaults = backbone.defaults
        rows = min(asked["batch_size"] or backbone.batch_size, asked["samples"])
        guidance = defaults.guidance if asked["guidance"] is None else asked["guidance"]
        train = PipelineWorkload(
            pipe, backbone.family, _cycle(lines, asked["samples"]), rows, asked["steps"] or defaults.steps,
            guidance, defaults.width, defaults.height, asked["seed"], defaults.max_sequence_length,
        )  # fmt: skip
        held_out = _cycle(lines[::-1], max(HELD_OUT, rows))
        judge = replace(train, prompts=held_out, seed=asked["seed"] + 10_000)
        return cls(backbone, pipe, train, judge, FitSettings(probes=asked["probes"], seed=asked["seed"]))

    def fit(self, low: float, bars: Any) -> routers.Bundle:
        """A new bundle for this model."""
        start = time.perf_counter()
        bundle = fit(
            self.pipe.transformer, self.backbone.family.transformer, self.train, self.backbone.name,
            self.train.guidance, self.settings, _reporter(bars),
        )  # fmt: skip
        bundle.min_budget = low
        report = _reporter(bars)
        prefers_routers(self.pipe.transformer, bundle, self.train, lambda d, t: report("per sample?", d, t))
        self.seconds["fit"] = time.perf_counter() - start
        return bundle

    def load(self, path: str) -> routers.Bundle:
        """An existing bundle, checked against this model."""
        bundle = routers.load_bundle(path)
        routers.attach(self.pipe.transformer, bundle, budget=1.0).detach()
        return bundle

    def measure(self, bundle: routers.Bundle, low: float, high: float, bars: Any) -> list[Quality]:
        """Quality, spend and time at budgets from low to high, on requests that were not fitted."""
        start = time.perf_counter()
        budgets = [round(float(b), 3) for b in np.linspace(max(low, bundle.min_budget), high, POINTS)]
        report = _reporter(bars)
        rows = evaluate(
            self.pipe.transformer, bundle, self.judge, budgets, lambda d, t: report("measure", d, t)
        )
        self.seconds["measure"] = time.perf_counter() - start
        return rows

    def save(self, bundle: routers.Bundle, rows: Sequence[Quality], folder: Path) -> None:
        """Record how the bundle was made and write it. Raises EditError if the folder cannot be written."""
        bundle.recommended_budget = recommend(rows)
        bundle.metadata |= {
            "quality": as_metadata(rows),
            "settings": asdict(self.settings),
            "prompts": len(set(self.train.prompts)),
            "seconds": {name: round(value, 1) for name, value in self.seconds.items()},
            "threads": torch.get_num_threads(),
            "versions": {"edit": __version__, "torch": torch.__version__, "diffusers": version("diffusers")},
        }
        try:
            bundle.save(folder)
        except OSError as error:
            raise EditError(
                f"bundle folder {str(folder)!r} cannot be written: {error.strerror or error}"
            ) from error


def as_json(bundle: routers.Bundle, rows: Sequence[Quality], folder: Path) -> dict[str, Any]:
    """The object that `--json` prints."""
    return {
        "bundle": str(folder),
        "model": bundle.base_model,
        "recommended_budget": recommend(rows),
        "per_sample": bundle.per_sample,
        "router_correlation": bundle.metadata.get("router_correlation"),
        "quality": as_metadata(rows),
    }


def as_table(bundle: routers.Bundle, rows: Sequence[Quality], folder: Path) -> Table:
    """The closing table."""
    best = recommend(rows)
    table = Table(
        title=f"{folder}: {bundle.base_model}, recommended budget {best:g}", title_justify="left", box=None
    )
    for name in ("budget", "spent", "range over samples", "latent SNR", "time / dense"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            f"{row.budget:g}" + (" *" if row.budget == best else ""),
            f"{row.spent:.3f}",
            f"{row.spent_low:.3f} to {row.spent_high:.3f}",
            f"{row.snr:.1f} dB",
            f"{row.time_ratio:.2f}",
        )
    return table


def _cycle(lines: Sequence[str], count: int) -> list[str]:
    return [lines[i % len(lines)] for i in range(count)]


def _reporter(bars: Any) -> Callable[[str, int, int], None]:
    tasks: dict[str, Any] = {}

    def report(phase: str, done: int, total: int) -> None:
        if bars is None:
            return
        if phase not in tasks:
            tasks[phase] = bars.add_task(phase, total=total)
        bars.update(tasks[phase], completed=done, total=total)

    return report
