"""Replay golden cases and compare every recorded tensor.

A case is a folder with `config.json`, `weights.safetensors`, `inputs.safetensors`, `outputs.safetensors`.
A folder of key tables (`summary.json`, no config) is checked against the modules' own keys instead.
The longest matching prefix of a case name picks a function `run(case) -> Outcome`, imported when needed.
To add a family: write its file with such functions, add rows to FAMILIES.
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

FAMILIES: dict[str, str] = {
    "hunyuan3d_dit_v2": "tests.golden.hunyuan3d:run_dit_v2",
    "hunyuan3d_dit_v21": "tests.golden.hunyuan3d:run_dit_v21",
    "shapevae_decode": "tests.golden.hunyuan3d:run_shapevae_decode",
    "shapevae_encode": "tests.golden.hunyuan3d:run_shapevae_encode",
    "volume_decode": "tests.golden.hunyuan3d_surface:run_volume_decode",
    "mesh_extraction": "tests.golden.hunyuan3d_surface:run_mesh_extraction",
    "fourier_embedder": "tests.golden.hunyuan3d:run_fourier_embedder",
    "flow_match_scheduler": "tests.golden.hunyuan3d:run_schedulers",
    "sampling_loop": "tests.golden.hunyuan3d:run_sampling_loop",
    "dino_conditioner": "tests.golden.hunyuan3d_image:run_conditioner",
    "image_preprocess": "tests.golden.hunyuan3d_image:run_image_preprocess",
    "edit_reference": "tests.golden.edit_reference:run",
}
"""Case name prefix -> "module:function"."""


@dataclass(frozen=True)
class Tolerance:
    """`|actual - expected| <= atol + rtol * |expected|`, element by element."""

    atol: float = 2e-5
    rtol: float = 1e-4

    def __str__(self) -> str:
        return f"{self.atol:g}+{self.rtol:g}*|ref|" if self.rtol else f"{self.atol:g}"


@dataclass(frozen=True)
class Case:
    """One folder, read. `tolerance` is the config's, or the default if that has no atol and rtol."""

    name: str
    folder: Path
    config: dict[str, Any]
    weights: dict[str, Tensor]
    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    tolerance: Tolerance

    @classmethod
    def read(cls, folder: Path) -> Case:
        """Raises OSError, ValueError or a safetensors error if the folder has another layout."""
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        files = ("weights", "inputs", "outputs")
        weights, inputs, outputs = (load_file(folder / f"{name}.safetensors") for name in files)
        given = config.get("tolerance")
        known = (
            {k: float(given[k]) for k in ("atol", "rtol") if k in given} if isinstance(given, Mapping) else {}
        )
        return cls(config["case"], folder, config, weights, inputs, outputs, Tolerance(**known))


@dataclass
class Outcome:
    """What an implementation computed, under the names of the case's outputs.

    expected: replaces recorded outputs that can only be compared in another form (say, sorted).
    tolerances: by name, where they differ from the case's. not_compared: recorded name -> why.
    Every recorded output must be in `actual` or in `not_compared`.
    """

    actual: dict[str, Tensor]
    expected: dict[str, Tensor] = field(default_factory=dict)
    tolerances: dict[str, Tolerance] = field(default_factory=dict)
    not_compared: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Comparison:
    """One tensor: the largest difference and whether all elements are within tolerance."""

    name: str
    difference: float
    ok: bool
    tolerance: str = "-"
    note: str = ""


@dataclass(frozen=True)
class Report:
    """The verdict on one case."""

    case: str
    comparisons: tuple[Comparison, ...] = ()
    error: str = ""

    @property
    def ok(self) -> bool:
        """True if something was compared and all of it agreed."""
        compared = [c for c in self.comparisons if c.note != "not compared"]
        return not self.error and bool(compared) and all(c.ok for c in self.comparisons)

    def line(self) -> str:
        """`case  max|diff|  tolerance  ok|FAIL`, of the tensor furthest off (failing ones first)."""
        worst = max(
            self.comparisons,
            key=lambda c: (not c.ok, c.difference),
            default=Comparison("", float("nan"), False),
        )
        return f"{self.case}  {worst.difference:.3e}  {worst.tolerance}  {'ok' if self.ok else 'FAIL'}"

    def details(self, only_failures: bool = False) -> str:
        """One indented line per tensor, after the error if there is one."""
        shown = [c for c in self.comparisons if not (only_failures and c.ok)]
        lines = [
            f"  {c.name}  {c.difference:.3e}  {c.tolerance}  {'ok' if c.ok else 'FAIL'}  {c.note}".rstrip()
            for c in shown
        ]
        return "\n".join(([f"  {self.error}"] if self.error else []) + lines)


def find_family(name: str) -> str | None:
    """The table row for a case name: the longest prefix wins."""
    matches = [prefix for prefix in FAMILIES if name.startswith(prefix)]
    return FAMILIES[max(matches, key=len)] if matches else None


def run_case(folder: Path) -> Report:
    """Replay one folder. A bad folder, an unknown case or a crash is a FAIL, never an exception."""
    if (folder / "summary.json").is_file() and not (folder / "config.json").exists():
        return _key_tables(folder)
    try:
        case = Case.read(folder)
    except Exception as error:
        return Report(folder.name, error=f"cannot read {folder}: {type(error).__name__}: {error}")
    family = find_family(case.name)
    if family is None:
        return Report(case.name, error=f"unknown case; known prefixes are {', '.join(sorted(FAMILIES))}")
    try:
        module, function = family.split(":")
        run: Callable[[Case], Outcome] = getattr(importlib.import_module(module), function)
        with torch.no_grad():
            outcome = run(case)
    except Exception as error:
        return Report(case.name, error=f"{type(error).__name__}: {error}")
    return _report(case, outcome)


def _key_tables(folder: Path) -> Report:
    from .key_tables import check_tables

    try:
        return Report(folder.name, tuple(check_tables(folder)))
    except Exception as error:
        return Report(folder.name, error=f"{type(error).__name__}: {error}")


def _report(case: Case, outcome: Outcome) -> Report:
    expected = {**case.outputs, **outcome.expected}
    comparisons = []
    for name, tensor in expected.items():
        if name in outcome.not_compared:
            comparisons.append(Comparison(name, 0.0, True, note="not compared"))
        elif name not in outcome.actual:
            comparisons.append(Comparison(name, float("inf"), False, note="not computed"))
        else:
            tolerance = outcome.tolerances.get(name, case.tolerance)
            comparisons.append(compare(name, outcome.actual[name], tensor, tolerance))
    return Report(case.name, tuple(comparisons))


def compare(name: str, actual: Tensor, expected: Tensor, tolerance: Tolerance) -> Comparison:
    """Largest absolute difference; NaN on either side, or another shape, is a failure."""
    if actual.shape != expected.shape:
        return Comparison(
            name,
            float("inf"),
            False,
            str(tolerance),
            f"shape {list(actual.shape)}, expected {list(expected.shape)}",
        )
    if expected.numel() == 0:
        return Comparison(name, 0.0, True, str(tolerance))
    wide, reference = actual.double(), expected.double()
    difference = (wide - reference).abs()
    ok = bool((difference <= tolerance.atol + tolerance.rtol * reference.abs()).all())
    worst = float("nan") if difference.isnan().any() else difference.max().item()
    return Comparison(name, worst, ok, str(tolerance))
